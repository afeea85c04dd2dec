"""Key table of PANNs' files."""

from collections.abc import Mapping
from typing import Any

from gura_jax.convert.keys import CONV2D, Contents, KeyTable, Row, Wrapping, batch_norm, conv, dense


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """From the shapes: the files have no settings."""
    shapes = [contents.shapes.get(f"conv_block{i}.conv2.weight", ()) for i in range(1, 7)]
    if not all(len(shape) == 4 for shape in shapes):
        faults.append("conv_block1 to conv_block6: expected the six blocks of CNN14, found others")
        return {}
    return {"model_type": "panns_cnn14", "channels": [shape[0] for shape in shapes]}


def _rows() -> list[Row]:
    rows = [*batch_norm("bn0", "bn0"), *dense("fc1", "fc1")]
    for i in range(6):
        for j in (1, 2):
            rows += conv(rf"conv_block{i + 1}\.conv{j}", f"blocks.{i}.conv{j}", CONV2D)
            rows += batch_norm(rf"conv_block{i + 1}\.bn{j}", f"blocks.{i}.bn{j}")
    return rows


KEYS: Mapping[str, KeyTable] = {
    "panns": KeyTable(
        rows=tuple(_rows()),
        # The spectrogram is computed from its settings, which all files share.
        ignored=r"(spectrogram_extractor|logmel_extractor|fc_audioset)\..+|.+\.num_batches_tracked",
        recognise=r"^conv_block6\.conv2\.weight$",
        config=_read_config,
        # The sampler's state is NumPy's arrays.
        wrapping=Wrapping(("model",), (), ("numpy.core.multiarray._reconstruct", "numpy.ndarray")),
    )
}
