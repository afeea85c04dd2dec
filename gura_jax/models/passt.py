"""PaSST (base2levelmel) as its HEAR submission embeds: a scene for each clip, and a timestamp embedding every 50 ms.

Follows the package ``hear21passt``. Classes' scores and the mean of two tokens make 1295 numbers: of a clip of up to
10 s as it is, or the mean of windows of 10 s every 2.5 s; and for timestamps of the 160 ms and the 640 ms around each,
with the spectrogram of the 60 ms around it. What lies beyond a clip is its reflection. Paper: PaSST (Koutini et al.,
2022).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.convert.passt import KEYS
from gura_jax.models.attention import even_blocks
from gura_jax.models.config import EncoderConfig
from gura_jax.models.convnets import refuse_options
from gura_jax.models.encoder import Family, FrameGrid, Noise, Options, Output, Params, Preset, frame_mask
from gura_jax.models.spectrogram import PRE_EMPHASIS, Spectrogram, reflected
from gura_jax.models.transformer import Transformer, TransformerEncoder, layer_norm

SAMPLE_RATE = 32_000  # Hz
HOP = 1600  # samples from one timestamp to the next
WINDOWS = (5120, 20_480)  # samples around each
MEL_WINDOW = 1920
LONGEST, SCENE_HOP = 320_000, 80_000  # samples that positions reach, and from one window of a longer clip to the next
COLUMN_HOP = 320
MELS, PATCH, STRIDE = 128, 16, 10
ROWS, COLUMNS = 12, 99  # of patches
SPECIAL = 2  # tokens before the patches: of the class, and of distillation
HEAD_NORM_EPS = 1e-5  # PyTorch's default
_SPECTROGRAM = Spectrogram(MELS, "kaldi", 0, 15_000, 800, 1024, COLUMN_HOP, "hann_symmetric", sample_rate=SAMPLE_RATE)


@dataclasses.dataclass(frozen=True)
class PasstConfig(EncoderConfig):
    """Sizes; defaults are those of the submission."""

    model_types: ClassVar[tuple[str, ...]] = ("passt",)
    activations: ClassVar[tuple[str, ...]] = ()
    do_stable_layer_norm: ClassVar[bool] = True
    layer_norm_eps: ClassVar[float] = 1e-6
    hidden_act: ClassVar[str] = "gelu"

    model_type: str = "passt"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    classes: int = 527

    def _relation_faults(self) -> Iterator[str]:
        yield from self._multiples("hidden_size", ["num_attention_heads"])

    def tiny(self) -> Self:
        """A small encoder of the same kind."""
        return dataclasses.replace(self, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, classes=5)

    @property
    def intermediate_size(self) -> int:
        """Inside the feed-forward layers."""
        return 4 * self.hidden_size


class Passt(nnx.Module):
    """Patches, two tokens, positions, blocks, and the classes."""

    transformer_class = Transformer

    def __init__(self, config: PasstConfig, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        size, dtype, patch = config.hidden_size, options.compute_dtype, (PATCH, PATCH)
        self.projection = nnx.Conv(1, size, patch, strides=STRIDE, padding="VALID", dtype=dtype, rngs=rngs)
        random = 0.02 * jax.random.normal(rngs.params(), (2 * SPECIAL + ROWS + COLUMNS, size))
        self.cls_token, self.dist_token = nnx.Param(random[0]), nnx.Param(random[1])
        self.special_positions = nnx.Param(random[SPECIAL : 2 * SPECIAL])
        self.row_positions = nnx.Param(random[2 * SPECIAL : 2 * SPECIAL + ROWS])
        self.column_positions = nnx.Param(random[2 * SPECIAL + ROWS :])
        self.encoder = self.transformer_class(config, options, num_blocks, rngs=rngs)
        self.head_norm = layer_norm(size, HEAD_NORM_EPS, rngs)
        self.head = nnx.Linear(size, config.classes, dtype=dtype, rngs=rngs)

    def embed(self, mel: jax.Array) -> jax.Array:
        """[B, F, M] -> [B, 2 + columns * rows, D], column by column."""
        x = self.projection(mel[..., None]).astype(jnp.float32)  # [B, columns, rows, D]
        x = x + self.column_positions[...][None, : x.shape[1], None] + self.row_positions[...][None, None]
        special = jnp.stack([self.cls_token[...], self.dist_token[...]]) + self.special_positions[...]
        special = jnp.broadcast_to(special[None], (len(x), *special.shape))
        return jnp.concatenate([special, x.reshape(len(x), -1, x.shape[-1])], axis=1)

    def scores(self, x: jax.Array) -> jax.Array:
        """Of the last state [B, T, D]: the classes' and the mean of the two tokens, [B, C + D]."""
        features = x[:, :SPECIAL].mean(axis=1)
        return jnp.concatenate([self.head(self.head_norm(features)).astype(jnp.float32), features], axis=-1)


class PasstEncoder(TransformerEncoder):
    """PaSST as a member."""

    config: PasstConfig
    network_class = Passt

    def __init__(self, config: PasstConfig, options: Options) -> None:
        refuse_options(config.model_type, options, HOP)
        super().__init__(config, options, FrameGrid(HOP, 0.0, 0))
        self.sample_rate = SAMPLE_RATE
        self.shortest = WINDOWS[-1] // 2 + 1  # so that it can be reflected
        self.shortest_pooled = 2 + (PATCH - 1) * COLUMN_HOP  # a patch, after pre-emphasis
        self.num_states = 0
        self.pooled_size = config.classes + config.hidden_size
        self.feature_size = len(WINDOWS) * self.pooled_size + MELS * (MEL_WINDOW // COLUMN_HOP)
        self.parts = ("log-mel", "frames")

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> Output:
        """Frames [B, T, 2 P + 768], counts [B] and pooled [B, P]: P is the number of classes and of features."""
        frames = self._frames(params, audio, lengths)
        return Output(frames, self.grid.count(lengths), self._scene(params, audio, lengths))

    def disturbed(self, params: Params, audio: jax.Array, lengths: jax.Array, noise: Noise) -> Output:
        """The same: noise is not defined for windows that overlap."""
        return self(params, audio, lengths)

    def depths(self, params: Params) -> Mapping[str, np.ndarray]:
        """By the block; the classes' layers follow the last one."""
        last = np.asarray(self.config.num_hidden_layers, np.int32)
        after = {name: last for name in params if name.startswith(("head.", "head_norm."))}
        return {**super().depths(params), **after}

    def states(
        self, params: Params, audio: jax.Array, lengths: jax.Array
    ) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """The spectrogram, and the frames."""
        yield "log-mel", self._log_mel(audio, lengths), _SPECTROGRAM.count(lengths - 1)
        yield "frames", self._frames(params, audio, lengths), self.grid.count(lengths)

    def _log_mel(self, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, N], [B] -> [B, F, 128], of the audio with pre-emphasis, which has a sample less."""
        lengths = lengths - 1
        x = audio[:, 1:] - PRE_EMPHASIS * audio[:, :-1]
        x = jnp.where(frame_mask(lengths, x.shape[1]), x, 0.0)
        return (jnp.log(_SPECTROGRAM(x, lengths, self.options.platform) + 1e-5) + 4.5) / 5.0

    def _embed_clips(self, params: Params, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """Clips of up to 10 s as they are: [B, N], [B] -> [B, P]."""
        network: Passt = self.without_blocks(params)
        x = network.embed(self._log_mel(audio, lengths))
        patches = (_SPECTROGRAM.count(lengths - 1) - PATCH) // STRIDE + 1
        mask = frame_mask(SPECIAL + ROWS * jnp.clip(patches, 1, COLUMNS), x.shape[1])
        return network.scores(self.chosen_states(params, network.encoder, x, mask)[0])

    def _scene(self, params: Params, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, N], [B] -> [B, P]."""
        whole = self._embed_clips(params, audio[:, :LONGEST], jnp.minimum(lengths, LONGEST))
        if audio.shape[1] <= LONGEST:
            return whole
        number = 1 + audio.shape[1] // SCENE_HOP
        around = reflected(audio, jnp.maximum(lengths, LONGEST), LONGEST // 2)
        around = jnp.pad(around, ((0, 0), (0, max(0, (number - 1) * SCENE_HOP + LONGEST - around.shape[1]))))
        counts = 1 + lengths // SCENE_HOP

        def add(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            window = jax.lax.dynamic_slice_in_dim(around, SCENE_HOP * i, LONGEST, axis=1)
            out = self._embed_clips(params, window, jnp.full(len(audio), LONGEST, jnp.int32))
            return total + jnp.where((i < counts)[:, None], out, 0.0), None

        add = self.options.rematerialise(add)
        total, _ = jax.lax.scan(add, jnp.zeros_like(whole), jnp.arange(number, dtype=jnp.int32))
        return jnp.where((lengths <= LONGEST)[:, None], whole, total / counts[:, None].astype(jnp.float32))

    def _frames(self, params: Params, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """[B, N], [B] -> [B, T, D], some timestamps at a time."""
        B, T = len(audio), self.grid.count(audio.shape[1])
        tokens = SPECIAL + ROWS * COLUMNS * WINDOWS[-1] // LONGEST  # about, of the longer window
        blocks, size = even_blocks(T, max(1, self.options.platform.tokens // (tokens * B)))
        half = WINDOWS[-1] // 2
        around = reflected(audio, jnp.maximum(lengths, half + 1), half)
        around = jnp.pad(around, ((0, 0), (0, max(0, (blocks * size - 1) * HOP + 2 * half - around.shape[1]))))

        def block(i: jax.Array) -> jax.Array:
            some = jax.lax.dynamic_slice_in_dim(around, HOP * size * i, (size - 1) * HOP + 2 * half, axis=1)
            pieces = [self._windows(some, size, window) for window in (*WINDOWS, MEL_WINDOW)]
            *outer, mel = ((x, jnp.full(len(x), x.shape[1], jnp.int32)) for x in pieces)
            embedded = [self._embed_clips(params, *piece) for piece in outer]
            mels = self._log_mel(*mel).swapaxes(1, 2).reshape(B * size, -1)  # band by band
            return jnp.concatenate([*embedded, mels], axis=-1).reshape(B, size, -1)

        x = jax.lax.map(self.options.rematerialise(block), jnp.arange(blocks, dtype=jnp.int32))
        return x.swapaxes(0, 1).reshape(B, blocks * size, -1)[:, :T]

    def _windows(self, audio: jax.Array, number: int, size: int) -> jax.Array:
        """So many windows of a size, centred alike: [B, W] -> [B * number, size]."""
        first = (WINDOWS[-1] - size) // 2
        index = np.arange(number, dtype=np.int32)[:, None] * HOP + first + np.arange(size, dtype=np.int32)[None, :]
        return audio[:, index].reshape(-1, size)


PASST = Family(
    name="passt",
    config=PasstConfig,
    build=PasstEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Passt",
    presets={"passt": Preset(PasstConfig(), licence="CC-BY-4.0")},  # passt-s-f128-p16-s10-ap.476-swa.pt of its authors
)
