"""Key table of vq-wav2vec and wav2vec, for fairseq's files and s3prl's conversions."""

from collections.abc import Mapping
from typing import Any

from gura_jax.convert import fairseq
from gura_jax.convert.keys import CONV, Contents, KeyTable, Transform, conv, dense, norm

_BOOKS = Transform((0, 1, 2))  # as it is, [1, books * codes, size]
_BOOK = Transform((1, 0, 2))  # [codes, books, size] -> [books, codes, size]
_EXTRACTOR, _AGGREGATOR = r"feature_extractor\.conv_layers\.(\d+)", r"feature_aggregator\.conv_layers\.(\d+)"

# name -> default of the architecture "wav2vec", which older files leave out
_SETTINGS: Mapping[str, Any] = {
    "activation": "relu",
    "log_compression": False,
    "vq_type": "none",
    "vq_vars": 320,
    "vq_groups": 2,
    "vq_depth": 1,
    "combine_groups": False,
    "agg_zero_pad": False,
    "skip_connections_agg": False,
    "residual_scale": 0.5,
}
_FIXED: Mapping[str, Any] = {"aggregator": "cnn", "skip_connections_feat": False, "non_affine_group_norm": False}
_FEATURES, _CONTEXT = "[(512, 10, 5)] + [(512, 8, 4)] + [(512, 4, 2)] * 3", "[(512, 3, 1)] * 9"


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """fairseq's ``args``, or s3prl's ``model_cfg``."""
    settings = fairseq.model_settings(contents)
    if not settings:
        faults.append("no settings beside the weights: expected fairseq's args or s3prl's model_cfg")
        return {}
    for name, value in _FIXED.items():
        if settings.get(name, value) != value:
            faults.append(f"fairseq's {name} is {settings[name]!r}, which is not supported: expected {value!r}")
    features = fairseq.convolutions("conv_feature_layers", settings.get("conv_feature_layers", _FEATURES), faults)
    context = fairseq.convolutions("conv_aggregator_layers", settings.get("conv_aggregator_layers", _CONTEXT), faults)
    size = features[-1][0]
    if not faults and any((dim, stride) != (size, 1) for dim, _, stride in context):
        faults.append(
            f"fairseq's conv_aggregator_layers is {settings['conv_aggregator_layers']!r}: expected layers of {size} "
            "channels, as the features have, and strides of 1"
        )
    if settings.get("vq_dim", 0) not in (0, size):
        faults.append(f"fairseq's vq_dim is {settings['vq_dim']!r}: expected 0, or the features' {size}")
    dims, kernels, strides = (list(sizes) for sizes in zip(*features, strict=True))
    known = {name: settings.get(name, default) for name, default in _SETTINGS.items()}
    return {
        **known,
        "model_type": "vq-wav2vec",
        "vq_type": known["vq_type"] or "none",
        "conv_dim": dims,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "aggregator_kernel": [kernel for _, kernel, _ in context],
        "aggregator_bias": settings.get("no_conv_bias", False) is False,
        "do_normalize": fairseq.normalises(contents, faults),
    }


KEYS: Mapping[str, KeyTable] = {
    "fairseq": KeyTable(
        rows=(
            (rf"{_EXTRACTOR}\.0\.weight", r"convolutions.\1.conv.kernel", CONV),
            *norm(rf"{_EXTRACTOR}\.2", r"convolutions.\1.norm"),
            *conv(rf"{_AGGREGATOR}\.1", r"aggregator.\1.conv"),
            *norm(rf"{_AGGREGATOR}\.3", r"aggregator.\1.norm"),
            *dense(r"vector_quantizer\.weight_proj\.(\d+)\.0", r"quantizer.hidden.\1"),
            *dense(r"vector_quantizer\.weight_proj(?:\.\d+)?", "quantizer.scores"),
            (r"vector_quantizer\.vars", "quantizer.codes", _BOOKS),
            (r"vector_quantizer\.embedding", "quantizer.codes", _BOOK),
            (r"vector_quantizer\.projection\.0\.weight", "quantizer.projection.kernel", CONV),
            *norm(r"vector_quantizer\.projection\.1", "quantizer.norm"),
        ),
        ignored=r"(wav2vec_predictions|project_features)\..+",
        recognise=r"(^|\.)feature_aggregator\.conv_layers\.",
        config=_read_config,
        wrapping=fairseq.WRAPPING,
    ),
}
