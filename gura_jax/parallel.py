"""Devices: the mesh, placement, padding to the device count, and the only place that compiles."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Parallel = Literal["jit", "pmap"]
BatchFunction = Callable[[Any, Any, Any], Any]
"""(params, audio [B, N], lengths [B]) -> a pytree of arrays [B, ...], each row a function of its own clip."""

PRECISION = "highest"  # of float32 matrix products: the default is TF32 on GPU and bfloat16 on TPU
BUCKETS_PER_OCTAVE = 4  # clip lengths are padded by 12 % on average, 25 % at most


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the one axis ``"data"``, over the local devices or those given."""
    return Mesh(np.asarray(devices if devices is not None else jax.local_devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of weights: a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def compile_batch(function: BatchFunction, mesh: Mesh, parallel: Parallel = "jit") -> BatchFunction:
    """Compile a function over batches that are sharded across the mesh.

    The result takes weights placed with :func:`replicated`, and batches of any size: it pads them to a multiple
    of the device count with silence, and trims what comes back. Each shard runs the same program by itself;
    no device waits for another.

    Args:
        function: see :data:`BatchFunction`.
        mesh: from :func:`make_mesh`.
        parallel: ``"jit"``, or ``"pmap"`` for the older interface.
    """
    devices = mesh.devices.size
    batch = PartitionSpec("data")

    def precise(params: Any, audio: jax.Array, lengths: jax.Array) -> Any:
        with jax.default_matmul_precision(PRECISION):
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
        if parallel == "jit":
            audio, lengths = jax.device_put((audio, lengths), NamedSharding(mesh, batch))
        out = call(params, audio, lengths)
        return jax.tree.map(lambda x: x[:size], out) if missing else out

    return run


def _pad(x: Any, width: Any, value: int) -> Any:
    """Pad an array where it is: on the host or on a device; and it may be traced, for a gradient."""
    return (jnp if isinstance(x, jax.Array) else np).pad(x, width, constant_values=value)


def bucket_length(samples: int) -> int:
    """The length that a clip is padded to, so that clips of many lengths share few compiled shapes."""
    octave = 2 ** math.floor(math.log2(samples))
    step = max(1, octave // BUCKETS_PER_OCTAVE)
    return math.ceil(samples / step) * step
