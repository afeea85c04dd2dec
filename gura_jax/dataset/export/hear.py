"""Files as HEAR's kit has them: ``TASK/SPLIT/FILE.embedding.npy``."""

import json
import os
from pathlib import Path

import numpy as np

from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.errors import StoreError


def write_hear(store: EmbeddingStore, out: Path, timestamps: bool) -> None:
    """Write the scene embedding of each clip; or with ``timestamps`` its frames, and ``FILE.timestamps.json``.

    ``ID.embedding.npy`` for clips that are of no task.

    Raises:
        StoreError: ids that are no file names.
    """
    of_task = {"task", "split", "file"} <= set(store.meta.column_names)
    for clip in store:
        meta = clip.meta
        name = "/".join(meta[key] for key in ("task", "split", "file")) if of_task and meta["file"] else meta["id"]
        path = Path(os.path.normpath(out / f"{name}.embedding.npy"))
        if not path.is_relative_to(out) or "\0" in name:
            raise StoreError(f"{store.folder}: expected ids that are names of files, found {name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        embedding = clip.frames if timestamps else clip.scene
        assert embedding is not None
        with open(path, "xb") as file:
            np.save(file, np.asarray(embedding, np.float32))
        if timestamps and clip.times is not None:
            times = path.with_name(path.name.removesuffix(".embedding.npy") + ".timestamps.json")
            times.write_text(json.dumps(clip.times.tolist()) + "\n")
