"""Key tables of WavLM for transformers, its authors' files (unilm) and torchaudio."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gura_jax.convert import fairseq
from gura_jax.convert.keys import EMBEDDING, Contents, KeyTable, Row, Transform, Wrapping, dense, packed
from gura_jax.convert.wav2vec2 import FAIRSEQ, TORCHAUDIO, TRANSFORMERS

_PER_HEAD = Transform((0, 1, 2, 3), dropped=(0, 2, 3))  # [1, H, 1, 1] -> [H]
_ATTENTION = r"encoder.layers.\1.attention"


def _relative(layers: str, attention: str, const: str, linear: str, embedding: str) -> tuple[Row, ...]:
    """Rows of each block's gates, and of the biases, which the first block holds for all."""
    return (
        (rf"{layers}\.(\d+)\.{attention}\.{const}", f"{_ATTENTION}.gru_rel_pos_const", _PER_HEAD),
        *dense(rf"{layers}\.(\d+)\.{attention}\.{linear}", f"{_ATTENTION}.gru_rel_pos_linear"),
        (rf"{layers}\.0\.{attention}\.{embedding}\.weight", "encoder.rel_attn_embed.embedding", EMBEDDING),
    )


_NAMES = ("gru_rel_pos_const", "gru_rel_pos_linear", "rel_attn_embed")
_PACKED = r"encoder\.transformer\.layers\.(\d+)\.attention\.attention\."

UNILM_RELATIVE = _relative(r"encoder\.layers", "self_attn", "grep_a", "grep_linear", "relative_attention_bias")
_UNILM = Wrapping(state=("model",), settings=("cfg",))


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """Of a file with fairseq's settings, which are not nested, and those of the relative positions."""
    cfg = contents.settings.get("cfg")
    if not isinstance(cfg, dict):
        faults.append("no settings beside the weights: expected the cfg of WavLM's authors")
        return {}
    if cfg.get("relative_position_embedding") is not True or cfg.get("gru_rel_pos") is not True:
        faults.append("relative_position_embedding, gru_rel_pos: expected true, as in all published WavLM")
    read = fairseq.read_config(Contents(contents.shapes, {"args": cfg | {"_name": "wav2vec2"}}), faults)
    return {
        **read,
        "model_type": "wavlm",
        "num_buckets": cfg.get("num_buckets"),
        "max_bucket_distance": cfg.get("max_distance"),
    }


KEYS: Mapping[str, KeyTable] = {
    "transformers": dataclasses.replace(
        TRANSFORMERS,
        rows=(*TRANSFORMERS.rows, *_relative(r"encoder\.layers", "attention", *_NAMES)),
        prefix=r"wavlm\.",
        recognise=r"(^|\.)encoder\.layers\.\d+\.attention\.gru_rel_pos_const",
    ),
    "unilm": dataclasses.replace(
        FAIRSEQ,
        rows=(
            *FAIRSEQ.rows,
            *UNILM_RELATIVE,
        ),
        prefix="",
        recognise=r"encoder\.layers\.\d+\.self_attn\.grep_linear",
        config=_read_config,
        wrapping=_UNILM,
    ),
    "torchaudio": dataclasses.replace(
        TORCHAUDIO,
        rows=(
            *TORCHAUDIO.rows,
            *_relative(r"encoder\.transformer\.layers", "attention", *_NAMES),
            *dense(f"{_PACKED}out_proj", f"{_ATTENTION}.out_proj"),
            *packed(f"{_PACKED}in_proj_", [f"{_ATTENTION}.{name}_proj" for name in "qkv"]),
        ),
        recognise=r"(^|\.)encoder\.transformer\.layers\.\d+\.attention\.gru_rel_pos_const",
    ),
}
