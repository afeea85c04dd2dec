"""Each clip alone against the same clip in batches: differences, missing frames, and failures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gura_jax.audio import HEAR_RATE, load_audio, probe_audio, synthetic_clip
from gura_jax.audit.cases import AGAIN, Case
from gura_jax.audit.subjects import Embedding, Mode, Subject
from gura_jax.errors import GuraError

PADDING_BOUND = 1e-5  # relative Euclidean: float32 rounding through the deepest encoder stays ten times below
SECONDS = (2.0, 3.7)  # of the synthetic clips; their batches are of up to 18.5 s


class Clip(NamedTuple):
    """A clip to audit with."""

    name: str
    audio: np.ndarray  # [samples] float32


class Result(NamedTuple):
    """A clip in a batch against the clip alone.

    Attributes:
        clip: its name.
        seconds: its length.
        mode, case: how the batch was passed, and what was in it.
        frames: relative Euclidean difference of the frames; of those that both have.
        scene: the same of the scene embedding; None where there is none without padding.
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
    scene: float | None = None
    cosine: float = np.nan
    counts: tuple[int, int] | None = None
    by_frame: np.ndarray | None = None
    problem: str | None = None

    @property
    def difference(self) -> float:
        """The larger of the two; infinite where the batch failed, or frames are missing."""
        complete = self.problem is None and self.counts is not None and self.counts[0] == self.counts[1]
        return max(self.frames, self.scene or 0.0) if complete else np.inf


def synthetic_clips(sample_rate: int) -> list[Clip]:
    """Make clips of :data:`SECONDS` with voiced, noisy and silent parts."""
    return [Clip(f"synthetic {seconds:g} s", synthetic_clip(seconds, sample_rate)) for seconds in SECONDS]


def check_files(paths: Sequence[Path]) -> None:
    """Refuse, before a model is loaded, audio files that cannot be opened.

    Raises:
        AudioError: a file is missing, or is not audio; names it.
    """
    for path in paths:
        probe_audio(path, sample_rate=HEAR_RATE)  # the model's rate is not known yet, and any will do


def read_clips(paths: Sequence[Path], sample_rate: int) -> list[Clip]:
    """Read audio files.

    Raises:
        AudioError: a file cannot be read: that is no fault of a model's.
    """
    return [Clip(str(path), load_audio(path, sample_rate=sample_rate)) for path in paths]


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
        found = _try(subject, [clip.audio], 0, first)
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
        return lines[0] if isinstance(error, GuraError) else f"{type(error).__name__}: {lines[0]}"
    frames = np.asarray(found.frames, np.float64)
    scene = None if found.scene is None else np.asarray(found.scene, np.float64)
    if frames.ndim != 2 or not len(frames):
        return f"expected frames [T, D], found {list(frames.shape)}"
    values = [frames.ravel()] + ([] if scene is None else [scene.ravel()])
    if broken := int((~np.isfinite(np.concatenate(values))).sum()):
        return f"{broken} of {sum(map(len, values))} values are NaN or infinite"
    return Embedding(frames, scene)


def _compare(result: Result, batch: Embedding, alone: Embedding) -> Result:
    scenes = None if batch.scene is None or alone.scene is None else (batch.scene, alone.scene)
    for a, b in [(batch.frames[0], alone.frames[0]), *([] if scenes is None else [scenes])]:
        if a.shape != b.shape:
            return result._replace(problem=f"sizes differ: {list(a.shape)} in the batch, {list(b.shape)} alone")
    common = min(len(batch.frames), len(alone.frames))
    a, b = alone.frames[:common], batch.frames[:common]  # [T, D]
    norms = np.linalg.norm(a, axis=1)  # [T]
    differences = np.linalg.norm(b - a, axis=1)  # [T]
    products = norms * np.linalg.norm(b, axis=1)
    # A frame of zeros has no direction: it is like another of zeros, and like no other.
    cosines = np.where(products > 0, (a * b).sum(axis=1) / np.where(products > 0, products, 1), differences == 0)
    return result._replace(
        frames=_relative(np.linalg.norm(differences), np.linalg.norm(norms)),
        scene=None if scenes is None else _relative(np.linalg.norm(scenes[0] - scenes[1]), np.linalg.norm(scenes[1])),
        cosine=float(cosines.min()),
        counts=(len(batch.frames), len(alone.frames)),
        by_frame=differences / (np.sqrt(np.mean(norms**2)) or 1.0),
    )


def _relative(difference: np.floating, norm: np.floating) -> float:
    return float(difference / norm) if norm else float(difference)
