"""Demonstrate HEAR's evaluation from scratch: make tasks, evaluate two systems, compare them, draw maps.

Run by ``make evaluate-demo``. CREPE has its published weights. The fusion is small and random: it shows the scores of
untrained features under the protocol.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import make_tasks

from gura_jax.errors import GuraError
from gura_jax.evaluate.report import read_table

ROOT = Path(__file__).parent.parent
OUT = ROOT / "demo" / "evaluate"
TASKS, RESULTS = OUT / "tasks", OUT / "results"
CREPE, RANDOM = "crepe", "fusion_cat_xwc-tiny-random"
PITCH = "pitch-v1-demo"
STRONG = 0.9  # CREPE's accuracy on NSynth's notes in the paper: 90.0 %
CLEARLY = 4.0  # times fewer errors than the random fusion; a ratio of accuracies near 1 would say little


def gura_jax(*arguments: str | Path) -> None:
    """Run the command line, and print the command."""
    shown = [os.path.relpath(a, ROOT) if isinstance(a, Path) else a for a in arguments]
    print(f"\n$ gura-jax {shlex.join(shown)}", flush=True)
    program = Path(sys.executable).with_name("gura-jax")
    status = subprocess.run([program, *map(str, arguments)], cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, help="recordings of spoken digits, for two more tasks")
    digits = parser.parse_args().digits
    print("making tasks: notes, instruments, beats, words, speakers" + (", digits" if digits else ""), flush=True)
    try:
        make_tasks.make_tasks(TASKS, digits)
    except GuraError as error:
        sys.exit(f"error: {error}")

    gura_jax("convert", "crepe-full")
    gura_jax("evaluate", TASKS, "--systems", "crepe", "--out", RESULTS)
    random = "--size", "tiny", "--weights", "random"
    gura_jax("evaluate", TASKS, "--systems", "fusion_cat_xwc", *random, "--out", RESULTS)

    scenes = sorted(path for path in (RESULTS / "embeddings" / CREPE).iterdir() if "beats" not in path.name)
    outs = "--out", OUT / "tasks.html", "--out", OUT / "tasks.png"
    gura_jax("plot", *scenes, *outs)
    outs = "--out", OUT / "pitch.html", "--out", OUT / "pitch.png"
    gura_jax("plot", RESULTS / "embeddings" / CREPE / PITCH, "--inputs", TASKS / PITCH, "--color", "labels", *outs)

    scores = {row.system: row.score for row in read_table(RESULTS) if (row.task, row.metric) == (PITCH, "pitch_acc")}
    print(f"\npitch_acc: {CREPE} {scores[CREPE]:.3f}, {RANDOM} {scores[RANDOM]:.3f}")
    if not (scores[CREPE] >= STRONG and CLEARLY * (1 - scores[CREPE]) <= 1 - scores[RANDOM]):
        sys.exit(f"expected CREPE to have at least {STRONG}, and {CLEARLY:g} times fewer errors than random weights")
    print("Open demo/evaluate/tasks.html and demo/evaluate/pitch.html: a click plays a clip.")


if __name__ == "__main__":
    main()
