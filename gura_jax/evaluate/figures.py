"""Figures of an evaluation as inline SVG: confusion matrices, weights, intervals. Colours are the page's variables."""

import html
import math
from collections.abc import Mapping, Sequence

from gura_jax.dataset.sources import printable

MOST_CLASSES = 100  # of a matrix that is drawn
CELLS = ((15, 30), (40, 16), (MOST_CLASSES, 9))  # classes up to -> pixels of a cell
COUNTED = 24  # pixels from which a cell shows its count
FONT, CHARACTER = 11, 6.4  # pixels of labels, and of a character at most on average
LONGEST = 18  # characters of a label
FAINTEST = 0.12  # opacity of a cell that is not empty
BAR_HEIGHT = 90  # pixels
INTERVAL = (220, 18)  # pixels of an interval


def text(value: object) -> str:
    """Escape a value for HTML and its attributes."""
    return html.escape(printable(str(value)))


def matrix(confusion: Mapping[str, Mapping[str, int]]) -> str:
    """Draw a confusion matrix, a row a true class; cells are coloured by their share of the row.

    Args:
        confusion: clips by true and predicted class; true classes in the order of the rows.

    Returns:
        An SVG; nothing if there are more than ``MOST_CLASSES`` classes.
    """
    labels = list(confusion)
    if len(labels) > MOST_CLASSES:
        return ""
    column = {label: i for i, label in enumerate(labels)}
    cell = next(pixels for most, pixels in CELLS if len(labels) <= most)
    font = min(FONT, cell)
    margin = round(CHARACTER * min(LONGEST, max(map(len, labels), default=0)) * font / FONT) + 10
    size = margin + cell * len(labels) + 2
    parts = [
        f'<svg class="matrix" role="img" aria-label="confusion matrix" width="{size}" height="{size}" '
        f'viewBox="0 0 {size} {size}" font-size="{font}">'
    ]
    for i, label in enumerate(labels):
        middle = margin + cell * i + cell / 2
        name = f"<title>{text(label)}</title>{text(_short(label))}"
        parts.append(f'<text x="{margin - 5}" y="{middle + font / 3:.1f}" text-anchor="end">{name}</text>')
        x, y = middle + font / 3, margin - 5
        parts.append(f'<text x="{x:.1f}" y="{y}" transform="rotate(-90 {x:.1f} {y})">{name}</text>')
    for i, (true, row) in enumerate(confusion.items()):
        clips = sum(row.values())
        for predicted, count in row.items():
            share = count / clips
            x, y = margin + cell * column[predicted], margin + cell * i
            kind = "hit" if predicted == true else "miss"
            about = f"{text(true)} taken for {text(predicted)}" if kind == "miss" else text(true)
            parts.append(
                f'<rect class="{kind}" x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'fill-opacity="{FAINTEST + (1 - FAINTEST) * share:.2f}">'
                f"<title>{about}: {count} of {clips}</title></rect>"
            )
            if cell >= COUNTED:
                shade = ' class="on"' if share > 0.5 else ""
                place = f'x="{x + (cell - 1) / 2}" y="{y + (cell - 1) / 2 + font / 3:.1f}"'
                parts.append(f'<text{shade} {place} text-anchor="middle">{count}</text>')
    edge = cell * len(labels)
    parts.append(
        f'<rect class="frame" x="{margin - 1}" y="{margin - 1}" width="{edge + 1}" height="{edge + 1}"/></svg>'
    )
    return "".join(parts)


def _short(label: str) -> str:
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"


def bars(weights: Sequence[tuple[str, float]], highest: float, line: float) -> str:
    """Draw weights as bars as wide as the page allows.

    Args:
        weights: name and value of each.
        highest: value at the top, so that several figures share a scale.
        line: value at which to draw a line across.
    """
    top = max(highest, line) or 1.0
    parts = [
        f'<svg class="bars" role="img" aria-label="weights" width="100%" height="{BAR_HEIGHT}" '
        f'viewBox="0 0 {len(weights)} 1" preserveAspectRatio="none">'
    ]
    for i, (name, value) in enumerate(weights):
        height = value / top
        parts.append(
            f'<rect class="hit" x="{i + 0.1:.1f}" y="{1 - height:.4f}" width="0.8" height="{height:.4f}">'
            f"<title>{text(name)}: {value:.4f}</title></rect>"
        )
    y = 1 - line / top
    parts.append(f'<line class="even" x1="0" x2="{len(weights)}" y1="{y:.4f}" y2="{y:.4f}"/></svg>')
    return "".join(parts)


def interval(mean: float, low: float | None, high: float | None, limit: float) -> str:
    """Draw a difference and its interval around zero, on a scale from ``-limit`` to ``limit``."""
    width, height = INTERVAL
    middle = height / 2

    if not math.isfinite(mean):
        return ""

    def place(value: float) -> float:
        return width / 2 + max(-1.0, min(1.0, value / limit if limit else 0.0)) * (width / 2 - 5)

    across = ""
    if low is not None and high is not None:
        across = f'<line class="range" x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{middle}" y2="{middle}"/>'
    return (
        f'<svg class="interval" role="img" aria-label="interval" width="{width}" height="{height}">'
        f'<line class="even" x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height}"/>{across}'
        f'<circle class="hit" cx="{place(mean):.1f}" cy="{middle}" r="4"/></svg>'
    )
