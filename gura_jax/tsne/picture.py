"""A map as a picture, by matplotlib."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from gura_jax import files
from gura_jax.errors import SystemConfigError
from gura_jax.plot import STYLE
from gura_jax.tsne.colors import NONE, Colors, palette
from gura_jax.tsne.layout import SEED, Map

PICTURES = (".png", ".svg", ".pdf")
LEGEND_NAMES = 30  # that fit beside the map
MAX_VECTORS = 20_000  # points of an SVG or PDF as shapes; more are slow to open, and become pixels


def draw(found: Map, colors: Colors, path: Path) -> None:
    """Draw a map as a picture in the format of the path's suffix.

    The legend names at most the 30 most frequent categories; the others are coloured, but not named.

    Raises:
        StoreError: the file cannot be written.
        SystemConfigError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ModuleNotFoundError:
        raise SystemConfigError("expected matplotlib: pip install 'gura-jax[plot]'") from None

    # Names are shown literally, not as formulas; and a map drawn twice gives the same bytes.
    settings: dict[Any, Any] = STYLE | {"text.parse_math": False, "svg.hashsalt": "gura_jax"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(8, 6.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        size = float(np.clip(4000 / len(found.places), 3, 26))
        style: dict[str, Any] = {
            "s": size,
            "linewidths": 0,
            "alpha": 0.85,
            "rasterized": len(found.places) > MAX_VECTORS,
        }
        without = np.isnan(colors.values)
        axes.scatter(*found.places[without].T, color=NONE, **style)
        # In random order, so that no category is always on top.
        order = np.random.default_rng(SEED).permutation(np.flatnonzero(~without))
        places, values = found.places[order], colors.values[order]
        legend: list[tuple[str, str]] = [(f"no {colors.column}", NONE)] if without.any() else []
        if colors.names:
            chosen = palette(len(colors.names))
            axes.scatter(*places.T, color=[chosen[int(v)] for v in values], **style)
            counts = np.bincount(values.astype(int), minlength=len(chosen))
            named: list[int] = sorted(np.argsort(-counts, kind="stable")[:LEGEND_NAMES].tolist())
            legend = [(colors.names[i], chosen[i]) for i in named] + legend
            if rest := len(chosen) - len(named):
                legend.append((f"and {rest} more", "none"))
        else:
            points = axes.scatter(*places.T, c=values, cmap="viridis", **style)
            figure.colorbar(points, ax=axes, label=_plain(colors.column), shrink=0.6)
        if legend:
            figure.legend(
                [Line2D([], [], ls="", marker="o", ms=5, color=color) for _, color in legend],
                [_plain(name) for name, _ in legend],
                title=_plain(colors.column) if colors.names else None,
                loc="outside right center",
                alignment="left",
                fontsize=7.5,
                title_fontsize=8.5,
                frameon=False,
            )
        axes.set(xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
        figure.suptitle(found.clips.title, x=0.006, ha="left", fontsize=11, fontweight="bold")
        axes.set_title(found.method, fontsize=9, loc="left")
        out = io.BytesIO()
        # By default SVG and PDF hold the time of writing.
        plain: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
        figure.savefig(out, format=path.suffix[1:], metadata=plain)
    files.open_folder(path.parent)
    files.write_file(path.parent, path.name, out.getvalue())


def _plain(name: str) -> str:
    """Fit a name into one short line of the legend."""
    name = "".join(c if c.isprintable() else "\ufffd" for c in name)
    return name if len(name) <= 40 else f"{name[:39]}…"
