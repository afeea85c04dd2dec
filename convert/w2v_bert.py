"""Key table of w2v-BERT 2.0, for transformers."""

from collections.abc import Mapping

from gura_jax.convert import conformer
from gura_jax.convert.keys import KeyTable, dense, norm

KEYS: Mapping[str, KeyTable] = {
    "transformers": KeyTable(
        rows=(
            *norm(r"feature_projection\.layer_norm", "feature_projection.layer_norm"),
            *dense(r"feature_projection\.projection", "feature_projection.projection"),
            *conformer.TRANSFORMERS,
        ),
        prefix=r"wav2vec2_bert\.",
        ignored=r"masked_spec_embed|layer_weights|(lm_head|projector|classifier|tdnn|objective|feature_extractor)\..+"
        r"|encoder\.embed_positions\.inv_freq",
        refused={
            r"(adapter|intermediate_ffn)\..+": "convolutions after the last block (add_adapter) are not supported"
        },
        recognise=r"(^|\.)encoder\.layers\.\d+\.conv_module\.depthwise_layer_norm\.",
    ),
}
