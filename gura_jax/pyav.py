"""Formats that libsndfile does not know (M4A, MP4, AAC, WebM, MKA, WMA), decoded by FFmpeg through PyAV, an extra."""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from gura_jax import audio
from gura_jax.audio import cut_short, mix, not_decoded
from gura_jax.errors import AudioError

if TYPE_CHECKING:
    import av
    from av.audio.resampler import AudioResampler
    from av.audio.stream import AudioStream
    from av.container import InputContainer

SUFFIXES = frozenset({".m4a", ".m4b", ".mp4", ".aac", ".webm", ".mka", ".wma"})
"""Of the files that a search lists; which decoder reads a file is decided by what is in it."""

# By FFmpeg's names. No others are opened: by a playlist, FFmpeg would open what files and addresses that names.
_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2": "MP4", "matroska,webm": "Matroska", "aac": "AAC", "asf": "WMA"}
_UNKNOWN = "Format not recognised"
_KNOWN = ", or M4A, MP4, AAC, WebM, MKA or WMA"
_SLACK = 0.25  # seconds: headers count up to a frame of padding that is dropped (128 ms: AAC at 8 kHz), and round
# Where a frame has as many planes or more, no null ends their pointers: PyAV 18 takes what follows for more of them.
_PLANES = 8


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], file: BinaryIO) -> Iterator["AvRecording"]:
    """Open the first audio stream of a file.

    Args:
        path: what errors call the file.
        file: at its start; it can seek.

    Raises:
        AudioError: PyAV is not installed, the format is unknown, the file is damaged or has no audio.
        OSError: the file cannot be read.
    """
    try:
        import av
        import av.error
    except ImportError:
        more = f"{_KNOWN} with PyAV: pip install 'gura-jax[av]'"
        raise not_decoded(path, _UNKNOWN, more) from None
    reader = _Reader(file)
    with contextlib.ExitStack() as stack:
        options = {"format_whitelist": ",".join(_CONTAINERS)}
        try:
            container = stack.enter_context(
                av.open(reader, "r", container_options=options, metadata_errors="backslashreplace")
            )
        except (av.error.FFmpegError, ValueError) as error:
            reader.check()
            other = getattr(error, "errno", None) == errno.EINVAL  # not on the list
            raise not_decoded(path, _UNKNOWN if other else _reason(error), _KNOWN) from None
        yield AvRecording(path, reader, container)


class _Reader:
    """A file as FFmpeg reads it. An error is kept, and is the file's end to FFmpeg, which would not pass it on."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: Exception | None = None

    def read(self, size: int) -> bytes:
        if self._error is None:
            try:
                return self._file.read(size)
            except Exception as error:
                self._error = error
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):  # before the start: FFmpeg tries that to find the size of an empty file
            return -1

    def tell(self) -> int:
        return self._file.tell()

    def check(self) -> None:
        """Raise the error that was kept."""
        if self._error is not None:
            raise self._error


class AvRecording:
    """A recording that FFmpeg decodes: see :class:`gura_jax.audio.Recording`.

    Samples are those of FFmpeg's decoder, which keeps the padding at the end of AAC (up to 1023 samples). Headers leave
    that out in M4A and MP4, round to milliseconds or estimate in the others: so none says how many frames there are.
    """

    frames = 0

    def __init__(self, path: str | os.PathLike[str], reader: _Reader, container: "InputContainer") -> None:
        self._path, self._reader = path, reader
        self._form = _CONTAINERS[container.format.name]
        stream = next(iter(container.streams.audio), None)
        if stream is None:
            kinds = ", ".join(sorted({each.type for each in container.streams}))
            raise AudioError(f"{path}: expected an audio stream, found {kinds or 'none'}")
        if stream.codec_context is None:
            raise AudioError(f"{path}: expected a codec that FFmpeg decodes, found another: convert the file to FLAC")
        with contextlib.suppress(ImportError):  # PyAV 17 and older: then video is read, too, and passed over
            from av.stream import Discard

            for each in container.streams:
                if each is not stream:
                    each.discard = Discard.all
        stream.codec_context.thread_count = 1  # the pool that decodes has a thread a file
        self._end = _start(stream)  # seconds, of what was decoded
        self._decoded = self._decode(container, stream)
        self._rest = np.zeros(0, np.float32)  # decoded, and not yet read
        self._interleave: dict[tuple[str, bool, int], AudioResampler] = {}
        self._peeked = first = next(self._decoded, None)
        if first is None:
            raise AudioError(f"{path}: expected audio, found a file with no samples")
        self._block = max(1, audio.BLOCK_VALUES // first.layout.nb_channels)
        # As decoded: the header may have the rate without spectral band replication, which is half.
        self.rate: int = first.sample_rate
        self._promised_end = _promised_end(container, stream)
        promised = 0.0 if self._promised_end is None else self._promised_end - _start(stream) - _SLACK
        self.at_least = max(0, int(promised * self.rate))

    def skip(self, frames: int) -> int:
        skipped = min(frames, len(self._rest))
        self._rest = self._rest[skipped:]
        while skipped < frames and (frame := self._next()) is not None:
            if frame.samples <= frames - skipped:
                skipped += frame.samples
            else:
                self._rest = self._mono([frame])[frames - skipped :]
                skipped = frames
        return skipped

    def read(self, frames: int) -> np.ndarray:
        wanted = min(frames, self._block)
        alike: list[av.AudioFrame] = []  # decoded at once; a change of channels starts a new block
        have = len(self._rest)
        while have < wanted and (frame := self._next()) is not None:
            if alike and _kind(frame) != _kind(alike[0]):
                self._peeked = frame
                break
            alike.append(frame)
            have += frame.samples
        block = np.concatenate([self._rest, self._mono(alike)]) if alike else self._rest
        self._rest = block[wanted:]
        return block[:wanted]

    def check_complete(self, *, whole: bool) -> None:
        """See what the header promises; nothing does in AAC, WMA, or WebM and MP4 that were streamed."""
        if whole and self._promised_end is not None and self._end < self._promised_end - _SLACK:
            raise cut_short(self._path, self._form, self._end)

    def _next(self) -> "av.AudioFrame | None":
        frame, self._peeked = self._peeked or next(self._decoded, None), None
        if frame is not None:
            self._end = (self._end if frame.time is None else frame.time) + frame.samples / self.rate
        return frame

    def _decode(self, container: "InputContainer", stream: "AudioStream") -> Iterator["av.AudioFrame"]:
        import av.error

        rate = 0
        try:
            for packet in container.demux(stream):
                self._reader.check()
                if packet.is_corrupt:
                    raise cut_short(self._path, self._form, self._end)
                for frame in packet.decode():
                    rate = rate or frame.sample_rate
                    if frame.sample_rate != rate:
                        raise AudioError(
                            f"{self._path}: expected one sample rate, found {rate} Hz and from {self._end:.3f} s "
                            f"{frame.sample_rate} Hz: convert the file to FLAC"
                        )
                    yield frame
        except av.error.FFmpegError as error:
            self._reader.check()
            raise AudioError(
                f"{self._path}: expected a complete file, found one that is damaged or cut short: its {self._form} "
                f"data cannot be decoded from {self._end:.3f} s ({_reason(error)})"
            ) from None

    def _mono(self, frames: "Sequence[av.AudioFrame]") -> np.ndarray:  # frames of one kind, to [n]
        _, planar, channels = kind = _kind(frames[0])
        if planar and channels >= _PLANES:
            from av.audio.resampler import AudioResampler

            interleave = self._interleave.setdefault(kind, AudioResampler(frames[0].format.packed))
            frames, planar = [each for frame in frames for each in interleave.resample(frame)], False
        try:
            array = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
        except ValueError as error:
            raise AudioError(f"{self._path}: expected samples of a known type, found: {error}") from None
        # [channels, n] or [1, n * channels] to [n, channels]
        return mix(_as_floats(array.T if planar else array.reshape(-1, channels)))


def _kind(frame: "av.AudioFrame") -> tuple[str, bool, int]:
    return frame.format.name, frame.format.is_planar, frame.layout.nb_channels


def _as_floats(block: np.ndarray) -> np.ndarray:
    """Return samples as float32, integers divided by their full scale."""
    if np.issubdtype(block.dtype, np.floating):
        return block.astype(np.float32, copy=False)
    if block.dtype == np.uint8:
        return (block.astype(np.float32) - 128) / 128
    return block.astype(np.float32) / -float(np.iinfo(block.dtype).min)


def _start(stream: "AudioStream") -> float:
    """Return when a stream starts, in seconds."""
    return float((stream.start_time or 0) * (stream.time_base or 0))


def _promised_end(container: "InputContainer", stream: "AudioStream") -> float | None:
    """Return when the header says that a stream ends, in seconds; None: it does not, or FFmpeg estimates it."""
    form = _CONTAINERS[container.format.name]
    if form == "MP4" and stream.duration:
        return _start(stream) + float(stream.duration * (stream.time_base or 0))
    if form == "Matroska":
        # The track's own: DURATION, or DURATION-eng.
        if tag := next((text for name, text in stream.metadata.items() if name.startswith("DURATION")), ""):
            with contextlib.suppress(ValueError):  # HH:MM:SS.NNNNNNNNN
                hours, minutes, seconds = tag.split(":")
                return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        # The file's, which may be that of another stream. Where there is none, FFmpeg estimates one for each stream.
        if len(container.streams) == 1 and container.duration and stream.duration is None:
            return container.duration / 1_000_000
    return None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
