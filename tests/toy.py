"""A system that costs nothing, for tests of everything around the models; and clips for it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from gura_jax import Member, Model, System, load_model
from gura_jax.audio import SAMPLE_RATE
from gura_jax.dataset import store
from gura_jax.dataset.manifest import read_inputs
from gura_jax.dataset.run import Run, Settings, open_run
from gura_jax.dataset.workers import Summary, Worker, work
from gura_jax.fusion import Embeddings

HOP = 320
ALONE = Worker(0, 1, "a test")


class Toy:
    """An encoder whose frames are a few sums over 20 ms."""

    feature_size = 3
    hop = HOP
    offset = 200.0
    min_samples = 400

    def __call__(self, params: Any, audio: Any, lengths: Any) -> tuple[Any, Any]:
        B = audio.shape[0]
        T = 1 + (audio.shape[1] - self.min_samples) // HOP
        frames = audio[:, : T * HOP].reshape(B, T, HOP)
        out = np.stack([frames.mean(-1), frames.max(-1), frames.min(-1)], -1)
        return out, 1 + (lengths - self.min_samples) // HOP


class ToyModel(Model):
    """A model that computes with NumPy: nothing to compile."""

    def __call__(self, audio: Any, lengths: Any, *, scenes: bool = True, frames: bool = True) -> Embeddings:
        out, counts = Toy()({}, audio, lengths)
        means: Any = np.stack([row[:count].mean(0) for row, count in zip(out, counts, strict=True)])
        return Embeddings(out, counts, means)


def toy_model() -> ToyModel:
    model = load_model(System("toy", (Member(Toy(), name="toy"),)))
    return ToyModel(model.system, model.fusion, model.params, model.weights, model.compilation)


def write_clips(folder: Path, seconds: Iterable[float], suffix: str = "wav", rate: int = SAMPLE_RATE) -> list[Path]:
    """Noise of these lengths, as ``clip-000.wav`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, length in enumerate(seconds):
        paths.append(folder / f"clip-{i:03d}.{suffix}")
        noise = 0.1 * np.random.default_rng(i).standard_normal(round(length * rate))
        soundfile.write(paths[-1], noise, rate)
    return paths


def opened(inputs: Any, out: Path, settings: Settings | None = None, **options: Any) -> Run:
    """A run of the toy model."""
    inputs = inputs if isinstance(inputs, list) else [inputs]
    model = options.pop("model", None) or toy_model()
    return open_run(model, read_inputs(inputs), out, settings or Settings(timestamps=True), **options)


def embedded(
    inputs: Any, out: Path, settings: Settings | None = None, worker: Worker = ALONE, **options: Any
) -> Summary:
    """A run of the toy model, to its end."""
    return work(opened(inputs, out, settings, **options), worker)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store, and what it holds; not what was set aside."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != store.LOCK_FILE and path.relative_to(folder).parts[0] != store.ASIDE
    }
