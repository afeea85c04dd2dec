"""Comparisons of systems: the paper's tables 2 to 6, with its numbers beside those found here."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from gura_jax.dataset import store
from gura_jax.evaluate.embed import LEARNED
from gura_jax.evaluate.metrics import METRICS
from gura_jax.evaluate.report import Row
from gura_jax.systems import PUBLISHED, base_name

PERCENT = 100
RAW = {"d_prime": (1, 3)}  # what each metric is multiplied by, and its decimals; others are per cent
BEST, SECOND = 1, 2


class Comparison(NamedTuple):
    """A table of the paper: its number, what it compares, and the systems; of none, all."""

    number: int
    title: str
    systems: tuple[str, ...]


COMPARISONS = (
    Comparison(2, "All systems", ()),
    Comparison(
        3,
        "With and without layer fusion",
        ("wav2vec2_large", "fusion_wav2vec2", "hubert_xlarge", "fusion_hubert_xlarge"),
    ),
    Comparison(4, "Average and concatenation", ("avg_hubert_wav2vec2", "cat_hubert_wav2vec2")),
    Comparison(5, "HuBERT with and without CREPE", ("hubert_xlarge", "avg_hubert_crepe")),
    Comparison(6, "wav2vec 2.0 and CREPE with and without HuBERT", ("cat_wc", "cat_xwc")),
)
_PUBLISHED_NAME = {name: name for name in PUBLISHED} | {base_name(name): name for name in PUBLISHED if name != "crepe"}


class Cell(NamedTuple):
    """A score of a system; NaN where there is none here.

    Attributes:
        score: as the metric has it.
        std: over folds.
        rank: 1 the best of its line, 2 the second best, 0 neither.
        paper: the paper's number, as the metric has it, or None.
    """

    score: float
    std: float | None = None
    rank: int = 0
    paper: float | None = None


class Line(NamedTuple):
    """A metric of a task."""

    task: str
    metric: str
    cells: tuple[Cell, ...]


class Table(NamedTuple):
    """A comparison, filled in."""

    number: int
    title: str
    systems: tuple[str, ...]
    lines: tuple[Line, ...]


def paper_numbers() -> Mapping[tuple[int, str, str, str, str], float]:
    """The paper's numbers by table, system, task, mode and metric, as the metric has them.

    Its text is garbled in places; ``paper.csv`` says which cells are left out, and why.
    """
    text = (resources.files("gura_jax.evaluate") / "paper.csv").read_text(encoding="utf-8")
    return {
        (int(row["table"]), row["system"], row["task"], row["mode"], row["metric"]): float(row["value"])
        / _scale(row["metric"])[0]
        for row in csv.DictReader(io.StringIO(text))
        if row["value"]
    }


def compare(rows: Iterable[Row]) -> list[Table]:
    """The comparisons that these scores allow: two of its systems at least, all systems always."""
    rows = list(rows)
    scores = {(row.system, row.task, row.metric): row for row in rows}
    systems = list(dict.fromkeys(row.system for row in rows))
    numbers = paper_numbers()
    tables = []
    for number, title, chosen in COMPARISONS:
        columns = sorted(systems, key=_order) if not chosen else _members(systems, chosen)
        if chosen and len(columns) < 2:
            continue
        asked = sorted(
            {(row.task, row.metric) for row in rows if row.system in columns},
            key=lambda line: (line[0], list(METRICS).index(line[1])),
        )
        published: list[str] = []
        if not chosen:  # the paper's baselines, where it has numbers of these tasks
            known = {name for (table, name, *where) in numbers if table == number and _any_task(where, asked)}
            published = sorted(known - set(columns) - set(PUBLISHED))
        lines = [_line(scores, numbers, number, task, metric, [*columns, *published]) for task, metric in asked]
        tables.append(Table(number, title, (*columns, *published), tuple(lines)))
    return tables


def _members(systems: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The systems of a comparison in its order, of every size, and those with learned layers after the averaged."""
    found = [name for name in systems if _published(name) in chosen]
    return sorted(found, key=lambda name: (_order(name)[1:2], chosen.index(_published(name)), name))


def _published(system: str) -> str:
    """The published system that this one is a size of, or a variant with learned layers."""
    name = system.split("-")[0].removesuffix(LEARNED)
    return _PUBLISHED_NAME.get(name, system)


def _order(system: str) -> tuple[int, str, str]:
    """Single encoders before ensembles, as in the paper's Table 2, sizes together."""
    published = list(PUBLISHED)
    name = _published(system)
    marks = system.partition("-")[2]
    base = "base" if "_base" in system.split("-")[0] else ""
    return (published.index(name) if name in published else len(published), base + marks, system)


def _any_task(where: Sequence[str], asked: Sequence[tuple[str, str]]) -> bool:
    task, mode, metric = where
    return any(_is_task(name, task, mode) and metric == m for name, m in asked)


def _is_task(folder: str, task: str, mode: str) -> bool:
    """Whether a folder, ``<task>-<version>-<mode>``, has this task."""
    return folder.startswith(f"{task}-") and folder.endswith(f"-{mode}")


def _line(
    scores: Mapping[tuple[str, str, str], Row],
    numbers: Mapping[tuple[int, str, str, str, str], float],
    number: int,
    task: str,
    metric: str,
    systems: Sequence[str],
) -> Line:
    cells = []
    for system in systems:
        row = scores.get((system, task, metric))
        paper = next(
            (
                value
                for (table, name, task_name, mode, m), value in numbers.items()
                if (table, name, m) == (number, system, metric) and _is_task(task, task_name, mode)
            ),
            None,
        )
        cells.append(Cell(row.score if row else math.nan, row.std if row else None, 0, paper))
    sign = 1 if METRICS[metric].maximize else -1
    values = sorted({sign * cell.score for cell in cells if not math.isnan(cell.score)}, reverse=True)
    ranks = dict(zip(values[:SECOND], (BEST, SECOND), strict=False)) if len(values) > 1 else {}
    return Line(task, metric, tuple(cell._replace(rank=ranks.get(sign * cell.score, 0)) for cell in cells))


def _scale(metric: str) -> tuple[float, int]:
    """What scores of a metric are multiplied by, and the decimals."""
    return RAW.get(metric, (PERCENT, 1))


def _text(cell: Cell, metric: str, marks: Mapping[int, tuple[str, str]]) -> str:
    """A cell: the score, marked if it is the best or second best, and the paper's in brackets."""
    scale, decimals = _scale(metric)
    left, right = marks[cell.rank]
    score = "" if math.isnan(cell.score) else f"{left}{scale * cell.score:.{decimals}f}{right}"
    paper = "" if cell.paper is None else f"({scale * cell.paper:.{decimals}f})"
    return " ".join(part for part in (score, paper) if part)


def terminal(tables: Sequence[Table]) -> str:
    """For a terminal."""
    marks = {0: ("", ""), BEST: ("", "*"), SECOND: ("", "+")}
    out = []
    for table in tables:
        body = [
            [line.task, f"{line.metric} {_arrow(line.metric, '^', 'v')}"]
            + [_text(cell, line.metric, marks) for cell in line.cells]
            for line in table.lines
        ]
        body = [[*(("",) if i and body[i - 1][0] == row[0] else (row[0],)), *row[1:]] for i, row in enumerate(body)]
        grid = [["task", "metric", *table.systems], *body]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        out.append(_title(table))
        out += [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in grid
        ]
        out.append("")
    return "\n".join([*out, "* best, + second best, (the paper's); per cent, but d_prime"])


def markdown(tables: Sequence[Table]) -> str:
    """As Markdown."""
    marks = {0: ("", ""), BEST: ("**", "**"), SECOND: ("<u>", "</u>")}
    out = []
    for table in tables:
        heads = ["task", "metric", *_escaped(table.systems)]
        out += [f"## {_title(table)}", "", _piped(heads), "|---|---|" + "---:|" * len(table.systems)]
        for line in table.lines:
            cells = [_text(cell, line.metric, marks) for cell in line.cells]
            out.append(_piped([*_escaped([line.task]), f"{line.metric} {_arrow(line.metric, '↑', '↓')}", *cells]))
        out.append("")
    return "\n".join([*out, "**Best**, <u>second best</u>, (the paper's); per cent, but d_prime.", ""])


def latex(tables: Sequence[Table]) -> str:
    """As LaTeX, with the package booktabs."""
    marks = {0: ("", ""), BEST: (r"\textbf{", "}"), SECOND: (r"\underline{", "}")}
    out = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        out += [
            r"\begin{table}",
            rf"\caption{{{_tex(_title(table))}. Best in bold, second best underlined, the paper's in brackets.}}",
            rf"\begin{{tabular}}{{ll{'r' * len(table.systems)}}}",
            r"\toprule",
            " & ".join(map(_tex, ["task", "metric", *table.systems])) + r" \\",
            r"\midrule",
        ]
        for line in table.lines:
            arrow = _arrow(line.metric, r"$\uparrow$", r"$\downarrow$")
            cells = [_text(cell, line.metric, marks) for cell in line.cells]
            out.append(" & ".join([_tex(line.task), f"{_tex(line.metric)} {arrow}", *cells]) + r" \\")
        out += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(out)


def as_csv(tables: Sequence[Table]) -> str:
    """As CSV: a row a cell, numbers as the metrics have them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "task", "metric", "system", "score", "std", "rank", "paper"])
    for table in tables:
        for line in table.lines:
            for system, cell in zip(table.systems, line.cells, strict=True):
                score = "" if math.isnan(cell.score) else cell.score
                found = [score, cell.std, cell.rank or "", cell.paper]
                writer.writerow([table.number, line.task, line.metric, system, *found])
    return text.getvalue()


WRITERS: Mapping[str, Callable[[Sequence[Table]], str]] = {"md": markdown, "csv": as_csv, "tex": latex}


def write(folder: Path, name: str, tables: Sequence[Table]) -> list[Path]:
    """Write the tables in all formats, as ``name.md`` and so on.

    Raises:
        StoreError: the folder cannot be written.
    """
    for suffix, text in WRITERS.items():
        with store.locked(folder):
            store.write_file(folder, f"{name}.{suffix}", text(tables).encode())
    return [folder / f"{name}.{suffix}" for suffix in WRITERS]


def _title(table: Table) -> str:
    return f"{table.title} (Table {table.number} of the paper)"


def _arrow(metric: str, up: str, down: str) -> str:
    return up if METRICS[metric].maximize else down


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(names: Iterable[str]) -> list[str]:
    """Names that Markdown does not take for anything else."""
    return [re.sub(r"([|<\\`*\[])", r"\\\1", name) for name in names]


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda m: special.get(m.group(), f"\\{m.group()}"), text)
