"""An evaluation: every task of a folder by every system; a task that fails does not stop the others."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gura_jax import files
from gura_jax.dataset.run import is_out_of_memory
from gura_jax.errors import GuraError, InputError
from gura_jax.evaluate import metrics, report
from gura_jax.evaluate.benchmarks import Benchmark
from gura_jax.evaluate.embed import SystemEmbeddings
from gura_jax.evaluate.modules import ModuleEmbeddings
from gura_jax.evaluate.protocol import Protocol, evaluate_task
from gura_jax.evaluate.task import Task
from gura_jax.files import plain_name

EMBEDDINGS = "embeddings"

Source = SystemEmbeddings | ModuleEmbeddings
"""Where embeddings come from."""


class Outcome(NamedTuple):
    """Scores and failures of an evaluation.

    Attributes:
        rows: scores, as rows of the table.
        failed: reason by task, or by task and system.
    """

    rows: list[report.Row]
    failed: Mapping[str, str]


def evaluate(
    tasks: Path, sources: Sequence[Source], out: Path, benchmark: Benchmark, protocol: Protocol, seed: int = 0
) -> Outcome:
    """Evaluate systems on every task of a folder, and write the scores of each task when it is done.

    First everything is embedded, one encoder after the other; then probes are trained. Existing scores of the same
    embeddings, task, protocol and seed are not computed again.

    Args:
        tasks: a folder of the benchmark's tasks, or one task.
        sources: where embeddings come from.
        out: folder for ``embeddings/<encoder>/<task>``, ``scores/<protocol>-<seed>/<system>/<task>`` and the tables.
        benchmark: the benchmark of the tasks.
        protocol: one of its protocols.
        seed: of the probes.

    Raises:
        InputError: there are no tasks, or two systems share a name, or a name cannot be a folder's.
        SystemConfigError: scikit-learn, SciPy or sed_eval is missing, or a module cannot be loaded.
        CheckpointError: weights are missing or damaged.
        StoreError: the folder cannot be written.
    """
    metrics.check_installed()
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"expected systems of names that differ, found {max(names, key=names.count)} twice")
    for source in sources:
        plain_name(source.name, out)  # becomes part of paths, and may come from an untrusted file
        source.check()
    files.open_folder(out)
    failed: dict[str, str] = {}
    readable: list[Task] = []
    for folder in benchmark.find_tasks(tasks):
        try:
            task = benchmark.read_task(folder)
            protocol.points(task)  # fails before anything is embedded
            readable.append(task)
        except GuraError as error:
            failed[folder.name] = str(error)
            print(f"{folder.name}: {error}", file=sys.stderr)
    broken = _embed(readable, sources, out)
    table: list[report.Row] = []
    for task in readable:
        for source in sources:
            if not source.parts(task):
                print(f"{task.name}: skipped for {source.name}, which has scene embeddings only", file=sys.stderr)
                continue
            try:
                scores = _scores(task, source, out, benchmark, protocol, seed, broken)
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
    """Embed the parts of all sources, each part once; returns failures by part and task."""
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
    task: Task,
    source: Source,
    out: Path,
    benchmark: Benchmark,
    protocol: Protocol,
    seed: int,
    broken: Mapping[tuple[str, str], GuraError],
) -> Mapping[str, Any]:
    """Return the content of a task's score file, which is computed and written unless it is there."""
    parts = [part.name for part in source.parts(task)]
    for name in parts:
        if (name, task.name) in broken:
            raise broken[name, task.name]
    folders = [out / EMBEDDINGS / name / task.name for name in parts]
    embedded = source.open(task, folders)
    target = out / "scores" / f"{protocol.name}-{seed}" / source.name / task.name / benchmark.scores_file
    described = report.identity(task, protocol, seed, embedded.fingerprint)
    scores = report.read_scores(target)
    if scores is None or scores[report.OURS] != described:
        try:
            found = evaluate_task(task, embedded.lookup, protocol, seed, mixer=source.mixer)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and not is_out_of_memory(error):
                raise
            raise InputError(
                f"{task.folder}: expected embeddings and probes that fit into memory, found {error}: evaluate this "
                "task on a larger machine, with the same --out"
            ) from None
        scores = report.content(found, folders, described)
        report.write_scores(target, scores)
    return scores
