"""Key table of data2vec-audio, for transformers."""

import dataclasses
from collections.abc import Mapping

from gura_jax.convert.keys import KeyTable, conv
from gura_jax.convert.wav2vec2 import TRANSFORMERS

_POSITIONS = conv(r"encoder\.pos_conv_embed\.layers\.(\d+)\.conv", r"encoder.pos_conv_embed.layers.\1.conv")

KEYS: Mapping[str, KeyTable] = {
    "transformers": dataclasses.replace(
        TRANSFORMERS,
        rows=(*TRANSFORMERS.rows, *_POSITIONS),
        prefix=r"data2vec_audio\.",
        recognise=r"(^|\.)encoder\.pos_conv_embed\.layers\.\d+\.conv",
    ),
}
