"""Embeddings of a task by any module with HEAR's common API, through its own functions."""

import dataclasses
import functools
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gura_jax.audio import SAMPLE_RATE
from gura_jax.dataset import store
from gura_jax.errors import GuraError, InputError, StoreError, SystemConfigError
from gura_jax.evaluate.embed import Embedded
from gura_jax.evaluate.tasks import Task

MODULE_FILE = "module.json"
BATCH_SECONDS = 84  # of audio at 16 kHz that a module computes at once, as HEAR's kit has it


class _Part(NamedTuple):
    name: str  # of its folder


@dataclasses.dataclass(frozen=True)
class ModuleEmbeddings:
    """The embeddings of any module with HEAR's common API.

    Attributes:
        name: what to import.
        weights: what its ``load_model`` gets as ``model_file_path``, or None.
    """

    name: str
    weights: str | None = None
    num_states: int = 0

    @functools.cached_property
    def module(self) -> "Module":
        """The module, loaded."""
        return Module(self.name, self.weights)

    def parts(self, task: Task) -> tuple[_Part, ...]:
        """What has to be embedded for a task: all is one."""
        del task
        return (_Part(self.name),)

    def check(self) -> None:
        """See that the module can be loaded: better now than after other systems.

        Raises:
            SystemConfigError: it cannot.
        """
        self.module  # noqa: B018 - loads it

    def load(self, part: _Part) -> Callable[[Task, Path], None]:
        """A function that embeds a task into a folder, or goes on with it."""
        del part
        return functools.partial(embed_task_by_module, self.module)

    def open(self, task: Task, folders: Sequence[Path]) -> Embedded:
        """The module's embeddings."""
        del task
        (folder,) = folders
        description = json.dumps(json.loads((folder / MODULE_FILE).read_bytes()), sort_keys=True)
        return Embedded(functools.partial(read_embedding, folder), description)


class Module:
    """A module with HEAR's common API: ``load_model``, ``get_scene_embeddings`` and ``get_timestamp_embeddings``.

    A model that is a ``torch.nn.Module`` gets torch tensors, on a GPU where there is one; any other NumPy arrays.

    Args:
        name: what to import.
        weights: what ``load_model`` gets as ``model_file_path``, or None.

    Raises:
        SystemConfigError: it cannot be imported, or is no such module.
    """

    def __init__(self, name: str, weights: str | None = None) -> None:
        self.name, self.weights = name, weights
        try:
            self.module = importlib.import_module(name)
        except Exception as error:  # its own code runs
            found = f"{type(error).__name__}: {error}"
            raise SystemConfigError(f"--module {name}: expected a module to import, found: {found}") from error
        wanted = ("load_model", "get_scene_embeddings", "get_timestamp_embeddings")
        if missing := [part for part in wanted if not callable(getattr(self.module, part, None))]:
            raise SystemConfigError(f"--module {name}: expected HEAR's common API, found no {', '.join(missing)}")
        try:
            self.model = self.module.load_model(*([] if weights is None else [weights]))
        except GuraError:
            raise
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            raise SystemConfigError(f"--module {name}: expected load_model to load, found: {found}") from error
        rate = getattr(self.model, "sample_rate", None)
        if not isinstance(rate, int):
            raise SystemConfigError(f"--module {name}: expected a model with a sample_rate, found {rate!r}")
        self.rate = rate
        torch: Any = sys.modules.get("torch")  # a model of torch's has imported it
        self.torch = torch if torch is not None and isinstance(self.model, torch.nn.Module) else None
        if self.torch is not None:
            self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
            self.model.to(self.device)

    def __call__(self, audio: np.ndarray, *, frames: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Scenes [n, S] and None, or frames [n, T, D] and times [n, T] in ms, of clips [n, samples]."""
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
                f"--module {self.name}: expected {wanted} from {function.__name__} for {len(audio)}, found {shapes}"
            )
        if not all(np.isfinite(x).all() for x in arrays):  # nor stored: the module may be mended
            raise SystemConfigError(f"--module {self.name}: expected finite embeddings and times, found others")
        return arrays[0].astype(np.float32), arrays[1].astype(np.float64) if frames else None


def embed_task_by_module(module: Module, task: Task, folder: Path) -> None:
    """Embed a task's clips by a HEAR module, or go on with it.

    Clips of one length go together, as many as the kit would take. The files are as the kit has them:
    ``<split>/<file>.embedding.npy``, and for events ``<split>/<file>.timestamps.json``.

    Args:
        module: the module.
        task: as read.
        folder: for the embeddings.

    Raises:
        InputError: clips that cannot be decoded.
        StoreError: the folder cannot be written, or holds the embeddings of another module.
        SystemConfigError: the module fails.
    """
    frames = task.embedding == "event"
    _check_module(module, folder)
    for split in task.splits:
        target = folder / split
        store.open_folder(target)
        source = _audio_folder(task, module.rate) / split
        # The times are written first: where an embedding stands, it is complete.
        missing = [file for file in task.clips[split] if not (target / f"{file}.embedding.npy").is_file()]
        for files, audio in _batches(task, source, missing, module.rate):
            try:
                embeddings, times = module(audio, frames=frames)
            except GuraError:
                raise
            except Exception as error:  # whatever the module's own code raises
                raise SystemConfigError(
                    f"--module {module.name}, {task.name}/{split}: {type(error).__name__}: {error}"
                ) from error
            for i, file in enumerate(files):
                if times is not None:
                    _write(target / f"{file}.timestamps.json", json.dumps(times[i].tolist()).encode())
                content = io.BytesIO()
                np.save(content, embeddings[i])
                _write(target / f"{file}.embedding.npy", content.getvalue())


def read_embedding(folder: Path, split: str, file: str) -> tuple[np.ndarray, np.ndarray | None]:
    """An embedding as HEAR's kit stores it: a lookup, given the task's folder of embeddings."""
    path = folder / split / f"{file}.embedding.npy"
    try:
        embedding = np.load(path, allow_pickle=False)
        times = None
        if embedding.ndim > 1:
            path = folder / split / f"{file}.timestamps.json"
            times = np.asarray(json.loads(path.read_bytes()), np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path}: expected an embedding, found: {error}: delete it, and run this again") from None
    return embedding, times


def _check_module(module: Module, folder: Path) -> None:
    store.open_folder(folder)
    description = {"module": module.name, "weights": module.weights, "sample_rate": module.rate}
    path = folder / MODULE_FILE
    try:
        there = json.loads(path.read_bytes())
    except FileNotFoundError:
        store.write_json(folder, MODULE_FILE, description)
        return
    except (OSError, ValueError):
        there = None
    if there != description:
        raise StoreError(
            f"{folder}: expected embeddings by {description}, found those of {there}: choose another --out"
        )


def _audio_folder(task: Task, rate: int) -> Path:
    folder = task.folder / str(rate)
    if not folder.is_dir():
        raise InputError(
            f"{task.folder}: expected a folder {rate}, of audio at the module's sample rate, found none: "
            "HEAR publishes each task at 16000, 22050, 32000, 44100 and 48000 Hz"
        )
    return folder


def _batches(task: Task, folder: Path, files: Sequence[str], rate: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Clips that follow each other and are of one length, [n, samples]."""
    names: list[str] = []
    clips: list[np.ndarray] = []
    for file in files:
        clip = _decode(folder / file, rate)
        if isinstance(clip, str):
            raise InputError(f"{task.name}: expected clips that can be read, found {clip}")
        if clips and (len(clip) != len(clips[0]) or (len(clips) + 1) * len(clip) > BATCH_SECONDS * SAMPLE_RATE):
            yield names, np.stack(clips)
            names, clips = [], []
        names.append(file)
        clips.append(clip)
    if clips:
        yield names, np.stack(clips)


def _decode(path: Path, rate: int) -> np.ndarray | str:
    """[samples] float32 at the file's own rate, or why not."""
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


def _write(path: Path, content: bytes) -> None:
    """A file, whole or not at all. (The store's own way looks through the folder each time.)"""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise store.cannot_write(path.parent, error) from None
