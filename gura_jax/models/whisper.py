"""Whisper's encoder, which always takes windows of 30 s.

Follows transformers' ``WhisperEncoder`` and its feature extractor. A clip is filled up with silence, and the frames
past its end are left out; a longer clip is embedded as windows of 30 s one after the other, each as if it were a clip
by itself. Paper: Whisper (Radford et al., 2022).
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.whisper import KEYS
from gura_jax.models.config import IGNORED, NEUTRAL, EncoderConfig
from gura_jax.models.encoder import Family, FrameGrid, Options, Preset
from gura_jax.models.spectrogram import POWER_FLOOR, Spectrogram, SpectrogramEncoder
from gura_jax.models.transformer import Attention, EncoderLayer, Transformer, gelu

HOP = 160  # samples from one column of the spectrogram to the next
STRIDE = 2  # columns of a frame
RANGE = 8.0  # log10 below a window's loudest value, at which it is cut off


@dataclasses.dataclass(frozen=True)
class WhisperConfig(EncoderConfig):
    """Sizes, as transformers has them; defaults are those of ``base``."""

    model_types: ClassVar[tuple[str, ...]] = ("whisper",)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {name: values for name, values in NEUTRAL.items() if name != "is_encoder_decoder"}
    )
    ignored: ClassVar[re.Pattern[str]] = re.compile(
        rf"{IGNORED.pattern} | decoder_\w+ | encoder_layerdrop | dropout | use_cache | is_encoder_decoder"
        r"| max_target_positions | scale_embedding | init_std | begin_suppress_tokens | forced_decoder_ids"
        r"| median_filter_width | alignment_heads | lang_ids | task_ids",
        re.VERBOSE,
    )
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "d_model": "hidden_size",
            "encoder_layers": "num_hidden_layers",
            "encoder_attention_heads": "num_attention_heads",
            "encoder_ffn_dim": "intermediate_size",
            "activation_function": "hidden_act",
        }
    )
    do_stable_layer_norm: ClassVar[bool] = True
    layer_norm_eps: ClassVar[float] = 1e-5

    model_type: str = "whisper"
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    num_mel_bins: int = 80
    max_source_positions: int = 1500  # frames of a window

    def _relation_faults(self) -> Iterator[str]:
        yield from self._multiples("hidden_size", ["num_attention_heads"])

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``, whose ``num_hidden_layers`` repeats ``encoder_layers``."""
        return super().from_source({k: v for k, v in config.items() if k != "num_hidden_layers"})

    def tiny(self) -> Self:
        """A small encoder of the same kind, with windows of 2 s."""
        return dataclasses.replace(
            self,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_source_positions=100,
        )

    @property
    def window(self) -> int:
        """Samples of a window."""
        return self.max_source_positions * STRIDE * HOP


class WhisperAttention(Attention):
    """Self-attention whose keys have no bias."""

    biases = (True, False, True, True)


class WhisperLayer(EncoderLayer):
    """A transformer block."""

    attention_class = WhisperAttention


class WhisperTransformer(Transformer):
    """Blocks, and the layer norm after them."""

    layer_class = WhisperLayer


class Whisper(nnx.Module):
    """Whisper's encoder: two convolutions, positions, blocks."""

    transformer_class = WhisperTransformer

    def __init__(self, config: WhisperConfig, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        size, dtype = config.hidden_size, options.compute_dtype
        self.conv1 = nnx.Conv(config.num_mel_bins, size, 3, padding=1, dtype=dtype, rngs=rngs)
        self.conv2 = nnx.Conv(size, size, 3, strides=STRIDE, padding=1, dtype=dtype, rngs=rngs)
        shape = config.max_source_positions, size
        self.embed_positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.encoder = self.transformer_class(config, options, num_blocks, rngs=rngs)

    def embed(self, mel: jax.Array) -> jax.Array:
        """Windows [B, 2 T, M] -> [B, T, D]."""
        x = gelu(self.conv2(gelu(self.conv1(mel)))).astype(jnp.float32)
        return x + self.embed_positions[...][None]


class WhisperEncoder(SpectrogramEncoder):
    """Whisper as a member: a frame every 20 ms, each centred where it begins."""

    config: WhisperConfig
    network_class = Whisper

    def __init__(self, config: WhisperConfig, options: Options) -> None:
        row = Spectrogram(config.num_mel_bins, "slaney", 0, 8000, window=400, fft=400, hop=HOP, area=True)
        super().__init__(config, options, FrameGrid(STRIDE * HOP, 0.0, 1), row)
        self.least = config.window

    def log_mel(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each window by itself, one after the other."""
        (B, N), size = audio.shape, self.config.window
        number = -(-N // size)
        windows = jnp.pad(audio, ((0, 0), (0, number * size - N))).reshape(B * number, size)
        power = self.spectrogram(windows, jnp.full(B * number, size, jnp.int32), self.options.platform)[:, :-1]
        x = jnp.log10(jnp.maximum(power, POWER_FLOOR))
        x = (jnp.maximum(x, x.max(axis=(1, 2), keepdims=True) - RANGE) + 4.0) / 4.0
        return x.reshape(B, -1, x.shape[-1]), -(-lengths // size) * (size // HOP)

    def tokens(self, network: Whisper, mel: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Frames of each window; those of silence count too."""
        x = network.embed(mel.reshape(-1, STRIDE * self.config.max_source_positions, mel.shape[-1]))
        return x, jnp.ones(x.shape[:2], bool)


def _preset(name: str, hidden_size: int, blocks: int, mels: int = 80) -> Preset:
    config = WhisperConfig(
        hidden_size=hidden_size,
        num_hidden_layers=blocks,
        num_attention_heads=hidden_size // 64,
        intermediate_size=4 * hidden_size,
        num_mel_bins=mels,
    )
    return Preset(config, f"openai/{name}", licence="MIT")


WHISPER = Family(
    name="whisper",
    config=WhisperConfig,
    build=WhisperEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Whisper",
    presets={
        "whisper-tiny": _preset("whisper-tiny", 384, 4),
        "whisper-base": _preset("whisper-base", 512, 6),
        "whisper-small": _preset("whisper-small", 768, 12),
        "whisper-medium": _preset("whisper-medium", 1024, 24),
        "whisper-large-v2": _preset("whisper-large-v2", 1280, 32),
        "whisper-large-v3": _preset("whisper-large-v3", 1280, 32, mels=128),
        "whisper-large-v3-turbo": _preset("whisper-large-v3-turbo", 1280, 32, mels=128),
    },
)
