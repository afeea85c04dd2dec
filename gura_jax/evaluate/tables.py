"""Tables that compare systems, with published numbers beside those found here."""

import csv
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gura_jax import files
from gura_jax.evaluate.embed import LEARNED
from gura_jax.evaluate.metrics import METRICS
from gura_jax.evaluate.report import Row
from gura_jax.systems import PUBLISHED, base_name

BEST, SECOND = 1, 2
_PUBLISHED_NAME = {name: name for name in PUBLISHED} | {base_name(name): name for name in PUBLISHED if name != "crepe"}


class Comparison(NamedTuple):
    """A comparison of systems that was published as a table.

    Attributes:
        number: number of the table.
        title: what it compares, and where it was published.
        systems: the published systems, in order; empty for all systems there are.
    """

    number: int
    title: str
    systems: tuple[str, ...] = ()


class Cell(NamedTuple):
    """A system's score in a metric of a task.

    Attributes:
        score: unscaled; NaN if there is none.
        std: standard deviation over folds.
        rank: 1 for the best of its line, 2 for the second best, 0 for others.
        paper: published score, unscaled; None if there is none.
    """

    score: float
    std: float | None = None
    rank: int = 0
    paper: float | None = None


class Line(NamedTuple):
    """A line of a table: a metric of a task, with a cell for each system."""

    task: str
    metric: str
    cells: tuple[Cell, ...]


class Table(NamedTuple):
    """A comparison with its scores."""

    number: int
    title: str
    systems: tuple[str, ...]
    lines: tuple[Line, ...]


Published = Callable[[str], Mapping[tuple[int, str, str], float]]
"""Task name -> published scores by number of the comparison, system and metric."""


def compare(rows: Iterable[Row], comparisons: Sequence[Comparison], published: Published) -> list[Table]:
    """Fill in the comparisons of which at least two systems have scores; a comparison of all systems always.

    Args:
        rows: scores by one protocol.
        comparisons: comparisons to fill in.
        published: published scores.
    """
    rows = list(rows)
    scores = {(row.system, row.task, row.metric): row for row in rows}
    systems = list(dict.fromkeys(row.system for row in rows))
    numbers = {task: published(task) for task in dict.fromkeys(row.task for row in rows)}
    tables = []
    for number, title, chosen in comparisons:
        columns = sorted(systems, key=_order) if not chosen else _members(systems, chosen)
        if chosen and len(columns) < 2:
            continue
        asked = sorted(
            {(row.task, row.metric) for row in rows if row.system in columns},
            key=lambda line: (line[0], list(METRICS).index(line[1])),
        )
        if not chosen:  # also systems that are not ours, where there are published scores
            known = {
                name for task, metric in asked for table, name, m in numbers[task] if (table, m) == (number, metric)
            }
            columns += sorted(known - set(columns) - set(PUBLISHED))
        lines = [_line(scores, numbers[task], number, task, metric, columns) for task, metric in asked]
        tables.append(Table(number, title, tuple(columns), tuple(lines)))
    return tables


def _members(systems: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """Return a comparison's systems in its order, of every size; those with learned layers follow the averaged."""
    found = [name for name in systems if _published(name) in chosen]
    return sorted(found, key=lambda name: (_order(name)[1:2], chosen.index(_published(name)), name))


def _published(system: str) -> str:
    """Return the published system that this one is a size of, or a variant with learned layers."""
    name = system.split("-")[0].removesuffix(LEARNED)
    return _PUBLISHED_NAME.get(name, system)


def _order(system: str) -> tuple[int, str, str]:
    """Return a sort key: single encoders before ensembles, as in the paper's Table 2, and sizes together."""
    published = list(PUBLISHED)
    name = _published(system)
    marks = system.partition("-")[2]
    base = "base" if "_base" in system.split("-")[0] else ""
    return (published.index(name) if name in published else len(published), base + marks, system)


def _line(
    scores: Mapping[tuple[str, str, str], Row],
    numbers: Mapping[tuple[int, str, str], float],
    number: int,
    task: str,
    metric: str,
    systems: Sequence[str],
) -> Line:
    cells = []
    for system in systems:
        row = scores.get((system, task, metric))
        found = (row.score, row.std) if row else (math.nan, None)
        cells.append(Cell(*found, paper=numbers.get((number, system, metric))))
    sign = 1 if METRICS[metric].maximize else -1
    values = sorted({sign * cell.score for cell in cells if not math.isnan(cell.score)}, reverse=True)
    ranks = dict(zip(values[:SECOND], (BEST, SECOND), strict=False)) if len(values) > 1 else {}
    return Line(task, metric, tuple(cell._replace(rank=ranks.get(sign * cell.score, 0)) for cell in cells))


def _text(cell: Cell, metric: str, marks: Mapping[int, tuple[str, str]]) -> str:
    """Format a cell: the score, marked if it is the best or second best, and the published one in brackets."""
    scale, decimals = METRICS[metric].scale, METRICS[metric].decimals
    left, right = marks[cell.rank]
    score = "" if math.isnan(cell.score) else f"{left}{scale * cell.score:.{decimals}f}{right}"
    paper = "" if cell.paper is None else f"({scale * cell.paper:.{decimals}f})"
    return " ".join(part for part in (score, paper) if part)


def terminal(tables: Sequence[Table]) -> str:
    """Format tables for a terminal."""
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
        out.append(table.title)
        out += [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in grid
        ]
        out.append("")
    return "\n".join([*out, "* best, + second best, (published); per cent, except d_prime"])


def markdown(tables: Sequence[Table]) -> str:
    """Format tables as Markdown."""
    marks = {0: ("", ""), BEST: ("**", "**"), SECOND: ("<u>", "</u>")}
    out = []
    for table in tables:
        heads = ["task", "metric", *_escaped(table.systems)]
        out += [f"## {table.title}", "", _piped(heads), "|---|---|" + "---:|" * len(table.systems)]
        for line in table.lines:
            cells = [_text(cell, line.metric, marks) for cell in line.cells]
            out.append(_piped([*_escaped([line.task]), f"{line.metric} {_arrow(line.metric, '↑', '↓')}", *cells]))
        out.append("")
    return "\n".join([*out, "**Best**, <u>second best</u>, (published); per cent, except d_prime.", ""])


def latex(tables: Sequence[Table]) -> str:
    """Format tables as LaTeX, with the package booktabs."""
    marks = {0: ("", ""), BEST: (r"\textbf{", "}"), SECOND: (r"\underline{", "}")}
    out = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        out += [
            r"\begin{table}",
            rf"\caption{{{_tex(table.title)}. Best in bold, second best underlined, published in brackets.}}",
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


def as_html(tables: Sequence[Table]) -> str:
    """Format tables as HTML, each in a ``div`` of its own that can scroll."""
    marks = {0: ("", ""), BEST: ("<b>", "</b>"), SECOND: ("<u>", "</u>")}
    out = []
    for table in tables:
        heads = "".join(f"<th>{html.escape(system)}</th>" for system in table.systems)
        out.append(f"<h3>{html.escape(table.title)}</h3>")
        out.append(f'<div class="wide"><table><tr><th>task</th><th>metric</th>{heads}</tr>')
        for i, line in enumerate(table.lines):
            task = "" if i and table.lines[i - 1].task == line.task else html.escape(line.task)
            cells = "".join(f"<td>{_text(cell, line.metric, marks)}</td>" for cell in line.cells)
            metric = f"{line.metric} {_arrow(line.metric, '↑', '↓')}"
            out.append(f"<tr><td>{task}</td><td>{metric}</td>{cells}</tr>")
        out.append("</table></div>")
    return "\n".join([*out, "<p><b>Best</b>, <u>second best</u>, (published); per cent, except d_prime.</p>"])


def as_csv(tables: Sequence[Table]) -> str:
    """Format tables as CSV, a row a cell, numbers unscaled."""
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
    """Write the tables in every format, as ``name.md`` and so on; returns the paths.

    Raises:
        StoreError: the folder cannot be written.
    """
    for suffix, text in WRITERS.items():
        with files.locked(folder):
            files.write_file(folder, f"{name}.{suffix}", text(tables).encode())
    return [folder / f"{name}.{suffix}" for suffix in WRITERS]


def _arrow(metric: str, up: str, down: str) -> str:
    return up if METRICS[metric].maximize else down


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(names: Iterable[str]) -> list[str]:
    """Escape names for a Markdown table."""
    return [re.sub(r"([|<\\`*\[])", r"\\\1", name) for name in names]


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda m: special.get(m.group(), f"\\{m.group()}"), text)
