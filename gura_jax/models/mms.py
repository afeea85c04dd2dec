"""MMS with adapters: wav2vec 2.0's pre-norm network, each of whose blocks ends in a small layer of one language.

Follows transformers' ``Wav2Vec2Model`` with ``adapter_attn_dim``. A checkpoint holds the adapters of one language:
``gura-jax convert facebook/mms-1b-all --language fra``. Paper: MMS (Pratap et al., 2023).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.mms import KEYS
from gura_jax.models.config import NEUTRAL
from gura_jax.models.encoder import Family, Options, Preset
from gura_jax.models.transformer import Dropout, EncoderLayer, layer_norm
from gura_jax.models.wav2vec2 import XLARGE, PositionalTransformer, Wav2Vec2, Wav2Vec2Encoder
from gura_jax.models.wav2vec2_config import Wav2Vec2Config

ADAPTER_NORM_EPS = 1e-5  # PyTorch's default: it ignores the config's layer_norm_eps


@dataclasses.dataclass(frozen=True)
class MMSConfig(Wav2Vec2Config):
    """Sizes and kinds, as transformers has them for wav2vec 2.0 with adapters."""

    model_types: ClassVar[tuple[str, ...]] = ("mms",)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {name: values for name, values in NEUTRAL.items() if name != "adapter_attn_dim"}
    )

    model_type: str = "mms"
    adapter_attn_dim: int = 16

    def _relation_faults(self) -> Iterator[str]:
        yield from super()._relation_faults()
        if not self.do_stable_layer_norm:
            yield "do_stable_layer_norm: expected true, as only pre-norm networks have adapters, found false"

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``, which is one of wav2vec 2.0."""
        return super().from_source({**config, "model_type": cls.model_type})


class Adapter(nnx.Module):
    """Layer norm, and two layers around a few features."""

    def __init__(self, config: MMSConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        size, inner, dtype = config.hidden_size, config.adapter_attn_dim, options.compute_dtype
        self.norm = layer_norm(size, ADAPTER_NORM_EPS, rngs)
        self.linear_1 = nnx.Linear(size, inner, dtype=dtype, rngs=rngs)
        self.linear_2 = nnx.Linear(inner, size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return self.linear_2(jax.nn.relu(self.linear_1(self.norm(x)))).astype(jnp.float32)


class MMSLayer(EncoderLayer):
    """A transformer block with an adapter at its end."""

    def __init__(self, config: MMSConfig, options: Options, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, options, rngs=rngs)
        self.adapter_layer = Adapter(config, options, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, shared: Any, dropout: Dropout | None = None) -> jax.Array:
        """[B, T, D], [B, T] -> [B, T, D]."""
        x = super().__call__(x, mask, shared, dropout)
        return x + self.adapter_layer(x)


class MMSTransformer(PositionalTransformer):
    """Positional convolution and blocks."""

    layer_class = MMSLayer


class MMS(Wav2Vec2):
    """MMS without its heads."""

    transformer_class = MMSTransformer


class MMSEncoder(Wav2Vec2Encoder):
    """MMS as a member; hidden states are those of wav2vec 2.0."""

    network_class = MMS


MMS_FAMILY = Family(
    name="mms",
    config=MMSConfig,
    build=MMSEncoder,
    keys=KEYS,
    reference="gura_jax.convert.references.MMS",
    presets={"mms-1b-all": Preset(MMSConfig(**XLARGE), "facebook/mms-1b-all", True, "CC-BY-NC-4.0")},
)
