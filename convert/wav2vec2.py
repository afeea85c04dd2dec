"""Key tables of HuBERT and wav2vec 2.0, one architecture, for transformers, fairseq and torchaudio."""

from collections.abc import Mapping

from gura_jax.convert import fairseq
from gura_jax.convert.keys import WEIGHT_G, WEIGHT_V, KeyTable, Row, batch_norm, conv, dense, norm


def _pos_conv(source: str) -> list[Row]:
    target = "encoder.pos_conv_embed.conv"
    return [
        *conv(source, target),
        (rf"{source}\.(?:weight_g|parametrizations\.weight\.original0)", f"{target}.kernel", WEIGHT_G),
        (rf"{source}\.(?:weight_v|parametrizations\.weight\.original1)", f"{target}.kernel", WEIGHT_V),
    ]


_TRANSFORMERS: list[Row] = [
    *conv(r"feature_extractor\.conv_layers\.(\d+)\.conv", r"feature_extractor.layers.\1.conv"),
    *norm(r"feature_extractor\.conv_layers\.(\d+)\.layer_norm", r"feature_extractor.layers.\1.norm"),
    *norm(r"feature_projection\.layer_norm", "feature_projection.layer_norm"),
    *dense(r"feature_projection\.projection", "feature_projection.projection"),
    *_pos_conv(r"encoder\.pos_conv_embed\.conv"),
    *batch_norm(r"encoder\.pos_conv_embed\.batch_norm", "encoder.pos_conv_embed.batch_norm"),
    *norm(r"encoder\.layer_norm", "encoder.layer_norm"),
    *dense(r"encoder\.layers\.(\d+)\.attention\.([qkv]|out)_proj", r"encoder.layers.\1.attention.\2_proj"),
    *norm(r"encoder\.layers\.(\d+)\.(final_)?layer_norm", r"encoder.layers.\1.\2layer_norm"),
    *dense(
        r"encoder\.layers\.(\d+)\.feed_forward\.(intermediate|output)_dense",
        r"encoder.layers.\1.feed_forward.\2_dense",
    ),
]


def _torchaudio(row: Row) -> Row:
    """torchaudio keeps the transformer under ``encoder.transformer``, and the projection under ``encoder``."""
    pattern, target, transform = row
    pattern = pattern.replace(r"encoder\.", r"encoder\.transformer\.")
    return pattern.replace("feature_projection", r"encoder\.feature_projection"), target, transform


_FAIRSEQ: list[Row] = [
    *conv(r"feature_extractor\.conv_layers\.(\d+)\.0", r"feature_extractor.layers.\1.conv"),
    *norm(r"feature_extractor\.conv_layers\.(\d+)\.2(?:\.1)?", r"feature_extractor.layers.\1.norm"),
    *norm(r"layer_norm", "feature_projection.layer_norm"),
    *dense(r"post_extract_proj", "feature_projection.projection"),
    # With conv_pos_batch_norm the batch norm comes first, under the keys of the convolution elsewhere.
    *batch_norm(r"encoder\.pos_conv\.0", "encoder.pos_conv_embed.batch_norm"),
    *conv(r"encoder\.pos_conv\.1", "encoder.pos_conv_embed.conv"),
    *_pos_conv(r"encoder\.pos_conv\.0"),
    *norm(r"encoder\.layer_norm", "encoder.layer_norm"),
    *dense(r"encoder\.layers\.(\d+)\.self_attn\.([qkv]|out)_proj", r"encoder.layers.\1.attention.\2_proj"),
    *norm(r"encoder\.layers\.(\d+)\.self_attn_layer_norm", r"encoder.layers.\1.layer_norm"),
    *norm(r"encoder\.layers\.(\d+)\.final_layer_norm", r"encoder.layers.\1.final_layer_norm"),
    *dense(r"encoder\.layers\.(\d+)\.fc1", r"encoder.layers.\1.feed_forward.intermediate_dense"),
    *dense(r"encoder\.layers\.(\d+)\.fc2", r"encoder.layers.\1.feed_forward.output_dense"),
]

# Part of the computation, and not supported.
_REFUSED = {r".*\.adapter_layer\..+|adapter\..+": "adapters (MMS) are not supported"}

# Ignored: masking and objectives of pre-training, task heads, counters.
TRANSFORMERS = KeyTable(
    rows=tuple(_TRANSFORMERS),
    prefix=r"(hubert|wav2vec2|unispeech|unispeech_sat)\.",
    ignored=r"masked_spec_embed|(lm_head|final_proj|project_hid|project_q|quantizer|dropout_features"
    r"|projector|classifier|tdnn|objective)\..+|layer_weights|label_embs_concat|label_embeddings_concat|(speaker_proj|layer_norm_for_extract|ctc_proj)\..+|feature_extractor\.(weight|bias)"
    r"|.+\.num_batches_tracked",
    refused=_REFUSED,
    recognise=r"(^|\.)encoder\.layers\.\d+\.attention\.",
)
FAIRSEQ = KeyTable(
    rows=tuple(_FAIRSEQ),
    prefix=r"w2v_encoder\.w2v_model\.|w2v_model\.",
    ignored=r"mask_emb|label_embs_concat|(final_proj|project_q|quantizer|input_quantizer|project_inp"
    r"|target_glu|(w2v_encoder\.)?proj)\..+|.+\.num_batches_tracked",
    refused=_REFUSED,
    recognise=r"(^|\.)encoder\.layers\.\d+\.self_attn\.",
    config=fairseq.read_config,
    wrapping=fairseq.WRAPPING,
)
TORCHAUDIO = KeyTable(
    rows=tuple(_torchaudio(row) for row in _TRANSFORMERS),
    prefix=r"wav2vec2\.|model\.wav2vec2\.|model\.",
    ignored=r"aux\.(weight|bias)|(mask_generator|logit_generator|encoder\.readout)\..+",
    refused=_REFUSED,
    recognise=r"(^|\.)encoder\.transformer\.layers\.\d+\.",
    config=None,  # nothing in the file says which encoder it is
)
KEYS: Mapping[str, KeyTable] = {"transformers": TRANSFORMERS, "fairseq": FAIRSEQ, "torchaudio": TORCHAUDIO}
