"""Key tables of MMS with adapters, for transformers and fairseq.

fairseq's adapters have an axis of languages, along which each published file has one place; the languages are entries
of the file, by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gura_jax.convert import fairseq
from gura_jax.convert.keys import Contents, KeyTable, Row, Transform, dense, norm
from gura_jax.convert.wav2vec2 import FAIRSEQ, TRANSFORMERS

_ADAPTER, _OURS = r"encoder\.layers\.(\d+)\.adapter_layer", r"encoder.layers.\1.adapter_layer"
_MODELS = {"wav2vec2": "mms", "wav2vec_ctc": "mms"}
_FIXED = {name: value for name, value in fairseq.FIXED.items() if name != "layer_type"}  # of this one the layers' own
_FIRST_LINEAR = Transform((0, 2, 1), dropped=(0,))  # [1, out, in] -> [in, out]
_FIRST_VECTOR = Transform((0, 1), dropped=(0,))  # [1, size] -> [size]
_STACKED: tuple[Row, ...] = (
    (rf"{_ADAPTER}\.ln_W", f"{_OURS}.norm.scale", _FIRST_VECTOR),
    (rf"{_ADAPTER}\.ln_b", f"{_OURS}.norm.bias", _FIRST_VECTOR),
    (rf"{_ADAPTER}\.W_a", f"{_OURS}.linear_1.kernel", _FIRST_LINEAR),
    (rf"{_ADAPTER}\.b_a", f"{_OURS}.linear_1.bias", _FIRST_VECTOR),
    (rf"{_ADAPTER}\.W_b", f"{_OURS}.linear_2.kernel", _FIRST_LINEAR),
    (rf"{_ADAPTER}\.b_b", f"{_OURS}.linear_2.bias", _FIRST_VECTOR),
)


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """fairseq's settings, and those of its adapters: one for each layer, with ReLU."""
    config = fairseq.read_config(contents, faults, models=_MODELS, fixed=_FIXED)
    layers = fairseq.layer_settings(contents)
    for name, default, supported in (
        ("layer_type", "transformer", ("trf_adp",)),
        ("adp_num", -1, (1,)),
        ("adp_act_fn", "relu", ("relu",)),
        ("adp_trf_idx", "all", ("all", f"0:{config.get('num_hidden_layers')}")),
    ):
        value = layers.get(name, default)
        if value not in supported:
            expected = " or ".join(map(repr, supported))
            faults.append(f"fairseq's {name} is {value!r}, which is not supported: expected {expected}")
    size = layers.get("adp_dim", 64)
    if type(size) is not int or size < 1:
        faults.append(f"fairseq's adp_dim is {size!r}: expected a positive whole number")
    return {**config, "adapter_attn_dim": size}


KEYS: Mapping[str, KeyTable] = {
    "transformers": dataclasses.replace(
        TRANSFORMERS,
        rows=(
            *TRANSFORMERS.rows,
            *norm(rf"{_ADAPTER}\.norm", f"{_OURS}.norm"),
            *dense(rf"{_ADAPTER}\.linear_([12])", rf"{_OURS}.linear_\2"),
        ),
        refused={r"adapter\..+": "convolutions after the last block (add_adapter) are not supported"},
        recognise=r"(^|\.)encoder\.layers\.\d+\.adapter_layer\.",
    ),
    "fairseq": dataclasses.replace(
        FAIRSEQ,
        rows=(*FAIRSEQ.rows, *_STACKED),
        refused={},
        recognise=r"(^|\.)encoder\.layers\.\d+\.adapter_layer\.W_a",
        config=_read_config,
    ),
}
