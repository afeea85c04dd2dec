"""BEATs and OpenBEATs: patches of a mel spectrogram in WavLM's transformer, with DeepNorm.

Follows the authors' code for a clip by itself; the mask of theirs that makes up for padding is not exact. Paper: BEATs
(Chen et al., 2022).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.beats import KEYS
from gura_jax.models.attention import RelativeBias
from gura_jax.models.config import NEUTRAL, EncoderConfig
from gura_jax.models.encoder import Family, FrameGrid, Options, Output, Preset, frame_mask
from gura_jax.models.spectrogram import FLOAT32_EPS, KALDI_SCALE, Spectrogram, SpectrogramEncoder
from gura_jax.models.transformer import Dropout, dropouts, layer_norm
from gura_jax.models.wavlm import WavLMAttention, WavLMEncoder, WavLMLayer, WavLMTransformer, bucket_faults

COLUMN, COLUMN_HOP = 400, 160  # samples of a column of the spectrogram, and from one to the next
MELS, PATCH = 128, 16
ROWS = MELS // PATCH  # patches on top of each other

_NAMES = {
    "encoder_embed_dim": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_embed_dim": "intermediate_size",
    "activation_fn": "hidden_act",
    "embed_dim": "patch_embed_dim",
    "conv_pos": "num_conv_pos_embeddings",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "max_distance": "max_bucket_distance",
}


@dataclasses.dataclass(frozen=True)
class BEATsConfig(EncoderConfig):
    """Sizes and kinds; defaults are Microsoft's."""

    model_types: ClassVar[tuple[str, ...]] = ("beats",)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            **NEUTRAL,
            "input_patch_size": (PATCH,),
            "conv_bias": (False,),
            "layer_norm_first": (False,),
            "relative_position_embedding": (True,),
            "gru_rel_pos": (True,),
        }
    )
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType(_NAMES)
    do_stable_layer_norm: ClassVar[bool] = False
    layer_norm_eps: ClassVar[float] = 1e-5
    feat_extract_activation: ClassVar[str] = "gelu"  # after the positional convolution
    conv_pos_batch_norm: ClassVar[bool] = False

    model_type: str = "beats"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    patch_embed_dim: int = 512
    deep_norm: bool = True
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    num_buckets: int = 320
    max_bucket_distance: int = 800
    fbank_mean: float = 15.41663
    fbank_std: float = 6.55582

    def _relation_faults(self) -> Iterator[str]:
        yield from self._multiples("hidden_size", ["num_attention_heads", "num_conv_pos_embedding_groups"])
        yield from bucket_faults(self)

    def settings(self) -> dict[str, Any]:
        """The ``cfg`` of the authors' files."""
        own = {theirs: getattr(self, ours) for theirs, ours in _NAMES.items()}
        kept = {"deep_norm": self.deep_norm, "num_buckets": self.num_buckets}
        fixed = {name: values[0] for name, values in self.neutral.items() if name not in NEUTRAL}
        return own | kept | fixed

    def tiny(self) -> Self:
        """A small encoder of the same kind."""
        return dataclasses.replace(
            self,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            patch_embed_dim=16,
            num_conv_pos_embedding_groups=4,
        )


class BEATsAttention(WavLMAttention):
    """Self-attention whose biases are gated by the queries; WavLM's are by the input."""

    def bias(self, x: jax.Array, q: jax.Array, shared: jax.Array) -> RelativeBias:
        """By gates from the queries [B, T, H, K], of the table [2 T - 1, H]."""
        return RelativeBias(self.gate(q), shared)


class BEATsLayer(WavLMLayer):
    """A transformer block, post-norm, whose residual is scaled (DeepNorm; Wang et al., 2022)."""

    attention_class = BEATsAttention

    def __init__(self, config: BEATsConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, options, rngs=rngs)
        self.alpha = (2 * config.num_hidden_layers) ** 0.25 if config.deep_norm else 1.0

    def __call__(self, x: jax.Array, mask: jax.Array, shared: Any, dropout: Dropout | None = None) -> jax.Array:
        """[B, T, D], [B, T], the biases by relative position -> [B, T, D]."""
        drop = dropouts(dropout, 2)
        x = self.layer_norm(self.alpha * x + drop[0](self.attention(x, mask, shared)))
        return self.final_layer_norm(self.alpha * x + drop[1](self.feed_forward(x)))


class BEATsTransformer(WavLMTransformer):
    """Positional convolution and blocks, which share a table of biases by relative position."""

    layer_class = BEATsLayer


class BEATs(nnx.Module):
    """Patches and their projection, and the transformer."""

    transformer_class = BEATsTransformer

    def __init__(self, config: BEATsConfig, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        size, dtype, patch = config.patch_embed_dim, options.compute_dtype, (PATCH, PATCH)
        self.patch_embedding = nnx.Conv(
            1, size, patch, strides=patch, padding="VALID", use_bias=False, dtype=dtype, rngs=rngs
        )
        self.layer_norm = layer_norm(size, config.layer_norm_eps, rngs)
        projects = size != config.hidden_size
        self.projection = nnx.Linear(size, config.hidden_size, dtype=dtype, rngs=rngs) if projects else None
        self.encoder = self.transformer_class(config, options, num_blocks, rngs=rngs)

    def embed(self, mel: jax.Array) -> jax.Array:
        """[B, F, 128] -> [B, 8 * (F // 16), D], column by column."""
        x = self.patch_embedding(mel[..., None])  # [B, F // 16, 8, D']
        x = self.layer_norm(x.reshape(len(x), -1, x.shape[-1]))
        return x if self.projection is None else self.projection(x).astype(jnp.float32)


class BEATsEncoder(SpectrogramEncoder):
    """BEATs as a member: a frame is the mean of the patches on top of each other, every 160 ms."""

    config: BEATsConfig
    network_class = BEATs
    partition = WavLMEncoder.partition

    def __init__(self, config: BEATsConfig, options: Options) -> None:
        row = Spectrogram(MELS, "kaldi", 20, 8000, COLUMN, 512, COLUMN_HOP, "kaldi_povey")
        window = COLUMN + (PATCH - 1) * COLUMN_HOP
        super().__init__(config, options, FrameGrid(PATCH * COLUMN_HOP, window / 2, window), row)

    def log_mel(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logarithm, normalised by what it was trained on."""
        power = self.spectrogram(KALDI_SCALE * audio, lengths, self.options.platform)
        x = (jnp.log(jnp.maximum(power, FLOAT32_EPS)) - self.config.fbank_mean) / (2 * self.config.fbank_std)
        return x, self.spectrogram.count(lengths)

    def tokens(self, network: BEATs, mel: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The patches of each clip."""
        x = network.embed(mel)
        return x, frame_mask(ROWS * self.grid.count(lengths), x.shape[1])

    def outputs(self, x: jax.Array, audio: jax.Array, lengths: jax.Array) -> Output:
        """Means of the patches."""
        frames = x.reshape(len(x), -1, ROWS, x.shape[-1]).mean(axis=2)
        return Output(frames, self.grid.count(lengths))


BEATS = Family(
    name="beats",
    config=BEATsConfig,
    build=BEATsEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.BEATs",
    presets={"beats": Preset(BEATsConfig(), licence="MIT")},  # its authors' files, on no hub
)
