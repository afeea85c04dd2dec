"""gura_jax/tsne: maps of stored embeddings, as pictures, and as a page in a real browser."""

import base64
import gzip
import hashlib
import html
import json
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from matplotlib import image
from toy import embedded
from typer.testing import CliRunner

from gura_jax import Member, System, cli, load_model, plot, tsne
from gura_jax.dataset.run import open_run
from gura_jax.dataset.sources import read_inputs
from gura_jax.dataset.table import Settings
from gura_jax.dataset.workers import Worker, work
from gura_jax.errors import InputError, StoreError
from gura_jax.nearest import similarity
from gura_jax.tsne import layout
from gura_jax.tsne.clips import DATA_SET, shown, spread
from gura_jax.tsne.colors import NONE, palette
from gura_jax.tsne.layout import interpolate
from gura_jax.tsne.neighbors import find_neighbors

RATE = 16_000
CLIPS = 12
SECONDS = 0.5
HOSTILE = "<img src=x onerror=document.title='broken'></script><script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores of tones, ``high`` and ``low``, each with a manifest of a few columns."""
    home = tmp_path_factory.mktemp("maps")
    model = load_model(System("small", (Member("crepe-tiny"),)), weights="random")
    for name, base in (("low", 100), ("high", 1000)):
        lines = []
        (home / f"{name}-audio").mkdir()
        for i in range(CLIPS):
            t = np.arange(int(SECONDS * RATE)) / RATE
            path = home / f"{name}-audio" / f"{i}.wav"
            soundfile.write(path, 0.3 * np.sin(2 * np.pi * base * 1.1**i * t), RATE)
            clip = HOSTILE if (name, i) == ("low", 0) else f"{name} {i}"
            row = {
                "id": clip,
                "path": f"{name}-audio/{i}.wav",
                "hertz": base * 1.1**i,
                "kind": "even" if i % 2 == 0 else "odd",
            }
            lines.append(json.dumps(row | ({"rare": "yes"} if i == 3 else {})))
        (home / f"{name}.jsonl").write_text("\n".join(lines))
        run = open_run(model, read_inputs([home / f"{name}.jsonl"]), home / name, Settings())
        assert not work(run, Worker(0, 1, "a test")).failed
    return home


class Rows:
    """Scenes in memory."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.size = rows, rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.rows[start:stop]

    def describe(self, row: int) -> str:
        return f"row {row}"


def clips_of(scenes: np.ndarray, rows: Sequence[Mapping[str, Any]] | None = None) -> tsne.Clips:
    """Clips that no store has."""
    rows = rows or [{"id": f"clip {i}"} for i in range(len(scenes))]
    table = pa.Table.from_pylist(
        [{DATA_SET: "made", "path": "missing.wav", "offset": 0.0, "duration": 1.0, **row} for row in rows]
    )
    return tsne.Clips("made", Rows(scenes), table, [Path()], np.zeros(len(rows), int))


def rows_of(clips: tsne.Clips) -> list[dict[str, Any]]:
    return clips.table.to_pylist()


def with_rows(clips: tsne.Clips, rows: Sequence[Mapping[str, Any]]) -> tsne.Clips:
    names = dict.fromkeys(name for row in rows for name in row)
    return clips._replace(table=pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]))


def plotted(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["plot", *map(str, arguments)], catch_exceptions=False)


def test_pictures(folder: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"map{suffix}" for suffix in tsne.PICTURES]
    options = [part for path in outs for part in ("--out", path)]
    result = plotted(folder / "low", folder / "high", *options)
    assert result.exit_code == 0, result.output
    assert "perplexity 7.66667, as there are 24 clips" in result.stderr
    picture = image.imread(outs[0])
    assert min(picture.shape[:2]) > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20
    svg = outs[1].read_text()
    assert "<svg" in svg
    assert outs[2].read_bytes().startswith(b"%PDF")
    first = {path: path.read_bytes() for path in outs}
    assert plotted(folder / "low", folder / "high", *options).exit_code == 0
    assert {path: path.read_bytes() for path in outs} == first


def shapes(svg: Path) -> str:
    """The content of an SVG, with its entities resolved."""
    return html.unescape(svg.read_text())


def test_a_legend_shows_names_as_they_are(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plot.STYLE, "svg.fonttype", "none")
    clips = tsne.read_clips([folder / "low", folder / "high"])
    names = ["$\\frac{$", "_hidden", "@PLOTLY@", "two\nlines", "x" * 50, None]
    rows = [{**row, "name": names[i % 6], "number": i} for i, row in enumerate(rows_of(clips))]
    found = tsne.make_map(with_rows(clips, rows))
    colors = tsne.color_by(found.clips, "name")
    tsne.draw(found, colors, tmp_path / "names.svg")
    svg = shapes(tmp_path / "names.svg")
    for name in ("$\\frac{$", "_hidden", "@PLOTLY@", "two\ufffdlines", f"{'x' * 39}…", "no name"):
        assert f">{name}<" in svg
    for color in (*palette(5), NONE):
        assert color in svg
    assert tsne.write_page(found, colors, tmp_path / "names.html") == 2 * CLIPS
    color = data_of((tmp_path / "names.html").read_text())["color"]
    assert (color["names"], color["none"]) == (colors.names, "no name")
    monkeypatch.setattr("gura_jax.tsne.picture.LEGEND_NAMES", 3)
    tsne.draw(found, tsne.color_by(found.clips, "number"), tmp_path / "few.svg")
    assert f">and {2 * CLIPS - 3} more<" in shapes(tmp_path / "few.svg")
    assert "<image" not in shapes(tmp_path / "few.svg")
    monkeypatch.setattr("gura_jax.tsne.picture.MAX_VECTORS", 10)
    tsne.draw(found, tsne.color_by(found.clips, "number"), tmp_path / "pixels.svg")
    assert "<image" in shapes(tmp_path / "pixels.svg")


def test_a_scale(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plot.STYLE, "svg.fonttype", "none")
    monkeypatch.setattr("gura_jax.tsne.colors.MAX_NUMBERS", 10)
    clips = tsne.read_clips([folder / "low", folder / "high"])
    odd = {0: math.nan, 1: math.inf, 2: None}
    rows = [{**row, "n": odd.get(i, i / 2)} for i, row in enumerate(rows_of(clips))]
    found = tsne.make_map(with_rows(clips, rows))
    colors = tsne.color_by(found.clips, "n")
    assert colors.names == ()
    assert np.flatnonzero(np.isnan(colors.values)).tolist() == [0, 1, 2]
    tsne.draw(found, colors, tmp_path / "scale.svg")
    svg = shapes(tmp_path / "scale.svg")
    assert ">n<" in svg
    assert ">no n<" in svg
    tsne.write_page(found, colors, tmp_path / "scale.html")
    page = (tmp_path / "scale.html").read_text()
    color = data_of(page)["color"]
    assert (color["range"], color["none"]) == ([1.5, CLIPS - 0.5], "no n")
    codes = np.frombuffer(base64.b64decode(color["codes"]), np.uint8)
    assert codes[:3].tolist() == [255, 255, 255]
    assert (codes[3], codes[-1]) == (0, 254)
    assert (np.diff(codes[3:].astype(int)) > 0).all()
    assert len(color["palette"]) == 256
    assert "coloured by n (grey: none)" in page


def test_data_sets(folder: Path, tmp_path: Path) -> None:
    assert {row["data set"] for row in rows_of(tsne.read_clips([folder / "low"]))} == {"low"}
    shutil.copytree(folder / "low", tmp_path / "other" / "low")
    folders = [folder / "low", tmp_path / "other" / "low"]  # of one name
    assert {row["data set"] for row in rows_of(tsne.read_clips(folders))} == set(map(str, folders))
    rows = [{"id": str(i), "path": f"low-audio/{i}.wav", "task": f"task {i % 2}"} for i in range(6)]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    embedded([folder / "tasks.jsonl"], tmp_path / "tasks")
    clips = tsne.read_clips([tmp_path / "tasks"])
    assert tsne.color_by(clips, "data set").names == ["task 0", "task 1"]


def test_what_is_alike_lies_together(folder: Path) -> None:
    clips = tsne.read_clips([folder / "low", folder / "high"])
    found = tsne.make_map(clips)
    low = np.array([row["data set"] == "low" for row in rows_of(clips)])
    assert (low.sum(), len(low)) == (CLIPS, 2 * CLIPS)
    order = {row["id"]: place for row, place in zip(rows_of(clips), found.places, strict=True)}
    near = np.linalg.norm(order["high 5"] - order["high 6"])
    far = np.linalg.norm(order["high 5"] - order["low 5"])
    assert near < far
    again = tsne.make_map(tsne.read_clips([folder / "low", folder / "high"]))
    np.testing.assert_array_equal(found.places, again.places)
    assert clips.title == "small (random weights: crepe-tiny): 24 clips"
    # Unscaled, numbers this small crash scikit-learn.
    tiny = tsne.make_map(clips._replace(scenes=Rows(clips.scenes.read(0, 2 * CLIPS) * np.float32(1e-30)))).places
    assert np.isfinite(tiny).all()


def test_colors(folder: Path) -> None:
    found = tsne.read_clips([folder / "low", folder / "high"])
    by_set = tsne.color_by(found, "data set")
    assert by_set.names == ["high", "low"]
    assert sorted(by_set.values) == [0] * CLIPS + [1] * CLIPS
    rare = tsne.color_by(found, "rare")
    assert rare.names == ["yes"]
    assert np.isnan(rare.values).sum() == 2 * CLIPS - 2
    assert len(tsne.color_by(found, "hertz").names) == 2 * CLIPS  # few numbers are categories
    many = with_rows(found, [{"hertz": float(i)} for i in range(60)])
    assert tsne.color_by(many, "hertz").names == ()
    assert len(set(palette(20))) == 20
    assert len(set(palette(70))) == 70
    with pytest.raises(InputError, match=r"expected one of the columns data set, id, path, .*found 'pitch'"):
        tsne.color_by(found, "pitch")
    texts = with_rows(found, [{"name": f"clip {i}"} for i in range(300)])
    with pytest.raises(InputError, match="at most 200 different values, found 300"):
        tsne.color_by(texts, "name")
    for nothing in (None, math.nan):
        with pytest.raises(InputError, match="expected a column with values, found none in 'name'"):
            tsne.color_by(with_rows(found, [{"name": nothing}] * 9), "name")


def test_labels_of_hear_tasks() -> None:
    assert shown('["a", "b"]') == "a, b"
    assert shown('[{"label": "kick", "start": 1, "end": 2}, {"label": "kick", "start": 3, "end": 4}]') == "kick"
    for other in ("[no JSON", '[{"name": "kick"}]', "[" * 100_000):
        assert shown(other) == other
    assert shown([1, 2]) == "1, 2"


def test_columns_of_the_inputs(folder: Path) -> None:
    """Inputs that have gained columns since the store was written."""
    more = [{"id": f"low {i}", "path": f"low-audio/{i}.wav", "label": f"l{i % 3}", "kind": "?"} for i in range(1, 8)]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, more)))
    found = tsne.read_clips([folder / "low"], inputs=[folder / "more.jsonl"])
    colors = tsne.color_by(found, "label")
    assert colors.names == ["l0", "l1", "l2"]
    assert np.isnan(colors.values).sum() == CLIPS - 7
    assert tsne.color_by(found, "kind").names == ["even", "odd"]  # the store's own stay


def test_what_cannot_be_plotted(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--out: expected \.png, \.svg, \.pdf or \.html, found map\.gif"):
        plotted(folder / "low", "--out", "map.gif")
    with pytest.raises(StoreError, match=r"found none"):
        plotted(tmp_path, "--out", tmp_path / "a.png")
    with pytest.raises(InputError, match="perplexity: expected a number over 0"):
        plotted(folder / "low", "--out", tmp_path / "a.png", "--perplexity", "0")
    embedded(folder / "low-audio", tmp_path / "other")
    with pytest.raises(StoreError, match=r"one embedding size, found 256 in .* and 3 in"):
        plotted(folder / "low", tmp_path / "other", "--out", tmp_path / "a.png")
    embedded(folder / "low-audio" / "1.wav", tmp_path / "one")
    with pytest.raises(InputError, match="at least 5 clips to lay out, found 1"):
        plotted(tmp_path / "one", "--out", tmp_path / "a.png")
    silence = tmp_path / "silence"
    silence.mkdir()
    for i in range(6):
        soundfile.write(silence / f"{i}.wav", np.zeros(8000), RATE)
    embedded(silence, tmp_path / "same")
    with pytest.raises(StoreError, match=r"embeddings that are finite and differ, found all the same in same"):
        plotted(tmp_path / "same", "--out", tmp_path / "a.png")
    (scenes,) = (tmp_path / "same").glob("scene-*.npy")
    np.save(scenes, np.full_like(np.load(scenes), np.nan))
    with pytest.raises(StoreError, match=r"embeddings that are finite and differ, found NaN or infinity in same"):
        plotted(tmp_path / "same", "--out", tmp_path / "a.png")
    assert not list(tmp_path.glob("a.*"))


def test_wrong_columns_are_refused_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsne, "make_map", lambda *_: pytest.fail("laid out"))
    with pytest.raises(InputError, match="expected one of the columns"):
        plotted(folder / "low", "--out", folder / "a.png", "--color", "pitch")


def test_relative_paths(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips embedded by relative paths in one folder, and drawn from another, are found from the store."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "low-audio", "clips")
    embedded("clips", Path("deep", "store"))
    monkeypatch.chdir("/")
    found = tsne.make_map(tsne.read_clips([tmp_path / "deep" / "store"]))
    assert {row["path"] for row in rows_of(found.clips)} == {f"clips/{i}.wav" for i in range(CLIPS)}
    colors = tsne.color_by(found.clips, "data set")
    assert tsne.write_page(found, colors, tmp_path / "page.html") == CLIPS
    (tmp_path / "clips" / "3.wav").unlink()
    (tmp_path / "clips" / "4.wav").write_text("no audio")
    assert tsne.write_page(found, colors, tmp_path / "page.html") == CLIPS - 2
    page = (tmp_path / "page.html").read_text()
    assert f"{CLIPS - 2} clips play, 2 cannot be read<" in page
    silent = data_of(page)["silent"].values()
    assert sorted("no such file" in why for why in silent) == [False, True]


def element_of(page: str, name: str) -> str:
    return re.findall(rf'id="{name}">(.*?)</script>', page, re.DOTALL)[0]


def data_of(page: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(element_of(page, "data"))))


def columns_of(data: Any) -> dict[str, list[str | None]]:
    """The texts of each column, of each clip, as the page reads them."""
    found = {}
    for column in data["columns"]:
        codes = range(data["count"])
        if column["codes"] is not None:
            codes = np.frombuffer(base64.b64decode(column["codes"]), f"<u{column['bytes']}").tolist()
        found[column["name"]] = [dict(enumerate(column["values"])).get(code) for code in codes]
    return found


def test_a_page_has_all_that_it_needs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    result = plotted(folder / "low", "--out", path, "--color", "kind")
    assert f"{CLIPS} clips, {CLIPS} of them play" in result.stdout
    page = path.read_text()
    data = data_of(page)
    clips = tsne.read_clips([folder / "low"])
    rows = rows_of(clips)
    assert (data["count"], data["color"]["names"]) == (CLIPS, ["even", "odd"])
    codes = np.frombuffer(base64.b64decode(data["color"]["codes"]), np.uint8)
    assert [data["color"]["names"][code] for code in codes] == [row["kind"] for row in rows]
    columns = columns_of(data)
    for name in ("id", "kind", "rare", "hertz", "data set"):
        assert columns[name] == [None if row[name] is None else str(row[name]) for row in rows]
    assert {"path", "shard", "row", "problem"} & set(columns) == set()
    assert HOSTILE in columns["id"]
    assert HOSTILE not in page
    assert "small (random weights: crepe-tiny): 12 clips" in page
    assert re.findall(r"""(?:src|href)=["'](?!data:)[^"']+""", page) == []
    # The policy allows the script and the style that the page has, and nothing to load.
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="(.*?)"', page)[0])
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert not any(word in policy for word in ("http", "unsafe", "self", "*"))
    first = path.read_bytes()
    assert plotted(folder / "low", "--out", path, "--color", "kind").exit_code == 0
    assert path.read_bytes() == first
    monkeypatch.setattr("gura_jax.tsne.page.AUDIO_BYTES", 12_000)
    found = tsne.make_map(clips)
    plays = tsne.write_page(found, tsne.color_by(clips, "kind"), path)
    assert 0 < plays < CLIPS
    audio = json.loads(element_of(path.read_text(), "audio"))
    assert len(audio) == plays
    assert sum(map(len, audio.values())) <= 12_000
    assert f"{plays} clips play, {CLIPS - plays} left out: the page is full<" in path.read_text()


def test_neighbors_are_those_of_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scenes = rng.normal(size=(60, 8)).astype(np.float32)
    scenes[7] = 0
    scenes[20:35] = scenes[20]  # more equal ones than are asked for
    clips = clips_of(scenes)
    monkeypatch.setattr("gura_jax.tsne.clips.BLOCK_BYTES", 25 * 8 * 4)
    found = find_neighbors(clips)
    assert found is not None
    assert found.rows.shape == (60, 10)
    for i in range(60):
        if i == 7:
            assert (found.rows[i] == -1).all()
            continue
        assert i not in found.rows[i]
        assert len(set(found.rows[i])) == 10
        exact = similarity(scenes, scenes[i])
        exact[i] = -2
        np.testing.assert_allclose(found.similarity[i], np.sort(exact)[::-1][:10], atol=1e-6)
        np.testing.assert_allclose(exact[found.rows[i]], found.similarity[i], atol=1e-6)
    monkeypatch.setattr("gura_jax.tsne.neighbors.MAX_SEARCHED", 59)
    assert find_neighbors(clips) is None


def test_many_clips_are_placed_by_landmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four clusters of 60 dimensions: clips that t-SNE has not seen lie in their own."""
    rng = np.random.default_rng(0)
    kinds = np.arange(800) % 4
    scenes = (rng.normal(size=(4, 60))[kinds] + 0.3 * rng.normal(size=(800, 60))).astype(np.float32)
    monkeypatch.setattr(layout, "LANDMARKS", 200)
    monkeypatch.setattr("gura_jax.tsne.clips.BLOCK_BYTES", 300 * 60 * 4)
    found = tsne.make_map(clips_of(scenes), perplexity=20)
    assert found.landmarks == 200
    assert found.method.startswith("t-SNE of 200 random clips, perplexity 20; the others placed by their 3 nearest")
    centers = np.stack([found.places[kinds == kind].mean(0) for kind in range(4)])
    nearest = np.linalg.norm(found.places[:, None] - centers, axis=2).argmin(1)
    assert (nearest == kinds).all()
    assert len(np.unique(found.places, axis=0)) == 800
    np.testing.assert_array_equal(tsne.make_map(clips_of(scenes), perplexity=20).places, found.places)
    tsne.write_page(found, tsne.color_by(found.clips, DATA_SET), tmp_path / "many.html")
    assert "t-SNE of 200 random clips" in (tmp_path / "many.html").read_text()


def test_interpolation_does_not_mix_clusters() -> None:
    landmarks = np.array([[0, 0], [1, 0], [0, 1], [100, 100]], np.float32)
    places = np.array([[0, 0], [1, 0], [90, 90], [80, 80]], np.float32)
    found = interpolate(np.array([[0, 0], [0.4, 0.05]], np.float32), landmarks, places)
    np.testing.assert_allclose(found[0], places[0], atol=1e-3)
    assert (found[1] < 1.5).all()  # not between the two near ones and the third, far away on the map


def test_columns_of_stores_that_differ_in_type(folder: Path, tmp_path: Path) -> None:
    for name, values in (("a", [1, 2, 3]), ("b", ["x", "y", "z"])):
        lines = [{"id": f"{name}{i}", "path": f"low-audio/{i}.wav", "mixed": value} for i, value in enumerate(values)]
        (folder / f"mixed-{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        embedded([folder / f"mixed-{name}.jsonl"], tmp_path / name)
    clips = tsne.read_clips([tmp_path / "a", tmp_path / "b"])
    assert [row["mixed"] for row in rows_of(clips)] == ["1", "2", "3", "x", "y", "z"]
    assert [clips.scenes.describe(row).split()[-1] for row in (0, 2, 3, 5)] == ["'a0'", "'a2'", "'b0'", "'b2'"]
    np.testing.assert_array_equal(clips.scenes.read(2, 5), clips.scenes.read(0, 6)[2:5])
    assert spread(clips.scenes) > 0


# In a browser

PHONE = {"width": 390, "height": 844, "pixelRatio": 2.0, "touch": True}


@pytest.fixture
def browser(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Headless Chromium without a network; with the screen given as parameter, or a desktop's."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver: make test-page")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "enable-unsafe-swiftshader",  # WebGL without a GPU
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1200,900",
        "proxy-server=127.0.0.1:9",  # nothing answers there
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{flag}")
    if screen := getattr(request, "param", None):
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": screen})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


def until(condition: Any, seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return found


class Page:
    """A page in a browser, as a person uses it."""

    def __init__(self, browser: Any, found: tsne.Map, path: Path) -> None:
        self.browser, self.rows = browser, rows_of(found.clips)
        self.ids = [row["id"] for row in self.rows]
        browser.get(path.as_uri())
        until(lambda: self.run("return document.body.dataset.ready"))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def find(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def text(self, name: str) -> str:
        return self.run("return document.getElementById(arguments[0]).innerText", name)

    def listed(self, name: str) -> list[str]:
        return self.run(f"return [...document.querySelectorAll('#{name} li span')].map((item) => item.textContent)")

    def click(self, row: int, pointer: str = "mouse") -> None:
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        box = self.run("const b = canvas.getBoundingClientRect(); return [b.left, b.top]")
        x, y = (round(a + b) for a, b in zip(box, self.run("return toScreen(arguments[0])", row), strict=True))
        actions = ActionBuilder(self.browser, mouse=PointerInput(pointer, "a pointer"))
        if pointer == "mouse":
            actions.pointer_action.move_to_location(x + 40, y)
        actions.pointer_action.move_to_location(x, y).pause(0.2).pointer_down().pointer_up()
        actions.perform()

    def search(self, text: str, key: str = "") -> str:
        from selenium.webdriver.common.keys import Keys

        (field,) = self.find("#query")
        field.send_keys(Keys.CONTROL + "a" + Keys.DELETE)
        field.send_keys(text)
        until(lambda: bool(self.text("count")) == bool(text))
        time.sleep(0.3)  # longer than it waits for more keys
        field.send_keys(key)
        return self.text("count")

    def pixel(self, row: int) -> str:
        """The colour of the map where a row's point is."""
        red, green, blue = self.run(
            """drawNow();
            const copy = document.createElement("canvas"), context = copy.getContext("2d");
            [copy.width, copy.height] = [canvas.width, canvas.height];
            context.drawImage(canvas, 0, 0);
            const [x, y] = toScreen(arguments[0]).map((at) => Math.round(at * devicePixelRatio));
            return [...context.getImageData(x, y, 1, 1).data.slice(0, 3)];""",
            row,
        )
        return f"#{red:02x}{green:02x}{blue:02x}"

    def spectrogram(self) -> np.ndarray:
        """Colours of the spectrogram, [bands, frames, 3]."""
        until(lambda: self.run("return !document.getElementById('sound').hidden"))
        width, height, values = self.run(
            """const c = document.getElementById("spectrogram");
            const image = c.getContext("2d").getImageData(0, 0, c.width, c.height);
            return [c.width, c.height, [...image.data]];"""
        )
        return np.array(values).reshape(height, width, 4)[..., :3]

    def errors(self) -> list[Any]:
        return [entry for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def paged(folder: Path, tmp_path: Path) -> tuple[tsne.Map, Path]:
    """A map of one store, with one file missing, and clips 2 and 3 at one place."""
    found = tsne.make_map(tsne.read_clips([folder / "low"]))
    found.places[3] = found.places[2]
    (folder / "low-audio" / "7.wav").rename(tmp_path / "away.wav")
    try:
        assert tsne.write_page(found, tsne.color_by(found.clips, "kind"), tmp_path / "page.html") == CLIPS - 1
    finally:
        (tmp_path / "away.wav").rename(folder / "low-audio" / "7.wav")
    return found, tmp_path / "page.html"


@pytest.mark.page
def test_the_page_in_a_browser(paged: tuple[tsne.Map, Path], browser: Any) -> None:
    """It loads without errors, shows every point, and a click on one plays its clip."""
    found, path = paged
    page = Page(browser, found, path)
    assert browser.title == found.clips.title
    assert page.listed("legend") == ["even", "odd"]
    # Each point has its kind's colour, mixed with white.
    mixed = {
        kind: {page.pixel(i) for i, row in enumerate(page.rows) if row["kind"] == kind} for kind in ("even", "odd")
    }
    assert len(mixed["even"] | mixed["odd"]) <= 4  # two colours; and both where two clips share a place
    assert "#ffffff" not in mixed["even"] | mixed["odd"]
    assert not mixed["even"] >= mixed["odd"]
    page.run("window.played = []; player.addEventListener('playing', () => played.push(player.duration))")
    for name in ("low 4", HOSTILE):
        page.click(page.ids.index(name))
        until(lambda: page.run("return played.length"))
        until(lambda name=name: name[:60] in page.text("tip"))
        until(lambda name=name: page.text("now") in (f"Playing: {name}", f"Played: {name}"))
        (duration,) = page.run("return played.splice(0)")
        assert duration == pytest.approx(SECONDS, abs=0.15)  # MP3 fills its last frames up
        until(lambda: page.run("return player.currentTime") > 0)
        until(lambda name=name: page.text("now") == f"Played: {name}")
    assert "hertz" in page.text("clip")
    # A second click stops.
    page.run("player.loop = true")
    five = page.ids.index("low 5")
    page.click(five)
    until(lambda: page.text("now") == "Playing: low 5")
    page.click(five)
    until(lambda: page.text("now") == "Stopped: low 5")
    assert page.run("return player.paused")
    page.run("player.loop = false")
    page.click(page.ids.index("low 7"))
    until(lambda: page.text("now").startswith("No sound of low 7: "))
    assert page.run("return document.getElementById('sound').hidden")
    # What is under another is listed, and can be chosen.
    page.click(2)
    until(lambda: page.listed("here"))
    assert {name.removesuffix(" \u266a") for name in page.listed("here")} == {page.ids[2], page.ids[3]}
    assert "2 clips at this place" in page.text("here")
    page.find("#here li button")[1].click()
    until(lambda: page.ids[3] in page.text("now"))
    # The map is moved by wheel and mouse.
    before = page.run("return toScreen(4)")
    page.run("zoom(2)")
    assert page.run("return toScreen(4)") != before
    page.find("#reset")[0].click()
    assert page.run("return toScreen(4)") == before
    # A colour is hidden by its name, and with it its points.
    page.find("#legend li button")[0].click()
    assert page.run("return visible.length") == CLIPS // 2
    even = next(i for i, row in enumerate(page.rows) if row["kind"] == "even" and i not in (2, 3))
    assert page.run("return under(...toScreen(arguments[0]), 0)", even) != even
    # The map is saved as it is drawn.
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(path.parent)})
    page.find("#save")[0].click()
    until((path.parent / "map.png").exists)
    saved = image.imread(path.parent / "map.png")
    assert saved.shape[:2] == tuple(page.run("return [canvas.height, canvas.width]"))
    assert len(np.unique(saved.reshape(-1, saved.shape[-1]), axis=0)) > 10
    assert browser.title == found.clips.title  # no name was taken for a script
    assert page.errors() == []


@pytest.mark.page
def test_neighbors_and_spectrogram_in_a_browser(paged: tuple[tsne.Map, Path], browser: Any) -> None:
    found, path = paged
    page = Page(browser, found, path)
    scenes = found.clips.scenes.read(0, CLIPS)
    one = page.ids.index("low 11")
    page.click(one)
    expected = similarity(scenes, scenes[one])
    expected[one] = -2
    assert [name.removesuffix(" \u266a") for name in page.listed("near")] == [
        page.ids[i] for i in np.argsort(-expected, kind="stable")[:10]
    ]
    # A tone is a line at its pitch, brighter than all else; 80 bands of mel up to 8 kHz.
    bands = page.spectrogram().sum(axis=2)
    assert bands.shape[0] == 80
    assert bands.shape[1] == pytest.approx(SECONDS * 100, abs=10)
    band = 79 - int(bands.mean(axis=1).argmax())
    hertz = 700 * (10 ** ((band + 1) * np.log10(1 + 8000 / 700) / 81) - 1)
    assert hertz == pytest.approx(100 * 1.1**11, abs=40)
    page.find("#near li button")[0].click()
    nearest = page.ids[int(expected.argmax())]
    until(lambda: nearest in page.text("now"))
    assert page.errors() == []


@pytest.mark.page
def test_search_in_a_browser(paged: tuple[tsne.Map, Path], browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    found, path = paged
    page = Page(browser, found, path)
    assert page.search("LOW 1") == f"3 of {CLIPS} clips match"  # 1, 10, 11; in any case
    wanted = [name for name in page.ids if name.startswith("low 1")]
    assert [page.ids[i] for i in page.run("return [...marked]")] == wanted
    for i in (0, 1, 2, 0):  # Enter goes round
        page.find("#query")[0].send_keys(Keys.ENTER)
        until(lambda i=i: wanted[i] in page.text("now"))
        assert page.text("count") == f"3 of {CLIPS} clips match; chosen: {i + 1}"
    assert page.search("odd") == f"{CLIPS // 2} of {CLIPS} clips match"  # a column
    assert page.search("(.*") == f"0 of {CLIPS} clips match"  # not a pattern
    assert page.search("<IMG SRC") == f"1 of {CLIPS} clips match"
    assert page.search("") == ""
    assert page.run("return matches") is None
    assert page.errors() == []


@pytest.mark.page
@pytest.mark.parametrize("browser", [PHONE], indirect=True)
def test_the_page_on_a_phone(paged: tuple[tsne.Map, Path], browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    found, path = paged
    page = Page(browser, found, path)
    assert page.run("return [innerWidth, innerHeight]") == [390, 844]
    assert page.run("return document.documentElement.scrollWidth") == 390
    box = "const b = document.getElementById(arguments[0]).getBoundingClientRect(); return [b.width, b.height, b.top]"
    width, height, _ = page.run(box, "map")
    assert width == 390
    assert height > 400
    assert not page.run("return document.getElementById('legend').open")
    for name in ("query", "next", "in", "out", "reset"):  # large enough for a thumb, in the lower half
        _, height, top = page.run(box, name)
        assert height >= 44
        assert top > 400
    four = page.ids.index("low 4")
    page.click(four, "touch")
    until(lambda: page.text("now") in ("Playing: low 4", "Played: low 4"))
    assert len(page.listed("near")) == 10
    assert page.spectrogram().std() > 10
    assert page.search("low 9", Keys.ENTER).startswith(f"1 of {CLIPS}")
    until(lambda: "low 9" in page.text("now"))
    # Two fingers zoom.
    before = page.run("return view.zoom")
    for kind, places in (("Start", (150, 200)), ("Move", (120, 230)), ("Move", (90, 260)), ("End", ())):
        touches = [{"x": x, "y": 250, "id": i} for i, x in enumerate(places)]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": touches})
    assert page.run("return view.zoom") / before == pytest.approx(170 / 50, rel=0.05)
    assert page.errors() == []


@pytest.mark.page
def test_the_page_without_webgl(paged: tuple[tsne.Map, Path], browser: Any) -> None:
    script = """{ const get = HTMLCanvasElement.prototype.getContext;
    HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
      return kind === "webgl2" ? null : get.call(this, kind, ...rest);
    }; }"""
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    found, path = paged
    page = Page(browser, found, path)
    assert "#ffffff" not in {page.pixel(i) for i in range(CLIPS)}
    page.click(4)
    until(lambda: page.ids[4] in page.text("now"))
    assert page.errors() == []


@pytest.mark.page
def test_neighbors_on_the_map(folder: Path, tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many clips to compare embeddings; and too many to read their sounds."""
    monkeypatch.setattr("gura_jax.tsne.neighbors.MAX_SEARCHED", 20)
    monkeypatch.setattr("gura_jax.tsne.page.MAX_READ", 6)
    found = tsne.make_map(tsne.read_clips([folder / "low", folder / "high"]))
    assert tsne.write_page(found, tsne.color_by(found.clips, "data set"), tmp_path / "page.html") == 6
    page = Page(browser, found, tmp_path / "page.html")
    assert f"6 clips play, {2 * CLIPS - 6} left out: only " in page.find("header")[0].text
    page.click(5)
    until(lambda: page.listed("near"))
    far = np.linalg.norm(found.places - found.places[5], axis=1)
    nearest = [page.ids[i] for i in np.argsort(far)[1:11]]
    assert [name.removesuffix(" \u266a") for name in page.listed("near")] == nearest
    assert "Nearest in the map" in page.text("near")
    assert page.errors() == []
