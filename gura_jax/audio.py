"""Audio: decode, mix to mono, resample to 16 kHz, and check what a user hands in."""

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from gura_jax.errors import AudioError

if TYPE_CHECKING:
    import soundfile

SAMPLE_RATE = 16_000  # Hz: what every member was trained on
MIN_SAMPLES = 400  # the receptive field of the speech encoders' convolutions: one frame
PEAK_LIMIT = 8.0  # loud mixes and resampling exceed 1 a little; above 8 the audio is surely not scaled to [-1, 1]
MIN_FILE_RATE = 1_000  # Hz; below the slowest voice codecs: a damaged header
MAX_FILE_RATE = 768_000  # Hz; the fastest converters sold: above it a damaged header
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

# libsndfile shortens a cut file to what is there, and says so only in its log.
_LOGGED_SIZE = re.compile(r"^ *(?:data|riff|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_LOGGED_OGG_CUT = re.compile(r"Ogg ?: (?:Junk after the last page|File ended unexpectedly)")


def load_audio(
    path: str | os.PathLike[str],
    offset: float = 0.0,
    duration: float | None = None,
    *,
    max_seconds: float = MAX_SECONDS,
) -> np.ndarray:
    """Decode an audio file in any format that soundfile reads, mean over channels, at 16 kHz.

    Resampling is soxr's HQ, and equals ``librosa.load(path, sr=16000, res_type="soxr_hq", ...)``. The file is decoded
    in blocks, so memory is bounded by the clip itself, whatever the header says and however many channels there are.

    Args:
        path: of the file.
        offset: where the clip starts, in seconds.
        duration: of the clip in seconds; by default to the file's end.
        max_seconds: a longer clip is refused before it is decoded.

    Returns:
        [n] float32 at 16 kHz, n >= 400.

    Raises:
        AudioError: no file, not audio, damaged or cut short, no samples or too few or more than ``max_seconds``, an
            impossible sample rate, NaN or infinite samples, samples far outside [-1, 1], or a file that ends before
            the clip does; names the file.
    """
    clip, *_ = load_segments(path, [(offset, duration)], max_seconds=max_seconds)
    if isinstance(clip, AudioError):
        raise clip
    return clip


def load_segments(
    path: str | os.PathLike[str],
    segments: Sequence[tuple[float, float | None]],
    *,
    max_seconds: float = MAX_SECONDS,
) -> list[np.ndarray | AudioError]:
    """Several clips of one file, each (offset, duration) as in :func:`load_audio`: the clip, or why there is none.

    Segments in order of time are decoded in one pass, also of formats in which only that is exact (MP3, OGG).
    """
    clips: list[np.ndarray | AudioError] = []
    try:
        with contextlib.ExitStack() as stack:
            file, sound = stack.enter_context(_opened(path))
            position = 0.0  # in frames
            for offset, duration in segments:
                start = round(offset * sound.samplerate)
                stop = None if duration is None else start + round(duration * sound.samplerate)
                if position > start:
                    file, sound = stack.enter_context(_opened(path))
                    position = 0
                try:
                    skip, position = start - int(position), math.inf if stop is None else stop
                    clip = _decode(path, sound, skip, start, stop, max_seconds)
                    _check_complete(path, file, sound, whole=stop is None)
                    clips.append(check_clip(clip, name=str(path)))
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
    max_seconds: float = MAX_SECONDS,
) -> int:
    """The number of samples that :func:`load_audio` will give, from the file's header alone where that has it.

    Raises:
        AudioError: the file is missing, is not audio, or is too long; names the file.
    """
    try:
        with _opened(path) as (_, sound):
            rate, frames = sound.samplerate, sound.frames
            if frames >= _UNKNOWN:  # a FLAC from a pipe: counted by decoding
                return len(load_audio(path, offset, duration, max_seconds=max_seconds))
            start = round(offset * rate)
            stop = frames if duration is None else start + round(duration * rate)
            _check_span(path, rate, frames, start, stop, max_seconds)
            return math.ceil((min(stop, frames) - start) * SAMPLE_RATE / rate)
    except (soundfile_error(), OSError) as error:
        raise _cannot_decode(path, error) from None


def soundfile_error() -> type[Exception]:
    """What libsndfile raises."""
    import soundfile

    return soundfile.LibsndfileError


def _cannot_decode(path: str | os.PathLike[str], error: Exception) -> AudioError:
    if isinstance(error, OSError):
        return AudioError(f"{path}: cannot be read: {error.strerror or error}")
    return AudioError(
        f"{path}: cannot be decoded ({getattr(error, 'error_string', str(error)).strip(' .')}): expected a complete "
        "file in a format that soundfile reads (WAV, FLAC, OGG, MP3, AIFF, ...)"
    )


@functools.cache
def _forward_sound_file() -> "type[soundfile.SoundFile]":
    import soundfile

    class ForwardSoundFile(soundfile.SoundFile):
        """Otherwise soundfile seeks after each block: in an MP3 that is inexact and changes samples by up to 0.25."""

        def seekable(self) -> bool:
            return False

    return ForwardSoundFile


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, "soundfile.SoundFile"]]:
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "no such file"
        raise AudioError(f"{path}: expected an audio file, found {found}")
    if Path(path).suffix.lower() == ".raw":  # soundfile takes it for samples without a header
        raise AudioError(f"{path}: expected a format with a header, found raw samples: convert it to WAV")
    # By descriptor, libsndfile reads for itself; of a Python file it would call back for every block.
    with open(path, "rb") as file, _forward_sound_file()(file.fileno(), closefd=False) as sound:
        if not MIN_FILE_RATE <= sound.samplerate <= MAX_FILE_RATE:
            raise AudioError(
                f"{path}: expected a sample rate from {MIN_FILE_RATE} to {MAX_FILE_RATE} Hz, found "
                f"{sound.samplerate}: the header is damaged"
            )
        yield file, sound


def _seeks_exactly(sound: "soundfile.SoundFile") -> bool:
    return sound.format == "FLAC" or (sound.format in _RANDOM_ACCESS and sound.subtype.startswith(_PLAIN_SAMPLES))


def _check_span(
    path: str | os.PathLike[str], rate: int, frames: int, start: int, stop: int | None, max_seconds: float
) -> None:
    """Refuse a clip that is too long, or not in the file; ``frames`` is as the header promises, or 0."""
    end = frames if stop is None else stop
    if end - start > max_seconds * rate:
        raise AudioError(
            f"{path}: expected at most {max_seconds:g} s, found {(end - start) / rate:.1f} s: cut it into windows "
            "(--window), or allow more (--max-duration)"
        )
    if frames and (start >= frames or end > frames + _ROUNDING * rate):
        raise AudioError(
            f"{path}: expected a clip within the file's {frames / rate:.3f} s, found one from {start / rate:.3f} "
            f"to {end / rate:.3f} s"
        )


def _decode(
    path: str | os.PathLike[str],
    sound: "soundfile.SoundFile",
    skip: int,
    start: int,
    stop: int | None,
    max_seconds: float,
) -> np.ndarray:
    """Frames start to stop, or to the end; ``skip`` is how far from here the start is."""
    import soxr

    rate = sound.samplerate
    promised = sound.frames if sound.frames < _UNKNOWN else 0
    _check_span(path, rate, promised, start, stop, max_seconds)
    # The stream gives the same samples as resampling the whole at once.
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ") if rate != SAMPLE_RATE else None
    parts: list[np.ndarray] = []
    block_frames = BLOCK_VALUES // sound.channels
    # Asked for more than the header promises, the decoder would run on past it and drop the rest.
    end = sound.frames if stop is None else min(stop, sound.frames)
    if skip and _seeks_exactly(sound):
        sound.seek(start)
    else:
        while skip and (skipped := len(sound.read(min(block_frames, skip), dtype="float32", always_2d=True))):
            skip -= skipped
    read = 0
    while len(block := sound.read(min(block_frames, end - start - read), dtype="float32", always_2d=True)):
        with np.errstate(over="ignore", invalid="ignore"):  # reported below
            mono = block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]
        if not np.isfinite(mono).all():
            bad = (start + read + int(np.argmin(np.isfinite(mono)))) / rate
            raise AudioError(f"{path}: expected finite samples, found NaN or infinity at {bad:.3f} s")
        read += len(block)
        if read > max_seconds * rate:
            _check_span(path, rate, 0, 0, read, max_seconds)
        parts.append(stream.resample_chunk(mono) if stream else mono)
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
        parts.append(np.zeros(max(0, math.ceil(read * SAMPLE_RATE / rate) - sum(map(len, parts))), np.float32))
    return np.concatenate(parts)


def _check_complete(path: str | os.PathLike[str], file: BinaryIO, sound: "soundfile.SoundFile", *, whole: bool) -> None:
    """Refuse a file cut short; where ``whole``, it was read to its end: for most formats soundfile just reads less."""
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
        elif position < os.fstat(file.fileno()).st_size - _MP3_READ_AHEAD:
            # Then the length is a guess from the first frame, and libsndfile reads no further.
            raise AudioError(
                f"{path}: expected an MP3 whose header says its length, found one without, which soundfile reads only "
                f"in part ({read / sound.samplerate:.1f} s): rewrite it with ffmpeg -i IN.mp3 -c copy OUT.mp3"
            )
    elif read < promised < _UNKNOWN:
        cut = True
    if cut:
        raise AudioError(
            f"{path}: expected a complete file, found one cut short: "
            f"its {sound.format} data end after {read / sound.samplerate:.3f} s, before its header says"
        )


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


def check_clip(clip: Any, name: str = "audio") -> np.ndarray:
    """Check one clip.

    Args:
        clip: [n] floating point, n >= 400, in [-1, 1], at 16 kHz (the rate cannot be checked: samples do not say).
        name: what to call it in errors.

    Returns:
        [n] float32.

    Raises:
        AudioError: another rank or dtype, too short, NaN or infinite samples, or values beyond ``PEAK_LIMIT``.
    """
    array = _as_array(clip, name)
    if array.ndim != 1:
        raise AudioError(f"{name}: expected a clip of one axis, [samples], found shape {array.shape}")
    _check_dtype(array, name)
    if len(array) < MIN_SAMPLES:
        raise AudioError(
            f"{name}: expected at least {MIN_SAMPLES} samples at 16 kHz ({1000 * MIN_SAMPLES / SAMPLE_RATE:g} ms), "
            f"found {len(array)}"
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


def check_audio(audio: Any) -> list[np.ndarray]:
    """Check a batch of clips.

    Args:
        audio: [n, samples], or a list of clips [samples] of any lengths; see :func:`check_clip`. NumPy or jax arrays.

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
    return [check_clip(clip, f"audio[{i}]") for i, clip in enumerate(audio)]


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
