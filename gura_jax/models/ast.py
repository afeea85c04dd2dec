"""AST, the audio spectrogram transformer: patches of a window of 10.24 s.

Follows transformers' ``ASTModel`` and its feature extractor, which fills a short clip up and cuts a long one off. Here
a longer clip is embedded as windows, each as if it were a clip by itself; a window begins where the patches of the one
before it end. Paper: AST (Gong et al., 2021).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.convert.ast import KEYS
from gura_jax.models.config import NEUTRAL, EncoderConfig
from gura_jax.models.encoder import Family, FrameGrid, Options, Output, Preset, frame_mask
from gura_jax.models.spectrogram import FLOAT32_EPS, Spectrogram, SpectrogramEncoder
from gura_jax.models.transformer import Transformer

COLUMN, COLUMN_HOP = 400, 160  # samples of a column of the spectrogram, and from one to the next
SPECIAL = 2  # tokens before the patches: of the class, and of distillation


@dataclasses.dataclass(frozen=True)
class ASTConfig(EncoderConfig):
    """Sizes, as transformers has them, and the statistics of its feature extractor; defaults are those for AudioSet."""

    model_types: ClassVar[tuple[str, ...]] = ("audio-spectrogram-transformer",)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {**NEUTRAL, "qkv_bias": (True,), "do_normalize": (True,)}
    )
    preprocessor: ClassVar[tuple[str, ...]] = ("mean", "std", "do_normalize")
    do_stable_layer_norm: ClassVar[bool] = True

    model_type: str = "audio-spectrogram-transformer"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    patch_size: int = 16
    frequency_stride: int = 10
    time_stride: int = 10
    max_length: int = 1024  # columns of a window
    num_mel_bins: int = 128
    mean: float = -4.2677393
    std: float = 4.5689974

    def _relation_faults(self) -> Iterator[str]:
        yield from self._multiples("hidden_size", ["num_attention_heads"])
        if min(self.num_mel_bins, self.max_length) < self.patch_size:
            yield f"patch_size: expected at most num_mel_bins and max_length, found {self.patch_size}"

    def tiny(self) -> Self:
        """A small encoder of the same kind, with windows of 1 s."""
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        return dataclasses.replace(self, **sizes, max_length=100)

    @property
    def rows(self) -> int:
        """Patches on top of each other."""
        return (self.num_mel_bins - self.patch_size) // self.frequency_stride + 1

    @property
    def columns(self) -> int:
        """Patches side by side in a window."""
        return (self.max_length - self.patch_size) // self.time_stride + 1


class AST(nnx.Module):
    """Patches, two tokens, positions, blocks."""

    transformer_class = Transformer

    def __init__(self, config: ASTConfig, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        size, patch = config.hidden_size, config.patch_size
        self.projection = nnx.Conv(
            1,
            size,
            (patch, patch),
            strides=(config.frequency_stride, config.time_stride),
            padding="VALID",
            dtype=options.compute_dtype,
            rngs=rngs,
        )
        self.cls_token, self.distillation_token = (_random(rngs, size) for _ in range(SPECIAL))
        self.positions = _random(rngs, SPECIAL + config.rows * config.columns, size)
        self.encoder = self.transformer_class(config, options, num_blocks, rngs=rngs)

    def embed(self, mel: jax.Array) -> jax.Array:
        """Windows [B, F, M] -> [B, 2 + rows * columns, D], row by row."""
        x = self.projection(mel.swapaxes(1, 2)[..., None]).astype(jnp.float32)  # [B, rows, columns, D]
        x = x.reshape(len(x), -1, x.shape[-1])
        special = jnp.stack([self.cls_token[...], self.distillation_token[...]])
        special = jnp.broadcast_to(special[None], (len(x), *special.shape))
        return jnp.concatenate([special, x], axis=1) + self.positions[...][None]


def _random(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


class ASTEncoder(SpectrogramEncoder):
    """AST as a member.

    A frame is the mean of the patches on top of each other, every 100 ms. The embedding of a clip is the mean of the
    two tokens, as the classifier takes it; of several windows the mean, by the frames in each.
    """

    config: ASTConfig
    network_class = AST

    def __init__(self, config: ASTConfig, options: Options) -> None:
        hop = config.time_stride * COLUMN_HOP
        window = COLUMN + (config.patch_size - 1) * COLUMN_HOP
        row = Spectrogram(config.num_mel_bins, "kaldi", 20, 8000, COLUMN, 512, COLUMN_HOP, "kaldi_hann")
        super().__init__(config, options, FrameGrid(hop, window / 2, window), row)
        self.least = COLUMN + (config.max_length - 1) * COLUMN_HOP
        # The tokens that it is made of are those of the last state.
        self.pooled_size = config.hidden_size if options.layers == "last" else 0

    def log_mel(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each window, one after the other, filled up with zeros as the feature extractor does."""
        size, step = self.config.max_length, self.config.columns * self.config.time_stride  # columns
        power = self.spectrogram(audio, lengths, self.options.platform)
        x = jnp.log(jnp.maximum(power, FLOAT32_EPS))
        own = self.spectrogram.count(lengths)  # columns of each clip
        x = jnp.where(frame_mask(own, x.shape[1])[:, :, None], x, 0.0)
        x = (x - self.config.mean) / (2 * self.config.std)
        number = -(-self.grid.count(audio.shape[1]) // self.config.columns)
        missing = max(0, (number - 1) * step + size - x.shape[1])
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)), constant_values=-self.config.mean / (2 * self.config.std))
        index = np.arange(number, dtype=np.int32)[:, None] * step + np.arange(size, dtype=np.int32)[None, :]
        x = x[:, index.reshape(-1)]  # [B, number * size, M]
        return x, -(-self.grid.count(lengths) // self.config.columns) * size

    def tokens(self, network: AST, mel: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Those of each window; what it is filled up with counts too."""
        x = network.embed(mel.reshape(-1, self.config.max_length, mel.shape[-1]))
        return x, jnp.ones(x.shape[:2], bool)

    def outputs(self, x: jax.Array, audio: jax.Array, lengths: jax.Array) -> Output:
        """Means of the patches, and of the two tokens."""
        B, columns, D = len(audio), self.config.columns, x.shape[-1]
        counts = self.grid.count(lengths)
        frames = x[:, SPECIAL:].reshape(len(x), -1, columns, D).mean(axis=1)
        frames = frames.reshape(B, -1, D)[:, : self.grid.count(audio.shape[1])]
        if not self.pooled_size:
            return Output(frames, counts)
        tokens = x[:, :SPECIAL].mean(axis=1).reshape(B, -1, D)
        before = columns * jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        weights = jnp.clip(counts[:, None] - before, 0, columns) / jnp.maximum(counts, 1)[:, None]  # of each window
        return Output(frames, counts, (tokens * weights[:, :, None]).sum(axis=1))


_LICENCE = "BSD-3-Clause"

AST_FAMILY = Family(
    name="audio-spectrogram-transformer",
    config=ASTConfig,
    build=ASTEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.AST",
    presets={"ast": Preset(ASTConfig(), "MIT/ast-finetuned-audioset-10-10-0.4593", licence=_LICENCE)},
)
