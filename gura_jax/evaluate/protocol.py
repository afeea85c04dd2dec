"""From a task and its embeddings to scores: probes are trained, the best is chosen and tested."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.backend import platform_of
from gura_jax.errors import InputError
from gura_jax.evaluate import metrics, probes
from gura_jax.evaluate.events import Events, Parameters, find_events, parameter_grid
from gura_jax.evaluate.metrics import METRICS, ClassScore
from gura_jax.evaluate.probes import Mixer, Point, Probes, Rows
from gura_jax.evaluate.task import Fold, Task, frame_targets, labelled_events


class Protocol(NamedTuple):
    """How probes are trained and chosen. The options are off in HEAR's kit, and each mends one of its bugs.

    Attributes:
        name: name of the protocol.
        shuffle: visit the training rows in a new order each epoch. (The kit means to, and never does.)
        go_on_after_nan: treat a validation score of NaN as the worst, and an infinite one as a number. (In the kit,
            either ends training.)
        drop_single: drop a last batch of one row. (The kit fails: BatchNorm has no variance.)
        follow_metric: choose the postprocessing of events with the best primary score. (The kit chooses the largest
            score, even if lower is better.)
        zero_without_events: if no event is found, precision and F-measure are 0. (In the kit they are NaN, so one
            validation without events ends training.)
        present_classes: average mAP, aucroc and d_prime over the classes that a split has both examples and other clips
            of. (In the kit, other classes make aucroc and d_prime NaN, and count as 0 in mAP.)
        points: the points to train for a task, in order. Raises InputError if the task prescribes impossible ones.
    """

    name: str
    shuffle: bool
    go_on_after_nan: bool
    drop_single: bool
    follow_metric: bool
    zero_without_events: bool
    present_classes: bool
    points: Callable[[Task], list[Point]]

    @property
    def options(self) -> tuple[str | bool, ...]:
        """The name and all options, as plain values."""
        return tuple(value for value in self if isinstance(value, (str, bool)))


Lookup = Callable[[str, str], tuple[np.ndarray, np.ndarray | None]]
"""(split, file) -> a scene [D] and None, or frames [T, D] and their times [T] in milliseconds."""


class FoldScores(NamedTuple):
    """Scores of one fold.

    Attributes:
        test: scores by name: ``test_score`` (the primary metric), ``test_loss``, ``test_<metric>``, and for events
            ``test_<metric>_f_measure`` and so on.
        validation_score: the best validation score.
        epoch: its epoch, from 0.
        seconds: training time; the point's share if several points were trained together.
        postprocessing: parameters chosen for events.
        confusion: of a multiclass scene task, tested clips by true and predicted class.
        classes: of a multilabel scene task, results by class.
    """

    test: Mapping[str, float]
    validation_score: float
    epoch: int
    seconds: float
    postprocessing: Parameters
    confusion: Mapping[str, Mapping[str, int]] | None = None
    classes: Mapping[str, ClassScore] | None = None


class TaskScores(NamedTuple):
    """Scores of a task.

    Attributes:
        folds: scores by tested split.
        point: the chosen point.
        maximize: whether points were chosen by the highest validation score, or by the lowest.
        state_weights: learned weights of the tokens on the first fold, group after group; empty if none are learned.
    """

    folds: Mapping[str, FoldScores]
    point: Point
    maximize: bool
    state_weights: tuple[float, ...]


class _File(NamedTuple):
    """A file, whose frames are the rows ``start`` to ``stop``, ordered by time."""

    name: str
    start: int
    stop: int
    times: np.ndarray  # [T], milliseconds
    events: Events


class _Data(NamedTuple):
    """A task's embeddings on the device; the rows of a split are contiguous."""

    rows: Rows
    targets: np.ndarray  # [N, C]
    spans: Mapping[str, tuple[int, int]]  # first and last row + 1 of each split
    files: Mapping[str, Sequence[_File]]  # of each split of an event task


def evaluate_task(
    task: Task, lookup: Lookup, protocol: Protocol, seed: int = 0, *, mixer: Mixer | None = None
) -> TaskScores:
    """Train probes on a task's embeddings, choose the best on validation, and test it.

    All points are trained on the first fold; the best one is trained again on each other fold.

    Args:
        task: the task.
        lookup: finds the embeddings.
        protocol: how to train and choose.
        seed: of initial weights, dropout and shuffles.
        mixer: of the tokens that each embedding consists of, which is learned; None for plain embeddings.

    Raises:
        InputError: embeddings that are not finite or differ in size, or too few rows to train on.
    """
    points = protocol.points(task)
    data = _load(task, lookup)
    keys = jax.random.split(jax.random.key(seed), (len(task.folds), len(points)))
    orders = np.random.default_rng(seed)
    first = _Training(task, data, task.folds[0], protocol, orders, mixer)
    groups: dict[Any, list[int]] = {}
    for i, point in enumerate(points):
        groups.setdefault(point._replace(lr=0, dropout=0, initialization="xavier_uniform"), []).append(i)
    fitted: dict[int, _Fitted] = {}
    for indices in groups.values():
        width = _points_at_once(len(indices))
        for start in range(0, len(indices), width):
            chosen = indices[start : start + width]
            fits = first.fit([points[i] for i in chosen], keys[0, np.asarray(chosen)])
            fitted |= dict(zip(chosen, fits, strict=True))
    sign = 1 if first.maximize else -1
    best = max(range(len(points)), key=lambda i: (sign * fitted[i].score, -i))  # of equal scores, the first
    folds = {task.folds[0].test: first.test(fitted[best])}
    for number, fold in enumerate(task.folds[1:], 1):
        training = _Training(task, data, fold, protocol, orders, mixer)
        (fit,) = training.fit([points[best]], keys[number, :1])
        folds[fold.test] = training.test(fit)
    logits = probes.group_logits(fitted[best].probe.params)
    weights = tuple(float(weight) for group in logits for weight in jax.nn.softmax(group[0]))
    return TaskScores(folds, points[best], first.maximize, weights)


def _points_at_once(points: int) -> int:
    """Return how many points to train together: all; but one a device if the devices share a processor.

    That processor is busy with one point, and alone a point can stop early.
    """
    devices = jax.local_devices()
    return min(points, len(devices)) if platform_of(devices).share_batch else points


def _load(task: Task, lookup: Lookup) -> _Data:
    """Gather the embeddings of all clips, in the task's order, and put them on the device."""
    index = {label: i for i, label in enumerate(task.labels)}
    values: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    spans: dict[str, tuple[int, int]] = {}
    files: dict[str, list[_File]] = {}
    total = 0
    for split in task.splits:
        begin, files[split] = total, []
        for name, labels in task.clips[split].items():
            embedding, times = lookup(split, name)
            found = embedding if task.embedding == "event" else embedding[None]
            if found.ndim != 2 or (values and found.shape[1] != values[0].shape[1]):
                raise InputError(
                    f"{task.name}/{split}/{name}: expected an embedding of one size, found {embedding.shape}"
                )
            if not np.isfinite(found).all():
                raise InputError(f"{task.name}/{split}/{name}: expected an embedding of finite numbers, found others")
            if task.embedding == "event":
                assert times is not None
                ascending = np.argsort(times, kind="stable")
                found, times = found[ascending], times[ascending]
                events = labelled_events(labels, index)
                files[split].append(_File(name, total, total + len(found), times, events))
                targets.append(frame_targets(labels, times, index))
            else:
                target = np.zeros((1, len(index)), np.float32)
                target[0, [index[label] for label in labels]] = 1
                targets.append(target)
            values.append(found)
            total += len(found)
        spans[split] = (begin, total)
        if begin == total:
            raise InputError(f"{task.name}/{split}: expected embeddings, found none")
    x = np.zeros((probes.padded(total), values[0].shape[1]), np.float32)
    np.concatenate(values, out=x[:total])
    y = np.zeros((len(x), len(index)), np.float32)
    np.concatenate(targets, out=y[:total])
    return _Data(Rows(jnp.asarray(x), jnp.asarray(y)), y[:total], spans, files)


class _Fitted(NamedTuple):
    """A point's probe, as it was at its best validation."""

    score: float
    epoch: int
    postprocessing: Parameters
    seconds: float
    probe: Probes  # of one point


class _Best:
    """A point's best validation so far, and whether it still trains: early stopping as in HEAR's kit."""

    def __init__(self, patience: int, maximize: bool, protocol: Protocol) -> None:
        self.patience, self.maximize, self.protocol = patience, maximize, protocol
        self.worst = -np.inf if maximize else np.inf
        self.score, self.epoch, self.waited, self.running = self.worst, -1, 0, True
        self.postprocessing: Parameters = ()

    def update(self, score: float, epoch: int, postprocessing: Parameters = ()) -> bool:
        """Record a validation; returns whether it is the best so far."""
        if not self.running:
            return False
        seen = np.float32(score)  # the kit compares in single precision too
        value = self.worst if np.isnan(seen) else float(seen)
        better = self.epoch < 0 or (value > self.score if self.maximize else value < self.score)
        if better:
            self.score, self.epoch, self.waited, self.postprocessing = value, epoch, 0, postprocessing
        else:
            self.waited += 1
        if self.waited >= self.patience or not (self.protocol.go_on_after_nan or np.isfinite(seen)):
            self.running = False
        return better


class _Training:
    """Training and testing on one fold of a task."""

    def __init__(
        self, task: Task, data: _Data, fold: Fold, protocol: Protocol, orders: np.random.Generator, mixer: Mixer | None
    ) -> None:
        self.mixer = mixer
        self.task, self.data, self.fold, self.protocol, self.orders = task, data, fold, protocol, orders
        self.train_rows = np.concatenate([np.arange(*data.spans[split]) for split in fold.train])
        self.maximize = METRICS[task.metrics[0]].maximize if task.score_stopping else False
        self.grid = parameter_grid(task.postprocessing) if task.embedding == "event" else [()]

    def fit(self, points: Sequence[Point], keys: jax.Array) -> list[_Fitted]:
        """Train points of one shape together, and keep each one's best validation."""
        point, data = points[0], self.data
        began = time.perf_counter()
        count = self._rows_of_an_epoch(point.batch_size)
        rows, classes = data.rows, len(self.task.labels)
        state, rates = probes.begin(keys, points, rows.x.shape[1], classes, self.mixer)
        rows, valid = probes.place((rows, self._chosen(self.fold.valid)), state)
        sizes = probes.batching(count, point.batch_size)
        bests = [_Best(p.patience, self.maximize, self.protocol) for p in points]
        kept = jax.tree.map(jnp.copy, state.probes)
        every = point.check_val_every_n_epoch
        plan = None
        for number in range(point.max_epochs // every):
            if plan is None or self.protocol.shuffle:
                plan = probes.place(probes.epochs(self._orders(every, count), point.batch_size), state)
            state = probes.train(state, rates, rows, plan, sizes=sizes, prediction=self.task.prediction)
            probabilities, losses = probes.predict(state.probes, rows, valid, self.task.prediction)
            better = []
            for best, predicted, loss in zip(bests, probabilities, losses, strict=True):
                score, postprocessing = self._validate(predicted, float(loss)) if best.running else (np.nan, ())
                better.append(best.update(score, (number + 1) * every - 1, postprocessing))
            if any(better):
                kept = probes.keep(kept, state.probes, jnp.asarray(better))
            if not any(best.running for best in bests):
                break
        seconds = (time.perf_counter() - began) / len(points)
        return [_Fitted(b.score, b.epoch, b.postprocessing, seconds, probes.pick(kept, i)) for i, b in enumerate(bests)]

    def _rows_of_an_epoch(self, batch_size: int) -> int:
        count = len(self.train_rows)
        if count % batch_size == 1 and (count == 1 or not self.protocol.drop_single):
            raise InputError(
                f"{self.task.name}: expected no batch of one row, whose variance BatchNorm does not have, found "
                f"{count} rows to train on, in batches of {batch_size}"
                + ("" if count == 1 else ": HEAR's kit fails there too; --protocol fixed leaves that row out")
            )
        return count - (count % batch_size == 1)

    def _orders(self, epochs: int, count: int) -> list[np.ndarray]:
        if not self.protocol.shuffle:
            return [self.train_rows] * epochs
        return [self.orders.permutation(self.train_rows)[:count] for _ in range(epochs)]

    def _chosen(self, split: str) -> probes.Chosen:
        return probes.choose(np.arange(*self.data.spans[split]))

    def _validate(self, probabilities: np.ndarray, loss: float) -> tuple[float, Parameters]:
        """Return the validation score of one point, and its best postprocessing."""
        if not self.task.score_stopping:
            return loss, self.grid[0]
        if self.protocol.go_on_after_nan and not np.isfinite(probabilities).all():
            return float("nan"), self.grid[0]
        metric = METRICS[self.task.metrics[0]]
        if self.task.embedding == "scene":
            targets = self.data.targets[slice(*self.data.spans[self.fold.valid])]
            primary = self.task.metrics[:1]
            found = metrics.scores(primary, probabilities, targets, present=self.protocol.present_classes)
            return found[primary[0]], ()
        assert metric.quick is not None
        scored = []
        for parameters in self.grid:
            estimated, reference = self._events(self.fold.valid, probabilities, parameters)
            value = metric.quick(estimated, reference, len(self.task.labels), empty=self.protocol.zero_without_events)
            scored.append((value, parameters))
        lowest = self.protocol.follow_metric and not metric.maximize
        # As in the kit, NaN counts as 0, and of equal scores the largest parameters win.
        return max(scored, key=lambda s: ((-1 if lowest else 1) * np.nan_to_num(s[0]), s[1]))

    def _events(
        self, split: str, probabilities: np.ndarray, parameters: Parameters
    ) -> tuple[dict[str, Events], dict[str, Events]]:
        """Find the events of a split; returns estimated and true events by file."""
        begin = self.data.spans[split][0]
        files = self.data.files[split]
        options = dict(parameters)
        estimated = {
            file.name: find_events(probabilities[file.start - begin : file.stop - begin], file.times, **options)
            for file in files
        }
        return estimated, {file.name: file.events for file in files}

    def test(self, fit: _Fitted) -> FoldScores:
        """Test a probe."""
        task, split = self.task, self.fold.test
        (probabilities,), (loss,) = probes.predict(fit.probe, self.data.rows, self._chosen(split), task.prediction)
        found: dict[str, float] = {"test_loss": float(loss)}
        named: dict[str, float] = {}
        confusion, classes = None, None
        if task.embedding == "scene":
            targets = self.data.targets[slice(*self.data.spans[split])]
            values = metrics.scores(task.metrics, probabilities, targets, present=self.protocol.present_classes)
            named = {f"test_{name}": value for name, value in values.items()}
            if task.prediction == "multiclass":
                confusion = metrics.confusion(probabilities, targets, task.labels)
            else:
                classes = metrics.by_class(probabilities, targets, task.labels)
        else:
            estimated, reference = self._events(split, probabilities, fit.postprocessing)
            for name in task.metrics:
                options = {"empty": self.protocol.zero_without_events}
                values = METRICS[name].compute(estimated, reference, len(task.labels), **options)
                named[f"test_{name}"] = next(iter(values.values()))
                named |= {f"test_{name}_{part}": value for part, value in values.items()}
        found["test_score"] = named[f"test_{task.metrics[0]}"]
        return FoldScores(found | named, fit.score, fit.epoch, fit.seconds, fit.postprocessing, confusion, classes)
