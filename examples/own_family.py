"""A family of encoders in one file: a log-mel encoder at 24 kHz and its PyTorch twin. docs/families.md explains it.

Importing the module registers the family. Running it converts the twin, compares the two, fuses the encoder with CREPE,
embeds the example clips, and evaluates both systems on a small task.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
import torch

from gura_jax import SYSTEMS, Encoder, Family, FrameGrid, Member, Options, Output, Preset, System, cli, register
from gura_jax.convert.keys import KeyTable, conv, dense, norm
from gura_jax.convert.references import Reference
from gura_jax.errors import SystemConfigError
from gura_jax.models.encoder import frame_mask, masked_mean
from gura_jax.models.layers import layer_weights, weighted_sum

RATE, WINDOW, HOP = 24_000, 960, 480  # Hz and samples: frames of 40 ms, every 20 ms
FLOOR, EPS = 1e-3, 1e-5
HANN = np.hanning(WINDOW + 1)[:-1].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LogMelConfig:
    """Sizes, under the names of ``config.json``."""

    model_type: str = "logmel"
    mels: int = 40
    size: int = 64
    blocks: int = 3

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> "LogMelConfig":
        known = {field.name for field in dataclasses.fields(cls)}
        if set(config) != known:
            raise SystemConfigError(f"config: expected {', '.join(sorted(known))}, found {', '.join(sorted(config))}")
        return cls(**config)

    def tiny(self) -> "LogMelConfig":
        return dataclasses.replace(self, size=16, blocks=1)


def mel_filters(mels: int) -> np.ndarray:
    """Triangles [bins, mels] whose edges lie evenly on the mel scale."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 1400), mels + 2) / 2595) - 1)
    hertz = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)


class LogMelEncoder(Encoder):
    """Log-mel frames, then convolutions over time with layer norm and residuals."""

    sample_rate = RATE

    def __init__(self, config: LogMelConfig, options: Options) -> None:
        self.config = config
        self.feature_size = self.pooled_size = config.size
        self.grid = FrameGrid(HOP, WINDOW / 2, WINDOW)
        self.num_states = config.blocks + 1
        self.parts = ("log-mel", *(f"state {i}" for i in range(self.num_states)))
        self.layer_weights = layer_weights(options.layers, config.blocks)

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        size, blocks = self.config.size, range(self.config.blocks)
        shapes = {"input.kernel": (self.config.mels, size), "head.kernel": (size, size)}
        shapes |= {f"blocks.{i}.conv.kernel": (3, size, size) for i in blocks}
        shapes |= {name.replace("kernel", "bias"): (size,) for name in shapes}
        shapes |= {f"blocks.{i}.norm.{name}": (size,) for i in blocks for name in ("scale", "bias")}
        keys = jax.random.split(key, len(shapes))
        return {n: 0.1 * jax.random.normal(k, shape) for k, (n, shape) in zip(keys, shapes.items(), strict=True)}

    def states(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        counts, T = self.grid.count(lengths), self.grid.count(audio.shape[1])
        mask = frame_mask(counts, T)[:, :, None]
        frames = audio[:, np.arange(T)[:, None] * HOP + np.arange(WINDOW)[None, :]]  # [B, T, WINDOW]
        spectrum = jnp.fft.rfft(frames * HANN[None, None, :])
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        x = jnp.log(power @ mel_filters(self.config.mels) + FLOOR)
        yield "log-mel", x, counts
        x = x @ params["input.kernel"] + params["input.bias"][None, None, :]
        yield "state 0", x, counts
        for i in range(self.config.blocks):
            p = {name: params[f"blocks.{i}.{name}"] for name in ("norm.scale", "norm.bias", "conv.kernel", "conv.bias")}
            y = x - x.mean(axis=-1, keepdims=True)
            y = y / jnp.sqrt(jnp.square(y).mean(axis=-1, keepdims=True) + EPS)
            y = y * p["norm.scale"][None, None, :] + p["norm.bias"][None, None, :]
            y = jnp.where(mask, y, 0.0)  # the convolution must not see what follows the clip
            y = jax.lax.conv_general_dilated(y, p["conv.kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
            x = x + jax.nn.gelu(y + p["conv.bias"][None, None, :], approximate=False)
            yield f"state {i + 1}", x, counts

    def __call__(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Output:
        _, *states = (value for _, value, _ in self.states(params, audio, lengths))
        counts = self.grid.count(lengths)
        mean = masked_mean(states[-1], frame_mask(counts, states[-1].shape[1]))
        pooled = mean @ params["head.kernel"] + params["head.bias"][None, :]
        return Output(weighted_sum(states, self.layer_weights), counts, pooled)


class Block(torch.nn.Module):
    """Layer norm, convolution over time, GELU."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.conv = torch.nn.LayerNorm(size, EPS), torch.nn.Conv1d(size, size, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.conv(self.norm(x).T).T)


class LogMelTwin(Reference):
    """The same network in PyTorch, on one clip; of a published encoder it would be its authors' code."""

    window: torch.Tensor
    filters: torch.Tensor

    def __init__(self, config: LogMelConfig) -> None:
        super().__init__(config)
        self.input, self.head = (torch.nn.Linear(n, config.size) for n in (config.mels, config.size))
        self.blocks = torch.nn.ModuleList(Block(config.size) for _ in range(config.blocks))
        self.register_buffer("window", torch.from_numpy(HANN), persistent=False)
        self.register_buffer("filters", torch.from_numpy(mel_filters(config.mels)), persistent=False)

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        spectrum = torch.fft.rfft(audio[0].unfold(0, WINDOW, HOP) * self.window)
        x = torch.log(spectrum.abs() ** 2 @ self.filters + FLOOR)
        yield "log-mel", x
        x = self.input(x)
        yield "state 0", x
        for i, block in enumerate(self.blocks):
            x = x + block(x)
            yield f"state {i + 1}", x
        yield "pooled", self.head(x.mean(dim=0))


KEYS = KeyTable(
    rows=(
        *dense("input", "input"),
        *norm(r"blocks\.(\d+)\.norm", r"blocks.\1.norm"),
        *conv(r"blocks\.(\d+)\.conv", r"blocks.\1.conv"),
        *dense("head", "head"),
    )
)
FAMILY = Family(
    name="logmel",
    config=LogMelConfig,
    build=LogMelEncoder,
    keys={"twin": KEYS},
    reference=f"{__name__}.LogMelTwin",
    presets={"logmel": Preset(LogMelConfig())},
)
FUSION = System(
    "logmel_crepe",
    members=(Member("logmel", layers="mean", scene="pooled"), Member("crepe-tiny")),
    combination="interleave",
    feature_size=64,
)
register(FAMILY)
SYSTEMS[FUSION.name] = FUSION


def gura_jax(*arguments: str | Path) -> None:
    """Run the command line in this process, which knows the family."""
    print("\n$ gura-jax", *arguments, flush=True)
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


def write_task(folder: Path) -> None:
    """A task in HEAR's format: is a tone low or high?"""
    labels, rng = ("low", "high"), np.random.default_rng(0)
    about = {"task_name": "tones", "version": "v1", "mode": "tiny", "embedding_type": "scene", "splits": []}
    about |= {"prediction_type": "multiclass", "split_mode": "trainvaltest", "evaluation": ["top1_acc"]}
    for split, count in {"train": 16, "valid": 8, "test": 8}.items():
        audio = folder / str(RATE) / split
        audio.mkdir(parents=True)
        for i in range(count):
            hertz = rng.uniform(100, 400) * (1 + 9 * (i % 2))
            tone = 0.3 * np.sin(2 * np.pi * hertz / RATE * np.arange(RATE // 2)) + 0.01 * rng.standard_normal(RATE // 2)
            soundfile.write(audio / f"{i:02d}.wav", tone, RATE)
        (folder / f"{split}.json").write_text(json.dumps({f"{i:02d}.wav": [labels[i % 2]] for i in range(count)}))
        about["splits"].append(split)
    (folder / "task_metadata.json").write_text(json.dumps(about))
    (folder / "labelvocabulary.csv").write_text("idx,label\n0,low\n1,high\n")


def main(folder: Path) -> None:
    """Everything that the package does, with the family; under ``folder``, which is new or empty."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: remove it, or name another folder")
    os.environ["GURA_JAX_CHECKPOINTS"] = str(folder / "checkpoints")
    twin = LogMelTwin.random(LogMelConfig(), seed=0).save(folder / "twin")  # a folder as Hugging Face's
    gura_jax("convert", twin, "--name", "logmel")
    gura_jax("convert", "crepe-tiny")
    gura_jax("parity", "--system", FUSION.name, "--weights", f"logmel={twin}")
    examples = Path(__file__).parent / "audio"
    gura_jax("embed", examples, "--system", FUSION.name, "--out", folder / "embeddings", "--timestamps")
    write_task(folder / "tasks" / "tones-v1-tiny")
    gura_jax("evaluate", folder / "tasks", "--systems", f"{FUSION.name},logmel", "--out", folder / "evaluation")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/own_family"))
