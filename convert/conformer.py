"""Rows of Conformer blocks, for transformers and fairseq."""

from gura_jax.convert.keys import CONV, EMBEDDING, Row, Transform, batch_norm, dense, norm

_POINTWISE = Transform((2, 1, 0), dropped=(0,))  # [out, in, 1] -> [in, out]
_OURS = r"encoder.layers.\1"


def block(feed_forward_norm: str, inner: str, outer: str) -> list[Row]:
    """Rows of the blocks.

    Args:
        feed_forward_norm: expression of the norm of a feed-forward layer, whose number is its second group.
        inner, outer: names of the feed-forward layer's two linear layers.
    """
    layer = r"encoder\.layers\.(\d+)"
    convolutions, ours = rf"{layer}\.conv_module", f"{_OURS}.conv_module"
    return [
        *norm(rf"{layer}\.{feed_forward_norm}", rf"{_OURS}.ffn\2_layer_norm"),
        *dense(rf"{layer}\.ffn([12])\.{inner}", rf"{_OURS}.ffn\2.intermediate_dense"),
        *dense(rf"{layer}\.ffn([12])\.{outer}", rf"{_OURS}.ffn\2.output_dense"),
        *norm(rf"{layer}\.(self_attn|final)_layer_norm", rf"{_OURS}.\2_layer_norm"),
        *dense(rf"{layer}\.self_attn\.linear_([qkv]|out)", rf"{_OURS}.attention.\2_proj"),
        *dense(rf"{layer}\.self_attn\.linear_pos", f"{_OURS}.attention.linear_pos"),
        (rf"{layer}\.self_attn\.pos_bias_([uv])", rf"{_OURS}.attention.pos_bias_\2", EMBEDDING),
        (
            rf"{layer}\.self_attn\.distance_embedding\.weight",
            f"{_OURS}.attention.distance_embedding.embedding",
            EMBEDDING,
        ),
        *norm(rf"{convolutions}\.layer_norm", f"{ours}.layer_norm"),
        *batch_norm(rf"{convolutions}\.(?:batch_norm|depthwise_layer_norm)", f"{ours}.depthwise_norm"),
        (rf"{convolutions}\.pointwise_conv([12])\.weight", rf"{ours}.pointwise_conv\2.kernel", _POINTWISE),
        (rf"{convolutions}\.depthwise_conv\.weight", f"{ours}.depthwise_conv.kernel", CONV),
    ]


TRANSFORMERS = block(r"ffn([12])_layer_norm", "intermediate_dense", "output_dense")
FAIRSEQ = block(r"ffn([12])\.layer_norm", "w_1", "w_2")
