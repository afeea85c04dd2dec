"""Devices: the mesh, the placement of weights, and the only place where a system's function is compiled."""

import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gura_jax.batching import fill_rows
from gura_jax.errors import SystemConfigError
from gura_jax.files import cache_folder
from gura_jax.models.encoder import Encoder

logger = logging.getLogger(__name__)

Parallel = Literal["jit", "pmap"]
ByRate = Mapping[int, Any]
BatchFunction = Callable[[Any, ByRate, ByRate], Any]
"""(params, audio [B, N] by rate, lengths [B] by rate) -> a pytree of arrays [B, ...], each row of its own clip."""

Shard = Literal["fsdp", "tensor"]
"""How weights are divided: ``"fsdp"`` along the mesh's axis ``data``, to be gathered a layer at a time; ``"tensor"``
along its axis ``model``, by the rules of each encoder, so that a layer is computed by several devices."""
SMALL = 1 << 14  # numbers in a weight that fsdp leaves whole: dividing it costs more than it saves

Precision = Literal["highest", "default"]
PRECISION: Precision = "highest"  # of float32 matrix products: the default is TF32 on GPU and bfloat16 on TPU
CACHE_BYTES = 2 << 30  # of compiled programs on disk; the least used go first


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the one axis ``"data"``, over the local devices or those given."""
    return Mesh(np.asarray(devices if devices is not None else jax.local_devices()), ("data",))


def check_mesh(mesh: Any, parallel: Parallel, shard: Shard | None) -> Mesh:
    """Return a mesh whose axes XLA may use freely; refuse one that a batch, or weights divided so, cannot lie on.

    Raises:
        SystemConfigError: axes missing or of no use.
    """
    if not isinstance(mesh, Mesh):
        raise SystemConfigError(f"mesh: expected a jax.sharding.Mesh, found {mesh!r}")
    axes = ("data", "model") if shard == "tensor" else ("data",)
    found = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    if "data" not in mesh.shape or not set(mesh.shape) <= {"data", "model"}:
        raise SystemConfigError(f"mesh: expected the axes data and model, or data alone, found {found}")
    if missing := [name for name in axes if name not in mesh.shape]:
        raise SystemConfigError(
            f"shard={shard!r}: expected a mesh with an axis {missing[0]}, found {found}: "
            f"jax.make_mesh((1, {mesh.size}), ('data', 'model')) has one"
        )
    if shard is None and mesh.shape.get("model", 1) > 1:
        raise SystemConfigError(f"mesh: expected shard='tensor' to use the axis model, found {found} and no shard")
    if parallel == "pmap" and (shard is not None or is_several_processes(mesh)):
        raise SystemConfigError("parallel_by='pmap': expected whole weights on one process's devices; use 'jit'")
    return Mesh(mesh.devices, mesh.axis_names)  # those of jax.make_mesh are explicit: each op would name its sharding


def count_processes(mesh: Mesh) -> int:
    """How many processes of ``jax.distributed`` the devices are of."""
    return len({device.process_index for device in mesh.devices.flat})


def is_several_processes(mesh: Mesh) -> bool:
    """Whether the devices are those of several processes of ``jax.distributed``."""
    return count_processes(mesh) > 1


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of weights: a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def weight_shardings(
    encoder: Encoder, params: Mapping[str, Any], mesh: Mesh, shard: Shard | None
) -> dict[str, NamedSharding]:
    """Where an encoder's weights go.

    Args:
        encoder: its ``partition`` says what ``"tensor"`` divides.
        params: arrays or their shapes, as a checkpoint holds them or as they are held on devices.
        mesh: with an axis ``data``, and for ``"tensor"`` an axis ``model``.
        shard: see :data:`Shard`; None: a copy on each device.

    Raises:
        SystemConfigError: a rule that matches no weight, or whose axis the mesh does not divide.
    """
    if shard == "fsdp":
        depths = encoder.depths(params)
        divided = {
            name: _largest_axis(array.shape, mesh.shape["data"], stacked=depths[name].ndim > 0)
            for name, array in params.items()
        }
    elif shard == "tensor":
        divided = dict.fromkeys(params)
        for pattern, axis in encoder.partition.items():
            names = [name for name in params if re.fullmatch(pattern, name)]
            if not names:
                raise SystemConfigError(
                    f"{type(encoder).__name__}.partition: expected a pattern of some weights' names, found "
                    f"{pattern!r}, which matches none"
                )
            divided |= dict.fromkeys(names, axis)
    else:
        divided = dict.fromkeys(params)
    return {
        name: NamedSharding(mesh, _spec(name, params[name].shape, axis, "data" if shard == "fsdp" else "model", mesh))
        for name, axis in divided.items()
    }


def _largest_axis(shape: tuple[int, ...], devices: int, *, stacked: bool) -> int | None:
    """The axis of a large weight that is divided, counted from the end: of its inputs or outputs.

    Not that of the layers; nor the taps of a convolution, which XLA then computes wrongly for clips of fewer frames.
    """
    axes = [axis for axis in range(max(-2, -len(shape) + stacked), 0) if shape[axis] % devices == 0]
    size = math.prod(shape[1:] if stacked else shape)
    return max(axes, key=lambda axis: shape[axis], default=None) if size >= SMALL else None


def _spec(name: str, shape: tuple[int, ...], axis: int | None, of: str, mesh: Mesh) -> PartitionSpec:
    if axis is None:
        return PartitionSpec()
    if len(shape) < -axis or shape[axis] % mesh.shape[of]:
        raise SystemConfigError(
            f"{name}: expected an axis {axis} that {mesh.shape[of]} devices divide, found {list(shape)}: "
            f"choose another size of the mesh's axis {of}"
        )
    spec: list[str | None] = [None] * len(shape)
    spec[axis] = of
    return PartitionSpec(*spec)


def cache_compilations() -> None:
    """Keep compiled programs between runs, in the cache folder or ``JAX_COMPILATION_CACHE_DIR`` (empty: nowhere)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class Compilation(NamedTuple):
    """How functions are compiled: the devices, ``jit`` or ``pmap``, the precision of float32 products, the weights."""

    mesh: Mesh
    parallel: Parallel = "jit"
    precision: Precision = PRECISION
    shard: Shard | None = None

    @property
    def batch_devices(self) -> int:
        """What the rows of a process's batch are divided by."""
        return max(1, self.mesh.shape["data"] // count_processes(self.mesh))


def batch_program(function: BatchFunction, compilation: Compilation) -> Any:
    """Build the program of a function over batches that the devices divide, as ``jax.jit`` or ``jax.pmap`` gives it.

    Args:
        function: see :data:`BatchFunction`.
        compilation: devices from :func:`make_mesh`; with ``"pmap"`` the batch has a leading axis over the devices.

    Returns:
        To be called, or lowered and compiled.
    """
    mesh, parallel, precision, shard = compilation
    batch = PartitionSpec("data")

    def precise(params: Any, audio: ByRate, lengths: ByRate) -> Any:
        with jax.default_matmul_precision(precision):
            return function(params, audio, lengths)

    if parallel == "pmap":
        return jax.pmap(precise, in_axes=(None, 0, 0), devices=list(mesh.devices.flat))
    if shard is not None:  # the weights' shardings come with them, and XLA sends what a layer needs
        return jax.jit(precise, out_shardings=NamedSharding(mesh, batch))
    return jax.jit(
        jax.shard_map(
            precise,
            mesh=mesh,
            in_specs=(PartitionSpec(), batch, batch),
            out_specs=batch,
            check_vma=False,  # each shard is by itself; a user's encoder need not say so to jax.lax.scan
        )
    )


def compile_batch(function: BatchFunction, compilation: Compilation) -> BatchFunction:
    """Compile a function over batches that are sharded across the mesh.

    The result takes weights placed by :func:`weight_shardings`, and batches of any size: it pads them to a multiple
    of the device count with silence, and trims what comes back. With whole weights each shard runs the same program by
    itself, and no device waits for another. Of several processes each gives as many rows of its own as the others, and
    gets their results back, as NumPy arrays.

    Args:
        function: see :data:`BatchFunction`.
        compilation: devices from :func:`make_mesh`; ``"jit"``, or ``"pmap"`` for the older interface.
    """
    mesh, parallel = compilation.mesh, compilation.parallel
    program = batch_program(function, compilation)
    shapes: set[tuple[tuple[int, ...], ...]] = set()
    devices = compilation.batch_devices
    several = is_several_processes(mesh)

    def run(params: Any, audio: ByRate, lengths: ByRate) -> Any:
        size = len(next(iter(audio.values())))
        audio, lengths = fill_rows(audio, lengths, devices)
        shape = tuple(x.shape for x in audio.values())
        if shape not in shapes:
            shapes.add(shape)
            rate, (rows, samples) = next(iter(audio)), shape[0]
            logger.info("shape %d: compiling for %d clips of %.2f s", len(shapes), rows, samples / rate)
        if parallel == "pmap":
            split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), (audio, lengths))
            out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), program(params, *split))
        else:
            out = program(params, *place_rows((audio, lengths), mesh))
            out = jax.tree.map(_own_rows, out) if several else out
        return jax.tree.map(lambda x: x[:size], out) if size % devices else out

    return run


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Put a batch's arrays [B, ...] on the devices, rows divided; of several processes each has rows of its own."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    if not is_several_processes(mesh):
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def _own_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array whose first axis is divided."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0] or array.addressable_shards
    parts = {shard.index[0].start or 0: shard.data for shard in shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
