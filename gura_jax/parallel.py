"""Devices: the mesh, placement, padding to the device count, and the only place that compiles."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gura_jax.audio import SAMPLE_RATE
from gura_jax.checkpoint import cache_folder

logger = logging.getLogger(__name__)

Parallel = Literal["jit", "pmap"]
BatchFunction = Callable[[Any, Any, Any], Any]
"""(params, audio [B, N], lengths [B]) -> a pytree of arrays [B, ...], each row a function of its own clip."""

Precision = Literal["highest", "default"]
PRECISION: Precision = "highest"  # of float32 matrix products: the default is TF32 on GPU and bfloat16 on TPU
CACHE_BYTES = 2 << 30  # of compiled programs on disk; the least used go first
BUCKETS_PER_OCTAVE = 4  # clip lengths are padded by 12 % on average, 25 % at most


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the one axis ``"data"``, over the local devices or those given."""
    return Mesh(np.asarray(devices if devices is not None else jax.local_devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of weights: a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def cache_compilations() -> None:
    """Keep what XLA compiles from one run to the next; ``JAX_COMPILATION_CACHE_DIR`` says where, empty: nowhere."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class Compilation(NamedTuple):
    """How functions are compiled: for which devices, by what, and the precision of their float32 products."""

    mesh: Mesh
    parallel: Parallel = "jit"
    precision: Precision = PRECISION


def compile_batch(function: BatchFunction, compilation: Compilation) -> BatchFunction:
    """Compile a function over batches that are sharded across the mesh.

    The result takes weights placed with :func:`replicated`, and batches of any size: it pads them to a multiple
    of the device count with silence, and trims what comes back. Each shard runs the same program by itself;
    no device waits for another.

    Args:
        function: see :data:`BatchFunction`.
        compilation: devices from :func:`make_mesh`; ``"jit"``, or ``"pmap"`` for the older interface.
    """
    mesh, parallel, precision = compilation
    shapes: set[tuple[int, ...]] = set()
    devices = mesh.devices.size
    batch = PartitionSpec("data")

    def precise(params: Any, audio: jax.Array, lengths: jax.Array) -> Any:
        with jax.default_matmul_precision(precision):
            return function(params, audio, lengths)

    if parallel == "pmap":
        mapped = jax.pmap(precise, in_axes=(None, 0, 0), devices=list(mesh.devices.flat))

        def call(params: Any, audio: Any, lengths: Any) -> Any:
            split = [x.reshape(devices, -1, *x.shape[1:]) for x in (audio, lengths)]
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), mapped(params, *split))

    else:
        call = jax.jit(
            jax.shard_map(
                precise,
                mesh=mesh,
                in_specs=(PartitionSpec(), batch, batch),
                out_specs=batch,
                check_vma=False,  # each shard is by itself; a user's encoder need not say so to jax.lax.scan
            )
        )

    def run(params: Any, audio: Any, lengths: Any) -> Any:
        size = audio.shape[0]
        missing = -size % devices
        if missing:
            audio = _pad(audio, ((0, missing), (0, 0)), 0)
            lengths = _pad(lengths, (0, missing), audio.shape[1])
        if audio.shape not in shapes:
            shapes.add(audio.shape)
            logger.info(
                "shape %d: compiling for %d clips of %.2f s", len(shapes), audio.shape[0], audio.shape[1] / SAMPLE_RATE
            )
        if parallel == "jit":
            audio, lengths = jax.device_put((audio, lengths), NamedSharding(mesh, batch))
        out = call(params, audio, lengths)
        return jax.tree.map(lambda x: x[:size], out) if missing else out

    return run


def _pad(x: Any, width: Any, value: int) -> Any:
    """Pad an array where it is: on the host or on a device; and it may be traced, for a gradient."""
    return (jnp if isinstance(x, jax.Array) else np).pad(x, width, constant_values=value)


class Batch(NamedTuple):
    """Clips that are computed together, padded to ``samples``; rows past the last clip hold silence."""

    rows: int
    samples: int
    clips: tuple[int, ...]


class Limits(NamedTuple):
    """What makes a good batch on a kind of device, in samples."""

    batch: int  # no more than this, but for one longer clip a device
    overhead: int  # what a batch costs beyond its samples: reading the weights, launching kernels


LIMITS = {"cpu": Limits(32 * SAMPLE_RATE, SAMPLE_RATE // 2)}
ACCELERATOR_LIMITS = Limits(320 * SAMPLE_RATE, 16 * SAMPLE_RATE)


def pack(lengths: Sequence[int], max_rows: int, devices: int, *, exact: bool = True) -> list[Batch]:
    """Cut clips into batches such that the least is computed, padding and silent rows included.

    Rows are a power of two times the devices, and lengths those of :func:`bucket_length`, so that shapes are few.
    Where all clips are of one length, that is the length, and a single batch has as many rows as clips: where shapes
    are to be few over many calls, ``exact=False`` does without.

    Args:
        lengths: of the clips, in samples.
        max_rows: clips in a batch, at most; but a row for each device at least.
        devices: that a batch is sharded over.
        exact: see above.

    Returns:
        Batches, the longest clips first.
    """
    limits = LIMITS.get(jax.default_backend(), ACCELERATOR_LIMITS)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    one_length = exact and lengths[order[0]] == lengths[order[-1]]
    padded = [lengths[i] if one_length else bucket_length(lengths[i]) for i in order]
    if one_length and len(order) <= max_rows and len(order) * padded[0] <= max(limits.batch, padded[0]):
        return [Batch(len(order), padded[0], tuple(order))]
    sizes = [devices]
    while 2 * sizes[-1] <= max_rows:
        sizes.append(2 * sizes[-1])
    best: list[tuple[int, int]] = [(0, 0)] * (len(order) + 1)  # cost of the clips from i on, minus their first rows
    for i in reversed(range(len(order))):
        best[i] = min(
            (rows * padded[i] + limits.overhead + best[min(i + rows, len(order))][0], -rows)
            for rows in sizes
            if rows == devices or rows * padded[i] <= limits.batch
        )
    batches, i = [], 0
    while i < len(order):
        rows = -best[i][1]
        batches.append(Batch(rows, padded[i], tuple(order[i : i + rows])))
        i += rows
    return batches


def bucket_length(samples: int, per_octave: int = BUCKETS_PER_OCTAVE) -> int:
    """The length that a clip is padded to, so that clips of many lengths share few compiled shapes."""
    octave = 2 ** math.floor(math.log2(samples))
    step = max(1, octave // per_octave)
    return math.ceil(samples / step) * step
