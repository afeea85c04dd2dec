"""Clips from files, in threads: their lengths before the plan, their samples ahead of the devices."""

import collections
import functools
import os
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np

from gura_jax.audio import load_segments, probe_audio
from gura_jax.dataset.sources import decoded, open_clip
from gura_jax.errors import AudioError

PROBE_THREADS = 16  # they wait for disks and networks, and compute little
PROBED_TOGETHER = 256  # by a thread: a million clips need not be a million tasks
BATCHES_AHEAD = 2  # decoded before the devices ask for them: memory does not grow with the queue


class Clip(NamedTuple):
    """Where a clip is: see :func:`gura_jax.dataset.sources.read_inputs`."""

    path: str
    offset: float
    duration: float | None
    version: str | None = None  # that its file must have


class Probed(NamedTuple):
    """The length of a clip in samples; or 0, and the reason why it has none. And the version of its file."""

    samples: int
    problem: str | None
    version: str | None


def decode_threads() -> int:
    """Return the number of threads, each with a file at a time: as many as there are cores, up to 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def probe(clips: Sequence[Clip], sample_rate: int, max_seconds: float) -> list[Probed]:
    """Return the length of each clip in samples at ``sample_rate``."""

    def some(start: int) -> list[Probed]:
        return [one(clip) for clip in clips[start : start + PROBED_TOGETHER]]

    def one(clip: Clip) -> Probed:
        version: str | None = None

        def opener(path: str) -> BinaryIO:
            nonlocal version
            file = open_clip(path, version)
            version = getattr(file, "version", None)
            return file

        try:
            samples = probe_audio(
                decoded(clip.path),
                clip.offset,
                clip.duration,
                sample_rate=sample_rate,
                max_seconds=max_seconds,
                opener=opener,
            )
        except AudioError as error:
            return Probed(0, reason(error, clip.path), version)
        return Probed(samples, None, version)

    with ThreadPoolExecutor(PROBE_THREADS) as threads:
        return [length for part in threads.map(some, range(0, len(clips), PROBED_TOGETHER)) for length in part]


def reason(error: AudioError, path: str) -> str:
    """Return an error's message without the path that it starts with."""
    return str(error).removeprefix(f"{decoded(path)}: ")


def decode_ahead(
    batches: Iterable[Sequence[Clip]], sample_rate: int, max_seconds: float
) -> Generator[list[np.ndarray | AudioError], None, None]:
    """Decode batches of clips, :data:`BATCHES_AHEAD` of the one that is asked for."""
    batches = iter(batches)
    waiting: collections.deque[_Decoding] = collections.deque()
    with ThreadPoolExecutor(decode_threads(), thread_name_prefix="decode") as threads:
        try:
            while True:
                while len(waiting) <= BATCHES_AHEAD and (clips := next(batches, None)) is not None:
                    waiting.append(_Decoding(clips, threads, sample_rate, max_seconds))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


class _Decoding:
    """A batch that is being decoded: clips of one file in one pass, in order of time."""

    def __init__(
        self, clips: Sequence[Clip], threads: ThreadPoolExecutor, sample_rate: int, max_seconds: float
    ) -> None:
        files: dict[str, list[int]] = {}
        for i, clip in enumerate(clips):
            files.setdefault(clip.path, []).append(i)
        self.size = len(clips)
        self.files: list[tuple[list[int], Future[list[np.ndarray | AudioError]]]] = []
        for path, rows in files.items():
            rows.sort(key=lambda i: clips[i].offset)
            segments = [(clips[i].offset, clips[i].duration) for i in rows]
            future = threads.submit(
                load_segments,
                decoded(path),
                segments,
                sample_rate=sample_rate,
                max_seconds=max_seconds,
                opener=functools.partial(open_clip, version=clips[rows[0]].version),
            )
            self.files.append((rows, future))

    def result(self) -> list[np.ndarray | AudioError]:
        """Wait for the clips, in the batch's order."""
        out: list[np.ndarray | AudioError] = [np.zeros(0, np.float32)] * self.size
        for rows, future in self.files:
            for row, clip in zip(rows, future.result(), strict=True):
                out[row] = clip
        return out
