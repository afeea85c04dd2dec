"""A stream of files of any length through the HEAR modules, one at a time, beside PyTorch with the same weights.

python benchmarks/hear_stream.py [SYSTEM...] [--clips 64] [--out benchmarks/results/cpu-hear.md]

What heareval does with a task of mixed lengths. Each contender has a process of its own and a cold start; file by file
they take turns, and the sums of their times are compared: everything that JAX compiles on the way is in its sum, and
loading is in neither.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import work
from run import machine
from torch_recipe import random_weights

from gura_jax import ENCODERS

HERE = Path(__file__).parent
SYSTEMS = ("crepe-tiny", "crepe", "hubert-base")
SHORTEST, LONGEST = 0.5, 30.0  # seconds
SAME = 1e-4  # relative distance of the frames, over which two contenders did not do the same work


def stream(clips: int) -> list[float]:
    """Seconds of each file."""
    return np.random.default_rng(0).uniform(SHORTEST, LONGEST, clips).tolist()


def child(contender: str, system: str, weights: Path, folder: Path) -> None:
    """Reads the number and length of a file a line, answers with seconds and the shapes compiled so far."""
    answers, sys.stdout = sys.stdout, sys.stderr
    shapes: list[str] = []
    embed = (hear if contender == "gura_jax" else recipe)(system, weights, folder, shapes)
    print(json.dumps("loaded"), file=answers, flush=True)
    for line in sys.stdin:
        number, seconds = line.split()
        clip = work.voice(float(seconds), int(number))
        start = time.perf_counter()
        frames = embed(clip)
        taken = time.perf_counter() - start
        np.save(folder / f"{contender}.npy", frames)
        print(json.dumps({"seconds": taken, "shapes": len(shapes)}), file=answers, flush=True)


def hear(system: str, weights: Path, folder: Path, shapes: list[str]) -> Callable[[np.ndarray], Any]:
    """The module of a user's own system, from weights as PyTorch has them."""
    import torch

    from gura_jax.hear import interface

    class Shapes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shapes.append(record.getMessage())

    logging.getLogger("gura_jax.parallel").setLevel(logging.INFO)
    logging.getLogger("gura_jax.parallel").addHandler(Shapes())
    (member,) = work.CASES[system].members
    layers = "" if "crepe" in str(member.encoder) else f'layers = "{member.layers}"'
    (folder / "system.toml").write_text(f'[[members]]\nencoder = "{member.encoder}"\n{layers}\n')
    path = str(weights / str(member.encoder))
    model = interface.load(None, path, {"system": str(folder / "system.toml")})
    return lambda clip: interface.get_timestamp_embeddings(torch.from_numpy(clip)[None], model)[0][0].numpy()


def recipe(system: str, weights: Path, folder: Path, shapes: list[str]) -> Callable[[np.ndarray], Any]:
    import torch
    from torch_recipe import Recipe

    torch.set_num_threads(os.cpu_count() or 1)
    case = work.CASES[system]
    found = Recipe.load(case, {m.name: weights / str(m.encoder) for m in case.members}, "eager")
    return lambda clip: found.timestamp_embeddings([clip])[0]


class Contender:
    def __init__(self, name: str, system: str, weights: Path, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", name, system, weights, folder],
            # Nothing that was compiled before.
            env={k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def ask(self, number: int, seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(number, seconds, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender stopped with exit code {self.process.wait()}")
        return json.loads(line)


def measure(system: str, weights: Path, clips: int) -> str:
    """A row of the table."""
    (member,) = work.CASES[system].members
    if not (weights / str(member.encoder)).exists():
        random_weights(ENCODERS[str(member.encoder)].config, weights / str(member.encoder))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = ("gura_jax", "pytorch")
        pair = [Contender(contender, system, weights, folder) for contender in names]
        totals, shapes, distance = [0.0, 0.0], 0, 0.0
        try:
            for number, seconds in enumerate(stream(clips)):
                for i, contender in enumerate(pair):
                    answer = contender.ask(number, seconds)
                    totals[i] += answer["seconds"]
                    shapes = answer["shapes"] or shapes
                a, b = (np.load(folder / f"{contender}.npy") for contender in names)
                distance = max(distance, float(np.linalg.norm(a - b) / np.linalg.norm(b)))
        finally:
            for contender in pair:
                contender.process.kill()
                contender.process.wait()
    if not distance <= SAME:
        raise RuntimeError(f"{system}: the contenders differ by {distance:.1e}")
    ours, theirs = totals
    return f"| {system} | {ours:.1f} | {theirs:.1f} | **{theirs / ours:.2f}** | {shapes} | {distance:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=SYSTEMS, help="of one member")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--weights", type=Path, default=HERE / ".weights", help="where random weights are kept")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    seconds = stream(arguments.clips)
    lines = [
        f"{about['date']}; {about['machine']}; Python {about['python']}; {versions}. {len(seconds)} files of "
        f"{min(seconds):.1f} to {max(seconds):.1f} s, {sum(seconds):.0f} s in all, one at a time; random weights, the "
        "same for both; what is compiled is counted.",
        "",
        "| system | time, s | PyTorch's, s | ratio | shapes compiled | distance |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for system in arguments.systems:
        lines.append(measure(system, arguments.weights, arguments.clips))
        print(lines[-1], flush=True)
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        warnings.simplefilter("ignore")
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
    else:
        main()
