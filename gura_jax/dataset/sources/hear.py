"""HEAR tasks as inputs: a folder with ``task_metadata.json``, labels by split, and audio at one or more rates."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gura_jax.dataset.sources.source import Options, Source, clip_table
from gura_jax.errors import InputError
from gura_jax.files import plain_name, read_json

if TYPE_CHECKING:
    import pyarrow as pa

HEAR_METADATA = "task_metadata.json"


class HearTask(Source):
    """The folder of a task, with the columns task, split, file and labels (JSON, as the task has them)."""

    def recognises(self, given: str) -> bool:
        return os.path.isfile(os.path.join(given, HEAR_METADATA))

    def table(self, given: str, options: Options) -> "pa.Table":
        folder = Path(given)
        metadata = read_json(folder / HEAR_METADATA)
        splits = metadata.get("splits") if isinstance(metadata, Mapping) else None
        if not isinstance(splits, list) or not all(isinstance(split, str) and split for split in splits) or not splits:
            raise InputError(f"{folder / HEAR_METADATA}: expected 'splits', a list of names, found {splits!r}")
        audio = folder / str(_best_rate(folder, options.sample_rate))
        files: list[tuple[str, str]] = []
        columns: dict[str, list[str]] = {"task": [], "split": [], "file": [], "labels": []}
        for split in splits:
            clips = read_json(folder / f"{plain_name(split, folder)}.json")
            if not isinstance(clips, Mapping):
                raise InputError(f"{folder / split}.json: expected an object of file names and labels")
            for name, labels in clips.items():
                files.append((f"{folder.name}/{split}/{name}", str(audio / split / plain_name(name, folder))))
                for column, value in zip(columns, (folder.name, split, name, json.dumps(labels)), strict=True):
                    columns[column].append(value)
        table = clip_table(files, **columns)
        if table is None:
            raise InputError(f"{folder}: expected clips, found none in {', '.join(f'{s}.json' for s in splits)}")
        return table


def _best_rate(folder: Path, sample_rate: int) -> int:
    """Choose a folder of audio: the rate itself, else the lowest above it, else the highest there is."""
    rates = [int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    if not rates:
        raise InputError(f"{folder}: expected a folder of audio named by its sample rate, like 16000, found none")
    return min((rate for rate in rates if rate >= sample_rate), default=max(rates))
