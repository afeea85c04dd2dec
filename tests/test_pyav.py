"""gura_jax/pyav.py: formats that libsndfile lacks give FFmpeg's samples, exactly; bad files are refused."""

import functools
import io
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import pytest
import soundfile
from test_tars import pack

import gura_jax.audio
from gura_jax.audio import load_audio, load_segments, probe_audio, resample
from gura_jax.dataset.sources import open_clip, read_inputs
from gura_jax.errors import AudioError

# suffix -> codec, sample format, FFmpeg's name of the container, sample rate
LOSSY = {
    "m4a": ("aac", "fltp", "ipod", 44_100),
    "mp4": ("aac", "fltp", "mp4", 48_000),
    "aac": ("aac", "fltp", "adts", 44_100),
    "webm": ("libopus", "flt", "webm", 48_000),
    "wma": ("wmav2", "fltp", "asf", 44_100),
}
LOSSLESS = {
    "m4b": ("alac", "s16p", "ipod", 44_100),
    "mka": ("flac", "s16", "matroska", 48_000),
    "mkv": ("pcm_s16le", "s16", "matroska", 22_050),
    "mov": ("pcm_s24be", "s32", "mov", 16_000),
    "mp4": ("alac", "s32p", "mp4", 16_000),
}
CODECS = {**{f"{k}-lossless": v for k, v in LOSSLESS.items()}, **LOSSY}


def signal(n: int, channels: int = 2) -> np.ndarray:
    """[n, channels] of 16 bits."""
    return (3000 * np.random.default_rng(0).standard_normal((n, channels))).astype(np.int16)


def write(path: Path, kind: str, samples: np.ndarray, *, video: int = 0, audio: bool = True, **options: str) -> Path:
    """Encode samples [n, channels]; with some seconds of video before, if any."""
    codec, sample_format, container, rate = CODECS[kind]
    layout = {1: "mono", 2: "stereo", 8: "7.1"}[samples.shape[1]]
    with av.open(str(path), "w", format=container, options=options) as out:
        encoders: list[tuple[Any, Iterator[Any]]] = []
        if video:
            pictures: Any = out.add_stream("mpeg4", rate=10)
            pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
            encoders.append((pictures, (numbered(av.VideoFrame(32, 32, "yuv420p"), i) for i in range(10 * video))))
        if audio:
            stream: Any = out.add_stream(codec, rate=rate)
            stream.format, stream.layout, stream.bit_rate = sample_format, layout, 128_000
            encoders.append((stream, frames(samples, sample_format, layout, rate)))
        for encoder, pieces in encoders:
            for piece in (*pieces, None):
                out.mux([packet for packet in encoder.encode(piece) if packet.size])
    return path


@functools.cache
def encoded(kind: str) -> bytes:
    """Three seconds of it."""
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder) / "clip", kind, signal(3 * CODECS[kind][-1])).read_bytes()


def numbered(frame: Any, pts: int) -> Any:
    frame.pts = pts
    return frame


def frames(samples: np.ndarray, sample_format: str, layout: str, rate: int) -> Iterator[Any]:
    planar, kind = sample_format.endswith("p"), sample_format.rstrip("p")
    for i in range(0, len(samples), 1024):
        block = samples[i : i + 1024]
        if kind == "flt":
            block = (block / 32768).astype(np.float32)
        elif kind == "s32":
            block = block.astype(np.int32) << 16
        array: Any = block.T if planar else block.reshape(1, -1)
        frame = numbered(av.AudioFrame.from_ndarray(np.ascontiguousarray(array), sample_format, layout), i)
        frame.sample_rate = rate
        yield frame


def ffmpeg(path: Path) -> np.ndarray:
    """The mean of the channels, [n] float32, as FFmpeg decodes them to floats."""
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray() for frame in container.decode(audio=0)]
    stream = np.concatenate(parts, axis=1)
    assert stream.dtype == np.float32
    assert len(stream) == 2
    return stream.mean(axis=0)


@pytest.mark.parametrize("kind", LOSSY)
def test_samples_are_those_of_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    rate = CODECS[kind][-1]
    path = write(tmp_path / f"clip.{kind}", kind, signal(rate + 17), video=2 * (kind == "mp4"))
    expected = ffmpeg(path)
    assert abs(len(expected) - rate) < 4096
    for sample_rate, values in ((rate, 1 << 20), (rate, 3000), (16_000, 3000)):
        monkeypatch.setattr(gura_jax.audio, "BLOCK_VALUES", values)
        found = load_audio(path, sample_rate=sample_rate)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, resample(expected, rate, sample_rate))
        assert probe_audio(path, sample_rate=sample_rate) == len(found)


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("channels", [1, 2])
def test_lossless_samples_are_those_of_a_wav(tmp_path: Path, suffix: str, channels: int) -> None:
    rate = LOSSLESS[suffix][-1]
    samples = signal(rate + 17, channels)
    soundfile.write(tmp_path / "clip.wav", samples, rate)
    path = write(tmp_path / f"clip.{suffix}", f"{suffix}-lossless", samples)
    for sample_rate in (rate, 24_000):
        expected = load_audio(tmp_path / "clip.wav", sample_rate=sample_rate)
        np.testing.assert_array_equal(load_audio(path, sample_rate=sample_rate), expected)
        assert probe_audio(path, sample_rate=sample_rate) == len(expected)


@pytest.mark.parametrize("kind", LOSSY)
def test_segments_are_those_of_the_whole(tmp_path: Path, kind: str) -> None:
    rate = CODECS[kind][-1]
    path = tmp_path / f"clip.{kind}"
    path.write_bytes(encoded(kind))
    whole = load_audio(path, sample_rate=rate)
    segments = [(0.25, 0.5), (0.5, 1.0), (2.5, None), (0.0, None), (0.3, 0.125), (2.9, 0.5), (5.0, 1.0)]
    *clips, past, beyond = load_segments(path, segments, sample_rate=rate)
    for (offset, duration), clip in zip(segments, clips, strict=False):
        start = round(offset * rate)
        expected = whole[start:] if duration is None else whole[start : start + round(duration * rate)]
        np.testing.assert_array_equal(clip, expected)
        assert probe_audio(path, offset, duration, sample_rate=rate) == len(expected)
    assert "cut short" in str(past)
    assert f"within the file's {len(whole) / rate:.3f} s, found one from 5.000 to 6.000 s" in str(beyond)
    for offset, duration in segments[-2:]:
        with pytest.raises(AudioError, match="expected a clip within the file's"):
            probe_audio(path, offset, duration, sample_rate=rate)


def test_a_segment_within_a_long_file_is_not_counted_by_decoding_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.m4a"
    path.write_bytes(encoded("m4a"))
    monkeypatch.delattr(gura_jax.audio, "_count")
    assert probe_audio(path, 1.0, 1.5, sample_rate=16_000) == 24_000
    with pytest.raises(NameError, match="_count"):
        probe_audio(path, 1.0, 1.999, sample_rate=16_000)  # at the end, the header is not exact


def test_a_file_object_is_read_like_a_path(tmp_path: Path) -> None:
    """Without a descriptor; and a member of a tar, found in a folder."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "clip.m4a"
    path.write_bytes(encoded("m4a"))
    expected = load_audio(path)
    (found,) = load_segments(
        path, [(0.0, None)], sample_rate=16_000, opener=lambda path: io.BytesIO(Path(path).read_bytes())
    )
    np.testing.assert_array_equal(found, expected)
    assert read_inputs([tmp_path / "in"])["id"].to_pylist() == ["clip.m4a"]
    archive = pack(tmp_path / "a.tar", [("notes.txt", b"words"), ("clip.m4a", path.read_bytes())])
    (member,) = read_inputs([archive])["path"].to_pylist()
    (found,) = load_segments(member, [(0.0, None)], sample_rate=16_000, opener=open_clip)
    np.testing.assert_array_equal(found, expected)


class Broken(io.BytesIO):
    """A file on a network that fails after some bytes."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 30_000:
            raise OSError(5, "the server went away")
        return super().read(size)


@pytest.mark.parametrize("kind", ["webm", "m4a", "aac"])
def test_an_error_of_reading_keeps_its_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    """FFmpeg would take it for the file's end."""
    path = tmp_path / f"clip.{kind}"
    path.write_bytes(encoded(kind))

    def opener(path: str) -> BinaryIO:
        return Broken(Path(path).read_bytes())

    (found,) = load_segments(path, [(0.0, None)], sample_rate=16_000, opener=opener)
    assert str(found) == f"{path}: cannot be read: the server went away"
    with pytest.raises(AudioError, match="cannot be read: the server went away"):
        probe_audio(path, sample_rate=16_000, opener=opener)
    assert load_audio(path).size  # nothing is left of it
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [*LOSSY, "mka-lossless", "m4b-lossless"])
@pytest.mark.parametrize("part", [0.9, 0.5, 0.1])
def test_a_file_cut_short_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, part: float) -> None:
    path, data = tmp_path / f"cut.{kind}", encoded(kind)
    path.write_bytes(data)
    assert load_audio(path).size
    path.write_bytes(data[: int(part * len(data))])
    for function in (load_audio, probe_audio):
        with pytest.raises(AudioError, match=rf"cut\.{kind}: .*expected a complete file"):
            function(path, sample_rate=16_000)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("video", [0, 5])
def test_a_file_cut_between_frames_is_refused(tmp_path: Path, video: int) -> None:
    """Its header is at the start: FFmpeg ends without an error. Here the audio is shorter than the video."""
    path = write(tmp_path / "cut.mp4", "mp4", signal(3 * 48_000), video=video, movflags="faststart")
    assert len(load_audio(path)) == pytest.approx(3 * 16_000, abs=400)
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
    end = packets[len(packets) // 2].pos
    assert end is not None
    path.write_bytes(data[:end])
    with pytest.raises(AudioError, match=r"cut\.mp4: expected a complete file, found one"):
        load_audio(path)


def test_matroska_without_a_length(tmp_path: Path) -> None:
    """As browsers record it: counted, and where it is cut cannot be seen."""
    path = write(tmp_path / "live.webm", "webm", signal(2 * 48_000), live="1")
    assert probe_audio(path, sample_rate=48_000) == len(load_audio(path, sample_rate=48_000)) == 2 * 48_000
    with pytest.raises(AudioError, match=r"live\.webm: expected at most 1\.5 s, found 2\.0 s"):
        load_audio(path, max_seconds=1.5)
    with pytest.raises(AudioError, match=r"live\.webm: expected at most 1\.5 s, found 2\.0 s"):
        probe_audio(path, sample_rate=16_000, max_seconds=1.5)
    assert probe_audio(path, sample_rate=48_000, max_seconds=float("inf")) == 2 * 48_000


def test_a_recording_that_is_too_long_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.m4a"
    path.write_bytes(encoded("m4a"))
    monkeypatch.delattr("gura_jax.pyav.AvRecording.read")
    for function in (load_audio, probe_audio):
        with pytest.raises(AudioError, match=r"long\.m4a: expected at most 2 s, found 2\.\d s.*--window"):
            function(path, sample_rate=16_000, max_seconds=2)


def test_memory_is_bounded_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds of eight channels, 5 MB as floats, are counted and decoded in some hundred kB."""
    monkeypatch.setattr(gura_jax.audio, "BLOCK_VALUES", 1 << 14)
    path = write(tmp_path / "clip.mov", "mov-lossless", signal(10 * 16_000, 8))
    probe_audio(path, sample_rate=1_000)  # imports, tables
    tracemalloc.start()
    assert probe_audio(path, sample_rate=1_000) == len(load_audio(path, sample_rate=1_000)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize("layout", ["5.1", "7.1", "hexadecagonal"])
def test_many_channels(tmp_path: Path, layout: str) -> None:
    """From eight planes on, PyAV reads beyond them and crashes. Each channel is as loud as its number."""
    channels = av.AudioLayout(layout).nb_channels
    samples = np.arange(1, channels + 1) * signal(16_000, 1) / channels
    path = tmp_path / "clip.mka"
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("aac", rate=16_000)
        stream.layout, stream.bit_rate = layout, 60_000 * channels
        planes = av.AudioResampler("fltp")
        for frame in frames(samples, "flt", layout, 16_000):
            for planar in planes.resample(frame):
                out.mux(stream.encode(planar))
        out.mux(stream.encode(None))
    found = load_audio(path)
    with av.open(str(path)) as container:
        decoded = list(container.decode(audio=0))
        expected = [
            np.mean([np.frombuffer(bytes(p), np.float32, f.samples) for p in f.planes[:channels]], 0) for f in decoded
        ]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=1e-7)
    assert probe_audio(path, sample_rate=16_000) == len(found)


@pytest.mark.parametrize("suffix", ["m4a", "webm", "txt"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not audio at all\n" * 100,
        b"\0\0\0\x20ftypM4A " + bytes(500),
        b"\x1aE\xdf\xa3" + bytes(500),
    ],
)
def test_garbage_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str, content: bytes) -> None:
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=rf"bad\.{suffix}: .*expected .*(WAV, FLAC.*M4A, MP4|an audio stream)"):
        load_audio(path)
    assert capfd.readouterr() == ("", "")


def test_a_list_of_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg would open what it names, also addresses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.aac").write_bytes(encoded("aac"))
    (tmp_path / "list.m4a").write_text("ffconcat version 1.0\nfile secret.aac\n")
    with av.open("list.m4a") as container:
        assert container.format.name == "concat"
    with pytest.raises(AudioError, match=r"list\.m4a: cannot be decoded \(Format not recognised\): expected .*M4A"):
        load_audio("list.m4a")


def test_tags_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "clip.mka"
    path.write_bytes(encoded("mka-lossless"))
    expected = load_audio(path)
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"\xe9avf"))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    np.testing.assert_array_equal(load_audio(path), expected)


def test_a_video_without_sound(tmp_path: Path) -> None:
    path = write(tmp_path / "silent.mp4", "mp4", signal(1), video=1, audio=False)
    with pytest.raises(AudioError, match=r"silent\.mp4: expected an audio stream, found video"):
        load_audio(path)


def test_a_change_of_rate_is_refused_and_of_channels_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ADTS files joined end to end."""
    first = write(tmp_path / "a.aac", "aac", signal(44_100)).read_bytes()
    mono = write(tmp_path / "b.aac", "aac", signal(44_100, 1)).read_bytes()
    joined = tmp_path / "joined.aac"
    joined.write_bytes(first + mono)
    whole = load_audio(joined, sample_rate=44_100)
    np.testing.assert_array_equal(whole[: 43 * 1024], load_audio(tmp_path / "a.aac", sample_rate=44_100)[: 43 * 1024])
    assert len(whole) == probe_audio(joined, sample_rate=44_100) == 2 * 45 * 1024
    monkeypatch.setitem(CODECS, "slow", ("aac", "fltp", "adts", 16_000))
    slow = write(tmp_path / "c.aac", "slow", signal(16_000)).read_bytes()
    joined.write_bytes(first + slow)
    with pytest.raises(AudioError, match=r"joined\.aac: expected one sample rate, found 44100 Hz and .* 16000 Hz"):
        load_audio(joined)


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's search lists the file all the same, so that its reason is told."""
    path = tmp_path / "clip.m4a"
    path.write_bytes(encoded("m4a"))
    monkeypatch.setitem(sys.modules, "av", None)
    assert read_inputs([tmp_path])["id"].to_pylist() == ["clip.m4a"]
    with pytest.raises(AudioError, match=r"clip\.m4a: cannot be decoded .*M4A.*pip install 'gura-jax\[av\]'"):
        load_audio(path)
    soundfile.write(tmp_path / "clip.wav", signal(16_000), 16_000)
    assert load_audio(tmp_path / "clip.wav").size == 16_000
