"""The tables of encoder families and of named encoders; families from outside the package are registered here."""

import dataclasses
import importlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.audio import MAX_RATE, MIN_RATE
from gura_jax.convert.keys import KeyTable
from gura_jax.errors import SystemConfigError, expected
from gura_jax.models.crepe import CREPE
from gura_jax.models.encoder import Encoder, Family, FrameGrid, Options, Output, Preset
from gura_jax.models.wav2vec2 import HUBERT, WAV2VEC2

FAMILIES: dict[str, Family] = {family.name: family for family in (HUBERT, WAV2VEC2, CREPE)}
ENCODERS: dict[str, Preset] = {name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}

PADDING_BOUND = 1e-5  # relative: rounding alone; a clip that sees its padding is off by far more
_CHECKED_HOPS = (7, 12)  # frames of the two clips that a new family is tried on


def find_family(model_type: object) -> Family:
    """The family of this name.

    Raises:
        SystemConfigError: there is none.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SystemConfigError(
            f"model_type {expected(model_type, FAMILIES)} (gura_jax.register adds a family of your own)"
        )
    return FAMILIES[model_type]


def find_preset(name: str) -> Preset:
    """The named encoder of this name.

    Raises:
        SystemConfigError: there is none, or it is no :class:`Preset`.
    """
    if name not in ENCODERS:
        raise SystemConfigError(f"encoder {expected(name, ENCODERS)}")
    preset = ENCODERS[name]
    if not isinstance(preset, Preset):
        raise SystemConfigError(f"ENCODERS[{name!r}]: expected a gura_jax.Preset(config, source), found {preset!r}")
    return preset


def config_from_source(content: Mapping[str, Any]) -> Any:
    """The config that a ``config.json`` describes, of the family that its ``model_type`` names.

    Raises:
        SystemConfigError: a family that is not known, or a config that it does not support.
    """
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SystemConfigError(
            f"model_type: expected one of {', '.join(FAMILIES)}, found {model_type!r}; "
            "gura_jax.register adds a family of your own"
        )
    kind = FAMILIES[model_type].config
    try:
        return kind.from_source(content)
    except (TypeError, LookupError, AttributeError) as error:
        raise SystemConfigError(
            f"its config makes no {kind.__name__} of the family {model_type!r}: {type(error).__name__}: {error}"
        ) from None


def build_encoder(config: Any, options: Options) -> Encoder:
    """The encoder of a config.

    Raises:
        SystemConfigError: a config of no known family, or options that its family does not have.
    """
    return find_family(getattr(config, "model_type", None)).build(config, options)


def config_from_dict(fields: Mapping[str, Any]) -> Any:
    """The inverse of ``dataclasses.asdict`` on a config.

    Raises:
        SystemConfigError: a family that is not known, unknown or missing fields, or values that no config has.
    """
    return _config_of(find_family(fields.get("model_type")), fields)


def _config_of(family: Family, fields: Mapping[str, Any]) -> Any:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return family.config(**values)
    except TypeError as error:
        raise SystemConfigError(f"architecture: {error}") from None


def abstract_params(config: Any) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every weight in a checkpoint of this config, by dotted path."""
    return build_encoder(config, Options()).abstract_params()


def register(family: Family) -> None:
    """Add a family: systems, ``convert``, ``embed``, ``parity``, ``evaluate`` and the HEAR modules then know it.

    A tiny encoder of it, with random weights, is built and run first: alone and padded, its results must agree.

    Raises:
        SystemConfigError: the name or a preset's name is taken, or the encoder does not keep what
            :class:`gura_jax.Encoder` promises; says what was expected and found.
    """
    _check_row(family)
    if family.name in FAMILIES:
        raise SystemConfigError(f"family {family.name!r}: expected a name that is free, found it registered")
    taken = sorted(set(family.presets) & set(ENCODERS))
    if taken:
        raise SystemConfigError(
            f"family {family.name!r}: expected names of encoders that are free, found {', '.join(taken)}"
        )
    check_family(family)
    FAMILIES[family.name] = family
    ENCODERS.update(family.presets)


MODULES_VARIABLE = "GURA_JAX_FAMILIES"  # names of modules that register families, separated by commas


def import_families() -> None:
    """Import the modules that ``GURA_JAX_FAMILIES`` names, which register families of their own.

    For the command line, the HEAR modules and workers on other hosts; in Python, import them yourself.

    Raises:
        SystemConfigError: one cannot be imported.
    """
    for name in filter(None, os.environ.get(MODULES_VARIABLE, "").replace(" ", "").split(",")):
        try:
            importlib.import_module(name)
        except SystemConfigError:
            raise
        except Exception as error:  # its own code runs
            raise SystemConfigError(
                f"{MODULES_VARIABLE}: expected modules to import, found that {name} raises {type(error).__name__}: "
                f"{error} (PYTHONPATH says where modules are)"
            ) from error


def _check_row(family: Any) -> None:
    """Refuse a family whose fields are not what they should be."""
    if not isinstance(family, Family):
        raise SystemConfigError(f"expected a gura_jax.Family to register, found {family!r}")
    where = f"family {family.name!r}"
    if not isinstance(family.name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", family.name):
        raise SystemConfigError(f"{where}: name: expected letters, digits, '_', '-' and '.', found {family.name!r}")
    for field, kind in (("keys", KeyTable), ("presets", Preset)):
        table = getattr(family, field)
        if not isinstance(table, Mapping) or not all(isinstance(value, kind) for value in table.values()):
            raise SystemConfigError(f"{where}: {field}: expected a mapping to {kind.__name__}, found {table!r}")
    if not isinstance(family.reference, str):
        raise SystemConfigError(f"{where}: reference: expected the dotted name of a class, found {family.reference!r}")
    if family.scene_hop is not None and not (_is_count(family.scene_hop) and family.scene_hop >= 1):
        raise SystemConfigError(
            f"{where}: scene_hop: expected a positive number of samples, found {family.scene_hop!r}"
        )


def check_family(family: Family) -> None:
    """Try a tiny encoder of a family on two clips, alone and in one padded batch.

    Raises:
        SystemConfigError: see :func:`register`.
    """
    where = f"family {family.name!r}"
    if not (dataclasses.is_dataclass(family.config) and isinstance(family.config, type)):
        raise SystemConfigError(f"{where}: config: expected a dataclass, found {family.config!r}")
    for method in ("from_source", "tiny"):
        if not callable(getattr(family.config, method, None)):
            raise SystemConfigError(f"{where}: config {family.config.__name__}: expected a method {method}, found none")
    try:
        config = next(iter(family.presets.values())).config if family.presets else family.config()
    except TypeError as error:
        raise SystemConfigError(
            f"{where}: expected a preset, or a config whose fields have defaults: {error}"
        ) from None
    for preset in (config, *(p.config for p in family.presets.values())):
        if getattr(preset, "model_type", None) != family.name:
            raise SystemConfigError(
                f"{where}: expected configs whose model_type is {family.name!r}, found "
                f"{getattr(preset, 'model_type', None)!r} in {preset!r}"
            )
    try:
        again = _config_of(family, json.loads(json.dumps(dataclasses.asdict(config))))  # as a manifest holds it
        same = bool(again == config and hash(again) == hash(config))
    except (TypeError, ValueError) as error:
        raise SystemConfigError(
            f"{where}: expected a frozen config whose fields JSON can hold, found: {error}"
        ) from None
    if not same:
        raise SystemConfigError(f"{where}: expected a config that its own fields make again, found {again!r}")
    try:
        encoder = family.build(config.tiny(), Options())
    except SystemConfigError:
        raise
    except Exception as error:
        raise SystemConfigError(
            f"{where}: build: expected an encoder of a tiny config, found {type(error).__name__}: {error}"
        ) from error
    check_encoder(encoder, where)
    _check_outputs(encoder, where)


def check_encoder(encoder: Any, where: str) -> None:
    """Refuse an object without the interface of :class:`gura_jax.Encoder`, before anything is computed.

    Raises:
        SystemConfigError: naming what is missing or impossible.
    """
    for method in ("init", "states", "abstract_params", "prepare", "restore", "derive"):
        if not callable(getattr(encoder, method, None)):
            raise SystemConfigError(f"{where}: expected a subclass of gura_jax.Encoder, found one without {method}()")
    if not callable(encoder):
        raise SystemConfigError(f"{where}: expected a subclass of gura_jax.Encoder, found one that cannot be called")
    try:
        hash(encoder)
    except TypeError as error:
        raise SystemConfigError(f"{where}: expected an encoder that can be hashed, found: {error}") from None
    rate: Any = getattr(encoder, "sample_rate", None)
    if not _is_count(rate) or not MIN_RATE <= rate <= MAX_RATE:
        raise SystemConfigError(
            f"{where}: sample_rate: expected a whole number of Hz from {MIN_RATE} to {MAX_RATE}, found {rate!r}"
        )
    size: Any = getattr(encoder, "feature_size", None)
    if not _is_count(size) or size < 1:
        raise SystemConfigError(f"{where}: feature_size: expected a positive integer, found {size!r}")
    for name in ("num_states", "pooled_size"):
        value: Any = getattr(encoder, name, None)
        if not _is_count(value) or value < 0:
            raise SystemConfigError(f"{where}: {name}: expected an integer of 0 or more, found {value!r}")
    grid: Any = getattr(encoder, "grid", None)
    if not isinstance(grid, FrameGrid):
        raise SystemConfigError(f"{where}: grid: expected a FrameGrid(hop, offset, window), found {grid!r}")
    hop, offset, window = grid
    placed = isinstance(offset, (int, float)) and 0 <= offset < float("inf")
    if not (_is_count(hop) and hop >= 1 and _is_count(window) and window >= 0 and placed):
        raise SystemConfigError(
            f"{where}: grid: expected a hop of at least 1 sample, a window and an offset of at least 0, found {grid!r}"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_outputs(encoder: Encoder, where: str) -> None:
    """Run a small encoder on two clips alone and together, and compare."""
    grid = encoder.grid
    lengths = [grid.window + n * grid.hop + grid.hop // 3 for n in _CHECKED_HOPS]
    rng = np.random.default_rng(0)
    clips = [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in lengths]
    initial = initial_params(encoder, jax.random.key(0), where)
    params = encoder.prepare(initial)
    check_traced(encoder, params, where)
    for method, found in (("abstract_params", encoder.abstract_params()), ("restore", encoder.restore(params))):
        if not isinstance(found, Mapping) or {k: tuple(v.shape) for k, v in found.items()} != {
            k: tuple(v.shape) for k, v in initial.items()
        }:
            raise SystemConfigError(f"{where}: {method}: expected the names and shapes of init's weights, found others")
    if not isinstance(encoder.derive(params), Mapping):
        raise SystemConfigError(f"{where}: derive: expected arrays by name, found {encoder.derive(params)!r}")

    names: list[str] = []

    @jax.jit
    def run(params: Any, audio: jax.Array, lengths: jax.Array) -> tuple[Any, dict[str, Any]]:
        with jax.default_matmul_precision("highest"):
            out = encoder(params, audio, lengths)
            try:
                states = [(name, value, counts) for name, value, counts in encoder.states(params, audio, lengths)]
            except (TypeError, ValueError) as error:
                raise SystemConfigError(
                    f"{where}: states(): expected (name, value, counts) of each part, found: {error}"
                ) from error
            names[:] = [name for name, _, _ in states]  # in their order, which jit does not keep
            return out, {name: (value, counts) for name, value, counts in states}

    def call(chosen: list[np.ndarray]) -> tuple[Output, dict[str, Any]]:
        samples = max(map(len, chosen))
        audio = np.stack([np.pad(clip, (0, samples - len(clip))) for clip in chosen])
        counts = np.array([len(clip) for clip in chosen], np.int32)
        try:
            return run(params, audio, counts)
        except SystemConfigError:
            raise
        except Exception as error:
            raise SystemConfigError(
                f"{where}: expected a call that JAX can trace, found {type(error).__name__}: {error}"
            ) from error

    together, parts = call(clips)
    _check_values(encoder, where, together, lengths)
    if names != list(encoder.parts):
        raise SystemConfigError(
            f"{where}: parts: expected the names that states() yields, {', '.join(names)}, found "
            f"{', '.join(encoder.parts)}"
        )
    missing = [f"state {i}" for i in range(encoder.num_states) if f"state {i}" not in parts]
    if missing:
        raise SystemConfigError(
            f"{where}: states(): expected {encoder.num_states} hidden states, found no {missing[0]}"
        )
    for b, clip in enumerate(clips):
        alone, own = call([clip])
        count = grid.count(len(clip))
        pairs = {"frames": (together.frames[b, :count], alone.frames[0, :count])}
        if together.pooled is not None and alone.pooled is not None:
            pairs["pooled"] = together.pooled[b], alone.pooled[0]
        for name, (value, counts) in own.items():
            if int(counts[0]) != int(parts[name][1][b]):
                raise SystemConfigError(
                    f"{where}: part {name!r}: expected {counts[0]} frames, found {parts[name][1][b]}"
                )
            pairs[f"part {name!r}"] = parts[name][0][b, : int(counts[0])], value[0, : int(counts[0])]
        for name, (found, wanted) in pairs.items():
            distance = _distance(np.asarray(found), np.asarray(wanted))
            if not distance <= PADDING_BOUND:
                raise SystemConfigError(
                    f"{where}: {name}: expected the same of a clip alone and in a padded batch (to {PADDING_BOUND:g}), "
                    f"found a relative difference of {distance:.1e}: mask what lies past the clip's end, and let no "
                    "clip depend on another"
                )


def initial_params(encoder: Encoder, key: jax.Array, where: str) -> Any:
    """An encoder's initial weights.

    Raises:
        SystemConfigError: its ``init`` raises, or gives something other than arrays by name.
    """
    try:
        params = encoder.init(key)
        jax.tree.map(jnp.shape, params)
    except SystemConfigError:
        raise
    except Exception as error:  # its own code runs
        raise SystemConfigError(f"{where}: init: expected weights, found {type(error).__name__}: {error}") from error
    if not isinstance(params, Mapping):
        raise SystemConfigError(f"{where}: init: expected arrays by name, found {type(params).__name__}")
    return params


def check_traced(encoder: Encoder, params: Any, where: str) -> None:
    """Trace a call of an encoder, and refuse results that are not of the sizes and types that it states.

    Raises:
        SystemConfigError: see above; or a call that JAX cannot trace.
    """
    B, D = 2, encoder.feature_size
    samples = encoder.grid.window + max(_CHECKED_HOPS) * encoder.grid.hop
    shapes = jax.ShapeDtypeStruct((B, samples), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32)
    try:
        out = jax.eval_shape(encoder, params, *shapes)
    except SystemConfigError:
        raise
    except Exception as error:  # its own code runs
        raise SystemConfigError(
            f"{where}: expected a call that JAX can trace, found {type(error).__name__}: {error}"
        ) from error
    if not isinstance(out, Output):
        raise SystemConfigError(f"{where}: expected an Output(frames, counts), found {type(out).__name__}")
    checks: list[tuple[str, Any, tuple[int, ...], Any]] = [
        ("frames", out.frames, (B, encoder.grid.count(samples), D), jnp.float32),
        ("counts", out.counts, (B,), jnp.int32),
    ]
    if encoder.pooled_size or out.pooled is not None:
        checks.append(("pooled", out.pooled, (B, encoder.pooled_size), jnp.float32))
    for name, array, shape, dtype in checks:
        found = (tuple(array.shape), str(array.dtype)) if hasattr(array, "dtype") else None
        if found != (shape, jnp.dtype(dtype).name):
            raise SystemConfigError(
                f"{where}: {name}: expected {list(shape)} {jnp.dtype(dtype).name}, found "
                + (
                    "none"
                    if array is None
                    else type(array).__name__
                    if found is None
                    else f"{list(found[0])} {found[1]}"
                )
            )


def _check_values(encoder: Encoder, where: str, out: Output, lengths: list[int]) -> None:
    wanted = [encoder.grid.count(n) for n in lengths]
    if np.asarray(out.counts).tolist() != wanted:
        raise SystemConfigError(
            f"{where}: counts: expected those of its grid, {wanted}, found {np.asarray(out.counts).tolist()}"
        )
    if not np.isfinite(np.asarray(out.frames)).all():
        raise SystemConfigError(f"{where}: frames: expected finite values also past a clip's end, found others")


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative Euclidean distance, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny))
