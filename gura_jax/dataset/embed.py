"""Embed audio files and folders into a store."""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from gura_jax.audio import SAMPLE_RATE, load_audio
from gura_jax.dataset.store import ShardWriter
from gura_jax.errors import AudioError
from gura_jax.model import Model

GROUP_CLIPS = 64  # decoded together, so that batches can be of clips of like length
GROUP_SAMPLES = 20 * 60 * SAMPLE_RATE  # and no more than so much audio at once, but for one longer clip


class Failure(NamedTuple):
    """An input that could not be embedded."""

    path: str
    reason: str


@dataclasses.dataclass
class Summary:
    """What :func:`embed_files` did."""

    clips: int = 0
    seconds: float = 0.0
    failed: list[Failure] = dataclasses.field(default_factory=list)


class _Clip(NamedTuple):
    id: str
    path: str
    audio: np.ndarray


def embed_files(
    model: Model, files: Sequence[tuple[str, Path]], out: Path, *, timestamps: bool = False, overwrite: bool = False
) -> Summary:
    """Embed audio files into a store (:mod:`gura_jax.dataset.store`).

    Args:
        model: the system.
        files: id and path of each, as from :func:`find_files`.
        out: the store's folder.
        timestamps: store frames too, not scene embeddings alone.
        overwrite: replace a store that is there.

    Returns:
        How many clips there were, and what failed and why: one bad file does not stop the others.

    Raises:
        StoreError: ``out`` cannot be written, or holds a store.
    """
    from tqdm import tqdm

    writer = ShardWriter(out, timestamps=timestamps, overwrite=overwrite)
    summary = Summary()
    complete = False
    try:
        with tqdm(files, desc=model.system.name, unit="clip", disable=None) as progress:
            for group in _groups(_decoded(model, progress, summary)):
                embeddings = model.embed([clip.audio for clip in group], frames=timestamps)
                for clip, (frames, times, scene) in zip(group, embeddings, strict=True):
                    assert scene is not None
                    writer.add(clip.id, clip.path, len(clip.audio), scene, frames, times)
                    summary.clips += 1
                    summary.seconds += len(clip.audio) / SAMPLE_RATE
        complete = True
    finally:
        # Also when interrupted; but an older store is replaced neither by nothing nor, if it can stay, by a part.
        if summary.clips and (complete or not writer.replaces):
            writer.finish(_description(model, timestamps, summary) | {"complete": complete})
    return summary


def find_files(inputs: Sequence[Path]) -> list[tuple[str, Path]]:
    """(id, path) of each file: as named, and in folders, at any depth, those with an audio suffix, sorted.

    An id is the path within its folder, or the file's name; where two would be the same, the path as given.

    Raises:
        AudioError: there is none, or a folder that cannot be listed.
    """
    import soundfile

    suffixes = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}
    suffixes.remove(".raw")  # samples without a header: of unknown rate
    files: dict[str, tuple[str, Path]] = {}  # by absolute path: a file may be named in several ways
    ids: set[str] = set()
    for given in inputs:
        if given.is_dir():
            found = sorted(
                Path(root) / name
                for root, _, names in os.walk(given, onerror=_cannot_list)
                for name in names
                if Path(name).suffix.lower() in suffixes and not name.startswith(".")
            )
            named = [(path.relative_to(given).as_posix(), path) for path in found]
        else:
            named = [(given.name, given)]
        for name, path in named:
            absolute = os.path.abspath(path)
            if absolute not in files:
                candidates = itertools.chain((name, str(path)), (f"{path}#{i}" for i in itertools.count(2)))
                files[absolute] = next(candidate for candidate in candidates if candidate not in ids), path
                ids.add(files[absolute][0])
    if not files:
        raise AudioError(f"expected audio files, found none in {', '.join(map(str, inputs))}")
    return list(files.values())


def _cannot_list(error: OSError) -> None:
    raise AudioError(f"{error.filename}: expected a folder that can be listed, found: {error.strerror}")


def _decoded(model: Model, files: Iterable[tuple[str, Path]], summary: Summary) -> Iterator[_Clip]:
    """Decode each file; what cannot be read goes to the summary."""
    for name, path in files:
        try:
            audio = load_audio(path)
            if len(audio) < model.min_scene_samples:
                raise AudioError(
                    f"{path}: expected at least {model.min_scene_samples} samples at 16 kHz for {model.system.name}, "
                    f"found {len(audio)}"
                )
        except AudioError as error:
            summary.failed.append(Failure(str(path), str(error).removeprefix(f"{path}: ")))
        else:
            yield _Clip(name, str(path), audio)


def _groups(clips: Iterator[_Clip]) -> Iterator[list[_Clip]]:
    """Cut a stream of clips by number and by length."""
    for first in clips:
        group, samples = [first], len(first.audio)
        while len(group) < GROUP_CLIPS and samples < GROUP_SAMPLES:
            following = list(itertools.islice(clips, 1))
            if not following:
                break
            group += following
            samples += len(following[0].audio)
        yield group


def _description(model: Model, timestamps: bool, summary: Summary) -> dict[str, object]:
    system = model.system
    return {
        "system": {
            "name": system.name,
            "members": [
                {"name": m.name, "encoder": str(m.encoder), "layers": m.layers}
                | {"weights": dict(model.weights[m.name])}
                for m in system.members
            ],
            "combination": system.combination,
            "feature_size": system.feature_size,
            "scene_groups": system.scene_groups,
        },
        "random_weights": model.random_members,
        "dtype": model.dtype,
        "precision": model.compilation.precision,
        "sample_rate": SAMPLE_RATE,
        "scene_embedding_size": model.scene_embedding_size,
        "timestamp_embedding_size": model.timestamp_embedding_size if timestamps else None,
        "clips": summary.clips,
        "seconds": summary.seconds,
        "failed": [failure._asdict() for failure in summary.failed],
        "versions": {name: version(name) for name in ("gura-jax", "jax", "flax")},
        "devices": [device.device_kind for device in jax.local_devices()],
    }
