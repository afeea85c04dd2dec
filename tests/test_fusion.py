"""fusion.py: resampling against PyTorch and exact rationals, combinations by hand, rates, pooled scenes."""

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import PADDING_BOUND, relative

from gura_jax.audio import resample
from gura_jax.batching import pad
from gura_jax.fusion import (
    COMBINATIONS,
    PAPER_FRAMES,
    Embeddings,
    FusedMember,
    Fusion,
    Wanted,
    average,
    combine,
    concatenate,
    fuse,
    interleave,
    interleave_time,
    resample_features,
    resample_time,
    scene,
)
from gura_jax.models.encoder import SUM_BLOCK, Encoder, FrameGrid, Output, frame_mask, masked_mean

RATE = 16_000
TORCH_BOUND = 2e-6  # PyTorch's positions are float32: off by 1e-7 of the index, times values of size one
EXACT_BOUND = 3e-7  # one rounding of the weight, one of the product and one of the sum
MEAN_BOUND = 1e-6  # a mean of float32 summed in blocks, against float64


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact_position(i: int, old: int, new: int) -> tuple[int, int, Fraction]:
    """Where frame i of ``new`` lies among ``old``: the two neighbours and the weight of the second."""
    position = max(Fraction((2 * i + 1) * old, 2 * new) - Fraction(1, 2), Fraction(0))
    low = int(position)
    return low, min(low + 1, old - 1), position - low


def exact_resample(x: np.ndarray, new: int, at: Sequence[int]) -> np.ndarray:
    """Rows ``at`` of x [T, D] resampled to ``new`` rows, in exact positions and float64."""
    rows = [
        (x[a].astype(np.float64), x[b].astype(np.float64), w)
        for a, b, w in (exact_position(i, len(x), new) for i in at)
    ]
    return np.stack([a + (b - a) * float(w) for a, b, w in rows])


def torch_resample(x: np.ndarray, size: int) -> np.ndarray:
    """Along the last axis of [B, C, N]."""
    return torch.nn.functional.interpolate(torch.from_numpy(x), size, mode="linear", align_corners=False).numpy()


def counts(*values: int) -> jax.Array:
    return jnp.array(values, jnp.int32)


# Compiled as one, which takes less time than op by op.
over_features = jax.jit(resample_features, static_argnums=1)
over_time = jax.jit(resample_time, static_argnums=3)


# Resampling along features


@pytest.mark.parametrize(
    ("old", "new"), [(1280, 1024), (2048, 1024), (768, 1024), (256, 1024), (1024, 1024), (7, 3), (3, 7), (1, 5), (5, 1)]
)
def test_resample_features_is_pytorch(old: int, new: int) -> None:
    x = noise(2, 3, old)
    chex.assert_trees_all_close(
        resample_features(jnp.asarray(x), new), torch_resample(x, new), atol=TORCH_BOUND, rtol=0
    )


@settings(max_examples=20, deadline=None)  # each size is compiled
@given(old=st.integers(1, 300), new=st.integers(1, 300))
def test_resample_features_is_exact(old: int, new: int) -> None:
    x = noise(old)
    out = over_features(x[None, None], new)
    assert out.shape == (1, 1, new)
    expected = exact_resample(x[:, None], new, range(new))[:, 0]
    np.testing.assert_allclose(np.asarray(out)[0, 0], expected, atol=EXACT_BOUND * np.abs(x).max(), rtol=EXACT_BOUND)


def test_resample_features_to_the_same_size_changes_nothing() -> None:
    x = jnp.asarray(noise(2, 3, 1024))
    assert resample_features(x, 1024) is x


def test_resample_features_does_not_antialias() -> None:
    """Alternating ones: every other position hits the middle of two; an antialiasing filter would blur them all."""
    x = jnp.tile(jnp.array([1.0, -1.0], jnp.float32), 6)[None, None]
    np.testing.assert_array_equal(np.asarray(resample_features(x, 4))[0, 0], [-1, 1, -1, 1])


# Resampling along time


def resample_one(x: np.ndarray, new: int) -> np.ndarray:
    return np.asarray(over_time(x[None], counts(len(x)), counts(new), new))[0]


@pytest.mark.parametrize(
    ("old", "new"), [(11, 24), (24, 11), (1, 9), (9, 1), (81, 199), (5, 24), (199, 1024), (1500, 1024)]
)
def test_resample_time_is_pytorch(old: int, new: int) -> None:
    x = noise(old, 3)
    expected = torch_resample(x.T[None], new)[0].T
    # PyTorch's own positions are off by old * 2^-24, times the step between neighbours.
    np.testing.assert_allclose(resample_one(x, new), expected, atol=TORCH_BOUND + 8 * old * 2.0**-24, rtol=0)


@settings(max_examples=150, deadline=None)
@given(old=st.integers(1, 400), new=st.integers(1, 400))
def test_resample_time_is_exact(old: int, new: int) -> None:
    """Among garbage past the clip's end, and rows past the new end that repeat its last frame."""
    x = noise(400 + 3, 1)
    x[old:] = 1e6
    out = np.asarray(over_time(x[None], counts(old), counts(new), 403))[0]
    expected = exact_resample(x[:old], new, range(new))
    np.testing.assert_allclose(out[:new], expected, atol=EXACT_BOUND * np.abs(x[:old]).max(), rtol=EXACT_BOUND)
    last = out[new:] - out[new - 1]
    assert not last.any()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (12_001, 29_999),  # ten minutes
        (30_000, 200_001),
        (200_001, 30_000),
        (72_001, 179_999),  # CREPE of an hour to HuBERT's frames
        (1_024, 180_000),
        (180_000, 1_024),  # the paper's reading, an hour
        (180_001, 180_000),
        (432_001, 1_079_999),  # six hours, the longest clip that audio.py takes
        (1_079_999, 1_079_998),
        (1_079_999, 1_024),
    ],
)
def test_resample_time_is_exact_for_hours(old: int, new: int) -> None:
    # Values rise by one a frame where they are looked at, so that a position that is off shows in full.
    x = (np.arange(old) % 4096).astype(np.float32)[:, None]
    at = sorted({*range(50), *range(new - 50, new), *np.random.default_rng(0).integers(0, new, 2000).tolist()})
    out = np.asarray(over_time(x[None], counts(old), counts(new), new))[0]
    expected = exact_resample(x, new, at)
    np.testing.assert_allclose(out[at], expected, atol=4096 * EXACT_BOUND, rtol=0)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60))
def test_equal_counts_change_no_bit(n: int) -> None:
    x = noise(2, 60, 4) * np.float32(1e3)
    out = over_time(x, counts(n, 60), counts(n, 60), 60)
    np.testing.assert_array_equal(np.asarray(out)[0, :n], x[0, :n])
    np.testing.assert_array_equal(np.asarray(out)[1], x[1])


def test_equal_counts_change_no_bit_compiled_and_long() -> None:
    x = noise(1, 90_001, 1)
    out = over_time(x, counts(90_001), counts(90_001), 90_001)
    np.testing.assert_array_equal(np.asarray(out), x)


@settings(max_examples=20, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 70)), min_size=3, max_size=3))
def test_resample_time_of_a_batch_is_that_of_its_clips(pairs: list[tuple[int, int]]) -> None:
    x = noise(3, 50, 4)
    old, new = zip(*pairs, strict=True)
    out = over_time(x, counts(*old), counts(*new), 70)
    for row, clip, m, n in zip(out, x, old, new, strict=True):
        np.testing.assert_array_equal(row, over_time(clip[None], counts(m), counts(n), 70)[0])


def test_resample_time_has_the_gradient_of_its_weights() -> None:
    x = jnp.asarray(noise(1, 9, 2))
    chex.assert_numerical_grads(
        lambda x: resample_time(x, counts(7), counts(11), 12), (x,), order=1, atol=0.02, rtol=0.02
    )


# Combinations


def test_interleave() -> None:
    a, b, c = (jnp.array([[[1.0, 2.0], [3.0, 4.0]]]) + 10 * k for k in range(3))
    np.testing.assert_array_equal(interleave([a, b, c]), [[[1, 11, 21, 2, 12, 22], [3, 13, 23, 4, 14, 24]]])
    np.testing.assert_array_equal(interleave([a]), a)


def test_interleave_time() -> None:
    a, b, c = (jnp.array([[[1.0, 2.0], [3.0, 4.0]]]) + 10 * k for k in range(3))
    expected = [[[1, 2], [11, 12], [21, 22], [3, 4], [13, 14], [23, 24]]]
    np.testing.assert_array_equal(interleave_time([a, b, c]), expected)


def test_concatenate_and_average() -> None:
    a, b = jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0, 5.0]]])
    np.testing.assert_array_equal(concatenate([a, b, a[..., :1]]), [[[1, 2, 3, 5, 1]]])
    np.testing.assert_array_equal(average([a, b]), [[[2, 3.5]]])
    np.testing.assert_array_equal(average([a, b, a, b]), [[[2, 3.5]]])
    np.testing.assert_array_equal(average([a]), a)


# Scenes and means


def test_scene_is_the_mean_over_the_clips_own_frames() -> None:
    frames = noise(3, 40, 5)
    out = scene(jnp.asarray(frames), counts(40, 7, 1))
    expected = [frames[b, :n].astype(np.float64).mean(0) for b, n in enumerate((40, 7, 1))]
    assert relative(out, expected) <= MEAN_BOUND


def test_scene_groups_drop_the_remainder_at_the_end() -> None:
    frames = np.arange(13, dtype=np.float32)[None, :, None] * np.array([1, 10], np.float32)
    out = scene(jnp.asarray(np.repeat(frames, 3, axis=0)), counts(13, 10, 5), groups=5)
    assert out.shape == (3, 10)
    np.testing.assert_allclose(out[0], [0.5, 5, 2.5, 25, 4.5, 45, 6.5, 65, 8.5, 85])  # 13 frames: the last 3 dropped
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_array_equal(out[2], [0, 0, 1, 10, 2, 20, 3, 30, 4, 40])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(5, 1200), groups=st.integers(1, 5))
def test_scene_groups_are_exact_and_ignore_padding(n: int, groups: int) -> None:
    frames = noise(1, 1300, 2)
    frames[:, n:] = np.nan
    size = n // groups
    out = scene(jnp.asarray(frames), counts(n), groups)
    expected = [frames[0, g * size : (g + 1) * size].astype(np.float64).mean(0) for g in range(groups)]
    np.testing.assert_allclose(np.asarray(out)[0], np.concatenate(expected), atol=MEAN_BOUND)


@pytest.mark.parametrize("n", [1, SUM_BLOCK - 1, SUM_BLOCK, SUM_BLOCK + 1, 1000])
def test_masked_mean_does_not_depend_on_the_padding(n: int) -> None:
    x = noise(1, 3000, 3) + np.float32(5)
    mean = jax.jit(masked_mean)
    alone = mean(x[:, :n], frame_mask(counts(n), n))
    assert relative(alone, x[:, :n].astype(np.float64).mean(1)) <= MEAN_BOUND
    for padded in (n + 1, n + SUM_BLOCK, 3000):
        padding = x[:, :padded].copy()
        padding[:, n:] = np.inf
        chex.assert_trees_all_close(mean(padding, frame_mask(counts(n), padded)), alone, rtol=MEAN_BOUND)


def test_masked_mean_of_a_long_clip_keeps_its_digits() -> None:
    """A plain running float32 sum of 600 000 values near 1000 is off by 1e-5 and more."""
    x = (1000 + noise(1, 600_000, 1)).astype(np.float32)
    mean = jax.jit(masked_mean)(x, frame_mask(counts(600_000), 600_000))
    assert relative(mean, x.astype(np.float64).mean(1)) <= MEAN_BOUND


def test_the_gradient_of_a_masked_mean_is_zero_past_the_end() -> None:
    x = jnp.asarray(noise(1, 9, 2)).at[:, 6:].set(jnp.inf)
    gradient = jax.grad(lambda x: masked_mean(x, frame_mask(counts(6), 9)).sum())(x)
    np.testing.assert_allclose(gradient[0, :6], 1 / 6, rtol=1e-6)
    assert not np.asarray(gradient[0, 6:]).any()


# Members brought together


def by_hand(members: Sequence[np.ndarray], combination: str, size: int | None) -> np.ndarray:
    """One clip, from trimmed frames [T_k, D_k], along another way than the library's: exact rationals."""
    if size is not None:
        members = [exact_resample(x.T, size, range(size)).T for x in members]
    frames = PAPER_FRAMES if combination == "interleave_time" else len(members[0])
    members = [exact_resample(x, frames, range(frames)) for x in members]
    if combination == "average":
        return np.mean(members, axis=0)
    if combination == "concatenate":
        return np.hstack(members)
    if combination == "interleave":
        return np.dstack(members).reshape(frames, -1)
    return np.stack(members, axis=1).reshape(frames * len(members), -1)


@pytest.mark.parametrize("size", [None, 6])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_combine_in_a_padded_batch(combination: str, size: int | None) -> None:
    sizes = (8, 5, 12) if size is not None or combination == "concatenate" else (8, 8, 8)
    lengths = ((20, 9, 1), (20, 9, 1), (9, 4, 1))  # frames of each member, by clip
    members = [noise(3, max(own) + 4, d, seed=k) for k, (own, d) in enumerate(zip(lengths, sizes, strict=True))]
    for x, own in zip(members, lengths, strict=True):
        for b, n in enumerate(own):
            x[b, n:] = 1e9  # any value past a clip's count
    pairs = [(jnp.asarray(x), counts(*own)) for x, own in zip(members, lengths, strict=True)]
    out, new = jax.jit(lambda pairs: combine(pairs, combination, size))(pairs)
    for b in range(3):
        expected = by_hand([x[b, : own[b]] for x, own in zip(members, lengths, strict=True)], combination, size)
        assert int(new[b]) == len(expected)
        assert relative(out[b, : len(expected)], expected) <= 1e-6
        assert not np.asarray(out[b, len(expected) :]).any()


class Ramp(Encoder):
    """A frame every ``hop`` samples: where it starts, and its value there; pooled: the clip's length, three times."""

    def __init__(self, hop: int, sign: float = 1.0, *, sample_rate: int = RATE, pooled: bool = False) -> None:
        self.sample_rate, self.feature_size, self.grid = sample_rate, 2, FrameGrid(hop, 0.0, 1)
        self.sign, self.pooled_size = sign, 3 if pooled else 0

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        return {}

    def __call__(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Output:
        start = jnp.arange(0, audio.shape[1], self.grid.hop)
        frames = jnp.stack([jnp.broadcast_to(start.astype(jnp.float32), (len(audio), len(start))), audio[:, start]], -1)
        pooled = lengths.astype(jnp.float32)[:, None] * np.array([[1, 2, 3]], np.float32) if self.pooled_size else None
        return Output(self.sign * frames, self.grid.count(lengths), pooled)

    def by_hand(self, clip: np.ndarray) -> np.ndarray:
        """Its frames of one clip."""
        start = np.arange(0, len(clip), self.grid.hop)
        return self.sign * np.stack([start, clip[start].astype(np.float64)], -1)


def fusion(
    *members: Ramp,
    combination: str = "concatenate",
    feature_size: int | None = None,
    groups: int = 1,
    pooled: Sequence[int] = (),
) -> Fusion:
    fused = tuple(FusedMember(str(k), e, e, "pooled" if k in pooled else "frames") for k, e in enumerate(members))
    return Fusion(fused, combination, feature_size, groups)


BOTH: frozenset[Wanted] = frozenset({"frames", "scenes"})


def fused(system: Fusion, clips: Sequence[np.ndarray], samples: int, wanted: frozenset[Wanted] = BOTH) -> Embeddings:
    """Clips at the highest rate, in one batch."""
    rate = system.rates[0]
    batch = pad(clips, len(clips), samples, sample_rate=rate, rates=system.rates)
    params = {member.name: {} for member in system.members}
    return jax.device_get(jax.jit(functools.partial(fuse, system, wanted))(params, *batch))


def test_the_papers_reading_end_to_end() -> None:
    """Time resampled to 1024 for each member and interleaved along time: scene and frames of a padded batch."""
    members = Ramp(10), Ramp(25, -1.0)
    clips = [noise(n, seed=n) for n in (5000, 1777)]
    out = fused(fusion(*members, combination="interleave_time", groups=5), clips, 5000)
    assert out.frames is not None
    assert out.scenes is not None
    assert out.frames.shape == (2, 2 * PAPER_FRAMES, 2)
    np.testing.assert_array_equal(out.counts, [2048, 2048])
    for b, clip in enumerate(clips):
        expected = by_hand([member.by_hand(clip) for member in members], "interleave_time", None)
        assert relative(out.frames[b], expected) <= 1e-6
        groups = expected[: 5 * (2048 // 5)].reshape(5, 2048 // 5, 2).mean(axis=1).reshape(-1)
        np.testing.assert_allclose(out.scenes[b], groups, rtol=1e-5, atol=2e-4)  # sums of both signs, up to 5000


def test_what_lies_past_a_clip_is_not_looked_at() -> None:
    system = fusion(Ramp(10))
    audio = noise(1, 500)

    def run(audio: np.ndarray, wanted: frozenset[Wanted] = BOTH) -> Embeddings:
        return fuse(system, wanted, {"0": {}}, {RATE: jnp.asarray(audio)}, {RATE: counts(301)})

    plain = run(audio)
    audio[:, 301:] = np.nan
    chex.assert_trees_all_equal(plain, run(audio))
    alone = run(audio[:, :301], frozenset({"scenes"}))
    assert alone.frames is None
    assert alone.counts is None
    assert relative(alone.scenes, plain.scenes) <= PADDING_BOUND


# Members of several rates


@pytest.mark.parametrize("combination", ["concatenate", "average", "interleave_time"])
def test_members_of_two_rates_are_members_apart_combined(combination: str) -> None:
    """Each sees the clip at its own rate, of the length that resampling gives; the first sets the frame rate."""
    fast, slow = Ramp(30, sample_rate=24_000), Ramp(13, -1.0)
    clips = [noise(n, seed=n) for n in (3000, 1777, 400)]
    for members in ((fast, slow), (slow, fast)):
        system = fusion(*members, combination=combination)
        assert system.rates == (24_000, RATE)
        out = fused(system, clips, 3100)
        assert out.frames is not None
        assert out.counts is not None
        assert out.scenes is not None
        for b, clip in enumerate(clips):
            own = [member.by_hand(resample(clip, 24_000, member.sample_rate)) for member in members]
            expected = by_hand(own, combination, None)
            assert out.counts[b] == len(expected)
            assert relative(out.frames[b, : len(expected)], expected) <= 1e-6
            assert not out.frames[b, len(expected) :].any()
            np.testing.assert_allclose(out.scenes[b], expected.mean(axis=0), rtol=1e-5, atol=1e-4)


# Embeddings of the whole clip


CLIPS = [noise(n, seed=n) for n in (3000, 1777, 400)]
LENGTHS = np.array([len(clip) for clip in CLIPS], np.float64)


def test_a_pooled_scene_alone() -> None:
    """The encoder's own, of its own size; the frames are as ever."""
    member = Ramp(10, pooled=True)
    out = fused(fusion(member, pooled=[0]), CLIPS, 3100)
    assert out.frames is not None
    np.testing.assert_array_equal(out.scenes, np.outer(LENGTHS, [1, 2, 3]))
    for row, clip in zip(out.frames, CLIPS, strict=True):
        assert relative(row[: member.grid.count(len(clip))], member.by_hand(clip)) <= 1e-6
    scenes = fused(fusion(member, pooled=[0]), CLIPS, 3100, frozenset({"scenes"}))
    assert scenes.frames is None
    np.testing.assert_array_equal(scenes.scenes, out.scenes)


@pytest.mark.parametrize("combination", ["concatenate", "average", "interleave"])
def test_pooled_scenes_beside_means_of_frames(combination: str) -> None:
    """Means of the others as without it, at the frame rate of the first of them; then one vector a member."""
    first, second, pooled = Ramp(10), Ramp(25, -1.0), Ramp(40, pooled=True)
    size = None if combination == "concatenate" else 6
    system = fusion(pooled, first, second, combination=combination, feature_size=size, pooled=[0])
    out = fused(system, CLIPS, 3100)
    assert out.scenes is not None
    for b, clip in enumerate(CLIPS):
        frames = by_hand([member.by_hand(clip) for member in (first, second)], "concatenate", None)
        means = np.split(frames.mean(axis=0), 2)
        vectors = [len(clip) * np.array([1.0, 2.0, 3.0]), *means]
        assert relative(out.scenes[b], by_hand([v[None] for v in vectors], combination, size)[0]) <= 1e-5
