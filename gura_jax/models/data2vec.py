"""data2vec-audio: wav2vec 2.0's network with several small convolutions for positions.

Follows transformers' ``Data2VecAudioModel``, but that a clip's results never depend on the padding. Paper: data2vec
(Baevski et al., 2022).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.data2vec import KEYS
from gura_jax.models.encoder import Family, Options, Preset
from gura_jax.models.transformer import ACTIVATIONS
from gura_jax.models.wav2vec2 import (
    LARGE,
    PositionalTransformer,
    Wav2Vec2,
    Wav2Vec2Encoder,
    convolution_for,
    same_convolution,
)
from gura_jax.models.wav2vec2_config import Wav2Vec2Config

POSITION_NORM_EPS = 1e-5  # PyTorch's default: these norms ignore the config's layer_norm_eps


@dataclasses.dataclass(frozen=True)
class Data2VecConfig(Wav2Vec2Config):
    """Sizes and kinds, as transformers has them; defaults are Base."""

    model_types: ClassVar[tuple[str, ...]] = ("data2vec-audio",)

    model_type: str = "data2vec-audio"
    feat_extract_norm: Literal["group", "layer"] = "layer"
    num_conv_pos_embeddings: int = 5  # convolutions; elsewhere it is the size of one
    conv_pos_kernel_size: int = 19

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``; transformers does not look at the norms' kinds, which are always the same."""
        return super().from_source({k: v for k, v in config.items() if k not in _UNREAD})


_UNREAD = ("feat_extract_norm", "do_stable_layer_norm")


class PositionalLayer(nnx.Module):
    """Grouped convolution, layer norm without weights, activation."""

    def __init__(self, config: Data2VecConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        size, groups = config.hidden_size, config.num_conv_pos_embedding_groups
        self.dtype, self.convolve = options.compute_dtype, convolution_for(options)
        self.activation = ACTIVATIONS[config.feat_extract_activation]
        self.conv = nnx.Conv(size, size, config.conv_pos_kernel_size, feature_group_count=groups, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(
            size,
            epsilon=POSITION_NORM_EPS,
            use_bias=False,
            use_scale=False,
            use_fast_variance=False,
            dtype=jnp.float32,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, D], [B, T] -> [B, T, D]; what follows a clip counts as zero, as if it stood alone."""
        x = same_convolution(self.conv, jnp.where(mask[:, :, None], x, 0.0).astype(self.dtype), self.convolve)
        return self.activation(self.layer_norm(x))


class PositionalLayers(nnx.Module):
    """The convolutions for positions, one after the other."""

    def __init__(self, config: Data2VecConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        number = config.num_conv_pos_embeddings
        self.layers = nnx.List(PositionalLayer(config, options, rngs=rngs) for _ in range(number))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, D], [B, T] -> [B, T, D]."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Data2VecTransformer(PositionalTransformer):
    """Positions and blocks."""

    positional_class = PositionalLayers


class Data2Vec(Wav2Vec2):
    """data2vec-audio without its heads."""

    transformer_class = Data2VecTransformer


class Data2VecEncoder(Wav2Vec2Encoder):
    """data2vec-audio as a member; hidden states are those of wav2vec 2.0."""

    network_class = Data2Vec


_LARGE: dict[str, Any] = {
    name: LARGE[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}

DATA2VEC = Family(
    name="data2vec-audio",
    config=Data2VecConfig,
    build=Data2VecEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Data2VecAudio",
    presets={
        "data2vec-audio-base": Preset(Data2VecConfig(), "facebook/data2vec-audio-base", True, "MIT"),
        "data2vec-audio-large": Preset(Data2VecConfig(**_LARGE), "facebook/data2vec-audio-large", True, "MIT"),
    },
)
