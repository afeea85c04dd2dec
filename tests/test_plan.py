"""gura_jax/dataset/plan.py and table.py: every clip once, little padding, deterministic, and windows cover a clip."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gura_jax.batching import MAX_BUCKETS, PADDING, bucket_lengths
from gura_jax.dataset.plan import ShardLimits, make_plan
from gura_jax.dataset.table import windows

NO_LIMITS = ShardLimits(1 << 40, 1 << 60, 1 << 60)
lengths_of_clips = st.lists(st.one_of(st.just(0), st.integers(400, 960_000)), max_size=60)


@given(
    lengths_of_clips,
    st.integers(1, 2_000_000),
    st.builds(ShardLimits, st.integers(1, 50), st.integers(1, 4_000_000), st.integers(1, 100_000)),
    st.one_of(st.none(), st.integers(1, 8)),
)
def test_every_clip_is_planned_once(
    lengths: list[int], batch_samples: int, limits: ShardLimits, together: int | None
) -> None:
    sizes = np.arange(len(lengths))
    units = None if together is None else np.arange(len(lengths)) // together - 1
    plan = make_plan(lengths, sizes, batch_samples, limits, units=units)
    assert sorted(plan.order) == list(range(len(lengths)))
    np.testing.assert_array_equal(plan.lengths, np.array(lengths, np.int64)[plan.order])
    # Shards follow each other, and batches within them; only clips that cannot be read are in none.
    assert [shard.start for shard in plan.shards] == [0, *(shard.stop for shard in plan.shards)][: len(plan.shards)]
    assert (plan.shards[-1].stop if plan.shards else 0) == len(lengths)
    batched = [i for batch in plan.batches for i in range(batch.start, batch.stop)]
    assert batched == list(range(np.count_nonzero(lengths)))
    for batch in plan.batches:
        own = plan.lengths[batch.start : batch.stop]
        assert own.max() <= batch.samples
        assert 1 <= len(own) <= batch.rows
        assert batch.rows * batch.samples <= max(batch_samples, batch.samples)
    for shard in plan.shards:
        if len(shard.batches) > 1:
            stop = shard.batches[-1].stop
            chosen = plan.order[shard.start : stop]
            assert stop - shard.start <= limits.clips
            assert plan.lengths[shard.start : stop].sum() <= limits.samples
            assert sizes[chosen].sum() <= limits.bytes


@given(lengths_of_clips, st.integers(1, 8), st.integers(1, 50))
def test_clips_that_are_read_together_are_in_one_shard(lengths: list[int], together: int, most: int) -> None:
    units = np.arange(len(lengths)) // together - 1  # the first by themselves
    plan = make_plan(lengths, np.ones(len(lengths)), 2_000_000, ShardLimits(most, 1 << 60, 1 << 60), units=units)
    found: dict[int, set[int]] = {}
    for number, shard in enumerate(plan.shards):
        own = plan.order[shard.start : shard.stop]
        for unit in units[own[plan.lengths[shard.start : shard.stop] > 0]].tolist():
            found.setdefault(unit, set()).add(number)
    if together <= most:
        assert all(len(shards) == 1 for unit, shards in found.items() if unit >= 0)
    # Within a shard the longest are first, and there are no more lengths than without units.
    for shard in plan.shards:
        assert [batch.samples for batch in shard.batches] == sorted((b.samples for b in shard.batches), reverse=True)
    assert set(plan.buckets) <= set(bucket_lengths(np.array([n for n in lengths if n])).tolist())


@given(lengths_of_clips, st.randoms(use_true_random=False))
def test_the_order_of_the_input_matters_only_among_equals(lengths: list[int], random: object) -> None:
    again = list(lengths)
    random.shuffle(again)  # pyright: ignore[reportAttributeAccessIssue]
    plans = [make_plan(x, np.ones(len(x), np.int64), 320_000, NO_LIMITS) for x in (lengths, again)]
    assert plans[0].batches == plans[1].batches
    np.testing.assert_array_equal(plans[0].lengths, plans[1].lengths)


@given(st.lists(st.integers(400, 2_000_000), min_size=1, max_size=40))
def test_buckets_are_as_good_as_any(lengths: list[int]) -> None:
    """Few clips: no other choice of as many buckets pads less, and one bucket fewer would pad too much."""
    buckets = bucket_lengths(np.array(lengths))
    values = sorted(set(lengths))

    def padding(tops: np.ndarray) -> int:
        return int(sum(tops[np.searchsorted(tops, n)] - n for n in lengths))

    allowed = PADDING / (1 - PADDING) * sum(lengths)
    assert set(buckets.tolist()) <= set(values)
    assert buckets[-1] == values[-1]
    assert padding(buckets) <= allowed
    if len(buckets) == 2:
        best = min(padding(np.array([top, values[-1]])) for top in values[:-1])
        assert padding(buckets) == best
        assert padding(np.array([values[-1]])) > allowed


@pytest.mark.parametrize("name", ["speech", "effects", "uniform", "one length", "log-uniform"])
def test_padding_of_realistic_mixes(name: str) -> None:
    random = np.random.default_rng(0)
    n = 20_000
    seconds = {
        "speech": np.clip(random.lognormal(1.6, 0.6, n), 0.5, 35),  # utterances
        "effects": np.clip(random.lognormal(1.2, 1.1, n), 0.3, 30),  # freesound
        "uniform": random.uniform(0.5, 30, n),
        "one length": np.full(n, 10.0),
        "log-uniform": 0.5 * 120 ** random.uniform(0, 1, n),
    }[name]
    lengths = (seconds * 16_000).astype(np.int64)
    for batch_seconds in (32, 320):
        plan = make_plan(lengths, np.full(n, 8192), batch_seconds * 16_000, ShardLimits(4096, 1 << 40, 1 << 40))
        assert plan.padding < 0.05
        assert len(plan.buckets) <= MAX_BUCKETS
        assert len({(batch.rows, batch.samples) for batch in plan.batches}) <= len(plan.buckets) + 1
    if name == "one length":
        assert plan.padding == 0
        assert plan.buckets == [160_000]


def test_a_million_clips_are_planned_in_little_time() -> None:
    lengths = np.random.default_rng(0).integers(8_000, 480_000, 1_000_000)
    plan = make_plan(lengths, np.full(len(lengths), 12_288), 5_120_000, ShardLimits(4096, 57_600_000, 1 << 28))
    assert plan.padding < 0.05


def test_nothing_to_plan() -> None:
    assert make_plan([], np.zeros(0), 1000, NO_LIMITS).shards == ()
    plan = make_plan([0, 0], np.zeros(2), 1000, NO_LIMITS)
    assert [(shard.start, shard.stop, shard.batches) for shard in plan.shards] == [(0, 2, ())]
    assert plan.padding == 0


@given(st.lists(st.floats(0.03, 1000), min_size=1, max_size=5), st.floats(0.1, 60))
def test_windows_cover_each_clip(durations: list[float], window: float) -> None:
    shortest = 0.025
    cuts = list(zip(*(column.tolist() for column in windows(np.array(durations), window, shortest)), strict=True))
    for clip, duration in enumerate(durations):
        own = [cut for cut in cuts if cut[1] == clip]
        assert [cut[0] for cut in own] == list(range(len(own)))
        assert own[0][2] == 0
        assert own[-1][2] + own[-1][3] == pytest.approx(duration)
        for (_, _, start, length), (_, _, following, _) in itertools.pairwise(own):
            assert length == window
            assert following == pytest.approx(start + window)
        assert shortest * 0.99 <= own[-1][3] <= window + shortest * 1.01 or len(own) == 1
    assert [cut[1] for cut in cuts] == sorted(cut[1] for cut in cuts)
