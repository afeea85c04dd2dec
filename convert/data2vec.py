"""Key tables of data2vec-audio, for transformers and fairseq."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gura_jax.convert import fairseq
from gura_jax.convert.keys import Contents, KeyTable, conv
from gura_jax.convert.wav2vec2 import FAIRSEQ, TRANSFORMERS

_POSITION = r"encoder.pos_conv_embed.layers.\1.conv"
_MODELS = {"data2vec_audio": "data2vec-audio", "wav2vec_ctc": "data2vec-audio"}


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """fairseq's settings, of which transformers knows those of the published encoders."""
    settings = fairseq.model_settings(contents)
    depth = settings.get("pos_conv_depth", 1)
    config = fairseq.read_config(contents, faults, models=_MODELS, fixed={**fairseq.FIXED, "pos_conv_depth": depth})
    if type(depth) is not int or depth < 2:
        faults.append(f"fairseq's pos_conv_depth is {depth!r}: expected 2 or more")
        return config
    for name, theirs, value in (
        ("feat_extract_norm", "extractor_mode", "layer"),
        ("do_stable_layer_norm", "layer_norm_first", False),
    ):
        if config.get(name, value) != value:
            faults.append(f"fairseq's {theirs} is {settings.get(theirs)!r}, which data2vec-audio's network has not")
    kernel = config.get("num_conv_pos_embeddings")
    size = {"conv_pos_kernel_size": max(3, kernel // depth)} if type(kernel) is int else {}
    return {**config, "num_conv_pos_embeddings": depth, **size}


KEYS: Mapping[str, KeyTable] = {
    "transformers": dataclasses.replace(
        TRANSFORMERS,
        rows=(*TRANSFORMERS.rows, *conv(r"encoder\.pos_conv_embed\.layers\.(\d+)\.conv", _POSITION)),
        prefix=r"data2vec_audio\.",
        recognise=r"(^|\.)encoder\.pos_conv_embed\.layers\.\d+\.conv",
    ),
    "fairseq": dataclasses.replace(
        FAIRSEQ,
        rows=(
            *(row for row in FAIRSEQ.rows if not row[1].startswith("encoder.pos_conv_embed.")),
            *conv(r"encoder\.pos_conv\.(\d+)\.0", _POSITION),
        ),
        recognise=r"(^|\.)encoder\.pos_conv\.\d+\.0\.bias",
        config=_read_config,
        # The averaged teacher, under a name of its own.
        wrapping=dataclasses.replace(fairseq.WRAPPING, nested=r"(.+\.)?_ema"),
    ),
}
