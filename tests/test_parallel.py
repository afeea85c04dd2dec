"""parallel.py: the same on any number of devices, compiled once, with nothing sent between them."""

import dataclasses
import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference import relative

from gura_jax import ENCODERS, Member, Model, Options, System, load_model
from gura_jax.backend import PLATFORMS
from gura_jax.models.families import build_encoder
from gura_jax.parallel import Compilation, Parallel, compile_batch, make_mesh, replicated

DEVICES_BOUND = 1e-6  # relative norm: each device runs the same program on fewer rows
COLLECTIVES = re.compile(
    r" (all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-broadcast|collective-permute|reduce-scatter|"
    r"partition-id|send|recv)(?:-start)?\("
)
RATE = 16_000


def shallow(name: str) -> Member:
    """A small encoder of this kind, of one block."""
    config = dataclasses.replace(ENCODERS[name].config.tiny(), num_hidden_layers=1)
    return Member(build_encoder(config, Options("mean")), name=name)


SYSTEM = System("small", (shallow("hubert-large"), shallow("wav2vec2-base"), Member("crepe-tiny")), "interleave", 64)
ways = pytest.mark.parametrize("parallel", get_args(Parallel))


@pytest.fixture(autouse=True)
def _eight_devices() -> None:
    assert len(jax.local_devices()) == 8


@functools.cache
def model(parallel: Parallel, devices: int) -> Model:
    chosen = jax.local_devices()[:devices]
    return load_model(SYSTEM, weights="random", parallel_by=parallel, devices=chosen)


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
            assert relative(got[row], wanted[row]) < DEVICES_BOUND, f"{name} of clip {row}"


def at_rate(*arrays: Any) -> list[dict[int, Any]]:
    """A batch of one rate, as a compiled function takes it."""
    return [{RATE: array} for array in arrays]


def summed(params: Any, audio: Any, lengths: Any) -> tuple[jax.Array, jax.Array]:
    return audio[RATE].sum(axis=1) * params["w"], jnp.stack([lengths[RATE], 2 * lengths[RATE]], axis=1)


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
        sums, twice = run(params, *at_rate(given_audio, given_lengths))
        np.testing.assert_array_equal(sums, 2 * audio.sum(axis=1))
        np.testing.assert_array_equal(twice, np.stack([lengths, 2 * lengths], axis=1))
        assert sums.dtype == np.float32
        assert twice.dtype == np.int32


@ways
def test_gradients_of_a_batch_that_does_not_divide(parallel: Parallel) -> None:
    run = compile_batch(summed, Compilation(make_mesh(), parallel))
    params = jax.device_put({"w": np.float32(2.0)}, replicated(make_mesh()))
    lengths = jnp.full(3, 5)
    gradient = jax.grad(lambda audio: run(params, *at_rate(audio, lengths))[0].sum())(jnp.ones((3, 5), jnp.float32))
    np.testing.assert_array_equal(gradient, np.full((3, 5), 2.0, np.float32))


@ways
def test_filled_up_rows_are_whole_clips_of_silence(parallel: Parallel) -> None:
    """Not clips of no length, whose mean over frames would be NaN; of every rate."""
    seen: list[Any] = []

    def watch(params: Any, audio: Any, lengths: Any) -> jax.Array:
        jax.debug.callback(lambda *x: seen.append(jax.tree.map(np.asarray, x)), audio, lengths)
        return lengths[RATE]

    audio = {RATE: np.ones((9, 4), np.float32), 2 * RATE: np.ones((9, 8), np.float32)}
    lengths = {RATE: np.full(9, 3, np.int32), 2 * RATE: np.full(9, 6, np.int32)}
    compile_batch(watch, Compilation(make_mesh(), parallel))({}, audio, lengths)
    jax.effects_barrier()
    assert len(seen) == 8
    for rate, own, whole in ((RATE, 3, 4), (2 * RATE, 6, 8)):
        assert sorted(np.concatenate([n[rate] for _, n in seen]).tolist()) == [own] * 9 + [whole] * 7
        filled = np.concatenate([a[rate] for a, _ in seen])
        assert filled.shape == (16, whole)
        assert filled.sum() == 9 * whole


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


def collectives(text: str | None) -> dict[str, int]:
    """What is sent between devices in XLA's optimised program, and how often."""
    assert text is not None
    return dict(Counter(COLLECTIVES.findall(text)))


def test_nothing_goes_from_device_to_device(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model("jit", 8)
    params = {m.name: {**(own := whole.params[m.name]), **m.encoder.derive(own)} for m in whole.fusion.members}
    batch = jax.device_put(at_rate(*sixteen()), sharded(8)[1])  # as a call places it
    text = compiled_text(whole.fuse, make_mesh(), monkeypatch, params, *batch)
    assert "dot(" in text or "custom-call" in text
    assert collectives(text) == {}


def test_it_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixing(params: Any, audio: Any, lengths: Any) -> jax.Array:
        return lengths[RATE] + jax.lax.psum(lengths[RATE].sum(), "data")

    batch = at_rate(np.zeros((8, 16), np.float32), np.zeros(8, np.int32))
    assert collectives(compiled_text(mixing, make_mesh(), monkeypatch, {}, *batch)) == {"all-reduce": 1}


# Without compile_batch: a batch that is sharded on its first axis partitions by itself


def sharded(devices: int) -> tuple[NamedSharding, NamedSharding]:
    """The placement of weights and of a batch."""
    mesh = make_mesh(jax.local_devices()[:devices])
    return replicated(mesh), NamedSharding(mesh, PartitionSpec("data"))


@pytest.mark.parametrize(
    ("system", "platform"),
    [
        ("hubert_base", "cpu"),
        (SYSTEM, "cpu"),
        pytest.param("fusion_cat_xwc", "cpu", marks=pytest.mark.slow),
        pytest.param("crepe", "cpu", marks=pytest.mark.slow),
        pytest.param("crepe", "gpu", marks=pytest.mark.slow),
        ("dasheng_base", "cpu"),
    ],
)
def test_a_sharded_batch_needs_no_communication(
    system: str | System, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``jax.jit(model.fuse)``, in several blocks and in both forms; and it computes what one device does."""
    small = {"frames": 4 * 8, "scores": 4 * 8 * 14, "tokens": 4 * 6, "crepe_frames": 4 * 4}
    monkeypatch.setitem(PLATFORMS, platform, dataclasses.replace(PLATFORMS[platform], **small))
    size = "tiny" if isinstance(system, str) else None  # SYSTEM is as small
    one = load_model(system, weights="random", size=size, devices=jax.local_devices()[:1], platform=platform)
    audio, lengths = np.stack(clips(*[4800] * 4)), np.array([4800, 4800, 1700, 3040], np.int32)
    everywhere, data = sharded(4)
    params = jax.device_put(one.params, everywhere)
    program = jax.jit(one.fuse).lower(params, *jax.device_put((audio, lengths), data)).compile()
    text = program.as_text()
    assert text is not None
    assert "num_partitions=4" in text
    assert collectives(text) == {}
    many = program(params, *jax.device_put((audio, lengths), data))
    assert many.frames.sharding.is_equivalent_to(data, many.frames.ndim)
    alone = jax.jit(one.fuse)(one.params, audio, lengths)
    np.testing.assert_array_equal(many.counts, alone.counts)
    assert relative(many.frames, alone.frames) < DEVICES_BOUND
    assert relative(many.scenes, alone.scenes) < DEVICES_BOUND


def test_a_batch_that_is_gathered_would_be_seen() -> None:
    everywhere, data = sharded(4)
    batch = jax.device_put(np.zeros((8, 16), np.float32), data)
    for function in (lambda x: x.reshape(2, 4, 16)[::-1], lambda x: x - x.mean()):
        text = jax.jit(function, out_shardings=everywhere).lower(batch).compile().as_text()
        assert collectives(text) != {}


# What is compiled, and when


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

    def counted(params: Any, audio: Any, lengths: Any) -> jax.Array:
        traces.append(audio[RATE].shape)
        return audio[RATE].sum(axis=1) + params["w"]

    mesh = make_mesh()
    run = compile_batch(counted, Compilation(mesh, parallel))
    params = jax.device_put({"w": np.float32(1)}, replicated(mesh))
    for size in (16, 15, 9, 12, 16):
        run(params, *at_rate(np.zeros((size, 8), np.float32), np.full(size, 8, np.int32)))
    assert traces == [(2, 8)]  # each device's share


# Weights


@ways
def test_weights_are_on_every_device(parallel: Parallel) -> None:
    leaves = jax.tree.leaves(model(parallel, 8).params)
    assert len(leaves) > 90
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
    batch = at_rate(np.zeros((8, 5), np.float32), np.zeros(8, np.int32))
    with (
        jax.transfer_guard_device_to_device("disallow"),
        pytest.raises(Exception, match=r"Disallowed device-to-device transfer|incompatible devices"),
    ):
        run(params, *batch)


@ways
def test_outputs_are_spread_over_the_devices(parallel: Parallel) -> None:
    """A batch that the devices divide is not gathered on one of them."""
    mesh = make_mesh()
    run = compile_batch(summed, Compilation(mesh, parallel))
    params = jax.device_put({"w": np.float32(2)}, replicated(mesh))
    out = run(params, *at_rate(np.ones((16, 5), np.float32), np.zeros(16, np.int32)))
    for leaf in jax.tree.leaves(out):
        assert leaf.sharding.device_set == set(jax.local_devices())
        assert not leaf.sharding.is_fully_replicated


def test_new_shapes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gura_jax.parallel")
    run = compile_batch(summed, Compilation(make_mesh()))
    params = jax.device_put({"w": np.float32(2.0)}, replicated(make_mesh()))
    for size in (8, 8, 16):
        run(params, *at_rate(np.zeros((size, RATE), np.float32), np.zeros(size, np.int32)))
    assert [record.getMessage() for record in caplog.records] == [
        "shape 1: compiling for 8 clips of 1.00 s",
        "shape 2: compiling for 16 clips of 1.00 s",
    ]
