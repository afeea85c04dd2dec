"""Key table of PaSST's files."""

from collections.abc import Mapping
from typing import Any

from gura_jax.convert.ast import POSITIONS, TOKEN, vit
from gura_jax.convert.keys import CONV2D_TRANSPOSED, Contents, KeyTable, Transform, conv, dense, norm

_ROWS = Transform((2, 1, 0, 3), dropped=(2, 3))  # [1, D, rows, 1] -> [rows, D]
_COLUMNS = Transform((3, 1, 0, 2), dropped=(2, 3))  # [1, D, 1, columns] -> [columns, D]
_GRID = (12, 99)  # of patches, in the files whose spectrogram this is


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """From the shapes: the files have no settings."""
    shapes = {key.removeprefix("net."): shape for key, shape in contents.shapes.items()}
    rows, columns, head = (shapes.get(name, ()) for name in _NAMES)
    grid = (rows[2], columns[3]) if len(rows) == len(columns) == 4 else None
    if grid != _GRID or len(head) != 2:
        faults.append(
            f"{', '.join(_NAMES)}: expected a PaSST of {_GRID[0]} by {_GRID[1]} patches and a layer of classes, found "
            f"the shapes {rows}, {columns} and {head}"
        )
        return {}
    return {
        "model_type": "passt",
        "hidden_size": head[1],
        "num_hidden_layers": len({key.split(".")[1] for key in shapes if key.startswith("blocks.")}),
        "num_attention_heads": max(1, head[1] // 64),
        "classes": head[0],
    }


_NAMES = ("freq_new_pos_embed", "time_new_pos_embed", "head.1.weight")

KEYS: Mapping[str, KeyTable] = {
    "passt": KeyTable(
        rows=(
            (r"(cls|dist)_token", r"\1_token", TOKEN),
            (r"new_pos_embed", "special_positions", POSITIONS),
            (r"freq_new_pos_embed", "row_positions", _ROWS),
            (r"time_new_pos_embed", "column_positions", _COLUMNS),
            *conv(r"patch_embed\.proj", "projection", CONV2D_TRANSPOSED),
            *vit(r"blocks\.(\d+)"),
            *norm("norm", "encoder.layer_norm"),
            *norm(r"head\.0", "head_norm"),
            *dense(r"head\.1", "head"),
        ),
        prefix=r"net\.",
        ignored=r"head_dist\..+|device_proxy",
        recognise=r"^(net\.)?time_new_pos_embed$",
        config=_read_config,
    )
}
