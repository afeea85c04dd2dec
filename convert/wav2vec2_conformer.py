"""Key tables of wav2vec2-conformer, for transformers and fairseq."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gura_jax.convert import conformer, fairseq, wav2vec2
from gura_jax.convert.keys import Contents, KeyTable

# A positional convolution, and angles that are computed.
_UNUSED = r"|encoder\.(pos_conv_embed|pos_conv)\..+|encoder\.(embed_positions|layers\.\d+\.self_attn\.rotary_emb)\..+"
_MODELS = {"wav2vec2": "wav2vec2-conformer", "wav2vec_ctc": "wav2vec2-conformer"}
_POSITIONS = {"rel_pos": "relative", "rope": "rotary"}


def _rows(table: KeyTable) -> list[Any]:
    """Those before the blocks, and that of the norm after them."""
    return [row for row in table.rows if not row[1].startswith(("encoder.layers.", "encoder.pos_conv_embed."))]


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """fairseq's settings; its blocks have swish whatever they say."""
    fixed = {**fairseq.FIXED, "layer_type": "conformer", "attn_type": "espnet"}
    config = fairseq.read_config(contents, faults, models=_MODELS, fixed=fixed)
    settings = fairseq.model_settings(contents)
    if config.get("do_stable_layer_norm") is False:
        faults.append("fairseq's layer_norm_first is false, which is not supported for Conformer blocks: expected true")
    positions = settings.get("pos_enc_type", "abs")
    if positions not in _POSITIONS:
        faults.append(f"fairseq's pos_enc_type is {positions!r}: expected one of {', '.join(_POSITIONS)}")
    return config | {
        "hidden_act": "swish",
        "position_embeddings_type": _POSITIONS.get(str(positions)),
        "conv_depthwise_kernel_size": settings.get("depthwise_conv_kernel_size", 31),
    }


KEYS: Mapping[str, KeyTable] = {
    "transformers": dataclasses.replace(
        wav2vec2.TRANSFORMERS,
        rows=(*_rows(wav2vec2.TRANSFORMERS), *conformer.TRANSFORMERS),
        prefix=r"wav2vec2_conformer\.",
        ignored=wav2vec2.TRANSFORMERS.ignored + _UNUSED,
        recognise=r"(^|\.)encoder\.layers\.\d+\.ffn1_layer_norm\.",
    ),
    "fairseq": dataclasses.replace(
        wav2vec2.FAIRSEQ,
        rows=(*_rows(wav2vec2.FAIRSEQ), *conformer.FAIRSEQ),
        ignored=wav2vec2.FAIRSEQ.ignored + _UNUSED,
        recognise=r"(^|\.)encoder\.layers\.\d+\.ffn1\.w_1\.",
        config=_read_config,
    ),
}
