"""MERT v1: HuBERT's network at 24 kHz, trained on music.

The published class adds what no published weights use (a constant-Q transform beside the convolutions, DeepNorm), which
is refused by name; with the same weights transformers' ``HubertModel`` computes the same.
Paper: MERT (Li et al., 2024).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

from gura_jax.audio import MAX_RATE, MIN_RATE, is_rate
from gura_jax.convert.wav2vec2 import TRANSFORMERS
from gura_jax.models.config import NEUTRAL
from gura_jax.models.encoder import Family, Preset
from gura_jax.models.wav2vec2 import LARGE, Wav2Vec2Encoder
from gura_jax.models.wav2vec2_config import Wav2Vec2Config


@dataclasses.dataclass(frozen=True)
class MertConfig(Wav2Vec2Config):
    """Sizes and kinds, as its ``config.json`` has them; defaults are those of 95M."""

    model_types: ClassVar[tuple[str, ...]] = ("mert_model",)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {**NEUTRAL, "deepnorm": (False,), "feature_extractor_cqt": (False,)}
    )

    model_type: str = "mert_model"
    sample_rate: int = 24_000  # pyright: ignore[reportIncompatibleVariableOverride] - in its config.json, and so a field

    def _relation_faults(self) -> Iterator[str]:
        yield from super()._relation_faults()
        if not is_rate(self.sample_rate):
            yield f"sample_rate: expected from {MIN_RATE} to {MAX_RATE} Hz, found {self.sample_rate!r}"

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``."""
        return super().from_source({k: v for k, v in config.items() if k not in _NO_DIFFERENCE})


# Scores divided by a number, and multiplied by it within the softmax; and a size of what is not there.
_NO_DIFFERENCE = ("attention_relax", "feature_extractor_cqt_bins")
_LARGE: dict[str, Any] = LARGE | {"feat_extract_norm": "group", "conv_bias": False}
_LICENCE = "CC-BY-NC-4.0"

MERT = Family(
    name="mert_model",
    config=MertConfig,
    build=Wav2Vec2Encoder,
    keys={"transformers": TRANSFORMERS},
    reference="gura_jax.convert.references.Mert",
    presets={
        "mert-95m": Preset(MertConfig(), "m-a-p/MERT-v1-95M", licence=_LICENCE),
        "mert-330m": Preset(MertConfig(**_LARGE), "m-a-p/MERT-v1-330M", licence=_LICENCE),
    },
)
