"""Converted checkpoints: an Orbax folder of arrays by dotted path, and a manifest that says what they are.

    checkpoints/NAME/manifest.json    architecture, source, hashes; written last
    checkpoints/NAME/params/          Orbax

A checkpoint is complete or absent: it is written under a temporary name and renamed.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.errors import CheckpointError, GuraError
from gura_jax.files import cache_folder, is_folder, new_folder, recover_folder
from gura_jax.models.encoder import Config
from gura_jax.models.families import config_from_dict

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MEMORY_GB = 0.1  # that Orbax holds beyond the arrays themselves; with more, loading is slower too
HASH_THREADS = 4  # each has one array in host memory
MAX_REASON = 200  # characters of another library's error

REDO = "remove it and run gura-jax convert again"
RESTORE = "restore it from a copy"  # of what Model.save wrote, and no conversion makes again
CHANGED = "changed from "  # begins the source of weights that were changed after loading
SAVED_SYSTEM = "system.json"  # in the folder of a saved model, beside a checkpoint for each member


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Description of a checkpoint's content and origin; the same source always gives the same manifest."""

    architecture: Config
    source: str
    source_sha256: Mapping[str, str]
    converter_version: str
    arrays_sha256: Mapping[str, str]
    normalise: bool = False  # whether clips are normalised first, unless a member says
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """One sha256 of the architecture and of all arrays."""
        content = {"architecture": _fields(self.architecture), "arrays": dict(self.arrays_sha256)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fields(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)  # pyright: ignore[reportArgumentType] - a protocol cannot say: a dataclass


def checkpoint_folder() -> Path:
    """Return the folder of checkpoints: ``GURA_JAX_CHECKPOINTS``, else a source checkout's, else one in the cache."""
    if chosen := os.environ.get("GURA_JAX_CHECKPOINTS"):
        return Path(chosen)
    checkout = Path(__file__).parent.parent
    if (checkout / "checkpoints" / "README.md").is_file() and (checkout / "pyproject.toml").is_file():
        return checkout / "checkpoints"
    return cache_folder() / "checkpoints"


def find_folder(name: str) -> Path:
    """Return the folder of this path; else that of the converted checkpoint of this name."""
    return Path(name) if is_folder(Path(name)) else checkpoint_folder() / name


def array_sha256(array: np.ndarray) -> str:
    """Hash an array's shape, type and bytes."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def arrays_sha256(params: Mapping[str, np.ndarray | jax.Array]) -> dict[str, str]:
    """Hash arrays as :func:`save` writes them; those on devices are copied to the host a few at a time.

    Args:
        params: arrays by dotted path, with any sharding over this process's devices.

    Returns:
        A manifest's ``arrays_sha256``.
    """

    def sha256(array: np.ndarray | jax.Array) -> str:
        host = _on_host(array) if isinstance(array, jax.Array) else array
        return array_sha256(host.astype(np.float32) if host.dtype == jnp.bfloat16 else host)

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(params, pool.map(sha256, params.values()), strict=True))


def _on_host(array: jax.Array) -> np.ndarray:
    """Return an array in host memory, put together there from its shards; no copy where one on a CPU has it whole."""
    shards = [shard for shard in _same_buffers(array).addressable_shards if shard.replica_id == 0]
    if len(shards) == 1:
        return np.asarray(shards[0].data)
    out = np.empty(array.shape, array.dtype)
    for shard in shards:
        out[shard.index] = np.asarray(shard.data)
    return out


def _same_buffers(array: jax.Array) -> jax.Array:
    """Return a new array over the same buffers; of a replicated one, over those of one device.

    JAX keeps what it copies to the host as long as the array that was copied: here, as long as the new one.
    """
    shards, sharding = array.addressable_shards, array.sharding
    if array.is_fully_replicated:
        shards = shards[:1]
        sharding = jax.sharding.SingleDeviceSharding(shards[0].device)
    return jax.make_array_from_single_device_arrays(array.shape, sharding, [shard.data for shard in shards])


def save(
    path: Path, params: Mapping[str, np.ndarray | jax.Array], manifest: Manifest, *, overwrite: bool = False
) -> None:
    """Write a checkpoint, complete or not at all.

    Args:
        path: the checkpoint's folder.
        params: arrays by dotted path, on any devices and with any sharding. Those of bfloat16 are written as float32,
            which is exact.
        manifest: their description; :func:`arrays_sha256` has the hashes for it.
        overwrite: replace the checkpoint that is there; it stays until the new one is complete.

    Raises:
        CheckpointError: ``path`` exists and is not to be replaced, or cannot be written.
    """
    import orbax.checkpoint as ocp

    recover_folder(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already: remove it, or pass --overwrite")
    try:
        with new_folder(path) as temporary:
            cpu = jax.devices("cpu")[0]
            with orbax_checkpointer(params.values(), alone=True) as checkpointer:
                # NumPy arrays as arrays of JAX's: Orbax would copy all of them at once before it writes.
                tree = {
                    name: _same_buffers(array) if isinstance(array, jax.Array) else jax.device_put(array, cpu)
                    for name, array in params.items()
                }
                if jax.process_count() > 1:  # Orbax takes one process's arrays for parts of all processes'
                    tree = {name: np.asarray(array) for name, array in tree.items()}
                float32 = jnp.dtype(jnp.float32)
                cast = {
                    name: ocp.SaveArgs(dtype=float32 if array.dtype == jnp.bfloat16 else None)
                    for name, array in tree.items()
                }
                checkpointer.save((temporary / "params").resolve(), args=ocp.args.PyTreeSave(tree, save_args=cast))
            content = dataclasses.asdict(manifest)
            with open(temporary / MANIFEST, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, sort_keys=True)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from None
    except ValueError as error:  # TensorStore's, as when the disk is full
        raise CheckpointError(f"cannot write the checkpoint {path}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """The first sentence of an error's message: TensorStore's go on for pages."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return re.split(r"\.\s", line, maxsplit=1)[0].rstrip(".")[:MAX_REASON]


def _advice(path: Path, source: str = "") -> str:
    """What to do about a damaged checkpoint, from ``source`` where its manifest says so."""
    saved = source == "random" or source.startswith(CHANGED) or (path.parent / SAVED_SYSTEM).is_file()
    return RESTORE if saved else REDO


def _without_manifest(path: Path) -> str:
    """What a folder without a manifest is, and what to do about it."""
    if (path / SAVED_SYSTEM).is_file():
        return f"{path} is a saved model: load it by its path, or name the folder of one member ({path / 'NAME'})"
    if (path / "params").is_dir() or checkpoint_folder().resolve() in path.resolve().parents:
        return f"{path} has no {MANIFEST}: it is half of a checkpoint; {_advice(path)}"
    return f"{path} is no checkpoint: it has no {MANIFEST}"


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: there is no complete checkpoint at ``path``, or a newer version of gura_jax wrote it.
    """
    recover_folder(path)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(_without_manifest(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error}); {_advice(path)}") from None
    source = content.get("source") if isinstance(content, dict) else None
    advice = _advice(path, source if isinstance(source, str) else "")
    try:
        version = _typed("a manifest", content, dict).get("format_version")
        if type(version) is not int or version < 1:
            raise TypeError(f"expected format_version, a positive integer, found {_json(version)}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, and this gura_jax reads up to {FORMAT_VERSION}: update gura_jax"
            )
        return _parse(content)
    except CheckpointError:
        raise
    except (TypeError, KeyError, AttributeError, GuraError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged ({error}); {advice}") from None


def _parse(content: dict[str, Any]) -> Manifest:
    """Check the types of a manifest's fields; raises TypeError."""
    fields = [field.name for field in dataclasses.fields(Manifest)]
    content = {"normalise": False, **content}  # manifests of earlier versions do not have it
    if set(content) != set(fields):
        raise TypeError(f"expected the fields {', '.join(fields)}, found {', '.join(content)}")
    tables = {name: _typed(name, content[name], dict) for name in ("architecture", "source_sha256", "arrays_sha256")}
    texts = {name: _typed(name, content[name], str) for name in ("source", "converter_version")}
    for name in ("source_sha256", "arrays_sha256"):
        for key, value in tables[name].items():
            _typed(key, value, str)
    architecture = config_from_dict(tables.pop("architecture"))
    normalise = _typed("normalise", content["normalise"], bool)
    return Manifest(architecture, **tables, **texts, normalise=normalise, format_version=content["format_version"])


def _typed(name: str, value: Any, kind: type) -> Any:
    """Check the type of a value from JSON; raises TypeError."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {name}, {_JSON_TYPES[kind]}, found {_json(value)}")
    return value


_JSON_TYPES = {dict: "an object", str: "text", bool: "true or false"}


def _json(value: Any) -> str:
    return json.dumps(value)[:MAX_REASON]


def check_architecture(name: str, wanted: Config, found: Config, where: str) -> None:
    """Refuse weights of another architecture than encoder ``name``, and name what differs.

    Raises:
        CheckpointError: the architectures differ.
    """
    a, b = _fields(wanted), _fields(found)
    differences = [
        f"{key}: expected {a.get(key)}, found {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)
    ]
    if differences:
        raise CheckpointError(f"{where} holds another architecture than {name}: {'; '.join(differences)}")


Shardings = jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding]
"""One sharding for all arrays, or one for each by its name."""


def load(path: Path, abstract: Mapping[str, jax.ShapeDtypeStruct], sharding: Shardings) -> dict[str, jax.Array]:
    """Read a checkpoint's arrays straight to their devices, and check their hashes.

    Args:
        path: the checkpoint's folder.
        abstract: the arrays that the encoder expects.
        sharding: where they go; each process reads its own part.

    Raises:
        CheckpointError: arrays missing, of other shapes, or damaged; a sharding that does not fit an array.
    """
    import orbax.checkpoint as ocp

    manifest = read_manifest(path)
    advice = _advice(path, manifest.source)
    if set(manifest.arrays_sha256) != set(abstract):
        difference = sorted(set(manifest.arrays_sha256) ^ set(abstract))
        raise CheckpointError(f"{path}: expected other arrays, differing in {', '.join(difference[:8])}; {advice}")
    shardings = _shardings(path, abstract, sharding)
    restore_args = {
        name: ocp.ArrayRestoreArgs(sharding=shardings[name], dtype=a.dtype, global_shape=a.shape, strict=True)
        for name, a in abstract.items()
    }
    try:
        alone = all(s.is_fully_addressable for s in shardings.values())
        with orbax_checkpointer(abstract.values(), alone=alone) as checkpointer:
            arrays: dict[str, jax.Array] = checkpointer.restore(
                (path / "params").resolve(),
                args=ocp.args.PyTreeRestore(dict(abstract), restore_args=restore_args),
            )
    except Exception as error:  # whatever Orbax and TensorStore say of a damaged folder
        shapes = _other_shapes(path, abstract) if "shape" in str(error) else ""
        raise CheckpointError(f"{path} {shapes or f'cannot be read: {_reason(error)}'}; {advice}") from None
    damaged = _damaged(arrays, manifest.arrays_sha256)
    if damaged:
        raise CheckpointError(f"{path} is damaged: {', '.join(damaged[:8])} differ from the manifest; {advice}")
    return arrays


def _damaged(arrays: Mapping[str, jax.Array], wanted: Mapping[str, str]) -> list[str]:
    """Names of the arrays whose hashes are others; of arrays over several processes, each hashes its share."""
    if all(array.is_fully_addressable or array.is_fully_replicated for array in arrays.values()):
        found = arrays_sha256(arrays)
        return [name for name in arrays if found[name] != wanted[name]]
    from jax.experimental import multihost_utils

    wrong = np.zeros(len(arrays), bool)
    for i, (name, array) in enumerate(sorted(arrays.items())):
        assert isinstance(array.sharding, jax.sharding.NamedSharding)  # as _shardings has seen
        everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
        whole = jax.device_put(array, everywhere)  # one at a time, so that there is room
        if i % jax.process_count() == jax.process_index():
            wrong[i] = arrays_sha256({name: whole})[name] != wanted[name]
    wrong = multihost_utils.process_allgather(wrong).any(axis=0)
    return [name for name, bad in zip(sorted(arrays), wrong, strict=True) if bad]


def _other_shapes(path: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """Which arrays have other shapes on disk than the encoder expects; empty if none, or if that cannot be read."""
    try:
        with orbax_checkpointer(abstract.values(), alone=True) as checkpointer:
            found = checkpointer.metadata((path / "params").resolve()).item_metadata.tree
        shapes = {name: tuple(found[name].shape) for name in abstract}
    except Exception:  # the folder is damaged
        return ""
    faults = [f"{name} {a.shape}, found {shapes[name]}" for name, a in abstract.items() if a.shape != shapes[name]]
    return f"has arrays of other shapes: expected {'; '.join(faults[:8])}" if faults else ""


def _shardings(
    path: Path, abstract: Mapping[str, jax.ShapeDtypeStruct], sharding: Shardings
) -> Mapping[str, jax.sharding.Sharding]:
    """Return a sharding for each array, checked."""
    shardings = sharding if isinstance(sharding, Mapping) else dict.fromkeys(abstract, sharding)
    for value in shardings.values():
        if not isinstance(value, jax.sharding.Sharding):
            raise CheckpointError(
                f"{path}: sharding: expected a jax.sharding.Sharding, or one for each array by its name, found "
                f"{repr(value)[:MAX_REASON]}"
            )
    if missing := [name for name in abstract if name not in shardings]:
        raise CheckpointError(f"{path}: expected a sharding for every array, found none for {', '.join(missing[:8])}")
    spread = [s for s in shardings.values() if not (s.is_fully_addressable or s.is_fully_replicated)]
    if other := [s for s in spread if not isinstance(s, jax.sharding.NamedSharding)]:
        raise CheckpointError(
            f"{path}: expected a NamedSharding for what lies on several processes' devices, found {_spec(other[0])}"
        )
    faults = []
    for name, array in abstract.items():
        try:
            shardings[name].shard_shape(array.shape)
        except (ValueError, IndexError):  # not divisible; more axes than the array has
            faults.append(f"{name} {array.shape} with {_spec(shardings[name])}")
    if faults:
        raise CheckpointError(
            f"{path}: expected shardings that divide the axes of their arrays evenly, found {', '.join(faults[:8])}: "
            "shard an axis that the mesh divides, or replicate the array (PartitionSpec())"
        )
    return shardings


def _spec(sharding: jax.sharding.Sharding) -> str:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return f"PartitionSpec{tuple(sharding.spec)} over {dict(sharding.mesh.shape)}"
    return str(sharding)


def orbax_checkpointer(
    arrays: Iterable[np.ndarray | jax.Array | jax.ShapeDtypeStruct], *, alone: bool
) -> "ocp.Checkpointer":
    """Orbax's checkpointer for these arrays; ``alone``: other processes of ``jax.distributed`` take no part."""
    import orbax.checkpoint as ocp

    options = ocp.options.MultiprocessingOptions()
    if alone and jax.process_count() > 1:
        own = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process {own}"
        )
    largest = max((math.prod(a.shape) * a.dtype.itemsize for a in arrays), default=0)
    memory: Any = max(MEMORY_GB, 2 * largest / 1e9)  # Orbax refuses an array that is larger
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_zarr3=True,
            use_compression=False,  # trained weights hardly compress, and reading is faster
            save_concurrent_gb=memory,
            save_device_host_concurrent_gb=memory,
            restore_concurrent_gb=memory,
            multiprocessing_options=options,
        ),
        multiprocessing_options=options,
    )
