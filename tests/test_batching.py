"""batching.py: clips padded into one array a rate, and which clips are computed together."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gura_jax.audio import resample, resampled_length
from gura_jax.backend import PLATFORMS
from gura_jax.batching import BUCKETS_PER_OCTAVE, Batch, bucket_length, fill_rows, pack, pad

EXACT_BUCKETS = 4 * BUCKETS_PER_OCTAVE  # below this many samples an octave has fewer lengths than buckets
RATE = 16_000
CPU = PLATFORMS["cpu"]


def clips(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(n).astype(np.float32) for n in lengths]


# Padded arrays


@pytest.mark.parametrize("samples", [1000, 1001])
def test_pad(samples: int) -> None:
    """Each clip once a rate, zeros behind it; silence of full length in the place of a missing clip."""
    first, last = clips(1000, 333)
    batch = pad([first, None, last], 5, samples, sample_rate=RATE, rates=(24_000, RATE))
    assert [*batch.audio] == [*batch.lengths] == [24_000, RATE]
    for rate in (24_000, RATE):
        width = resampled_length(samples, RATE, rate)
        audio, lengths = batch.audio[rate], batch.lengths[rate]
        assert (audio.shape, audio.dtype, lengths.dtype) == ((5, width), np.float32, np.int32)
        own = [resample(clip, RATE, rate) for clip in (first, last)]
        assert lengths.tolist() == [len(own[0]), width, len(own[1]), width, width]
        for row, clip in zip(audio[[0, 2]], own, strict=True):
            np.testing.assert_array_equal(row[: len(clip)], clip)
            assert not row[len(clip) :].any()
        assert not audio[[1, 3, 4]].any()


@pytest.mark.parametrize("put", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(("rows", "filled"), [(1, 3), (3, 3), (4, 6)])
def test_fill_rows(put: Any, rows: int, filled: int) -> None:
    """To a multiple of the devices, with silence of full length, where the arrays are."""
    batch = pad(clips(*[7] * rows), rows, 8, sample_rate=RATE, rates=(RATE, 2 * RATE))
    audio, lengths = jax.tree.map(put, batch)
    out = fill_rows(audio, lengths, 3)
    for rate, width in ((RATE, 8), (2 * RATE, 16)):
        assert isinstance(out.audio[rate], type(put(0.0)))
        assert out.audio[rate].shape == (filled, width)
        np.testing.assert_array_equal(out.audio[rate][:rows], batch.audio[rate])
        assert not np.asarray(out.audio[rate][rows:]).any()
        assert np.asarray(out.lengths[rate]).tolist() == [width - width // 8] * rows + [width] * (filled - rows)


# Lengths that share compiled shapes


@given(st.integers(1, 16_000 * 3600 * 6))
@example(400)
@example(2**20)
@example(2**20 - 1)
@example(2**20 + 1)
def test_bucket_length(samples: int) -> None:
    length = bucket_length(samples)
    assert isinstance(length, int)
    assert samples <= length <= 1.25 * samples
    assert bucket_length(length) == length
    assert bucket_length(samples) == length


@settings(max_examples=50)
@given(st.integers(5, 26), st.data())
def test_bucket_lengths_are_few_and_ordered(octave: int, data: st.DataObject) -> None:
    inside = st.integers(2**octave, 2 ** (octave + 1) - 1)
    samples = sorted(data.draw(st.lists(inside, min_size=2, max_size=100)))
    lengths = [bucket_length(n) for n in samples]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) <= BUCKETS_PER_OCTAVE + 1


def test_every_bucket_of_an_octave() -> None:
    assert {bucket_length(n) for n in range(16_385, 32_769)} == {20_480, 24_576, 28_672, 32_768}
    for n in range(1, EXACT_BUCKETS):
        assert n <= bucket_length(n) <= max(n, math.floor(1.25 * n))


# Batches


def packed(lengths: list[int], max_rows: int, devices: int, **options: Any) -> list[Batch]:
    return pack(lengths, max_rows, devices, **{"platform": CPU, "sample_rate": RATE, **options})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(400, 16_000 * 60), min_size=1, max_size=60),
    st.integers(1, 64),
    st.sampled_from([1, 3, 8]),
)
def test_every_clip_is_in_one_batch_that_holds_it(lengths: list[int], max_rows: int, devices: int) -> None:
    batches = packed(lengths, max_rows, devices)
    assert sorted(i for batch in batches for i in batch.clips) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch.clips) <= batch.rows <= max(max_rows, devices)
        assert max(lengths[i] for i in batch.clips) <= batch.samples <= 1.25 * max(lengths[i] for i in batch.clips)
        assert batch.rows <= devices or batch.rows * batch.samples <= CPU.batch_seconds * RATE


def test_clips_of_one_length_are_neither_padded_nor_cut_into_odd_batches() -> None:
    assert packed([12_345] * 5, 16, 1) == [Batch(5, 12_345, (0, 1, 2, 3, 4))]
    assert packed([16_000] * 20, 16, 1) == [
        Batch(16, 16_000, tuple(range(16))),
        Batch(4, 16_000, tuple(range(16, 20))),
    ]


def test_clips_of_one_length_have_few_shapes_where_that_is_asked_for() -> None:
    assert packed([12_345] * 5, 16, 1, exact=False) == [Batch(4, 14_336, (0, 1, 2, 3)), Batch(1, 14_336, (4,))]


def test_short_clips_share_a_batch_and_long_ones_do_not() -> None:
    rows = [batch.rows for batch in packed([16_000 * n for n in (30, 20, 1, 1, 1, 1)], 16, 1)]
    assert rows == [1, 1, 4]


def test_packing_costs_no_more_than_one_by_one() -> None:
    lengths = np.random.default_rng(0).integers(400, 160_000, 100).tolist()
    overhead = CPU.overhead_seconds * RATE
    cost = sum(batch.rows * batch.samples + overhead for batch in packed(lengths, 16, 1))
    assert cost < sum(bucket_length(n) + overhead for n in lengths)
    assert cost < 1.3 * (sum(lengths) + overhead * len(lengths))


def test_limits_are_in_seconds_and_the_platforms() -> None:
    lengths = [RATE] * 60 + [RATE // 2]
    assert max(batch.rows for batch in packed(lengths, 64, 1)) == 16  # 32 s, less one clip's padding
    assert max(batch.rows for batch in packed([3 * n for n in lengths], 64, 1, sample_rate=3 * RATE)) == 16
    assert max(batch.rows for batch in packed(lengths, 64, 1, platform=PLATFORMS["gpu"])) == 64
