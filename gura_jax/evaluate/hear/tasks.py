"""Task folders of HEAR: metadata, vocabulary and labels, checked."""

import csv
import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gura_jax.dataset.sources import printable, read_inputs
from gura_jax.dataset.sources.hear import HEAR_METADATA
from gura_jax.errors import InputError
from gura_jax.evaluate.metrics import METRICS
from gura_jax.evaluate.task import Event, Fold, Task
from gura_jax.files import plain_name, read_json

if TYPE_CHECKING:
    import pyarrow as pa

VOCABULARY = "labelvocabulary.csv"
SPLIT_MODES = ("trainvaltest", "new_split_kfold", "presplit_kfold")
TRAIN_VALID_TEST = ("train", "valid", "test")
MIN_FOLDS = 3  # one to test, one to validate, one to train
POSTPROCESSING = {"median_filter_ms": [250.0], "min_duration": [125.0, 250.0]}  # ms
LONGEST = 60_000  # ms, of a filter or an event's least duration
FILES_SEED = 0  # of the kit's shuffle of a task's files


@dataclasses.dataclass(frozen=True)
class HearTask(Task):
    """A task folder, ``<task_name>-<version>-<mode>``, with audio in ``<sample rate>/<split>/<file>``."""

    def table(self, sample_rate: int) -> "pa.Table":
        return read_inputs([self.folder], sample_rate=sample_rate).drop_columns(["labels"])

    def clip_id(self, split: str, file: str) -> str:
        return printable(f"{self.name}/{split}/{file}")

    def audio_folder(self, split: str, sample_rate: int) -> Path:
        folder = self.folder / str(sample_rate)
        if not folder.is_dir():
            raise InputError(
                f"{self.folder}: expected a folder {sample_rate}, of audio at the module's sample rate, found none: "
                "HEAR publishes each task at 16000, 22050, 32000, 44100 and 48000 Hz"
            )
        return folder / split


def find_tasks(folder: Path) -> list[Path]:
    """Find the task folders in a folder; the folder itself, if it is one.

    Raises:
        InputError: there are none.
    """
    if (folder / HEAR_METADATA).is_file():
        return [folder]
    # A folder with only a vocabulary is a task too, whose missing metadata must be reported.
    found = sorted({path.parent for name in (HEAR_METADATA, VOCABULARY) for path in folder.glob(f"*/{name}")})
    if not found:
        raise InputError(f"{folder}: expected folders of HEAR tasks, each with a {HEAR_METADATA}, found none")
    return found


def read_task(folder: Path) -> HearTask:
    """Read a task folder.

    Raises:
        InputError: a file is missing or cannot be read, the metadata do not follow HEAR's format, a label is not in the
            vocabulary, or a clip of a multiclass task does not have exactly one label.
    """
    path = folder / HEAR_METADATA
    meta = read_json(path)
    if not isinstance(meta, Mapping):
        raise InputError(f"{path}: expected an object")
    embedding = _one_of(path, meta, "embedding_type", ("scene", "event"))
    prediction = _one_of(path, meta, "prediction_type", ("multiclass", "multilabel"))
    mode = _one_of(path, meta, "split_mode", SPLIT_MODES)
    if embedding == "event" and prediction == "multiclass":
        raise InputError(f"{path}: expected prediction_type multilabel for events, found multiclass")
    splits = _names(path, meta, "splits")
    metrics = _names(path, meta, "evaluation")
    for metric in metrics:
        if metric not in METRICS or METRICS[metric].events != (embedding == "event"):
            known = ", ".join(name for name, m in METRICS.items() if m.events == (embedding == "event"))
            raise InputError(f"{path}: expected metrics of {embedding} tasks ({known}), found {metric!r}")
    labels = _vocabulary(folder / VOCABULARY)
    parameters = meta.get("evaluation_params") or {}
    if not isinstance(parameters, Mapping):
        raise InputError(f"{path}: expected evaluation_params, an object, found {parameters!r}")
    score_stopping = meta.get("use_scoring_for_early_stopping", True) is not False
    postprocessing = _grid(path, parameters.get("event_postprocessing_grid", POSTPROCESSING))
    if unknown := [name for name in postprocessing if name not in (*POSTPROCESSING, "threshold")]:
        raise InputError(f"{path}: expected median_filter_ms, min_duration and threshold, found {unknown[0]!r}")
    for name, values in postprocessing.items():
        if not all(isinstance(v, (int, float)) and 0 <= v <= LONGEST for v in values):
            raise InputError(f"{path}: expected {name}, numbers from 0 to {LONGEST}, found {values!r}")
    if embedding == "event" and not score_stopping and any(len(values) != 1 for values in postprocessing.values()):
        raise InputError(
            f"{path}: expected one value of each postprocessing parameter where scores do not choose, found "
            f"{postprocessing}"
        )
    return HearTask(
        folder,
        folder.name,
        str(meta.get("task_name", folder.name)),
        embedding,
        prediction,
        splits,
        _folds(path, mode, splits),
        labels,
        metrics,
        score_stopping,
        postprocessing,
        _grid(path, parameters.get("task_specific_param_grid", {})),
        _shuffled({split: _clips(folder, split, embedding, prediction, labels) for split in splits}),
    )


def _shuffled(clips: Mapping[str, Mapping[str, Sequence[Any]]]) -> Mapping[str, Mapping[str, Sequence[Any]]]:
    """Order each split's files as HEAR's kit does: by one random generator over all splits."""
    shuffle = random.Random(FILES_SEED).shuffle
    ordered = {}
    for split, labels in clips.items():
        names = list(labels)
        shuffle(names)
        ordered[split] = {name: labels[name] for name in names}
    return ordered


def _one_of(path: Path, meta: Mapping[str, Any], name: str, choices: Sequence[str]) -> Any:
    value = meta.get(name)
    if value not in choices:
        raise InputError(f"{path}: expected {name} to be one of {', '.join(choices)}, found {value!r}")
    return value


def _names(path: Path, meta: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = meta.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v for v in values):
        raise InputError(f"{path}: expected {name}, a list of names, found {values!r}")
    if len(set(values)) < len(values):
        raise InputError(f"{path}: expected {name} that differ, found {values!r}")
    return tuple(values)


def _grid(path: Path, grid: Any) -> Mapping[str, Sequence[Any]]:
    if not isinstance(grid, Mapping) or not all(isinstance(v, list) and v for v in grid.values()):
        raise InputError(f"{path}: expected a grid, a list of values for each parameter, found {grid!r}")
    return grid


def _folds(path: Path, mode: str, splits: tuple[str, ...]) -> tuple[Fold, ...]:
    if mode == "trainvaltest":
        if sorted(splits) != sorted(TRAIN_VALID_TEST):
            raise InputError(f"{path}: expected the splits train, valid and test, found {', '.join(splits)}")
        return (Fold(("train",), "valid", "test"),)
    if len(splits) < MIN_FOLDS:
        raise InputError(f"{path}: expected at least {MIN_FOLDS} folds, found {', '.join(splits)}")
    ordered = sorted(splits)
    folds = []
    for i, test in enumerate(ordered):
        valid = ordered[(i + 1) % len(ordered)]
        folds.append(Fold(tuple(split for split in ordered if split not in (test, valid)), valid, test))
    return tuple(folds)


def _vocabulary(path: Path) -> tuple[str, ...]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        labels = {int(row["idx"]): row["label"] for row in rows}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise InputError(f"{path}: expected the columns idx and label, found another table") from None
    if not rows or sorted(labels) != list(range(len(rows))) or len(set(labels.values())) < len(rows):
        raise InputError(f"{path}: expected each idx from 0 on once, and labels that differ")
    return tuple(labels[i] for i in range(len(rows)))


def _clips(
    folder: Path, split: str, embedding: str, prediction: str, vocabulary: tuple[str, ...]
) -> Mapping[str, Sequence[Any]]:
    path = folder / f"{plain_name(split, folder)}.json"
    content = read_json(path)
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: expected an object of file names and labels, with one clip at least")
    known = set(vocabulary)
    clips: dict[str, Sequence[Any]] = {}
    for name, given in content.items():
        where = f"{path}, {name}: "
        plain_name(name, folder)
        if not isinstance(given, list):
            raise InputError(f"{where}expected a list of labels, found {given!r}")
        values = [_event(where, item) for item in given] if embedding == "event" else [str(item) for item in given]
        for value in values:
            label = value.label if isinstance(value, Event) else value
            if label not in known:
                raise InputError(f"{where}expected labels of {VOCABULARY}, found {label!r}")
        if prediction == "multiclass" and len(values) != 1:
            raise InputError(f"{where}expected one label, as the task is multiclass, found {len(values)}")
        clips[name] = values
    return clips


def _event(where: str, item: Any) -> Event:
    try:
        event = Event(str(item["label"]), float(item["start"]), float(item["end"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{where}expected an event with label, start and end (ms), found {item!r}") from None
    if not 0 <= event.start <= event.end < float("inf"):
        raise InputError(f"{where}expected an event from start to end in milliseconds, found {item!r}")
    return event
