"""benchmarks/: that the suite runs, with nothing but its core installed, and that its arithmetic is right."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gura_jax import ENCODERS, FAMILIES, Options
from gura_jax.backend import PLATFORMS
from gura_jax.models.families import build_encoder

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# What an audio library, a checkpoint or a data set needs, and an embedding of arrays does not.
NOT_CORE = ("soundfile", "soxr", "librosa", "torchcrepe", "pyarrow", "orbax", "typer", "torchaudio")
FLOPS_BOUND = 0.05  # relative: norms, activations and softmax are not counted
RUNTIMES = ("onnx", "openvino", "openvino-bfloat16")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module("work", monkeypatch)


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.mark.slow
def test_the_suite_runs_without_audio_libraries(tmp_path: Path) -> None:
    for name in NOT_CORE:
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "XLA_FLAGS": ""}
    command = [sys.executable, BENCHMARKS / "run.py", "--systems", "crepe-tiny", "--workloads", "16x1"]
    command += ["--rounds", "1", "--weights", tmp_path / "weights", "--out", tmp_path / "results" / "name"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "results" / "name.json").read_text())["rows"]
    assert row["distance"] < 1e-5
    assert len(row["seconds"]) == len(row["peer_seconds"]) == 1
    assert row["share_of_product"] == row["gflop_per_second"] / row["product_gflop_per_second"][0]
    assert row["peer_share_of_product"] == pytest.approx(row["share_of_product"] / row["ratio"])
    assert "| crepe-tiny | 16x1 | eager |" in (tmp_path / "results" / "name.md").read_text()


def test_shares_are_of_the_product_in_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    share = module("run", monkeypatch)._share
    assert share(100.0, [1.0, 2.0, 4.0], [200.0, 100.0, 50.0]) == 0.5
    assert share(100.0, [1.0, 1.0, 4.0], [200.0, 125.0, 25.0]) == 0.8


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run, peers = module("run", monkeypatch), module("peers", monkeypatch)
    package = peers.Package("no-such-runtime", BENCHMARKS / ".none")
    monkeypatch.setattr(run, "PEERS", {"onnx": peers.PEERS["onnx"]._replace(package=package)})
    monkeypatch.setattr(sys, "argv", ["run.py", "--peers", "onnx"])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    message = "--peers onnx: expected the package no-such-runtime, found none: run make benchmarks/.none/installed"
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_other_runtimes_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported takes any number of clips of any length."""
    peers = module("peers", monkeypatch).PEERS
    missing = [name for name in RUNTIMES if peers[name].package.version is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: make benchmarks/.peers/installed")
    command = [sys.executable, BENCHMARKS / "run.py", "--systems", "crepe-tiny", "hubert-base"]
    command += ["--workloads", "4x4", "16x1", "--peers", *RUNTIMES, "--rounds", "1"]
    command += ["--weights", tmp_path / "weights", "--out", tmp_path / "name"]
    environment = os.environ | {"XLA_FLAGS": "", "VERBOSE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "name.json").read_text())
    assert found["peers"].keys() == set(RUNTIMES)
    assert len(found["rows"]) == 12
    for row in found["rows"]:
        assert row["distance"] <= peers[row["peer"]].same
        assert row["share_of_product"] == row["gflop_per_second"] / row["product_gflop_per_second"][0]


# On a GPU


SECTIONS = """
import os, time

def about(sizes, folder):
    yield "A Device (R)"
    yield "what it was measured on"

def works(sizes, folder):
    (folder / "shared").write_text("from another section")
    yield f"{sizes.clips} clips"

def fails(sizes, folder):
    yield (folder / "shared").read_text()
    raise ValueError("of no use")

def crashes(sizes, folder):
    yield "before"
    os.kill(os.getpid(), 9)

def hangs(sizes, folder):
    yield "so far"
    time.sleep(600)
"""
GPU_LIMIT = 10  # seconds: many times what the sections before the one that hangs take


@pytest.mark.slow
def test_a_gpu_run_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever becomes of a section: it raises, it crashes, or time is up."""
    (tmp_path / "sections.py").write_text(SECTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    gpu, sections = module("gpu", monkeypatch), importlib.import_module("sections")
    names = ("works", "fails", "crashes", "hangs", "works")
    monkeypatch.setattr(gpu, "describe", sections.about)
    monkeypatch.setattr(gpu, "SECTIONS", {f"{i} {name}": getattr(sections, name) for i, name in enumerate(names)})
    out = tmp_path / "results" / "gpu.md"
    arguments = ["--size", "tiny", "--seconds-limit", str(GPU_LIMIT), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    assert gpu.main() == 1
    written = "\n".join(line for line in out.read_text().splitlines() if line)
    assert written == (
        "what it was measured on\n"
        "## 0 works\n2 clips\n"
        "## 1 fails\nfrom another section\nValueError: of no use\n**Failed** with exit code 1.\n"
        "## 2 crashes\nbefore\n**Failed** with exit code -9.\n"
        "## 3 hangs\nso far\nCut at the time limit.\n"
        "## 4 works\nCut at the time limit."
    )


def test_every_network_is_compared_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = module("gpu", monkeypatch)
    found = {FAMILIES[ENCODERS[name].config.model_type].build for name in gpu.PARITY}
    assert found == {family.build for name, family in FAMILIES.items() if name not in gpu.NOT_COMPARED}


@pytest.mark.slow
def test_a_gpu_run_needs_nothing_but_the_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it on the CPU, with small encoders, where neither gura_jax nor what an image lacks is installed."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("gura_jax", "__editable__", *NOT_CORE)):
            (packages / path.name).symlink_to(path)
    out = tmp_path / "gpu.md"
    command = [sys.executable, "-S", BENCHMARKS / "gpu.py", "--size", "tiny", "--seconds-limit", "1800", "--out", out]
    # Without torch.compile's compiler, which takes minutes.
    environment = os.environ | {"PYTHONPATH": str(packages), "XLA_FLAGS": "", "TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    gpu, written = module("gpu", monkeypatch), out.read_text()
    parts = written.split("\n## ")
    assert [part.partition("\n")[0] for part in parts[1:]] == list(gpu.SECTIONS)
    assert "Cut" not in written
    rows = {part.partition("\n")[0]: part.count("\n| ") - 1 for part in parts}
    expected = {"Product": 2, "Parity": len(gpu.PARITY), "jit and pmap": 2, "Training": 1, "torch.compile": 3}
    assert rows | expected | dict.fromkeys(gpu.SYSTEMS, 2) == rows


# What is counted


@pytest.mark.parametrize("encoder", ["hubert-base", "wav2vec2-large", "crepe-tiny"])
def test_counted_operations_are_xlas(encoder: str, work: ModuleType) -> None:
    config, samples = ENCODERS[encoder].config, 40_000
    # XLA counts a loop's body once, so there must be no loops; and the layers' own operations, not those of spectra.
    sizes = {"frames": 1 << 20, "scores": 1 << 50, "tokens": 1 << 50, "crepe_frames": 1 << 20, "spectral_crepe": False}
    platform = dataclasses.replace(PLATFORMS["cpu"], **sizes)
    member = build_encoder(config, Options("last" if encoder.startswith("crepe") else "mean", platform=platform))
    audio, lengths = jax.ShapeDtypeStruct((1, samples), jnp.float32), jax.ShapeDtypeStruct((1,), "i4")
    cost = jax.jit(member.__call__).lower(member.abstract_params(), audio, lengths).cost_analysis()
    assert cost is not None
    assert work._flops(config, samples) == pytest.approx(cost["flops"], rel=FLOPS_BOUND)


@pytest.mark.slow
def test_search_beside_numpy(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "search.py", "--clips", "3000", "--size", "32", "--rounds", "1"]
    command += ["--folder", tmp_path] + ([] if importlib.util.find_spec("usearch") else ["--skip-index"])
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| exact | " in result.stdout
    assert "| NumPy, float32, in memory | " in result.stdout
