"""TERA: a BERT of three blocks over a mel spectrogram, in pieces of up to 15 s.

Follows s3prl's ``UpstreamExpert`` for a clip by itself: a longer clip is cut into as few equal pieces as possible, each
with its own positions and attention. In a batch s3prl cuts by its longest clip. Paper: TERA (Liu et al., 2021).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.convert.tera import KEYS
from gura_jax.models.config import NEUTRAL, EncoderConfig
from gura_jax.models.convnets import deviation
from gura_jax.models.encoder import Family, FrameGrid, Options, Output, Preset, frame_mask, masked_mean
from gura_jax.models.spectrogram import Spectrogram, SpectrogramEncoder
from gura_jax.models.transformer import Transformer

COLUMN, COLUMN_HOP, MELS = 400, 160, 80  # samples of a column of the spectrogram, and from one to the next; bands
LOUDEST = 200.0  # dB: beyond what float32 holds squares of, in either direction
FLOOR = 1e-10  # added to energies, deviations and the loudness of a clip
WAVELENGTH = 10_000.0  # of the slowest sinusoid, in columns over 2 pi


@dataclasses.dataclass(frozen=True)
class TeraConfig(EncoderConfig):
    """Sizes and kinds, as s3prl's ``Config`` has them; defaults are Base."""

    model_types: ClassVar[tuple[str, ...]] = ("tera",)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            **NEUTRAL,
            "pre_layer_norm": (False,),
            "win_ms": (25,),
            "hop_ms": (10,),
            "n_freq": (201,),
            "n_mels": (MELS,),
            "sample_rate": (16_000,),
            "feat_type": ("mel",),
            "log": (True,),
            "delta": (0,),
            "cmvn": (True,),
        }
    )
    do_stable_layer_norm: ClassVar[bool] = False

    model_type: str = "tera"
    hidden_size: int = 768
    num_hidden_layers: int = 3
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    sequence_length: int = 1500  # columns of a piece, at most
    target_level: float = -25.0  # dB, that the root mean square of a clip is brought to

    def _relation_faults(self) -> Iterator[str]:
        yield from self._multiples("hidden_size", ["num_attention_heads"])
        if self.hidden_size % 2:
            yield f"hidden_size: expected an even number, found {self.hidden_size}"
        if not -LOUDEST <= self.target_level <= LOUDEST:
            yield f"target_level: expected from -{LOUDEST:g} to {LOUDEST:g} dB, found {self.target_level}"

    def tiny(self) -> Self:
        """A small encoder of the same kind, with pieces of 0.8 s."""
        return dataclasses.replace(
            self,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            sequence_length=80,
        )


class Tera(nnx.Module):
    """Projection of the columns, positions, blocks."""

    transformer_class = Transformer

    def __init__(self, config: TeraConfig, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        self.projection = nnx.Linear(MELS, config.hidden_size, dtype=options.compute_dtype, rngs=rngs)
        self.encoder = self.transformer_class(config, options, num_blocks, rngs=rngs)


class TeraEncoder(SpectrogramEncoder):
    """TERA as a member: a frame every 10 ms."""

    config: TeraConfig
    network_class = Tera

    def __init__(self, config: TeraConfig, options: Options) -> None:
        row = Spectrogram(MELS, "htk", 0, 8000, COLUMN, COLUMN, COLUMN_HOP)
        super().__init__(config, options, FrameGrid(COLUMN_HOP, 0.0, 0), row)

    def log_mel(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of clips of one loudness; each band with zero mean and unit deviation over the clip."""
        inside = frame_mask(lengths, audio.shape[1])
        loudness = jnp.sqrt(masked_mean(jnp.square(audio)[:, :, None], inside)) + FLOOR  # [B, 1]
        audio = audio * (10 ** (self.config.target_level / 20) / loudness)
        counts = self.spectrogram.count(lengths)
        x = jnp.log(self.spectrogram(audio, lengths, self.options.platform) + FLOOR)
        mask = frame_mask(counts, x.shape[1])
        x = jnp.where(mask[:, :, None], x - masked_mean(x, mask)[:, None, :], 0.0)
        number = counts[:, None].astype(x.dtype)
        return x / (deviation(masked_mean(jnp.square(x), mask) * number, number) + FLOOR)[:, None, :], counts

    def _piece_size(self, counts: Any) -> Any:
        """Columns of a piece, by those of the clip."""
        pieces = -(-counts // self.config.sequence_length)
        return -(-counts // jnp.maximum(pieces, 1))

    def tokens(self, network: Tera, mel: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The columns with their positions, of each piece; as many pieces of each clip as the longest may have."""
        B, F, M = mel.shape
        size = min(F, self.config.sequence_length)
        counts = self.spectrogram.count(lengths)
        own = self._piece_size(counts)[:, None, None]  # [B, 1, 1]
        piece, place = (np.arange(n, dtype=np.int32) for n in (-(-F // size), size))
        index = piece[None, :, None] * own + place[None, None, :]  # [B, n, W]
        mask = (place[None, None, :] < own) & (index < counts[:, None, None])
        index = jnp.minimum(index, F - 1).reshape(B, -1, 1)
        x = jnp.take_along_axis(mel, index, axis=1, mode="clip").reshape(-1, size, M)
        x = network.projection(x).astype(jnp.float32) + sinusoids(size, self.config.hidden_size)[None]
        return x, mask.reshape(-1, size)

    def outputs(self, x: jax.Array, audio: jax.Array, lengths: jax.Array) -> Output:
        """The columns of each clip's pieces, one after the other."""
        B, (_, size, D) = len(audio), x.shape
        counts, T = self.grid.count(lengths), self.grid.count(audio.shape[1])
        own = jnp.maximum(self._piece_size(counts), 1)[:, None]
        place = np.arange(T, dtype=np.int32)[None, :]
        index = place // own * size + place % own  # [B, T]
        frames = jnp.take_along_axis(x.reshape(B, -1, D), index[:, :, None], axis=1, mode="clip")
        return Output(frames, counts)


def sinusoids(size: int, hidden_size: int) -> np.ndarray:
    """[size, hidden_size] of the places in a piece: sines and cosines in turn, rounded from float64."""
    speeds = WAVELENGTH ** (-2 * (np.arange(hidden_size) // 2) / hidden_size)
    angles = np.arange(size)[:, None] * speeds[None, :]
    return np.where(np.arange(hidden_size) % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


TERA = Family(
    name="tera",
    config=TeraConfig,
    build=TeraEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Tera",
    presets={"tera": Preset(TeraConfig())},  # its authors' files, on no hub in a layout of its own
)
