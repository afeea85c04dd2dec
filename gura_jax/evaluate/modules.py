"""Embeddings of a task by any module with HEAR's common API."""

import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gura_jax.errors import GuraError, InputError, StoreError, SystemConfigError
from gura_jax.evaluate.embed import Embedded
from gura_jax.evaluate.probes import Mixer
from gura_jax.evaluate.task import Task
from gura_jax.files import AtomicFiles, open_folder, remove_temporary, write_json

MODULE_FILE = "module.json"
BATCH_SAMPLES = 84 * 16_000  # that a module computes at once, as in HEAR's kit


class _Part(NamedTuple):
    name: str  # name of its folder


@dataclasses.dataclass(frozen=True)
class ModuleEmbeddings:
    """Embeddings by any module with HEAR's common API.

    Attributes:
        name: import name of the module.
        weights: the ``model_file_path`` for its ``load_model``, or None.
    """

    name: str
    weights: str | None = None
    mixer: Mixer | None = None

    @functools.cached_property
    def module(self) -> "Module":
        """The module, loaded."""
        return Module(self.name, self.weights)

    def parts(self, task: Task) -> tuple[_Part, ...]:
        """List what has to be embedded for a task: one part, the module."""
        del task
        return (_Part(self.name),)

    def check(self) -> None:
        """Load the module, before other systems take their time.

        Raises:
            SystemConfigError: it cannot be loaded.
        """
        self.module  # noqa: B018 - loads it

    def load(self, part: _Part) -> Callable[[Task, Path], None]:
        """Return a function that embeds a task into a folder, or resumes."""
        del part
        return functools.partial(embed_task_by_module, self.module)

    def open(self, task: Task, folders: Sequence[Path]) -> Embedded:
        """Open the embeddings in the folder of the module's part."""
        del task
        (folder,) = folders
        description = json.dumps(json.loads((folder / MODULE_FILE).read_bytes()), sort_keys=True)
        return Embedded(functools.partial(read_embedding, folder), description)


class Module:
    """A module with HEAR's common API: ``load_model``, ``get_scene_embeddings`` and ``get_timestamp_embeddings``.

    A model that is a ``torch.nn.Module`` gets torch tensors, on a GPU if there is one; other models get NumPy arrays.

    Args:
        name: import name of the module.
        weights: the ``model_file_path`` for ``load_model``, or None.

    Raises:
        SystemConfigError: it cannot be imported, lacks a function, or does not load.
    """

    def __init__(self, name: str, weights: str | None = None) -> None:
        self.name, self.weights = name, weights
        try:
            self.module = importlib.import_module(name)
        except Exception as error:  # whatever the module's own code raises
            found = f"{type(error).__name__}: {error}"
            raise SystemConfigError(f"module {name}: expected a module to import, found: {found}") from error
        wanted = ("load_model", "get_scene_embeddings", "get_timestamp_embeddings")
        if missing := [part for part in wanted if not callable(getattr(self.module, part, None))]:
            raise SystemConfigError(f"module {name}: expected HEAR's common API, found no {', '.join(missing)}")
        try:
            self.model = self.module.load_model(*([] if weights is None else [weights]))
        except GuraError:
            raise
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            raise SystemConfigError(f"module {name}: expected load_model to load, found: {found}") from error
        rate = getattr(self.model, "sample_rate", None)
        if not isinstance(rate, int):
            raise SystemConfigError(f"module {name}: expected a model with a sample_rate, found {rate!r}")
        self.rate = rate
        torch: Any = sys.modules.get("torch")  # imported, if the model is torch's
        self.torch = torch if torch is not None and isinstance(self.model, torch.nn.Module) else None
        if self.torch is not None:
            self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
            self.model.to(self.device)

    def __call__(self, audio: np.ndarray, *, frames: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Embed clips [n, samples]: scenes [n, S] and None, or frames [n, T, D] and times [n, T] in ms."""
        function = self.module.get_timestamp_embeddings if frames else self.module.get_scene_embeddings
        if self.torch is not None:
            with self.torch.no_grad():
                out = function(self.torch.from_numpy(audio).to(self.device), self.model)
            arrays = [x.detach().cpu().numpy() for x in (out if frames else (out,))]
        else:
            out = function(audio, self.model)
            arrays = [np.asarray(x) for x in (out if frames else (out,))]
        shapes = [x.shape for x in arrays]
        of_clips = len(arrays) == 1 + frames and all(shape[:1] == audio.shape[:1] for shape in shapes)
        if not of_clips or len(shapes[0]) != 2 + frames or (frames and shapes[1] != shapes[0][:2]):
            wanted = "[n, T, D] and times [n, T]" if frames else "[n, D]"
            raise SystemConfigError(
                f"module {self.name}: expected {wanted} from {function.__name__} for {len(audio)}, found {shapes}"
            )
        if not all(np.isfinite(x).all() for x in arrays):  # not stored, as the module may be fixed
            raise SystemConfigError(f"module {self.name}: expected finite embeddings and times, found others")
        return arrays[0].astype(np.float32), arrays[1].astype(np.float64) if frames else None


def embed_task_by_module(module: Module, task: Task, folder: Path) -> None:
    """Embed a task's clips by a HEAR module, or resume.

    Consecutive clips of one length form a batch, as large as the kit's. Files are named as by the kit:
    ``<split>/<file>.embedding.npy``, and for events ``<split>/<file>.timestamps.json``.

    Args:
        module: the module.
        task: the task.
        folder: where to write the embeddings.

    Raises:
        InputError: clips that cannot be decoded.
        StoreError: the folder cannot be written, or holds the embeddings of another module.
        SystemConfigError: the module fails.
    """
    frames = task.embedding == "event"
    _check_module(module, folder)
    for split in task.splits:
        target = folder / split
        open_folder(target)
        source = task.audio_folder(split, module.rate)
        missing = [file for file in task.clips[split] if not (target / f"{file}.embedding.npy").is_file()]
        remove_temporary(target, {name for file in missing for name in _names(file)})
        for files, audio in _batches(task, source, missing, module.rate):
            try:
                embeddings, times = module(audio, frames=frames)
            except GuraError:
                raise
            except Exception as error:  # whatever the module's own code raises
                raise SystemConfigError(
                    f"module {module.name}, {task.name}/{split}: {type(error).__name__}: {error}"
                ) from error
            with AtomicFiles(target) as atomic:
                for i, file in enumerate(files):
                    _write(atomic, file, embeddings[i], None if times is None else times[i])
                atomic.commit()


def _names(file: str) -> tuple[str, str]:
    """Return the files of a clip's embedding and times."""
    return f"{file}.embedding.npy", f"{file}.timestamps.json"


def _write(atomic: AtomicFiles, file: str, embedding: np.ndarray, times: np.ndarray | None) -> None:
    """Write a clip, its times first: where an embedding stands, the clip is complete."""
    embedding_file, times_file = _names(file)
    if times is not None:
        atomic.write(times_file, lambda out: out.write(json.dumps(times.tolist()).encode()))
    atomic.write(embedding_file, lambda out: np.save(out, embedding))


def read_embedding(folder: Path, split: str, file: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an embedding as HEAR's kit stores it: a lookup, given the task's folder of embeddings."""
    path = folder / split / f"{file}.embedding.npy"
    try:
        embedding = np.load(path, allow_pickle=False)
        times = None
        if embedding.ndim > 1:
            path = folder / split / f"{file}.timestamps.json"
            times = np.asarray(json.loads(path.read_bytes()), np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path}: expected an embedding, found: {error}: delete it and run this again") from None
    return embedding, times


def _check_module(module: Module, folder: Path) -> None:
    open_folder(folder)
    description = {"module": module.name, "weights": module.weights, "sample_rate": module.rate}
    path = folder / MODULE_FILE
    try:
        there = json.loads(path.read_bytes())
    except FileNotFoundError:
        write_json(folder, MODULE_FILE, description)
        return
    except (OSError, ValueError):
        there = None
    if there != description:
        raise StoreError(
            f"{folder}: expected embeddings by {description}, found those of {there}: choose another --out"
        )


def _batches(task: Task, folder: Path, files: Sequence[str], rate: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Batch consecutive clips of one length, [n, samples]."""
    names: list[str] = []
    clips: list[np.ndarray] = []
    for file in files:
        clip = _decode(folder / file, rate)
        if isinstance(clip, str):
            raise InputError(f"{task.name}: expected clips that can be read, found {clip}")
        if clips and (len(clip) != len(clips[0]) or (len(clips) + 1) * len(clip) > BATCH_SAMPLES):
            yield names, np.stack(clips)
            names, clips = [], []
        names.append(file)
        clips.append(clip)
    if clips:
        yield names, np.stack(clips)


def _decode(path: Path, rate: int) -> np.ndarray | str:
    """Decode a file at its own rate, [samples] float32; or return why that failed."""
    import soundfile

    try:
        audio, found = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        return f"{path}: {error}"
    if found != rate:
        return f"{path}, at {found} Hz, not {rate}"
    if not len(audio) or not np.isfinite(audio).all():
        return f"{path}, with no samples or with NaN"
    return audio.mean(1, dtype=np.float32)
