"""Configs of HuBERT, wav2vec 2.0 and their relatives: transformers' attributes, and which of them are handled."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from gura_jax.errors import SystemConfigError
from gura_jax.models.transformer import ACTIVATIONS

# Attributes of config.json that change what the encoder computes, with the values that leave it unchanged.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "adapter_attn_dim": (None,),  # MMS adapters in every block
    "add_adapter": (False, None),  # convolutions after the last block
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
}


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
    """Sizes and kinds, under the names that transformers' ``config.json`` gives them; defaults are Base.

    A relative's config adds fields, and says what its attributes are.

    Attributes:
        model_types: that the config is of.
        neutral: attributes of ``config.json`` that change what the encoder computes -> the values that leave it
            unchanged.
    """

    model_types: ClassVar[tuple[str, ...]] = ("hubert", "wav2vec2", "unispeech", "unispeech-sat")
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL

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

    def __post_init__(self) -> None:
        faults = [*self._kind_faults(), *self._size_faults()]
        if faults:
            raise SystemConfigError("unsupported encoder config:\n" + "\n".join(f"  - {f}" for f in faults))

    def _kind_faults(self) -> Iterator[str]:
        for name, choices in (
            ("model_type", self.model_types),
            ("feat_extract_norm", ("group", "layer")),
            ("hidden_act", tuple(ACTIVATIONS)),
            ("feat_extract_activation", tuple(ACTIVATIONS)),
        ):
            if getattr(self, name) not in choices:
                yield f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}"
        for field in dataclasses.fields(self):
            if field.type in (bool, "bool") and not isinstance(getattr(self, field.name), bool):
                yield f"{field.name}: expected true or false, found {getattr(self, field.name)!r}"

    def _size_faults(self) -> Iterator[str]:
        sizes: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        wrong = False
        for name in (f.name for f in dataclasses.fields(self) if f.type in (int, "int")):
            if not _is_size(sizes[name]):
                wrong = True
                yield f"{name}: expected a positive integer, found {sizes[name]!r}"
        for name in TUPLE_FIELDS:
            if not (isinstance(sizes[name], tuple) and sizes[name] and all(map(_is_size, sizes[name]))):
                wrong = True
                yield f"{name}: expected a list of positive integers, found {sizes[name]!r}"
        if not (isinstance(self.layer_norm_eps, float) and 0 < self.layer_norm_eps < 1):
            yield f"layer_norm_eps: expected a small positive number, found {self.layer_norm_eps!r}"
        if wrong:
            return
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            yield "conv_dim, conv_kernel and conv_stride: expected lists of one length, found " + ", ".join(
                str(len(sizes[name])) for name in TUPLE_FIELDS
            )
        for divisor in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % sizes[divisor]:
                yield f"hidden_size {self.hidden_size} is not a multiple of {divisor} {sizes[divisor]}"

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
        window, hop = 1, 1
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            window, hop = window + (kernel - 1) * hop, hop * stride
        return window

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``.

        Raises:
            SystemConfigError: naming every attribute that changes the computation and is not handled.
        """
        fields = {f.name for f in dataclasses.fields(cls)}
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in config.items()
            if k in fields and not (k == "conv_pos_batch_norm" and v is None)
        }
        faults = []
        if known.get("model_type") not in cls.model_types:
            faults.append(f"model_type: expected {' or '.join(cls.model_types)}, found {known.get('model_type')!r}")
        layers = config.get("num_feat_extract_layers")
        dims = known.get("conv_dim", cls.conv_dim)
        if layers is not None and isinstance(dims, tuple) and layers != len(dims):
            faults.append(f"num_feat_extract_layers: expected the length of conv_dim, found {layers!r}")
        for name, default in (("conv_pos_batch_norm", False), ("feat_proj_layer_norm", True)):
            if known.get("model_type") != "hubert" and known.get(name, default) != default:
                faults.append(f"{name} = {known[name]!r} is of HuBERT only: the others of transformers ignore it")
        for name, value in config.items():
            if name in fields or name == "num_feat_extract_layers" or IGNORED.fullmatch(name):
                continue
            if name in cls.neutral:
                if value not in cls.neutral[name]:
                    faults.append(f"{name} = {value!r} changes the computation and is not supported")
            else:
                faults.append(f"{name} = {value!r} is not an attribute that this converter knows")
        if faults:
            raise SystemConfigError("unsupported encoder config:\n" + "\n".join(f"  - {f}" for f in faults))
        return cls(**known)


TUPLE_FIELDS = ("conv_dim", "conv_kernel", "conv_stride")

# Attributes that do not change it: training, task heads, tokenizers, generation, bookkeeping.
IGNORED = re.compile(
    r"""
    # regularisation and masking, in training only
    layerdrop | apply_spec_augment | (no_)?mask_\w+ | freeze_feat_extract_train
    | (hidden|activation|attention|final|feat\w*)_dropout(_prob)?
    | gradient_checkpointing | initializer_(range|factor)
    # what is built on the encoder
    | ctc_\w+ | vocab_size | use_weighted_layer_sum | classifier_proj_size | tdnn_\w+ | xvector_output_dim
    | num_ctc_classes | num_clusters | replace_prob
    | \w*codevector\w* | num_negatives | contrastive_logits_temperature | diversity_loss_weight
    | adapter_(kernel_size|stride) | num_adapter_layers | output_hidden_size
    | problem_type | num_labels | id2label | label2id | finetuning_task | task_specific_params
    # tokens and generation
    | (bos|eos|pad|sep|unk|decoder_start)_token_id | tokenizer_class | prefix
    | max_length | min_length | do_sample | early_stopping | num_beams | num_beam_groups | diversity_penalty
    | temperature | top_k | top_p | typical_p | repetition_penalty | length_penalty | \w*no_repeat_ngram_size
    | bad_words_ids | suppress_tokens | begin_suppress_tokens | num_return_sequences
    | forced_(bos|eos)_token_id | remove_invalid_values | exponential_decay_length_penalty
    # bookkeeping
    | architectures | auto_map | _?name_or_path | transformers_version | torch_dtype | dtype | torchscript
    | output_attentions | output_hidden_states | output_scores | return_dict(_in_generate)? | use_bfloat16
    | tie_word_embeddings | _attn_implementation\w* | attn_implementation | _commit_hash | tf_legacy_loss
    | replace_prediction_class | processor_class
    """,
    re.VERBOSE,
)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
