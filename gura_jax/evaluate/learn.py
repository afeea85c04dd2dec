"""Learned fusion: which hidden states and members of a system serve a task, from stored states.

Every way of fusing is judged by the same probes, seeds and folds. What is learned is learned on the training splits and
chosen on the validation splits; test scores are reported, and choose nothing.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gura_jax.dataset.fused import Fuser, fuse_scenes
from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.errors import InputError
from gura_jax.evaluate import report
from gura_jax.evaluate.benchmarks import Benchmark
from gura_jax.evaluate.embed import SystemEmbeddings
from gura_jax.evaluate.probes import Mixer
from gura_jax.evaluate.protocol import Protocol, evaluate_task
from gura_jax.evaluate.statistics import Difference, compare, holm
from gura_jax.evaluate.task import Task
from gura_jax.files import is_plain_name, open_folder, write_file
from gura_jax.fusion import COMBINATIONS, Keep, kept_members
from gura_jax.systems import Member, System, write_system

EQUAL, LAYERS, JOINT, ATTENTION = "equal", "layers", "joint", "attention"
SUBSETS = 31  # members of up to five are searched exhaustively, of more greedily
HEADS = 4
LEARNED = "learned.json"


class Way(NamedTuple):
    """A way of fusing.

    Attributes:
        name: of it.
        embeddings: of each clip, by id.
        mixer: that learns to fuse them; None: they are fused.
        system: whose scenes they are; None where a mixer learns.
    """

    name: str
    embeddings: Callable[[], Mapping[str, np.ndarray]]
    mixer: Mixer | None
    system: System | None


class Result(NamedTuple):
    """Scores of a way of fusing.

    Attributes:
        name: of the way.
        test, validation: [seeds * folds], in one order for all ways.
        weights: [tokens], learned, mean over the seeds; empty if none are.
        gain: over the system's own fusion, on test.
        p: of no gain, adjusted for the number of ways; None of a single score.
    """

    name: str
    test: tuple[float, ...]
    validation: tuple[float, ...]
    weights: tuple[float, ...]
    gain: Difference
    p: float | None


class Learned(NamedTuple):
    """What was found for a task.

    Attributes:
        task, metric: names.
        interval: of the system's own fusion, on test.
        results: the system's own fusion first; then in the order of trying.
        best: name of the way with the best validation scores.
        ablation: by member, what the system gains from it on test: the system less the system without it.
        tokens: member and hidden state of each weight.
        systems: files of the systems that were written, by way.
    """

    task: str
    metric: str
    interval: Difference
    results: tuple[Result, ...]
    best: str
    ablation: Mapping[str, Difference]
    tokens: Sequence[tuple[str, int | None]]
    systems: Mapping[str, str]


def learn(
    task: Task, source: SystemEmbeddings, out: Path, benchmark: Benchmark, protocol: Protocol, seeds: Sequence[int]
) -> Learned:
    """Learn how to fuse a system's hidden states for a task; goes on where it stopped.

    Args:
        task: with scene embeddings.
        source: the system, which is embedded once.
        out: folder for the store, the scores, and the system files.
        benchmark: of the task.
        protocol: of the probes.
        seeds: of the probes, at least one.

    Raises:
        InputError: an event task, one that cannot be embedded or trained on, or a system whose states cannot be mixed.
        StoreError: the folder cannot be written, or the members' states cannot be mixed.
    """
    if task.embedding != "scene":
        raise InputError(f"{task.name}: expected a task with scene embeddings, found one with timestamps")
    _check(source)
    states = dataclasses.replace(source, learned=True)
    (part,) = states.parts(task)
    folder = out / "embeddings" / part.name / task.name
    states.load(part)(task, folder)
    study = _Study(task, source.system, EmbeddingStore(folder), out, benchmark, protocol, seeds)
    return study.run()


def _check(source: SystemEmbeddings) -> None:
    """Refuse a system whose hidden states cannot be mixed, before it takes its time.

    Raises:
        InputError: says why.
    """
    system, members = source.system, source.outline.fusion.members
    if system.scene_groups != 1:
        raise InputError(f"{system.name}: expected scene_groups = 1, found {system.scene_groups}")
    sizes = {m.name: m.encoder.pooled_size if m.scene == "pooled" else m.encoder.feature_size for m in members}
    if system.feature_size is None and len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"{system.name}: expected members of one size, found {told}: set feature_size")
    kept_members(source.outline.fusion, Keep("mean"))
    for name in sizes:
        if name in (EQUAL, LAYERS, JOINT, ATTENTION) or "+" in name or not is_plain_name(name):
            raise InputError(
                f"{system.name}: member {name!r}: expected a name that a folder can have, without '+', and none of "
                f"{EQUAL}, {LAYERS}, {JOINT}, {ATTENTION}: give the member another name"
            )


class _Study:
    """Ways of fusing one system's states for one task."""

    def __init__(
        self,
        task: Task,
        system: System,
        store: EmbeddingStore,
        out: Path,
        benchmark: Benchmark,
        protocol: Protocol,
        seeds: Sequence[int],
    ) -> None:
        self.task, self.system, self.store, self.out = task, system, store, out
        self.benchmark, self.protocol, self.seeds = benchmark, protocol, seeds
        self.fuser = Fuser(store, system)
        tokens = self.fuser.tokens(list(store.iterate_states()))  # [n, N, F]
        train = {task.clip_id(split, file) for split in task.folds[0].train for file in task.clips[split]}
        rows = [i for i, name in enumerate(store.ids) if name in train]
        named = itertools.groupby(self.fuser.token_names, key=lambda token: token[0])
        self.states = [[state for _, state in own] for _, own in named]  # of each member
        self.groups = [len(own) for own in self.states]
        self.tokens = tokens
        sizes = np.maximum(np.sqrt(np.square(tokens[rows]).mean((0, 2), dtype=np.float64)), 1e-12)  # [N]
        # Hidden states differ in size by orders of magnitude: those of a member get its own, all together get 1.
        owns = [np.sqrt(np.square(own).mean()) / own for own in np.split(sizes, np.cumsum(self.groups)[:-1])]
        self.scales = {LAYERS: np.concatenate(owns), JOINT: 1 / sizes, ATTENTION: 1 / sizes}  # [N] each
        self.maximize = True
        self.results: dict[str, dict[str, Any]] = {}

    def run(self) -> Learned:
        self._score(Way(EQUAL, lambda: self._scenes(self.system), None, self.system))
        sizes, size = tuple(self.groups), self.tokens.shape[2]
        for name, mixer in (
            (LAYERS, Mixer(sizes, averaged=COMBINATIONS[self.system.combination].joins is None)),
            (JOINT, Mixer((sum(sizes),))),
            (ATTENTION, Mixer((sum(sizes),), heads=HEADS if size % HEADS == 0 else 1)),
        ):
            self._score(Way(name, functools.partial(self._scaled, self.scales[name]), mixer, None))
        subsets = {_subset_name(own): own for own in self._search()}
        without = {member.name: self._without(member) for member in self.system.members if len(self.groups) > 1}
        for own in without.values():
            self._score_subset(own)
        return self._learned(subsets, without)

    def _search(self) -> Iterator[tuple[Member, ...]]:
        """Score subsets of the members: all of them, or greedily the best with one more; yields each."""
        members = self.system.members
        if 2 ** len(members) - 1 <= SUBSETS:
            for count in range(1, len(members)):
                for chosen in itertools.combinations(members, count):
                    self._score_subset(chosen)
                    yield chosen
            return
        chosen: tuple[Member, ...] = ()
        while len(chosen) < len(members) - 1:
            more = [tuple(m for m in members if m in (*chosen, other)) for other in members if other not in chosen]
            for own in more:
                self._score_subset(own)
                yield own
            best = max(more, key=lambda own: self._validation(_subset_name(own)))
            if chosen and self._validation(_subset_name(best)) <= self._validation(_subset_name(chosen)):
                return
            chosen = best

    def _without(self, member: Member) -> tuple[Member, ...]:
        return tuple(other for other in self.system.members if other != member)

    def _score_subset(self, members: tuple[Member, ...]) -> None:
        system = self._subset(members)
        self._score(Way(_subset_name(members), lambda: self._scenes(system), None, system))

    def _subset(self, members: tuple[Member, ...]) -> System:
        rate = self.store.run["sample_rate"]
        return dataclasses.replace(self.system, name=_subset_name(members), members=members, sample_rate=rate)

    def _scenes(self, system: System) -> Mapping[str, np.ndarray]:
        return dict(zip(self.store.ids, fuse_scenes(self.store, system), strict=True))

    def _scaled(self, scales: np.ndarray) -> Mapping[str, np.ndarray]:
        scaled = self.tokens * scales[:, None].astype(np.float32)
        return dict(zip(self.store.ids, scaled.reshape(len(scaled), -1), strict=True))

    def _score(self, way: Way) -> None:
        """Score a way by every seed, or read its scores."""
        if way.name in self.results:
            return
        how = [self.store.run["fingerprint"], way.name, way.mixer, dataclasses.astuple(way.system or self.system)]
        key = hashlib.sha256(json.dumps(how, default=str).encode()).hexdigest()
        embeddings: Mapping[str, np.ndarray] | None = None
        test, validation, weights = [], [], []
        for seed in self.seeds:
            described = report.identity(self.task, self.protocol, seed, key)
            folder = self.out / "scores" / f"{self.protocol.name}-{seed}" / way.name / self.task.name
            path = folder / self.benchmark.scores_file
            scores = report.read_scores(path)
            if scores is None or scores[report.OURS] != described:
                if embeddings is None:
                    embeddings = way.embeddings()
                scores = self._computed(embeddings, way.mixer, seed, described)
                report.write_scores(path, scores)
            folds = [scores[fold.test] for fold in self.task.folds]
            test += [fold["test_score"] for fold in folds]
            validation += [fold["validation_score"] for fold in folds]
            weights.append(scores.get("state_weights", []))
            self.maximize = scores["score_mode"] == "max"
        self.results[way.name] = {
            "test": test,
            "validation": validation,
            "weights": np.mean(weights, axis=0).tolist() if weights[0] else [],
        }

    def _computed(
        self, embeddings: Mapping[str, np.ndarray], mixer: Mixer | None, seed: int, described: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        task = self.task
        found = evaluate_task(
            task, lambda split, file: (embeddings[task.clip_id(split, file)], None), self.protocol, seed, mixer=mixer
        )
        return report.content(found, [Path(self.store.folder)], described)

    def _validation(self, name: str) -> float:
        """Mean validation score of the folds that define it, the higher the better."""
        mean = finite_mean(self.results[name]["validation"])
        if math.isnan(mean):
            return -math.inf
        return mean if self.maximize else -mean

    def _learned(self, subsets: Mapping[str, tuple[Member, ...]], without: Mapping[str, tuple[Member, ...]]) -> Learned:
        if all(math.isnan(finite_mean(own["validation"])) for own in self.results.values()):
            raise InputError(
                f"{self.task.name}: expected a validation split that defines {self.task.metrics[0]} (clips of two "
                "classes at least), found none"
            )
        fold = self.task.folds[0]
        clips = [len(self.task.clips[split]) for split in (*fold.train, fold.test)]
        share = clips[-1] / sum(clips[:-1])
        equal = self.results[EQUAL]["test"]
        gains = {name: compare(own["test"], equal, share) for name, own in self.results.items()}
        tested = [name for name in gains if name != EQUAL and gains[name].p is not None]
        adjusted = dict(zip(tested, holm([gains[name].p or 0.0 for name in tested]), strict=True))
        results = tuple(
            Result(
                name, tuple(own["test"]), tuple(own["validation"]), tuple(own["weights"]), gains[name],
                adjusted.get(name),
            )
            for name, own in self.results.items()
        )  # fmt: skip
        ablation = {
            name: compare(equal, self.results[_subset_name(own)]["test"], share) for name, own in without.items()
        }
        written = self._write_systems(subsets)
        best = max(self.results, key=self._validation)
        found = Learned(
            self.task.name, self.task.metrics[0], compare(equal, None, share), results, best, ablation,
            self.fuser.token_names, written,
        )  # fmt: skip
        open_folder(self.out / self.task.name)
        write_file(self.out / self.task.name, LEARNED, (json.dumps(as_json(found), indent=1) + "\n").encode())
        return found

    def _write_systems(self, subsets: Mapping[str, tuple[Member, ...]]) -> dict[str, str]:
        """Write what ``embed`` takes: learned layers, layers and members together, and the best members."""
        systems = {LAYERS: self._weighted(LAYERS), JOINT: self._weighted(JOINT)}
        if subsets:
            best = max([EQUAL, *subsets], key=self._validation)
            systems["members"] = self.system if best == EQUAL else self._subset(subsets[best])
        written = {}
        folder = self.out / self.task.name
        open_folder(folder)
        for name, system in systems.items():
            if system is not None:
                path = folder / f"{name}.toml"
                write_system(dataclasses.replace(system, name=f"{self.system.name}-{self.task.name}-{name}"), path)
                written[name] = str(path)
        return written

    def _weighted(self, name: str) -> System | None:
        """The system with learned layer weights; None where a system cannot have them.

        What is learned for a member without hidden states is no weight of a layer: of one such member the weight
        becomes 1, and those of all others are divided by it, which changes scenes by that factor alone.
        """
        weights = np.asarray(self.results[name]["weights"]) * self.scales[name]
        parts = np.split(weights, np.cumsum(self.groups)[:-1])
        states = [own[0] is not None for own in self.states]
        fixed = [float(own[0]) for own, has in zip(parts, states, strict=True) if not has]
        if name == JOINT and fixed:
            if len(fixed) > 1 or fixed[0] < np.finfo(np.float32).tiny:
                return None
            parts = [own / fixed[0] for own in parts]
        members = []
        for member, own, has in zip(self.system.members, parts, states, strict=True):
            layers = tuple(own.astype(np.float32).tolist()) if has else member.layers
            members.append(dataclasses.replace(member, layers=layers))
        combination = "average" if name == JOINT else self.system.combination
        return dataclasses.replace(self.system, members=tuple(members), combination=combination)


def _subset_name(members: Sequence[Member]) -> str:
    return "+".join(member.name for member in members)


def as_json(learned: Learned) -> dict[str, Any]:
    """Return what :func:`learn` writes as ``learned.json``; null stands for scores that are not defined."""
    results = [result._asdict() | {"gain": result.gain._asdict()} for result in learned.results]
    ablation = {name: gain._asdict() for name, gain in learned.ablation.items()}
    content = learned._asdict() | {"interval": learned.interval._asdict(), "results": results, "ablation": ablation}
    return _strict(content)


def _strict(value: Any) -> Any:
    """JSON without NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _strict(own) for key, own in value.items()}
    return [_strict(own) for own in value] if isinstance(value, (list, tuple)) else value


def finite_mean(values: Sequence[float]) -> float:
    """Return the mean of the scores that are defined; NaN if there are none."""
    found = [value for value in values if math.isfinite(value)]
    return sum(found) / len(found) if found else math.nan


def as_text(learned: Learned) -> str:
    """Return a table of what was found, for a terminal."""
    width = max(len(result.name) for result in learned.results)
    lines = [
        f"{learned.task}: {learned.metric}, mean of {len(learned.results[0].test)} seeds and folds",
        f"  {'fusion':{width}} {'validation':>10} {'test':>8} {'gain':>8}   {'95 % interval':^18} {'p':>7}",
    ]
    for result in learned.results:
        gain = "" if result.name == EQUAL else f"{result.gain.mean:+8.4f}"
        low, high = result.gain.low, result.gain.high
        interval = "" if result.name == EQUAL or low is None or high is None else f"{low:+.4f} to {high:+.4f}"
        p = "" if result.p is None else f"{result.p:.3f}"
        marked = " *" if result.name == learned.best else ""
        validation, test = finite_mean(result.validation), finite_mean(result.test)
        lines.append(
            f"  {result.name:{width}} {validation:10.4f} {test:8.4f} {gain:>8}   {interval:^18} {p:>7}{marked}"
        )
    lines.append("  * best on validation; p: no gain over equal weights, adjusted for the number of tests (Holm)")
    undefined = sum(not math.isfinite(value) for value in learned.results[0].test)
    if undefined:
        lines.append(f"  {undefined} scores are not defined, as of a fold with one class, and are left out")
    for name, own in learned.ablation.items():
        interval = "" if own.low is None or own.high is None else f" ({own.low:+.4f} to {own.high:+.4f})"
        lines.append(f"  gained from {name}: {own.mean:+.4f}{interval}")
    return "\n".join([*lines, *(f"  {name} -> {path}" for name, path in learned.systems.items())])
