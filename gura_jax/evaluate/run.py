"""A run: every task of a folder, embedded and evaluated by every system; what fails stops nothing else."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gura_jax.dataset import store
from gura_jax.dataset.manifest import plain_name
from gura_jax.dataset.run import is_out_of_memory
from gura_jax.errors import GuraError, InputError
from gura_jax.evaluate import metrics, report
from gura_jax.evaluate.embed import SystemEmbeddings
from gura_jax.evaluate.modules import ModuleEmbeddings
from gura_jax.evaluate.protocol import Protocol, evaluate_task, grid_points
from gura_jax.evaluate.tasks import Task, find_tasks, read_task

EMBEDDINGS = "embeddings"

Source = SystemEmbeddings | ModuleEmbeddings
"""Where embeddings come from."""


class Outcome(NamedTuple):
    """What a run came to: rows of the table, and what failed with the reason: a task, or a task by a system."""

    rows: list[report.Row]
    failed: Mapping[str, str]


def evaluate(tasks: Path, sources: Sequence[Source], out: Path, protocol: Protocol, seed: int = 0) -> Outcome:
    """Evaluate systems on every task of a folder, and write scores as each is finished.

    First everything is embedded, one encoder after the other, then probes are trained. Scores that are there already,
    of the same embeddings, task, protocol and seed, are not computed again.

    Args:
        tasks: a folder of HEAR tasks, or a task.
        sources: where embeddings come from.
        out: ``embeddings/<encoder>/<task>`` and ``scores/<protocol>-<seed>/<system>/<task>`` go there, and the tables.
        protocol: see :data:`gura_jax.evaluate.protocol.PROTOCOLS`.
        seed: of the probes.

    Raises:
        InputError: there are no tasks, two systems have one name, or it cannot be a folder's.
        SystemConfigError: scikit-learn, SciPy or sed_eval is missing, or a module cannot be loaded.
        CheckpointError: weights are missing, or damaged.
        StoreError: the folder cannot be written.
    """
    metrics.check_installed()
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"expected systems of names that differ, found {max(names, key=names.count)} twice")
    for source in sources:
        plain_name(source.name, out)  # a part of paths, from a file that may be anybody's
        source.check()
    store.open_folder(out)
    failed: dict[str, str] = {}
    readable: list[Task] = []
    for folder in find_tasks(tasks):
        try:
            task = read_task(folder)
            grid_points(task)  # better now than after it is embedded
            readable.append(task)
        except GuraError as error:
            failed[folder.name] = str(error)
            print(f"{folder.name}: {error}", file=sys.stderr)
    broken = _embed(readable, sources, out)
    table: list[report.Row] = []
    for task in readable:
        for source in sources:
            if not source.parts(task):
                print(f"{task.name}: no task for {source.name}, which is for scenes", file=sys.stderr)
                continue
            try:
                scores = _scores(task, source, out, protocol, seed, broken)
            except GuraError as error:
                failed[f"{task.name} by {source.name}"] = str(error)
                print(f"{task.name} by {source.name}: {error}", file=sys.stderr)
                continue
            new = report.rows(source.name, task, scores)
            report.update_table(out, new)
            table += new
            print(f"{task.name} by {source.name}: {new[0].metric} {new[0].score:.4f}", file=sys.stderr)
    return Outcome(table, failed)


def _embed(tasks: Sequence[Task], sources: Sequence[Source], out: Path) -> Mapping[tuple[str, str], GuraError]:
    """Embed what the sources are made of, each part once; why that failed, by part and task."""
    needed: dict[str, tuple[Any, Any, dict[str, Task]]] = {}
    for task in tasks:
        for source in sources:
            for part in source.parts(task):
                needed.setdefault(part.name, (source, part, {}))[2][task.name] = task
    broken: dict[tuple[str, str], GuraError] = {}
    for name, (source, part, own) in needed.items():
        plain_name(name, out)
        embed = source.load(part)
        for task in own.values():
            print(f"{task.name}: embedding by {name}", file=sys.stderr)
            try:
                embed(task, out / EMBEDDINGS / name / task.name)
            except GuraError as error:
                broken[name, task.name] = error
    return broken


def _scores(
    task: Task, source: Source, out: Path, protocol: Protocol, seed: int, broken: Mapping[tuple[str, str], GuraError]
) -> Mapping[str, Any]:
    """The content of a task's score file: as it is there, or computed."""
    parts = [part.name for part in source.parts(task)]
    for name in parts:
        if (name, task.name) in broken:
            raise broken[name, task.name]
    folders = [out / EMBEDDINGS / name / task.name for name in parts]
    embedded = source.open(task, folders)
    target = out / "scores" / f"{protocol.name}-{seed}" / source.name / task.name
    described = report.identity(task, protocol, seed, embedded.fingerprint)
    scores = report.read_scores(target)
    if scores is None or scores[report.OURS] != described:
        try:
            found = evaluate_task(task, embedded.lookup, protocol, seed, num_states=source.num_states)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and not is_out_of_memory(error):
                raise
            raise InputError(
                f"{task.folder}: expected embeddings and probes that the memory holds, found {error}: evaluate this "
                "task on a larger machine, with the same --out"
            ) from None
        scores = report.content(found, folders, described)
        report.write_scores(target, scores)
    return scores
