"""gura_jax/evaluate/metrics.py and events.py: compared with the libraries, and by hand."""

import warnings

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from gura_jax.errors import SystemConfigError
from gura_jax.evaluate import metrics
from gura_jax.evaluate.events import Events, find_events, parameter_grid
from gura_jax.evaluate.metrics import METRICS

RANDOM = np.random.default_rng(0)
PROBABILITIES = RANDOM.random((40, 14)).astype(np.float32)
TARGETS = np.vstack([np.eye(14), np.eye(14), np.eye(14)[:12]]).astype(np.float32)


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.check_installed()
    monkeypatch.setattr(metrics, "NEEDED", ("scipy", "no_such_package"))
    with pytest.raises(SystemConfigError, match=r"found no no_such_package: pip install 'gura-jax\[evaluate\]'"):
        metrics.check_installed()


def test_accuracies() -> None:
    probabilities = np.zeros((4, 14), np.float32)
    probabilities[[0, 1, 2, 3], [1, 13, 2, 0]] = 1
    targets = np.zeros((4, 14), np.float32)
    targets[[0, 1, 2, 3], [1, 1, 3, 12]] = 1
    found = metrics.scores(["top1_acc", "pitch_acc", "chroma_acc"], probabilities, targets)
    assert found == {"top1_acc": 0.25, "pitch_acc": 0.25, "chroma_acc": 0.75}


def test_scores_of_classes_are_scikit_learns() -> None:
    found = metrics.scores(["mAP", "aucroc", "d_prime"], PROBABILITIES, TARGETS)
    areas = roc_auc_score(TARGETS, PROBABILITIES, average=None)  # pyright: ignore[reportArgumentType]
    assert found["mAP"] == pytest.approx(average_precision_score(TARGETS, PROBABILITIES, average="macro"))
    assert found["aucroc"] == pytest.approx(np.mean(areas))
    assert found["d_prime"] == pytest.approx(np.mean(norm.ppf(areas)) * 2**0.5)


def test_a_class_without_examples() -> None:
    targets = TARGETS.copy()
    targets[:, 3] = 0
    names = ["mAP", "aucroc", "d_prime"]
    as_the_kit = metrics.scores(names, PROBABILITIES, targets)
    assert np.isnan([as_the_kit["aucroc"], as_the_kit["d_prime"]]).all()
    left_out = metrics.scores(names, PROBABILITIES, targets, present=True)
    others = [i for i in range(14) if i != 3]
    assert left_out == metrics.scores(names, PROBABILITIES[:, others], targets[:, others])
    assert as_the_kit["mAP"] == pytest.approx(left_out["mAP"] * 13 / 14)


def test_predictions_that_are_not_numbers() -> None:
    found = metrics.scores(["mAP", "aucroc", "d_prime"], np.full_like(PROBABILITIES, np.nan), TARGETS)
    assert np.isnan(list(found.values())).all()


def test_two_classes_and_perfection() -> None:
    targets = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    found = metrics.scores(["mAP", "aucroc", "d_prime"], targets, targets)
    assert found == {"mAP": 1.0, "aucroc": 1.0, "d_prime": np.inf}


def some_events(seed: int, count: int) -> Events:
    random = np.random.default_rng(seed)
    start = np.sort(random.uniform(0, 4000, count))
    return Events(random.integers(3, size=count), start, start + random.uniform(20, 900, count))


@pytest.mark.parametrize(
    "name", ["event_onset_200ms_fms", "event_onset_50ms_fms", "event_onset_offset_50ms_20perc_fms"]
)
def test_event_scores_are_sed_evals(name: str) -> None:
    """On dense events, where matches compete: by sed_eval itself, and by the quick function."""
    metric = METRICS[name]
    assert metric.quick is not None
    for seed in range(8):
        reference = {f"{i}.wav": some_events(seed + i, 30) for i in range(3)}
        jitter = np.random.default_rng(seed).normal(0, 30, 30)
        estimated = {file: Events(e.label, e.start + jitter, e.end + 2 * jitter) for file, e in reference.items()} | {
            "2.wav": some_events(seed + 50, 25)
        }
        found = metric.compute(estimated, reference, 3)
        assert list(found) == ["f_measure", "precision", "recall"]
        assert 0 < found["f_measure"] < 1
        assert metric.quick(estimated, reference, 3) == pytest.approx(found["f_measure"], abs=1e-12)


def test_event_scores_by_hand() -> None:
    reference = {"a.wav": Events(np.array([0, 1]), np.array([1000.0, 2000.0]), np.array([1500.0, 2500.0]))}
    estimated = {"a.wav": Events(np.array([0, 0, 1]), np.array([1040.0, 3000.0, 2150.0]), np.full(3, 4000.0))}
    found = METRICS["event_onset_200ms_fms"].compute(estimated, reference, 2)
    assert found == pytest.approx({"f_measure": 0.8, "precision": 2 / 3, "recall": 1.0})
    assert METRICS["event_onset_50ms_fms"].compute(estimated, reference, 2)["recall"] == 0.5
    assert METRICS["event_onset_offset_50ms_20perc_fms"].compute(estimated, reference, 2)["recall"] == 0
    error = METRICS["segment_1s_er"]
    assert error.compute(reference, reference, 2) == {"error_rate": 0.0}
    assert not error.maximize
    # Seconds 1 and 2 are right but for an insertion of label 0 in 2; 3 has two insertions.
    assert error.compute(estimated, reference, 2) == {"error_rate": pytest.approx(3 / 2)}


def test_nothing_found() -> None:
    reference, none = {"a.wav": some_events(0, 3)}, {"a.wav": some_events(0, 0)}
    metric = METRICS["event_onset_200ms_fms"]
    assert metric.quick is not None
    assert np.isnan(metric.compute(none, reference, 3)["f_measure"])
    assert np.isnan(metric.quick(none, reference, 3))
    assert metric.compute(none, reference, 3, empty=True)["f_measure"] == 0
    assert metric.quick(none, reference, 3, empty=True) == 0
    assert np.isnan(metric.quick(none, none, 3, empty=True))


def test_runs_of_frames_are_events() -> None:
    times = 25 + 50.0 * np.arange(12)
    active = np.zeros((12, 2), np.float32)
    active[2:6, 0] = 0.9
    active[8:9, 0] = 0.9  # lasts 0 ms
    active[0:12, 1] = 0.51
    active[5, 1] = 0.5  # not over the threshold
    found = find_events(active, times, median_filter_ms=0, min_duration=150)
    np.testing.assert_array_equal(found.label, [1, 0, 1])
    np.testing.assert_array_equal(found.start, [25, 125, 325])
    np.testing.assert_array_equal(found.end, [225, 275, 575])  # the last active frame's time
    smoothed = find_events(active, times, median_filter_ms=150, min_duration=0)
    np.testing.assert_array_equal(smoothed.end - smoothed.start, [550, 150])  # the gap and the lone frame are gone


def test_a_width_is_rounded_to_frames() -> None:
    values = np.array([[1, 0, 1, 1, 0, 0, 1]], np.float32).T
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_events(values, np.arange(7) * 1000.0, median_filter_ms=400, min_duration=0).label) == 3
        assert len(find_events(values[:1], np.array([25.0]), median_filter_ms=250, min_duration=0).label) == 1


def test_the_grid_of_postprocessing() -> None:
    grid = parameter_grid({"min_duration": [125, 250], "median_filter_ms": [250]})
    assert grid == [
        (("median_filter_ms", 250), ("min_duration", 125)),
        (("median_filter_ms", 250), ("min_duration", 250)),
    ]
