"""Stores in Azure's blob storage, as its emulator has it: the same bytes, killed before any request."""

import base64
import hashlib
import hmac
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from s3_server import free_port, stored
from toy import contents, embedded, write_clips

from gura_jax import EmbeddingStore, objects
from gura_jax.dataset.table import Settings

AZURITE = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"
pytestmark = pytest.mark.skipif(not AZURITE.exists(), reason="no emulator of Azure here: make test-azure installs it")

SETTINGS = Settings(timestamps=True, shard_hours=4 / 3600, batch_seconds=2)
ACCOUNT = "devstoreaccount1"
# The emulator's own, which its documentation names.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    found = free_port()
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    command = [str(AZURITE), "--blobHost", "127.0.0.1", "--blobPort", str(found), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 60
        while True:
            try:
                make_container(found, "clips")
                break
            except OSError:
                assert time.monotonic() < deadline, "the emulator did not start"
                time.sleep(0.1)
        yield found
        server.terminate()


def make_container(port: int, name: str) -> None:
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    lines = [f"{key}:{value}" for key, value in headers.items()]
    signed = "\n".join(["PUT", *[""] * 11, *lines, f"/{ACCOUNT}/{ACCOUNT}/{name}", "restype:container"])
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), signed.encode(), hashlib.sha256)).decode()
    headers |= {"Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Length": "0"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("PUT", f"/{ACCOUNT}/{name}?restype=container", headers=headers)
    assert connection.getresponse().status == 201
    connection.close()


@pytest.fixture
def container(port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    variables = {
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        "AZURE_STORAGE_USE_EMULATOR": "true",
        "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    objects._client.cache_clear()
    return "az://clips"


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        objects.put(objects.locate(f"{url}/{path.name}"), path.read_bytes())


def test_the_same_bytes_as_on_a_disk(container: str, tmp_path: Path) -> None:
    write_clips(tmp_path / "in", (0.3, 1.2, 0.7, 2.0))
    embedded(tmp_path / "in", tmp_path / "out", SETTINGS)
    embedded(tmp_path / "in", f"{container}/out", SETTINGS)
    assert stored(f"{container}/out") == contents(tmp_path / "out")
    upload(tmp_path / "in", f"{container}/in")
    embedded(f"{container}/in", f"{container}/again", SETTINGS)
    assert sorted(EmbeddingStore(f"{container}/again").ids) == sorted(EmbeddingStore(tmp_path / "out").ids)
    assert objects.create(objects.locate(f"{container}/out/run.json"), b"x") is False


@pytest.mark.slow
def test_killed_at_every_request(container: str, tmp_path: Path) -> None:
    write_clips(tmp_path / "in", (0.3, 1.2, 0.7, 2.0))
    upload(tmp_path / "in", f"{container}/in")
    script = Path(__file__).with_name("killed_requests.py")
    run = subprocess.run(
        [sys.executable, str(script), f"{container}/in", f"{container}/runs", "npy"],
        capture_output=True,
        text=True,
        env=os.environ.copy(),
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    print(f"killed {run.stdout.split()[-1]} times")
    assert int(run.stdout.split()[-1]) > 20
