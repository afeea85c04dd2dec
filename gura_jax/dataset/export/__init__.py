"""Export of a store. A format is one function and one row of FORMATS.

The store's own formats (``npy``, ``parquet``) are copies, in any place, that ``EmbeddingStore`` reads and ``gura-jax
embed`` resumes. The others are folders of files for other tools, complete or absent.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path

from gura_jax.dataset.export.copy import copy_store
from gura_jax.dataset.export.hear import write_hear
from gura_jax.dataset.export.hoplite import write_hoplite
from gura_jax.dataset.export.hugging_face import write_datasets
from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.dataset.sinks import SINKS
from gura_jax.errors import InputError, StoreError, expected
from gura_jax.files import cannot_write, new_folder
from gura_jax.objects import scheme

__all__ = ["FORMATS", "export"]

Output = str | os.PathLike[str]
Write = Callable[[EmbeddingStore, Path, bool], None]  # to an empty folder; with timestamps
Export = Callable[[EmbeddingStore, Output, bool], None]


def _copied(form: str, store: EmbeddingStore, out: Output, timestamps: bool) -> None:
    copy_store(store, out, form)


def _into_folder(write: Write, store: EmbeddingStore, out: Output, timestamps: bool) -> None:
    """Write into a temporary folder, which becomes ``out`` when it is complete."""
    if scheme(os.fspath(out)):
        raise InputError(f"{out}: expected a folder for this format: export to one, and upload it")
    out = Path(out)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise StoreError(f"{out}: expected a folder that is new or empty: choose another")
        with new_folder(out) as temporary:
            write(store, temporary, timestamps)
            with contextlib.suppress(FileNotFoundError):
                out.rmdir()  # refuses if another process has filled it meanwhile
    except OSError as error:
        raise cannot_write(out, error) from None


FORMATS: dict[str, Export] = {
    **{form: functools.partial(_copied, form) for form in SINKS},
    "datasets": functools.partial(_into_folder, write_datasets),
    "hear": functools.partial(_into_folder, write_hear),
    "hoplite": functools.partial(_into_folder, write_hoplite),
}


def export(store: EmbeddingStore, out: Output, form: str, *, timestamps: bool = False) -> int:
    """Write a store in another format.

    ``npy`` and ``parquet`` copy the store, with all that it has, to any place (:func:`copy_store`). ``datasets``,
    ``hear`` and ``hoplite`` write into a folder that is new or empty: scene embeddings, and with ``timestamps`` frames,
    beside the scenes (``datasets``) or in their place (``hear``, ``hoplite``).

    Args:
        store: the store; for all formats but its own also a part of one (``store.filter``).
        out: folder, or for the store's own formats the URL of a bucket's prefix.
        form: a name in :data:`FORMATS`.
        timestamps: write frames.

    Returns:
        The number of clips.

    Raises:
        InputError: an unknown format, or a URL for a format that is written to folders only.
        StoreError: the output is not empty or cannot be written, the store has no frames, or the format cannot hold
            it: the message says what is wrong.
    """
    if form not in FORMATS:
        raise InputError(f"format {expected(form, FORMATS)}")
    if timestamps and store.run["timestamp_embedding_size"] is None:
        raise StoreError(f"{store.folder}: expected a store with timestamps, found scene embeddings alone")
    FORMATS[form](store, out, timestamps)
    return len(store)
