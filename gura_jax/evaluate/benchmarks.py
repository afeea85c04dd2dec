"""The table of benchmarks: tasks in, scores out. A benchmark is one module or folder, and one row."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gura_jax.errors import InputError
from gura_jax.evaluate.hear import paper, protocol, tasks
from gura_jax.evaluate.protocol import Protocol
from gura_jax.evaluate.tables import Comparison
from gura_jax.evaluate.task import Task


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: name of the benchmark.
        find_tasks: finds the task folders in a folder, which may be one itself. Raises InputError if there are none.
        read_task: reads a task folder. Raises InputError if it is malformed.
        protocols: how probes are trained and chosen, by name; no two benchmarks share a name.
        scores_file: name of a task's score file.
        comparisons: published comparisons of systems.
        published: published scores of a task, given its name, by number of the comparison, system and metric.
    """

    name: str
    find_tasks: Callable[[Path], list[Path]]
    read_task: Callable[[Path], Task]
    protocols: Mapping[str, Protocol]
    scores_file: str
    comparisons: Sequence[Comparison]
    published: Callable[[str], Mapping[tuple[int, str, str], float]]


BENCHMARKS: dict[str, Benchmark] = {
    row.name: row
    for row in (
        Benchmark(
            name="hear",
            find_tasks=tasks.find_tasks,
            read_task=tasks.read_task,
            protocols=protocol.PROTOCOLS,
            scores_file="test.predicted-scores.json",
            comparisons=paper.COMPARISONS,
            published=paper.published,
        ),
    )
}


def find_protocol(name: str) -> tuple[Benchmark, Protocol]:
    """Find a protocol by its name, and its benchmark.

    Raises:
        InputError: no benchmark has it.
    """
    found = {key: (row, value) for row in BENCHMARKS.values() for key, value in row.protocols.items()}
    if name not in found:
        raise InputError(f"--protocol: expected one of {', '.join(found)}, found {name!r}")
    return found[name]
