"""wav2vec2-conformer: wav2vec 2.0's convolutions, and Conformer blocks with rotary or relative positions.

Follows transformers' ``Wav2Vec2ConformerModel``, but that a clip's results never depend on the padding. Published
checkpoints hold a positional convolution too, which nothing uses. Paper: fairseq S2T (Wang et al., 2020, and its later
release of wav2vec 2.0 with Conformer blocks).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from gura_jax.convert.wav2vec2_conformer import KEYS
from gura_jax.models.conformer import (
    PARTITION,
    ConformerLayer,
    ConformerTransformer,
    ConvolutionModule,
    always_scans,
    block_faults,
)
from gura_jax.models.convnets import batch_norm
from gura_jax.models.encoder import Family, Options, Preset
from gura_jax.models.wav2vec2 import LARGE, Wav2Vec2, Wav2Vec2Encoder
from gura_jax.models.wav2vec2_config import Wav2Vec2Config


@dataclasses.dataclass(frozen=True)
class ConformerConfig(Wav2Vec2Config):
    """Sizes and kinds, as transformers has them; those without a default here are wav2vec 2.0's, Base."""

    model_types: ClassVar[tuple[str, ...]] = ("wav2vec2-conformer",)
    block_norm_eps: ClassVar[float] = 1e-5  # PyTorch's default: the blocks ignore layer_norm_eps

    model_type: str = "wav2vec2-conformer"
    do_stable_layer_norm: bool = True  # a layer norm ends the stack, always
    position_embeddings_type: Literal["relative", "rotary"] = "relative"
    rotary_embedding_base: int = 10_000
    conv_depthwise_kernel_size: int = 31

    def _relation_faults(self) -> Iterator[str]:
        yield from super()._relation_faults()
        yield from block_faults(self)

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``, without what transformers does not look at."""
        return super().from_source({k: v for k, v in config.items() if k not in _UNREAD})


_UNREAD = (
    "do_stable_layer_norm", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups",
    "max_source_positions", "conformer_conv_dropout",
)  # fmt: skip


class Convolutions(ConvolutionModule):
    """Of what is around a frame, with a batch norm."""

    causal = False
    norm = staticmethod(lambda size, _, rngs: batch_norm(size, rngs))


class WaveConformerLayer(ConformerLayer):
    """A Conformer block."""

    convolution_class = Convolutions


class WaveConformerTransformer(ConformerTransformer):
    """Conformer blocks, and a layer norm of the last state."""

    layer_class = WaveConformerLayer


class Wav2Vec2Conformer(Wav2Vec2):
    """wav2vec2-conformer without its heads."""

    transformer_class = WaveConformerTransformer


class Wav2Vec2ConformerEncoder(Wav2Vec2Encoder):
    """wav2vec2-conformer as a member; the first hidden state is the projection."""

    network_class = Wav2Vec2Conformer
    positional = False
    partition = PARTITION

    def __init__(self, config: ConformerConfig, options: Options) -> None:
        super().__init__(config, options)
        self.always_scans = always_scans(config)


def _preset(name: str, positions: str) -> Preset:
    config = ConformerConfig(**LARGE, hidden_act="swish", position_embeddings_type=positions)  # pyright: ignore[reportArgumentType]
    return Preset(config, f"facebook/{name}", True)


WAV2VEC2_CONFORMER = Family(
    name="wav2vec2-conformer",
    config=ConformerConfig,
    build=Wav2Vec2ConformerEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Wav2Vec2Conformer",
    presets={
        "wav2vec2-conformer-rel-pos-large": _preset("wav2vec2-conformer-rel-pos-large", "relative"),
        "wav2vec2-conformer-rope-large": _preset("wav2vec2-conformer-rope-large", "rotary"),
    },
)
