"""Combining hidden states, members and frames: pure functions, all aware of each clip's own frame count.

Resampling is PyTorch's ``interpolate(mode="linear", align_corners=False)``: half-pixel centres, no
antialiasing. Paper: Sections 3.2 (feature aggregation) and 3.3 (feature concatenation).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.errors import SystemConfigError
from gura_jax.models.encoder import Encoder, frame_mask, masked_mean


def weighted_sum(states: Iterable[jax.Array], weights: np.ndarray) -> jax.Array:
    """Running sum of ``weights[i] * states[i]``; takes no more states than have a weight.

    Args:
        states: hidden states [B, T, D], one by one.
        weights: [L + 1]; zeros are skipped.
    """
    last = int(np.flatnonzero(weights)[-1])
    total = None
    for i, state in zip(range(last + 1), states, strict=False):
        if weights[i]:
            term = state if weights[i] == 1.0 else state * weights[i]
            total = term if total is None else _add_now(total, term)
    assert total is not None
    return total


def _add_now(a: jax.Array, b: jax.Array) -> jax.Array:
    """a + b, as a matrix product: XLA puts additions off into one loop at the end, and holds every state till then."""
    return jnp.einsum("kbtd,k->btd", jnp.stack([a, b]), jnp.ones(2, a.dtype), precision="highest")


def resample_features(x: jax.Array, size: int) -> jax.Array:
    """Linear resampling along features: [B, T, D] -> [B, T, size]."""
    D = x.shape[-1]
    if size == D:
        return x
    numerator = np.maximum((2 * np.arange(size) + 1) * D - size, 0)  # over 2 * size: the position in x
    low, weight = numerator // (2 * size), numerator % (2 * size) / (2 * size)
    high = np.minimum(low + 1, D - 1)
    a, b = x[..., low], x[..., high]
    return a + (b - a) * weight.astype(np.float32)[None, None, :]


def resample_time(x: jax.Array, counts: jax.Array, new_counts: jax.Array, num_frames: int) -> jax.Array:
    """Linear resampling along time, each clip from its own count of frames to its own new count.

    Positions are exact, in integers, for clips of up to hours.

    Args:
        x: [B, T, D] frames, of which clip b has ``counts[b]``.
        counts: [B] int32.
        new_counts: [B] int32, at most ``num_frames``.
        num_frames: length of the new time axis.

    Returns:
        [B, num_frames, D]; rows past ``new_counts[b]`` repeat the clip's last frame.
    """
    i = jnp.arange(num_frames, dtype=jnp.uint32)[None, :]
    m, n = counts[:, None].astype(jnp.uint32), new_counts[:, None].astype(jnp.uint32)
    # Frame i lies at ((2 i + 1) m - n) / (2 n), whose numerator overflows 32 bits past ten minutes:
    # long division of (2 i + 1) m by 2 n in two digits of base 1024, which holds for seven hours.
    factor = 2 * jnp.minimum(i, n - 1) + 1  # [B, num_frames]
    upper = (factor // 1024) * m
    lower = upper % (2 * n) * 1024 + factor % 1024 * m
    quotient, remainder = upper // (2 * n) * 1024 + lower // (2 * n), lower % (2 * n)
    below = remainder < n  # subtracting n / (2 n) = one half borrows
    low = quotient.astype(jnp.int32) - below.astype(jnp.int32)
    remainder = jnp.where(below, remainder + n, remainder - n)
    first = low < 0  # before the first frame's centre: the first frame
    weight = jnp.where(first, 0.0, remainder.astype(x.dtype) / (2 * n).astype(x.dtype))
    low, last = jnp.clip(low, 0), counts[:, None] - 1
    a = jnp.take_along_axis(x, low[:, :, None], axis=1)
    b = jnp.take_along_axis(x, jnp.minimum(low + 1, last)[:, :, None], axis=1)
    return a + (b - a) * weight[:, :, None]


def interleave(members: Sequence[jax.Array]) -> jax.Array:
    """[x1, y1, x2, y2, ...] along features: K of [B, T, D] -> [B, T, K * D]; what the authors' code does."""
    return jnp.stack(members, axis=-1).reshape(*members[0].shape[:-1], -1)


def interleave_time(members: Sequence[jax.Array]) -> jax.Array:
    """[x1, y1, x2, y2, ...] along time: K of [B, T, D] -> [B, K * T, D]; Section 3.3, literally."""
    B, T, D = members[0].shape
    return jnp.stack(members, axis=2).reshape(B, T * len(members), D)


def concatenate(members: Sequence[jax.Array]) -> jax.Array:
    """[x1, x2, ..., y1, y2, ...] along features: [B, T, D1], [B, T, D2], ... -> [B, T, D1 + D2 + ...]."""
    return jnp.concatenate(members, axis=-1)


def average(members: Sequence[jax.Array]) -> jax.Array:
    """Mean over members: K of [B, T, D] -> [B, T, D]."""
    return sum(members[1:], start=members[0]) / len(members)


COMBINATIONS: Mapping[str, Callable[[Sequence[jax.Array]], jax.Array]] = {
    "interleave": interleave,
    "interleave_time": interleave_time,
    "concatenate": concatenate,
    "average": average,
}


def fused_size(sizes: Sequence[int], combination: str, feature_size: int | None) -> int:
    """Size of a fused frame, from the members' sizes.

    Raises:
        SystemConfigError: the members would have to be of one size, and are not.
    """
    sizes = [feature_size or size for size in sizes]
    if combination == "concatenate":
        return sum(sizes)
    if len(set(sizes)) > 1:
        raise SystemConfigError(
            f"combination {combination!r} needs members of one size, found {', '.join(map(str, sizes))}: "
            "set feature_size"
        )
    return sizes[0] * (len(sizes) if combination == "interleave" else 1)


PAPER_FRAMES = 1024  # "models' time dimensions are all resampled into 1024" (Section 3.3)


def scene(frames: jax.Array, counts: jax.Array, groups: int = 1) -> jax.Array:
    """Mean over a clip's frames, or over each of ``groups`` equal runs: [B, T, D] -> [B, groups * D].

    The frames that are left over at the end (count modulo groups) are dropped, as in the authors' code.
    A clip needs at least ``groups`` frames.
    """
    size = counts // groups  # [B]
    index = jnp.arange(frames.shape[1])[None, :]
    means = [
        masked_mean(frames, (index >= g * size[:, None]) & (index < (g + 1) * size[:, None])) for g in range(groups)
    ]
    return jnp.concatenate(means, axis=-1)


def combine(
    members: Sequence[tuple[jax.Array, jax.Array]], combination: str, feature_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """Bring the members to one frame rate and one size, and combine them.

    Args:
        members: (frames [B, T_k, D_k], counts [B]) of each; the first sets the frame rate.
        combination: a name in :data:`COMBINATIONS`.
        feature_size: size that every member is resampled to along features, or None to leave them.

    Returns:
        frames [B, T, D], zero past a clip's count, and counts [B].
    """
    frames, counts = members[0]
    num_frames = frames.shape[1]
    if combination == "interleave_time":
        num_frames, counts = PAPER_FRAMES, jnp.full_like(counts, PAPER_FRAMES)
    aligned = []
    for k, (x, own_counts) in enumerate(members):
        x = x if feature_size is None else resample_features(x, feature_size)
        if k > 0 or combination == "interleave_time":
            x = resample_time(x, own_counts, counts, num_frames)
        aligned.append(x)
    fused = COMBINATIONS[combination](aligned)  # [B, T, D]
    counts = counts * (fused.shape[1] // num_frames)
    return jnp.where(frame_mask(counts, fused.shape[1])[:, :, None], fused, 0.0), counts


class FusedMember(NamedTuple):
    """A member, ready to be called: its key among the weights, and its encoder for each kind of embedding."""

    name: str
    encoder: Encoder
    scene_encoder: Encoder  # the same object where scenes are the mean of the timestamp embedding's frames


class Fusion(NamedTuple):
    """A system, ready to be called."""

    members: tuple[FusedMember, ...]
    combination: str
    feature_size: int | None
    scene_groups: int


class Embeddings(NamedTuple):
    """What :func:`fuse` was asked for; the rest is None."""

    frames: jax.Array | None  # [B, T, D], zero past a clip's count
    counts: jax.Array | None  # [B] int32
    scenes: jax.Array | None  # [B, S]


Wanted = Literal["frames", "scenes"]


def fuse(
    fusion: Fusion,
    wanted: frozenset[Wanted],
    params: Mapping[str, Any],
    audio: jax.Array,
    lengths: jax.Array,
) -> Embeddings:
    """Embed a padded batch: the one function that is compiled. Pure, and differentiable.

    Args:
        fusion: the system.
        wanted: what to compute.
        params: weights of each member, by its name.
        audio: [B, N] float32 at 16 kHz; what lies past a clip's length is not looked at.
        lengths: [B] int32, samples in each clip.
    """
    audio = jnp.where(frame_mask(lengths, audio.shape[1]), audio, 0.0)

    def run(encoders: Mapping[str, Encoder]) -> dict[str, tuple[jax.Array, jax.Array]]:
        return {name: encoder(params[name], audio, lengths) for name, encoder in encoders.items()}

    def combined(outputs: Mapping[str, tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
        return combine([outputs[m.name] for m in fusion.members], fusion.combination, fusion.feature_size)

    frames = counts = scenes = None
    own = {m.name: m.scene_encoder for m in fusion.members if m.scene_encoder is not m.encoder}
    outputs = run({m.name: m.encoder for m in fusion.members if "frames" in wanted or m.name not in own})
    if "frames" in wanted:
        frames, counts = combined(outputs)
    if "scenes" in wanted:
        fused = combined(outputs | run(own)) if own or frames is None or counts is None else (frames, counts)
        scenes = scene(*fused, fusion.scene_groups)
    return Embeddings(frames, counts, scenes)
