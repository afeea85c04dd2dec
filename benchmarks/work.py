"""What is measured: systems, clips, and the arithmetic that they take, counted from shapes."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gura_jax import SYSTEMS, Member, System
from gura_jax.audio import HEAR_RATE as SAMPLE_RATE
from gura_jax.loading import find_encoder
from gura_jax.models.crepe import CAPACITY_MULTIPLIER, EMBEDDING_LAYERS, HOP, LAYERS, POSITIONS, WINDOW, CrepeConfig
from gura_jax.models.wav2vec2_config import Wav2Vec2Config

# Every encoder size with its layers averaged, the two CREPEs, and the headline.
CASES: Mapping[str, System] = {
    system.name: system
    for system in (
        System("hubert-base", (Member("hubert-base", "mean"),)),
        System("hubert-large", (Member("hubert-large", "mean"),)),
        System("wav2vec2-base", (Member("wav2vec2-base", "mean"),)),
        SYSTEMS["fusion_hubert_xlarge"],
        SYSTEMS["fusion_wav2vec2"],
        SYSTEMS["crepe"],
        System("crepe-tiny", (Member("crepe-tiny"),)),
        SYSTEMS["fusion_cat_xwc"],
    )
}


def _seconds(name: str) -> list[float]:
    if name == "mixed":
        return [float(x) for x in np.random.default_rng(0).uniform(0.5, 10.0, 12)]
    count, length = name.split("x")
    return [float(length)] * int(count)


# Clips in one call, by name: how many times how many seconds.
WORKLOADS: Mapping[str, list[float]] = {name: _seconds(name) for name in ("4x4", "16x1", "1x30", "mixed")}


def clips(workload: str) -> list[np.ndarray]:
    """The clips of a workload, each [samples]."""
    return [voice(seconds, seed) for seed, seconds in enumerate(WORKLOADS[workload])]


def voice(seconds: float, seed: int) -> np.ndarray:
    """A clip [samples] somewhat like speech: a gliding tone with harmonics, under an envelope, in noise."""
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(140 + 60 * np.sin(2 * np.pi * 0.7 * t + seed)) / SAMPLE_RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 9))
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return (0.15 * np.sin(2 * np.pi * 1.5 * t) ** 2 * tone + 0.02 * noise).astype(np.float32)


def configs(system: System) -> list[Any]:
    """Of the system's encoders."""
    return [find_encoder(str(member.encoder)).config for member in system.members]


def flops(configs: Iterable[Any], clips: Iterable[float]) -> float:
    """Floating-point operations of the convolutions and matrix products, as the layers define them.

    Args:
        configs: of the encoders that all clips go through.
        clips: seconds of each.
    """
    lengths = [int(seconds * SAMPLE_RATE) for seconds in clips]
    return sum(_flops(config, samples) for config in configs for samples in lengths)


def _flops(config: CrepeConfig | Wav2Vec2Config, samples: int) -> float:
    if isinstance(config, CrepeConfig):
        return _crepe_flops(config, samples)
    return sum(wav2vec2_parts(config, samples).values())


def _crepe_flops(config: CrepeConfig, samples: int) -> float:
    multiplier = CAPACITY_MULTIPLIER[config.capacity]
    sizes = [1, *(layer.channels * multiplier for layer in LAYERS)]
    frame, length = 0, WINDOW
    for layer, positions, in_size, size in zip(LAYERS[:EMBEDDING_LAYERS], POSITIONS, sizes, sizes[1:], strict=False):
        taps = layer.stride * np.arange(positions)[:, None] - layer.padding[0] + np.arange(layer.kernel)
        frame += 2 * int(((taps >= 0) & (taps < length)).sum()) * in_size * size  # products with padding are none
        length = positions // 2
    return float(frame * (1 + samples // HOP))


def wav2vec2_parts(config: Wav2Vec2Config, samples: int) -> dict[str, float]:
    """Floating-point operations of each part of the encoder, of all blocks together, for one clip."""
    features, length, in_size = 0.0, samples, 1
    for size, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        length = (length - kernel) // stride + 1
        features += 2.0 * length * kernel * in_size * size
        in_size = size
    T, D, L = length, config.hidden_size, config.num_hidden_layers
    taps = config.num_conv_pos_embeddings * D // config.num_conv_pos_embedding_groups
    return {
        "feature encoder": features,
        "projection": 2.0 * T * in_size * D,
        "positional convolution": 2.0 * T * taps * D,
        "attention": L * 4.0 * T * T * D,
        "rest of the blocks": L * 2.0 * T * (4 * D * D + 2 * D * config.intermediate_size),
    }
