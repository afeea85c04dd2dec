"""A system that costs nothing, for tests of everything around the models; and clips for it."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from gura_jax import Encoder, FrameGrid, Member, Model, Output, System, load_model
from gura_jax.dataset import commit
from gura_jax.dataset.run import Run, open_run
from gura_jax.dataset.sources import read_inputs
from gura_jax.dataset.table import Settings
from gura_jax.dataset.workers import Summary, Worker, work
from gura_jax.files import LOCK_FILE
from gura_jax.fusion import Embeddings, Keep, KeptStates

RATE = 16_000
HOP = RATE // 50
ALONE = Worker(0, 1, "a test")


class Toy(Encoder):
    """An encoder whose frames are mean, maximum and minimum of 20 ms; without weights, for NumPy and JAX arrays."""

    feature_size = 3

    def __init__(self, sample_rate: int = RATE) -> None:
        hop = sample_rate // 50
        self.sample_rate, self.grid = sample_rate, FrameGrid(hop, 0.625 * hop, hop * 5 // 4)

    def init(self, key: Any) -> dict[str, Any]:
        return {}

    def __call__(self, params: Any, audio: Any, lengths: Any) -> Output:
        xp: Any = jnp if isinstance(audio, jax.Array) else np
        B, T = audio.shape[0], self.grid.count(audio.shape[1])
        blocks = audio[:, : T * self.grid.hop].reshape(B, T, self.grid.hop)
        frames = xp.stack([blocks.mean(-1), blocks.max(-1), blocks.min(-1)], -1)
        return Output(frames, self.grid.count(lengths))


class ToyModel(Model):
    """A model of one toy encoder that computes with NumPy: nothing to compile."""

    def __call__(
        self, audio: Any, lengths: Any, *, scenes: bool = True, frames: bool = True, keep: Keep | None = None
    ) -> Embeddings:
        if isinstance(audio, Mapping):
            audio, lengths = audio[self.sample_rate], lengths[self.sample_rate]
        out, counts, _ = self.fusion.members[0].encoder({}, audio, lengths)
        means: Any = np.stack([row[:count].mean(0) for row, count in zip(out, counts, strict=True)])
        if keep is None:
            return Embeddings(out, counts, means)
        states = (
            KeptStates(means[:, None, None], None, None)
            if keep.of == "mean"
            else KeptStates(out[:, :, None], counts, None)
        )
        return Embeddings(out, counts, means, {"toy": states})


def toy_model(kind: type[ToyModel] = ToyModel, *, rate: int = RATE, batches_in_flight: int = 0) -> Any:
    model = load_model(System("toy", (Member(Toy(rate), name="toy"),)))
    platform = dataclasses.replace(model.platform, batches_in_flight=batches_in_flight)
    return kind(model.system, model.fusion, model.params, model.weights, model.compilation, model.dtype, platform)


def environment(devices: int = 1, **variables: str) -> dict[str, str]:
    """For a process of its own, which sees so many CPU devices and compiles as this one does."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"} | variables


def write_clips(folder: Path, seconds: Iterable[float], suffix: str = "wav", rate: int = RATE) -> list[Path]:
    """Noise of these lengths, as ``clip-000.wav`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, length in enumerate(seconds):
        paths.append(folder / f"clip-{i:03d}.{suffix}")
        noise = 0.1 * np.random.default_rng(i).standard_normal(round(length * rate))
        soundfile.write(paths[-1], noise, rate)
    return paths


def opened(inputs: Any, out: Path | str, settings: Settings | None = None, **options: Any) -> Run:
    """A run of the toy model."""
    inputs = inputs if isinstance(inputs, list) else [inputs]
    model = options.pop("model", None) or toy_model()
    clips = read_inputs(inputs, sample_rate=model.sample_rate)
    return open_run(model, clips, out, settings or Settings(timestamps=True), **options)


def embedded(
    inputs: Any,
    out: Path | str,
    settings: Settings | None = None,
    worker: Worker = ALONE,
    verify: bool = False,
    **options: Any,
) -> Summary:
    """A run of the toy model, to its end."""
    return work(opened(inputs, out, settings, **options), worker, verify=verify)


def interrupt(run: Run, batches: int) -> None:
    """Embed a run's shards, and interrupt it as Ctrl-C does once so many batches are done."""
    done = 0

    def report(_: Any) -> None:
        nonlocal done
        done += 1
        if done == batches:
            raise KeyboardInterrupt

    try:
        list(run.embed_shards(run.shards, report))
    except KeyboardInterrupt:
        return
    raise AssertionError(f"the run ended with {done} batches, before it was interrupted")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store, and its content; not files that were set aside."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_FILE and path.relative_to(folder).parts[0] != commit.ASIDE
    }
