"""The identity of a run: its system, inputs and settings, which must be the same when it is resumed."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gura_jax import checkpoint
from gura_jax.dataset.commit import ELSEWHERE
from gura_jax.dataset.places import Place
from gura_jax.dataset.sinks import DEFAULT
from gura_jax.dataset.states import States
from gura_jax.dataset.table import Settings, batch_seconds
from gura_jax.errors import StoreError
from gura_jax.fusion import FusedMember
from gura_jax.model import Model
from gura_jax.systems import Member, System

if TYPE_CHECKING:
    import pyarrow as pa

HASHED_ROWS = 1 << 16  # at once
# Runs that differ in any of these are different runs.
_IDENTITY = (
    "system", "random_weights", "dtype", "precision", "resampler", "sample_rate", "storage", "scene_embedding_size",
    "timestamp_embedding_size", "window", "max_duration", "shard_hours", "batch_seconds", "code_version",
    "inputs_sha256", "plan_sha256", "format", "states", "fused_from",
)  # fmt: skip


def describe(model: Model, inputs_sha256: str, settings: Settings) -> dict[str, Any]:
    """Describe a run, without its plan, as ``run.json`` has it."""
    run = {
        "system": describe_system(model),
        "random_weights": model.random_members,
        "dtype": model.dtype,
        "precision": model.compilation.precision,
        "resampler": f"soxr HQ {version('soxr')}",
        "sample_rate": model.sample_rate,
        "storage": settings.storage,
        "scene_embedding_size": model.scene_embedding_size,
        "timestamp_embedding_size": model.timestamp_embedding_size if settings.timestamps else None,
        "window": settings.window,
        "max_duration": settings.max_duration,
        "shard_hours": settings.shard_hours,
        "batch_seconds": batch_seconds(model, settings),
        "code_version": version("gura-jax"),
        "inputs_sha256": inputs_sha256,
        "versions": {name: version(name) for name in ("jax", "flax", "soundfile", "av") if find_spec(name)},
    }
    if settings.keep is not None:
        run["states"] = States.of_model(model, settings.keep).as_json()
    return run | _format(settings.format)


def describe_system(model: Model) -> dict[str, Any]:
    """Describe a system and its weights, as ``run.json`` has them."""
    members = zip(model.system.members, model.fusion.members, strict=True)
    return with_members(model.system, [_member(model, *both) for both in members])


def with_members(system: System, members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Describe a system whose members are described already."""
    described: dict[str, Any] = {
        "name": system.name,
        "members": list(members),
        "combination": system.combination,
        "feature_size": system.feature_size,
        "scene_groups": system.scene_groups,
    }
    if system.sample_rate is not None:  # stores of earlier versions do not have it
        described["sample_rate"] = system.sample_rate
    return described


def _format(name: str) -> dict[str, str]:
    """Return the entry of a format; none for the default, as stores of earlier versions do not have it."""
    return {} if name == DEFAULT else {"format": name}


def in_format(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return ``run.json`` of the same run in another format of the store, with its fingerprint."""
    same = {key: value for key, value in run.items() if key not in ("format", "fingerprint")} | _format(name)
    return same | {"fingerprint": fingerprint(same)}


def _member(model: Model, member: Member, fused: FusedMember) -> dict[str, Any]:
    named = isinstance(member.encoder, str)
    weights = dict(model.weights[member.name])
    if not {"fingerprint", "seed"} & set(weights):  # of an encoder that is an object, or changed since they were loaded
        weights["fingerprint"] = _params_sha256(model.params[member.name])
    described = {
        "name": member.name,
        "encoder": member.encoder if named else type(member.encoder).__qualname__,
        "layers": as_json(member.layers),
        "architecture": None if fused.config is None else as_json(dataclasses.asdict(fused.config)),
        "weights": weights,
    }
    if member.scene != "frames":  # stores of earlier versions do not have it
        described["scene"] = member.scene
    if fused.options.normalise:
        described["normalise"] = True
    return described


def as_json(value: Any) -> Any:
    """Return a value as it is when read back from JSON: tuples as lists."""
    return json.loads(json.dumps(value))


def describe_plan(table: "pa.Table", sample_rate: int) -> dict[str, Any]:
    """Describe a run's plan, as ``run.json`` has it."""
    return {
        "plan_sha256": table_sha256(table),
        "clips": len(table),
        "shards": len(np.unique(table["shard"].to_numpy())),
        "seconds": float(table["samples"].to_numpy().sum() / sample_rate),
    }


def fingerprint(run: Mapping[str, Any]) -> str:
    """Return the hash of a run's identity."""
    content = {name: run[name] for name in _IDENTITY if name in run}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_same(place: Place, run: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Refuse to resume a run that is another one.

    Raises:
        StoreError: names what differs.
    """
    names = [name for name in _IDENTITY if name != "plan_sha256"]
    both = ({"format": DEFAULT, **content} for content in (run, description))
    then, now = ({name: content.get(name) for name in names} for content in both)
    if found := differences(then, now):
        raise StoreError(
            f"{place}: expected the run that began here, found another:\n{found}\n"
            f"go on with the same inputs and options, {ELSEWHERE}"
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return a line for each value in which two descriptions differ; none if they are the same."""
    flat = _flat(dict(then)), _flat(dict(now))
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(name) != flat[1].get(name)]
    return "\n".join(f"    {name}: {flat[0].get(name)} then, {flat[1].get(name)} now" for name in names)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(x, dict) for x in value):
        items = ((x.get("name", i) if isinstance(x, dict) else i, x) for i, x in enumerate(value))
    else:
        return {prefix: value}
    return {k: v for key, x in items for k, v in _flat(x, f"{prefix}.{key}" if prefix else str(key)).items()}


def table_sha256(table: "pa.Table") -> str:
    """Return the hash of a table's columns, types and values, whatever wrote it and however it is divided."""
    digest = hashlib.sha256(str([(field.name, str(field.type)) for field in table.schema]).encode())
    for start in range(0, len(table), HASHED_ROWS):
        for column in table.slice(start, HASHED_ROWS).columns:
            for part in _canonical(column):
                digest.update(part)
    return digest.hexdigest()


def _canonical(column: "pa.ChunkedArray") -> Iterator[bytes | memoryview]:
    """Bytes of a column that depend on its values alone: nulls, then lengths and content, or numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    yield np.asarray(column.is_valid()).tobytes()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        filled = pc.fill_null(column, "")  # pyright: ignore[reportAttributeAccessIssue]
        yield np.asarray(pc.binary_length(filled)).astype(np.int64).tobytes()  # pyright: ignore[reportAttributeAccessIssue]
        for array in filled.chunks:
            _, offsets, content = array.buffers()
            ends = np.frombuffer(offsets, np.int32 if pa.types.is_string(kind) else np.int64)
            yield memoryview(content)[ends[array.offset] : ends[array.offset + len(array)]] if content else b""
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        zero = pa.scalar(0, kind)
        yield np.ascontiguousarray(pc.fill_null(column, zero)).tobytes()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        yield json.dumps(column.to_pylist(), default=str).encode()


def _params_sha256(params: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    hashes = {jax.tree_util.keystr(path): checkpoint.array_sha256(np.asarray(leaf)) for path, leaf in leaves}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
