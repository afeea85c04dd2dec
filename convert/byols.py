"""Key table of BYOL-S' files."""

from collections.abc import Mapping
from typing import Any

from gura_jax.convert.keys import CONV2D_TRANSPOSED, Contents, KeyTable, Row, batch_norm, conv, dense


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """From the shapes: the files have no settings."""
    kernel, last = (contents.shapes.get(key, ()) for key in ("features.0.weight", "fc.3.weight"))
    if len(kernel) != 4 or len(last) != 2:
        faults.append("features.0, fc.3: expected the layers of AudioNTT2020, found others")
        return {}
    return {"model_type": "byol_s", "channels": kernel[0], "hidden_size": last[0]}


def _rows() -> list[Row]:
    rows = [*dense(r"fc\.0", "fc1"), *dense(r"fc\.3", "fc2")]
    for i in range(3):
        rows += conv(rf"features\.{4 * i}", f"convs.{i}", CONV2D_TRANSPOSED)
        rows += batch_norm(rf"features\.{4 * i + 1}", f"norms.{i}")
    return rows


KEYS: Mapping[str, KeyTable] = {
    "byol-s": KeyTable(
        rows=tuple(_rows()),
        ignored=r".+\.num_batches_tracked",
        recognise=r"^features\.8\.weight$",
        config=_read_config,
    )
}
