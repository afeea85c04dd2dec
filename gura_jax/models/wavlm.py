"""WavLM: wav2vec 2.0's network, whose attention has a gated bias by relative position.

Follows transformers' ``WavLMModel``, which agrees bit for bit with the authors' code and torchaudio's where nothing is
padded. Paper: WavLM (Chen et al., 2022), Section III-A.
"""

import dataclasses
import math
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.convert.wavlm import KEYS
from gura_jax.models.attention import RelativeBias
from gura_jax.models.encoder import Family, Options, Preset
from gura_jax.models.transformer import Attention, EncoderLayer
from gura_jax.models.wav2vec2 import LARGE, PositionalTransformer, Wav2Vec2, Wav2Vec2Encoder
from gura_jax.models.wav2vec2_config import Wav2Vec2Config

GATES = 8  # numbers that a head's two gates are made of, four each


@dataclasses.dataclass(frozen=True)
class WavLMConfig(Wav2Vec2Config):
    """Sizes and kinds, as transformers has them; defaults are Base and Base+."""

    model_types: ClassVar[tuple[str, ...]] = ("wavlm",)

    model_type: str = "wavlm"
    num_buckets: int = 320  # of relative positions
    max_bucket_distance: int = 800  # frames: those further apart are in the last bucket

    def _relation_faults(self) -> Iterator[str]:
        yield from super()._relation_faults()
        yield from bucket_faults(self)


def bucket_faults(config: Any) -> Iterator[str]:
    """What is wrong with the buckets of relative positions, once their numbers are positive integers."""
    if not 1 <= config.num_buckets // 4 < config.max_bucket_distance:
        yield (
            "num_buckets, max_bucket_distance: expected 4 or more, and more than a quarter of these, found "
            f"{config.num_buckets} and {config.max_bucket_distance}"
        )


def relative_buckets(num_frames: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Buckets [2 T - 1] of the relative positions 1 - T to T - 1 of a key, as T5 has them (Raffel et al., 2020).

    Half of the buckets are for keys that follow; of each half the near positions have a bucket each, and the others
    share the rest by the logarithm of the distance.
    """
    distance = np.arange(1 - num_frames, num_frames)
    half = num_buckets // 2
    near = half // 2
    size = np.abs(distance)
    # In float32, as PyTorch computes it: a rounding decides the bucket.
    far = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(near)) / np.float32(math.log(max_distance / near))
    far = (np.float32(near) + far * np.float32(half - near)).astype(np.int64)
    return half * (distance > 0) + np.where(size < near, size, np.minimum(far, half - 1))


class WavLMAttention(Attention):
    """Self-attention with a bias by relative position, which gates from each head's part of the input scale."""

    def __init__(self, config: Any, options: Options, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, options, rngs=rngs)
        size = config.hidden_size // config.num_attention_heads
        self.gru_rel_pos_linear = nnx.Linear(size, GATES, dtype=options.compute_dtype, rngs=rngs)
        self.gru_rel_pos_const = nnx.Param(jnp.ones(config.num_attention_heads, jnp.float32))

    def bias(self, x: jax.Array, q: jax.Array, shared: jax.Array) -> RelativeBias:
        """By gates from the input [B, T, D], of the table [2 T - 1, H]."""
        return RelativeBias(self.gate(x.reshape(q.shape)), shared)

    def gate(self, heads: jax.Array) -> jax.Array:
        """The scale [B, T, H] of each query's biases, from each head's part [B, T, H, K] of something."""
        parts = self.gru_rel_pos_linear(heads).astype(jnp.float32)
        update, reset = jnp.moveaxis(jax.nn.sigmoid(parts.reshape(*heads.shape[:3], 2, GATES // 2).sum(axis=-1)), -1, 0)
        return update * (reset * self.gru_rel_pos_const[...][None, None, :] - 1.0) + 2.0


class WavLMLayer(EncoderLayer):
    """A transformer block."""

    attention_class = WavLMAttention


class WavLMTransformer(PositionalTransformer):
    """Positional convolution and blocks, which share a table of biases by relative position."""

    layer_class = WavLMLayer

    def __init__(self, config: Any, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, options, num_blocks, rngs=rngs)
        self.buckets = config.num_buckets, config.max_bucket_distance
        self.rel_attn_embed = nnx.Embed(config.num_buckets, config.num_attention_heads, rngs=rngs)

    def shared(self, num_frames: int) -> jax.Array:
        """The biases by relative position, [2 T - 1, H]."""
        return self.rel_attn_embed.embedding[...][relative_buckets(num_frames, *self.buckets)]


class WavLM(Wav2Vec2):
    """WavLM without its heads."""

    transformer_class = WavLMTransformer


class WavLMEncoder(Wav2Vec2Encoder):
    """WavLM as a member; hidden states are those of wav2vec 2.0."""

    network_class = WavLM
    partition = MappingProxyType(
        {
            **Wav2Vec2Encoder.partition,
            r"encoder\.rel_attn_embed\.embedding": -1,
            r"encoder\.layers\..*gru_rel_pos_const": -1,
        }
    )


_LARGE: dict[str, Any] = LARGE | {"conv_bias": False}
_LICENCE = "MIT or CC-BY-SA-3.0: its authors say both"  # github.com/microsoft/unilm, issue 1757

WAVLM = Family(
    name="wavlm",
    config=WavLMConfig,
    build=WavLMEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.WavLM",
    presets={
        "wavlm-base": Preset(WavLMConfig(), "microsoft/wavlm-base", licence=_LICENCE),
        "wavlm-base-plus": Preset(WavLMConfig(), "microsoft/wavlm-base-plus", licence=_LICENCE),
        "wavlm-large": Preset(WavLMConfig(**_LARGE), "microsoft/wavlm-large", True, _LICENCE),
    },
)
