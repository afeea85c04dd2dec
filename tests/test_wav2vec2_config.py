"""models/wav2vec2_config.py: which configs of transformers' are taken, and which are refused, by name."""

import dataclasses
from typing import Any

import pytest
from refusals import refuses
from transformers import HubertConfig
from transformers import Wav2Vec2Config as TransformersConfig

from gura_jax import ENCODERS
from gura_jax.errors import SystemConfigError
from gura_jax.models.config import NEUTRAL
from gura_jax.models.families import config_from_source
from gura_jax.models.wav2vec2_config import Wav2Vec2Config

# Refused


def assert_refused(attributes: dict[str, Any], *named: str) -> None:
    with refuses(SystemConfigError, *named):
        Wav2Vec2Config.from_source(attributes)


WRONG_VALUES = {
    "adapter_attn_dim": 16,
    "add_adapter": True,
    "chunk_size_feed_forward": 64,
    "cross_attention_hidden_size": 32,
    "is_decoder": True,
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "pruned_heads": {"0": [1]},
    "quantization_config": {"bits": 4},
    "tie_encoder_decoder": True,
}


@pytest.mark.parametrize(("name", "value"), [("conv_pos_batch_norm", True), ("feat_proj_layer_norm", False)])
def test_an_attribute_of_huberts_alone(name: str, value: bool) -> None:
    """transformers' wav2vec 2.0 does not look at it, so its weights cannot be meant for it."""
    assert_refused({"model_type": "wav2vec2", name: value}, f"{name} = {value}")
    assert getattr(Wav2Vec2Config.from_source({"model_type": "hubert", name: value}), name) is value


@pytest.mark.parametrize("name", NEUTRAL)
def test_an_attribute_that_changes_the_computation_is_refused(name: str) -> None:
    assert_refused({"model_type": "wav2vec2", name: WRONG_VALUES[name]}, f"{name} = ")
    for value in NEUTRAL[name]:
        assert Wav2Vec2Config.from_source({"model_type": "wav2vec2", name: value}) == Wav2Vec2Config("wav2vec2")


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"model_type": "hubert", "position_embeddings_type": "rotary"}, "position_embeddings_type = 'rotary'"),
        ({"model_type": "hubert", "conv_depthwise_kernel_size": 31}, "conv_depthwise_kernel_size = 31"),
        ({"model_type": "wavlm", "num_buckets": 320}, "or unispeech-sat, found 'wavlm'"),
        ({"model_type": "wavlm", "num_buckets": 320}, "num_buckets = 320"),
        ({"model_type": "data2vec-audio"}, "'data2vec-audio'"),
        ({"model_type": ["hubert"]}, "model_type: expected"),
        ({}, "or unispeech-sat, found None"),
        ({"model_type": "hubert", "hidden_size": "768"}, "hidden_size: expected a positive integer, found '768'"),
        ({"model_type": "hubert", "hidden_size": 768.0}, "hidden_size: expected a positive integer, found 768.0"),
        ({"model_type": "hubert", "num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer"),
        ({"model_type": "hubert", "num_hidden_layers": True}, "num_hidden_layers: expected a positive integer"),
        ({"model_type": "hubert", "conv_dim": 512}, "conv_dim: expected a list of positive integers, found 512"),
        ({"model_type": "hubert", "conv_dim": []}, "conv_dim: expected a list of positive integers"),
        ({"model_type": "hubert", "conv_kernel": [10, 3]}, "expected lists of one length, found 7, 2, 7"),
        ({"model_type": "hubert", "conv_stride": [5, 2, 2, 2, 2, 2, 0]}, "conv_stride: expected a list of positive"),
        ({"model_type": "hubert", "conv_dim": [[512]]}, "conv_dim: expected a list of positive"),
        ({"model_type": "hubert", "num_feat_extract_layers": 6}, "num_feat_extract_layers: expected the length"),
        (
            {"model_type": "hubert", "conv_dim": 512, "num_feat_extract_layers": 7},
            "conv_dim: expected a list of positive integers, found 512",
        ),
        ({"model_type": "hubert", "conv_bias": "true"}, "conv_bias: expected true or false, found 'true'"),
        ({"model_type": "hubert", "do_stable_layer_norm": None}, "do_stable_layer_norm: expected true or false"),
        ({"model_type": "hubert", "layer_norm_eps": "1e-5"}, "layer_norm_eps: expected a small positive number"),
        ({"model_type": "hubert", "layer_norm_eps": float("nan")}, "layer_norm_eps: expected a small positive"),
        ({"model_type": "hubert", "feat_extract_norm": "instance"}, "feat_extract_norm: expected one of group, layer"),
        ({"model_type": "hubert", "hidden_act": "quick_gelu"}, "hidden_act: expected one of gelu"),
        ({"model_type": "hubert", "hidden_act": ["gelu"]}, "hidden_act: expected one of gelu"),
        ({"model_type": "hubert", "feat_extract_activation": "mish"}, "feat_extract_activation: expected one of"),
        (
            {"model_type": "hubert", "num_attention_heads": 7},
            "hidden_size 768 is not a multiple of num_attention_heads",
        ),
        (
            {"model_type": "hubert", "num_conv_pos_embedding_groups": 9},
            "hidden_size 768 is not a multiple of num_conv_pos_embedding_groups 9",
        ),
    ],
)
def test_a_wrong_config_is_refused_by_name(attributes: dict[str, Any], named: str) -> None:
    assert_refused(attributes, named)


def test_all_faults_are_listed_at_once() -> None:
    assert_refused(
        {"model_type": "wavlm", "add_adapter": True, "sparkle": 1}, "model_type", "add_adapter = True", "sparkle = 1"
    )


TUPLE_FIELDS = ("conv_dim", "conv_kernel", "conv_stride")
INT_FIELDS = [field.name for field in dataclasses.fields(Wav2Vec2Config) if field.type is int]


@pytest.mark.parametrize("name", [*INT_FIELDS, *TUPLE_FIELDS])
@pytest.mark.parametrize("value", [None, -1, "x", 1.5, {}])
def test_sizes_of_wrong_type(name: str, value: Any) -> None:
    assert_refused({"model_type": "hubert", name: value}, f"{name}: expected", f"found {value!r}")


# Taken


# What published config.json files hold besides the sizes.
_MASKING = {
    "activation_dropout": 0.1,
    "attention_dropout": 0.1,
    "final_dropout": 0.0,
    "feat_proj_dropout": 0.1,
    "hidden_dropout": 0.1,
    "hidden_dropout_prob": 0.1,
    "layerdrop": 0.1,
    "initializer_range": 0.02,
    "gradient_checkpointing": False,
    "apply_spec_augment": True,
    "mask_time_prob": 0.05,
    "mask_time_length": 10,
    "mask_feature_prob": 0.0,
    "mask_feature_length": 10,
    "ctc_loss_reduction": "sum",
    "ctc_zero_infinity": False,
    "vocab_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_feat_extract_layers": 7,
}
_SIZES_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "feat_extract_activation": "gelu",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
}
_QUANTIZER = {
    "codevector_dim": 768,
    "contrastive_logits_temperature": 0.1,
    "diversity_loss_weight": 0.1,
    "feat_quantizer_dropout": 0.0,
    "num_codevector_groups": 2,
    "num_codevectors_per_group": 320,
    "num_negatives": 100,
    "proj_codevector_dim": 768,
}
PUBLISHED_CONFIGS: dict[str, dict[str, Any]] = {
    "wav2vec2-large-960h-lv60-self": _MASKING
    | _SIZES_LARGE
    | _QUANTIZER
    | {
        "model_type": "wav2vec2",
        "architectures": ["Wav2Vec2ForCTC"],
        "feat_extract_dropout": 0.0,
        "transformers_version": "4.7.0.dev0",
    },
    "wav2vec2-xls-r-300m": _MASKING
    | _SIZES_LARGE
    | _QUANTIZER
    | {
        "model_type": "wav2vec2",
        "architectures": ["Wav2Vec2ForPreTraining"],
        "add_adapter": False,
        "adapter_kernel_size": 3,
        "adapter_stride": 2,
        "num_adapter_layers": 3,
        "output_hidden_size": 1024,
        "classifier_proj_size": 256,
        "use_weighted_layer_sum": False,
        "tdnn_dilation": [1, 2, 3, 1, 1],
        "tdnn_dim": [512, 512, 512, 512, 1500],
        "tdnn_kernel": [5, 3, 3, 1, 1],
        "xvector_output_dim": 512,
        "mask_time_min_masks": 2,
        "mask_feature_min_masks": 0,
        "torch_dtype": "float32",
        "transformers_version": "4.12.0.dev0",
    },
    "hubert-xlarge-ll60k": _MASKING
    | _SIZES_LARGE
    | {
        "model_type": "hubert",
        "architectures": ["HubertModel"],
        "hidden_size": 1280,
        "num_hidden_layers": 48,
        "intermediate_size": 5120,
        "feat_extract_dropout": 0.0,
        "feat_proj_layer_norm": True,
        "mask_channel_length": 10,
        "mask_channel_min_space": 1,
        "mask_channel_other": 0.0,
        "mask_channel_prob": 0.0,
        "mask_channel_selection": "static",
        "mask_time_min_space": 1,
        "mask_time_other": 0.0,
        "mask_time_selection": "static",
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "transformers_version": "4.10.0.dev0",
    },
    "distilhubert": _MASKING
    | {
        "_name_or_path": "ntu-spml/distilhubert",
        "model_type": "hubert",
        "architectures": ["HubertModel"],
        "num_hidden_layers": 2,
        "feat_proj_layer_norm": False,
        "conv_pos_batch_norm": None,
        "finetuning_task": "x",
        "id2label": {"0": "a"},
        "label2id": {"a": 0},
        "use_weighted_layer_sum": True,
    },
}


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_published_configs_are_accepted(name: str) -> None:
    attributes = PUBLISHED_CONFIGS[name]
    config = Wav2Vec2Config.from_source(attributes)
    for field in dataclasses.fields(config):
        if attributes.get(field.name) is not None:
            value = attributes[field.name]
            assert getattr(config, field.name) == (tuple(value) if isinstance(value, list) else value)


# https://huggingface.co/m-a-p/MERT-v1-95M, as others have copied it
MERT_CONFIG: dict[str, Any] = _MASKING | {
    "model_type": "mert_model",
    "architectures": ["MERTModel"],
    "auto_map": {"AutoModel": "modeling_MERT.MERTModel"},
    "attention_relax": -1.0,
    "deepnorm": False,
    "feature_extractor_cqt": False,
    "feature_extractor_cqt_bins": 336,
    "sample_rate": 24000,
}


def test_merts_config() -> None:
    assert config_from_source(MERT_CONFIG) == ENCODERS["mert-95m"].config
    for name in ("deepnorm", "feature_extractor_cqt"):
        with refuses(SystemConfigError, f"{name} = True changes the computation"):
            config_from_source(MERT_CONFIG | {name: True})


def test_data2vecs_config() -> None:
    """transformers reads neither kind of norm, whatever is there."""
    own = {"model_type": "data2vec-audio", "feat_extract_norm": "layer", "do_stable_layer_norm": True}
    own |= {"conv_pos_kernel_size": 19, "num_conv_pos_embeddings": 5}
    assert config_from_source(_MASKING | own) == ENCODERS["data2vec-audio-base"].config


@pytest.mark.parametrize("kind", [HubertConfig, TransformersConfig])
def test_a_whole_config_of_transformers_is_accepted(kind: Any) -> None:
    """Every attribute at its default, and our defaults are theirs."""
    config = Wav2Vec2Config.from_source(kind().to_dict())
    assert config == Wav2Vec2Config(config.model_type)
    assert config == Wav2Vec2Config.from_source(kind().to_diff_dict() | {"model_type": config.model_type})
