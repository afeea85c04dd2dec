"""gura_jax/audio.py: decoding and resampling equal librosa's, and bad files, arrays and rates are refused."""

import functools
import math
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gura_jax.audio
from gura_jax.audio import (
    HEAR_RATE,
    MAX_RATE,
    MIN_RATE,
    MIN_SECONDS,
    PEAK_LIMIT,
    check_audio,
    check_clip,
    load_audio,
    load_segments,
    min_samples,
    probe_audio,
    resample,
    resampled_length,
)
from gura_jax.errors import AudioError

RATES = (16_000, 22_050, 24_000, 44_100, 48_000)  # of models


def signal(n: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    out = 0.1 * np.random.default_rng(seed).standard_normal((n, channels))
    return out[:, 0] if channels == 1 else out


def reference(path: Path, sample_rate: int = HEAR_RATE) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return librosa.resample(samples.mean(axis=1), orig_sr=rate, target_sr=sample_rate, res_type="soxr_hq")


@pytest.mark.parametrize(
    ("suffix", "rate", "channels"),
    [
        ("wav", 16_000, 1),
        ("wav", 192_000, 8),
        ("wav", 8_000, 1),
        ("flac", 44_100, 2),
        ("ogg", 48_000, 2),
        ("mp3", 22_050, 2),
        ("aiff", 11_025, 1),
        ("caf", 96_000, 3),
    ],
)
def test_decoding_equals_librosa_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, rate: int, channels: int
) -> None:
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, signal(rate + 17, channels), rate)
    expected = reference(path)
    for values in (1 << 20, 5000):
        monkeypatch.setattr(gura_jax.audio, "BLOCK_VALUES", values)
        found = load_audio(path)
        assert found.dtype == np.float32
        # What the MP3 decoder computes in its last bit depends on what it computed before.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 if suffix == "mp3" else 0)


@pytest.mark.parametrize("sample_rate", RATES)
@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100])
def test_any_rate_equals_librosa(tmp_path: Path, rate: int, sample_rate: int) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, signal(rate + 17, 2), rate)
    found = load_audio(path, sample_rate=sample_rate)
    np.testing.assert_array_equal(found, reference(path, sample_rate))
    assert probe_audio(path, sample_rate=sample_rate) == len(found) == resampled_length(rate + 17, rate, sample_rate)


@given(st.integers(1, 3000), st.sampled_from([*RATES, 1_000, 11_025, 768_000]), st.sampled_from(RATES))
def test_resampling_a_clip_equals_librosa(samples: int, rate: int, sample_rate: int) -> None:
    clip = signal(samples).astype(np.float32)
    found = resample(clip, rate, sample_rate)
    assert found.dtype == np.float32
    assert len(found) == resampled_length(samples, rate, sample_rate)
    theirs = librosa.resample(clip, orig_sr=rate, target_sr=sample_rate, res_type="soxr_hq")
    np.testing.assert_array_equal(found, theirs[: len(found)])  # which may have one more: it rounds up a float


@given(st.integers(0, 10**13), st.integers(MIN_RATE, MAX_RATE), st.integers(MIN_RATE, MAX_RATE))
def test_resampled_lengths_are_exact(samples: int, rate: int, sample_rate: int) -> None:
    """Also where a product is beyond 32 bits, or beyond what a float holds."""
    expected = math.ceil(Fraction(samples * sample_rate, rate))
    assert resampled_length(samples, rate, sample_rate) == expected
    small = samples % 2**31
    found = resampled_length(np.array([small, 0], np.int32), rate, sample_rate)
    assert found.tolist() == [math.ceil(Fraction(small * sample_rate, rate)), 0]


@pytest.mark.parametrize("rate", [0, -16_000, MIN_RATE - 1, MAX_RATE + 1, 16_000.0, "16000", None, True, math.nan])
def test_impossible_rates_are_refused(tmp_path: Path, rate: Any) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, signal(1000), HEAR_RATE)
    clip = signal(1000).astype(np.float32)
    for function in (
        lambda: load_audio(path, sample_rate=rate),
        lambda: load_segments(path, [], sample_rate=rate),
        lambda: probe_audio(path, sample_rate=rate),
        lambda: resample(clip, rate, HEAR_RATE),
        lambda: resample(clip, HEAR_RATE, rate),
        lambda: check_clip(clip, sample_rate=rate),
        lambda: check_audio([clip], sample_rate=rate),
    ):
        with pytest.raises(AudioError, match=f"expected a whole number of Hz from 1000 to 768000, found {rate!r}"):
            function()


@given(st.integers(MIN_RATE, MAX_RATE))
def test_the_shortest_clip_is_long_enough_at_every_rate(rate: int) -> None:
    shortest = min_samples(rate)
    assert shortest - 1 < Fraction(25, 1000) * rate <= shortest
    assert resampled_length(shortest, rate, HEAR_RATE) >= min_samples(HEAR_RATE) == MIN_SECONDS * HEAR_RATE


def test_messages_have_the_rate(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"at least 552 samples at 22\.05 kHz \(25\.034 ms\), found 551"):
        check_clip(signal(551), sample_rate=22_050)
    path = tmp_path / "short.wav"
    soundfile.write(path, signal(1100), 44_100)
    with pytest.raises(AudioError, match=r"short\.wav: .* at least 600 samples at 24 kHz \(25 ms\), found 599"):
        load_audio(path, sample_rate=24_000)


def variable_mp3(path: Path) -> Path:
    """Noise, then silence: frames of very different sizes."""
    soundfile.write(path, np.concatenate([signal(200_000), np.zeros(200_000)]), 44_100)
    return path


def test_an_mp3_of_variable_bit_rate_is_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = variable_mp3(tmp_path / "variable.mp3")
    expected = reference(path)
    monkeypatch.setattr(gura_jax.audio, "BLOCK_VALUES", 5000)
    np.testing.assert_allclose(load_audio(path), expected, rtol=0, atol=1e-7)


def test_an_mp3_without_its_length_is_refused_not_cut(tmp_path: Path) -> None:
    path = variable_mp3(tmp_path / "untagged.mp3")
    data = path.read_bytes()
    second_frame = data.index(data[:2], 100)
    path.write_bytes(data[second_frame:])
    with pytest.raises(AudioError, match=r"untagged\.mp3: expected an MP3 whose header says its length"):
        load_audio(path)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff", "caf", "w64", "au"])
@pytest.mark.parametrize("part", [0.9, 0.5, 0.02])
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str, part: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, signal(100_000), 44_100)
    assert len(load_audio(path)) == 36_282
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(AudioError, match=rf"cut\.{suffix}: "):
        load_audio(path)


def wav(rate: int = HEAR_RATE, claimed: int = 2000, channels: int = 1) -> bytes:
    """A 16-bit WAV of 1000 samples, with a header that may say otherwise."""
    size = 2 * channels
    fmt = struct.pack("<HHIIHH", 1, channels, rate, min(rate * size, 2**32 - 1), size, 16)
    head = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", claimed)
    return b"RIFF" + struct.pack("<I", min(len(head) + claimed, 2**32 - 1)) + head + bytes(2000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be decoded"),
        (b"not audio at all\n" * 100, "cannot be decoded"),
        (wav(claimed=0), "no samples"),
        (wav(rate=48_000), r"at least 400 samples at 16 kHz \(25 ms\), found 334"),
        (wav(rate=1), "sample rate from 1000 to 768000 Hz, found 1:"),
        (wav(rate=2**31 - 1), "sample rate from 1000 to 768000 Hz, found 2147483647"),
        (wav(rate=2**32 - 1), "cannot be decoded"),
        (wav(channels=0), "cannot be decoded"),
        (wav(channels=30_000), "cannot be decoded"),
        (wav(claimed=1_000_000_000), "cut short"),
    ],
)
def test_bad_wav_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=rf"bad\.wav: .*{message}"):
        load_audio(path)


def test_a_wav_written_to_a_pipe_is_not_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "piped.wav"
    path.write_bytes(wav(claimed=2**32 - 1))
    assert len(load_audio(path)) == 1000


def flac_claiming(path: Path, frames: int) -> Path:
    """A FLAC whose header says another number of frames (36 bits at byte 21)."""
    soundfile.write(path, signal(48_000), HEAR_RATE)
    data = bytearray(path.read_bytes())
    data[21] = data[21] & 0xF0 | frames >> 32
    data[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("frames", "message"), [(2**36 - 1, "at most 3600 s"), (50_000_000, "cut short")])
def test_a_header_that_promises_gigabytes_does_not_allocate_them(tmp_path: Path, frames: int, message: str) -> None:
    path = flac_claiming(tmp_path / "huge.flac", frames)
    tracemalloc.start()
    with pytest.raises(AudioError, match=rf"huge\.flac: .*{message}"):
        load_audio(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_a_flac_written_to_a_pipe_does_not_say_its_length(tmp_path: Path) -> None:
    assert len(load_audio(flac_claiming(tmp_path / "piped.flac", 0))) == 48_000


def test_a_recording_that_is_too_long(tmp_path: Path) -> None:
    for claimed in (0, 48_000):  # unknown, and known at once
        with pytest.raises(AudioError, match=r"long\.flac: expected at most 2 s, found 3\.0 s.*--window"):
            load_audio(flac_claiming(tmp_path / "long.flac", claimed), max_seconds=2)


@pytest.mark.parametrize(("suffix", "rate"), [("wav", 16_000), ("flac", 44_100), ("ogg", 48_000), ("mp3", 22_050)])
def test_segments_are_those_of_the_whole(tmp_path: Path, suffix: str, rate: int) -> None:
    """Before resampling, a segment's samples are the file's own: also where seeking is not exact."""
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, signal(5 * rate, 2), rate)
    samples = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    segments = [(0.5, 1.25), (1.0, 2.0), (4.0, None), (0.0, None), (3.125, 0.5)]
    for (offset, duration), found in zip(segments, load_segments(path, segments, sample_rate=HEAR_RATE), strict=True):
        start = round(offset * rate)
        part = samples[start:] if duration is None else samples[start : start + round(duration * rate)]
        expected = librosa.resample(part, orig_sr=rate, target_sr=HEAR_RATE, res_type="soxr_hq")
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 if suffix == "mp3" else 0)
        np.testing.assert_array_equal(found, load_audio(path, offset, duration))
        assert probe_audio(path, offset, duration, sample_rate=HEAR_RATE) == len(found)


def test_a_segment_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, signal(16_000), HEAR_RATE)
    assert len(load_audio(path, 0.5, 0.54)) == 8_000  # a list that rounds
    assert probe_audio(path, 0.5, 0.54, sample_rate=HEAR_RATE) == 8_000
    for offset, duration in ((0.5, 0.6), (1.0, None), (7.0, 1.0)):
        for function in (load_audio, probe_audio):
            with pytest.raises(AudioError, match=r"clip\.wav: expected a clip within the file's 1\.000 s, found one"):
                function(path, offset, duration, sample_rate=HEAR_RATE)
    good, bad = load_segments(path, [(0.0, 0.5), (2.0, 0.5)], sample_rate=HEAR_RATE)
    assert isinstance(good, np.ndarray)
    assert isinstance(bad, AudioError)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "NaN or infinity at 0.250 s"),
        (np.inf, "NaN or infinity at 0.250 s"),
        (3e38, "NaN or infinity at 0.250 s"),  # the sum of both channels overflows
        (9000.0, "a peak of 9000"),
    ],
)
def test_bad_samples_in_a_file(tmp_path: Path, value: float, message: str) -> None:
    path = tmp_path / "bad.wav"
    samples = signal(16_000, 2)
    samples[4000] = value
    soundfile.write(path, samples, HEAR_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=rf"bad\.wav: .*{message}"):
        load_audio(path)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"missing\.wav: expected an audio file, found no such file"):
        load_audio(tmp_path / "missing.wav")
    with pytest.raises(AudioError, match=f"{tmp_path.name}: expected an audio file, found a folder"):
        load_audio(tmp_path)
    (tmp_path / "headless.raw").write_bytes(bytes(9000))
    with pytest.raises(AudioError, match=r"headless\.raw: expected a format with a header"):
        load_audio(tmp_path / "headless.raw")
    with pytest.raises(AudioError, match="cannot be read: File name too long"):
        load_audio(tmp_path / f"{'x' * 300}.wav")


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        st.integers(400, 403),
        elements=st.floats(width=16),
        fill=st.floats(-1, 1, width=16),
    )
)
def test_check_clip_passes_exactly_the_finite_and_moderate(clip: np.ndarray) -> None:
    if np.isfinite(clip).all() and (np.abs(clip) <= PEAK_LIMIT).all():
        found = check_clip(clip, sample_rate=HEAR_RATE)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, clip)
    else:
        with pytest.raises(AudioError, match=r"expected (finite samples|samples in)"):
            check_clip(clip, sample_rate=HEAR_RATE)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros(399, np.float32), r"clip: expected at least 400 samples at 16 kHz \(25 ms\), found 399"),
        (np.zeros(0, np.float32), "found 0"),
        (np.zeros(400, np.int16), "found int16: divide by the full scale, 32768"),
        (np.zeros(400, np.uint8), "found uint8: divide by the full scale, 255"),
        (np.zeros(400, np.complex64), "found complex64"),
        (np.zeros(400, bool), "found bool"),
        (np.array(["a"] * 400), "found <U1"),
        (np.array([None] * 400), "found object"),
        (np.full(400, 1e300), "a peak of 1e\\+300"),
        (np.float32(0.5), r"found shape \(\)"),
        (np.zeros((1, 400), np.float32), r"found shape \(1, 400\)"),
        ([[0.0], [0.0, 1.0]], "found list"),
    ],
)
def test_check_clip_refuses(clip: Any, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        check_clip(clip, "clip", sample_rate=HEAR_RATE)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray, list, tuple, lambda a: [jnp.asarray(clip) for clip in a]])
def test_check_audio_accepts(make: Callable[[np.ndarray], Any]) -> None:
    clips = signal(1000).reshape(2, 500).astype(np.float32)
    found = check_audio(make(clips), sample_rate=HEAR_RATE)
    assert [type(clip) for clip in found] == [np.ndarray] * 2
    np.testing.assert_array_equal(found, clips)


def test_check_audio_accepts_clips_of_different_lengths() -> None:
    clips = check_audio([signal(400), signal(900)], sample_rate=HEAR_RATE)
    assert [len(clip) for clip in clips] == [400, 900]


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (signal(400), r"found shape \(400,\): pass audio\[None\]"),
        (np.zeros((1, 2, 400)), r"found shape \(1, 2, 400\)"),
        (np.zeros((0, 400)), "at least one clip"),
        ([], "at least one clip"),
        ([0.0] * 400, r"audio\[0\]: expected a clip of one axis"),
        ([signal(400), signal(400), signal(399)], r"audio\[2\]: .*found 399"),
        ("speech.wav", r"found shape \(\)"),
        (None, r"found shape \(\)"),
    ],
)
def test_check_audio_refuses(audio: Any, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        check_audio(audio, sample_rate=HEAR_RATE)


def test_a_traced_array_is_refused_by_name() -> None:
    with pytest.raises(AudioError, match="expected an array of samples, found DynamicJaxprTracer"):
        jax.jit(functools.partial(check_audio, sample_rate=HEAR_RATE))(jnp.zeros((1, 400)))


def test_importing_is_light() -> None:
    script = "import sys, gura_jax.audio, gura_jax.dataset.reader, gura_jax.plot; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    heavy = {"av", "librosa", "soundfile", "soxr", "matplotlib", "pyarrow", "scipy.cluster"}
    assert not heavy & set(run.stdout.split())
