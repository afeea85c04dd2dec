"""Audio: decode files, mix to mono, resample to any rate, and check clips that a user passes."""

import contextlib
import functools
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, overload

import numpy as np

from gura_jax.errors import AudioError

if TYPE_CHECKING:
    import soundfile

HEAR_RATE = 16_000  # Hz: HEAR's common rate, and that of every encoder in the paper
MIN_SECONDS = 0.025  # one frame of the speech encoders: the receptive field of their convolutions
PEAK_LIMIT = 8.0  # loud mixes and resampling exceed 1 a little; above 8 the audio is surely not scaled to [-1, 1]
MIN_RATE = 1_000  # Hz; slower than any voice codec: a lower rate in a header means damage
MAX_RATE = 768_000  # Hz; the fastest converters sold: a higher rate in a header means damage
MAX_SECONDS = 3600  # longer recordings are better cut
BLOCK_VALUES = 1 << 20  # decoded at once, all channels together: 4 MiB whatever a header promises

# Two frames: encoders disagree on whether an MP3's length includes its header frame.
_MP3_SLACK = 2 * 1152
_MP3_LENGTH_TAGS = (b"Xing", b"Info", b"VBRI")
_MP3_READ_AHEAD = 8192  # bytes: what may follow the last frame, the tags at a file's end
_STREAMED = 0x7FFF0000  # bytes: programs that write to a pipe put such a size in a WAV header
_ROUNDING = 0.05  # seconds: how far past a file's end a clip may be said to go, as lists of clips round
# Formats of equal samples, in which a position is found without reading up to it; and FLAC.
_RANDOM_ACCESS = {"WAV", "WAVEX", "W64", "RF64", "AIFF", "AU", "CAF"}
_PLAIN_SAMPLES = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
_UNKNOWN = np.iinfo(np.int64).max  # frames, says libsndfile of a FLAC that was written to a pipe
_NOT_RECOGNISED = 1  # libsndfile's code for a format that it does not know

# libsndfile shortens a cut file to what is there, and says so only in its log.
_LOGGED_SIZE = re.compile(r"^ *(?:data|riff|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_LOGGED_OGG_CUT = re.compile(r"Ogg ?: (?:Junk after the last page|File ended unexpectedly)")


class Recording(Protocol):
    """An open file, decoded from its start to its end. A frame is a sample of each channel."""

    @property
    def rate(self) -> int:
        """In Hz."""
        ...

    @property
    def frames(self) -> int:
        """How many the header promises, exactly; 0: it does not say."""
        ...

    @property
    def at_least(self) -> int:
        """How many a complete file has at least, by its header; 0: it does not say."""
        ...

    def skip(self, frames: int) -> int:
        """Pass over as many frames as there are, up to ``frames``; return how many that were."""
        ...

    def read(self, frames: int) -> np.ndarray:
        """Decode the next block: [n] float32, the channels' mean, n at most ``frames``; empty at the file's end."""
        ...

    def check_complete(self, *, whole: bool) -> None:
        """Refuse a file that was cut short; ``whole`` where it was read to its end, else only if that is known."""
        ...


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a local file to read it.

    Raises:
        AudioError: there is no such file.
        OSError: it cannot be read.
    """
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "no such file"
        raise AudioError(f"{path}: expected an audio file, found {found}")
    return open(path, "rb")


def load_audio(
    path: str | os.PathLike[str],
    offset: float = 0.0,
    duration: float | None = None,
    *,
    sample_rate: int = HEAR_RATE,
    max_seconds: float = MAX_SECONDS,
) -> np.ndarray:
    """Decode an audio file in any format that soundfile or PyAV reads, average its channels, and resample it.

    Resampling is soxr's HQ, and equals ``librosa.load(path, sr=sample_rate, res_type="soxr_hq", ...)``. The file is
    decoded in blocks, so memory is bounded by the clip itself, whatever the header says and however many channels
    there are.

    Args:
        path: of the file.
        offset: where the clip starts, in seconds.
        duration: of the clip in seconds; by default to the file's end.
        sample_rate: to resample to, in Hz.
        max_seconds: a longer clip is refused before it is decoded.

    Returns:
        [n] float32 at ``sample_rate``, at least :func:`min_samples` long.

    Raises:
        AudioError: no file, not audio, damaged or cut short, no samples or too few or more than ``max_seconds``, an
            impossible sample rate, NaN or infinite samples, samples far outside [-1, 1], or a file that ends before
            the clip does; names the file.
    """
    clip, *_ = load_segments(path, [(offset, duration)], sample_rate=sample_rate, max_seconds=max_seconds)
    if isinstance(clip, AudioError):
        raise clip
    return clip


def load_segments(
    path: str | os.PathLike[str],
    segments: Sequence[tuple[float, float | None]],
    *,
    sample_rate: int,
    max_seconds: float = MAX_SECONDS,
    opener: Callable[[str], BinaryIO] = open_file,
) -> list[np.ndarray | AudioError]:
    """Decode several clips of one file, each (offset, duration) as in :func:`load_audio`: the clip, or its error.

    Segments in order of time are decoded in one pass, also of formats in which only that is exact (MP3, OGG).

    Args:
        path: of the file.
        segments: (offset, duration) of each clip.
        sample_rate, max_seconds: as in :func:`load_audio`.
        opener: opens the path; what it returns can seek.

    Raises:
        AudioError: an impossible ``sample_rate``; every other error is returned in its clip's place.
    """
    check_rate(sample_rate)
    clips: list[np.ndarray | AudioError] = []
    try:
        with contextlib.ExitStack() as stack:
            recording = stack.enter_context(_opened(path, opener))
            position = 0.0  # in frames
            for offset, duration in segments:
                start, stop = _span(recording, offset, duration)
                if position > start:
                    recording = stack.enter_context(_opened(path, opener))
                    position = 0
                try:
                    skip, position = start - int(position), math.inf if stop is None else stop
                    clip = _decode(path, recording, skip, start, stop, sample_rate, max_seconds)
                    recording.check_complete(whole=stop is None)
                    clips.append(check_clip(clip, name=str(path), sample_rate=sample_rate))
                except AudioError as error:
                    position = math.inf
                    clips.append(error)
    except (soundfile_error(), OSError) as error:
        clips += [_cannot_decode(path, error)] * (len(segments) - len(clips))
    except AudioError as error:
        clips += [error] * (len(segments) - len(clips))
    return clips


def probe_audio(
    path: str | os.PathLike[str],
    offset: float = 0.0,
    duration: float | None = None,
    *,
    sample_rate: int,
    max_seconds: float = MAX_SECONDS,
    opener: Callable[[str], BinaryIO] = open_file,
) -> int:
    """Return the number of samples of a clip that :func:`load_segments` decodes.

    From the file's header where it says that exactly, else counted by decoding.

    Arguments as in :func:`load_segments`.

    Raises:
        AudioError: the file is missing, is not audio, or is too long; names the file. Or an impossible ``sample_rate``.
    """
    check_rate(sample_rate)
    try:
        with _opened(path, opener) as recording:
            start, stop = _span(recording, offset, duration)
            _check_length(path, recording, start, stop, max_seconds)
            if recording.frames:
                frames = recording.frames
            elif stop is not None and stop <= recording.at_least:
                frames = recording.at_least
            else:
                frames = _count(recording, start + max_seconds * recording.rate if stop is None else stop)
                _check_length(path, recording, start, frames if stop is None else stop, max_seconds)
            _check_within(path, recording.rate, frames, start, stop)
            return resampled_length(min(frames if stop is None else stop, frames) - start, recording.rate, sample_rate)
    except (soundfile_error(), OSError) as error:
        raise _cannot_decode(path, error) from None


@overload
def resampled_length(samples: int, source_rate: int, target_rate: int) -> int: ...
@overload
def resampled_length(samples: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray: ...
def resampled_length(samples: int | np.ndarray, source_rate: int, target_rate: int) -> int | np.ndarray:
    """Return the length of a clip after resampling: ``ceil(samples * target_rate / source_rate)``, exactly.

    Args:
        samples: an integer, or an array of integers.
        source_rate, target_rate: in Hz.

    Returns:
        An int, or an int64 array.
    """
    if isinstance(samples, np.ndarray):
        samples = samples.astype(np.int64)  # the product of a minute's samples and a rate is beyond 32 bits
    return -(-samples * target_rate // source_rate)


def samples_before(samples: int, source_rate: int, target_rate: int) -> int:
    """Return the length of the shortest clip at ``source_rate`` that :func:`resampled_length` makes this long."""
    return (samples - 1) * source_rate // target_rate + 1 if samples > 0 else 0


def resample(clip: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Resample a clip with soxr's HQ.

    Args:
        clip: [n] float32 at ``source_rate``.
        source_rate, target_rate: in Hz.

    Returns:
        [resampled_length(n, source_rate, target_rate)] float32; the clip itself if the rates are equal.

    Raises:
        AudioError: an impossible rate.
    """
    if check_rate(source_rate) == check_rate(target_rate):
        return clip
    import soxr

    out = soxr.resample(clip, source_rate, target_rate, quality="HQ")
    length = resampled_length(len(clip), source_rate, target_rate)
    return np.pad(out[:length], (0, max(0, length - len(out))))


def is_rate(value: Any) -> bool:
    """Whether a value is a rate that audio can be resampled from or to: an integer, :data:`MIN_RATE` to MAX_RATE."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and bool(MIN_RATE <= value <= MAX_RATE)


def check_rate(sample_rate: int) -> int:
    """Check a rate that audio is to be resampled from or to.

    Raises:
        AudioError: :func:`is_rate` says no.
    """
    if not is_rate(sample_rate):
        raise AudioError(
            f"sample rate: expected a whole number of Hz from {MIN_RATE} to {MAX_RATE}, found {sample_rate!r}"
        )
    return int(sample_rate)


def kilohertz(sample_rate: int) -> str:
    """Format a rate for a message, as in "22.05 kHz"."""
    return f"{sample_rate / 1000:g} kHz"


def min_samples(sample_rate: int) -> int:
    """Return the length of the shortest clip that is accepted, :data:`MIN_SECONDS`, in samples."""
    return math.ceil(MIN_SECONDS * sample_rate)


def synthetic_clip(seconds: float = 1.0, sample_rate: int = HEAR_RATE) -> np.ndarray:
    """A clip [n] with voiced, noisy and silent parts, for want of a recording."""
    t = np.arange(int(seconds * sample_rate)) / sample_rate
    noise = np.random.default_rng(0).standard_normal(len(t))
    tone = np.sin(2 * np.pi * (220 * t + 60 * t**2)) + 0.4 * np.sin(2 * np.pi * 660 * t)
    return (np.where(t < 0.9 * seconds, 0.2 * tone + 0.02 * noise, 0.0)).astype(np.float32)


def soundfile_error() -> type[Exception]:
    """Return the exception class that libsndfile's errors are raised as."""
    import soundfile

    return soundfile.LibsndfileError


def _cannot_decode(path: str | os.PathLike[str], error: Exception) -> AudioError:
    if isinstance(error, OSError):
        return AudioError(f"{path}: cannot be read: {error.strerror or error}")
    return not_decoded(path, getattr(error, "error_string", str(error)))


def not_decoded(path: str | os.PathLike[str], reason: str, more: str = "") -> AudioError:
    """Return the error of a file that is in no known format, or damaged; ``more`` goes on about formats."""
    return AudioError(
        f"{path}: cannot be decoded ({reason.strip(' .')}): expected a complete file in a format that soundfile reads "
        f"(WAV, FLAC, OGG, MP3, AIFF, ...){more}"
    )


@functools.cache
def _forward_sound_file() -> "type[soundfile.SoundFile]":
    import soundfile

    class ForwardSoundFile(soundfile.SoundFile):
        """Otherwise soundfile seeks after each block: in an MP3 that is inexact and changes samples by up to 0.25."""

        def seekable(self) -> bool:
            return False

    return ForwardSoundFile


class _SoundFile:
    """A recording that libsndfile decodes."""

    def __init__(self, path: str | os.PathLike[str], file: BinaryIO, sound: "soundfile.SoundFile") -> None:
        self._path, self._file, self._sound = path, file, sound
        self.rate: int = sound.samplerate
        self.frames: int = sound.frames if sound.frames < _UNKNOWN else 0
        self.at_least = self.frames
        self._block = max(1, BLOCK_VALUES // sound.channels)

    def skip(self, frames: int) -> int:
        if self.frames and self._seeks_exactly():
            position = self._sound.tell()
            return self._sound.seek(min(self.frames, position + frames)) - position
        skipped = 0
        while skipped < frames and (more := len(self._read(frames - skipped))):
            skipped += more
        return skipped

    def read(self, frames: int) -> np.ndarray:
        return mix(self._read(frames))

    def _read(self, frames: int) -> np.ndarray:  # [n, channels]
        return self._sound.read(min(self._block, frames), dtype="float32", always_2d=True)

    def _seeks_exactly(self) -> bool:
        plain = self._sound.format in _RANDOM_ACCESS and self._sound.subtype.startswith(_PLAIN_SAMPLES)
        return plain or self._sound.format == "FLAC"

    def check_complete(self, *, whole: bool) -> None:
        """Most formats are just read less of where they are cut."""
        path, file, sound = self._path, self._file, self._sound
        read, promised = sound.tell(), sound.frames
        log = sound.extra_info
        cut = bool(_LOGGED_OGG_CUT.search(log)) or any(
            int(there) < int(claimed) < _STREAMED for claimed, there in _LOGGED_SIZE.findall(log)
        )
        if not whole:
            pass
        elif sound.format == "MP3":
            position = file.tell()
            if _mp3_has_length(file):
                cut = read < promised - _MP3_SLACK
            elif position < file.seek(0, os.SEEK_END) - _MP3_READ_AHEAD:
                # Then the length is a guess from the first frame, and libsndfile reads no further.
                raise AudioError(
                    f"{path}: expected an MP3 whose header says its length, found one without, which soundfile reads "
                    f"only in part ({read / self.rate:.1f} s): rewrite it with ffmpeg -i IN.mp3 -c copy OUT.mp3"
                )
        elif read < promised < _UNKNOWN:
            cut = True
        if cut:
            raise cut_short(path, sound.format, read / self.rate)


def cut_short(path: str | os.PathLike[str], form: str, seconds: float) -> AudioError:
    """Return the error of a file that ends before its header says."""
    return AudioError(
        f"{path}: expected a complete file, found one cut short: its {form} data end after {seconds:.3f} s, before its "
        "header says"
    )


def mix(block: np.ndarray) -> np.ndarray:
    """Return the mean of channels: [n, channels] float32 to [n]; too large a sum becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], opener: Callable[[str], BinaryIO]) -> Iterator[Recording]:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(opener(os.fspath(path)))
        if Path(path).suffix.lower() == ".raw":  # soundfile takes it for samples without a header
            raise AudioError(f"{path}: expected a format with a header, found raw samples: convert it to WAV")
        try:
            sound = stack.enter_context(_forward_sound_file()(_descriptor(file), closefd=False))
            recording: Recording = _SoundFile(path, file, sound)
        except soundfile_error() as error:
            if getattr(error, "code", None) != _NOT_RECOGNISED:
                raise
            from gura_jax import pyav

            file.seek(0)
            recording = stack.enter_context(pyav.opened(path, file))
        if not MIN_RATE <= recording.rate <= MAX_RATE:
            raise AudioError(
                f"{path}: expected a sample rate from {MIN_RATE} to {MAX_RATE} Hz, found {recording.rate}: the header "
                "is damaged"
            )
        yield recording


def _descriptor(file: BinaryIO) -> int | BinaryIO:
    """Return a file's descriptor, by which libsndfile reads for itself; without one, it calls back for each block."""
    try:
        return file.fileno()
    except io.UnsupportedOperation:
        return file


def _span(recording: Recording, offset: float, duration: float | None) -> tuple[int, int | None]:
    """Return a clip's first frame, and the one after its last; None: to the file's end."""
    start = round(offset * recording.rate)
    return start, None if duration is None else start + round(duration * recording.rate)


def too_long(seconds: float, max_seconds: float) -> str:
    """Return the reason why a clip of so many seconds is refused."""
    return (
        f"expected at most {max_seconds:g} s, found {seconds:.1f} s: cut it into windows (--window), or allow more "
        "(--max-duration)"
    )


def _check_length(
    path: str | os.PathLike[str], recording: Recording, start: int, stop: int | None, max_seconds: float
) -> None:
    """Refuse a clip that is too long, as far as the header tells."""
    seconds = ((recording.at_least if stop is None else stop) - start) / recording.rate
    if seconds > max_seconds:
        raise AudioError(f"{path}: {too_long(seconds, max_seconds)}")


def _check_within(path: str | os.PathLike[str], rate: int, frames: int, start: int, stop: int | None) -> None:
    """Refuse a clip that is not within a file of ``frames``."""
    if not frames:
        raise AudioError(f"{path}: expected audio, found a file with no samples")
    end = frames if stop is None else stop
    if start >= frames or end > frames + _ROUNDING * rate:
        raise AudioError(
            f"{path}: expected a clip within the file's {frames / rate:.3f} s, found one from {start / rate:.3f} "
            f"to {end / rate:.3f} s"
        )


def _count(recording: Recording, limit: float) -> int:
    """Return the number of frames in a recording that was just opened; of a longer one, a number above ``limit``."""
    frames = 0
    while frames <= limit:
        frames += (skipped := recording.skip(BLOCK_VALUES))
        if skipped < BLOCK_VALUES:
            recording.check_complete(whole=True)
            break
    return frames


def _decode(
    path: str | os.PathLike[str],
    recording: Recording,
    skip: int,
    start: int,
    stop: int | None,
    sample_rate: int,
    max_seconds: float,
) -> np.ndarray:
    """Decode frames ``start`` to ``stop``, or to the end; ``skip`` is the distance from here to ``start``."""
    import soxr

    rate = recording.rate
    _check_length(path, recording, start, stop, max_seconds)
    if recording.frames:
        _check_within(path, rate, recording.frames, start, stop)
    # The stream gives the same samples as resampling the whole at once.
    stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ") if rate != sample_rate else None
    parts: list[np.ndarray] = []
    # Asked for more than the header promises, the decoder would run on past it and drop the rest.
    end = min(recording.frames or sys.maxsize, sys.maxsize if stop is None else stop)
    skipped = recording.skip(skip)
    read = 0
    while len(mono := recording.read(end - start - read)):
        if not np.isfinite(mono).all():
            bad = (start + read + int(np.argmin(np.isfinite(mono)))) / rate
            raise AudioError(f"{path}: expected finite samples, found NaN or infinity at {bad:.3f} s")
        read += len(mono)
        if read > max_seconds * rate:
            _check_length(path, recording, 0, read, max_seconds)
        parts.append(stream.resample_chunk(mono) if stream else mono)
    if skipped < skip:
        _check_within(path, rate, start - skip + skipped, start, stop)
    if not read:
        raise AudioError(f"{path}: expected audio, found a file with no samples")
    if stop is not None and start + read < stop - _ROUNDING * rate:
        raise AudioError(
            f"{path}: expected samples to {stop / rate:.3f} s, found its end at {(start + read) / rate:.3f} s: "
            "it is cut short"
        )
    if stream:
        parts.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
        # soxr may stop a sample early; librosa fills up with zeros to the exact length.
        missing = resampled_length(read, rate, sample_rate) - sum(map(len, parts))
        parts.append(np.zeros(max(0, missing), np.float32))
    return np.concatenate(parts)


def _mp3_has_length(file: BinaryIO) -> bool:
    """Whether the first frame, after an ID3v2 tag, holds the number of frames."""
    file.seek(0)
    head = file.read(10)
    if head.startswith(b"ID3"):
        file.seek(10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=False)))
    else:
        file.seek(0)
    frame = file.read(256)
    return any(tag in frame for tag in _MP3_LENGTH_TAGS)


def check_clip(clip: Any, name: str = "audio", *, sample_rate: int) -> np.ndarray:
    """Check one clip.

    Args:
        clip: [n] floating point, at least :func:`min_samples` long, in [-1, 1].
        name: what to call it in errors.
        sample_rate: of the clip, in Hz; samples do not tell it, so it cannot be checked.

    Returns:
        [n] float32.

    Raises:
        AudioError: another rank or dtype, too short, NaN or infinite samples, values beyond ``PEAK_LIMIT``, or an
            impossible ``sample_rate``.
    """
    shortest = min_samples(check_rate(sample_rate))
    array = _as_array(clip, name)
    if array.ndim != 1:
        raise AudioError(f"{name}: expected a clip of one axis, [samples], found shape {array.shape}")
    _check_dtype(array, name)
    if len(array) < shortest:
        raise AudioError(
            f"{name}: expected at least {shortest} samples at {kilohertz(sample_rate)} "
            f"({1000 * shortest / sample_rate:g} ms), found {len(array)}"
        )
    finite = np.isfinite(array)
    if not finite.all():
        raise AudioError(f"{name}: expected finite samples, found {array[~finite][0]} at sample {np.argmin(finite)}")
    peak = max(float(array.max()), -float(array.min()))
    if peak > PEAK_LIMIT:
        raise AudioError(
            f"{name}: expected samples in [-1, 1], found a peak of {peak:g}: divide by the full scale "
            "(32768 for 16-bit samples)"
        )
    return array.astype(np.float32, copy=False)


def check_audio(audio: Any, *, sample_rate: int) -> list[np.ndarray]:
    """Check a batch of clips.

    Args:
        audio: [n, samples], or a list of clips [samples] of any lengths; see :func:`check_clip`. NumPy or jax arrays.
        sample_rate: of the clips, in Hz.

    Returns:
        n clips, each [samples] float32.

    Raises:
        AudioError: another form, an empty batch, or a clip that :func:`check_clip` refuses; names the clip.
    """
    if not isinstance(audio, (list, tuple)):
        audio = _as_array(audio, "audio")
        if audio.ndim != 2:
            hint = ": pass audio[None] for a batch of one clip" if audio.ndim == 1 else ""
            raise AudioError(
                f"audio: expected an array [n, samples] or a list of 1-D clips, found shape {audio.shape}{hint}"
            )
    if len(audio) == 0:
        raise AudioError("audio: expected at least one clip, found none")
    return [check_clip(clip, f"audio[{i}]", sample_rate=sample_rate) for i, clip in enumerate(audio)]


def _as_array(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # a traced jax array; unequal lists; a torch tensor with a gradient
        raise AudioError(f"{name}: expected an array of samples, found {type(values).__name__}") from None


def _check_dtype(array: np.ndarray, name: str) -> None:
    if np.issubdtype(array.dtype, np.floating):
        return
    hint = ""
    if np.issubdtype(array.dtype, np.integer):
        hint = f": divide by the full scale, {-np.iinfo(array.dtype).min or np.iinfo(array.dtype).max}"
    raise AudioError(f"{name}: expected float32 samples in [-1, 1], found {array.dtype}{hint}")
