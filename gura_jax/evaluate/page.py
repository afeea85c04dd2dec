"""Results of evaluations as HTML pages of one file: without scripts, and without a network."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gura_jax import files
from gura_jax.evaluate import report, tables
from gura_jax.evaluate.benchmarks import Benchmark
from gura_jax.evaluate.figures import MOST_CLASSES, bars, matrix, text
from gura_jax.evaluate.metrics import METRICS
from gura_jax.evaluate.protocol import Protocol
from gura_jax.evaluate.report import Row
from gura_jax.files import is_plain_name

CONFUSIONS = 10  # listed below a matrix
FIGURE, BAR_WIDTH = (320, 640), 30  # pixels: narrowest and widest figure, and a bar
NONE = "-"
NOT_RECORDED = (
    "not recorded: these scores were computed by an earlier version; delete their score files and run the command "
    "again to have them computed anew"
)
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --front: #1d2330; --grey: #6b7280; --line: #e3e5ea; --hit: #2563eb;
        --miss: #d9480f; --on: #fff; --warn: #fff4e6; }
@media (prefers-color-scheme: dark) { :root { --back: #14171d; --front: #e4e7ec; --grey: #9aa3b2; --line: #2c323d;
        --hit: #6ea0ff; --miss: #ff8c4c; --on: #101319; --warn: #3a2415; } }
body { margin: 0 auto; max-width: 1000px; padding: 16px 18px 40px; background: var(--back); color: var(--front);
       font: 14px/1.45 system-ui, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 19px; margin: 0; } h2 { font-size: 16px; margin: 30px 0 8px; }
h3 { font-size: 14px; margin: 16px 0 4px; }
p { margin: 2px 0 10px; color: var(--grey); }
p.warn { background: var(--warn); color: var(--front); padding: 8px 10px; }
a { color: var(--hit); } nav a { margin-right: 12px; } summary { cursor: pointer; padding: 5px 0; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide table { width: max-content; } .wide th, .wide td { max-width: 300px; } .words td:first-child { min-width: 110px; }
@media (max-width: 560px) { .wide th, .wide td { max-width: 150px; } }
th, td { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); font-weight: normal;
         vertical-align: top; }
th { color: var(--grey); } td b { font-weight: 650; }
code { font-size: 12px; overflow-wrap: anywhere; } svg { display: block; } svg text { fill: var(--front); }
.matrix text.on { fill: var(--on); } .hit { fill: var(--hit); } .miss { fill: var(--miss); }
.frame { fill: none; stroke: var(--line); } .even { stroke: var(--grey); stroke-width: 1; stroke-dasharray: 3 3;
         vector-effect: non-scaling-stroke; } .range { stroke: var(--hit); stroke-width: 2; }
.bars { border-bottom: 1px solid var(--grey); } figure { margin: 10px 0 16px; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 14px; color: var(--grey); }
"""


def write_evaluation(
    out: Path,
    benchmark: Benchmark,
    protocol: Protocol,
    seed: int,
    compared: Sequence[tables.Table],
    failed: Mapping[str, str],
) -> Path:
    """Write the scores in a folder by one protocol and seed as a page, ``report-PROTOCOL-SEED.html``.

    Args:
        out: folder of the evaluation, with its table and score files.
        benchmark: of the tasks.
        protocol, seed: of the scores.
        compared: the comparisons, with published scores.
        failed: reasons by what failed in the last run.

    Returns:
        The page's path.

    Raises:
        StoreError: it cannot be written.
    """
    rows = [row for row in report.read_table(out) if (row.protocol, row.seed) == (protocol.name, seed)]
    home = out / "scores" / f"{protocol.name}-{seed}"
    found = {
        (row.task, row.system): read(home, row.system, row.task, benchmark.scores_file) for row in rows
    }  # from the files, so that a resumed evaluation's page is the same
    names = sorted({row.task for row in rows})
    systems = {row.system for row in rows}
    recorded = {(system, task): scores for (task, system), scores in found.items()}
    parts = [random_note(recorded.values()), _failed(failed), "<h2>Scores</h2>", tables.as_html(compared)]
    if len(names) > 1:
        links = "".join(f'<a href="#task-{i}">{text(name)}</a> ' for i, name in enumerate(names))
        parts.append(f"<nav>{links}</nav>")
    for i, name in enumerate(names):
        own = [row for row in rows if row.task == name]
        files_of_task = {system: scores for (task, system), scores in found.items() if task == name}
        parts += [f'<h2 id="task-{i}">{text(name)}</h2>', _scores(own, files_of_task), by_class(files_of_task)]
        parts += [_layer_weights(system, scores) for system, scores in files_of_task.items()]
    parts += settings(protocol, f"{seed}", recorded)
    title = f"Evaluation: {benchmark.name}, protocol {protocol.name}"
    about = f"{counted(len(systems), 'system')}, {counted(len(names), 'task')}, seed {seed}"
    return write(out, f"report-{protocol.name}-{seed}.html", title, about, parts)


def write(folder: Path, name: str, title: str, about: str, parts: Iterable[str]) -> Path:
    """Write a page of HTML ``parts``, complete or not at all; the other texts are escaped. Returns its path.

    Raises:
        StoreError: it cannot be written.
    """
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # No script runs and nothing is fetched, whatever a class is called.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{text(title)}</h1>\n<p>{text(about)}</p>\n" + "\n".join(filter(None, parts)) + "\n</body>\n</html>\n"
    )
    files.open_folder(folder)
    with files.locked(folder):
        files.write_file(folder, name, page.encode())
    return folder / name


def read(home: Path, system: str, task: str, name: str) -> Mapping[str, Any]:
    """Read a score file; empty if there is none."""
    if not is_plain_name(system) or not is_plain_name(task):  # of a table that somebody changed
        return {}
    return report.read_scores(home / system / task / name) or {}


# Sections of every page


def random_note(scores: Iterable[Mapping[str, Any]]) -> str:
    """Warn of members with random weights."""
    members = (member for each in scores for part in _parts(each) for member in part.get("members", ()))
    names = sorted({str(member["name"]) for member in members if member["weights"].get("source") == "random"})
    if not names:
        return ""
    return f'<p class="warn">Random weights: {text(", ".join(names))}. What they contribute means nothing.</p>'


def _parts(scores: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in scores.get(report.PROVENANCE, ()) if part]


def by_class(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Confusion matrices of systems, or a table of their average precisions."""
    if any(report.CLASSES in own for own in scores.values()):
        return _classes(scores)
    if any(own.get("postprocessing") for own in scores.values()):  # an event task
        return ""
    out = []
    for i, (system, own) in enumerate(scores.items()):
        confusion = own.get(report.CONFUSION)
        if confusion is None:
            out.append(f"<p>Confusion matrix or classes of {text(system)}: {NOT_RECORDED}.</p>")
            continue
        clips = sum(sum(row.values()) for row in confusion.values())
        right = sum(row.get(true, 0) for true, row in confusion.items())
        summary = f"Confusion matrix of {text(system)}: {clips} tested clips, {100 * right / clips:.1f} % right"
        drawn = matrix(confusion) or f"<p>More than {MOST_CLASSES} classes: not drawn.</p>"
        out.append(
            f"<details{'' if i else ' open'}><summary>{summary}</summary>\n"
            "<p>A row is a true class, a column a predicted one; colour is a cell's share of its row.</p>\n"
            f'<div class="wide">{drawn}</div>\n{_confused(confusion)}</details>'
        )
    return "\n".join(out)


def _confused(confusion: Mapping[str, Mapping[str, int]]) -> str:
    found = [
        (count, true, predicted)
        for true, row in confusion.items()
        for predicted, count in row.items()
        if predicted != true
    ]
    most = sorted(found, key=lambda item: -item[0])[:CONFUSIONS]
    listed = "; ".join(f"{text(true)} as {text(predicted)} ({count})" for count, true, predicted in most)
    return f"<p>Most often wrong, clips: {listed}.</p>" if most else ""


def _classes(scores: Mapping[str, Mapping[str, Any]]) -> str:
    found = {system: own[report.CLASSES] for system, own in scores.items() if report.CLASSES in own}
    labels = dict.fromkeys(label for own in found.values() for label in own)
    rows = []
    for label in labels:
        own = [classes.get(label, {}) for classes in found.values()]
        precisions = [_percent(score.get("average_precision")) for score in own]
        rows.append([text(label), str(max(score.get("clips", 0) for score in own)), *precisions])
    heads = ["class", "tested clips", *map(text, found)]
    missing = "".join(f"<p>Classes of {text(name)}: {NOT_RECORDED}.</p>" for name in scores if name not in found)
    about = "<p>Average precision of each class, per cent; of several folds the mean.</p>"
    return f"<details open><summary>Classes</summary>{about}{table(heads, rows)}</details>{missing}"


def settings(protocol: Protocol, seed: str, scores: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Say how scores were computed, and where weights came from; scores by two names."""
    options = {name: value for name, value in protocol._asdict().items() if isinstance(value, bool)}
    rows = [["protocol", text(protocol.name)], ["seed", text(seed)]]
    for word, wanted in (("on", True), ("off", False)):
        chosen = [name for name, value in options.items() if value is wanted]
        rows.append([f"options {word}", text(", ".join(chosen) or "none")])
    found = Counter(json.dumps(own.get(report.ENVIRONMENT)) for own in scores.values())
    for described, count in found.items():
        environment = json.loads(described)
        name = "computed on" if len(found) == 1 else f"{counted(count, 'score file')} computed on"
        if environment is None:
            rows.append([name, NOT_RECORDED])
            continue
        versions = ", ".join(f"{package} {number}" for package, number in environment["versions"].items())
        rows.append([name, f"{text(environment['devices'])}<br>{text(versions)}"])
    return ["<h2>Settings</h2>", f'<table class="words">{_body(rows)}</table>', "<h2>Weights</h2>", _weights(scores)]


def _weights(scores: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    rows: dict[str, list[str]] = {}
    stores = []
    for (first, second), own in scores.items():
        if not _parts(own):
            rows.setdefault(first, [text(first), NOT_RECORDED, "", "", ""])
        for part in _parts(own):
            if "module" in part:
                given = part.get("weights") or "the module's own"
                described = [text(first), text(part["module"]), "", text(given), f"{text(part['sample_rate'])} Hz"]
                rows.setdefault("\n".join(described), described)
                continue
            versions = ", ".join(f"{name} {number}" for name, number in part.get("versions", {}).items())
            how = f"{part['dtype']}, {versions}"
            for member in part["members"]:
                weights = member["weights"]
                mark = (
                    f"seed {weights.get('seed')}" if weights["source"] == "random" else weights.get("fingerprint", "")
                )
                source = f"{text(weights['source'])}<br><code>{text(mark)}</code>"
                encoder = (
                    member["name"] if member["name"] == member["encoder"] else f"{member['name']}: {member['encoder']}"
                )
                described = [text(first), text(encoder), text(_layers(member["layers"])), source, text(how)]
                rows.setdefault("\n".join(described), described)
            stores.append([text(first), text(second), f"<code>{text(part['fingerprint'])}</code>"])
    out = table(["scores of", "member", "layers", "weights", "embedded with"], rows.values())
    if stores:
        listed = table(["scores of", "", "fingerprint"], stores)
        out += f"<details><summary>Fingerprints of the stores of embeddings</summary>{listed}</details>"
    return out


def _layers(layers: Any) -> str:
    if isinstance(layers, str):
        return layers
    if all(isinstance(value, int) for value in layers):
        return f"mean of {', '.join(map(str, layers))}"
    return f"weights of {len(layers)} states"


# An evaluation


def _failed(failed: Mapping[str, str]) -> str:
    if not failed:
        return ""
    rows = [[text(name), text(reason)] for name, reason in failed.items()]
    return f'<h2>Failed in the last run</h2>\n<table class="words">{_body(rows)}</table>'


def _scores(rows: Sequence[Row], scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores of a task: a row a system."""
    listed = list(dict.fromkeys(row.metric for row in rows))
    order = [name for name in METRICS if name in listed]
    by_system: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_system.setdefault(row.system, {})[row.metric] = row
    body = []
    for system, own in by_system.items():
        any_row = next(iter(own.values()))
        cells = [_score(own[metric]) if metric in own else NONE for metric in order]
        probe = scores[system].get("hparams", {})
        described = f"{probe['hidden_layers']} of {probe['hidden_dim']}, lr {probe['lr']:g}" if probe else NONE
        body.append([text(system), *cells, f"{any_row.validation:.4g}", str(any_row.folds), described])
    about = (
        "<p>Mean and standard deviation over folds; validation: the score or loss by which the probe was chosen.</p>"
    )
    return about + table(["system", *order, "validation", "folds", "probe: hidden layers"], body)


def _score(row: Row) -> str:
    metric = METRICS[row.metric]
    if not math.isfinite(row.score):
        return "∞" if row.score == math.inf else NONE
    spread = "" if row.std is None or not math.isfinite(row.std) else f" ± {metric.scale * row.std:.{metric.decimals}f}"
    return f"{metric.scale * row.score:.{metric.decimals}f}{spread}"


def _layer_weights(system: str, scores: Mapping[str, Any]) -> str:
    weights = scores.get("state_weights")
    if not weights:
        return ""
    named = [(f"state {i}", value) for i, value in enumerate(weights)]
    return (
        f"<h3>Learned weights of the hidden states of {text(system)}</h3>\n{figure(named, max(weights), len(weights))}"
    )


# Parts of sections


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table of cells that are HTML, which scrolls where it is wider than the page."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    return f'<div class="wide"><table><tr>{head}</tr>\n{_body(rows)}</table></div>'


def _body(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)


def figure(weights: Sequence[tuple[str, float]], highest: float, tokens: int) -> str:
    """Draw weights, with a dashed line at 1 / tokens, and their numbers in words below."""
    name, value = max(weights, key=lambda item: item[1])
    ends = [weights[0][0], f"largest: {name}, {value:.3f}", weights[-1][0]] if len(weights) > 1 else [f"{value:.3f}"]
    caption = "".join(f"<span>{text(end)}</span>" for end in ends)
    width = min(FIGURE[1], max(FIGURE[0], BAR_WIDTH * len(weights)))
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in weights)
    return (
        f'<figure style="max-width: {width}px">{bars(weights, highest, 1 / tokens)}<figcaption>{caption}</figcaption>'
        f"<details><summary>Numbers</summary><p>{text(numbers)}</p></details></figure>"
    )


def counted(number: int, name: str) -> str:
    """Return a number of things in words."""
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"
