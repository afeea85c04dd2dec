"""Results of a search as one HTML page that plays the clips; without scripts, and without a network."""

import functools
import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gura_jax import files
from gura_jax.audio import resample
from gura_jax.dataset.columns import is_written
from gura_jax.dataset.preview import PREVIEW_RATE, clip_mp3, mp3
from gura_jax.dataset.sources import printable
from gura_jax.errors import AudioError, InputError
from gura_jax.objects import SCHEMES
from gura_jax.search.results import Hit, Result, clock

CLIP_SECONDS = 10.0  # of each clip
BEFORE_SECONDS = 2.0  # a frame, where its clip begins to play
AUDIO_BYTES = 48 << 20  # of a page's audio: browsers still open it quickly
SHOWN_VALUES = 6  # of a clip's metadata
_HIDDEN = {"id", "path", "offset", "duration"}
_STYLE = """
body { margin: 0 auto; max-width: 880px; padding: 16px 20px 40px; background: #fff; color: #1d2330;
       font: 14px/1.45 system-ui, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 17px; margin: 0; } h2 { font-size: 15px; margin: 0 0 6px; }
p { margin: 2px 0 12px; color: #6b7280; } section { margin: 22px 0; }
ol { list-style: none; margin: 10px 0 0; padding: 0; }
li { padding: 8px 0; border-top: 1px solid #e6e8ec; display: grid; gap: 4px 14px;
     grid-template-columns: minmax(0, 1fr) minmax(180px, 300px); align-items: center; }
li div { min-width: 0; } small { color: #6b7280; } b { font-variant-numeric: tabular-nums; margin-right: 8px; }
audio { width: 100%; height: 34px; } section > audio { max-width: 420px; }
@media (max-width: 560px) { li { grid-template-columns: minmax(0, 1fr); } }
"""


def check_page(path: Path) -> None:
    """Refuse, before anything is searched, a page that could not be written. Creates its folder.

    Raises:
        InputError: another suffix, a URL, or the path of a folder.
        StoreError: its folder cannot be created or written to.
    """
    if path.suffix != ".html" or path.parts[0].removesuffix(":") in SCHEMES:
        raise InputError(f"--out: expected a page on this machine, PAGE.html, found {path}")
    if files.is_folder(path):
        raise InputError(f"--out: expected a page, found a folder, {path}")
    files.open_folder(path.parent)


def write_page(results: Sequence[Result], title: str, about: str, folder: Path, sample_rate: int, path: Path) -> int:
    """Write results as a page: each query and its clips, which play.

    The page holds ten seconds of each sound as MP3, around the frame where one was found, until 48 MB are full.

    Args:
        results: to show.
        title, about: above them.
        folder: of the store, which relative paths may be relative to.
        sample_rate: of the queries' sounds, in Hz.
        path: of the page.

    Returns:
        How many sounds play.

    Raises:
        InputError: see :func:`check_page`.
        StoreError: the file cannot be written.
    """
    sounds = _Sounds()
    parts = []
    for result in results:
        player = sounds.player(functools.partial(_query_mp3, result, folder, sample_rate))
        hits = "\n".join(_hit(i + 1, hit, sounds, folder) for i, hit in enumerate(result.hits))
        parts.append(f"<section>\n<h2>{_text(result.name)}</h2>\n{player}\n<ol>\n{hits}\n</ol>\n</section>")
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # No script runs and nothing is fetched, whatever a clip is called.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; media-src data:; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n<p>{_text(about)}</p>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )
    check_page(path)
    files.write_file(path.parent, path.name, page.encode())
    return sounds.playing


def _query_mp3(result: Result, folder: Path, sample_rate: int) -> str | None:
    if result.sound is not None:
        sound = result.sound[: round(CLIP_SECONDS * sample_rate)]
        return mp3(resample(sound, sample_rate, PREVIEW_RATE), result.name)
    return None if result.meta is None else clip_mp3(result.meta, folder, CLIP_SECONDS)


def _hit(rank: int, hit: Hit, sounds: "_Sounds", folder: Path) -> str:
    start, when = 0.0, ""
    if hit.time is not None:
        latest = max(0.0, hit.meta["duration"] - CLIP_SECONDS)
        start = min(latest, max(0.0, hit.time / 1000 - BEFORE_SECONDS))
        when = f" at {clock(hit.time)}" + (f", plays from {clock(1000 * start)}" if start else "")
    player = sounds.player(lambda: clip_mp3(hit.meta, folder, CLIP_SECONDS, start))
    about = f"<div><b>{rank}</b> <b>{hit.similarity:.4f}</b> {_text(hit.meta['id'])}{when}"
    return f"<li>{about}<br><small>{_text(_described(hit.meta))}</small></div><div>{player}</div></li>"


def _described(row: Mapping[str, Any]) -> str:
    values = (
        f"{name}: {value}"
        for name, value in row.items()
        if not is_written(name) and name not in _HIDDEN and value is not None
    )
    return "; ".join([f"{row['duration']:.2f} s", *itertools.islice(values, SHOWN_VALUES)])


def _text(value: str) -> str:
    return html.escape(printable(value))


class _Sounds:
    """The players of a page, until it is full."""

    def __init__(self) -> None:
        self.left, self.playing = AUDIO_BYTES, 0

    def player(self, encode: Callable[[], str | None]) -> str:
        if self.left < 0:
            return "<small>no sound: the page is full</small>"
        try:
            sound = encode()
        except AudioError as error:
            return f"<small>no sound: {_text(str(error))}</small>"
        if sound is None:  # a vector
            return ""
        self.left -= len(sound)
        if self.left < 0:
            return "<small>no sound: the page is full</small>"
        self.playing += 1
        return f'<audio controls preload="none" src="data:audio/mpeg;base64,{sound}"></audio>'
