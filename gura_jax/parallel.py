"""Devices: the mesh, the placement of weights, and the only place where a system's function is compiled."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gura_jax.batching import fill_rows
from gura_jax.files import cache_folder

logger = logging.getLogger(__name__)

Parallel = Literal["jit", "pmap"]
ByRate = Mapping[int, Any]
BatchFunction = Callable[[Any, ByRate, ByRate], Any]
"""(params, audio [B, N] by rate, lengths [B] by rate) -> a pytree of arrays [B, ...], each row of its own clip."""

Precision = Literal["highest", "default"]
PRECISION: Precision = "highest"  # of float32 matrix products: the default is TF32 on GPU and bfloat16 on TPU
CACHE_BYTES = 2 << 30  # of compiled programs on disk; the least used go first


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the one axis ``"data"``, over the local devices or those given."""
    return Mesh(np.asarray(devices if devices is not None else jax.local_devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of weights: a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def cache_compilations() -> None:
    """Keep compiled programs between runs, in the cache folder or ``JAX_COMPILATION_CACHE_DIR`` (empty: nowhere)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class Compilation(NamedTuple):
    """How functions are compiled: the devices, ``jit`` or ``pmap``, and the precision of float32 products."""

    mesh: Mesh
    parallel: Parallel = "jit"
    precision: Precision = PRECISION


def batch_program(function: BatchFunction, compilation: Compilation) -> Any:
    """Build the program of a function over batches that the devices divide, as ``jax.jit`` or ``jax.pmap`` gives it.

    Args:
        function: see :data:`BatchFunction`.
        compilation: devices from :func:`make_mesh`; with ``"pmap"`` the batch has a leading axis over the devices.

    Returns:
        To be called, or lowered and compiled.
    """
    mesh, parallel, precision = compilation
    batch = PartitionSpec("data")

    def precise(params: Any, audio: ByRate, lengths: ByRate) -> Any:
        with jax.default_matmul_precision(precision):
            return function(params, audio, lengths)

    if parallel == "pmap":
        return jax.pmap(precise, in_axes=(None, 0, 0), devices=list(mesh.devices.flat))
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

    The result takes weights placed with :func:`replicated`, and batches of any size: it pads them to a multiple
    of the device count with silence, and trims what comes back. Each shard runs the same program by itself;
    no device waits for another.

    Args:
        function: see :data:`BatchFunction`.
        compilation: devices from :func:`make_mesh`; ``"jit"``, or ``"pmap"`` for the older interface.
    """
    mesh, parallel, _ = compilation
    program = batch_program(function, compilation)
    shapes: set[tuple[tuple[int, ...], ...]] = set()
    devices = mesh.devices.size

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
            out = program(params, *jax.device_put((audio, lengths), NamedSharding(mesh, PartitionSpec("data"))))
        return jax.tree.map(lambda x: x[:size], out) if size % devices else out

    return run
