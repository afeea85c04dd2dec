"""What configs of encoders have in common: checks of their fields, and reading a ``config.json``."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

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

# Attributes that do not change it: training, task heads, tokenizers, generation, bookkeeping.
IGNORED = re.compile(
    r"""
    # regularisation and masking, in training only
    layerdrop | apply_spec_augment | (no_)?mask_\w+ | freeze_feat_extract_train
    | (hidden|activation|attention(_probs)?|final|feat\w*)_dropout(_prob)?
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
    | replace_prediction_class | processor_class | num_feat_extract_layers
    """,
    re.VERBOSE,
)


class EncoderConfig:
    """Base of configs, which are frozen dataclasses with the field ``model_type``.

    Fields are checked by their types: integers and lists of them are positive, floats finite, and epsilons small; and
    whole numbers that JSON has for floats become floats.

    Attributes:
        model_types: values of ``model_type`` that are accepted.
        neutral: attributes of ``config.json`` that change what the encoder computes -> the values that leave it
            unchanged.
        ignored: regular expression of attributes that do not change it.
        renamed: attributes of ``config.json`` -> the fields that they are.
        activations: fields that name an activation.
        relatives: (model type, attribute) -> family: where the attribute is not null, the config is of that family.
        preprocessor: attributes of ``preprocessor_config.json`` that are read like those of ``config.json``.
    """

    model_types: ClassVar[tuple[str, ...]]
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL
    ignored: ClassVar[re.Pattern[str]] = IGNORED
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    activations: ClassVar[tuple[str, ...]] = ("hidden_act",)
    preprocessor: ClassVar[tuple[str, ...]] = ()
    relatives: ClassVar[Mapping[tuple[str, str], str]] = MappingProxyType({})

    def __post_init__(self) -> None:
        for name, kind in _field_types(type(self)).items():
            value = getattr(self, name)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, name, float(value))
        refuse([*self._kind_faults(), *self._size_faults()])
        refuse([*self._relation_faults()])

    def _kind_faults(self) -> Iterator[str]:
        choices: dict[str, tuple[str, ...]] = {"model_type": self.model_types}
        hints = _field_types(type(self))
        choices |= {name: get_args(kind) for name, kind in hints.items() if get_origin(kind) is Literal}
        choices |= dict.fromkeys(self.activations, tuple(ACTIVATIONS))
        for name, among in choices.items():
            if getattr(self, name) not in among:
                yield f"{name}: expected one of {', '.join(among)}, found {getattr(self, name)!r}"
        for name, kind in hints.items():
            if kind is bool and not isinstance(getattr(self, name), bool):
                yield f"{name}: expected true or false, found {getattr(self, name)!r}"

    def _size_faults(self) -> Iterator[str]:
        for name, kind in _field_types(type(self)).items():
            value = getattr(self, name)
            if kind is int and not _is_size(value):
                yield f"{name}: expected a positive integer, found {value!r}"
            if get_origin(kind) is tuple and not (isinstance(value, tuple) and value and all(map(_is_size, value))):
                yield f"{name}: expected a list of positive integers, found {value!r}"
            if name.endswith("_eps"):
                if not (isinstance(value, float) and 0 < value < 1):
                    yield f"{name}: expected a small positive number, found {value!r}"
            elif kind is float:
                positive = name.endswith("std")
                if not (isinstance(value, float) and math.isfinite(value) and (value > 0 or not positive)):
                    yield f"{name}: expected a {'positive ' if positive else ''}number, found {value!r}"

    def _relation_faults(self) -> Iterator[str]:
        """What is wrong with several fields together, where each by itself is right."""
        yield from ()

    def _multiples(self, name: str, divisors: Iterable[str]) -> Iterator[str]:
        """Faults where a size is no multiple of others."""
        for divisor in divisors:
            if getattr(self, name) % getattr(self, divisor):
                yield f"{name} {getattr(self, name)} is not a multiple of {divisor} {getattr(self, divisor)}"

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``.

        Raises:
            SystemConfigError: naming every attribute that changes the computation and is not handled.
        """
        names = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType] - subclasses are
        known: dict[str, Any] = {}
        faults = []
        for attribute, value in config.items():
            name = cls.renamed.get(attribute, attribute)
            if name in names:
                known[name] = tuple(value) if isinstance(value, list) else value
            elif attribute in cls.neutral:
                if value not in cls.neutral[attribute]:
                    faults.append(f"{attribute} = {value!r} changes the computation and is not supported")
            elif not (isinstance(attribute, str) and cls.ignored.fullmatch(attribute)):
                faults.append(f"{attribute} = {value!r} is not an attribute that this converter knows")
        if known.get("model_type") not in cls.model_types:
            faults.insert(0, f"model_type: expected {' or '.join(cls.model_types)}, found {known.get('model_type')!r}")
        refuse([*cls._source_faults(config), *faults])
        return cls(**known)

    @classmethod
    def _source_faults(cls, config: Mapping[str, Any]) -> Iterator[str]:
        """What else is wrong with a ``config.json``."""
        yield from ()


def refuse(faults: list[str]) -> None:
    """Raise a SystemConfigError that lists the faults, if there are any."""
    if faults:
        raise SystemConfigError("unsupported encoder config:\n" + "\n".join(f"  - {f}" for f in faults))


def _field_types(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, resolved."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
