"""A map of stored embeddings by t-SNE, as a picture, or as a page that plays the clips; needs the extra ``plot``.

Figure 2 of the paper draws such maps of whole data sets (perplexity 50).
"""

import base64
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gura_jax.audio import SAMPLE_RATE, load_audio
from gura_jax.dataset import store
from gura_jax.dataset.manifest import decoded, read_inputs
from gura_jax.dataset.store import EmbeddingStore
from gura_jax.errors import AudioError, InputError, StoreError, SystemConfigError

PERPLEXITY = 50.0  # Figure 2
MIN_CLIPS = 5
MANY_CLIPS = 1000
SEED = 0
PICTURES = (".png", ".svg", ".pdf")
PAGE = ".html"
DATA_SET = "data set"  # a column: the folder of the store that a clip is from
_WHERE = ("shard", "row", "num_samples", "num_frames", "frame_start", "frame_offset_ms", "frame_hop_ms")  # not shown
MAX_CATEGORIES = 40  # more distinct numbers than this are a scale
PAGE_CATEGORIES = 200  # more distinct texts than this tell nothing apart
CLIP_SECONDS = 10.0  # of each clip that a page plays
PAGE_AUDIO_BYTES = 48 << 20  # of a page's audio: browsers still open it quickly
NONE = "#c9ccd3"
_INK, _FAINT = "#1d2330", "#6b7280"


class Map(NamedTuple):
    """Clips in the plane.

    Attributes:
        title: the systems and the number of clips.
        places: [n, 2].
        perplexity: that was used.
        rows: metadata of each clip.
    """

    title: str
    places: np.ndarray
    perplexity: float
    rows: Sequence[Mapping[str, Any]]


def make_map(
    folders: Sequence[str | os.PathLike[str]],
    *,
    inputs: Sequence[str | os.PathLike[str]] = (),
    perplexity: float = PERPLEXITY,
) -> Map:
    """Lay out the scene embeddings of stores by t-SNE (scikit-learn's, from principal components, of a fixed seed).

    Args:
        folders: of the stores, all of one embedding size.
        inputs: of the stores, as ``gura-jax embed`` took them, for columns that the stores do not have (the labels of
            HEAR tasks), by id.
        perplexity: how many neighbours count; lowered to a third of the clips where there are few.

    Raises:
        StoreError: no store, or of another size.
        InputError: too few clips, or inputs that cannot be read.
        SystemConfigError: scikit-learn is missing.
    """
    if not 0 < perplexity < math.inf:
        raise InputError(f"perplexity: expected a number over 0, found {perplexity}")
    stores = [EmbeddingStore(folder) for folder in folders]
    size = stores[0].run["scene_embedding_size"]
    rows: list[dict[str, Any]] = []
    for embeddings in stores:
        if (found := embeddings.run["scene_embedding_size"]) != size:
            raise StoreError(
                f"expected stores of one embedding size, found {size} in {stores[0].folder} and {found} in "
                f"{embeddings.folder}"
            )
        name = embeddings.folder.resolve().name
        rows += [{DATA_SET: name} | row for row in embeddings.to_arrow().to_pylist()]
    if inputs:
        _join(rows, inputs)
    if len(rows) < MIN_CLIPS:
        raise InputError(f"expected at least {MIN_CLIPS} clips to lay out, found {len(rows)}")
    scenes = np.concatenate([embeddings.scenes() for embeddings in stores]).astype(np.float32)
    perplexity = min(perplexity, (len(rows) - 1) / 3)
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        raise SystemConfigError("expected scikit-learn: pip install 'gura-jax[plot]'") from None
    # Threads that wait for each other at every step take longer than one, where there is little to do.
    with threadpool_limits(1 if len(rows) < MANY_CLIPS else None):
        places = TSNE(perplexity=perplexity, init="pca", random_state=SEED).fit_transform(scenes)
    systems = ", ".join(dict.fromkeys(embeddings.run["system"]["name"] for embeddings in stores))
    random = sorted({name for embeddings in stores for name in embeddings.run["random_weights"]})
    marked = f"{systems} (random weights: {', '.join(random)})" if random else systems
    return Map(f"{marked}: {len(rows)} clips", places, perplexity, rows)


def _join(rows: Sequence[dict[str, Any]], inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Add the columns of inputs to the rows of the same id."""
    more = {row["id"]: row for row in read_inputs(inputs).to_pylist()}
    for row in rows:
        for name, value in more.get(row["id"], {}).items():
            row.setdefault(name, value)


def columns(found: Map) -> list[str]:
    """What a map can be coloured by."""
    return [name for name in dict.fromkeys(key for row in found.rows for key in row) if name not in _WHERE]


class Colors(NamedTuple):
    """What points are coloured by: a category each, or a number."""

    column: str
    names: Sequence[str]  # of the categories, or none
    values: np.ndarray  # [n]: index of the category, or the number; NaN: none


def color_by(found: Map, column: str) -> Colors:
    """The colours of a map by a column of its metadata.

    Raises:
        InputError: there is no such column, or it has too many values to tell apart.
    """
    if column not in (known := columns(found)):
        raise InputError(f"--color: expected one of the columns {', '.join(known)}, found {column!r}")
    values = [row.get(column) for row in found.rows]
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in values if v is not None]
    if all(numbers) and len(set(values)) > MAX_CATEGORIES:
        return Colors(column, (), np.array([math.nan if v is None else v for v in values], np.float64))
    texts = ["" if value is None else shown(value) for value in values]
    names = sorted(set(texts) - {""}, key=_natural)
    if len(names) > PAGE_CATEGORIES:
        raise InputError(
            f"--color: expected at most {PAGE_CATEGORIES} different values, found {len(names)} in {column!r}"
        )
    index = {name: i for i, name in enumerate(names)}
    return Colors(column, names, np.array([index.get(text, math.nan) for text in texts], np.float64))


def shown(value: Any) -> str:
    """A value of the metadata as text; the labels of a HEAR task, which are JSON, without their brackets."""
    if isinstance(value, str) and value.startswith("["):
        try:
            labels = json.loads(value)
        except ValueError:
            return value
        names = [str(label["label"]) if isinstance(label, dict) else str(label) for label in labels]
        return ", ".join(dict.fromkeys(names))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _natural(text: str) -> tuple[int, float, str]:
    """Numbers in their order, before text."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def palette(count: int) -> list[str]:
    """Colours that can be told apart, as ``#rrggbb``."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    for name in ("tab10", "tab20"):
        if count <= mpl.colormaps[name].N:
            return [to_hex(mpl.colormaps[name](i)) for i in range(count)]
    return [to_hex(mpl.colormaps["turbo"](i / (count - 1))) for i in range(count)]


def draw(found: Map, colors: Colors, path: Path) -> None:
    """Draw a map as a picture; the path's suffix says the format.

    Raises:
        StoreError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8, 6.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    size = float(np.clip(4000 / len(found.places), 3, 26))
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.85}
    without = np.isnan(colors.values)
    axes.scatter(*found.places[without].T, color=NONE, **style)
    places, values = found.places[~without], colors.values[~without]
    if colors.names:
        chosen = palette(len(colors.names))
        axes.scatter(*places.T, color=[chosen[int(v)] for v in values], **style)
        handles = [Line2D([], [], ls="", marker="o", ms=5, color=c) for c in chosen]
        names = [name if len(name) <= 40 else f"{name[:39]}…" for name in colors.names]
        figure.legend(
            handles,
            names,
            title=colors.column,
            loc="outside right upper",
            ncols=1 + len(names) // 32,
            fontsize=7,
            title_fontsize=8,
            frameon=False,
        )
    else:
        points = axes.scatter(*places.T, c=values, cmap="viridis", **style)
        figure.colorbar(points, ax=axes, label=colors.column, shrink=0.6)
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    axes.set_title(f"{found.title}; t-SNE, perplexity {found.perplexity:g}", fontsize=9, color=_INK, loc="left")
    out = io.BytesIO()
    # SVG and PDF would hold the time of their making.
    plain: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    figure.savefig(out, format=path.suffix[1:], metadata=plain)
    _write(path, out.getvalue())


def _write(path: Path, content: bytes) -> None:
    store.open_folder(path.parent)
    store.write_file(path.parent, path.name, content)


def write_page(found: Map, colors: Colors, path: Path) -> int:
    """Write a map as one page that needs nothing else: a point shows what its clip is, and a click plays it.

    Audio is MP3, of each clip the first ten seconds, in a random order until 48 MB are full.

    Returns:
        How many clips play.

    Raises:
        StoreError: the file cannot be written.
        SystemConfigError: Plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise SystemConfigError("expected plotly: pip install 'gura-jax[plot]'") from None
    audio, silent = _sounds(found.rows)
    if colors.names:
        chosen = palette(len(colors.names))
        groups: list[dict[str, Any]] = [
            {"name": name, "color": color, "rows": np.flatnonzero(colors.values == i).tolist()}
            for i, (name, color) in enumerate(zip(colors.names, chosen, strict=True))
        ]
    else:
        rows = np.flatnonzero(~np.isnan(colors.values))
        groups = [{"name": colors.column, "values": colors.values[rows].tolist(), "rows": rows.tolist()}]
    if rest := np.flatnonzero(np.isnan(colors.values)).tolist():
        groups.append({"name": f"no {colors.column}", "color": NONE, "rows": rest})
    data = {
        "places": np.round(found.places.astype(np.float64), 3).tolist(),
        "groups": groups,
        "clips": [_described(row) for row in found.rows],
        "audio": audio,
        "silent": silent,
    }
    playing = sum(sound is not None for sound in audio)
    about = f"t-SNE, perplexity {found.perplexity:g}; coloured by {colors.column}; {playing} clips play"
    if playing < len(audio):
        about += f" ({len(audio) - playing} do not: their files are not to be found, or the page is full)"
    # "<" never stands in the data, so that no name can end the script.
    content = (
        _PAGE.replace("@TITLE@", html.escape(found.title))
        .replace("@ABOUT@", html.escape(about))
        .replace("@DATA@", json.dumps(data).replace("<", "\\u003c"))
        .replace("@PLOTLY@", get_plotlyjs())
    )
    _write(path, content.encode())
    return playing


def _described(row: Mapping[str, Any]) -> list[list[str]]:
    """What a page says of a clip: names and values, the id first."""
    names = ["id", *(name for name in row if name not in ("id", "path", "offset", *_WHERE))]
    return [[name, shown(row[name])] for name in names if row.get(name) is not None]


def _sounds(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str | None], list[str]]:
    """The start of each clip as MP3 in base64, or None, and why."""
    audio: list[str | None] = [None] * len(rows)
    silent = ["the page is full"] * len(rows)
    left = PAGE_AUDIO_BYTES
    for i in np.random.default_rng(SEED).permutation(len(rows)).tolist():
        try:
            sound = _mp3(rows[i])
        except AudioError as error:
            silent[i] = str(error)
            continue
        left -= len(sound)
        if left < 0:
            break
        audio[i], silent[i] = sound, ""
    return audio, silent


def _mp3(row: Mapping[str, Any]) -> str:
    import soundfile

    seconds = min(CLIP_SECONDS, row["num_samples"] / SAMPLE_RATE)
    samples = load_audio(decoded(row["path"]), row["offset"], seconds)
    out = io.BytesIO()
    soundfile.write(out, samples, SAMPLE_RATE, format="MP3")
    return base64.b64encode(out.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<link rel="icon" href="data:,">
<style>
  body { margin: 0; height: 100vh; display: flex; flex-direction: column; background: #fff; color: #1d2330;
         font: 14px/1.45 system-ui, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
  header { padding: 16px 24px 4px; }
  h1 { font-size: 17px; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
  p { margin: 2px 0 0; color: #6b7280; }
  #map { flex: 1; min-height: 0; }
  footer { padding: 8px 24px 14px; min-height: 44px; border-top: 1px solid #e6e8ec; overflow-wrap: anywhere; }
  dl { display: flex; flex-wrap: wrap; gap: 2px 22px; margin: 2px 0 0; }
  dl div { display: flex; gap: 6px; }
  dt { color: #6b7280; }
  dd { margin: 0; }
</style>
</head>
<body>
<header><h1>@TITLE@</h1><p>@ABOUT@</p></header>
<div id="map"></div>
<footer><div id="now" aria-live="polite">Click a point to play its clip.</div><dl id="clip"></dl></footer>
<audio id="player"></audio>
<script type="application/json" id="data">@DATA@</script>
<script>@PLOTLY@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const player = document.getElementById("player");
const now = document.getElementById("now");
const list = document.getElementById("clip");
let chosen = null;

// Plotly takes tags for formatting: names are shown as they are.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text) => (text.length > 80 ? text.slice(0, 79) + "\\u2026" : text);
const label = (clip) =>
  clip.map(([name, value], i) => (i ? plain(name) + ": " : "") + plain(short(value))).join("<br>");

const traces = data.groups.map((group) => ({
  type: data.clips.length > 3000 ? "scattergl" : "scatter",
  mode: "markers",
  name: plain(short(group.name)),
  x: group.rows.map((i) => data.places[i][0]),
  y: group.rows.map((i) => data.places[i][1]),
  customdata: group.rows,
  text: group.rows.map((i) => label(data.clips[i])),
  hovertemplate: "%{text}<extra></extra>",
  marker: group.values
    ? { size: 7, opacity: 0.85, color: group.values, colorscale: "Viridis", showscale: true,
        colorbar: { title: { text: plain(group.name) }, thickness: 12, len: 0.6 } }
    : { size: 7, opacity: 0.85, color: group.color },
}));
const axis = { visible: false, zeroline: false };
const layout = {
  margin: { l: 12, r: 12, t: 8, b: 8 },
  xaxis: axis,
  yaxis: { ...axis, scaleanchor: "x" },
  hovermode: "closest",
  dragmode: "pan",
  showlegend: !traces[0].marker.showscale,
  legend: { itemsizing: "constant", font: { size: 12 } },
  hoverlabel: { bgcolor: "#ffffff", bordercolor: "#c9ccd3", align: "left", font: { color: "#1d2330", size: 12 } },
};

const describe = (i) => {
  list.replaceChildren(
    ...data.clips[i].slice(1).map(([name, value]) => {
      const row = document.createElement("div");
      const term = document.createElement("dt");
      const detail = document.createElement("dd");
      term.textContent = name;
      detail.textContent = value;
      row.append(term, detail);
      return row;
    })
  );
};
const say = (state) => { now.textContent = state + ": " + data.clips[chosen][0][1]; };
const play = (i) => {
  if (i === chosen && !player.paused) {
    player.pause();
    return;
  }
  chosen = i;
  describe(i);
  player.pause();
  if (data.audio[i] === null) {
    now.textContent = "No sound of " + data.clips[i][0][1] + ": " + data.silent[i];
    return;
  }
  player.src = "data:audio/mpeg;base64," + data.audio[i];
  player.play().catch((error) => { now.textContent = "Cannot play: " + error.message; });
};
player.addEventListener("playing", () => say("Playing"));
player.addEventListener("pause", () => { if (chosen !== null && data.audio[chosen] !== null) say("Stopped"); });
player.addEventListener("ended", () => say("Played"));

Plotly.newPlot("map", traces, layout, { responsive: true, scrollZoom: true, displaylogo: false }).then((map) => {
  map.on("plotly_click", (event) => play(event.points[0].customdata));
  document.body.dataset.ready = "true";
});
</script>
</body>
</html>
"""
