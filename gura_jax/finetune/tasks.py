"""Labelled clips: a HEAR task folder, or a manifest with a column of labels."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gura_jax.dataset.sources import read_inputs
from gura_jax.errors import InputError
from gura_jax.evaluate.hear.tasks import TRAIN_VALID_TEST, read_task
from gura_jax.evaluate.task import Fold, Task

if TYPE_CHECKING:
    import pyarrow as pa

NAMED = 5  # clips in a message


@dataclasses.dataclass(frozen=True)
class ManifestTask(Task):
    """A manifest whose rows have labels and a split; a scene task."""

    rows: "pa.Table"

    def table(self, sample_rate: int) -> "pa.Table":
        return self.rows

    def clip_id(self, split: str, file: str) -> str:
        return file

    def audio_folder(self, split: str, sample_rate: int) -> Path:
        raise InputError(f"{self.folder}: expected a HEAR task, found a manifest, whose audio is anywhere")


def read_labelled(
    path: Path,
    *,
    label: str | None = None,
    split: str = "split",
    root: Path | None = None,
    allow_outside: bool = False,
) -> Task:
    """Read labelled clips.

    Args:
        path: folder of a HEAR task; or a manifest (CSV, JSON Lines, Parquet).
        label: a manifest's column of labels: text or integers, one class a clip; lists of them, any number.
        split: a manifest's column that says train, valid or test.
        root: what a manifest's paths are relative to; by default its folder.
        allow_outside: allow paths and links that lead out of the root.

    Raises:
        InputError: see :func:`gura_jax.evaluate.hear.tasks.read_task` and
            :func:`gura_jax.dataset.sources.read_inputs`; no label, no split, no clips to train or
            validate with, or classes that only some splits have.
    """
    if path.is_dir():
        if label is not None:
            raise InputError(f"{path}: expected no label column of a HEAR task, which has its labels, found {label!r}")
        return read_task(path)
    if not path.exists():
        raise InputError(f"{path}: expected the folder of a HEAR task, or a manifest, found no such file")
    if label is None:
        raise InputError(f"{path}: expected the name of a column of labels (--label), as it is no folder, found none")
    table = read_inputs([path], root=root, allow_outside=allow_outside)
    for name in (label, split):
        if name not in table.column_names:
            raise InputError(f"{path}: expected a column {name!r}, found {', '.join(table.column_names)}")
    ids, splits = table["id"].to_pylist(), table[split].to_pylist()
    if other := sorted({repr(value) for value in splits if value not in TRAIN_VALID_TEST}):
        raise InputError(f"{path}: expected {split} to be train, valid or test, found {', '.join(other[:NAMED])}")
    lists = _is_list(path, label, table[label].type)
    values = [value if lists else [value] for value in table[label].to_pylist()]
    if missing := [
        name for name, own in zip(ids, values, strict=True) if own is None or any(x in (None, "") for x in own)
    ]:
        raise InputError(
            f"{path}: expected a {label} for every clip, found none for {len(missing)}: {', '.join(missing[:NAMED])}"
        )
    clips: dict[str, dict[str, Sequence[str]]] = {}
    for name, part, own in zip(ids, splits, values, strict=True):
        clips.setdefault(part, {})[name] = [str(value) for value in own]
    for part in ("train", "valid"):
        if part not in clips:
            raise InputError(f"{path}: expected clips whose {split} is {part}, found none")
    if not lists:
        trained = {value for own in clips["train"].values() for value in own}
        for part, own in clips.items():
            if other := sorted({value for (value,) in own.values()} - trained):
                raise InputError(
                    f"{path}: expected a {label} of clips to train with, found {', '.join(other[:NAMED])} in {part} "
                    "alone: nothing can be learnt of it"
                )
    classes = sorted({value for own in values for value in own})  # integers by size
    return ManifestTask(
        folder=path,
        name=path.stem,
        task_name=path.stem,
        embedding="scene",
        prediction="multilabel" if lists else "multiclass",
        splits=tuple(name for name in TRAIN_VALID_TEST if name in clips),
        folds=(Fold(("train",), "valid", "test"),),
        labels=tuple(str(value) for value in classes),
        metrics=("mAP",) if lists else ("top1_acc",),
        score_stopping=True,
        postprocessing={},
        grid={},
        clips=clips,
        rows=table,
    )


def _is_list(path: Path, label: str, kind: Any) -> bool:
    """Whether a column of this type holds lists of labels, and not one each."""
    import pyarrow as pa

    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    value = kind.value_type if lists else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_integer(value)):
        raise InputError(f"{path}: expected the column {label} to hold text, integers, or lists of them, found {kind}")
    return lists
