"""gura_jax/parallel.py: the same on any number of devices, compiled once, with nothing sent between them."""

import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from gura_jax import Member, Model, System, load_model
from gura_jax.parallel import (
    BUCKETS_PER_OCTAVE,
    LIMITS,
    Batch,
    Compilation,
    Parallel,
    bucket_length,
    compile_batch,
    make_mesh,
    pack,
    replicated,
)

DEVICES_BOUND = 1e-6  # relative norm: each device runs the same program on fewer rows
EXACT_BUCKETS = 4 * BUCKETS_PER_OCTAVE  # below this many samples an octave has fewer lengths than buckets
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
    "partition-id",
    "send(",
    "recv(",
)

SYSTEM = System(
    "small",
    (Member("hubert-large", "mean"), Member("wav2vec2-base", "mean"), Member("crepe-tiny")),
    "interleave",
    64,
)
ways = pytest.mark.parametrize("parallel", get_args(Parallel))


@pytest.fixture(autouse=True)
def _eight_devices() -> None:
    assert len(jax.local_devices()) == 8


@functools.cache
def model(parallel: Parallel, devices: int) -> Model:
    chosen = jax.local_devices()[:devices]
    return load_model(SYSTEM, weights="random", size="tiny", parallel_by=parallel, devices=chosen)


def difference(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def clips(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in lengths]


def sixteen() -> tuple[np.ndarray, np.ndarray]:
    """Clips that eight devices divide."""
    return np.stack(clips(*[3072] * 16)), np.full(16, 3072, np.int32)


# One device, eight by jit, eight by pmap


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Eleven clips, which eight devices do not divide, of lengths from one frame on."""
    lengths = np.array([3072, 400, 2500, 719, 720, 3071, 1601, 2222, 3000, 401, 1040], np.int32)
    audio = np.zeros((len(lengths), 3072), np.float32)
    for row, clip in zip(audio, clips(*lengths), strict=True):
        row[: len(clip)] = clip
    return audio, lengths


@pytest.mark.parametrize(("parallel", "devices"), [("jit", 8), ("pmap", 8)])
def test_devices_change_nothing(batch: tuple[np.ndarray, np.ndarray], parallel: Parallel, devices: int) -> None:
    one, many = (jax.device_get(m(*batch)) for m in (model("jit", 1), model(parallel, devices)))
    assert one.counts is not None
    np.testing.assert_array_equal(many.counts, one.counts)
    np.testing.assert_array_equal(one.counts, (batch[1] - 400) // 320 + 1)
    for name in ("frames", "scenes"):
        got, wanted = getattr(many, name), getattr(one, name)
        assert got.shape == wanted.shape
        assert np.isfinite(got).all()
        for row in range(len(batch[1])):
            assert difference(got[row], wanted[row]) < DEVICES_BOUND, f"{name} of clip {row}"


def summed(params: Any, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    return audio.sum(axis=1) * params["w"], jnp.stack([lengths, 2 * lengths], axis=1)


@ways
@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("size", [1, 3, 7, 8, 9, 16])
def test_batches_of_any_size(parallel: Parallel, devices: int, size: int) -> None:
    """Padded to a multiple of the devices, trimmed, and in order."""
    mesh = make_mesh(jax.local_devices()[:devices])
    run = compile_batch(summed, Compilation(mesh, parallel))
    params = jax.device_put({"w": np.float32(2.0)}, replicated(mesh))
    audio = np.arange(size * 5, dtype=np.float32).reshape(size, 5)
    lengths = np.arange(size, dtype=np.int32)
    for given_audio, given_lengths in ((audio, lengths), (jnp.asarray(audio), jnp.asarray(lengths))):
        sums, twice = run(params, given_audio, given_lengths)
        np.testing.assert_array_equal(sums, 2 * audio.sum(axis=1))
        np.testing.assert_array_equal(twice, np.stack([lengths, 2 * lengths], axis=1))
        assert sums.dtype == np.float32
        assert twice.dtype == np.int32


@ways
def test_gradients_of_a_batch_that_does_not_divide(parallel: Parallel) -> None:
    run = compile_batch(summed, Compilation(make_mesh(), parallel))
    params = jax.device_put({"w": np.float32(2.0)}, replicated(make_mesh()))
    gradient = jax.grad(lambda audio: run(params, audio, jnp.full(3, 5))[0].sum())(jnp.ones((3, 5), jnp.float32))
    np.testing.assert_array_equal(gradient, np.full((3, 5), 2.0, np.float32))


@ways
def test_filled_up_rows_are_whole_clips_of_silence(parallel: Parallel) -> None:
    """Not clips of no length, whose mean over frames would be NaN."""
    seen: list[Any] = []

    def watch(params: Any, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        jax.debug.callback(lambda a, n: seen.append((np.asarray(a), np.asarray(n))), audio, lengths)
        return lengths

    mesh = make_mesh()
    compile_batch(watch, Compilation(mesh, parallel))({}, np.ones((9, 4), np.float32), np.full(9, 3, np.int32))
    jax.effects_barrier()
    assert len(seen) == 8
    assert sorted(np.concatenate([lengths for _, lengths in seen]).tolist()) == [3] * 9 + [4] * 7
    audio = np.concatenate([a for a, _ in seen])
    assert audio.shape == (16, 4)
    assert audio.sum() == 9 * 4


# What is compiled


def compiled_text(function: Any, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> str:
    """XLA's optimised program of the jit way."""
    jitted: list[Any] = []
    jit = jax.jit

    def spy(*args: Any, **options: Any) -> Any:
        jitted.append(jit(*args, **options))
        return jitted[-1]

    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", spy)
        compile_batch(function, Compilation(mesh, "jit"))
    assert len(jitted) == 1
    text = jitted[0].lower(*arguments).compile().as_text()
    assert f"num_partitions={mesh.size}" in text
    return text


def test_nothing_goes_from_device_to_device(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model("jit", 8)
    text = compiled_text(whole.fuse, make_mesh(), monkeypatch, whole.params, *sixteen())
    assert "dot(" in text or "custom-call" in text
    assert [name for name in COLLECTIVES if name in text] == []


def test_it_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixing(params: Any, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        return lengths + jax.lax.psum(lengths.sum(), "data")

    text = compiled_text(mixing, make_mesh(), monkeypatch, {}, np.zeros((8, 16), np.float32), np.zeros(8, np.int32))
    assert [name for name in COLLECTIVES if name in text] == ["all-reduce"]


@pytest.fixture
def compilations(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was traced or compiled since it was last asked."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING):

        def since() -> list[str]:
            messages = [r.getMessage() for r in caplog.records if r.name.startswith("jax")]
            caplog.clear()
            return messages

        yield since


@ways
def test_a_steady_loop_compiles_nothing(parallel: Parallel, compilations: Callable[[], list[str]]) -> None:
    whole = model(parallel, 8)

    def step(seed: int) -> None:
        # Of other lengths each time, within one bucket; the second batch of sixteen is filled up.
        lengths = np.random.default_rng(seed).integers(2600, 3000, 17)
        whole.embed(clips(2999, *lengths, seed=seed), batch_size=16)

    step(0)
    compilations()  # another test may have compiled all of it before
    for seed in range(1, 4):
        step(seed)
    assert compilations() == []
    jax.jit(lambda x: x + 1)(np.zeros(17, np.float32))
    assert compilations() != []  # else nothing would have been seen above


@ways
def test_traced_once(parallel: Parallel) -> None:
    traces: list[tuple[int, ...]] = []

    def counted(params: Any, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        traces.append(audio.shape)
        return audio.sum(axis=1) + params["w"]

    mesh = make_mesh()
    run = compile_batch(counted, Compilation(mesh, parallel))
    params = jax.device_put({"w": np.float32(1)}, replicated(mesh))
    for size in (16, 15, 9, 12, 16):
        run(params, np.zeros((size, 8), np.float32), np.full(size, 8, np.int32))
    assert traces == [(2, 8)]  # each device's share


# Weights


@ways
def test_weights_are_on_every_device(parallel: Parallel) -> None:
    leaves = jax.tree.leaves(model(parallel, 8).params)
    assert len(leaves) > 100
    for leaf in leaves:
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(jax.local_devices())


@ways
def test_weights_stay_where_they_are(parallel: Parallel) -> None:
    """No call moves a weight, from host or from device to device."""
    whole = model(parallel, 8)
    whole(*sixteen())
    before = [[s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in jax.tree.leaves(whole.params)]
    with jax.transfer_guard_device_to_device("disallow"):
        jax.block_until_ready(whole(*sixteen()))
    if parallel == "jit":  # which places the audio explicitly
        with jax.transfer_guard("disallow"):
            jax.block_until_ready(whole(*sixteen()))
    after = [[s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in jax.tree.leaves(whole.params)]
    assert after == before


@ways
def test_weights_that_are_elsewhere_would_be_seen(parallel: Parallel) -> None:
    """The guard of the test above is none in name only: weights on one device are refused, by jit always."""
    run = compile_batch(summed, Compilation(make_mesh(), parallel))
    params = jax.device_put({"w": np.float32(2)}, jax.local_devices()[0])
    audio, lengths = np.zeros((8, 5), np.float32), np.zeros(8, np.int32)
    with (
        jax.transfer_guard_device_to_device("disallow"),
        pytest.raises(Exception, match=r"Disallowed device-to-device transfer|incompatible devices"),
    ):
        run(params, audio, lengths)


@ways
def test_outputs_are_spread_over_the_devices(parallel: Parallel) -> None:
    """A batch that the devices divide is not gathered on one of them."""
    mesh = make_mesh()
    run = compile_batch(summed, Compilation(mesh, parallel))
    params = jax.device_put({"w": np.float32(2)}, replicated(mesh))
    out = run(params, np.ones((16, 5), np.float32), np.zeros(16, np.int32))
    for leaf in jax.tree.leaves(out):
        assert leaf.sharding.device_set == set(jax.local_devices())
        assert not leaf.sharding.is_fully_replicated


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


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(400, 16_000 * 60), min_size=1, max_size=60),
    st.integers(1, 64),
    st.sampled_from([1, 3, 8]),
)
def test_every_clip_is_in_one_batch_that_holds_it(lengths: list[int], max_rows: int, devices: int) -> None:
    batches = pack(lengths, max_rows, devices)
    assert sorted(i for batch in batches for i in batch.clips) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch.clips) <= batch.rows <= max(max_rows, devices)
        assert max(lengths[i] for i in batch.clips) <= batch.samples <= 1.25 * max(lengths[i] for i in batch.clips)
        assert batch.rows <= devices or batch.rows * batch.samples <= LIMITS["cpu"].batch


def test_clips_of_one_length_are_neither_padded_nor_cut_into_odd_batches() -> None:
    assert pack([12_345] * 5, 16, 1) == [Batch(5, 12_345, (0, 1, 2, 3, 4))]
    assert pack([16_000] * 20, 16, 1) == [
        Batch(16, 16_000, tuple(range(16))),
        Batch(4, 16_000, tuple(range(16, 20))),
    ]


def test_clips_of_one_length_have_few_shapes_where_that_is_asked_for() -> None:
    assert pack([12_345] * 5, 16, 1, exact=False) == [Batch(4, 14_336, (0, 1, 2, 3)), Batch(1, 14_336, (4,))]


def test_short_clips_share_a_batch_and_long_ones_do_not() -> None:
    rows = [batch.rows for batch in pack([16_000 * n for n in (30, 20, 1, 1, 1, 1)], 16, 1)]
    assert rows == [1, 1, 4]


def test_packing_costs_no_more_than_one_by_one() -> None:
    lengths = np.random.default_rng(0).integers(400, 160_000, 100).tolist()
    overhead = LIMITS["cpu"].overhead
    packed = sum(batch.rows * batch.samples + overhead for batch in pack(lengths, 16, 1))
    assert packed < sum(bucket_length(n) + overhead for n in lengths)
    assert packed < 1.3 * (sum(lengths) + overhead * len(lengths))


def test_new_shapes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gura_jax.parallel")
    run = compile_batch(summed, Compilation(make_mesh()))
    params = jax.device_put({"w": np.float32(2.0)}, replicated(make_mesh()))
    for size in (8, 8, 16):
        run(params, np.zeros((size, 16_000), np.float32), np.zeros(size, np.int32))
    assert [record.getMessage() for record in caplog.records] == [
        "shape 1: compiling for 8 clips of 1.00 s",
        "shape 2: compiling for 16 clips of 1.00 s",
    ]
