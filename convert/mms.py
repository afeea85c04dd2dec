"""Key table of MMS with adapters, for transformers."""

import dataclasses
from collections.abc import Mapping

from gura_jax.convert.keys import KeyTable, dense, norm
from gura_jax.convert.wav2vec2 import TRANSFORMERS

_ADAPTER, _OURS = r"encoder\.layers\.(\d+)\.adapter_layer", r"encoder.layers.\1.adapter_layer"

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
    )
}
