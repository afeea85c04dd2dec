"""A run: every task of a folder, embedded and evaluated; a task that fails stops no other."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gura_jax.dataset import store
from gura_jax.dataset.manifest import plain_name
from gura_jax.errors import GuraError
from gura_jax.evaluate import metrics, report
from gura_jax.evaluate.embed import MODULE_FILE, Module, embed_task, embed_task_by_module
from gura_jax.evaluate.protocol import Lookup, Protocol, evaluate_task
from gura_jax.evaluate.tasks import Task, find_tasks, read_task
from gura_jax.model import Model

EMBEDDINGS = "embeddings"


class Embedder(NamedTuple):
    """Where embeddings come from.

    Attributes:
        name: of the system or module, with what sets it apart; of its folders too.
        embed: (task, folder) -> its embeddings.
        describe: folder -> what the embeddings are, once they are there.
    """

    name: str
    embed: Callable[[Task, Path], Lookup]
    describe: Callable[[Path], str]


def by_system(model: Model, size: str | None = None) -> Embedder:
    """Embeddings by a system, through the dataset store; the name says what is tiny or random."""
    marks = [size] if size else []
    if model.random_members:
        some = len(model.random_members) < len(model.system.members)
        marks.append("random" + "".join(f"-{name}" for name in model.random_members if some))
    name = "-".join([model.system.name, *marks])
    return Embedder(name, lambda task, folder: embed_task(model, task, folder), _store_fingerprint)


def by_module(module: Module) -> Embedder:
    """Embeddings by a module with HEAR's common API."""

    def describe(folder: Path) -> str:
        return json.dumps(json.loads((folder / MODULE_FILE).read_bytes()), sort_keys=True)

    return Embedder(module.name, lambda task, folder: embed_task_by_module(module, task, folder), describe)


def _store_fingerprint(folder: Path) -> str:
    run = store.read_run(folder)
    assert run is not None
    return str(run["fingerprint"])


class Outcome(NamedTuple):
    """What a run came to: rows of the table, and the tasks that failed with the reason."""

    rows: list[report.Row]
    failed: Mapping[str, str]


def evaluate(tasks: Path, embedder: Embedder, out: Path, protocol: Protocol, seed: int = 0) -> Outcome:
    """Evaluate a system on every task of a folder, and write scores as each is finished.

    Scores that are there already, of the same embeddings, task, protocol and seed, are not computed again.

    Args:
        tasks: a folder of HEAR tasks, or a task.
        embedder: where embeddings come from.
        out: ``embeddings/<name>/<task>`` and ``scores/<protocol>-<seed>/<name>/<task>`` go there, and the table.
        protocol: see :data:`gura_jax.evaluate.protocol.PROTOCOLS`.
        seed: of the probes.

    Raises:
        InputError: there are no tasks, or the system's name cannot be a folder's.
        SystemConfigError: scikit-learn, SciPy or sed_eval is missing.
        StoreError: the folder cannot be written.
    """
    metrics.check_installed()
    plain_name(embedder.name, out)  # a part of paths, from a file that may be anybody's
    store.open_folder(out)
    table: list[report.Row] = []
    failed: dict[str, str] = {}
    for folder in find_tasks(tasks):
        try:
            task = read_task(folder)
            scores = _evaluate_one(task, embedder, out, protocol, seed)
        except GuraError as error:
            failed[folder.name] = str(error)
            print(f"{folder.name}: {error}", file=sys.stderr)
            continue
        new = report.rows(embedder.name, task, scores)
        report.update_table(out, new)
        table += new
        print(f"{task.name}: {new[0].metric} {new[0].score:.4f}", file=sys.stderr)
    return Outcome(table, failed)


def _evaluate_one(task: Task, embedder: Embedder, out: Path, protocol: Protocol, seed: int) -> Mapping[str, Any]:
    embeddings = out / EMBEDDINGS / embedder.name / task.name
    lookup = embedder.embed(task, embeddings)
    target = out / "scores" / f"{protocol.name}-{seed}" / embedder.name / task.name
    described = report.identity(task, protocol, seed, embedder.describe(embeddings))
    scores = report.read_scores(target)
    if scores is None or scores[report.OURS] != described:
        scores = report.content(evaluate_task(task, lookup, protocol, seed), embeddings, described)
        report.write_scores(target, scores)
    return scores
