"""gura_jax/dataset/ray_engine.py, on a real cluster of this machine: several nodes, and workers that die."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import environment as bucket_environment
from s3_server import serving, stored
from toy import contents, environment, write_clips

from gura_jax import EmbeddingStore, objects
from gura_jax.dataset import commit
from gura_jax.errors import InputError

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

COMMAND = [
    "-s",
    "hubert_base",
    "--weights",
    "random",
    "--size",
    "tiny",
    "--shard-hours",
    "0.0006",
    "--batch-seconds",
    "2",
]
ENVIRONMENT = environment(RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
SECONDS = [0.5] * 24  # of one length: one program to compile


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving("clips") as address:
        yield address


@pytest.fixture(scope="module")
def cluster(server: str) -> Iterator[str]:
    """A head and another node, each with a CPU of its own, and with the credentials of the bucket."""
    from ray.cluster_utils import Cluster

    ENVIRONMENT.update(bucket_environment(server))
    before = {name: os.environ.get(name) for name in ("XLA_FLAGS", "JAX_PLATFORMS", *bucket_environment(server))}
    os.environ |= {name: ENVIRONMENT[name] for name in before}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield str(made.address)
    made.shutdown()
    for name, value in before.items():
        if value is not None:
            os.environ[name] = value
        else:
            os.environ.pop(name)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, SECONDS)
    (folder / "broken.wav").write_text("not audio")
    return folder


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    gura(clips, "--out", out)
    return out


def gura(*arguments: Any, code: int = 3) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("gura-jax")
    command = [program, "embed", *map(str, arguments), *COMMAND]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def workers() -> list[int]:
    """Processes of workers of the cluster."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                title = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if title.startswith("ray::_Worker"):
                found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_the_bytes_are_those_of_one_process(cluster: str, clips: Path, whole: Path, tmp_path: Path) -> None:
    result = gura(clips, "--out", tmp_path / "out", "--engine", "ray", "--address", cluster)
    assert contents(tmp_path / "out") == contents(whole)
    assert f"{len(SECONDS)} clips" in result.stdout
    assert "broken.wav: cannot be decoded" in result.stderr
    again = gura(clips, "--out", tmp_path / "out", "--engine", "ray", "--address", cluster)
    assert again.stdout.startswith("0 clips")


def test_a_worker_that_is_killed_is_replaced(cluster: str, clips: Path, whole: Path, tmp_path: Path) -> None:
    """One in the middle of the run, then the other: nothing is lost, and nothing differs."""
    killed: list[int] = []

    def kill() -> None:
        for shards in (2, 5):
            while len(commit.shard_numbers(tmp_path / "out") if (tmp_path / "out").is_dir() else []) < shards:
                time.sleep(0.02)
            victim = next((pid for pid in workers() if pid not in killed), None)
            if victim is not None:
                killed.append(victim)
                os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    gura(clips, "--out", tmp_path / "out", "--engine", "ray", "--address", cluster)
    killer.join()
    assert len(killed) == 2
    assert contents(tmp_path / "out") == contents(whole)
    assert len(EmbeddingStore(tmp_path / "out")) == len(SECONDS)


@pytest.mark.slow
def test_from_bucket_to_bucket(cluster: str, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder that the workers share; one is killed. And two tasks of Slurm, at once."""
    for name in bucket_environment(""):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    objects._client.cache_clear()
    for path in clips.iterdir():
        objects.put(objects.locate(f"s3://clips/in/{path.name}"), path.read_bytes())
    gura("s3://clips/in", "--out", "s3://clips/one")
    killed: list[int] = []

    def kill() -> None:
        while len(commit.shard_numbers("s3://clips/ray")) < 2:
            time.sleep(0.1)
        killed.append(workers()[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    gura("s3://clips/in", "--out", "s3://clips/ray", "--engine", "ray", "--address", cluster)
    killer.join()
    assert len(killed) == 1
    assert stored("s3://clips/ray") == stored("s3://clips/one")
    program = Path(sys.executable).with_name("gura-jax")
    tasks = [
        subprocess.Popen(
            [program, "embed", "s3://clips/in", "--out", "s3://clips/slurm", *COMMAND],
            env=ENVIRONMENT | {"SLURM_PROCID": str(i), "SLURM_STEP_NUM_TASKS": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [task.communicate() for task in tasks]
    assert [task.returncode for task in tasks] in ([3, 3], [0, 3], [3, 0]), outputs  # who has the broken clip says so
    assert all("of 2 (by SLURM_PROCID)" in out for out, _ in outputs)
    assert stored("s3://clips/slurm") == stored("s3://clips/one")


def test_which_hosts_get_a_worker() -> None:
    from gura_jax.dataset.ray_engine import _hosts

    head = {"Alive": True, "Resources": {"CPU": 8.0}}
    gpu = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}}
    tpu = {"Alive": True, "Resources": {"CPU": 8.0, "TPU": 4.0}}
    dead = {"Alive": False, "Resources": {"GPU": 4.0}}
    assert _hosts([head, gpu, dead, tpu]) == [gpu, tpu]
    assert _hosts([head, {"Alive": True, "Resources": {}}, head]) == [head, head]
    with pytest.raises(InputError, match="hosts that compute"):
        _hosts([dead])


@pytest.mark.slow
def test_a_workers_own_error_is_the_users(cluster: str, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scene-00000.npy").write_text("precious")
    result = gura(clips, "--out", tmp_path / "out", "--engine", "ray", "--address", cluster, code=1)
    assert "found scene-00000.npy: choose another folder" in result.stderr
    result = gura(clips, "--out", tmp_path / "new", "--engine", "ray", "--address", "127.0.0.1:1", code=1)
    assert "--engine ray: expected a cluster at 127.0.0.1:1" in result.stderr
    result = gura(
        clips, "--out", tmp_path / "new", "--engine", "ray", "--num-shards", "2", "--shard-index", "0", code=1
    )
    assert "of no use" in result.stderr
