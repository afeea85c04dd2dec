"""HEAR's metrics, by scikit-learn, SciPy and sed_eval."""

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


class Metric(NamedTuple):
    """A metric.

    Attributes:
        compute: (probabilities [n, C], targets [n, C]) -> score; for events (estimated, reference, number of labels)
            -> scores by name, the one that counts first.
        maximize: whether more is better.
        events: whether it compares events.
        quick: for events, the score that counts alone, without sed_eval's containers.
    """

    compute: Callable[..., Any]
    maximize: bool = True
    events: bool = False
    quick: Callable[..., float] | None = None


def check_installed() -> None:
    """See that what the metrics need is there: better now than after the embedding.

    Raises:
        SystemConfigError: it is not.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemConfigError(
            f"expected {', '.join(NEEDED)} to be installed, found no {', '.join(missing)}: "
            "pip install 'gura-jax[evaluate]'"
        )


def top1_accuracy(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """How often the likeliest class is the (first) true one."""
    return float(np.mean(probabilities.argmax(1) == targets.argmax(1)))


def chroma_accuracy(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """The same up to octaves: indices of classes modulo 12."""
    return float(np.mean(probabilities.argmax(1) % CHROMAS == targets.argmax(1) % CHROMAS))


def mean_average_precision(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Average precision, the mean over classes; a class without examples counts 0, as scikit-learn has it."""
    from sklearn.metrics import average_precision_score

    with _undefined():
        return _finite(probabilities, lambda: average_precision_score(targets, probabilities, average="macro"))


def area_under_roc(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Area under the ROC curve, the mean over classes; NaN where a class has no examples, or no others."""
    return float(np.mean(_areas(probabilities, targets)))


def d_prime(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Sensitivity index, sqrt 2 times the normal's inverse CDF of the area under ROC; the mean over classes.

    Infinite where a class is told apart without a fault.
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
    """A class without examples is no surprise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive class found")
        yield


class Collars(NamedTuple):
    """When an estimated event is a true one: times in seconds, the offset's tolerance also a part of the length."""

    t_collar: float
    evaluate_offset: bool = False
    percentage_of_length: float = 0.5


EventFiles = Mapping[str, Events]
EVENT_SCORES = ("f_measure", "precision", "recall")


def event_based(
    collars: Collars, estimated: EventFiles, reference: EventFiles, labels: int, *, empty: bool = False
) -> dict[str, float]:
    """sed_eval's event-based F-measure, precision and recall over all files and classes.

    Args:
        collars: when an event counts.
        estimated: events by file; these files are compared.
        reference: true events by file.
        labels: number of labels.
        empty: where nothing was found precision and F-measure are 0, not NaN.
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
    """sed_eval's segment-based error rate, over segments of so many seconds."""
    del empty  # an error rate is defined all the same
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
    """The F-measure of :func:`event_based`, without its loops in Python over all pairs of events.

    A true event and an estimated one of its label are matched at most once, as many as can be: SciPy's bipartite
    matching in place of sed_eval's own. For validation, where sed_eval would take longer than the training.
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
    "mAP": Metric(mean_average_precision),
    "aucroc": Metric(area_under_roc),
    "d_prime": Metric(d_prime),
    "event_onset_200ms_fms": _event_based(Collars(0.2)),
    "event_onset_50ms_fms": _event_based(Collars(0.05)),
    "event_onset_offset_50ms_20perc_fms": _event_based(Collars(0.05, True, 0.2)),
    "segment_1s_er": _segment_based(1.0),
}


def scores(
    names: Sequence[str], probabilities: np.ndarray, targets: np.ndarray, *, present: bool = False
) -> dict[str, float]:
    """Scores of scenes by name; ``present``: over the classes alone that some clips have and some have not."""
    if present and any(name not in ("top1_acc", "pitch_acc", "chroma_acc") for name in names):
        both = (targets.min(0) == 0) & (targets.max(0) == 1)
    else:
        both = np.ones(targets.shape[1], bool)
    out = {}
    for name in names:
        by_class = name in ("mAP", "aucroc", "d_prime")
        chosen = (probabilities[:, both], targets[:, both]) if by_class else (probabilities, targets)
        out[name] = METRICS[name].compute(*chosen) if chosen[0].shape[1] else float("nan")
    return out
