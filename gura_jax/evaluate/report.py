"""Score files, in the layout of HEAR's kit, and the table of all scores in a folder."""

import csv
import dataclasses
import hashlib
import io
import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gura_jax import __version__, files
from gura_jax.backend import describe_devices
from gura_jax.dataset.commit import read_run
from gura_jax.evaluate.metrics import ClassScore
from gura_jax.evaluate.modules import MODULE_FILE
from gura_jax.evaluate.protocol import FoldScores, Protocol, TaskScores
from gura_jax.evaluate.task import Task

TABLE = "scores.csv"
OURS = "gura_jax"  # key of the identity, which the kit's score files do not have
AGGREGATED = "aggregated_scores"
# More keys that the kit does not have; score files of earlier versions do not have them either.
CONFUSION, CLASSES, PROVENANCE, ENVIRONMENT = "confusion", "classes", "provenance", "environment"
PACKAGES = {"jax": "jax", "optax": "optax", "numpy": "numpy", "scikit-learn": "sklearn", "scipy": "scipy",
            "sed_eval": "sed_eval"}  # fmt: skip


class Row(NamedTuple):
    """A row of the table: a metric of a system on a task, with mean and sample standard deviation over folds."""

    system: str
    task: str
    metric: str
    score: float
    std: float | None
    validation: float
    folds: int
    protocol: str
    seed: int


def identity(task: Task, protocol: Protocol, seed: int, embeddings: str) -> dict[str, Any]:
    """Identify scores by what they depend on; scores of another identity are computed again.

    Args:
        task: the task; its folder does not matter.
        protocol: of the evaluation.
        seed: of the probes.
        embeddings: fingerprint of the embeddings.
    """
    task = dataclasses.replace(task, folder=Path())
    values = [getattr(task, field.name) for field in dataclasses.fields(task)]
    described = json.dumps([values, protocol.options], sort_keys=True, default=str)
    return {
        "version": __version__,
        "protocol": protocol.name,
        "seed": seed,
        "embeddings": embeddings,
        "task_sha256": hashlib.sha256(described.encode()).hexdigest(),
    }


def content(scores: TaskScores, embeddings: Sequence[Path], described: Mapping[str, Any]) -> dict[str, Any]:
    """Make the content of a score file: scores of each tested fold, ``aggregated_scores`` of several, and the choices.

    HEAR's kit has no ``state_weights``, ``confusion`` or ``classes``, ``provenance``, ``environment`` and ``gura_jax``.

    Args:
        scores: the scores.
        embeddings: folders of the embeddings, which say where these came from.
        described: the :func:`identity`.
    """
    folds = {
        split: dict(fold.test)
        | {
            "validation_score": fold.validation_score,
            "epoch": fold.epoch,
            "time_in_min": fold.seconds / 60,
        }
        for split, fold in scores.folds.items()
    }
    out: dict[str, Any] = dict(folds)
    if len(folds) > 1:
        out[AGGREGATED] = _aggregate(list(folds.values()))
    return out | {
        "hparams": scores.point._asdict(),
        "postprocessing": [list(item) for item in next(iter(scores.folds.values())).postprocessing],
        "score_mode": "max" if scores.maximize else "min",
        "embedding_path": ", ".join(map(str, embeddings)),
        **({"state_weights": list(scores.state_weights)} if scores.state_weights else {}),
        **_classes(list(scores.folds.values())),
        PROVENANCE: [_provenance(folder) for folder in embeddings],
        ENVIRONMENT: _environment(),
        OURS: dict(described),
    }


def _classes(folds: Sequence[FoldScores]) -> dict[str, Any]:
    """Combine what folds found by class: a sum of confusion matrices, or means of average precisions."""
    if any(fold.confusion for fold in folds):
        total: dict[str, Counter[str]] = {}
        for fold in folds:
            for true, row in (fold.confusion or {}).items():
                total.setdefault(true, Counter()).update(row)
        return {CONFUSION: {true: dict(row) for true, row in total.items()}}
    found: dict[str, list[ClassScore]] = {}
    for fold in folds:
        for label, score in (fold.classes or {}).items():
            found.setdefault(label, []).append(score)
    described = {}
    for label, scores in found.items():
        defined = [score.average_precision for score in scores if score.average_precision is not None]
        precision = float(np.mean(defined)) if defined else None
        described[label] = ClassScore(sum(score.clips for score in scores), precision)._asdict()
    return {CLASSES: described} if described else {}


def _provenance(folder: Path) -> dict[str, Any]:
    """Describe where embeddings came from, by the file that their writer left beside them; empty if there is none."""
    run = read_run(folder)
    if run is None:
        try:
            return dict(json.loads((folder / MODULE_FILE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return {}
    system = run["system"]
    members = [
        {name: member[name] for name in ("name", "encoder", "layers", "weights")} for member in system["members"]
    ]
    kept = ("dtype", "precision", "resampler", "fingerprint", "versions")
    return {"system": system["name"], "members": members} | {name: run[name] for name in kept if name in run}


def _environment() -> dict[str, Any]:
    """Describe what computes scores: the devices and versions of the packages."""
    versions = {name: version(name) for name in PACKAGES if find_spec(PACKAGES[name])}
    return {
        "devices": describe_devices(jax.local_devices()),
        "versions": {"gura_jax": __version__, "python": platform.python_version()} | versions,
    }


def _aggregate(folds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Compute means and sample standard deviations without NaN, as pandas does for the kit."""
    out = {}
    for name in folds[0]:
        values = np.array([fold[name] for fold in folds], np.float64)
        values = values[~np.isnan(values)]
        out[f"{name}_mean"] = float(values.mean()) if len(values) else math.nan
        with np.errstate(invalid="ignore"):  # infinite d_primes
            out[f"{name}_std"] = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return out


def write_scores(path: Path, scores: Mapping[str, Any]) -> None:
    """Write a score file. Like the kit's, it may hold NaN and infinity, which strict JSON does not know.

    Raises:
        StoreError: it cannot be written.
    """
    files.open_folder(path.parent)
    files.write_file(path.parent, path.name, (json.dumps(scores, indent=4) + "\n").encode())


def read_scores(path: Path) -> dict[str, Any] | None:
    """Read a score file that this package wrote; None if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found[OURS], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rows(system: str, task: Task, scores: Mapping[str, Any]) -> list[Row]:
    """Turn a score file into rows of the table, the primary metric first."""
    described = scores[OURS]
    folds = {split: scores[split] for fold in task.folds if (split := fold.test)}
    aggregated = scores.get(AGGREGATED) or _aggregate(list(folds.values()))
    return [
        Row(
            system,
            task.name,
            metric,
            aggregated[f"test_{metric}_mean"],
            aggregated[f"test_{metric}_std"] if len(folds) > 1 else None,
            aggregated["validation_score_mean"],
            len(folds),
            described["protocol"],
            described["seed"],
        )
        for metric in task.metrics
    ]


def update_table(folder: Path, new: Sequence[Row]) -> None:
    """Add rows to the folder's table; they replace rows of the same system, task, metric, protocol and seed.

    Raises:
        StoreError: the table cannot be written.
    """
    with files.locked(folder):
        table = {tuple(_key(row)): row for row in _read_table(folder / TABLE)}
        table |= {tuple(_key(values)): values for row in new if (values := _written(row))}
        text = io.StringIO()
        writer = csv.DictWriter(text, Row._fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[key] for key in sorted(table))
        files.write_file(folder, TABLE, text.getvalue().encode())


def read_table(folder: Path) -> list[Row]:
    """Read the folder's table: the scores of all runs into this folder."""
    found = []
    for values in _read_table(folder / TABLE):
        std = float(values["std"]) if values["std"] else None
        numbers = float(values["score"]), std, float(values["validation"]), int(values["folds"])
        found.append(
            Row(values["system"], values["task"], values["metric"], *numbers, values["protocol"], int(values["seed"]))
        )
    return found


def _written(row: Row) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in row._asdict().items()}


def _key(row: Mapping[str, str]) -> list[str]:
    return [row[name] for name in ("protocol", "seed", "task", "metric", "system")]


def _read_table(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            return list(reader) if tuple(reader.fieldnames or ()) == Row._fields else []
    except (OSError, ValueError, csv.Error):
        return []
