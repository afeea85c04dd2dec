"""Key tables of Whisper's encoder, for transformers and for its authors' files."""

from collections.abc import Mapping
from typing import Any

from gura_jax.convert.keys import EMBEDDING, Contents, KeyTable, Wrapping, conv, dense, norm

# The authors' names of sizes -> those of transformers' config.json.
_DIMS = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
}


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    dims = contents.settings.get("dims")
    if not isinstance(dims, dict) or not all(isinstance(dims.get(name), int) for name in _DIMS):
        faults.append(f"dims: expected numbers called {', '.join(_DIMS)}, found {dims!r}")
        return {}
    return {
        "model_type": "whisper",
        "encoder_ffn_dim": 4 * dims["n_audio_state"],
        **{name: dims[theirs] for theirs, name in _DIMS.items()},
    }


KEYS: Mapping[str, KeyTable] = {
    "transformers": KeyTable(
        rows=(
            *conv(r"encoder\.(conv[12])", r"\1"),
            (r"encoder\.embed_positions\.weight", "embed_positions", EMBEDDING),
            *dense(r"encoder\.layers\.(\d+)\.self_attn\.([qkv]|out)_proj", r"encoder.layers.\1.attention.\2_proj"),
            *norm(r"encoder\.layers\.(\d+)\.self_attn_layer_norm", r"encoder.layers.\1.layer_norm"),
            *norm(r"encoder\.layers\.(\d+)\.final_layer_norm", r"encoder.layers.\1.final_layer_norm"),
            *dense(r"encoder\.layers\.(\d+)\.fc1", r"encoder.layers.\1.feed_forward.intermediate_dense"),
            *dense(r"encoder\.layers\.(\d+)\.fc2", r"encoder.layers.\1.feed_forward.output_dense"),
            *norm(r"encoder\.layer_norm", "encoder.layer_norm"),
        ),
        prefix=r"model\.",
        ignored=r"decoder\..+|proj_out\..+|(projector|classifier)\..+|layer_weights",
    ),
    "openai-whisper": KeyTable(
        rows=(
            *conv(r"encoder\.(conv[12])", r"\1"),
            (r"encoder\.positional_embedding", "embed_positions", EMBEDDING),
            *(
                row
                for theirs, name in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out"))
                for row in dense(
                    rf"encoder\.blocks\.(\d+)\.attn\.{theirs}", rf"encoder.layers.\1.attention.{name}_proj"
                )
            ),
            *norm(r"encoder\.blocks\.(\d+)\.attn_ln", r"encoder.layers.\1.layer_norm"),
            *norm(r"encoder\.blocks\.(\d+)\.mlp_ln", r"encoder.layers.\1.final_layer_norm"),
            *dense(r"encoder\.blocks\.(\d+)\.mlp\.0", r"encoder.layers.\1.feed_forward.intermediate_dense"),
            *dense(r"encoder\.blocks\.(\d+)\.mlp\.2", r"encoder.layers.\1.feed_forward.output_dense"),
            *norm(r"encoder\.ln_post", "encoder.layer_norm"),
        ),
        ignored=r"decoder\..+",
        recognise=r"^encoder\.blocks\.\d+\.attn\.query\.weight$",
        config=_read_config,
        wrapping=Wrapping(state=("model_state_dict",), settings=("dims",)),
    ),
}
