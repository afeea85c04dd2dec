"""Run HEAR's own validator and evaluation kit on every system: prints a line each; exits with 1 if one fails.

python tests/hear/run.py [SYSTEM...] [--validate-only]

Every system runs at size tiny with random weights, and a system file; crepe also with published weights. Five tasks.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks import write_tasks  # pyright: ignore[reportMissingImports] - beside this file

from gura_jax import SYSTEMS

CLIENT = Path(__file__).parent / "client.py"
CLIENT_SECONDS = 3600
CONVERT = "from gura_jax.cli import main; main()", "convert", "crepe-full"
TINY = {"weights": "random", "size": "tiny"}
SYSTEM_FILE = """
combination = "interleave"
feature_size = 64

[[members]]
encoder = "hubert-base"
layers = "mean"

[[members]]
encoder = "crepe-tiny"
"""


class Case(NamedTuple):
    """A module, with its options and weights."""

    module: str
    options: Mapping[str, Any]
    weights: Path | None = None  # a model_file_path

    @property
    def label(self) -> str:
        return f"{self.module} {'random' if 'weights' in self.options else 'published weights'}"


class FailedError(Exception):
    """A client failed; the message is the end of its output."""


def cases(folder: Path) -> Iterator[Case]:
    for name in SYSTEMS:
        yield Case(name, TINY)
    (folder / "own.toml").write_text(SYSTEM_FILE)
    yield Case("custom", TINY | {"system": str(folder / "own.toml")})
    yield Case("crepe", {}, folder / "checkpoints")


def call(*arguments: object, cwd: Path, **environment: str) -> str:
    """Run a Python process; returns its output."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        env=os.environ | environment,
        cwd=cwd,
        timeout=CLIENT_SECONDS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        raise FailedError("\n".join(result.stdout.splitlines()[-20:]))
    return result.stdout


def validate(case: Case, folder: Path) -> str:
    """Run the validator, which takes options only from the environment; returns its last line."""
    weights = ["--model", case.weights] if case.weights else []
    environment = {"GURA_JAX_HEAR_OPTIONS": json.dumps(case.options)}
    module = f"gura_jax.hear.{case.module}"
    return call(CLIENT, "hearvalidator.validate", module, *weights, cwd=folder, **environment).splitlines()[-1]


def evaluate(case: Case, folder: Path, tasks: list[str]) -> dict[str, float]:
    """Run heareval; returns the primary test score of each task."""
    embeddings = folder / "embeddings" / case.label.replace(" ", "-")
    arguments = ["--tasks-dir", folder / "tasks", "--embeddings-dir", embeddings]
    arguments += ["--model", case.weights] if case.weights else []
    arguments += ["--model-options", json.dumps(case.options)]
    call(CLIENT, "heareval.embeddings.runner", f"gura_jax.hear.{case.module}", *arguments, cwd=folder)
    (module,) = embeddings.iterdir()
    embedded = [module / task for task in tasks]
    call(CLIENT, "heareval.predictions.runner", *embedded, "--grid", "faster", "--grid-points", 2, cwd=folder)
    scores = {}
    for task in embedded:
        found = json.loads((task / "test.predicted-scores.json").read_text())
        metric = json.loads((task / "task_metadata.json").read_text())["evaluation"][0]
        scores[task.name.split("-")[0]] = aggregated(found, metric)
        if not math.isfinite(scores[task.name.split("-")[0]]):
            raise FailedError(f"{task.name}: expected a finite {metric}, found {found}")
    return scores


def aggregated(found: Mapping[str, Any], metric: str) -> float:
    """Return the test score, or its mean over folds."""
    folds = found.get("aggregated_scores")
    return float(folds[f"test_{metric}_mean"] if folds else found["test"][f"test_{metric}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help="of gura_jax.SYSTEMS, or custom; by default all")
    parser.add_argument("--validate-only", action="store_true", help="no heareval")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")
        tasks = list(write_tasks(folder / "tasks"))
        call("-c", *CONVERT, "--out", folder / "checkpoints", cwd=folder)
        for case in cases(folder):
            if arguments.systems and case.module not in arguments.systems:
                continue
            start = time.perf_counter()
            try:
                line = validate(case, folder)
                if not arguments.validate_only:
                    line += "  " + "  ".join(f"{k} {v:.2f}" for k, v in evaluate(case, folder, tasks).items())
            except (FailedError, subprocess.TimeoutExpired) as error:
                failed, line = True, f"FAILED\n{error}"
            print(f"{case.label:36} {line}  ({time.perf_counter() - start:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
