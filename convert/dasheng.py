"""Key tables of Dasheng, for its models on the hub and for its authors' files."""

from collections.abc import Mapping
from typing import Any

from gura_jax.convert.ast import vit
from gura_jax.convert.keys import CONV2D, Contents, KeyTable, Transform, Wrapping, batch_norm, conv, norm

_TIME = Transform((3, 1, 0, 2), dropped=(2, 3))  # [1, D, 1, T] -> [T, D]
_FREQUENCY = Transform((0, 1, 2, 3), dropped=(0, 2, 3))  # [1, D, 1, 1] -> [D]


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    config = contents.settings.get("config")
    if not isinstance(config, dict):
        faults.append(
            "no settings beside the weights: expected the entry config: give the checkpoint as its authors publish it"
        )
        return {}
    return {"model_type": "dasheng", "encoder_kwargs": config}


_TRANSFORMERS = KeyTable(
    rows=(
        *batch_norm(r"init_bn\.1", "batch_norm"),
        *conv(r"patch_embed\.proj", "projection", CONV2D),
        (r"time_pos_embed", "time_positions", _TIME),
        (r"freq_pos_embed", "frequency_position", _FREQUENCY),
        *vit(r"blocks\.(\d+)"),
        *norm("norm", "encoder.layer_norm"),
    ),
    prefix=r"encoder\.",
    # The spectrogram is computed from the settings.
    ignored=r"front_end\..+|outputlayer\..+|.+\.num_batches_tracked",
)
KEYS: Mapping[str, KeyTable] = {
    "transformers": _TRANSFORMERS,
    "dasheng": KeyTable(
        rows=_TRANSFORMERS.rows,
        ignored=_TRANSFORMERS.ignored,
        recognise=r"^time_pos_embed$",
        config=_read_config,
        wrapping=Wrapping(state=("model",), settings=("config",)),
    ),
}
