"""Clips of a task in batches of few shapes, in an order that is a function of seed and epoch."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gura_jax.audio import MAX_SECONDS
from gura_jax.batching import bucket_lengths
from gura_jax.dataset.decode import Clip, decode_ahead, probe
from gura_jax.dataset.sources import decoded
from gura_jax.dataset.table import clip_rows, too_short
from gura_jax.errors import AudioError, InputError
from gura_jax.evaluate.task import Fold, Task, frame_targets
from gura_jax.finetune.tasks import NAMED
from gura_jax.model import Model

BATCHES_PER_BUCKET = 4  # at least, for few shapes to compile, and few batches that are not full


class Split(NamedTuple):
    """Clips of one or several splits."""

    names: tuple[str, ...]
    clips: tuple[Clip, ...]
    lengths: np.ndarray  # [n] samples at the model's rate
    labels: tuple[Sequence[Any], ...]  # as Task.clips has them


class Planned(NamedTuple):
    """A batch: its clips by index, and the length that they are padded to."""

    clips: np.ndarray
    samples: int


class Batch(NamedTuple):
    """A padded batch with what is to be predicted."""

    audio: Mapping[int, Any]  # [B, N] by rate
    lengths: Mapping[int, Any]  # [B] by rate
    targets: Any  # [B, C], or [B, T, C] of frames
    real: Any  # [B] float32: 0 for rows of silence, which no clip is in


class Data(NamedTuple):
    """A task's clips: to train with, to validate with, and to test with, if there are any."""

    train: Split
    valid: Split
    test: Split | None
    buckets: np.ndarray  # lengths to pad to, ascending


def load(task: Task, model: Model, fold: Fold, batch_size: int) -> Data:
    """Find the clips of a fold and their lengths.

    Raises:
        InputError: clips that cannot be read or are too short; training clips that all have the same labels.
    """
    table = task.table(model.sample_rate)
    where = dict(zip(table["id"].to_pylist(), (Clip(*row) for row in clip_rows(table)), strict=True))

    def split(names: Sequence[str]) -> Split:
        files = [(name, file) for name in names for file in task.clips[name]]
        clips = tuple(where[task.clip_id(name, file)] for name, file in files)
        found = probe(clips, model.sample_rate, MAX_SECONDS)
        shortest = model.shortest(frames=True, scenes=True)
        wrong = [
            f"{decoded(clip.path)}: {probed.problem or too_short(model, probed.samples, shortest)}"
            for clip, probed in zip(clips, found, strict=True)
            if probed.problem or probed.samples < shortest
        ]
        if wrong:
            raise InputError(
                f"{task.name}: expected clips that {model.system.name} can embed, found {len(wrong)} of {len(files)} "
                f"that it cannot: {'; '.join(wrong[:NAMED])}: remove them from the task"
            )
        labels = tuple(task.clips[name][file] for name, file in files)
        samples = np.array([probed.samples for probed in found], np.int64)
        return Split(tuple(file for _, file in files), clips, samples, labels)

    train, valid = split(fold.train), split([fold.valid])
    _check_classes(task, train)
    test = split([fold.test]) if fold.test in task.clips else None
    lengths = np.concatenate([part.lengths for part in (train, valid, test) if part is not None])
    return Data(train, valid, test, buckets(lengths, batch_size))


def _check_classes(task: Task, train: Split) -> None:
    """Refuse training clips with nothing to tell apart."""
    if task.embedding == "event":
        if not any(train.labels):
            raise InputError(f"{task.name}: expected events in the clips to train with, found none")
        return
    found = {tuple(sorted(labels)) for labels in train.labels}
    if len(found) < 2:
        (labels,) = found
        raise InputError(
            f"{task.name}: expected clips of two classes or more to train with, found those of one: "
            f"{', '.join(labels) or 'no label'}"
        )


def buckets(lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """Choose the lengths to pad to: those of a run, without the ones that have few batches of clips."""
    tops = bucket_lengths(lengths)
    kept: list[int] = []
    for top in tops[:-1]:
        own = int(np.sum((lengths <= top) & (lengths > (kept[-1] if kept else 0))))
        if own >= BATCHES_PER_BUCKET * batch_size:
            kept.append(int(top))
    return np.array([*kept, int(tops[-1])])


def plan(split: Split, tops: np.ndarray, batch_size: int, order: np.random.Generator | None = None) -> list[Planned]:
    """Cut clips into batches of one padded length each; the number of batches does not depend on the order.

    Args:
        split: the clips.
        tops: lengths to pad to.
        batch_size: clips in a batch; the last one of each length may have fewer.
        order: shuffles clips and batches; None: as they are.
    """
    clips = np.arange(len(split.clips)) if order is None else order.permutation(len(split.clips))
    bucket = np.searchsorted(tops, split.lengths[clips])
    batches = [
        Planned(own[start : start + batch_size], int(top))
        for i, top in enumerate(tops)
        for own in [clips[bucket == i]]
        for start in range(0, len(own), batch_size)
    ]
    return batches if order is None else [batches[i] for i in order.permutation(len(batches))]


def epoch_order(seed: int, epoch: int) -> np.random.Generator:
    """Return what shuffles an epoch: a function of both alone, so that a resumed run sees the same batches."""
    return np.random.default_rng([seed, epoch])


def read(
    task: Task, model: Model, split: Split, planned: Sequence[Planned], batch_size: int, rows: slice
) -> Iterator[Batch]:
    """Decode batches ahead of the devices.

    Args:
        task: for the targets.
        model: the system that they are for.
        split: the clips.
        planned: the batches.
        batch_size: rows of each.
        rows: which of them to give: those of this process.

    Raises:
        InputError: a clip that cannot be read.
    """
    index = {label: i for i, label in enumerate(task.labels)}
    own = [batch.clips[rows] for batch in planned]  # real clips come first
    ahead = decode_ahead([[split.clips[i] for i in clips] for clips in own], model.sample_rate, MAX_SECONDS)
    with contextlib.closing(ahead):
        for batch, clips, audio in zip(planned, own, ahead, strict=True):
            good: list[np.ndarray] = []
            for i, clip in zip(clips, audio, strict=True):
                if isinstance(clip, AudioError):
                    raise InputError(f"{task.name}: {clip}")
                if len(clip) != split.lengths[i]:
                    raise InputError(
                        f"{task.name}: {decoded(split.clips[i].path)}: expected {split.lengths[i]} samples, as its "
                        f"header says, found {len(clip)}"
                    )
                good.append(clip)
            size = len(range(*rows.indices(batch_size)))
            padded = model.pad(good, size, batch.samples)
            frames = (model.num_frames(batch.samples),) if task.embedding == "event" else ()
            targets = np.zeros((size, *frames, len(index)), np.float32)
            for row, i in enumerate(clips):
                if task.embedding == "event":
                    times = model.timestamps(int(split.lengths[i]))
                    targets[row, : len(times)] = frame_targets(split.labels[i], times, index)
                else:
                    targets[row, [index[label] for label in split.labels[i]]] = 1
            yield Batch(*padded, targets, (np.arange(size) < len(clips)).astype(np.float32))


def scene_targets(task: Task, split: Split) -> np.ndarray:
    """Mark the labels of each clip, [n, C]."""
    return np.array([[label in labels for label in task.labels] for labels in split.labels], np.float32)
