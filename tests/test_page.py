"""gura_jax/evaluate/page.py, learned_page.py and figures.py: what an evaluation's page shows, and that it is safe."""

import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluate import RATE, SCORES, evaluated, write_task
from test_tsne import browser  # noqa: F401 - a fixture
from typer.testing import CliRunner

from gura_jax import cli
from gura_jax.evaluate import figures, learn, learned_page, metrics, report, run
from gura_jax.evaluate.benchmarks import BENCHMARKS
from gura_jax.evaluate.hear.protocol import PROTOCOLS
from gura_jax.evaluate.statistics import Difference

HOSTILE = '<script>document.title="broken"</script>'
FOLDED, MULTILABEL, EVENTS, BROKEN = "esc50-v2.0.0-full", "many", "events", "broken"
SYSTEM = "a<img src=x>"
NAME = f"{SYSTEM}-random"
CLIPS, FOLDS = 6, 3


class Page(HTMLParser):
    """Texts of elements, attributes, and rows of tables of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "rect", "line", "circle"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.append((self._open[-1], data))
        if self.rows and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def check_safe(self) -> None:
        """Nothing is run, and nothing is loaded from elsewhere."""
        assert {tag for tag, _ in self.elements} & {"script", "img", "iframe", "object", "base", "form"} == set()
        for _, attributes in self.elements:
            assert not [name for name in attributes if name.startswith("on")]
            for name in ("src", "href", "xlink:href"):
                assert (attributes.get(name) or "#").startswith(("#", "data:"))
        assert "url(" not in self.source
        (policy,) = [found["content"] for _, found in self.elements if "http-equiv" in found]
        assert policy is not None
        assert policy.startswith("default-src 'none'")
        assert "script" not in policy


def relabel(folder: Path) -> Path:
    """Give a class a name that is a script."""
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace('"mid"', json.dumps(HOSTILE)))
    vocabulary = folder / "labelvocabulary.csv"
    vocabulary.write_text(vocabulary.read_text().replace("mid", '"{}"'.format(HOSTILE.replace('"', '""'))))
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Any, ...]]:
    """An evaluation of four tasks, one of which fails: its folder and the command's arguments."""
    home = tmp_path_factory.mktemp("pages")
    relabel(write_task(home / "tasks" / FOLDED, split_mode="new_split_kfold", clips=CLIPS))
    several = {"prediction_type": "multilabel", "evaluation": ["mAP"]}
    write_task(home / "tasks" / MULTILABEL, clips=3, **several)
    write_task(home / "tasks" / EVENTS, "event", clips=3)
    (write_task(home / "tasks" / BROKEN, clips=3) / str(RATE) / "train" / "train-1.wav").write_bytes(b"noise")
    (home / "system.toml").write_text(f'name = "{SYSTEM}"\n[[members]]\nencoder = "crepe-tiny"\n')
    system = "--system", home / "system.toml", "--weights", "random"
    arguments = home / "tasks", *system, "--protocol", "fixed", "--seed", 3, "--out", home / "out"
    found = evaluated(*arguments)
    assert found.exit_code == cli.EXIT_SOME_INPUTS_FAILED, found.output
    assert str(home / "out" / "report-fixed-3.html") in found.stdout
    return home / "out", arguments


def scores_of(out: Path, task: str) -> Path:
    return out / "scores" / "fixed-3" / NAME / task / SCORES


def test_scores_and_the_papers(done: tuple[Path, Any]) -> None:
    page = Page(done[0] / "report-fixed-3.html")
    page.check_safe()
    table = {(row.task, row.metric): row for row in report.read_table(done[0])}
    assert {task for task, _ in table} == {FOLDED, MULTILABEL, EVENTS}
    accuracy, precision = table[FOLDED, "top1_acc"], table[FOLDED, "mAP"]
    assert accuracy.std is not None
    assert precision.std is not None
    cells = [f"{100 * row.score:.1f} ± {100 * (row.std or 0):.1f}" for row in (accuracy, precision)]
    (row,) = [row for row in page.rows if row[0] == NAME and row[1:3] == cells]
    assert row[4] == str(FOLDS)
    (comparison,) = [row for row in page.rows if row[:2] == [FOLDED, "top1_acc ↑"]]
    assert f"{100 * accuracy.score:.1f}" in comparison
    assert "(94.7)" in comparison  # PaSST's, in the paper
    onset, error = (f"{100 * table[EVENTS, name].score:.1f}" for name in ("event_onset_200ms_fms", "segment_1s_er"))
    assert [row for row in page.rows if row[:3] == [NAME, onset, error]]


def test_a_matrix_counts_the_tested_clips(done: tuple[Path, Any]) -> None:
    out, _ = done
    scores = json.loads(scores_of(out, FOLDED).read_text())
    confusion = scores["confusion"]
    assert list(confusion) == ["low", HOSTILE, "high"]
    assert [sum(row.values()) for row in confusion.values()] == [CLIPS * FOLDS / 3] * 3
    right = sum(row.get(true, 0) for true, row in confusion.items())
    # Folds are of one size, so that the mean of their accuracies is that of all clips.
    assert right / (CLIPS * FOLDS) == pytest.approx(scores["aggregated_scores"]["test_top1_acc_mean"])
    page = Page(out / "report-fixed-3.html")
    drawn = [text for text in page.of("title") if re.search(r": \d+ of \d+$", text)]
    assert sum(int(text.split()[-3]) for text in drawn) == CLIPS * FOLDS
    assert sum(int(text.split()[-3]) for text in drawn if " taken for " not in text) == right
    assert HOSTILE not in page.source
    assert any(HOSTILE in text for text in page.of("title"))


def test_classes_of_a_multilabel_task(done: tuple[Path, Any]) -> None:
    scores = json.loads(scores_of(done[0], MULTILABEL).read_text())
    assert {label: found["clips"] for label, found in scores["classes"].items()} == {"low": 1, "mid": 1, "high": 1}
    found = [row["average_precision"] for row in scores["classes"].values()]
    assert np.mean(found) == pytest.approx(scores["test"]["test_mAP"])
    page = Page(done[0] / "report-fixed-3.html")
    assert ["mid", "1", f"{100 * found[1]:.1f}"] in page.rows
    assert not {"confusion", "classes"} & set(json.loads(scores_of(done[0], EVENTS).read_text()))


def test_settings_weights_and_failures(done: tuple[Path, Any]) -> None:
    page = Page(done[0] / "report-fixed-3.html")
    rows = {row[0]: row for row in page.rows if len(row) == 2}
    assert rows["protocol"][1] == "fixed"
    assert rows["seed"][1] == "3"
    assert rows["options on"][1].startswith("shuffle, go_on_after_nan, ")
    assert rows["options off"][1] == "none"
    assert "cores of" in rows["computed on"][1]
    assert f"numpy {np.__version__}" in rows["computed on"][1]
    assert "train-1.wav" in rows[f"{BROKEN} by {NAME}"][1]
    (weights,) = [row for row in page.rows if row[:2] == [NAME, "crepe-tiny"]]
    assert weights[2:4] == ["last", "randomseed 0"]
    assert "Random weights: crepe-tiny." in " ".join(page.of("p"))
    fingerprint = json.loads((done[0] / "embeddings" / NAME / FOLDED / "run.json").read_text())["fingerprint"]
    assert [NAME, FOLDED, fingerprint] in page.rows


def test_a_resumed_evaluation_writes_it_again(done: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the score files: also from those of an earlier version, which hold less."""
    out, arguments = done
    path = out / "report-fixed-3.html"
    before = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(run, "evaluate_task", lambda *_, **__: pytest.fail("computed again"))
    assert evaluated(*arguments).exit_code == cli.EXIT_SOME_INPUTS_FAILED
    assert path.read_bytes() == before
    old = json.loads(scores_of(out, FOLDED).read_text())
    kept = scores_of(out, FOLDED).read_bytes()
    for name in (report.CONFUSION, report.PROVENANCE, report.ENVIRONMENT):
        del old[name]
    try:
        report.write_scores(scores_of(out, FOLDED), old | {"state_weights": [0.125, 0.625, 0.25]})
        assert evaluated(*arguments).exit_code == cli.EXIT_SOME_INPUTS_FAILED
        page = Page(path)
    finally:
        scores_of(out, FOLDED).write_bytes(kept)
    assert evaluated(*arguments).exit_code == cli.EXIT_SOME_INPUTS_FAILED
    assert path.read_bytes() == before
    page.check_safe()
    notes = " ".join(page.of("p"))
    assert f"Confusion matrix or classes of {NAME}: not recorded" in notes
    assert "state 0 0.1250, state 1 0.6250, state 2 0.2500" in notes
    assert "largest: state 1, 0.625" in page.of("span")
    assert [row for row in page.rows if row[0] == "1 score file computed on" and row[1].startswith("not recorded")]


# What was learned


def learned_of(out: Path) -> tuple[learn.Learned, Any]:
    """What was learned by two seeds from a system of two members, one without layers; and its score files."""
    gain, none = Difference(0.1, -0.05, 0.25, 0.2), Difference(0.0, 0.0, 0.0, 1.0)
    weights = (0.2, 0.3, 0.5), (0.6, 0.1, 0.3)
    results = (
        learn.Result(learn.EQUAL, (0.5, 0.7), (0.5, 0.5), (), none, None),
        learn.Result(learn.LAYERS, (0.6, 0.8), (0.9, 0.9), (0.4, 0.6, 1.0), gain, 0.4),
        learn.Result(learn.JOINT, (0.6, 0.8), (0.6, 0.6), weights[0], Difference(0.1, None, None, None), None),
        learn.Result(HOSTILE, (0.6, 0.8), (0.6, 0.6), (), gain, 0.4),
    )
    tokens = ("hubert", 0), ("hubert", 1), (HOSTILE, None)
    found = learn.Learned(
        "digits", "top1_acc", Difference(0.6, 0.4, 0.8, 0.01), results, learn.LAYERS, {HOSTILE: gain}, tokens,
        {learn.LAYERS: str(out / "digits" / "layers.toml")},
    )  # fmt: skip
    benchmark, protocol = BENCHMARKS["hear"], PROTOCOLS["fixed"]
    for way, hits in ((learn.EQUAL, 3), (learn.LAYERS, 4)):
        for seed in (0, 1):
            content = {
                report.OURS: {},
                report.CONFUSION: {"a": {"a": hits, HOSTILE: 5 - hits}, HOSTILE: {HOSTILE: 5}},
                report.ENVIRONMENT: {"devices": "1 x H", "versions": {"jax": "1"}},
                report.PROVENANCE: [],
            }
            report.write_scores(out / "scores" / f"fixed-{seed}" / way / "digits" / SCORES, content)
    return found, (out, benchmark, protocol, range(2))


def test_what_was_learned(tmp_path: Path) -> None:
    found, rest = learned_of(tmp_path)
    path = learned_page.write_learned(found, SYSTEM, *rest)
    assert path == tmp_path / "digits" / "learned.html"
    page = Page(path)
    page.check_safe()
    assert HOSTILE not in page.source
    rows = {row[0]: row for row in page.rows if len(row) == 7}
    assert rows["equal"] == ["equal", "0.5000", "0.6000", "", "", "", ""]
    assert rows["layers (best on validation)"][1:5] == ["0.9000", "0.7000", "+0.1000", "-0.0500 to +0.2500"]
    assert rows["layers (best on validation)"][6] == "0.400"
    assert rows["joint"][3:5] == ["+0.1000", "-"]
    assert ["layers", "layers.toml"] in page.rows
    assert [row[:3] for row in page.rows if row[0] == HOSTILE][-1] == [HOSTILE, "+0.1000", "-0.0500 to +0.2500"]
    heads = page.of("h3")
    assert heads == ["hubert", "hubert: 50.0 % of all", f"{HOSTILE}: 50.0 % of all"]
    assert "Confusion matrix of equal: 20 tested clips, 80.0 % right" in page.of("summary")
    assert "Confusion matrix of layers: 20 tested clips, 90.0 % right" in page.of("summary")
    assert f"Without layers to weigh: {HOSTILE}." in page.of("p")
    # The bars of a mixture are as high as its weights.
    bars = [
        float(element["height"] or 0)
        for tag, element in page.elements
        if tag == "rect" and element.get("width") == "0.8"
    ]
    assert bars == pytest.approx([0.4 / 0.6, 1, 0.2 / 0.5, 0.3 / 0.5, 1], abs=1e-4)


def test_what_was_learned_by_an_earlier_version(tmp_path: Path) -> None:
    found, rest = learned_of(tmp_path)
    for path in (tmp_path / "scores").rglob(SCORES):
        report.write_scores(path, {report.OURS: {}})
    page = Page(learned_page.write_learned(found, SYSTEM, *rest))
    assert [text for text in page.of("p") if text.startswith("Confusion matrix or classes of layers: not recorded")]
    assert [row for row in page.rows if row[0] == SYSTEM and row[1].startswith("not recorded")]
    assert "+0.1000" in page.source


def test_the_command_learn_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = learned_of(tmp_path / "out")
    write_task(tmp_path / "digits", clips=1)
    monkeypatch.setattr(learn, "learn", lambda *_: found)
    options = "--system", "crepe", "--weights", "random", "--seeds", "2", "--out", str(tmp_path / "out"), "--json"
    result = CliRunner().invoke(cli.app, ["learn", str(tmp_path / "digits"), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["task"] == "digits"
    assert f"-> {tmp_path / 'out' / 'digits' / 'learned.html'}" in result.stderr
    assert (tmp_path / "out" / "digits" / "learned.html").is_file()


# Figures and counts


def test_many_classes_are_listed_and_not_drawn() -> None:
    labels = [str(i) for i in range(figures.MOST_CLASSES + 1)]
    confusion: Mapping[str, Any] = {label: {label: 1} for label in labels}
    assert figures.matrix(confusion) == ""
    drawn = figures.matrix({label: {label: 1} for label in labels[:-1]})
    assert drawn.count('class="hit"') == figures.MOST_CLASSES


def test_intervals_stay_within_the_figure() -> None:
    width = figures.INTERVAL[0]
    for mean, low, high in ((0.1, -9.0, 9.0), (0.0, None, None), (-0.2, -0.2, -0.2)):
        drawn = figures.interval(mean, low, high, 0.2)
        places = [float(x) for x in re.findall(r'(?:x1|x2|cx)="([^"]+)"', drawn)]
        assert all(0 <= x <= width for x in places)
        assert ("range" in drawn) is (low is not None)
    assert figures.interval(math.nan, None, None, 1.0) == ""
    assert 'cx="110.0"' in figures.interval(0.0, 0.0, 0.0, 0.0)


def test_counts_by_class() -> None:
    truth, predicted = [0, 0, 0, 1, 2], [0, 1, 1, 1, 0]
    targets, probabilities = np.eye(3)[truth], 0.1 + np.eye(3)[predicted]
    assert metrics.confusion(probabilities, targets, "abc") == {"a": {"a": 1, "b": 2}, "b": {"b": 1}, "c": {"a": 1}}
    targets[:, 2] = 0
    found = metrics.by_class(probabilities, targets, "abc")
    assert found["c"] == metrics.ClassScore(0, None)
    assert found["b"].clips == 1
    assert found["b"].average_precision == pytest.approx(1 / 3)
    assert metrics.by_class(probabilities * np.nan, targets, "abc")["a"] == metrics.ClassScore(3, None)


def test_folds_are_combined() -> None:
    fold = metrics.ClassScore
    classes = [{"a": fold(2, 0.5), "b": fold(0, None)}, {"a": fold(1, 1.0), "b": fold(0, None)}]
    scored = [_fold(classes=own) for own in classes]
    assert report._classes(scored) == {
        "classes": {"a": {"clips": 3, "average_precision": 0.75}, "b": {"clips": 0, "average_precision": None}}
    }
    assert report._classes([_fold()]) == {}


def _fold(**found: Any) -> Any:
    from gura_jax.evaluate.protocol import FoldScores

    return FoldScores({}, 0.0, 0, 0.0, (), **found)


# In a browser


@pytest.mark.page
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_in_a_browser(done: tuple[Path, Any], browser: Any, width: int) -> None:  # noqa: F811
    """It loads without errors, is no wider than a phone, and draws what it should."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((done[0] / "report-fixed-3.html").as_uri())
    assert browser.title == "Evaluation: hear, protocol fixed"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    shown = "[...document.querySelectorAll('.matrix .hit, .matrix .miss')]"
    cells = browser.execute_script(f"return {shown}.map(cell => cell.getBoundingClientRect().width)")
    assert cells
    assert all(cell > 20 for cell in cells)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
