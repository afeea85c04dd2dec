"""Key table of EfficientNet-B2's file."""

import itertools
from collections.abc import Mapping
from typing import Any

from gura_jax.convert.keys import VECTOR, Contents, KeyTable, Row, Transform, conv2d_batch_norm

_POINT = Transform((1, 0, 2, 3), dropped=(2, 3))  # [out, in, 1, 1] -> [in, out]


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """From the shapes: the file has no settings. The stages are those of B2, by the sizes of the blocks."""
    shapes = {key: shape for key, shape in contents.shapes.items() if len(shape) == 4}
    sizes: list[int] = []
    while f"_blocks.{len(sizes)}._project_conv.weight" in shapes:
        sizes.append(shapes[f"_blocks.{len(sizes)}._project_conv.weight"][0])
    stem, head = (shapes.get(f"{name}.weight", (0,))[0] for name in ("_conv_stem", "_conv_head"))
    kernels = [shapes.get(f"_blocks.{i}._depthwise_conv.weight", (0, 0, 0))[2] for i in range(len(sizes))]
    expands = [f"_blocks.{i}._expand_conv.weight" in shapes for i in range(len(sizes))]
    alike = itertools.groupby(zip(sizes, kernels, expands, strict=True))
    stages = [(size, len(list(own))) for (size, _, _), own in alike]
    if len(stages) != 7 or not stem or not head:
        faults.append(f"_blocks: expected the seven stages of EfficientNet, found {len(stages)}")
        return {}
    return {
        "model_type": "efficientnet_b2",
        "blocks": [number for _, number in stages],
        "sizes": [stem, *(size for size, _ in stages), head],
    }


def _point(source: str, target: str) -> list[Row]:
    return [(rf"{source}\.weight", f"{target}.kernel", _POINT), (rf"{source}\.bias", f"{target}.bias", VECTOR)]


_BLOCK, _OURS = r"_blocks\.(\d+)\.", r"blocks.\1."

KEYS: Mapping[str, KeyTable] = {
    "efficient-latent": KeyTable(
        rows=(
            *conv2d_batch_norm("_conv_stem", "_bn0", "stem"),
            *conv2d_batch_norm(f"{_BLOCK}_expand_conv", f"{_BLOCK}_bn0", f"{_OURS}expand"),
            *conv2d_batch_norm(f"{_BLOCK}_depthwise_conv", f"{_BLOCK}_bn1", f"{_OURS}depthwise"),
            *_point(f"{_BLOCK}_se_reduce", f"{_OURS}reduce"),
            *_point(f"{_BLOCK}_se_expand", f"{_OURS}excite"),
            *conv2d_batch_norm(f"{_BLOCK}_project_conv", f"{_BLOCK}_bn2", f"{_OURS}project"),
            *conv2d_batch_norm("_conv_head", "_bn1", "head"),
        ),
        # The spectrogram is computed from its settings, which the one file has.
        ignored=r"front_end\..+|.+\.num_batches_tracked",
        recognise=r"^_blocks\.0\._depthwise_conv\.weight$",
        config=_read_config,
    )
}
