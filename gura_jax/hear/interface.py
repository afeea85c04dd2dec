"""The functions of every HEAR module: torch tensors outside, JAX inside.

Source: https://hearbenchmark.com/hear-api.html. Tensors and arrays share their memory (DLPack) where one device
holds both and nothing has to be padded or put together.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import torch

from gura_jax import checkpoint, parallel
from gura_jax.audio import PEAK_LIMIT, SAMPLE_RATE
from gura_jax.errors import AudioError, CheckpointError, SystemConfigError
from gura_jax.model import BATCH_SIZE, Model, is_hugging_face, load_model
from gura_jax.systems import System, expected, find_system, is_folder

OPTIONS = ("system", "weights", "size", "dtype")
OPTIONS_VARIABLE = "GURA_JAX_HEAR_OPTIONS"  # a JSON object: hearvalidator passes no options

# A lone clip comes from a task of mixed lengths, each to be compiled for: the buckets of a batch would be 24 shapes
# from half a second to 30 s, and these are 11. Longer clips take longer to compute than to compile.
LONE_BUCKETS_PER_OCTAVE = 2
SHORTEST_LONE_BUCKET = 1 << 14  # samples: 1.02 s
LONGEST_LONE_BUCKET = 1 << 19  # samples: 32.8 s

FLOAT32_BITS = 24  # of the significand
JAX_PLATFORM = {"cpu": "cpu", "cuda": "gpu"}  # by torch's name


class HearModel(torch.nn.Module):
    """A gura_jax model in the form that HEAR's tools take.

    It computes on JAX's first local device, in the ``dtype`` that it was loaded with. ``.to(device)`` says on which
    torch device the results are put; there are no torch weights to move or to convert.

    Attributes:
        model: the :class:`gura_jax.Model`.
        sample_rate: 16000, Hz.
        scene_embedding_size: S, the size of a scene embedding.
        timestamp_embedding_size: D, the size of a timestamp embedding.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.scene_embedding_size = int(model.scene_embedding_size)
        self.timestamp_embedding_size = int(model.timestamp_embedding_size)
        # What .to, .cuda and .cpu move; of a type that .half and the like leave alone.
        self.place: torch.Tensor
        self.register_buffer("place", torch.empty(0, dtype=torch.uint8), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.model!r}, results on {self.place.device}"


def load(system: str | None, model_file_path: str | Path, options: Mapping[str, Any]) -> HearModel:
    """Load the system.

    Args:
        model_file_path: a folder that holds each member's weights in a folder of its name, as ``gura-jax convert
            --out`` makes it; of a system with one member also its checkpoint or its Hugging Face folder or file.
            By default, the checkpoint folder.
        options: ``weights``, ``size`` and ``dtype``, as :func:`gura_jax.load_model` takes them, and in
            ``gura_jax.hear.custom`` ``system``, a name or the path of a TOML or YAML file. Those that are not
            given come from the environment variable ``GURA_JAX_HEAR_OPTIONS``, a JSON object.

    Raises:
        SystemConfigError: unknown options, or values that they cannot have.
        CheckpointError: weights that are missing, damaged, or of another architecture.
    """
    chosen = _environment_options() | dict(options)
    unknown = [f"option {expected(name, OPTIONS)}" for name in chosen if name not in OPTIONS]
    if unknown:
        raise SystemConfigError("; ".join(unknown))
    own = chosen.pop("system", None)
    if system is not None and own is not None:
        raise SystemConfigError(
            f"system: gura_jax.hear.{system} is the system {system}, found {own!r}: gura_jax.hear.custom takes any"
        )
    if system is None and own is None:
        raise SystemConfigError(
            "system: expected the name of a system or the path of a TOML or YAML file, found none: pass system=... "
            f"""(--model-options '{{"system": "..."}}' to heareval), or set {OPTIONS_VARIABLE}"""
        )
    described = find_system(system or str(own))
    if model_file_path:
        if "weights" in chosen:
            raise SystemConfigError(
                f"weights: expected either these or model_file_path, found {chosen['weights']!r} and {model_file_path}"
            )
        chosen["weights"] = _weights_at(Path(model_file_path), described)
    # One device: HEAR's tools pass a batch at a time, and wait for it.
    model = load_model(described, devices=jax.local_devices()[:1], **chosen)
    if model.random_members:
        names = ", ".join(model.random_members)
        warnings.warn(f"random weights for {names}: what they contribute means nothing", stacklevel=3)
    return HearModel(model)


def get_scene_embeddings(audio: torch.Tensor, model: HearModel) -> torch.Tensor:
    """One embedding a clip.

    Args:
        audio: [n, samples] at 16 kHz in [-1, 1], on any device.
        model: from ``load_model``.

    Returns:
        [n, S] float32, on the device that ``model.to`` was told.

    Raises:
        AudioError: audio of another rank, type or range, with NaN, or shorter than the system needs.
        SystemConfigError: a model that is not from ``load_model``.
    """
    return _embed(_check(audio, model, "min_scene_samples"), model, "scenes")


def get_timestamp_embeddings(audio: torch.Tensor, model: HearModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames and their times; arguments and errors as of :func:`get_scene_embeddings`.

    Returns:
        [n, T, D] float32, and [n, T] float32 in milliseconds, evenly spaced.
    """
    audio = _check(audio, model, "min_samples")
    frames = _embed(audio, model, "frames")
    times = even_times(model.model.timestamps(audio.shape[1]))
    return frames, torch.from_numpy(times).to(frames.device).repeat(len(frames), 1)


def even_times(times: np.ndarray) -> np.ndarray:
    """Evenly spaced times [T] in milliseconds, float64, as float32 that are evenly spaced too.

    Rounded one by one, times past 8 s can be uneven by more than HEAR's 0.001 ms. So the step and the first time
    are rounded, such that every time is exact. Times that float32 holds exactly, as those of all encoders of
    :data:`gura_jax.ENCODERS`, stay as they are.
    """
    steps = len(times) - 1
    if steps == 0:
        return times.astype(np.float32)
    unit = 2.0 ** (math.frexp(times[-1])[1] - FLOAT32_BITS)  # float32 holds every multiple of it up to the last time
    step = round((times[-1] - times[0]) / steps / unit) * unit
    first = round(((times[0] + times[-1]) - steps * step) / 2 / unit) * unit
    return (first + step * np.arange(steps + 1)).astype(np.float32)


def bucket(clips: int, samples: int) -> int:
    """The length that clips of a call are padded to."""
    if clips > 1 or samples > LONGEST_LONE_BUCKET:
        return parallel.bucket_length(samples)
    return max(SHORTEST_LONE_BUCKET, parallel.bucket_length(samples, LONE_BUCKETS_PER_OCTAVE))


def _embed(audio: torch.Tensor, model: HearModel, kind: Literal["frames", "scenes"]) -> torch.Tensor:
    """[n, T, D] or [n, S], in batches whose shapes are few."""
    inner, (n, samples) = model.model, audio.shape
    (device,) = inner.compilation.mesh.devices.flat
    # Views, and not JAX's slices, which would be compiled for every length.
    kept = slice(inner.num_frames(samples)) if kind == "frames" else slice(None)
    results: list[torch.Tensor] = []
    for batch in parallel.pack([bucket(n, samples)] * n, BATCH_SIZE, 1, exact=False):
        rows = audio[batch.clips[0] : batch.clips[-1] + 1]
        missing = (0, batch.samples - samples, 0, batch.rows - len(rows))
        padded = torch.nn.functional.pad(rows, missing) if any(missing) else rows.contiguous()
        lengths = np.full(batch.rows, samples, np.int32)
        out = inner(_to_jax(padded, device), lengths, frames=kind == "frames", scenes=kind == "scenes")
        results.append(_to_torch(getattr(out, kind), model.place.device)[: len(rows), kept])
    return results[0] if len(results) == 1 else torch.cat(results)


def _to_jax(tensor: torch.Tensor, device: Any) -> jax.Array | np.ndarray:
    """The same memory, where JAX computes on the same kind of device."""
    same = JAX_PLATFORM.get(tensor.device.type) == device.platform
    return jax.dlpack.from_dlpack(tensor) if same else tensor.cpu().numpy()


def _to_torch(array: jax.Array, device: torch.device) -> torch.Tensor:
    """The same memory, where it is on the same kind of device."""
    (platform,) = {d.platform for d in array.devices()}
    if platform == JAX_PLATFORM.get(device.type):
        return torch.from_dlpack(array).to(device)
    return torch.tensor(np.asarray(array), device=device)


def _check(
    audio: torch.Tensor, model: HearModel, shortest: Literal["min_samples", "min_scene_samples"]
) -> torch.Tensor:
    """Audio that can be embedded, float32; looked at where it is."""
    if not isinstance(model, HearModel):
        raise SystemConfigError(f"model: expected what load_model returned, found {type(model).__name__}")
    if not isinstance(audio, torch.Tensor) or audio.layout != torch.strided or audio.is_meta:
        found = f"{audio.layout} on {audio.device}" if isinstance(audio, torch.Tensor) else type(audio).__name__
        raise AudioError(f"audio: expected a dense torch tensor [n, samples], found {found}")
    audio, min_samples = audio.detach(), getattr(model.model, shortest)
    fine = audio.ndim == 2 and audio.is_floating_point() and len(audio) > 0 and audio.shape[1] >= min_samples
    if not fine or not bool((audio.abs() <= PEAK_LIMIT).all()):
        model.model.check(audio.cpu().numpy(), min_samples)  # raises, and says why
    return audio.float()


def _environment_options() -> dict[str, Any]:
    text = os.environ.get(OPTIONS_VARIABLE) or "{}"
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise SystemConfigError(f'{OPTIONS_VARIABLE}: expected a JSON object, as {{"dtype": "bfloat16"}}, found {text}')
    return options


def _weights_at(path: Path, system: System) -> dict[str, Path]:
    """Where the weights of each member are that does not bring its own."""
    members = [m.name for m in system.members if isinstance(m.encoder, str) and m.weights is None]
    if not path.is_file() and not is_folder(path):
        raise CheckpointError(f"model_file_path: expected a folder or a file of weights, found none at {path}")
    if path.is_file() or is_hugging_face(path) or (path / checkpoint.MANIFEST).is_file():
        if len(members) != 1:
            raise CheckpointError(
                f"model_file_path: expected a folder with the folders {', '.join(members)} for {system.name}, found "
                f"the weights of one encoder at {path}"
            )
        return {members[0]: path}
    missing = [name for name in members if not is_folder(path / name)]
    if missing:
        raise CheckpointError(
            f"model_file_path: expected the folders {', '.join(missing)} of {system.name} in {path}, found none: "
            f"gura-jax convert {' '.join(missing)} --out {path} makes those of registered encoders"
        )
    return {name: path / name for name in members}
