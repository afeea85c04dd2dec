"""Checks of an encoder and of a family of encoders, for errors in words where one from outside breaks its promises."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.audio import MAX_RATE, MIN_RATE, is_rate
from gura_jax.convert.keys import KeyTable
from gura_jax.errors import SystemConfigError
from gura_jax.models.encoder import Encoder, Family, FrameGrid, Options, Output, Preset

PADDING_BOUND = 1e-5  # relative: rounding alone; a clip that sees its padding is off by far more
_CHECKED_HOPS = (7, 12)  # frames of the two clips that a new family is tried on


def config_of(family: Family, fields: Mapping[str, Any]) -> Any:
    """A family's config from its fields, as a manifest holds them.

    Raises:
        SystemConfigError: unknown or missing fields, or values that no config has.
    """
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return family.config(**values)
    except TypeError as error:
        raise SystemConfigError(f"architecture: {error}") from None


def check_row(family: Any) -> None:
    """Refuse a family whose fields are not what they should be.

    Raises:
        SystemConfigError: naming the field.
    """
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
        SystemConfigError: see :func:`gura_jax.register`.
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
        again = config_of(family, json.loads(json.dumps(dataclasses.asdict(config))))  # as a manifest holds it
        same = bool(again == config and hash(again) == hash(config))
    except (TypeError, ValueError) as error:
        raise SystemConfigError(
            f"{where}: expected a frozen config whose fields JSON can hold, found: {error}"
        ) from None
    if not same:
        raise SystemConfigError(f"{where}: expected a config that its own fields make again, found {again!r}")
    with _foreign(f"{where}: build: expected an encoder of a tiny config"):
        encoder = family.build(config.tiny(), Options())
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
    if not is_rate(rate):
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


@contextlib.contextmanager
def _foreign(message: str) -> Iterator[None]:
    """Run an encoder's own code: an exception of it becomes a SystemConfigError that begins with the message."""
    try:
        yield
    except SystemConfigError:
        raise
    except Exception as error:
        raise SystemConfigError(f"{message}, found {type(error).__name__}: {error}") from error


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_outputs(encoder: Encoder, where: str) -> None:
    """Run a small encoder on two clips alone and together, and compare."""
    grid = encoder.grid
    shortest = max(grid.window, encoder.shortest)
    lengths = [shortest + n * grid.hop + grid.hop // 3 for n in _CHECKED_HOPS]
    rng = np.random.default_rng(0)
    clips = [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in lengths]
    initial = initial_params(encoder, jax.random.key(0), where)
    params = encoder.prepare(dict(initial))
    check_traced(encoder, params, where)
    for method, found in (("abstract_params", encoder.abstract_params()), ("restore", encoder.restore(params))):
        if not isinstance(found, Mapping) or {k: tuple(v.shape) for k, v in found.items()} != {
            k: tuple(v.shape) for k, v in initial.items()
        }:
            raise SystemConfigError(f"{where}: {method}: expected the names and shapes of init's weights, found others")
    if set(encoder.depths(params)) != set(params):
        raise SystemConfigError(f"{where}: depths: expected the names of the weights that are held, found others")
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
        with _foreign(f"{where}: expected a call that JAX can trace"):
            return run(params, audio, counts)

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
    with _foreign(f"{where}: init: expected weights"):
        params = encoder.init(key)
        jax.tree.map(jnp.shape, params)
    if not isinstance(params, Mapping):
        raise SystemConfigError(f"{where}: init: expected arrays by name, found {type(params).__name__}")
    return params


def check_traced(encoder: Encoder, params: Any, where: str) -> None:
    """Trace a call of an encoder, and refuse results that are not of the sizes and types that it states.

    Raises:
        SystemConfigError: see above; or a call that JAX cannot trace.
    """
    B, D = 2, encoder.feature_size
    samples = max(encoder.grid.window, encoder.shortest) + max(_CHECKED_HOPS) * encoder.grid.hop
    shapes = jax.ShapeDtypeStruct((B, samples), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32)
    with _foreign(f"{where}: expected a call that JAX can trace"):
        out = jax.eval_shape(encoder, params, *shapes)
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
