"""gura_jax/tsne: maps of stored embeddings, as pictures, and as a page in a real browser."""

import html
import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
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
from gura_jax.tsne.clips import shown
from gura_jax.tsne.colors import NONE, palette

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
    rows = [{**row, "name": names[i % 6], "number": i} for i, row in enumerate(clips.rows)]
    found = tsne.make_map(clips._replace(rows=rows))
    colors = tsne.color_by(found.clips, "name")
    tsne.draw(found, colors, tmp_path / "names.svg")
    svg = shapes(tmp_path / "names.svg")
    for name in ("$\\frac{$", "_hidden", "@PLOTLY@", "two\ufffdlines", f"{'x' * 39}…", "no name"):
        assert f">{name}<" in svg
    for color in (*palette(5), NONE):
        assert color in svg
    assert tsne.write_page(found, colors, tmp_path / "names.html") == 2 * CLIPS
    groups = data_of((tmp_path / "names.html").read_text())["groups"]
    assert [group["name"] for group in groups] == [*colors.names, "no name"]
    monkeypatch.setattr("gura_jax.tsne.picture.LEGEND_NAMES", 3)
    tsne.draw(found, tsne.color_by(found.clips, "number"), tmp_path / "few.svg")
    assert f">and {2 * CLIPS - 3} more<" in shapes(tmp_path / "few.svg")


def test_a_scale(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plot.STYLE, "svg.fonttype", "none")
    monkeypatch.setattr("gura_jax.tsne.colors.MAX_NUMBERS", 10)
    clips = tsne.read_clips([folder / "low", folder / "high"])
    odd = {0: math.nan, 1: math.inf, 2: None}
    found = tsne.make_map(clips._replace(rows=[{**row, "n": odd.get(i, i / 2)} for i, row in enumerate(clips.rows)]))
    colors = tsne.color_by(found.clips, "n")
    assert colors.names == ()
    assert np.flatnonzero(np.isnan(colors.values)).tolist() == [0, 1, 2]
    tsne.draw(found, colors, tmp_path / "scale.svg")
    svg = shapes(tmp_path / "scale.svg")
    assert ">n<" in svg
    assert ">no n<" in svg
    tsne.write_page(found, colors, tmp_path / "scale.html")
    page = (tmp_path / "scale.html").read_text()
    assert [len(group["rows"]) for group in data_of(page)["groups"]] == [2 * CLIPS - 3, 3]
    assert "coloured by n (grey: none)" in page


def test_data_sets(folder: Path, tmp_path: Path) -> None:
    assert {row["data set"] for row in tsne.read_clips([folder / "low"]).rows} == {"low"}
    shutil.copytree(folder / "low", tmp_path / "other" / "low")
    folders = [folder / "low", tmp_path / "other" / "low"]  # of one name
    assert {row["data set"] for row in tsne.read_clips(folders).rows} == set(map(str, folders))
    rows = [{"id": str(i), "path": f"low-audio/{i}.wav", "task": f"task {i % 2}"} for i in range(6)]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    embedded([folder / "tasks.jsonl"], tmp_path / "tasks")
    clips = tsne.read_clips([tmp_path / "tasks"])
    assert tsne.color_by(clips, "data set").names == ["task 0", "task 1"]


def test_what_is_alike_lies_together(folder: Path) -> None:
    clips = tsne.read_clips([folder / "low", folder / "high"])
    found = tsne.make_map(clips)
    low = np.array([row["data set"] == "low" for row in clips.rows])
    assert (low.sum(), len(low)) == (CLIPS, 2 * CLIPS)
    order = {row["id"]: place for row, place in zip(clips.rows, found.places, strict=True)}
    near = np.linalg.norm(order["high 5"] - order["high 6"])
    far = np.linalg.norm(order["high 5"] - order["low 5"])
    assert near < far
    again = tsne.make_map(tsne.read_clips([folder / "low", folder / "high"]))
    np.testing.assert_array_equal(found.places, again.places)
    assert clips.title == "small (random weights: crepe-tiny): 24 clips"
    # Unscaled, numbers this small crash scikit-learn.
    tiny = tsne.make_map(clips._replace(scenes=clips.scenes * np.float32(1e-30))).places
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
    many = found._replace(rows=[{"hertz": float(i)} for i in range(60)])
    assert tsne.color_by(many, "hertz").names == ()
    assert len(set(palette(20))) == 20
    assert len(set(palette(70))) == 70
    with pytest.raises(InputError, match=r"expected one of the columns data set, id, path, .*found 'pitch'"):
        tsne.color_by(found, "pitch")
    texts = found._replace(rows=[{"name": f"clip {i}"} for i in range(300)])
    with pytest.raises(InputError, match="at most 200 different values, found 300"):
        tsne.color_by(texts, "name")
    for nothing in (None, math.nan):
        with pytest.raises(InputError, match="expected a column with values, found none in 'name'"):
            tsne.color_by(found._replace(rows=[{"name": nothing}] * 9), "name")


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
    assert {row["path"] for row in found.clips.rows} == {f"clips/{i}.wav" for i in range(CLIPS)}
    colors = tsne.color_by(found.clips, "data set")
    assert tsne.write_page(found, colors, tmp_path / "page.html") == CLIPS
    (tmp_path / "clips" / "3.wav").unlink()
    (tmp_path / "clips" / "4.wav").write_text("no audio")
    assert tsne.write_page(found, colors, tmp_path / "page.html") == CLIPS - 2
    page = (tmp_path / "page.html").read_text()
    assert f"{CLIPS - 2} clips play, 2 cannot be read<" in page
    silent = [why for why in data_of(page)["silent"] if why]
    assert sorted("no such file" in why for why in silent) == [False, True]


def data_of(page: str) -> Any:
    return json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])


def test_a_page_has_all_that_it_needs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    result = plotted(folder / "low", "--out", path, "--color", "kind")
    assert f"{CLIPS} clips, {CLIPS} of them play" in result.stdout
    page = path.read_text()
    data = data_of(page)
    assert [group["name"] for group in data["groups"]] == ["even", "odd"]
    assert sorted(row for group in data["groups"] for row in group["rows"]) == list(range(CLIPS))
    assert HOSTILE in {clip[0][1] for clip in data["clips"]}
    assert HOSTILE not in page
    assert "small (random weights: crepe-tiny): 12 clips" in page
    outside = re.findall(r"""(?:src|href)=["'](?!data:)[^"']+""", page.split("@")[0].split("<script>")[0])
    assert outside == []
    monkeypatch.setattr("gura_jax.tsne.page.AUDIO_BYTES", 12_000)
    found = tsne.make_map(tsne.read_clips([folder / "low"]))
    plays = tsne.write_page(found, tsne.color_by(found.clips, "kind"), path)
    assert 0 < plays < CLIPS
    data = data_of(path.read_text())
    assert sum(len(sound) for sound in data["audio"] if sound) <= 12_000
    assert {why for why in data["silent"] if why} == {"the page is full"}
    assert f"{plays} clips play, {CLIPS - plays} left out: the page is full<" in path.read_text()


# In a browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Headless Chromium without a network."""
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
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1200,900",
        "proxy-server=127.0.0.1:9",  # nothing answers there
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{flag}")
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


@pytest.mark.page
def test_the_page_in_a_browser(folder: Path, tmp_path: Path, browser: Any) -> None:
    """It loads without errors, shows every point, and a click on one plays its clip."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    path = tmp_path / "page.html"
    found = tsne.make_map(tsne.read_clips([folder / "low"]))
    (folder / "low-audio" / "7.wav").rename(tmp_path / "away.wav")
    try:
        assert tsne.write_page(found, tsne.color_by(found.clips, "kind"), path) == CLIPS - 1
    finally:
        (tmp_path / "away.wav").rename(folder / "low-audio" / "7.wav")
    browser.get(path.as_uri())
    until(lambda: browser.execute_script("return document.body.dataset.ready"))
    points = browser.find_elements(By.CSS_SELECTOR, "#map .scatterlayer .point")
    assert len(points) == CLIPS
    assert browser.title == found.clips.title
    legend = [item.text for item in browser.find_elements(By.CSS_SELECTOR, "#map .legendtext")]
    assert legend == ["even", "odd"]
    shown = [index for group in data_of(path.read_text())["groups"] for index in group["rows"]]
    ids = [found.clips.rows[index]["id"] for index in shown]

    def click(name: str) -> None:
        # From elsewhere, so that the point is entered, as by a person.
        ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
        ActionChains(browser).move_to_element(points[ids.index(name)]).pause(0.2).click().perform()

    def state() -> str:
        return browser.find_element(By.ID, "now").text

    def player(what: str) -> Any:
        return browser.execute_script(f"return document.getElementById('player').{what}")

    browser.execute_script("window.played = []; player.addEventListener('playing', () => played.push(player.duration))")
    for name in ("low 4", HOSTILE):
        click(name)
        until(lambda: browser.execute_script("return played.length"))
        until(lambda name=name: name[:60] in browser.find_element(By.CSS_SELECTOR, "#map .hoverlayer").text)
        until(lambda name=name: state() in (f"Playing: {name}", f"Played: {name}"))
        (duration,) = browser.execute_script("return played.splice(0)")
        assert duration == pytest.approx(SECONDS, abs=0.15)  # MP3 fills its last frames up
        until(lambda: player("currentTime") > 0)
        until(lambda name=name: state() == f"Played: {name}")
    assert "hertz" in browser.find_element(By.ID, "clip").text
    # A second click stops.
    browser.execute_script("player.loop = true")
    click("low 5")
    until(lambda: state() == "Playing: low 5")
    click("low 5")
    until(lambda: state() == "Stopped: low 5")
    assert player("paused")
    click("low 7")
    until(lambda: state().startswith("No sound of low 7: "))
    assert browser.title == found.clips.title  # no name was taken for a script
    buttons = [b.get_attribute("data-title") for b in browser.find_elements(By.CSS_SELECTOR, "#map .modebar-btn")]
    assert buttons == ["Zoom in", "Zoom out", "Reset axes", "Download plot as a PNG"]  # none that sends it away
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
