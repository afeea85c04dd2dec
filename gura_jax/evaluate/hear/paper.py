"""The paper's comparisons on HEAR, Tables 2 to 6, and its numbers."""

import csv
import functools
import io
from collections.abc import Mapping
from importlib import resources

from gura_jax.evaluate.metrics import METRICS
from gura_jax.evaluate.tables import Comparison

NUMBERS = "paper.csv"  # beside this file

COMPARISONS = (
    Comparison(2, "All systems (Table 2 of the paper)"),
    Comparison(
        3,
        "With and without layer fusion (Table 3 of the paper)",
        ("wav2vec2_large", "fusion_wav2vec2", "hubert_xlarge", "fusion_hubert_xlarge"),
    ),
    Comparison(4, "Average and concatenation (Table 4 of the paper)", ("avg_hubert_wav2vec2", "cat_hubert_wav2vec2")),
    Comparison(5, "HuBERT with and without CREPE (Table 5 of the paper)", ("hubert_xlarge", "avg_hubert_crepe")),
    Comparison(6, "wav2vec 2.0 and CREPE with and without HuBERT (Table 6 of the paper)", ("cat_wc", "cat_xwc")),
)


@functools.cache
def paper_numbers() -> Mapping[tuple[int, str, str, str, str], float]:
    """Read the paper's numbers by table, system, task, mode and metric, unscaled.

    The text of the paper at hand is garbled in places; ``paper.csv`` says which cells are left out, and why.
    """
    text = (resources.files("gura_jax.evaluate.hear") / NUMBERS).read_text(encoding="utf-8")
    return {
        (int(row["table"]), row["system"], row["task"], row["mode"], row["metric"]): float(row["value"])
        / METRICS[row["metric"]].scale
        for row in csv.DictReader(io.StringIO(text))
        if row["value"]
    }


def published(folder: str) -> Mapping[tuple[int, str, str], float]:
    """Find the paper's numbers of a task, by table, system and metric.

    Args:
        folder: name of the task's folder, ``<task>-<version>-<mode>``.
    """
    return {
        (table, system, metric): value
        for (table, system, task, mode, metric), value in paper_numbers().items()
        if folder.startswith(f"{task}-") and folder.endswith(f"-{mode}")
    }
