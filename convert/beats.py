"""Key table of BEATs' and OpenBEATs' files."""

from collections.abc import Mapping
from typing import Any

from gura_jax.convert.keys import CONV2D, Contents, KeyTable, Wrapping, conv, dense, norm
from gura_jax.convert.wav2vec2 import FAIRSEQ
from gura_jax.convert.wavlm import UNILM_RELATIVE

# What neither changes the computation nor has a name in the config.
_UNREAD = (
    "dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "dropout_input", "mask_ratio",
    "layer_wise_gradient_decay_ratio", "finetuned_model", "predictor_dropout", "predictor_class", "use_flash_attn",
    "decoder_embed_dim", "decoder_pos_trainable", "decoder_attention_heads", "decoder_mlp_ratio", "decoder_layers",
    "codebook_vocab_size",
)  # fmt: skip


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    cfg = contents.settings.get("cfg")
    if not isinstance(cfg, dict):
        faults.append(
            "no settings beside the weights: expected the entry cfg: give the checkpoint as its authors publish it"
        )
        return {}
    return {"model_type": "beats"} | {name: value for name, value in cfg.items() if name not in _UNREAD}


KEYS: Mapping[str, KeyTable] = {
    "beats": KeyTable(
        rows=(
            *conv("patch_embedding", "patch_embedding", CONV2D),
            *norm("layer_norm", "layer_norm"),
            *dense("post_extract_proj", "projection"),
            *(row for row in FAIRSEQ.rows if row[1].startswith("encoder.")),
            *UNILM_RELATIVE,
        ),
        # The first block's table of biases is stored in every block.
        ignored=r"encoder\.layers\.(?!0\.)\d+\.self_attn\.relative_attention_bias\.weight|predictor\..+|mask_token"
        r"|(raw2fbank|patch_embedding)_pad\.weight",
        recognise=r"^patch_embedding\.weight$",
        config=_read_config,
        wrapping=Wrapping(state=("model",), settings=("cfg",)),
    )
}
