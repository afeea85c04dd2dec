"""The interface of a system's members, the description of a family of encoders, and NNX modules as pure functions."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from gura_jax.backend import PLATFORMS, Platform
from gura_jax.models.layers import Layers

if TYPE_CHECKING:
    from gura_jax.convert.keys import KeyTable

Params = Mapping[str, jax.Array]
"""An encoder's weights by dotted path in the module, such as ``encoder.layers.0.attention.q_proj.kernel``."""

DType = np.dtype
DTypeName = Literal["float32", "bfloat16"]
"""Of convolutions and matrix products; norms, softmax and sums are always float32."""

Remat = Literal["layers"]
"""What a gradient computes again: see :class:`Options`."""

NORMALISE_EPS = 1e-7  # of the variance, as in transformers; fairseq's 1e-5 would leave quiet clips quiet
SUM_BLOCK = 256  # frames; sums of a block and of the blocks of a ten-minute clip are then about equally long


class FrameGrid(NamedTuple):
    """Where an encoder's frames lie, in samples at its own rate."""

    hop: int  # from one frame to the next
    offset: float  # from the start of the clip to the centre of its first frame
    window: int  # that the first frame needs: a clip of n samples has 1 + (n - window) // hop frames

    def count(self, samples: Any) -> Any:
        """Frames of a clip of so many samples: 0 below one window. Works on integers and arrays."""
        frames = 1 + (samples - self.window) // self.hop
        if isinstance(samples, (int, np.integer)):
            return max(0, int(frames))
        return (jnp if isinstance(samples, jax.Array) else np).maximum(frames, 0)

    def times(self, samples: int, sample_rate: int) -> np.ndarray:
        """Centres [T] of a clip's frames in milliseconds."""
        return (self.offset + self.hop * np.arange(self.count(samples))) * (1000 / sample_rate)


class Output(NamedTuple):
    """An encoder's results for a padded batch."""

    frames: jax.Array  # [B, T, D] float32, finite everywhere; any value past a clip's count
    counts: jax.Array  # [B] int32, frames of each clip
    pooled: jax.Array | None = None  # [B, P] float32, where the architecture has an embedding of the whole clip


class Noise(NamedTuple):
    """What disturbs an encoder in training.

    SpecAugment (Park et al., 2019) as in wav2vec 2.0 (Baevski et al., 2020, Appendix B) masks spans of a clip's frames
    and features, here with zeros; dropout follows the attention and the feed-forward layer of each block.
    """

    key: jax.Array
    dropout: float = 0.0  # share of the values
    mask_time: float = 0.0  # share of the frames, but for overlaps
    mask_time_length: int = 10  # frames of a span
    mask_features: float = 0.0  # share of the features, but for overlaps
    mask_features_length: int = 64


Reduce = Callable[[jax.Array, jax.Array], jax.Array]
"""What is kept of frames: (frames [B, T, D], counts [B]) -> [B, ...]."""


class Encoder(Protocol):
    """A member of a system: audio and lengths in, frames and counts out.

    Subclass it: the defaults suit a simple encoder. The package relies on nothing else of a member. JAX must be able to
    trace the call and :meth:`states`, instances must be hashable, and a clip's results must depend neither on the other
    clips of its batch nor on the padding.

    Attributes:
        sample_rate: of the audio that it takes, in Hz.
        feature_size: D, the size of a frame.
        grid: where its frames lie.
        num_states: hidden states that ``layers`` may choose from; 0: there is no choice.
        shortest: samples that a clip needs, where these are more than the grid's window.
        shortest_pooled: those that ``Output.pooled`` needs, where these are fewer; None: as many.
        least: a clip of fewer samples costs as much as one of so many, as where clips are filled up to a window.
        pooled_size: P, the size of ``Output.pooled``; 0: it has none.
        parts: the names that :meth:`states` yields, in order.
        partition: pattern of weights' names -> the axis, counted from the end, that several devices share when each
            computes a part of a layer; others have a copy of what no pattern matches.
    """

    sample_rate: int
    feature_size: int
    grid: FrameGrid
    num_states: int = 0
    shortest: int = 0
    shortest_pooled: int | None = None
    least: int = 0
    pooled_size: int = 0
    parts: tuple[str, ...] = ("frames",)
    partition: Mapping[str, int] = MappingProxyType({})

    def init(self, key: jax.Array) -> Params:
        """Random weights, as a checkpoint holds them."""
        ...

    def __call__(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Output:
        """Embed a padded batch.

        Args:
            params: weights as :meth:`prepare` gives them; with or without what :meth:`derive` adds.
            audio: [B, N] float32 at ``sample_rate``; zero from ``lengths[b]`` on.
            lengths: [B] int32, samples in each clip.
        """
        ...

    def disturbed(self, params: Any, audio: jax.Array, lengths: jax.Array, noise: Noise) -> Output:
        """Embed a padded batch with noise, in training; an encoder that has no place for noise ignores it."""
        return self(params, audio, lengths)

    def states(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """Every named part of the computation: (name, value [B, T, ...], counts [B]).

        Hidden states are called ``state 0`` to ``state L``. A consumer that is compiled computes only what it keeps.
        """
        out = self(params, audio, lengths)
        yield "frames", out.frames, out.counts

    def collected(
        self, params: Any, audio: jax.Array, lengths: jax.Array, states: tuple[int, ...], reduce: Reduce
    ) -> tuple[Output, jax.Array]:
        """Embed a padded batch, and keep hidden states.

        Args:
            params, audio, lengths: as in a call.
            states: which hidden states, K of them in increasing order.
            reduce: what is kept of each.

        Returns:
            What a call returns, and [K, B, ...].
        """
        names = {f"state {i}" for i in states}
        parts = self.states(params, audio, lengths)
        kept = [reduce(value, counts) for name, value, counts in parts if name in names]
        return self(params, audio, lengths), jnp.stack(kept)

    def abstract_params(self) -> Any:
        """Shape and dtype of every weight in a checkpoint, by dotted path."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def prepare(self, params: Any) -> Any:
        """The weights as they are held on the devices, from a checkpoint's; done once.

        It may take the arrays out of ``params``, so that there are never two copies of all of them.
        """
        return params

    def restore(self, params: Any) -> Any:
        """A checkpoint's weights from those that are held: the inverse of :meth:`prepare`."""
        return params

    def depths(self, params: Any) -> Mapping[str, np.ndarray]:
        """Each held weight's depth: i of the i-th transformer block, from 1; 0 of what comes before.

        Integers that broadcast against the weight, as [L, 1, 1] against the stacked kernels [L, D, D'] of all blocks.
        """
        return {name: np.zeros((), np.int32) for name in params}

    def derive(self, params: Any) -> Params:
        """Arrays computed from the weights once, instead of in every call; a call without them computes them itself."""
        return {}


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices that an encoder is built with, beside its config.

    Attributes:
        layers: the hidden states that frames are made of, see :func:`gura_jax.models.layers.layer_weights`.
        dtype: of convolutions and matrix products.
        hop: samples between frames, in families with a choice; None: the family's default.
        platform: where it will run.
        normalise: each clip is given zero mean and unit variance first, as many published encoders were trained; see
            :func:`normalised`.
        remat: what the gradient computes again instead of keeping it: ``"layers"``, within each transformer block and
            each block of frames; None: nothing.
    """

    layers: Layers = "last"
    dtype: DTypeName = "float32"
    hop: int | None = None
    platform: Platform = PLATFORMS["cpu"]
    normalise: bool = False
    remat: Remat | None = None

    @property
    def rematerialise(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Applied to the function of a block."""
        return (lambda function: function) if self.remat is None else jax.checkpoint

    @property
    def compute_dtype(self) -> DType:
        """Of convolutions and matrix products, as NumPy has it."""
        return jnp.dtype(self.dtype)


class Config(Protocol):
    """Sizes and kinds of an encoder: a frozen dataclass whose ``model_type`` is its family's name."""

    @property
    def model_type(self) -> str:
        """The family's name."""
        ...

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``.

        Raises:
            SystemConfigError: naming every attribute that changes the computation and is not handled.
        """
        ...

    def tiny(self) -> Self:
        """A small encoder of the same kind."""
        ...


class Preset(NamedTuple):
    """A named encoder of a family, and where ``gura-jax convert`` finds its weights."""

    config: Any
    source: str | None = None  # a hub id, or an asset of a package; None: nothing to fetch by name
    normalise: bool = False  # members with this encoder, unless they say otherwise
    licence: str = ""  # of the weights, as their authors state it; empty: not known


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture: everything that the rest of the package knows about it.

    Attributes:
        name: transformers' ``model_type`` where there is one.
        config: its frozen dataclass, see :class:`Config`.
        build: (config, options) -> encoder.
        keys: source library -> key table, see :mod:`gura_jax.convert.keys`.
        reference: dotted name of the class that runs it in PyTorch, for parity; see
            :class:`gura_jax.convert.references.Reference`.
        presets: its published encoders, by name.
        scene_hop: samples between the frames that are averaged into scenes, where these are not the timestamp frames.
            A frame must depend on its place alone, not on the hop.
    """

    name: str
    config: type[Any]
    build: Callable[[Any, Options], Encoder]
    keys: "Mapping[str, KeyTable]" = dataclasses.field(default_factory=dict)
    reference: str = ""
    presets: Mapping[str, Preset] = dataclasses.field(default_factory=dict)
    scene_hop: int | None = None


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


@functools.cache
def _functional_of(encoder: "ModuleEncoder") -> Functional:
    return functional(encoder.module)


class ModuleEncoder(Encoder):
    """Base of encoders whose network is an NNX module, ``module(rngs)``; a family's encoder adds sizes and the call.

    Attributes:
        blocks: dotted path of the list of transformer blocks, all of one shape; empty: there is none. Where the
            layers are scanned (by the platform, with ``remat``, or ``always_scans``), their weights are held stacked:
            ``encoder.layers.attention.q_proj.kernel`` [L, D, D].
        always_scans: whether the layers are scanned on every platform.
    """

    blocks: str = ""
    always_scans: bool = False

    def __init__(self, config: Any, options: Options) -> None:
        self.config, self.options = config, options

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and (other.config, other.options) == (self.config, self.options)

    def __hash__(self) -> int:
        return hash((type(self), self.config, self.options))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r}, {self.options!r})"

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """The network with fresh weights; products are in ``options.dtype``."""
        raise NotImplementedError

    def network(self, params: Params) -> Any:
        """The network with these weights, inside a compiled function."""
        return _functional_of(self).merge(self._unstacked(params))

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """Random weights."""
        state = nnx.to_pure_dict(nnx.state(self.module(nnx.Rngs(key))))
        flat: dict[tuple[Any, ...], Any] = traverse_util.flatten_dict(state)
        return {".".join(map(str, path)): array for path, array in flat.items()}

    def abstract_params(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every weight in a checkpoint."""
        return _functional_of(self).abstract

    def prepare(self, params: Any) -> Params:
        """Weights of convolutions and matrix products in ``options.dtype``, the small ones as they are; stacked."""
        taken: dict[str, Any] = {}
        for name in list(params):
            array = params.pop(name)
            cast = name.endswith(".kernel") and array.dtype != self.options.compute_dtype
            taken[name] = array.astype(self.options.compute_dtype) if cast else array
        if not self._stacks:
            return taken
        held: dict[str, Any] = {name: taken.pop(name) for name in list(taken) if self._place(name) is None}
        while taken:
            _, name = self._place(next(iter(taken))) or (0, "")
            rows = [taken.pop(self._name(i, name)) for i in range(self._count)]
            held[f"{self.blocks}.{name}"] = _stack(rows)
        return held

    def restore(self, params: Params) -> Params:
        """All weights in float32, which holds bfloat16 exactly; stacked ones as views of arrays on the host."""
        rows = self._unstacked(params, on_host=True)
        return {name: array.astype(np.float32, copy=False) for name, array in rows.items()}

    def depths(self, params: Params) -> Mapping[str, np.ndarray]:
        """Depths by the block that a weight is of."""
        depths = {}
        for name in params:
            place = self._place(name)
            if self._stacks and place is None and name.startswith(f"{self.blocks}."):
                depths[name] = np.arange(1, self._count + 1, dtype=np.int32).reshape(
                    -1, *(1,) * (params[name].ndim - 1)
                )
            else:
                depths[name] = np.asarray(0 if place is None else place[0] + 1, np.int32)
        return depths

    def block_arguments(self, params: Params, others: Any) -> Any:
        """(weights, others) of each block: a list of them; or stacked, where layers are scanned.

        Args:
            params: the encoder's held weights.
            others: a pytree of arrays with a leading axis over the blocks.
        """
        inside = f"{self.blocks}."
        if self._stacks:
            return {k.removeprefix(inside): v for k, v in params.items() if k.startswith(inside)}, others
        blocks: list[dict[str, Any]] = [{} for _ in range(self._count)]
        for name in self.abstract_params():
            if place := self._place(name):
                blocks[place[0]][place[1]] = params[name]
        return [(own, jax.tree.map(lambda x, i=i: x[i], others)) for i, own in enumerate(blocks)]

    @property
    def _stacks(self) -> bool:
        # Unrolled, XLA may compute all blocks again at once.
        scans = self.always_scans or self.options.platform.scan_layers or self.options.remat is not None
        return bool(self.blocks) and scans

    @property
    def _count(self) -> int:
        """Number of the blocks."""
        places = map(self._place, self.abstract_params())
        return 1 + max((place[0] for place in places if place is not None), default=-1)

    def _place(self, name: str) -> tuple[int, str] | None:
        """The index of the block that a weight of a checkpoint is of, and its name within; None: of no block."""
        index, _, rest = name.removeprefix(f"{self.blocks}.").partition(".")
        return (int(index), rest) if name.startswith(f"{self.blocks}.") and index.isdigit() else None

    def _name(self, index: int, rest: str) -> str:
        return f"{self.blocks}.{index}.{rest}"

    def _unstacked(self, params: Params, *, on_host: bool = False) -> dict[str, Any]:
        """The weights by the names of a checkpoint."""
        if not self._stacks:
            return dict(params)
        out: dict[str, Any] = {}
        for name, array in params.items():
            if not name.startswith(f"{self.blocks}."):
                out[name] = array
                continue
            rows = np.asarray(array) if on_host and not isinstance(array, Tracer) else array
            out |= {self._name(i, name.removeprefix(f"{self.blocks}.")): rows[i] for i in range(len(rows))}
        return out


def _stack(rows: list[Any]) -> Any:
    """Stack arrays on a new axis, on the devices that have them, and in the same parts."""
    sharding = None if isinstance(rows[0], Tracer) else getattr(rows[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jnp.stack(rows)
    stacked = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.jit(jnp.stack, out_shardings=stacked)(rows)


def frame_mask(counts: jax.Array, num_frames: int) -> jax.Array:
    """[B] counts -> [B, T] True where a frame lies within its clip."""
    return jnp.arange(num_frames)[None, :] < counts[:, None]


def normalised(audio: jax.Array, lengths: jax.Array) -> jax.Array:
    """Give each clip zero mean and unit variance over its own samples; zero past its end.

    Args:
        audio: [B, N] float32.
        lengths: [B] int32.

    Returns:
        [B, N], as transformers' ``Wav2Vec2FeatureExtractor`` has it for a clip by itself.
    """
    mask = frame_mask(lengths, audio.shape[1])
    centred = jnp.where(mask, audio - masked_mean(audio[:, :, None], mask), 0.0)
    variance = masked_mean(jnp.square(centred)[:, :, None], mask)
    return centred * jax.lax.rsqrt(variance + NORMALISE_EPS)


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
