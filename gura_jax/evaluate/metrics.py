"""Metrics of predictions, by scikit-learn, SciPy and sed_eval."""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gura_jax.errors import SystemConfigError
from gura_jax.evaluate.events import Events

SQRT2 = 2**0.5
NEEDED = ("scipy", "sed_eval", "sklearn")
CHROMAS = 12
PERCENT = 100.0


class Metric(NamedTuple):
    """A metric.

    Attributes:
        compute: (probabilities [n, C], targets [n, C]) -> score; for events (estimated, reference, number of labels)
            -> scores by name, the decisive one first.
        maximize: whether higher is better.
        events: whether it compares events.
        quick: for events, only the decisive score, computed without sed_eval's containers.
        by_class: whether it is a mean over classes.
        scale: factor of scores in tables.
        decimals: of scores in tables.
    """

    compute: Callable[..., Any]
    maximize: bool = True
    events: bool = False
    quick: Callable[..., float] | None = None
    by_class: bool = False
    scale: float = PERCENT
    decimals: int = 1


def check_installed() -> None:
    """Check that the packages that the metrics need are installed, before anything is embedded.

    Raises:
        SystemConfigError: one is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemConfigError(
            f"expected {', '.join(NEEDED)} to be installed, found no {', '.join(missing)}: "
            "pip install 'gura-jax[evaluate]'"
        )


def top1_accuracy(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Share of rows whose most probable class is the (first) true one."""
    return float(np.mean(probabilities.argmax(1) == targets.argmax(1)))


def chroma_accuracy(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy up to octaves: class indices modulo 12."""
    return float(np.mean(probabilities.argmax(1) % CHROMAS == targets.argmax(1) % CHROMAS))


def mean_average_precision(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Average precision, mean over classes; a class without examples counts as 0, as in scikit-learn."""
    from sklearn.metrics import average_precision_score

    with _undefined():
        return _finite(probabilities, lambda: average_precision_score(targets, probabilities, average="macro"))


def area_under_roc(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Area under the ROC curve, mean over classes; NaN if a class has no examples, or nothing else."""
    return float(np.mean(_areas(probabilities, targets)))


def d_prime(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Sensitivity index, mean over classes: sqrt 2 times the normal inverse CDF of the area under the ROC curve.

    Infinite if a class is separated perfectly.
    """
    from scipy.stats import norm

    return float(np.mean(SQRT2 * norm.ppf(_areas(probabilities, targets))))


def _areas(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    from sklearn.metrics import roc_auc_score

    both = (targets.min(0) == 0) & (targets.max(0) == 1)
    if not both.all() or not np.isfinite(probabilities).all():
        return np.full(targets.shape[1], np.nan)
    return np.atleast_1d(roc_auc_score(targets, probabilities, average=None))  # pyright: ignore[reportArgumentType]


def _finite(probabilities: np.ndarray, compute: Callable[[], float]) -> float:
    return float(compute()) if np.isfinite(probabilities).all() else float("nan")


@contextlib.contextmanager
def _undefined() -> Iterator[None]:
    """Silence scikit-learn's warning of classes without examples."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive class found")
        yield


def confusion(probabilities: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count clips by true class and, of each, by most probable class; classes that were never predicted are left out.

    Args:
        probabilities: [n, C].
        targets: [n, C], 0 or 1; a clip's true class is its first, as for :func:`top1_accuracy`.
        labels: names of the classes.
    """
    rows, columns = targets.argmax(1), probabilities.argmax(1)
    found = {}
    for i, label in enumerate(labels):
        predicted, counts = np.unique(columns[rows == i], return_counts=True)
        found[label] = {labels[j]: int(count) for j, count in zip(predicted, counts, strict=True)}
    return found


class ClassScore(NamedTuple):
    """Result for one class of a multilabel task.

    Attributes:
        clips: that have this label.
        average_precision: None if no clip or every clip has it, or probabilities are not finite.
    """

    clips: int
    average_precision: float | None


def by_class(probabilities: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> dict[str, ClassScore]:
    """Compute the average precision of each class by its name; arguments as in :func:`confusion`."""
    from sklearn.metrics import average_precision_score

    finite = bool(np.isfinite(probabilities).all())
    found = {}
    for i, label in enumerate(labels):
        own = targets[:, i]
        defined = finite and own.min() == 0 and own.max() == 1
        value = float(average_precision_score(own, probabilities[:, i])) if defined else None
        found[label] = ClassScore(int(own.sum()), value)
    return found


class Collars(NamedTuple):
    """Tolerances for matching an estimated event: ``t_collar`` in seconds; for offsets also a share of the length."""

    t_collar: float
    evaluate_offset: bool = False
    percentage_of_length: float = 0.5


EventFiles = Mapping[str, Events]
EVENT_SCORES = ("f_measure", "precision", "recall")


def event_based(
    collars: Collars, estimated: EventFiles, reference: EventFiles, labels: int, *, empty: bool = False
) -> dict[str, float]:
    """Compute sed_eval's event-based F-measure, precision and recall over all files and classes.

    Args:
        collars: tolerances.
        estimated: events by file; these files are compared.
        reference: true events by file.
        labels: number of labels.
        empty: if nothing was found, precision and F-measure are 0 instead of NaN.
    """
    sound_event = _sed_eval()
    handling: dict[str, Any] = {"empty_system_output_handling": "zero_score"} if empty else {}
    scores = sound_event.EventBasedMetrics(
        event_label_list=[str(i) for i in range(labels)],
        evaluate_onset=True,
        evaluate_offset=collars.evaluate_offset,
        t_collar=collars.t_collar,
        percentage_of_length=collars.percentage_of_length,
        **handling,
    )
    _evaluate(scores, estimated, reference)
    overall = scores.results_overall_metrics()["f_measure"]
    return {name: float(overall[name]) for name in EVENT_SCORES}


def segment_based(
    resolution: float, estimated: EventFiles, reference: EventFiles, labels: int, *, empty: bool = False
) -> dict[str, float]:
    """Compute sed_eval's segment-based error rate; ``resolution`` is the length of a segment in seconds."""
    del empty  # an error rate is defined without estimated events
    scores = _sed_eval().SegmentBasedMetrics(
        event_label_list=[str(i) for i in range(labels)], time_resolution=resolution
    )
    _evaluate(scores, estimated, reference)
    return {"error_rate": float(scores.results_overall_metrics()["error_rate"]["error_rate"])}


def _sed_eval() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dcase_util's, about pkg_resources and its own source
        from sed_eval import sound_event
    return sound_event


def _evaluate(scores: Any, estimated: EventFiles, reference: EventFiles) -> None:
    for name, events in estimated.items():
        scores.evaluate(reference_event_list=_listed(reference[name]), estimated_event_list=_listed(events))


def _listed(events: Events) -> list[dict[str, Any]]:
    columns = (events.label.tolist(), (events.start / 1000).tolist(), (events.end / 1000).tolist())
    return [
        {"event_label": str(label), "event_onset": start, "event_offset": end}
        for label, start, end in zip(*columns, strict=True)
    ]


def quick_f_measure(
    collars: Collars, estimated: EventFiles, reference: EventFiles, labels: int, *, empty: bool = False
) -> float:
    """Compute the F-measure of :func:`event_based` without Python loops over all pairs of events.

    SciPy's maximum bipartite matching takes the place of sed_eval's own. Used for validation, where sed_eval would take
    longer than training.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    del labels
    true_positives = references = estimates = 0
    for name, found in estimated.items():
        truth = reference[name]
        references, estimates = references + len(truth.label), estimates + len(found.label)
        if not len(truth.label) or not len(found.label):
            continue
        start, end = truth.start[:, None] / 1000, truth.end[:, None] / 1000
        hits = truth.label[:, None] == found.label[None, :]
        hits &= np.abs(start - found.start[None, :] / 1000) <= collars.t_collar
        if collars.evaluate_offset:
            slack = np.maximum(collars.t_collar, collars.percentage_of_length * (end - start))
            hits &= np.abs(end - found.end[None, :] / 1000) <= slack
        true_positives += int((maximum_bipartite_matching(csr_array(hits)) >= 0).sum())
    if not references or not estimates:
        return 0.0 if empty and references else float("nan")
    precision, recall = true_positives / estimates, true_positives / references
    return 2 * precision * recall / (precision + recall) if true_positives else 0.0


def _event_based(collars: Collars) -> Metric:
    def compute(*arguments: Any, **options: Any) -> dict[str, float]:
        return event_based(collars, *arguments, **options)

    def quick(*arguments: Any, **options: Any) -> float:
        return quick_f_measure(collars, *arguments, **options)

    return Metric(compute, events=True, quick=quick)


def _segment_based(resolution: float) -> Metric:
    def compute(*arguments: Any, **options: Any) -> dict[str, float]:
        return segment_based(resolution, *arguments, **options)

    return Metric(compute, maximize=False, events=True, quick=lambda *a, **o: compute(*a, **o)["error_rate"])


METRICS: Mapping[str, Metric] = {
    "top1_acc": Metric(top1_accuracy),
    "pitch_acc": Metric(top1_accuracy),
    "chroma_acc": Metric(chroma_accuracy),
    "mAP": Metric(mean_average_precision, by_class=True),
    "aucroc": Metric(area_under_roc, by_class=True),
    "d_prime": Metric(d_prime, by_class=True, scale=1.0, decimals=3),
    "event_onset_200ms_fms": _event_based(Collars(0.2)),
    "event_onset_50ms_fms": _event_based(Collars(0.05)),
    "event_onset_offset_50ms_20perc_fms": _event_based(Collars(0.05, True, 0.2)),
    "segment_1s_er": _segment_based(1.0),
}


def scores(
    names: Sequence[str], probabilities: np.ndarray, targets: np.ndarray, *, present: bool = False
) -> dict[str, float]:
    """Compute metrics of scenes.

    Args:
        names: names in :data:`METRICS`.
        probabilities: [n, C].
        targets: [n, C], 0 or 1.
        present: average over the classes that have both examples and other clips.
    """
    both = (targets.min(0) == 0) & (targets.max(0) == 1) if present else np.ones(targets.shape[1], bool)
    out = {}
    for name in names:
        metric = METRICS[name]
        chosen = (probabilities[:, both], targets[:, both]) if metric.by_class else (probabilities, targets)
        out[name] = metric.compute(*chosen) if chosen[0].shape[1] else float("nan")
    return out
