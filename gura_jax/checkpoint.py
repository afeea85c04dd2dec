"""Converted checkpoints: an Orbax folder of arrays by dotted path, and a manifest that says what they are.

    checkpoints/NAME/manifest.json    architecture, source, hashes; written last
    checkpoints/NAME/params/          Orbax

A checkpoint is complete or absent: it is written under a temporary name and renamed.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gura_jax.errors import CheckpointError, GuraError
from gura_jax.systems import Architecture, architecture_from_dict

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MEMORY_GB = 0.1  # that Orbax holds beyond the arrays themselves; with more, loading is slower too


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and where it came from; the same source always gives the same manifest."""

    architecture: Architecture
    source: str
    source_sha256: Mapping[str, str]
    converter_version: str
    arrays_sha256: Mapping[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """One sha256 of the architecture and of all arrays."""
        content = {"architecture": dataclasses.asdict(self.architecture), "arrays": dict(self.arrays_sha256)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoint_folder() -> Path:
    """Where checkpoints are: ``GURA_JAX_CHECKPOINTS``, else a source checkout's own, else the user's cache."""
    if chosen := os.environ.get("GURA_JAX_CHECKPOINTS"):
        return Path(chosen)
    checkout = Path(__file__).parent.parent
    if (checkout / "checkpoints" / "README.md").is_file() and (checkout / "pyproject.toml").is_file():
        return checkout / "checkpoints"
    return cache_folder() / "checkpoints"


def cache_folder() -> Path:
    """The user's cache folder of gura_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gura_jax"


def array_sha256(array: np.ndarray) -> str:
    """Hash of an array's shape, type and bytes."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def save(path: Path, params: Mapping[str, np.ndarray], manifest: Manifest, *, overwrite: bool = False) -> None:
    """Write a checkpoint, atomically.

    Args:
        path: the checkpoint's folder.
        params: arrays by dotted path.
        manifest: what they are.
        overwrite: replace what is there; it stays until the new one is complete.

    Raises:
        CheckpointError: ``path`` exists and is not to be replaced, or cannot be written.
    """
    import orbax.checkpoint as ocp

    _recover(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already: remove it, or pass --overwrite")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        cpu = jax.devices("cpu")[0]
        with _orbax(params.values()) as checkpointer:
            # As arrays of the CPU's: Orbax copies NumPy arrays before it writes them, all at once.
            tree = {name: jax.device_put(array, cpu) for name, array in params.items()}
            checkpointer.save((temporary / "params").resolve(), args=ocp.args.PyTreeSave(tree))
        content = dataclasses.asdict(manifest)
        with open(temporary / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o755)
        _replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from None
    except ValueError as error:  # TensorStore's, as when the disk is full
        raise CheckpointError(f"cannot write the checkpoint {path}: {_reason(error)}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, path: Path) -> None:
    """Rename; an older checkpoint goes out of the way first, and comes back if that fails."""
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / "old"
        try:
            os.rename(path, old)
            try:
                os.rename(temporary, path)
            except BaseException:
                os.rename(old, path)
                raise
        finally:
            if path.exists():
                shutil.rmtree(old.parent, ignore_errors=True)
    else:
        os.rename(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _recover(path: Path) -> None:
    """Put back an older checkpoint whose replacement was killed between its two renames."""
    if not path.exists():
        for old in path.parent.glob(f".{glob.escape(path.name)}.old.*/old"):
            with contextlib.suppress(OSError):
                os.rename(old, path)
                old.parent.rmdir()
                return


def _reason(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: there is no complete checkpoint at ``path``, or a newer version of gura_jax wrote it.
    """
    _recover(path)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        content: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = content["format_version"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: it is no checkpoint, or half of one; {REDO}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error}); {REDO}") from None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path / MANIFEST} has no format version, but {version!r}; {REDO}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, and this gura_jax reads up to {FORMAT_VERSION}: update gura_jax"
        )
    try:
        architecture = architecture_from_dict(content.pop("architecture"))
        manifest = Manifest(architecture=architecture, **content)
        texts = [manifest.source, manifest.converter_version]
        for table in (manifest.arrays_sha256, manifest.source_sha256):
            texts += table.values()
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("expected text for the source, the version and the hashes")
    except (TypeError, KeyError, AttributeError, GuraError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged ({error}); {REDO}") from None
    return manifest


def check_architecture(name: str, wanted: Architecture, found: Architecture, where: str) -> None:
    """Refuse weights that are of another architecture than encoder ``name``, and name what differs.

    Raises:
        CheckpointError: they are.
    """
    a, b = dataclasses.asdict(wanted), dataclasses.asdict(found)
    differences = [
        f"{key}: expected {a.get(key)}, found {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)
    ]
    if differences:
        raise CheckpointError(f"{where} holds another architecture than {name}: {'; '.join(differences)}")


REDO = "remove it and run gura-jax convert again"


def load(
    path: Path, abstract: Mapping[str, jax.ShapeDtypeStruct], sharding: jax.sharding.Sharding
) -> dict[str, jax.Array]:
    """Read a checkpoint's arrays straight to their devices, and check their hashes.

    Args:
        path: the checkpoint's folder.
        abstract: the arrays that the encoder expects.
        sharding: where they go.

    Raises:
        CheckpointError: arrays missing, of other shapes, or damaged.
    """
    import orbax.checkpoint as ocp

    manifest = read_manifest(path)
    if set(manifest.arrays_sha256) != set(abstract):
        difference = sorted(set(manifest.arrays_sha256) ^ set(abstract))
        raise CheckpointError(f"{path}: expected other arrays, differing in {', '.join(difference[:8])}; {REDO}")
    restore_args = {
        name: ocp.ArrayRestoreArgs(sharding=sharding, dtype=a.dtype, global_shape=a.shape, strict=True)
        for name, a in abstract.items()
    }
    try:
        with _orbax(abstract.values()) as checkpointer:
            arrays: dict[str, jax.Array] = checkpointer.restore(
                (path / "params").resolve(),
                args=ocp.args.PyTreeRestore(dict(abstract), restore_args=restore_args),
            )
    except Exception as error:  # whatever Orbax and TensorStore say of a damaged folder
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}; {REDO}") from None
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda array: array_sha256(_host(array)), arrays.values())
        damaged = [name for name, found in zip(arrays, hashes, strict=True) if found != manifest.arrays_sha256[name]]
    if damaged:
        raise CheckpointError(f"{path} is damaged: {', '.join(damaged[:8])} differ from the manifest; {REDO}")
    return arrays


def _host(array: jax.Array) -> np.ndarray:
    return np.asarray(array.addressable_data(0))  # no copy on the CPU


def _orbax(arrays: Iterable[np.ndarray | jax.ShapeDtypeStruct]) -> "ocp.Checkpointer":
    import orbax.checkpoint as ocp

    largest = max((math.prod(a.shape) * a.dtype.itemsize for a in arrays), default=0)
    memory: Any = max(MEMORY_GB, 2 * largest / 1e9)  # Orbax refuses an array that is larger
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_zarr3=True,
            use_compression=False,  # trained weights hardly compress, and reading is faster
            save_concurrent_gb=memory,
            restore_concurrent_gb=memory,
        )
    )
