"""A server of S3 (moto's) in a process of its own, and a proxy before it that makes faults."""

import base64
import contextlib
import hashlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gura_jax.dataset.commit import ASIDE

ACCESS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "very-secret", "AWS_REGION": "us-east-1"}
START_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[str]:
    """The address of a server with these empty buckets."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                for bucket in buckets:
                    make_bucket(port, bucket)
                break
            except OSError:
                assert time.monotonic() < deadline, "the server did not start"
                assert server.poll() is None, "the server ended"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def make_bucket(port: int, bucket: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("PUT", f"/{bucket}")
    assert connection.getresponse().status == 200
    connection.close()


Fault = Callable[[str, str, int], str]
"""(method, path, how many requests before) -> what goes wrong: "", "503", "429", "reset", "403" or "slow"."""


@contextlib.contextmanager
def proxied(address: str, fault: Fault) -> Iterator[str]:
    """The address of a proxy before a server; each request is asked for its fault."""
    target = address.removeprefix("http://")
    lock, seen = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *_: Any) -> None:
            pass

        def answer(self) -> None:
            with lock:
                kind = fault(self.command, self.path, seen[0])
                seen[0] += 1
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if kind in ("503", "429", "403"):
                self.send_response(int(kind))
                self.send_header("Content-Length", "0")
                if kind == "429":
                    self.send_header("Retry-After", "1")
                self.end_headers()
                return
            connection = http.client.HTTPConnection(target, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            content = response.read()
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if kind == "reset":
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def files_served(folder: Path, ranges: bool = True) -> Iterator[str]:
    """The address of a web server of these files, with ranges of bytes or without."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = path.read_bytes()
            first, stop = 0, len(content)
            asked = self.headers.get("Range") if ranges else None
            if asked:
                begin, _, end = asked.removeprefix("bytes=").partition("-")
                first, stop = int(begin), min(stop, int(end or stop) + 1)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{len(content)}")
            self.send_header("Content-Length", str(stop - first))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            self.wfile.write(content[first:stop])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def environment(address: str) -> dict[str, str]:
    """Of a client of the server."""
    return {**ACCESS, "AWS_ENDPOINT_URL": address}


_READ = """
import base64, json, sys
from gura_jax import objects
from gura_jax.dataset.commit import ASIDE
root = objects.locate(sys.argv[1])
names = [entry.key.removeprefix(f"{root.key}/") for entry in objects.entries(root)]
names = [name for name in names if not name.startswith(f"{ASIDE}/")]
content = {name: objects.get(objects.Place(root.store, f"{root.key}/{name}")) for name in names}
print(json.dumps({name: base64.b64encode(each).decode() for name, each in content.items()}))
"""


def stored(url: str) -> dict[str, bytes]:
    """Every object of a store but those that were set aside, as another client sees them, one that survives a fork."""
    if not url.startswith("s3://"):
        # A process that forks may not have used obstore.
        found = subprocess.run([sys.executable, "-c", _READ, url], capture_output=True, check=True).stdout
        return {name: base64.b64decode(content) for name, content in json.loads(found).items()}
    import boto3

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3", region_name=ACCESS["AWS_REGION"])
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    found = {key.removeprefix(f"{prefix}/"): key for key in keys if not key.startswith(f"{prefix}/{ASIDE}/")}
    return {name: client.get_object(Bucket=bucket, Key=key)["Body"].read() for name, key in found.items()}
