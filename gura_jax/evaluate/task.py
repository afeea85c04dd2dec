"""A task of a benchmark: labelled clips in splits, and what is to be predicted and measured."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from gura_jax.evaluate.events import Events

if TYPE_CHECKING:
    import pyarrow as pa

END_SLACK = 0.0001  # ms: a frame at the very end of an event belongs to it


class Event(NamedTuple):
    """A labelled event; times in milliseconds."""

    label: str
    start: float
    end: float


class Fold(NamedTuple):
    """Splits to train on, to validate with, and to test with."""

    train: tuple[str, ...]
    valid: str
    test: str


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A task of a benchmark; a benchmark's own class says where the audio is.

    Attributes:
        folder: the folder of the task.
        name: name of the folder, unique among the tasks that are evaluated together.
        task_name: name by which the benchmark's protocols know the task.
        embedding: ``scene`` for one embedding a clip, ``event`` for frames.
        prediction: one label a clip (``multiclass``) or any number (``multilabel``).
        splits: names of the splits.
        folds: one, or several for cross-validation.
        labels: names of the classes, by index.
        metrics: names in :data:`gura_jax.evaluate.metrics.METRICS`, the primary one first.
        score_stopping: whether the primary metric stops training and chooses among probes; else the validation loss.
        postprocessing: for events, the values to try of each parameter.
        grid: values of the protocol's parameters that the task prescribes.
        clips: labels by split and file, in the order in which files are trained on: of a scene task a list of strings,
            of an event task a list of :class:`Event`.
    """

    folder: Path
    name: str
    task_name: str
    embedding: Literal["scene", "event"]
    prediction: Literal["multiclass", "multilabel"]
    splits: tuple[str, ...]
    folds: tuple[Fold, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    score_stopping: bool
    postprocessing: Mapping[str, Sequence[float]]
    grid: Mapping[str, Sequence[Any]]
    clips: Mapping[str, Mapping[str, Sequence[Any]]]

    @abc.abstractmethod
    def table(self, sample_rate: int) -> "pa.Table":
        """List the clips as inputs of a run, of the audio that suits a model of this rate best.

        The columns are those of :func:`gura_jax.dataset.sources.read_inputs`, with :meth:`clip_id` as ``id``. Labels
        are not among them, so that embeddings stay valid when labels change.
        """

    @abc.abstractmethod
    def clip_id(self, split: str, file: str) -> str:
        """Return the id of a clip in :meth:`table`."""

    @abc.abstractmethod
    def audio_folder(self, split: str, sample_rate: int) -> Path:
        """Return the folder of a split's files at exactly this rate.

        Raises:
            InputError: the task has no audio at this rate.
        """


def labelled_events(labels: Sequence[Event], index: Mapping[str, int]) -> Events:
    """One file's labels as events found in it would be.

    Args:
        labels: of the file, in any order.
        index: number of each label.
    """
    ordered = sorted(labels, key=lambda event: event.start)
    return Events(
        np.array([index[event.label] for event in ordered], np.int64),
        np.array([event.start for event in ordered], np.float64),
        np.array([event.end for event in ordered], np.float64),
    )


def frame_targets(events: Sequence[Event], times: np.ndarray, index: Mapping[str, int]) -> np.ndarray:
    """Mark the frames that carry each label, [T, C]: from an event's start to its end, both included.

    Args:
        events: events of one file.
        times: [T], milliseconds.
        index: number of each label.
    """
    targets = np.zeros((len(times), len(index)), np.float32)
    for event in events:
        targets[(event.start <= times) & (times < event.end + END_SLACK), index[event.label]] = 1
    return targets
