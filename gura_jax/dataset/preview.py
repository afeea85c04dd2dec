"""Sounds of clips as pages play them: short, as MP3 in base64."""

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gura_jax.audio import load_segments, soundfile_error
from gura_jax.dataset.sources import decoded, open_clip
from gura_jax.errors import AudioError
from gura_jax.objects import scheme

PREVIEW_RATE = 16_000  # Hz: enough to recognise a clip, and small


def mp3(samples: np.ndarray, name: str) -> str:
    """Encode samples [n] at :data:`PREVIEW_RATE` as MP3, in base64.

    Raises:
        AudioError: libsndfile cannot; names the clip.
    """
    import soundfile

    out = io.BytesIO()
    try:
        soundfile.write(out, samples, PREVIEW_RATE, format="MP3")
    except soundfile_error() as error:
        raise AudioError(f"{name}: cannot be written as MP3: {error}") from None
    return base64.b64encode(out.getvalue()).decode()


def clip_mp3(row: Mapping[str, Any], folder: Path, seconds: float, start: float = 0.0) -> str:
    """Encode a part of a stored clip.

    Args:
        row: of the store's metadata.
        folder: of the store: where relative paths may be relative to.
        seconds: of the part, at most.
        start: of the part within the clip, in seconds.

    Raises:
        AudioError: the clip cannot be read.
    """
    path = decoded(row["path"])
    path = path if scheme(path) else str(_find_file(Path(path), folder))
    span = (row["offset"] + start, min(seconds, row["duration"] - start))
    (samples,) = load_segments(path, [span], sample_rate=PREVIEW_RATE, opener=open_clip)
    if isinstance(samples, AudioError):
        raise samples
    return mp3(samples, path)


def _find_file(path: Path, folder: Path) -> Path:
    """Find a clip's file: a relative path is tried from here, from the store's folder and from each folder above it."""
    for start in (Path(), folder, *folder.resolve().parents):
        if os.path.isfile(start / path):
            return start / path
    return path
