"""gura_jax/evaluate/tables.py and hear/paper.py: comparisons, their marks, and the paper's numbers."""

import csv
import io
import json
import math
from importlib import resources

import pytest

from gura_jax.evaluate import tables
from gura_jax.evaluate.hear.paper import COMPARISONS, paper_numbers, published
from gura_jax.evaluate.metrics import METRICS
from gura_jax.evaluate.report import Row
from gura_jax.systems import PUBLISHED, SYSTEMS


def row(system: str, task: str, metric: str, score: float, std: float | None = None) -> Row:
    return Row(system, task, metric, score, std, score, 1, "hear2021", 0)


DCASE, ESC = "dcase2016_task2-hear2021-full", "esc50-v2.0.0-full"
ONSET, ERROR = "event_onset_200ms_fms", "segment_1s_er"
ROWS = [
    row("hubert_xlarge", DCASE, ONSET, 0.5),
    row("hubert_xlarge", DCASE, ERROR, 0.4),
    row("fusion_hubert_xlarge", DCASE, ONSET, 0.8),
    row("fusion_hubert_xlarge", DCASE, ERROR, 0.2),
    row("fusion_hubert_xlarge_learned", DCASE, ONSET, 0.7),
    row("fusion_hubert_xlarge_learned", DCASE, ERROR, math.nan),
    row("hubert_xlarge", ESC, "d_prime", 1.5, 0.1),
    row("cat_wc_base-tiny-random", ESC, "d_prime", 2.25, 0.1),
]


def compared(rows: list[Row]) -> list[tables.Table]:
    return tables.compare(rows, COMPARISONS, published)


def by_number(rows: list[Row]) -> dict[int, tables.Table]:
    return {table.number: table for table in compared(rows)}


def test_comparisons_that_the_scores_allow() -> None:
    found = by_number(ROWS)
    assert list(found) == [2, 3]
    assert found[3].systems == ("hubert_xlarge", "fusion_hubert_xlarge", "fusion_hubert_xlarge_learned")
    assert found[2].systems[:4] == (
        "hubert_xlarge",
        "fusion_hubert_xlarge",
        "fusion_hubert_xlarge_learned",
        "cat_wc_base-tiny-random",
    )
    assert set(found[2].systems[4:]) == {"PaSST", "PANNs", "Wav2CLIP", "BYOL-S", "EfficientNet-B2"}
    mine = [row._replace(task=row.task.replace("full", "mine").replace("esc50", "mine")) for row in ROWS]
    assert len(by_number(mine)[2].systems) == 4  # the paper has no such tasks


def test_base_systems_and_sizes_together() -> None:
    names = ["cat_xwc_base", "cat_wc_base", "cat_xwc", "cat_wc"]
    table = by_number([row(name, ESC, "top1_acc", 0.5) for name in names])[6]
    assert table.systems == ("cat_wc", "cat_xwc", "cat_wc_base", "cat_xwc_base")


def test_marks() -> None:
    onset, error, prime = by_number(ROWS)[2].lines
    assert [cell.rank for cell in onset.cells[:4]] == [0, 1, 2, 0]
    assert [cell.rank for cell in error.cells[:4]] == [2, 1, 0, 0]  # less is better, and NaN is nothing
    assert [cell.rank for cell in prime.cells[:4]] == [2, 0, 0, 1]
    tie = [row(name, ESC, "top1_acc", score) for name, score in (("a", 0.5), ("b", 0.5), ("c", 0.4))]
    assert [cell.rank for cell in by_number(tie)[2].lines[0].cells[:3]] == [1, 1, 2]
    alone = by_number([row("crepe", ESC, "top1_acc", 0.5)])
    assert [cell.rank for cell in alone[2].lines[0].cells] == [0] * 6


def test_the_papers_numbers() -> None:
    """Some of each table, copied by hand; and every cell names a known metric and system."""
    numbers = paper_numbers()
    for key, value in {
        (2, "fusion_cat_xwc", "dcase2016_task2", "full", ONSET): 0.826,
        (2, "PaSST", "esc50", "full", "top1_acc"): 0.947,
        (2, "BYOL-S", "fsd50k", "full", "d_prime"): 2.218,
        (3, "fusion_wav2vec2", "nsynth_pitch", "50h", "chroma_acc"): 0.646,
        (4, "cat_hubert_wav2vec2", "maestro", "5h", "event_onset_offset_50ms_20perc_fms"): 0.002,
        (5, "avg_hubert_crepe", "speech_commands", "full", "top1_acc"): 0.737,
        (6, "cat_xwc", "dcase2016_task2", "full", ERROR): 0.287,
    }.items():
        assert numbers[key] == pytest.approx(value)
    chosen = {number: systems for number, _, systems in COMPARISONS}
    for number, system, _, _, metric in numbers:
        assert metric in METRICS
        assert system in chosen[number] or number == 2
        assert number == 2 or system in PUBLISHED


def test_what_is_garbled_is_left_out() -> None:
    """Cells that two tables share have the same number; omitted cells give a reason."""
    numbers = paper_numbers()
    cells: dict[tuple[str, ...], set[float]] = {}
    for (_, *where), value in numbers.items():
        cells.setdefault(tuple(where), set()).add(value)
    assert all(len(values) == 1 for values in cells.values())
    text = (resources.files("gura_jax.evaluate.hear") / "paper.csv").read_text()
    read = list(csv.DictReader(io.StringIO(text)))
    left_out = [line for line in read if not line["value"]]
    assert len(left_out) == 10
    assert all(bool(line["value"]) != bool(line["left_out"]) for line in read)
    assert {line["table"] for line in left_out} == {"2"}


def test_the_terminal() -> None:
    lines = tables.terminal(compared(ROWS)).splitlines()
    assert lines[0] == "All systems (Table 2 of the paper)"
    assert lines[2].split()[:8] == [DCASE, ONSET, "^", "50.0", "(58.4)", "80.0*", "70.0+", "(64.2)"]
    assert lines[4].split()[:5] == [ESC, "d_prime", "^", "1.500+", "2.250*"]


def test_markdown_and_csv() -> None:
    found = compared(ROWS)
    text = tables.markdown(found)
    assert f"| {ERROR} ↓ | <u>40.0</u> (39.4) | **20.0** |" in text
    assert tables.markdown(compared([row("a|b", ESC, "mAP", 0.5)])).count(r"a\|b") == 1
    cells = list(csv.DictReader(io.StringIO(tables.as_csv(found))))
    assert cells[0] == {
        "table": "2",
        "task": DCASE,
        "metric": ONSET,
        "system": "hubert_xlarge",
        "score": "0.5",
        "std": "",
        "rank": "",
        "paper": "0.584",
    }


def test_latex() -> None:
    text = tables.latex(compared([*ROWS, row("a_b", ESC, "mAP", 0.5)]))
    assert r"\textbf{80.0}" in text
    assert r"\underline{40.0} (39.4)" in text
    assert r"a\_b" in text
    assert "_" not in text.replace(r"\_", "").replace("\\usepackage", "")
    for begin, end in (("{", "}"), (r"\begin", r"\end")):
        assert text.count(begin) == text.count(end)


def test_every_system_has_a_place() -> None:
    names = [*SYSTEMS, "fusion_hubert_base_learned", "hearbaseline.torchcrepe", "mine"]
    table = by_number([row(name, ESC, "top1_acc", 0.1) for name in names])[2]
    assert sorted(table.systems[: len(names)]) == sorted(names)
    assert json.dumps(table)
