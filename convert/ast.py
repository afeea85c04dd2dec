"""Key tables of AST, for transformers and for its authors' files."""

from collections.abc import Mapping
from typing import Any

from gura_jax.convert.keys import CONV2D, Contents, KeyTable, Row, Transform, conv, dense, norm, packed

TOKEN = Transform((0, 1, 2), dropped=(0, 1))  # [1, 1, D] -> [D]
POSITIONS = Transform((0, 1, 2), dropped=(0,))  # [1, T, D] -> [T, D]

# transformers 5 reads and writes the names of version 4, and has others in memory.
_LAYER = r"(?:encoder\.layer|layers)\.(\d+)"
_TRANSFORMERS: list[Row] = [
    (r"embeddings\.(cls|distillation)_token", r"\1_token", TOKEN),
    (r"embeddings\.position_embeddings", "positions", POSITIONS),
    *conv(r"embeddings\.patch_embeddings\.projection", "projection", CONV2D),
    *(
        row
        for theirs, name in (("query", "q"), ("key", "k"), ("value", "v"))
        for row in dense(
            rf"{_LAYER}\.attention\.(?:attention\.{theirs}|{name}_proj)", rf"encoder.layers.\1.attention.{name}_proj"
        )
    ),
    *dense(rf"{_LAYER}\.attention\.(?:output\.dense|o_proj)", r"encoder.layers.\1.attention.out_proj"),
    *norm(rf"{_LAYER}\.layernorm_before", r"encoder.layers.\1.layer_norm"),
    *norm(rf"{_LAYER}\.layernorm_after", r"encoder.layers.\1.final_layer_norm"),
    *dense(rf"{_LAYER}\.(?:intermediate\.dense|mlp\.fc1)", r"encoder.layers.\1.feed_forward.intermediate_dense"),
    *dense(rf"{_LAYER}\.(?:output\.dense|mlp\.fc2)", r"encoder.layers.\1.feed_forward.output_dense"),
    *norm(r"layernorm", "encoder.layer_norm"),
]


def vit(blocks: str) -> list[Row]:
    """Rows of timm's vision transformers, from the pattern of a block's keys, whose group is its number."""
    return [
        *packed(rf"{blocks}\.attn\.qkv\.", [rf"encoder.layers.\1.attention.{name}_proj" for name in "qkv"]),
        *dense(rf"{blocks}\.attn\.proj", r"encoder.layers.\1.attention.out_proj"),
        *norm(rf"{blocks}\.norm1", r"encoder.layers.\1.layer_norm"),
        *norm(rf"{blocks}\.norm2", r"encoder.layers.\1.final_layer_norm"),
        *dense(rf"{blocks}\.mlp\.fc1", r"encoder.layers.\1.feed_forward.intermediate_dense"),
        *dense(rf"{blocks}\.mlp\.fc2", r"encoder.layers.\1.feed_forward.output_dense"),
    ]


# Number of patches of the published files -> what makes so many, and the statistics of what it was trained on.
_AUDIOSET = {"max_length": 1024, "mean": -4.2677393, "std": 4.5689974}
_SPEECH_COMMANDS = {"max_length": 128, "mean": -6.845978, "std": 5.5654526}
_BY_PATCHES: Mapping[int, tuple[int, Mapping[str, Any]]] = {
    1212: (10, _AUDIOSET),
    850: (12, _AUDIOSET),
    657: (14, _AUDIOSET),
    512: (16, _AUDIOSET),
    144: (10, _SPEECH_COMMANDS),
}


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """From the shapes: the files have no settings."""
    shapes = {key.removeprefix("module.").removeprefix("v."): shape for key, shape in contents.shapes.items()}
    positions, inner = shapes.get("pos_embed", ()), shapes.get("blocks.0.mlp.fc1.weight", ())
    if len(positions) != 3 or len(inner) != 2 or positions[1] - 2 not in _BY_PATCHES:
        numbers = ", ".join(str(number + 2) for number in _BY_PATCHES)
        faults.append(f"pos_embed: expected one of {numbers} positions, as published, found the shape {positions}")
        return {}
    stride, trained_on = _BY_PATCHES[positions[1] - 2]
    blocks = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
    return {
        "model_type": "audio-spectrogram-transformer",
        "hidden_size": positions[2],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, positions[2] // 64),  # of every DeiT
        "intermediate_size": inner[0],
        "layer_norm_eps": 1e-6,  # timm's
        "frequency_stride": stride,
        "time_stride": stride,
        **trained_on,
    }


KEYS: Mapping[str, KeyTable] = {
    "transformers": KeyTable(
        rows=tuple(_TRANSFORMERS), prefix=r"audio_spectrogram_transformer\.", ignored=r"classifier\..+"
    ),
    "ast": KeyTable(
        rows=(
            (r"cls_token", "cls_token", TOKEN),
            (r"dist_token", "distillation_token", TOKEN),
            (r"pos_embed", "positions", POSITIONS),
            *conv(r"patch_embed\.proj", "projection", CONV2D),
            *vit(r"blocks\.(\d+)"),
            *norm("norm", "encoder.layer_norm"),
        ),
        prefix=r"(module\.)?v\.",
        ignored=r"(module\.)?mlp_head\..+|head(_dist)?\..+",
        recognise=r"^(module\.)?v\.dist_token$",
        config=_read_config,
    ),
}
