"""perch-hoplite's database, which tools for bioacoustics search: SQLite, and an index of usearch.

A window is a clip, or with timestamps a frame. Vectors are divided by their norms, which the column ``norm`` has:
hoplite ranks by the inner product, by which a long vector would come before a similar one.
"""

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gura_jax.dataset.reader import EmbeddingStore, StoredClip
from gura_jax.errors import StoreError

BATCH = 1024  # windows written together


def write_hoplite(store: EmbeddingStore, out: Path, timestamps: bool) -> None:
    """Write a database with a window for each clip, or with ``timestamps`` for each frame.

    Raises:
        StoreError: perch-hoplite is not installed.
        OSError: the database cannot be written.
    """
    try:
        from ml_collections import config_dict  # pyright: ignore[reportMissingImports]
        from perch_hoplite.db import sqlite_usearch_impl as hoplite  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise StoreError(
            f"--format hoplite: expected perch-hoplite, found none ({error}): pip install 'gura-jax[hoplite]', in an "
            "environment of its own, as it asks for pandas<3"
        ) from None

    size = store.run["timestamp_embedding_size" if timestamps else "scene_embedding_size"]
    name = Path(os.path.abspath(store.folder)).name or "embeddings"
    try:
        database = hoplite.SQLiteUSearchDB.create(str(out), hoplite.get_default_usearch_config(size))
        try:
            for key, value in _metadata(store, name, size, timestamps).items():
                database.insert_metadata(key, config_dict.ConfigDict(value))
            _insert(database, store, name, timestamps)
            database.commit()  # which also writes the index, so it is called once
        finally:
            database.db.close()
    except (sqlite3.Error, RuntimeError, UnicodeError) as error:
        raise OSError(f"perch-hoplite: {error}") from error
    for path in out.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _metadata(store: EmbeddingStore, name: str, size: int, timestamps: bool) -> dict[str, Any]:
    """Return what hoplite's own embedding writes: the model, and where recordings are (their names are paths)."""
    run = store.run
    model = {
        "system": run["system"]["name"],
        "sample_rate": run["sample_rate"],
        "embedding": "frames" if timestamps else "scene",
        "run": run["fingerprint"],
    }
    audio = {"dataset_name": name, "base_path": ".", "file_glob": "", "target_sample_rate_hz": run["sample_rate"]}
    return {
        "model_config": {"model_key": "gura_jax", "embedding_dim": size, "model_config": model},
        "audio_sources": {"audio_globs": [audio]},
    }


class _Windows(NamedTuple):
    """Windows of one clip: their time spans in the recording, and their vectors."""

    clip: StoredClip
    offsets: np.ndarray  # [n, 2], seconds
    vectors: np.ndarray  # [n, D]


def _insert(database: Any, store: EmbeddingStore, name: str, timestamps: bool) -> None:
    deployment = database.insert_deployment(name=name, project=name)
    database.add_extra_table_column("windows", "clip_id", str)
    database.add_extra_table_column("windows", "norm", float)
    recordings: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    vectors: list[np.ndarray] = []

    def flush() -> None:
        if rows:
            # Any other way, hoplite compares all pairs of a batch.
            database.insert_windows_batch(rows, np.concatenate(vectors), handle_duplicates="allow")
        rows.clear()
        vectors.clear()

    for clip, offsets, found in _windows(store, timestamps):
        path = clip.meta["path"]
        if path not in recordings:
            recordings[path] = database.insert_recording(filename=path, deployment_id=deployment)
        norms = np.linalg.norm(found.astype(np.float32), axis=1)
        vectors.append(found / np.where(norms > 0, norms, 1)[:, None])
        common = {"recording_id": recordings[path], "clip_id": clip.meta["id"]}
        rows += [
            common | {"offsets": span, "norm": norm}
            for span, norm in zip(offsets.tolist(), norms.tolist(), strict=True)
        ]
        if len(rows) >= BATCH:
            flush()
    flush()


def _windows(store: EmbeddingStore, timestamps: bool) -> Iterator[_Windows]:
    """Iterate over the windows of all clips, at most a batch of one clip at a time."""
    for clips in store.batches(BATCH):
        for clip in clips:
            if not timestamps:
                start = clip.meta["offset"]
                yield _Windows(clip, np.array([[start, start + clip.meta["duration"]]]), clip.scene[None])
            elif clip.frames is not None and clip.times is not None:
                spans = _frame_spans(clip, clip.times)
                for first in range(0, len(spans), BATCH):
                    part = slice(first, first + BATCH)
                    yield _Windows(clip, spans[part], np.asarray(clip.frames[part]))


def _frame_spans(clip: StoredClip, times: np.ndarray) -> np.ndarray:
    """Return [T, 2]: a hop around each frame's time, within the clip; of a single frame, the clip."""
    start, duration, hop = clip.meta["offset"], clip.meta["duration"], clip.meta["frame_hop_ms"] / 1000
    half = hop / 2 if hop else duration
    centers = times / 1000
    return start + np.clip(np.stack([centers - half, centers + half], -1), 0, duration)
