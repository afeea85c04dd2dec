"""w2v-BERT 2.0: Conformer blocks over pairs of a mel spectrogram's columns.

Follows transformers' ``Wav2Vec2BertModel`` and ``SeamlessM4TFeatureExtractor`` for a clip by itself: an odd last column
of the spectrogram, which makes a frame beyond the clip there, counts for the normalisation alone.
Paper: Seamless (Seamless Communication et al., 2023).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.w2v_bert import KEYS
from gura_jax.models.config import NEUTRAL, EncoderConfig
from gura_jax.models.conformer import (
    PARTITION,
    ConformerLayer,
    ConformerTransformer,
    ConvolutionModule,
    always_scans,
    block_faults,
)
from gura_jax.models.encoder import Family, FrameGrid, Options, Preset, frame_mask, masked_mean
from gura_jax.models.spectrogram import FLOAT32_EPS, KALDI_SCALE, Spectrogram, SpectrogramEncoder
from gura_jax.models.transformer import layer_norm
from gura_jax.models.wav2vec2 import FeatureProjection

COLUMN, COLUMN_HOP = 400, 160  # samples of a column of the spectrogram, and from one to the next
MELS, PAIR = 80, 2  # a frame is so many columns
VARIANCE_EPS = 1e-7  # of each band over a clip


@dataclasses.dataclass(frozen=True)
class W2vBertConfig(EncoderConfig):
    """Sizes and kinds, as transformers has them; defaults are those of w2v-BERT 2.0."""

    model_types: ClassVar[tuple[str, ...]] = ("wav2vec2-bert",)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {**NEUTRAL, "feature_projection_input_dim": (MELS * PAIR,)}
    )
    do_stable_layer_norm: ClassVar[bool] = True
    feat_proj_layer_norm: ClassVar[bool] = True
    conv_dim: ClassVar[tuple[int, ...]] = (MELS * PAIR,)  # what is projected

    model_type: str = "wav2vec2-bert"
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "swish"
    layer_norm_eps: float = 1e-5
    position_embeddings_type: Literal["relative_key", "relative", "rotary"] = "relative_key"
    left_max_position_embeddings: int = 64
    right_max_position_embeddings: int = 8
    rotary_embedding_base: int = 10_000
    conv_depthwise_kernel_size: int = 31

    def _relation_faults(self) -> Iterator[str]:
        yield from self._multiples("hidden_size", ["num_attention_heads"])
        yield from block_faults(self)

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``."""
        return super().from_source({k: v for k, v in config.items() if k not in _UNREAD})

    @property
    def block_norm_eps(self) -> float:
        """Of the norms in the blocks."""
        return self.layer_norm_eps

    def tiny(self) -> Self:
        """A small encoder of the same kind, whose distances end within a short clip."""
        return dataclasses.replace(
            self,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            left_max_position_embeddings=6,
            right_max_position_embeddings=2,
        )


# Of what is not there without add_adapter, and of training.
_UNREAD = ("adapter_act", "use_intermediate_ffn_before_adapter", "max_source_positions", "conformer_conv_dropout")


class Convolutions(ConvolutionModule):
    """Of what precedes a frame, with a layer norm."""

    causal = True
    norm = staticmethod(layer_norm)


class W2vBertLayer(ConformerLayer):
    """A Conformer block."""

    convolution_class = Convolutions


class W2vBertTransformer(ConformerTransformer):
    """Conformer blocks."""

    layer_class = W2vBertLayer
    has_norm = False


class W2vBert(nnx.Module):
    """Projection and blocks."""

    transformer_class = W2vBertTransformer

    def __init__(self, config: W2vBertConfig, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        self.feature_projection = FeatureProjection(config, options, rngs=rngs)
        self.encoder = self.transformer_class(config, options, num_blocks, rngs=rngs)


class W2vBertEncoder(SpectrogramEncoder):
    """w2v-BERT 2.0 as a member: a frame every 20 ms."""

    config: W2vBertConfig
    network_class = W2vBert
    partition = PARTITION

    def __init__(self, config: W2vBertConfig, options: Options) -> None:
        row = Spectrogram(MELS, "kaldi", 20, 8000, COLUMN, 512, COLUMN_HOP, "kaldi_povey")
        window = COLUMN + (PAIR - 1) * COLUMN_HOP
        super().__init__(config, options, FrameGrid(PAIR * COLUMN_HOP, window / 2, window), row)
        self.always_scans = always_scans(config)

    def log_mel(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logarithm, each band with zero mean and unit variance over the clip."""
        power = self.spectrogram(KALDI_SCALE * audio, lengths, self.options.platform)
        x, counts = jnp.log(jnp.maximum(power, FLOAT32_EPS)), self.spectrogram.count(lengths)
        mask = frame_mask(counts, x.shape[1])
        # Around the first column: bands that never change have a variance of zero, and not of what rounding leaves.
        x = jnp.where(mask[:, :, None], x - x[:, :1], 0.0)
        x = jnp.where(mask[:, :, None], x - masked_mean(x, mask)[:, None, :], 0.0)
        number = counts[:, None].astype(x.dtype)
        variance = masked_mean(jnp.square(x), mask) * number / jnp.maximum(number - 1, 1)
        return x * jax.lax.rsqrt(variance + VARIANCE_EPS)[:, None, :], counts

    def tokens(self, network: W2vBert, mel: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The pairs, projected."""
        B, F, M = mel.shape
        x = network.feature_projection(mel[:, : F // PAIR * PAIR].reshape(B, -1, PAIR * M))
        return x, frame_mask(self.grid.count(lengths), x.shape[1])


W2V_BERT = Family(
    name="wav2vec2-bert",
    config=W2vBertConfig,
    build=W2vBertEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.W2vBert",
    presets={"w2v-bert-2": Preset(W2vBertConfig(), "facebook/w2v-bert-2.0", licence="MIT")},
)
