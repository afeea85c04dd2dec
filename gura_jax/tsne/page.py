"""A map of stored embeddings by t-SNE, as a picture, or as a page that plays the clips; needs the extra ``plot``.

Figure 2 of the paper draws such maps of whole data sets (perplexity 50).
"""

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gura_jax.audio import SAMPLE_RATE, load_audio, soundfile_error
from gura_jax.dataset import store
from gura_jax.dataset.manifest import decoded, printable, read_inputs
from gura_jax.dataset.store import EmbeddingStore
from gura_jax.errors import AudioError, InputError, StoreError, SystemConfigError
from gura_jax.plot import STYLE

PERPLEXITY = 50.0  # Figure 2
MIN_CLIPS = 5
MANY_CLIPS = 1000
SEED = 0
PICTURES = (".png", ".svg", ".pdf")
PAGE = ".html"
DATA_SET = "data set"  # a column: the store that a clip is from, or the HEAR task
_WHERE = ("shard", "row", "num_samples", "num_frames", "frame_start", "frame_offset_ms", "frame_hop_ms")  # not shown
MAX_CATEGORIES = 40  # more distinct numbers than this are a scale
PAGE_CATEGORIES = 200  # more distinct texts than this tell nothing apart
LEGEND_NAMES = 30  # that a picture has room for
CLIP_SECONDS = 10.0  # of each clip that a page plays
PAGE_AUDIO_BYTES = 48 << 20  # of a page's audio: browsers still open it quickly
NONE = "#c9ccd3"
_FULL = "the page is full"


class Clips(NamedTuple):
    """Clips of one store or several.

    Attributes:
        title: the systems and the number of clips.
        scenes: [n, S] float32, not all the same.
        rows: metadata of each clip.
        folders: the store of each clip.
    """

    title: str
    scenes: np.ndarray
    rows: Sequence[Mapping[str, Any]]
    folders: Sequence[Path]


class Map(NamedTuple):
    """Clips in the plane.

    Attributes:
        clips: n of them.
        places: [n, 2].
        perplexity: that was used.
    """

    clips: Clips
    places: np.ndarray
    perplexity: float


def read_clips(folders: Sequence[str | os.PathLike[str]], *, inputs: Sequence[str | os.PathLike[str]] = ()) -> Clips:
    """Read the scene embeddings and the metadata of stores.

    Args:
        folders: of the stores, one at least, all of one embedding size.
        inputs: of the stores, as ``gura-jax embed`` took them, for columns that the stores do not have (the labels of
            HEAR tasks), by id.

    Raises:
        StoreError: no store, or of another size; or embeddings that are all the same, or not finite.
        InputError: too few clips, or inputs that cannot be read.
    """
    stores = [EmbeddingStore(folder) for folder in folders]
    size = stores[0].run["scene_embedding_size"]
    names = [embeddings.folder.resolve().name for embeddings in stores]
    if len(set(names)) < len(names):
        names = [str(embeddings.folder) for embeddings in stores]
    rows: list[dict[str, Any]] = []
    for name, embeddings in zip(names, stores, strict=True):
        if (found := embeddings.run["scene_embedding_size"]) != size:
            raise StoreError(
                f"expected stores of one embedding size, found {size} in {stores[0].folder} and {found} in "
                f"{embeddings.folder}"
            )
        found_rows = embeddings.to_arrow().to_pylist()
        rows += [{DATA_SET: (len(stores) == 1 and row.get("task")) or printable(name)} | row for row in found_rows]
    if inputs:
        _join(rows, inputs)
    if len(rows) < MIN_CLIPS:
        raise InputError(f"expected at least {MIN_CLIPS} clips to lay out, found {len(rows)}")
    scenes = np.concatenate([embeddings.scenes() for embeddings in stores]).astype(np.float32)
    if not 0 < _spread(scenes) < math.inf:
        found = "all the same" if np.isfinite(scenes).all() else "NaN or infinity"
        raise StoreError(f"expected embeddings that are finite and differ, found {found} in {', '.join(names)}")
    systems = ", ".join(dict.fromkeys(embeddings.run["system"]["name"] for embeddings in stores))
    random = sorted({name for embeddings in stores for name in embeddings.run["random_weights"]})
    marked = f"{systems} (random weights: {', '.join(random)})" if random else systems
    origins = [embeddings.folder for embeddings in stores for _ in range(len(embeddings))]
    return Clips(f"{marked}: {len(rows)} clips", scenes, rows, origins)


def _spread(scenes: np.ndarray) -> float:
    """The widest range of a feature."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.ptp(scenes, axis=0).max())


def make_map(clips: Clips, perplexity: float = PERPLEXITY) -> Map:
    """Lay out clips by t-SNE (scikit-learn's, from principal components, of a fixed seed).

    Args:
        clips: their scene embeddings.
        perplexity: how many neighbours count; lowered to a third of the clips where there are few.

    Raises:
        InputError: perplexity is not a number over 0.
        SystemConfigError: scikit-learn is missing.
    """
    if not 0 < perplexity < math.inf:
        raise InputError(f"--perplexity: expected a number over 0, found {perplexity}")
    perplexity = min(perplexity, (len(clips.rows) - 1) / 3)
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        raise SystemConfigError("expected scikit-learn: pip install 'gura-jax[plot]'") from None
    # Threads that wait for each other at every step take longer than one, where there is little to do.
    with threadpool_limits(1 if len(clips.rows) < MANY_CLIPS else None):
        # In one unit: of the squares of tiny numbers nothing is left, and scikit-learn's tree then crashes.
        scenes = clips.scenes / np.float32(_spread(clips.scenes))
        places = TSNE(perplexity=perplexity, init="pca", random_state=SEED).fit_transform(scenes)
    return Map(clips, places, perplexity)


def _join(rows: Sequence[dict[str, Any]], inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Add the columns of inputs to the rows of the same id."""
    more = {row["id"]: row for row in read_inputs(inputs).to_pylist()}
    for row in rows:
        for name, value in more.get(row["id"], {}).items():
            row.setdefault(name, value)


def columns(clips: Clips) -> list[str]:
    """What a map can be coloured by."""
    return [name for name in dict.fromkeys(key for row in clips.rows for key in row) if name not in _WHERE]


class Colors(NamedTuple):
    """What points are coloured by: a category each, or a number."""

    column: str
    names: Sequence[str]  # of the categories, or none
    values: np.ndarray  # [n]: index of the category, or the number; NaN: none


def color_by(clips: Clips, column: str) -> Colors:
    """The colours of clips by a column of their metadata.

    Raises:
        InputError: there is no such column, it is empty, or it has too many values to tell apart.
    """
    if column not in (known := columns(clips)):
        raise InputError(f"--color: expected one of the columns {', '.join(known)}, found {column!r}")
    values = [row.get(column) for row in clips.rows]
    values = [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in values if v is not None]
    if not numbers:
        raise InputError(f"--color: expected a column with values, found none in {column!r}")
    if all(numbers) and len(set(values) - {None}) > MAX_CATEGORIES:
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
            names = [str(label["label"]) if isinstance(label, dict) else str(label) for label in labels]
        except (ValueError, KeyError, RecursionError):  # not HEAR's
            return value
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

    The legend has the 30 most frequent categories at most; the others are coloured, but not named.

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

    # Names are no formulas, and the same map is the same file.
    settings: dict[Any, Any] = STYLE | {"text.parse_math": False, "svg.hashsalt": "gura_jax"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(8, 6.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        size = float(np.clip(4000 / len(found.places), 3, 26))
        style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.85}
        without = np.isnan(colors.values)
        axes.scatter(*found.places[without].T, color=NONE, **style)
        # In a random order, as the last lie on top.
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
        axes.set_title(f"t-SNE, perplexity {found.perplexity:g}", fontsize=9, loc="left")
        out = io.BytesIO()
        # SVG and PDF would hold the time of their making.
        plain: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
        figure.savefig(out, format=path.suffix[1:], metadata=plain)
    _write(path, out.getvalue())


def _plain(name: str) -> str:
    """A name as a legend takes it: one short line."""
    name = "".join(c if c.isprintable() else "\ufffd" for c in name)
    return name if len(name) <= 40 else f"{name[:39]}…"


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
        import matplotlib  # noqa: F401 - for the palette
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise SystemConfigError("expected plotly and matplotlib: pip install 'gura-jax[plot]'") from None
    audio, silent = _sounds(found.clips)
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
        "clips": [_described(row) for row in found.clips.rows],
        "audio": audio,
        "silent": silent,
    }
    playing = sum(sound is not None for sound in audio)
    grey = " (grey: none)" if rest and not colors.names else ""
    about = f"t-SNE, perplexity {found.perplexity:g}; coloured by {colors.column}{grey}; {playing} clips play"
    left_out = silent.count(_FULL)
    for count, why in ((len(audio) - playing - left_out, "cannot be read"), (left_out, "left out: the page is full")):
        about += f", {count} {why}" if count else ""
    parts = {
        "TITLE": html.escape(found.clips.title),
        "ABOUT": html.escape(about),
        # "<" never stands in the data, so that no name can end the script.
        "DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "PLOTLY": get_plotlyjs(),
    }
    # All at once, as a name may hold what stands for another part.
    content = re.sub(f"@({'|'.join(parts)})@", lambda match: parts[match[1]], _PAGE)
    _write(path, content.encode())
    return playing


def _described(row: Mapping[str, Any]) -> list[list[str]]:
    """What a page says of a clip: names and values, the id first."""
    names = ["id", *(name for name in row if name not in ("id", "path", "offset", *_WHERE))]
    return [[name, shown(row[name])] for name in names if row.get(name) is not None]


def _sounds(clips: Clips) -> tuple[list[str | None], list[str]]:
    """The start of each clip as MP3 in base64, or None, and why."""
    audio: list[str | None] = [None] * len(clips.rows)
    silent = [_FULL] * len(clips.rows)
    left = PAGE_AUDIO_BYTES
    for i in np.random.default_rng(SEED).permutation(len(clips.rows)).tolist():
        try:
            sound = _mp3(clips.rows[i], clips.folders[i])
        except AudioError as error:
            silent[i] = printable(str(error))
            continue
        left -= len(sound)
        if left < 0:
            break
        audio[i], silent[i] = sound, ""
    return audio, silent


def _mp3(row: Mapping[str, Any], folder: Path) -> str:
    import soundfile

    seconds = min(CLIP_SECONDS, row["num_samples"] / SAMPLE_RATE)
    path = _audio_file(Path(decoded(row["path"])), folder)
    samples = load_audio(path, row["offset"], seconds)
    out = io.BytesIO()
    try:
        soundfile.write(out, samples, SAMPLE_RATE, format="MP3")
    except soundfile_error() as error:
        raise AudioError(f"{path}: cannot be written as MP3: {error}") from None
    return base64.b64encode(out.getvalue()).decode()


def _audio_file(path: Path, folder: Path) -> Path:
    """Where a file is: a relative path is looked for here, then from the store's folder and from those above it."""
    for start in (Path(), folder, *folder.resolve().parents):
        if os.path.isfile(start / path):
            return start / path
    return path


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

const size = Math.max(3, Math.min(7, 220 / Math.sqrt(data.clips.length)));
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
    ? { size, opacity: 0.85, color: group.values, colorscale: "Viridis", showscale: true,
        colorbar: { title: { text: plain(group.name) }, thickness: 12, len: 0.6 } }
    : { size, opacity: 0.85, color: group.color },
}));
const axis = { visible: false, zeroline: false };
const layout = {
  margin: { l: 12, r: 12, t: 36, b: 8 },
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

// No other buttons: one would send the map to Plotly's servers.
const buttons = [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]];
const config = { responsive: true, scrollZoom: true, displaylogo: false, modeBarButtons: buttons };
Plotly.newPlot("map", traces, layout, config).then((map) => {
  map.on("plotly_click", (event) => play(event.points[0].customdata));
  document.body.dataset.ready = "true";
});
</script>
</body>
</html>
"""
