"""What every member of a system offers, and the seam between NNX modules and pure functions."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

Params = Mapping[str, jax.Array]
"""An encoder's weights by dotted path in the module, as ``encoder.layers.0.attention.q_proj.kernel``."""

DType = np.dtype
DTypeName = Literal["float32", "bfloat16"]
"""Of convolutions and matrix products; norms, softmax and sums are always float32."""

SUM_BLOCK = 256  # frames; sums of a block and of the blocks of a ten-minute clip are then about equally long


class Encoder(Protocol):
    """A member of a system: audio and lengths in, frames and counts out.

    Any object with these attributes can be a member. It is called inside the one compiled function, so it
    must be traceable by JAX, and a clip's frames must not depend on the other clips or on the padding.
    """

    @property
    def feature_size(self) -> int:
        """D, the size of a frame."""
        ...

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        ...

    @property
    def offset(self) -> float:
        """Samples from the start of the clip to the centre of its first frame."""
        ...

    @property
    def min_samples(self) -> int:
        """A clip of n samples has 1 + (n - min_samples) // hop frames."""
        ...

    def __call__(self, params: Any, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embed a padded batch.

        Args:
            params: the encoder's weights, any pytree of arrays.
            audio: [B, N] float32 at 16 kHz; zero from ``lengths[b]`` on.
            lengths: [B] int32, samples in each clip.

        Returns:
            frames [B, T, D] float32 (finite everywhere, any value past a clip's count), counts [B] int32.
        """
        ...


class Functional(NamedTuple):
    """An NNX module as a pure function of a flat dict of arrays."""

    abstract: dict[str, jax.ShapeDtypeStruct]
    """Every parameter's shape and dtype, by dotted path."""
    merge: Callable[[Params], Any]
    """Arrays by dotted path -> the module; for use inside a compiled function."""


class _OneKey:
    """Stands in for ``nnx.Rngs`` where only shapes are wanted: its counters make tracing quadratic in the modules."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Split the module that ``build`` makes, without allocating any of its arrays."""
    rngs: Any = _OneKey()
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(rngs)))
    flat: dict[tuple[Any, ...], Any] = traverse_util.flatten_dict(nnx.to_pure_dict(state))
    paths = {".".join(map(str, path)): path for path in flat}

    def merge(params: Params) -> nnx.Module:
        return nnx.merge(graphdef, traverse_util.unflatten_dict({paths[k]: params[k] for k in paths}))

    return Functional({name: flat[path] for name, path in paths.items()}, merge)


def random_params(build: Callable[[nnx.Rngs], nnx.Module], seed: int) -> dict[str, jax.Array]:
    """Freshly initialised parameters of the module that ``build`` makes, by dotted path."""
    flat: dict[tuple[Any, ...], Any] = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(build(nnx.Rngs(seed)))))
    return {".".join(map(str, path)): array for path, array in flat.items()}


def kernels_as(params: Params, dtype: DTypeName) -> Params:
    """The weights with those of convolutions and matrix products in ``dtype``; the small ones stay as they are."""
    if dtype == "float32":
        return params
    return {name: array.astype(dtype) if name.endswith(".kernel") else array for name, array in params.items()}


def frame_mask(counts: jax.Array, num_frames: int) -> jax.Array:
    """[B] counts -> [B, T] True where a frame lies within its clip."""
    return jnp.arange(num_frames)[None, :] < counts[:, None]


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over time of the frames that are in the clip: [B, T, D], [B, T] -> [B, D].

    Summed in blocks, so that the rounding error hardly grows with the clip; the blocks do not depend on T
    and zeros past the clip's end add nothing, so neither does the result depend on the padding.
    """
    B, T, D = x.shape
    x = jnp.where(mask[:, :, None], x, 0.0)
    x = jnp.pad(x, ((0, 0), (0, -T % SUM_BLOCK), (0, 0))).reshape(B, -1, SUM_BLOCK, D)
    count = jnp.maximum(mask.sum(axis=1, dtype=x.dtype), 1.0)[:, None]  # of no frames: zero, with a gradient of zero
    return x.sum(axis=2).sum(axis=1) / count
