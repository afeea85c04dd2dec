"""The protocols of HEAR's evaluation kit (heareval 2021.1.3), and the grid of probes that it trains.

``hear2021`` reproduces the kit, including its bugs; ``fixed`` is the same without them.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from gura_jax.errors import InputError
from gura_jax.evaluate.probes import Point
from gura_jax.evaluate.protocol import Protocol
from gura_jax.evaluate.task import Task

GRID: Mapping[str, Sequence[Any]] = {
    "hidden_layers": [1, 2],
    "hidden_dim": [1024],
    "dropout": [0.1],
    "lr": [3.2e-3, 1e-3, 3.2e-4, 1e-4],
    "initialization": ["xavier_uniform", "xavier_normal"],
    "batch_size": [1024],
    "max_epochs": [500],
    "check_val_every_n_epoch": [3],
    "patience": [20],
}
# What a task may ask for: type, least and greatest value. Values outside are mistakes, or malicious.
LIMITS: Mapping[str, tuple[type, float, float]] = {
    "hidden_layers": (int, 0, 16),
    "hidden_dim": (int, 1, 1 << 15),
    "dropout": (float, 0, 0.99),
    "lr": (float, 0, 1e3),
    "batch_size": (int, 1, 1 << 24),
    "max_epochs": (int, 1, 100_000),
    "check_val_every_n_epoch": (int, 1, 100_000),
    "patience": (int, 1, 100_000),
}
MOST_VALUES = 100  # of a parameter of the grid
TASK_GRIDS: Mapping[str, Mapping[str, Sequence[Any]]] = {"dcase2016_task2": {"check_val_every_n_epoch": [10]}}
GRID_POINTS = 8
GRID_SEED = 42  # of the kit's shuffle; fixed, so that every seed of the probes trains the same points
SHOWN = 100  # characters of a value in a message


def grid_points(task: Task) -> list[Point]:
    """List the points of the grid that are trained, in order.

    Raises:
        InputError: the task names unknown parameters, or values out of range.
    """
    grid = {**GRID, **TASK_GRIDS.get(task.task_name, {}), **task.grid}
    if unknown := sorted(set(grid) - set(GRID)):
        raise InputError(f"{task.folder}: expected a grid of {', '.join(GRID)}, found {', '.join(unknown)}")
    for name, values in grid.items():
        if len(values) > MOST_VALUES or not all(_allowed(name, value) for value in values):
            raise InputError(f"{task.folder}: expected a grid with {_described(name)}, found {str(values)[:SHOWN]}")
    names = sorted(grid)
    points = [
        Point(**dict(zip(names, values, strict=True))) for values in itertools.product(*(grid[name] for name in names))
    ]
    random.Random(GRID_SEED).shuffle(points)
    for point in points:
        if point.max_epochs < point.check_val_every_n_epoch:
            raise InputError(
                f"{task.folder}: expected a grid whose max_epochs reach the first validation, found {point}"
            )
    return points[:GRID_POINTS]


def _allowed(name: str, value: Any) -> bool:
    if name not in LIMITS:
        return value in GRID[name]
    kind, least, greatest = LIMITS[name]
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and least <= value <= greatest


def _described(name: str) -> str:
    if name not in LIMITS:
        return f"{name} of {', '.join(GRID[name])}"
    kind, least, greatest = LIMITS[name]
    return f"{name}, at most {MOST_VALUES} of type {kind.__name__} from {least} to {greatest}"


PROTOCOLS = {name: Protocol(name, *[name == "fixed"] * 6, points=grid_points) for name in ("hear2021", "fixed")}
