"""fairseq's files of data2vec-audio and wav2vec2-conformer give the arrays of transformers'."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from reference import VARIANTS, torch_encoder
from refusals import refuses

from gura_jax.convert import Converted, convert
from gura_jax.errors import ConversionError

State = dict[str, torch.Tensor]


class Kind(NamedTuple):
    """How fairseq names a variant's model, its settings and its weights."""

    variant: str
    name: str
    settings: Mapping[str, Any]
    names: Mapping[str, str]  # regular expression of a part of transformers' names -> fairseq's


_COMMON = {
    r"feature_extractor\.conv_layers\.(\d+)\.conv\.": r"feature_extractor.conv_layers.\1.0.",
    r"feature_projection\.layer_norm\.": "layer_norm.",
    r"feature_projection\.projection\.": "post_extract_proj.",
    r"parametrizations\.weight\.original0": "weight_g",
    r"parametrizations\.weight\.original1": "weight_v",
    "masked_spec_embed": "mask_emb",
}
_LAYER_NORM = {r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.": r"feature_extractor.conv_layers.\1.2.1."}
_GROUP_NORM = {r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.": r"feature_extractor.conv_layers.\1.2."}
_BLOCKS = {
    r"\.attention\.": ".self_attn.",
    r"(layers\.\d+)\.layer_norm\.": r"\1.self_attn_layer_norm.",
    r"feed_forward\.intermediate_dense": "fc1",
    r"feed_forward\.output_dense": "fc2",
}
_CONFORMER = {
    r"(ffn[12])_layer_norm": r"\1.layer_norm",
    r"(ffn[12])\.intermediate_dense": r"\1.w_1",
    r"(ffn[12])\.output_dense": r"\1.w_2",
    r"encoder\.pos_conv_embed\.conv\.": "encoder.pos_conv.0.",
}
_SIZES = {
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "conv_feature_layers": "[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2",
    "conv_pos_groups": 4,
}
_CONFORMERS = {"layer_type": "conformer", "attn_type": "espnet", "depthwise_conv_kernel_size": 5}
_PRE_NORM = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}

KINDS = {
    "data2vec": Kind(
        "data2vec",
        "data2vec_audio",
        {"extractor_mode": "layer_norm", "conv_bias": True, "pos_conv_depth": 3, "conv_pos": 15},
        {r"pos_conv_embed\.layers\.(\d+)\.conv\.": r"pos_conv.\1.0.", **_COMMON, **_LAYER_NORM, **_BLOCKS},
    ),
    "relative": Kind(
        "conformer, relative",
        "wav2vec2",
        {**_CONFORMERS, **_PRE_NORM, "pos_enc_type": "rel_pos"},
        {**_COMMON, **_LAYER_NORM, **_CONFORMER},
    ),
    "rotary": Kind(
        "conformer, rotary",
        "wav2vec2",
        {**_CONFORMERS, "layer_norm_first": True, "pos_enc_type": "rope", "activation_fn": "gelu"},
        {**_COMMON, **_GROUP_NORM, **_CONFORMER},
    ),
}
# What fairseq has no setting for.
_UNLIKE = {"relative": {"layer_norm_eps": 1e-5}, "rotary": {"rotary_embedding_base": 10_000}}


@functools.cache
def model_of(kind: str) -> Any:
    return torch_encoder({**VARIANTS[KINDS[kind].variant], **_UNLIKE.get(kind, {})})


def fairseq_state(kind: str) -> State:
    state: State = {}
    for name, value in model_of(kind).state_dict().items():
        for pattern, theirs in KINDS[kind].names.items():
            name = re.sub(pattern, theirs, name)
        state[name] = value.clone()
    if kind == "rotary":
        state["encoder.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return state | {"final_proj.weight": torch.ones(8, 32), "final_proj.bias": torch.ones(8)}


def write(folder: Path, kind: str, **changes: Any) -> Path:
    settings = {"_name": KINDS[kind].name, **_SIZES, **KINDS[kind].settings, **changes}
    content: Any = {"args": None, "cfg": {"model": settings, "task": {"normalize": True}}, "model": fairseq_state(kind)}
    if kind == "data2vec":
        content["model"]["_ema"] = {"layers.0.fc1.weight": torch.ones(48, 32)}
    torch.save(content, folder / "a.pt")
    return folder / "a.pt"


def assert_same(found: Converted, expected: Converted) -> None:
    assert found.manifest.architecture == expected.manifest.architecture
    assert found.params.keys() == expected.params.keys()
    for name, array in expected.params.items():
        np.testing.assert_array_equal(found.params[name], array, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_fairseqs_files(kind: str, tmp_path: Path) -> None:
    model_of(kind).save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    expected = convert(tmp_path / "folder")
    found = convert(write(tmp_path, kind))
    assert_same(found, expected)
    assert found.manifest.normalise is expected.manifest.normalise is True

    settings = {**_SIZES, **KINDS[kind].settings}
    inner = {"model": {"_name": KINDS[kind].name, **settings}}
    state: Any = {f"w2v_encoder.w2v_model.{name}": value for name, value in fairseq_state(kind).items()}
    state |= {"w2v_encoder.proj.weight": torch.ones(8, 32), "w2v_encoder.proj.bias": torch.ones(8)}
    state |= {"w2v_encoder.w2v_model._ema": {}} if kind == "data2vec" else {}
    torch.save({"cfg": {"model": {"_name": "wav2vec_ctc", "w2v_args": inner}}, "model": state}, tmp_path / "tuned.pt")
    assert_same(convert(tmp_path / "tuned.pt"), expected)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("data2vec", {"pos_conv_depth": 1}, "pos_conv_depth is 1: expected 2 or more"),
        ("data2vec", {"layer_norm_first": True}, "layer_norm_first is True"),
        ("data2vec", {"extractor_mode": "default"}, "extractor_mode is 'default'"),
        ("data2vec", {"conv_pos": "95"}, "conv_pos is '95': expected a positive whole number"),
        ("data2vec", {"_name": "data2vec_multi"}, "'data2vec_multi': expected one of data2vec_audio"),
        ("rotary", {"layer_norm_first": False}, "layer_norm_first is false"),
        ("rotary", {"pos_enc_type": "abs"}, "pos_enc_type is 'abs': expected one of rel_pos, rope"),
        ("relative", {"attn_type": ""}, "attn_type is ''"),
        ("relative", {"depthwise_conv_kernel_size": 4}, "conv_depthwise_kernel_size: expected an odd number"),
    ],
)
def test_settings_that_are_refused(kind: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with refuses(ConversionError, words):
        convert(write(tmp_path, kind, **changes))
