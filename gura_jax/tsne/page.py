"""A map as one HTML page that plays the clips: ``page.html``, filled in."""

import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gura_jax import files
from gura_jax.dataset.preview import clip_mp3
from gura_jax.dataset.sources import printable
from gura_jax.errors import AudioError, SystemConfigError
from gura_jax.tsne.clips import LOCATION, Clips, shown
from gura_jax.tsne.colors import NONE, Colors, palette
from gura_jax.tsne.layout import SEED, Map

PAGE = ".html"
TEMPLATE = "page.html"  # beside this file
CLIP_SECONDS = 10.0  # of each clip
AUDIO_BYTES = 48 << 20  # of a page's audio: browsers still open it quickly
_FULL = "the page is full"


def write_page(found: Map, colors: Colors, path: Path) -> int:
    """Write a map as one self-contained page: a point shows what its clip is, and a click plays it.

    The page holds the first ten seconds of each clip as MP3, in random order until 48 MB are full.

    Returns:
        The number of clips that play.

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
    content = _filled_in(
        {
            "TITLE": html.escape(found.clips.title),
            "ABOUT": html.escape(about),
            # Without "<" in the data no name can end the script.
            "DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
            "PLOTLY": get_plotlyjs(),
        }
    )
    files.open_folder(path.parent)
    files.write_file(path.parent, path.name, content.encode())
    return playing


def _filled_in(values: Mapping[str, str]) -> str:
    """Replace each ``@NAME@`` of the template, all in one pass, as a value may contain another placeholder."""
    template = (resources.files(__package__ or "gura_jax.tsne") / TEMPLATE).read_text(encoding="utf-8")
    return re.sub(f"@({'|'.join(values)})@", lambda match: values[match[1]], template)


def _described(row: Mapping[str, Any]) -> list[list[str]]:
    """List a clip's metadata for the page, as names and values, the id first."""
    names = ["id", *(name for name in row if name not in ("id", "path", "offset", *LOCATION))]
    return [[name, shown(row[name])] for name in names if row.get(name) is not None]


def _sounds(clips: Clips) -> tuple[list[str | None], list[str]]:
    """Encode the start of each clip as MP3 in base64; None, with the reason, where a clip does not play."""
    audio: list[str | None] = [None] * len(clips.rows)
    silent = [_FULL] * len(clips.rows)
    left = AUDIO_BYTES
    for i in np.random.default_rng(SEED).permutation(len(clips.rows)).tolist():
        try:
            sound = clip_mp3(clips.rows[i], clips.folders[i], CLIP_SECONDS)
        except AudioError as error:
            silent[i] = printable(str(error))
            continue
        left -= len(sound)
        if left < 0:
            break
        audio[i], silent[i] = sound, ""
    return audio, silent
