"""benchmarks/: that the suite runs, with nothing but its core installed, and that its arithmetic is right."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

from gura_jax import ENCODERS, Options
from gura_jax.backend import PLATFORMS
from gura_jax.models.families import build_encoder

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# What an audio library, a checkpoint or a data set needs, and an embedding of arrays does not.
NOT_CORE = ("soundfile", "soxr", "librosa", "torchcrepe", "pyarrow", "orbax", "typer", "torchaudio")
FLOPS_BOUND = 0.05  # relative: norms, activations and softmax are not counted


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import work  # pyright: ignore[reportMissingImports]

    return work


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
    assert "| crepe-tiny | 16x1 | eager |" in (tmp_path / "results" / "name.md").read_text()


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
