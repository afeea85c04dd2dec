"""Each clip alone against the same clip in batches: differences, missing frames, and failures."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gura_jax.audio import load_audio, synthetic_clip
from gura_jax.audit.cases import AGAIN, Case
from gura_jax.audit.subjects import Embedding, Mode, Subject
from gura_jax.errors import AudioError

PADDING_BOUND = 1e-5  # relative Euclidean: float32 rounding through the deepest encoder stays ten times below
SECONDS = (2.0, 3.7, 10.0)  # of the synthetic clips; 3.7 s is on no grid of frames


class Clip(NamedTuple):
    """A clip to audit with, or why there is none."""

    name: str
    audio: np.ndarray  # [samples] float32
    problem: str | None = None


class Result(NamedTuple):
    """A clip in a batch against the clip alone.

    Attributes:
        clip: its name.
        seconds: its length.
        mode, case: how the batch was passed, and what was in it.
        frames: relative Euclidean difference of the frames; of those that both have.
        scene: the same of the scene embedding.
        cosine: the least similarity of a frame to the same frame alone.
        counts: numbers of frames in the batch and alone.
        by_frame: [T] difference of each frame, relative to the root mean square norm of the frames alone.
        problem: why there is no difference.
    """

    clip: str
    seconds: float
    mode: Mode
    case: Case
    frames: float = np.inf
    scene: float = np.inf
    cosine: float = np.nan
    counts: tuple[int, int] | None = None
    by_frame: np.ndarray | None = None
    problem: str | None = None

    @property
    def difference(self) -> float:
        """The larger of the two; infinite where the batch failed, or frames are missing."""
        complete = self.problem is None and self.counts is not None and self.counts[0] == self.counts[1]
        return max(self.frames, self.scene) if complete else np.inf


def synthetic_clips(sample_rate: int) -> list[Clip]:
    """Make clips of :data:`SECONDS` with voiced, noisy and silent parts."""
    return [Clip(f"synthetic {seconds:g} s", synthetic_clip(seconds, sample_rate)) for seconds in SECONDS]


def read_clips(paths: Sequence[object], sample_rate: int) -> list[Clip]:
    """Read audio files; what cannot be read becomes a failing case."""
    clips = []
    for path in map(str, paths):
        try:
            clips.append(Clip(path, load_audio(path, sample_rate=sample_rate)))
        except AudioError as error:
            clips.append(Clip(path, np.zeros(0, np.float32), str(error)))
    return clips


def audit(subject: Subject, clips: Sequence[Clip]) -> Iterator[list[Result]]:
    """Embed each clip alone, and in every batch of every mode.

    An exception of the model's is the result of its batch, and the others go on.

    Args:
        subject: from :func:`gura_jax.audit.subjects.open_subject`.
        clips: at its sample rate.

    Yields:
        The results of a mode and case, one a clip, as they are computed. Clips that the model does not take even alone
        are in the first, and not in the others.
    """
    alone: list[tuple[Clip, Embedding]] = []
    failed: list[Result] = []
    first = subject.modes[0]
    for clip in clips:
        found = clip.problem or _try(subject, [clip.audio], 0, first)
        if isinstance(found, str):
            failed.append(_result(subject, clip, first, AGAIN)._replace(problem=found))
        else:
            alone.append((clip, found))
    for mode in subject.modes:
        for case in mode.cases:
            results, failed = failed, []
            for clip, reference in alone:
                found = _try(subject, case.batch(clip.audio, subject.shortest), case.row, mode)
                result = _result(subject, clip, mode, case)
                results.append(
                    result._replace(problem=found) if isinstance(found, str) else _compare(result, found, reference)
                )
            if results:
                yield results


def _result(subject: Subject, clip: Clip, mode: Mode, case: Case) -> Result:
    return Result(clip.name, len(clip.audio) / subject.sample_rate, mode, case)


def _try(subject: Subject, clips: Sequence[np.ndarray], row: int, mode: Mode) -> Embedding | str:
    """Embed a batch, or say why that failed."""
    try:
        found = subject.embed(clips, row, mode)
    except Exception as error:  # whatever the model's own code raises
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    found = Embedding(*(np.asarray(x, np.float64) for x in found))
    if found.frames.ndim != 2 or found.scene.ndim != 1 or not len(found.frames):
        return f"expected frames [T, D] and a scene [S], found {list(found.frames.shape)}, {list(found.scene.shape)}"
    if broken := sum(int((~np.isfinite(x)).sum()) for x in found):
        return f"{broken} of {found.frames.size + found.scene.size} values are NaN or infinite"
    return found


def _compare(result: Result, batch: Embedding, alone: Embedding) -> Result:
    if batch.frames.shape[1] != alone.frames.shape[1] or batch.scene.shape != alone.scene.shape:
        shapes = [f"[{len(x.scene)}] and [T, {x.frames.shape[1]}]" for x in (batch, alone)]
        return result._replace(problem=f"sizes differ: {shapes[0]} in the batch, {shapes[1]} alone")
    common = min(len(batch.frames), len(alone.frames))
    a, b = alone.frames[:common], batch.frames[:common]  # [T, D]
    norms = np.linalg.norm(a, axis=1)  # [T]
    differences = np.linalg.norm(b - a, axis=1)  # [T]
    products = norms * np.linalg.norm(b, axis=1)
    # A frame of zeros has no direction: it is like another of zeros, and like no other.
    cosines = np.where(products > 0, (a * b).sum(axis=1) / np.where(products > 0, products, 1), differences == 0)
    return result._replace(
        frames=_relative(np.linalg.norm(differences), np.linalg.norm(norms)),
        scene=_relative(np.linalg.norm(batch.scene - alone.scene), np.linalg.norm(alone.scene)),
        cosine=float(cosines.min()),
        counts=(len(batch.frames), len(alone.frames)),
        by_frame=differences / (np.sqrt(np.mean(norms**2)) or 1.0),
    )


def _relative(difference: np.floating, norm: np.floating) -> float:
    return float(difference / norm) if norm else float(difference)
