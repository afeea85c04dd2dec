"""Configs of HuBERT, wav2vec 2.0 and their relatives: transformers' attributes, and which of them are handled."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

from gura_jax.models.config import EncoderConfig


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config(EncoderConfig):
    """Sizes and kinds, under the names that transformers' ``config.json`` gives them; defaults are Base.

    A relative's config adds fields.
    """

    model_types: ClassVar[tuple[str, ...]] = ("hubert", "wav2vec2", "unispeech", "unispeech-sat")
    relatives: ClassVar[Mapping[tuple[str, str], str]] = MappingProxyType({("wav2vec2", "adapter_attn_dim"): "mms"})
    activations: ClassVar[tuple[str, ...]] = ("hidden_act", "feat_extract_activation")

    sample_rate: ClassVar[int] = 16_000  # Hz; a field where the family's config.json has it

    model_type: str
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    do_stable_layer_norm: bool = False  # pre-norm transformer
    feat_extract_norm: Literal["group", "layer"] = "group"
    feat_extract_activation: str = "gelu"
    feat_proj_layer_norm: bool = True
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    conv_pos_batch_norm: bool = False

    def _relation_faults(self) -> Iterator[str]:
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            yield "conv_dim, conv_kernel and conv_stride: expected lists of one length, found " + ", ".join(
                str(len(sizes)) for sizes in (self.conv_dim, self.conv_kernel, self.conv_stride)
            )
        yield from self._multiples("hidden_size", ("num_attention_heads", "num_conv_pos_embedding_groups"))

    def tiny(self) -> Self:
        """A small encoder of the same kind."""
        return dataclasses.replace(
            self,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            conv_dim=(16,) * len(self.conv_dim),
            num_conv_pos_embedding_groups=4,
        )

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.conv_stride)

    @property
    def window(self) -> int:
        """Samples that a frame's convolutions see."""
        return receptive_field(self.conv_kernel, self.conv_stride)

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``; see :meth:`EncoderConfig.from_source`."""
        unset = ("conv_pos_batch_norm", None)
        return super().from_source({name: value for name, value in config.items() if (name, value) != unset})

    @classmethod
    def _source_faults(cls, config: Mapping[str, Any]) -> Iterator[str]:
        layers, dims = config.get("num_feat_extract_layers"), config.get("conv_dim", cls.conv_dim)
        if layers is not None and isinstance(dims, (tuple, list)) and layers != len(dims):
            yield f"num_feat_extract_layers: expected the length of conv_dim, found {layers!r}"
        for name, default in (("conv_pos_batch_norm", False), ("feat_proj_layer_norm", True)):
            if config.get("model_type") != "hubert" and config.get(name, default) != default:
                yield f"{name} = {config[name]!r} is of HuBERT only: the others of transformers ignore it"


def receptive_field(kernels: Iterable[int], strides: Iterable[int]) -> int:
    """Samples that a frame of several convolutions, one after the other, sees."""
    window, hop = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        window, hop = window + (kernel - 1) * hop, hop * stride
    return window
