"""Dasheng: patches of four columns of a mel spectrogram, in chunks of 10.08 s.

Follows the package ``dasheng`` for a clip by itself: a longer clip is embedded as chunks, each with its own positions
and attention; the last may be shorter. Paper: Dasheng (Dinkel et al., 2024).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.dasheng import KEYS
from gura_jax.models.config import NEUTRAL, EncoderConfig
from gura_jax.models.convnets import batch_norm
from gura_jax.models.encoder import Family, FrameGrid, Options, Preset, frame_mask
from gura_jax.models.spectrogram import Spectrogram, SpectrogramEncoder, cut_off_below, decibels
from gura_jax.models.transformer import Transformer

COLUMN, COLUMN_HOP = 512, 160  # samples of a column of the spectrogram, and from one to the next
MELS, PATCH = 64, 4  # a patch is all bands of so many columns
RANGE = 120.0  # dB below a clip's loudest value, at which it is cut off

_NAMES = {"embed_dim": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
# What config.json may leave out where it has the encoder's name.
_BY_NAME: Mapping[str, dict[str, Any]] = {
    "dasheng-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "dasheng-0.6B": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16},
    "dasheng-1.2B": {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24},
}


@dataclasses.dataclass(frozen=True)
class DashengConfig(EncoderConfig):
    """Sizes; defaults are Base."""

    model_types: ClassVar[tuple[str, ...]] = ("dasheng",)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            **NEUTRAL,
            "patch_size": ((MELS, PATCH), [MELS, PATCH]),
            "patch_stride": ((MELS, PATCH), [MELS, PATCH]),
            "mlp_ratio": (4, 4.0),
            "qkv_bias": (True,),
            "init_values": (None,),
            "pooling": ("mean",),
            "n_mels": (MELS,),
            "n_fft": (COLUMN,),
            "win_size": (COLUMN,),
            "hop_size": (COLUMN_HOP,),
            "f_min": (0,),
            "f_max": (8000,),
            "center": (True,),
            "top_db": (RANGE,),
            "block_type": ("Block",),
            "attention_type": ("Attention",),
        }
    )
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType(_NAMES)
    do_stable_layer_norm: ClassVar[bool] = True
    layer_norm_eps: ClassVar[float] = 1e-6
    hidden_act: ClassVar[str] = "gelu"

    model_type: str = "dasheng"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    target_length: int = 1008  # columns of a chunk

    def _relation_faults(self) -> Iterator[str]:
        yield from self._multiples("hidden_size", ["num_attention_heads"])
        if self.target_length % PATCH:
            yield f"target_length: expected a multiple of {PATCH}, found {self.target_length}"

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``, which has sizes under ``encoder_kwargs``, or by the encoder's name."""
        own = config.get("encoder_kwargs", {})
        flat = {k: v for k, v in config.items() if k not in ("encoder_kwargs", "name", *_UNREAD)}
        by_name = _BY_NAME.get(str(config.get("name")), {})
        own = own if isinstance(own, Mapping) else {"encoder_kwargs": own}
        known = {k: v for k, v in own.items() if k not in _UNREAD}
        return super().from_source({**by_name, **flat, **known})

    def tiny(self) -> Self:
        """A small encoder of the same kind, with chunks of 0.8 s."""
        return dataclasses.replace(
            self, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, target_length=20 * PATCH
        )

    @property
    def intermediate_size(self) -> int:
        """Inside the feed-forward layers."""
        return 4 * self.hidden_size


# Training, the classifier, and what stays as it is without masking.
_UNREAD = (
    "loss", "outputdim", "drop_rate", "attn_drop_rate", "drop_path_rate", "time_patch_out", "freq_patch_out",
    "eval_avg", "group_masking", "pad_last", "wavtransforms", "spectransforms",
)  # fmt: skip


class Dasheng(nnx.Module):
    """Batch norm of the bands, patches, positions, blocks."""

    transformer_class = Transformer

    def __init__(self, config: DashengConfig, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.batch_norm = batch_norm(MELS, rngs)
        patch = MELS, PATCH
        self.projection = nnx.Conv(
            1, size, patch, strides=patch, padding="VALID", dtype=options.compute_dtype, rngs=rngs
        )
        random = 0.02 * jax.random.normal(rngs.params(), (1 + config.target_length // PATCH, size))
        self.frequency_position, self.time_positions = nnx.Param(random[0]), nnx.Param(random[1:])
        self.encoder = self.transformer_class(config, options, num_blocks, rngs=rngs)

    def patches(self, mel: jax.Array) -> jax.Array:
        """[B, F, 64] -> [B, F // 4, D]."""
        x = self.batch_norm(mel).swapaxes(1, 2)[..., None]
        return self.projection(x)[:, 0].astype(jnp.float32)


class DashengEncoder(SpectrogramEncoder):
    """Dasheng as a member: a frame every 40 ms."""

    config: DashengConfig
    network_class = Dasheng

    def __init__(self, config: DashengConfig, options: Options) -> None:
        row = Spectrogram(MELS, "htk", 0, 8000, COLUMN, COLUMN, COLUMN_HOP)
        # The columns of a frame are centred on its first sample, and 160, 320 and 480 samples later.
        hop, last = PATCH * COLUMN_HOP, (PATCH - 1) * COLUMN_HOP
        super().__init__(config, options, FrameGrid(hop, last / 2, last), row)

    def log_mel(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """In dB."""
        counts = self.spectrogram.count(lengths)
        x = decibels(self.spectrogram(audio, lengths, self.options.platform))
        return cut_off_below(x, counts, RANGE), counts

    def tokens(self, network: Dasheng, mel: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Patches with their positions, of each chunk."""
        positions = network.time_positions[...] + network.frequency_position[...][None]
        x = network.patches(mel)
        _, T, D = x.shape
        mask = frame_mask(self.grid.count(lengths), T)
        size = min(T, len(positions))
        missing = -T % size
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0))).reshape(-1, size, D) + positions[None, :size]
        return x, jnp.pad(mask, ((0, 0), (0, missing))).reshape(-1, size)


def _preset(name: str) -> Preset:
    return Preset(DashengConfig(**_BY_NAME[name]), f"mispeech/{name}", licence="Apache-2.0")


DASHENG = Family(
    name="dasheng",
    config=DashengConfig,
    build=DashengEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Dasheng",
    presets={name.replace(".", "").lower(): _preset(name) for name in _BY_NAME},
)
