"""A map as one HTML page that plays the clips: ``page.html``, filled in, with ``page.css`` and ``page.js``."""

import base64
import gzip
import hashlib
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gura_jax import files
from gura_jax.dataset.preview import clip_mp3
from gura_jax.dataset.sources import printable
from gura_jax.errors import AudioError, SystemConfigError
from gura_jax.tsne.clips import Clips, shown
from gura_jax.tsne.colors import NONE, Colors, palette
from gura_jax.tsne.layout import SEED, Map
from gura_jax.tsne.neighbors import MAX_SEARCHED, Neighbors, find_neighbors

if TYPE_CHECKING:
    import pyarrow as pa

PAGE = ".html"
TEMPLATE, STYLE, SCRIPT = "page.html", "page.css", "page.js"  # beside this file
CLIP_SECONDS = 10.0  # of each clip
AUDIO_BYTES = 48 << 20  # of a page's audio: browsers still open it quickly
MAX_READ = 20_000  # clips read for their sound: a page is full with fewer, unless they are very short
NOT_SHOWN = ("id", "path", "offset")  # among a clip's metadata: the id is its name
PLACES = 65_535  # steps of the map's longer side: fine enough to zoom in 60 times, in two bytes
SCALE_STEPS = 255  # colours of a scale; one more byte value is for clips without a value
FULL = "the page is full"
UNREAD = f"only {MAX_READ:,} clips were read for their sound"


def write_page(found: Map, colors: Colors, path: Path) -> int:
    """Write a map as one self-contained page: a point shows what its clip is, and a click plays it.

    The page holds the first ten seconds of each clip as MP3, in random order until 48 MB are full; and of each clip
    the ten most similar, where there are at most :data:`~gura_jax.tsne.neighbors.MAX_SEARCHED`. It runs no script but
    its own and loads nothing, which its content security policy enforces.

    Returns:
        The number of clips that play.

    Raises:
        StoreError: the file cannot be written, or embeddings are not finite.
        SystemConfigError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401 - for the palette
    except ModuleNotFoundError:
        raise SystemConfigError("expected matplotlib: pip install 'gura-jax[plot]'") from None
    neighbors = find_neighbors(found.clips)
    audio, silent, others = _sounds(found.clips)
    data = {
        "count": len(found.places),
        "places": _packed(_steps(found.places), "<u2"),
        "color": _colored(colors),
        "columns": _columns(found.clips),
        "neighbors": _neighbors(neighbors),
        "silent": silent,
        "silentElse": others,
        "maxSearched": MAX_SEARCHED,
        "spectrum": palette(256, "magma"),
    }
    # The same map gives the same bytes: without the time.
    packed = gzip.compress(json.dumps(data, allow_nan=False).encode(), compresslevel=6, mtime=0)
    script, style = _beside(SCRIPT), _beside(STYLE)
    content = _filled_in(
        {
            "TITLE": html.escape(found.clips.title),
            "ABOUT": html.escape(_about(found, colors, len(audio), len(silent), others)),
            "POLICY": _policy(script, style),
            "DATA": base64.b64encode(packed).decode(),
            "AUDIO": json.dumps(audio),  # base64 and numbers: nothing that could end the element
            "STYLE": style,
            "SCRIPT": script,
        }
    )
    files.open_folder(path.parent)
    files.write_file(path.parent, path.name, content.encode())
    return len(audio)


def _about(found: Map, colors: Colors, playing: int, unreadable: int, others: str) -> str:
    """Say how the map was made, and what plays."""
    grey = " (grey: none)" if not colors.names and np.isnan(colors.values).any() else ""
    about = f"{found.method}; coloured by {colors.column}{grey}; {playing} clips play"
    left_out = len(found.places) - playing - unreadable
    for count, why in ((unreadable, "cannot be read"), (left_out, f"left out: {others}")):
        about += f", {count} {why}" if count else ""
    return about


def _beside(name: str) -> str:
    return (resources.files(__package__ or "gura_jax.tsne") / name).read_text(encoding="utf-8")


def _policy(script: str, style: str) -> str:
    """Allow this script and this style sheet, sounds within the page, and nothing else."""
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{digests[0]}'; style-src 'sha256-{digests[1]}'; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )


def _filled_in(values: dict[str, str]) -> str:
    """Replace each ``@NAME@`` of the template, all in one pass, as a value may contain another placeholder."""
    return re.sub(f"@({'|'.join(values)})@", lambda match: values[match[1]], _beside(TEMPLATE))


def _packed(array: np.ndarray, kind: str) -> str:
    """Encode an array's bytes in base64, as a number type of fixed size and byte order."""
    return base64.b64encode(np.ascontiguousarray(array, kind).tobytes()).decode()


def _steps(places: np.ndarray) -> np.ndarray:
    """Places [n, 2] as whole numbers from 0 to :data:`PLACES`, both directions to one scale, centred."""
    low, high = places.min(axis=0).astype(np.float64), places.max(axis=0).astype(np.float64)
    width = max(float((high - low).max()), np.finfo(np.float32).tiny)
    return np.round(((places - (low + high) / 2) / width + 0.5) * PLACES)


def _colored(colors: Colors) -> dict[str, Any]:
    """Pack a colour for each clip: the index of a category, or a step of a scale; after them, none."""
    without = np.isnan(colors.values)
    if colors.names:
        chosen, span, values = palette(len(colors.names)), None, colors.values
    else:
        chosen = palette(SCALE_STEPS, "viridis")
        span = [float(np.nanmin(colors.values)), float(np.nanmax(colors.values))]
        values = (colors.values - span[0]) / (span[1] - span[0]) * (SCALE_STEPS - 1)
    codes = np.where(without, len(chosen), np.round(values))
    return {
        "column": colors.column,
        "names": list(colors.names),
        "none": f"no {colors.column}" if without.any() else None,
        "range": span,
        "palette": [*chosen, NONE],
        "codes": _packed(codes, "u1"),
    }


def _columns(clips: Clips) -> list[dict[str, Any]]:
    """Pack the metadata, the id first: each column's different texts, and which of them a clip has."""
    names = ["id", *(name for name in clips.columns if name not in NOT_SHOWN)]
    packed = (_column(name, clips.table[name]) for name in names if name in clips.table.column_names)
    return [column for column in packed if column["values"]]


def _column(name: str, column: "pa.ChunkedArray") -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_nested(column.type):
        texts = [None if value is None else shown(value) for value in column.to_pylist()]
        column = pa.chunked_array([pa.array(texts, pa.string())])
    values: Any = column.unique().drop_null()
    count = len(values)
    found: dict[str, Any] = {"name": name, "values": [shown(value) for value in values.to_pylist()], "codes": None}
    if count < len(column):  # else each clip has a text of its own, in order
        codes = pc.fill_null(pc.index_in(column, value_set=values), count).to_numpy()  # pyright: ignore
        found["bytes"] = 1 if count < 1 << 8 else 2 if count < 1 << 16 else 4
        found["codes"] = _packed(codes, f"<u{found['bytes']}")
    return found


def _neighbors(neighbors: Neighbors | None) -> dict[str, Any] | None:
    if neighbors is None:
        return None
    similarity = _packed(neighbors.similarity, "<f4")
    return {"each": neighbors.rows.shape[1], "rows": _packed(neighbors.rows, "<i4"), "similarity": similarity}


def _sounds(clips: Clips) -> tuple[dict[int, str], dict[int, str], str]:
    """Encode the start of each clip as MP3 in base64; say why clips cannot be read, and why others were left out."""
    audio: dict[int, str] = {}
    silent: dict[int, str] = {}
    left = AUDIO_BYTES
    for i in np.random.default_rng(SEED).permutation(len(clips.table))[:MAX_READ].tolist():
        try:
            sound = clip_mp3(clips.row(i), clips.folders[int(clips.origins[i])], CLIP_SECONDS)
        except AudioError as error:
            silent[i] = printable(str(error))
            continue
        left -= len(sound)
        if left < 0:
            return audio, silent, FULL
        audio[i] = sound
    return audio, silent, UNREAD
