"""A stand-in for the Hugging Face hub: real HTTP on a loopback port, as much of it as a download needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs

import pytest
from huggingface_hub import constants, file_download

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves ``root/OWNER/NAME/FILE`` as the one commit of each model, from entry to exit of a ``with``.

    Data sets are in ``root/datasets/OWNER/NAME``, with folders.

    Attributes:
        denied: model -> HTTP status to refuse it with.
        cut: file name -> how many of its bytes arrive before the connection breaks, whatever range was asked for.
        downloads: names of the files that were asked for with GET, in order.
        sizes: of what was sent of them.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.denied: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        self.downloads: list[str] = []
        self.sizes: list[int] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


def serve(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running hub with the models under ``root``, which huggingface_hub uses with this cache; for fixtures."""
    with HubServer(root) as server:
        # What HF_ENDPOINT and HF_HUB_CACHE set, when they are set before the import.
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # the second until huggingface_hub 1.0
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield server


class _Handler(BaseHTTPRequestHandler):
    server: HubServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        match self.path.split("?")[0].strip("/").split("/"):
            case ["api", "models", owner, name] | ["api", "models", owner, name, "revision", _]:
                if self._allowed(f"{owner}/{name}"):
                    self._send_info(f"{owner}/{name}")
            case ["api", "datasets", owner, name] | ["api", "datasets", owner, name, "revision", _]:
                if self._allowed(f"datasets/{owner}/{name}"):
                    self._send_info(f"datasets/{owner}/{name}")
            case ["api", "datasets", owner, name, "tree", _, *folder]:
                if self._allowed(f"datasets/{owner}/{name}"):
                    self._send_tree(self.server.root / "datasets" / owner / name, "/".join(folder))
            case ["api", "datasets", owner, name, "paths-info", _]:
                if self._allowed(f"datasets/{owner}/{name}"):
                    self._send_paths(self.server.root / "datasets" / owner / name)
            case ["datasets", owner, name, "resolve", _, *parts]:
                if self._allowed(f"datasets/{owner}/{name}"):
                    self._send_file(self.server.root.joinpath("datasets", owner, name, *parts))
            case [owner, name, "resolve", _, file]:
                if self._allowed(f"{owner}/{name}"):
                    self._send_file(self.server.root / owner / name / file)
            case _:
                self._refuse(404, "EntryNotFound")

    def _allowed(self, repo: str) -> bool:
        status = self.server.denied.get(repo)
        if status:
            self._refuse(status, {403: "GatedRepo"}.get(status, ""))
        elif not (self.server.root / repo).is_dir():
            self._refuse(404, "RepoNotFound")
        else:
            return True
        return False

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if code:
            self.send_header("X-Error-Code", code)
        if code == "EntryNotFound":  # by which huggingface_hub's cache remembers what there is not
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()

    def _send_info(self, repo: str) -> None:
        files = sorted(path.name for path in (self.server.root / repo).iterdir())
        self._send_json({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})

    def _send_tree(self, home: Path, folder: str) -> None:
        if not (home / folder).is_dir():
            self._refuse(404, "EntryNotFound")
            return
        deep = "recursive=True" in self.path or "recursive=true" in self.path
        self._send_json([_entry(home, p) for p in sorted((home / folder).glob("**/*" if deep else "*"))])

    def _send_paths(self, home: Path) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = json.loads(content)["paths"] if content.startswith("{") else parse_qs(content)["paths"]
        self._send_json([_entry(home, home / path) for path in wanted if (home / path).exists()])

    def _send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content = path.read_bytes()
        start, stop = 0, len(content)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or stop) + 1, stop)
        part = content[start:stop]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.server.downloads.append(path.name)
            self.server.sizes.append(len(part))
            self.wfile.write(content[start : min(stop, self.server.cut.get(path.name, stop))])


def _entry(home: Path, path: Path) -> dict[str, object]:
    name = path.relative_to(home).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    content = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}
