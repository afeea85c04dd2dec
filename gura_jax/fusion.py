"""Combine members and frames: pure functions, all aware of each clip's own frame count.

Resampling is PyTorch's ``interpolate(mode="linear", align_corners=False)``: half-pixel centres, no
antialiasing. Paper: Sections 3.2 (feature aggregation) and 3.3 (feature concatenation).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.errors import SystemConfigError
from gura_jax.models.encoder import Encoder, Noise, Options, Output, Reduce, frame_mask, masked_mean


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
    """[x1, y1, x2, y2, ...] along features: K of [B, T, D] -> [B, T, K * D]; as in the authors' code."""
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


@dataclasses.dataclass(frozen=True)
class Combination:
    """A way to combine members that have one frame rate.

    Attributes:
        function: K of [B, T, D] -> [B, T', D'].
        joins: the axis along which members follow each other; None: they are merged.
        one_size: whether members must be of one size.
        frames: that every member of every clip is resampled to along time; None: as many as the first member has.
    """

    function: Callable[[Sequence[jax.Array]], jax.Array]
    joins: Literal["features", "time"] | None
    one_size: bool = True
    frames: int | None = None

    def fused_size(self, sizes: Sequence[int]) -> int:
        """Size of a fused frame, from the members' sizes."""
        return sum(sizes) if self.joins == "features" else sizes[0]

    def fixed_frames(self, members: int) -> int | None:
        """Frames of every clip, whatever its length; None: those of the first member."""
        if self.frames is None:
            return None
        return self.frames * (members if self.joins == "time" else 1)

    @property
    def linear_scenes(self) -> bool:
        """Whether the mean of fused frames is the combination of the members' means."""
        return self.frames is None


PAPER_FRAMES = 1024  # "models' time dimensions are all resampled into 1024" (Section 3.3)

COMBINATIONS: Mapping[str, Combination] = {
    "interleave": Combination(interleave, "features"),
    "interleave_time": Combination(interleave_time, "time", frames=PAPER_FRAMES),
    "concatenate": Combination(concatenate, "features", one_size=False),
    "average": Combination(average, None),
}


def fused_size(sizes: Sequence[int], combination: str, feature_size: int | None) -> int:
    """Size of a fused frame, from the members' sizes.

    Raises:
        SystemConfigError: the members would have to be of one size, and are not.
    """
    how = COMBINATIONS[combination]
    sizes = [feature_size or size for size in sizes]
    if how.one_size and len(set(sizes)) > 1:
        raise SystemConfigError(
            f"combination {combination!r} needs members of one size, found {', '.join(map(str, sizes))}: "
            "set feature_size"
        )
    return how.fused_size(sizes)


def scene(frames: jax.Array, counts: jax.Array, groups: int = 1) -> jax.Array:
    """Mean over a clip's frames, or over each of ``groups`` equal runs: [B, T, D] -> [B, groups * D].

    The remaining frames at the end (count modulo groups) are dropped, as in the authors' code.
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
    how = COMBINATIONS[combination]
    frames, counts = members[0]
    num_frames = frames.shape[1]
    if how.frames is not None:
        num_frames, counts = how.frames, jnp.full_like(counts, how.frames)
    aligned = []
    for k, (x, own_counts) in enumerate(members):
        x = x if feature_size is None else resample_features(x, feature_size)
        if k > 0 or how.frames is not None:
            x = resample_time(x, own_counts, counts, num_frames)
        aligned.append(x)
    fused = how.function(aligned)  # [B, T, D]
    counts = counts * (fused.shape[1] // num_frames)
    return jnp.where(frame_mask(counts, fused.shape[1])[:, :, None], fused, 0.0), counts


SceneOf = Literal["frames", "pooled"]
"""A member's contribution to scenes: the mean of its frames, or the encoder's own embedding of the clip."""


class FusedMember(NamedTuple):
    """A member, ready to be called."""

    name: str  # its key among the weights
    encoder: Encoder
    scene_encoder: (
        Encoder  # whose frames are averaged into scenes; the same object where those are the timestamp frames
    )
    scene: SceneOf = "frames"
    config: Any = None  # of its family; None for a member that is an object
    options: Options = Options()

    @property
    def scene_stride(self) -> int | None:
        """How many timestamp frames there are for each frame that scenes average; None: they lie elsewhere."""
        (hop, *others), (scene_hop, *scene_others) = self.encoder.grid, self.scene_encoder.grid
        return None if others != scene_others or scene_hop % hop else scene_hop // hop


class Fusion(NamedTuple):
    """A system, ready to be called."""

    members: tuple[FusedMember, ...]
    combination: str
    feature_size: int | None
    scene_groups: int

    @property
    def rates(self) -> tuple[int, ...]:
        """The sample rates that the members take, in Hz, the highest first."""
        return tuple(sorted({member.encoder.sample_rate for member in self.members}, reverse=True))


@dataclasses.dataclass(frozen=True)
class Keep:
    """Hidden states to keep beside the embeddings.

    Attributes:
        of: ``"mean"``, each state averaged over time, as scenes average it; or ``"frames"``, all of its frames.
        layers: which states, of every member that has hidden states; None: all of them.
    """

    of: Literal["mean", "frames"]
    layers: tuple[int, ...] | None = None


class Kept(NamedTuple):
    """What is kept of a member.

    Attributes:
        member: the member.
        encoder: that computes the states: whose frames are averaged into scenes, or are the timestamp frames.
        states: which, in increasing order; none of a member without hidden states, of which the frames are kept.
        bases: encoders at whose frame rates the means are taken: its own, and those of members before it that have
            other ones, as the first member of a system sets the rate of all. Empty for frames.
    """

    member: FusedMember
    encoder: Encoder
    states: tuple[int, ...]
    bases: tuple[Encoder, ...]


class KeptStates(NamedTuple):
    """Hidden states of a member; K is 1 for a member without, whose frames they are."""

    values: jax.Array  # [B, K, bases, groups * D], or of frames [B, T, K, D]
    counts: jax.Array | None  # [B] int32; None for means
    pooled: jax.Array | None  # [B, P], if the member has an embedding of the whole clip


def kept_members(fusion: Fusion, keep: Keep) -> tuple[Kept, ...]:
    """Return what is kept of each member.

    Raises:
        SystemConfigError: a member has no such states, or means cannot stand for the system's scenes.
    """
    if keep.of == "mean" and not COMBINATIONS[fusion.combination].linear_scenes:
        raise SystemConfigError(
            f"means of hidden states: expected a combination of members' frames, found {fusion.combination!r}, whose "
            "scenes are no combination of them: keep frames"
        )
    kept: list[Kept] = []
    for i, member in enumerate(fusion.members):
        encoder = member.scene_encoder if keep.of == "mean" else member.encoder
        count = encoder.num_states
        chosen = range(count) if keep.layers is None else keep.layers
        states = tuple(sorted({state % count for state in chosen if -count <= state < count})) if count else ()
        if count and len(states) < len(chosen):
            raise SystemConfigError(
                f"layers: expected distinct hidden states of {member.name}, from {-count} to {count - 1}, found "
                f"{', '.join(map(str, chosen))}"
            )
        bases: dict[Any, Encoder] = {}
        if keep.of == "mean":
            before = [m.scene_encoder for m in fusion.members[:i] if m.scene == "frames"]
            for base in (encoder, *before):
                bases.setdefault((base.sample_rate, base.grid), base)
        kept.append(Kept(member, encoder, states, tuple(bases.values())))
    return tuple(kept)


class Embeddings(NamedTuple):
    """Results of :func:`fuse`; None for those not asked for."""

    frames: jax.Array | None  # [B, T, D], zero past a clip's count
    counts: jax.Array | None  # [B] int32
    scenes: jax.Array | None  # [B, S]
    states: dict[str, KeptStates] | None = None  # by the members' names


Wanted = Literal["frames", "scenes"]


def fuse(
    fusion: Fusion,
    wanted: frozenset[Wanted],
    params: Mapping[str, Any],
    audio: Mapping[int, jax.Array],
    lengths: Mapping[int, jax.Array],
    noise: Noise | None = None,
    keep: Keep | None = None,
) -> Embeddings:
    """Embed a padded batch: the one function that is compiled. Pure, and differentiable.

    Args:
        fusion: the system.
        wanted: what to compute.
        params: weights of each member, by its name.
        audio: [B, N] float32 by sample rate; samples past a clip's length are ignored.
        lengths: [B] int32 by sample rate, samples in each clip.
        noise: in training; each member has its own.
        keep: hidden states to return as well, without noise; it needs scenes.
    """
    kept = {} if keep is None else {own.member.name: own for own in kept_members(fusion, keep)}
    collected: dict[str, jax.Array] = {}  # [K, B, ...]
    audio = {rate: jnp.where(frame_mask(lengths[rate], x.shape[1]), x, 0.0) for rate, x in audio.items()}

    def reduce_for(own: Kept) -> Reduce:
        if not own.bases:
            return lambda frames, counts: frames
        samples = [(lengths[base.sample_rate], audio[base.sample_rate].shape[1]) for base in own.bases]
        places = [(base.grid.count(n), base.grid.count(N)) for base, (n, N) in zip(own.bases, samples, strict=True)]

        def means(frames: jax.Array, counts: jax.Array) -> jax.Array:  # [B, bases, groups * D]
            at_rates = [(frames, counts), *((resample_time(frames, counts, n, T), n) for n, T in places[1:])]
            return jnp.stack([scene(x, n, fusion.scene_groups) for x, n in at_rates], axis=1)

        return means

    def run(encoders: Mapping[str, Encoder]) -> dict[str, Output]:
        outputs = {}
        for i, (name, encoder) in enumerate(encoders.items()):
            batch = params[name], audio[encoder.sample_rate], lengths[encoder.sample_rate]
            if name in kept and kept[name].states and encoder == kept[name].encoder:
                outputs[name], collected[name] = encoder.collected(*batch, kept[name].states, reduce_for(kept[name]))
            elif noise is None:
                outputs[name] = encoder(*batch)
            else:
                own = noise._replace(key=jax.random.fold_in(noise.key, i))
                outputs[name] = encoder.disturbed(*batch, own)
        return outputs

    def combined(outputs: Mapping[str, Output]) -> tuple[jax.Array, jax.Array]:
        members = [(outputs[m.name].frames, outputs[m.name].counts) for m in fusion.members]
        return combine(members, fusion.combination, fusion.feature_size)

    frames = counts = scenes = None
    own = {m.name: m for m in fusion.members if m.scene == "frames" and m.scene_encoder is not m.encoder}
    all_frames = "frames" in wanted or (keep is not None and keep.of == "frames")
    outputs = run({m.name: m.encoder for m in fusion.members if all_frames or m.name not in own})
    if "frames" in wanted:
        frames, counts = combined(outputs)
    averaged = dict(outputs)
    if "scenes" in wanted:
        for name, member in own.items():  # of the timestamp frames every few, where they are computed
            collects = name in kept and kept[name].encoder is member.scene_encoder and kept[name].states
            stride = member.scene_stride if name in outputs and not collects else None
            if stride is None:
                averaged |= run({name: member.scene_encoder})
            else:
                count = member.scene_encoder.grid.count(lengths[member.encoder.sample_rate])
                averaged[name] = Output(outputs[name].frames[:, ::stride], count)
        if any(m.scene == "pooled" for m in fusion.members):
            scenes = _combine_clips(fusion, averaged)
        else:
            fused = combined(averaged) if own or frames is None or counts is None else (frames, counts)
            scenes = scene(*fused, fusion.scene_groups)
    if keep is None:
        return Embeddings(frames, counts, scenes)
    states = {}
    for name, each in kept.items():
        out = (averaged if each.bases else outputs)[name]
        values = collected[name] if each.states else reduce_for(each)(out.frames, out.counts)[None]
        values = jnp.moveaxis(values, 0, 1 if each.bases else 2)
        states[name] = KeptStates(values, None if each.bases else out.counts, out.pooled)
    return Embeddings(frames, counts, scenes, states)


def _combine_clips(fusion: Fusion, outputs: Mapping[str, Output]) -> jax.Array:
    """Scenes [B, S] of members of which some are pooled: one vector a member, combined as one frame."""
    timed = [outputs[m.name] for m in fusion.members if m.scene == "frames"]
    vectors = []
    for member in fusion.members:
        out = outputs[member.name]
        if member.scene == "pooled":
            assert out.pooled is not None  # as its size says
            x = out.pooled
        else:  # at the rate of the first that has frames, as when all have
            first = timed[0]
            frames = out.frames
            if out is not first:
                frames = resample_time(frames, out.counts, first.counts, first.frames.shape[1])
            x = masked_mean(frames, frame_mask(first.counts, frames.shape[1]))
        x = x[:, None, :]  # [B, 1, D]
        vectors.append(x if fusion.feature_size is None else resample_features(x, fusion.feature_size))
    return COMBINATIONS[fusion.combination].function(vectors)[:, 0]
