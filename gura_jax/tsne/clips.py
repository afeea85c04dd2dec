"""Scene embeddings and metadata of stores, as the clips of a map."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.dataset.sources import printable, read_inputs
from gura_jax.errors import InputError, StoreError

MIN_CLIPS = 5
DATA_SET = "data set"  # a column: the store that a clip is from, or the HEAR task
# Columns of a store that say where the clip's rows are, not what the clip is.
LOCATION = ("shard", "row", "num_samples", "num_frames", "frame_start", "frame_offset_ms", "frame_hop_ms")


class Clips(NamedTuple):
    """Clips of one store or several.

    Attributes:
        title: the systems and the number of clips.
        scenes: [n, S] float32, not all the same.
        rows: metadata of each clip.
        folders: the store of each clip.
    """

    title: str
    scenes: np.ndarray
    rows: Sequence[Mapping[str, Any]]
    folders: Sequence[Path]

    @property
    def columns(self) -> list[str]:
        """Columns of the metadata that describe a clip."""
        return [name for name in dict.fromkeys(key for row in self.rows for key in row) if name not in LOCATION]


def read_clips(folders: Sequence[str | os.PathLike[str]], *, inputs: Sequence[str | os.PathLike[str]] = ()) -> Clips:
    """Read the scene embeddings and the metadata of stores.

    Args:
        folders: the stores, at least one, all of one embedding size.
        inputs: the stores' inputs, as ``gura-jax embed`` took them, for columns that the stores lack (the labels of
            HEAR tasks); joined by id.

    Raises:
        StoreError: a folder is no store, sizes differ, or embeddings are all the same or not finite.
        InputError: too few clips, or inputs that cannot be read.
    """
    stores = [EmbeddingStore(folder) for folder in folders]
    size = stores[0].run["scene_embedding_size"]
    names = [Path(embeddings.folder).resolve().name for embeddings in stores]
    if len(set(names)) < len(names):
        names = [str(embeddings.folder) for embeddings in stores]
    rows: list[dict[str, Any]] = []
    for name, embeddings in zip(names, stores, strict=True):
        if (found := embeddings.run["scene_embedding_size"]) != size:
            raise StoreError(
                f"expected stores of one embedding size, found {size} in {stores[0].folder} and {found} in "
                f"{embeddings.folder}"
            )
        found_rows = embeddings.to_arrow().to_pylist()
        rows += [{DATA_SET: (len(stores) == 1 and row.get("task")) or printable(name)} | row for row in found_rows]
    if inputs:
        _join(rows, inputs)
    if len(rows) < MIN_CLIPS:
        raise InputError(f"expected at least {MIN_CLIPS} clips to lay out, found {len(rows)}")
    scenes = np.concatenate([embeddings.scenes() for embeddings in stores]).astype(np.float32)
    if not 0 < spread(scenes) < math.inf:
        found = "all the same" if np.isfinite(scenes).all() else "NaN or infinity"
        raise StoreError(f"expected embeddings that are finite and differ, found {found} in {', '.join(names)}")
    systems = ", ".join(dict.fromkeys(embeddings.run["system"]["name"] for embeddings in stores))
    random = sorted({name for embeddings in stores for name in embeddings.run["random_weights"]})
    marked = f"{systems} (random weights: {', '.join(random)})" if random else systems
    origins = [Path(embeddings.folder) for embeddings in stores for _ in range(len(embeddings))]
    return Clips(f"{marked}: {len(rows)} clips", scenes, rows, origins)


def _join(rows: Sequence[dict[str, Any]], inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Add the inputs' columns to the rows of the same id; columns that a row has stay as they are."""
    more = {row["id"]: row for row in read_inputs(inputs).to_pylist()}
    for row in rows:
        for name, value in more.get(row["id"], {}).items():
            row.setdefault(name, value)


def spread(scenes: np.ndarray) -> float:
    """Return the widest range of any feature."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.ptp(scenes, axis=0).max())


def shown(value: Any) -> str:
    """Format a value of the metadata as text; the labels of a HEAR task, which are JSON, as a plain list."""
    if isinstance(value, str) and value.startswith("["):
        try:
            labels = json.loads(value)
            names = [str(label["label"]) if isinstance(label, dict) else str(label) for label in labels]
        except (ValueError, KeyError, RecursionError):  # other text that starts with a bracket
            return value
        return ", ".join(dict.fromkeys(names))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
