"""The colours of a map's points, by a column of the metadata."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gura_jax.errors import InputError
from gura_jax.tsne.clips import Clips, shown

MAX_NUMBERS = 40  # distinct numbers that are categories; more become a scale
MAX_CATEGORIES = 200  # more cannot be told apart by colour
NONE = "#c9ccd3"  # of points without a value


class Colors(NamedTuple):
    """A category or a number for each point.

    Attributes:
        column: name of the column.
        names: names of the categories; empty for a scale.
        values: [n], index of the category, or the number; NaN where there is no value.
    """

    column: str
    names: Sequence[str]
    values: np.ndarray


def color_by(clips: Clips, column: str) -> Colors:
    """Colour clips by a column of their metadata.

    Raises:
        InputError: there is no such column, it is empty, or it has too many values to tell apart.
    """
    if column not in (known := clips.columns):
        raise InputError(f"--color: expected one of the columns {', '.join(known)}, found {column!r}")
    values = clips.table[column].to_pylist()
    values = [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in values if v is not None]
    if not numbers:
        raise InputError(f"--color: expected a column with values, found none in {column!r}")
    if all(numbers) and len(set(values) - {None}) > MAX_NUMBERS:
        return Colors(column, (), np.array([math.nan if v is None else v for v in values], np.float64))
    texts = ["" if value is None else shown(value) for value in values]
    names = sorted(set(texts) - {""}, key=_natural)
    if len(names) > MAX_CATEGORIES:
        raise InputError(
            f"--color: expected at most {MAX_CATEGORIES} different values, found {len(names)} in {column!r}"
        )
    index = {name: i for i, name in enumerate(names)}
    return Colors(column, names, np.array([index.get(text, math.nan) for text in texts], np.float64))


def _natural(text: str) -> tuple[int, float, str]:
    """Return a sort key: numbers by value, then text."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def palette(count: int, name: str | None = None) -> list[str]:
    """Choose distinct colours, as ``#rrggbb``; or steps of one of matplotlib's colour maps."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    if name is None:
        for listed in ("tab10", "tab20"):
            if count <= mpl.colormaps[listed].N:
                return [to_hex(mpl.colormaps[listed](i)) for i in range(count)]
    return [to_hex(mpl.colormaps[name or "turbo"](i / (count - 1))) for i in range(count)]
