"""Scores of predictions by the task's metrics, and the best validation so far."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gura_jax.evaluate import metrics
from gura_jax.evaluate.events import Events, Parameters, find_events, parameter_grid
from gura_jax.evaluate.metrics import METRICS
from gura_jax.evaluate.task import Task, labelled_events
from gura_jax.finetune.data import Split, scene_targets
from gura_jax.model import Model


class Validation(NamedTuple):
    """Scores of a validation: the loss, the score that decides, and for events the parameters that it is best with."""

    loss: float
    score: float
    postprocessing: Parameters = ()


class Best(NamedTuple):
    """The best validation so far; ``epoch`` is -1 before the first."""

    score: float = float("nan")
    epoch: int = -1
    postprocessing: Parameters = ()

    def is_beaten_by(self, score: float, maximize: bool) -> bool:
        """Whether a later score is better; the first is, NaN is the worst."""
        if self.epoch < 0:
            return True
        sign = 1 if maximize else -1
        worst = -np.inf
        return np.nan_to_num(sign * score, nan=worst) > np.nan_to_num(sign * self.score, nan=worst)


def chosen_by(task: Task) -> str:
    """Return the name of the score that decides: the task's first metric, or the loss if the task says so."""
    return task.metrics[0] if task.score_stopping else "loss"


def maximizes(task: Task) -> bool:
    """Whether the score that decides is better when higher; the loss is not."""
    return METRICS[task.metrics[0]].maximize if task.score_stopping else False


def validate(task: Task, model: Model, split: Split, probabilities: Sequence[np.ndarray], loss: float) -> Validation:
    """Score a validation: see :func:`chosen_by`.

    Args:
        task: names the metrics.
        model: for the times of frames.
        split: the clips.
        probabilities: of each clip [C], or [T, C].
        loss: mean.
    """
    if task.embedding == "scene":
        name = task.metrics[0]
        found = metrics.scores([name], np.stack(probabilities), scene_targets(task, split), present=True)
        return Validation(loss, found[name] if task.score_stopping else loss)
    if not task.score_stopping:
        return Validation(loss, loss, parameter_grid(task.postprocessing)[0])
    metric = METRICS[task.metrics[0]]
    assert metric.quick is not None  # as all of events
    sign = 1 if metric.maximize else -1
    scored = []
    for parameters in parameter_grid(task.postprocessing):
        estimated, reference = _events(task, model, split, probabilities, parameters)
        score = metric.quick(estimated, reference, len(task.labels), empty=True)
        scored.append((np.nan_to_num(sign * score, nan=-np.inf), parameters, score))
    _, parameters, score = max(scored)
    return Validation(loss, score, parameters)


def test(
    task: Task, model: Model, split: Split, probabilities: Sequence[np.ndarray], postprocessing: Parameters
) -> dict[str, float]:
    """Score a test by all metrics of the task; arguments as of :func:`validate`."""
    if task.embedding == "scene":
        return metrics.scores(task.metrics, np.stack(probabilities), scene_targets(task, split), present=True)
    estimated, reference = _events(task, model, split, probabilities, postprocessing)
    return {
        name: next(iter(METRICS[name].compute(estimated, reference, len(task.labels), empty=True).values()))
        for name in task.metrics
    }


def _events(
    task: Task, model: Model, split: Split, probabilities: Sequence[np.ndarray], parameters: Parameters
) -> tuple[Mapping[str, Events], Mapping[str, Events]]:
    """Find the events of each clip; returns estimated and true ones by clip."""
    estimated, reference = {}, {}
    index = {label: i for i, label in enumerate(task.labels)}
    for i, (found, labels) in enumerate(zip(probabilities, split.labels, strict=True)):
        times = model.timestamps(int(split.lengths[i]))
        estimated[str(i)] = find_events(found, times, **dict(parameters))
        reference[str(i)] = labelled_events(labels, index)
    return estimated, reference
