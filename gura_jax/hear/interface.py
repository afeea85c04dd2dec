"""The functions of every HEAR module: PyTorch tensors outside, JAX inside.

Source: https://hearbenchmark.com/hear-api.html. Tensors and arrays share memory (DLPack) if one device holds both, and
nothing has to be padded, resampled or concatenated.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import numpy as np
import torch

from gura_jax import checkpoint
from gura_jax.audio import PEAK_LIMIT, check_audio, resample, resampled_length, samples_before
from gura_jax.batching import Batch, bucket_length, pack
from gura_jax.errors import AudioError, CheckpointError, SystemConfigError, expected
from gura_jax.files import is_folder
from gura_jax.loading import is_hugging_face, load_model
from gura_jax.model import BATCH_SIZE, Model
from gura_jax.systems import System, find_system

OPTIONS = ("system", "weights", "size", "dtype")
OPTIONS_VARIABLE = "GURA_JAX_HEAR_OPTIONS"  # a JSON object: hearvalidator passes no options

RATES = (16_000, 22_050, 32_000, 44_100, 48_000)  # Hz: those that HEAR publishes its tasks at

# A single clip comes from a task of mixed lengths, each to be compiled for, and compiling takes longer than computing
# up to half a minute: with fewer buckets than a batch has, clips from half a second to 30 s have 11 shapes, not 24.
LONE_BUCKETS_PER_OCTAVE = 2
SHORTEST_LONE_BUCKET = 1.0  # s
LONGEST_LONE_BUCKET = 32.0  # s

FLOAT32_BITS = 24  # of the significand
JAX_PLATFORM = {"cpu": "cpu", "cuda": "gpu"}  # by torch's name


class HearModel(torch.nn.Module):
    """A gura_jax model with the interface of HEAR's tools.

    It computes on JAX's first local device, in the ``dtype`` that it was loaded with. ``.to(device)`` chooses the torch
    device of the results; there are no torch weights to move or convert.

    Attributes:
        model: the :class:`gura_jax.Model`.
        sample_rate: Hz; the model's, or the lowest of HEAR's rates above it, or 48000.
        scene_embedding_size: S, the size of a scene embedding.
        timestamp_embedding_size: D, the size of a timestamp embedding.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.sample_rate = next((rate for rate in RATES if rate >= model.sample_rate), RATES[-1])
        self.scene_embedding_size = int(model.scene_embedding_size)
        self.timestamp_embedding_size = int(model.timestamp_embedding_size)
        # Moved by .to, .cuda and .cpu; its dtype is not changed by .half and the like.
        self.place: torch.Tensor
        self.register_buffer("place", torch.empty(0, dtype=torch.uint8), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.model!r}, results on {self.place.device}"


def load(system: str | None, model_file_path: str | Path, options: Mapping[str, Any]) -> HearModel:
    """Load the system.

    Args:
        model_file_path: a folder with a folder of weights for each member, by name, as ``gura-jax convert --out`` makes
            it; for a system of one member also its checkpoint, or its Hugging Face folder or file. By default, the
            checkpoint folder.
        options: ``weights``, ``size`` and ``dtype`` as for :func:`gura_jax.load_model`; for ``gura_jax.hear.custom``
            also ``system``, a name or the path of a TOML or YAML file. Defaults come from the environment variable
            ``GURA_JAX_HEAR_OPTIONS``, a JSON object.

    Raises:
        SystemConfigError: an option is unknown, or has an invalid value.
        CheckpointError: weights are missing, damaged, or of another architecture.
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
    # One device: HEAR's tools pass one batch at a time, and wait for its result.
    model = load_model(described, devices=jax.local_devices()[:1], **chosen)
    if model.random_members:
        names = ", ".join(model.random_members)
        warnings.warn(f"random weights for {names}: what they contribute means nothing", stacklevel=3)
    return HearModel(model)


def get_scene_embeddings(audio: torch.Tensor, model: HearModel) -> torch.Tensor:
    """Compute one embedding for each clip.

    Args:
        audio: [n, samples] at ``model.sample_rate`` in [-1, 1], on any device.
        model: from ``load_model``.

    Returns:
        [n, S] float32, on the device that ``model.to`` chose.

    Raises:
        AudioError: audio of another rank, type or range, with NaN, or too short for the system.
        SystemConfigError: the model is not from ``load_model``.
    """
    return _embed(_check(audio, model, "min_scene_samples"), model, "scenes")


def get_timestamp_embeddings(audio: torch.Tensor, model: HearModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute frames and their times; arguments and errors as for :func:`get_scene_embeddings`.

    Returns:
        [n, T, D] float32, and [n, T] float32 in milliseconds, evenly spaced.
    """
    audio = _check(audio, model, "min_samples")
    frames = _embed(audio, model, "frames")
    times = even_times(model.model.timestamps(_inner_length(model, audio.shape[1])))
    return frames, torch.from_numpy(times).to(frames.device).repeat(len(frames), 1)


def even_times(times: np.ndarray) -> np.ndarray:
    """Convert evenly spaced times [T] in milliseconds from float64 to float32, such that they stay evenly spaced.

    Rounded one by one, times past 8 s can be uneven by more than the 0.001 ms that HEAR allows. Therefore the step and
    the first time are rounded, such that every time is exact. Times that float32 represents exactly are not changed;
    those of all registered encoders are such times.
    """
    steps = len(times) - 1
    if steps == 0:
        return times.astype(np.float32)
    unit = 2.0 ** (math.frexp(times[-1])[1] - FLOAT32_BITS)  # float32 represents its multiples up to the last time
    step = round((times[-1] - times[0]) / steps / unit) * unit
    first = round(((times[0] + times[-1]) - steps * step) / 2 / unit) * unit
    return (first + step * np.arange(steps + 1)).astype(np.float32)


def bucket(clips: int, samples: int, sample_rate: int) -> int:
    """Return the length that the clips of a call are padded to."""
    if clips > 1 or samples > LONGEST_LONE_BUCKET * sample_rate:
        return bucket_length(samples)
    return bucket_length(max(samples, int(SHORTEST_LONE_BUCKET * sample_rate)), LONE_BUCKETS_PER_OCTAVE)


def _inner_length(model: HearModel, samples: int) -> int:
    """Return the length of a clip at the model's own rate."""
    return resampled_length(samples, model.sample_rate, model.model.sample_rate)


def _embed(audio: torch.Tensor, model: HearModel, kind: Literal["frames", "scenes"]) -> torch.Tensor:
    """Embed clips in batches of few shapes; returns [n, T, D] or [n, S]."""
    inner, rate = model.model, model.model.sample_rate
    n, samples = len(audio), _inner_length(model, audio.shape[1])
    # Sliced as torch views: JAX would compile a slice for every length.
    kept = slice(inner.num_frames(samples)) if kind == "frames" else slice(None)
    lengths = [bucket(n, samples, rate)] * n
    batches = pack(lengths, BATCH_SIZE, 1, platform=inner.platform, sample_rate=rate, exact=False, least=inner.least)
    results: list[torch.Tensor] = []
    for batch in batches:
        rows = audio[batch.clips[0] : batch.clips[-1] + 1]
        out = inner(*_padded(rows, batch, model), frames=kind == "frames", scenes=kind == "scenes")
        results.append(_to_torch(getattr(out, kind), model.place.device)[: len(rows), kept])
    return results[0] if len(results) == 1 else torch.cat(results)


def _padded(rows: torch.Tensor, batch: Batch, model: HearModel) -> tuple[Any, Any]:
    """Pad clips of one length to a batch; returns audio and lengths as the model takes them."""
    inner = model.model
    if inner.rates != (model.sample_rate,) or inner.sample_rate != model.sample_rate:
        clips = [resample(clip, model.sample_rate, inner.sample_rate) for clip in rows.cpu().numpy()]
        return inner.pad(clips, batch.rows, batch.samples)
    samples = rows.shape[1]
    missing = (0, batch.samples - samples, 0, batch.rows - len(rows))
    padded = torch.nn.functional.pad(rows, missing) if any(missing) else rows.contiguous()
    (device,) = inner.compilation.mesh.devices.flat
    return _to_jax(padded, device), np.full(batch.rows, samples, np.int32)


def _to_jax(tensor: torch.Tensor, device: Any) -> jax.Array | np.ndarray:
    """Share a tensor's memory with JAX if both use the same kind of device; else copy it to the host."""
    same = JAX_PLATFORM.get(tensor.device.type) == device.platform
    return jax.dlpack.from_dlpack(tensor) if same else tensor.cpu().numpy()


def _to_torch(array: jax.Array, device: torch.device) -> torch.Tensor:
    """Share an array's memory with torch if both use the same kind of device; else copy it."""
    (platform,) = {d.platform for d in array.devices()}
    if platform == JAX_PLATFORM.get(device.type):
        return torch.from_dlpack(array).to(device)
    return torch.tensor(np.asarray(array), device=device)


def _check(
    audio: torch.Tensor, model: HearModel, shortest: Literal["min_samples", "min_scene_samples"]
) -> torch.Tensor:
    """Check audio on the device that holds it; returns it as float32."""
    if not isinstance(model, HearModel):
        raise SystemConfigError(f"model: expected what load_model returned, found {type(model).__name__}")
    if not isinstance(audio, torch.Tensor) or audio.layout != torch.strided or audio.is_meta:
        found = f"{audio.layout} on {audio.device}" if isinstance(audio, torch.Tensor) else type(audio).__name__
        raise AudioError(f"audio: expected a dense torch tensor [n, samples], found {found}")
    audio, min_samples = audio.detach(), getattr(model.model, shortest)
    fine = audio.ndim == 2 and audio.is_floating_point() and len(audio) > 0
    fine = fine and _inner_length(model, audio.shape[1]) >= min_samples
    if not fine or not bool((audio.abs() <= PEAK_LIMIT).all()):
        _refuse(audio.cpu().numpy(), model, min_samples)
    return audio.float()


def _refuse(audio: np.ndarray, model: HearModel, min_samples: int) -> NoReturn:
    """Raise an AudioError that says why audio cannot be embedded; ``min_samples`` is at the model's own rate."""
    clips = check_audio(audio, sample_rate=model.sample_rate)
    shortest = samples_before(min_samples, model.sample_rate, model.model.sample_rate)
    raise AudioError(
        f"audio[0]: expected at least {shortest} samples ({1000 * shortest / model.sample_rate:g} ms) for "
        f"{model.model.system.name}, found {len(clips[0])}"
    )


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
    """Find the weights of each member whose description has none."""
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
