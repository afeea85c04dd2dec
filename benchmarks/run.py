"""Embedding speed and memory: gura_jax beside PyTorch and other runtimes, with the same weights.

python benchmarks/run.py [--systems ...] [--workloads ...] [--peers ...] [--rounds 3] [--out benchmarks/results/NAME]

Each contender has a process of its own and all cores; two at a time, they take turns in one run. Writes NAME.json
and NAME.md. Needs jax, flax, torch, transformers and numpy alone, but for the peers that have packages of their own.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import work
from peers import HERE, MATRIX, PEERS, Peer
from torch_recipe import random_weights

import gura_jax
from gura_jax.backend import processor

PRODUCTS = 5  # matrix products of a contender in a round; the median of the faster one's is the machine's rate then


class Contender:
    """A worker process; see worker.py."""

    def __init__(self, name: str, system: str, weights: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, HERE / "worker.py", name, system, weights],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=_output(),
            text=True,
            env=_environment(PEERS.get(name)),
        )
        self.name = name
        self.loaded = self._answer()

    def ask(self, *words: object) -> dict[str, float]:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} stopped with exit code {self.process.wait()}: set VERBOSE=1 to see why")
        return json.loads(line)


def _output() -> int | None:
    """Where what contenders print goes."""
    return None if os.environ.get("VERBOSE") else subprocess.DEVNULL


def _environment(peer: Peer | None) -> dict[str, str]:
    """For a process of ours (None), or of a peer's with its own packages."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    if peer is not None and peer.package is not None:
        paths = [str(peer.package.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


@contextlib.contextmanager
def contenders(names: Sequence[str], system: str, weights: Path) -> Iterator[list[Contender]]:
    started: list[Contender] = []
    try:
        for name in names:
            started.append(Contender(name, system, weights))
        yield started
    finally:
        for contender in started:
            contender.process.kill()
            contender.process.wait()


def compare(system: str, peer: str, workloads: list[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a workload: both contenders' times, in turns."""
    ours, rounds = arguments.ours, arguments.rounds
    with contenders([ours, peer], system, arguments.weights) as pair, tempfile.TemporaryDirectory() as folder:
        for workload in workloads:
            outputs, first, times, peaks, rates = [], [], [[], []], [0.0, 0.0], []
            for i, contender in enumerate(pair):  # compiles; and shows that both compute the same
                path = Path(folder) / f"{i}.npz"
                first.append(contender.ask(workload, path)["seconds"])
                outputs.append(np.load(path))
            distance = max(_distance(outputs[0][k], outputs[1][k]) for k in outputs[0].files)
            if not distance <= PEERS[peer].same:
                raise RuntimeError(f"{system} {workload}: {ours} and {peer} differ by {distance:.1e}")
            for _ in range(rounds):
                products = []
                for i, contender in enumerate(pair):
                    answer = contender.ask(workload)
                    times[i].append(answer["seconds"])
                    peaks[i] = max(peaks[i], answer["peak_bytes"])
                    products.append(statistics.median(contender.ask("product")["seconds"] for _ in range(PRODUCTS)))
                rates.append(2 * MATRIX**3 / 1e9 / min(products))
            medians = [statistics.median(each) for each in times]
            seconds = work.WORKLOADS[workload]
            gflop = work.flops(work.configs(work.CASES[system]), seconds) / 1e9
            yield {
                "system": system,
                "workload": workload,
                "ours": ours,
                "peer": peer,
                "seconds": times[0],
                "peer_seconds": times[1],
                "ratio": statistics.median(b / a for a, b in zip(*times, strict=True)),
                "audio_seconds_per_second": sum(seconds) / medians[0],
                "gflop": gflop,
                "gflop_per_second": gflop / medians[0],
                "peer_gflop_per_second": gflop / medians[1],
                "product_gflop_per_second": rates,
                "share_of_product": _share(gflop, times[0], rates),
                "peer_share_of_product": _share(gflop, times[1], rates),
                "compile_seconds": first[0] - medians[0],
                "peer_first_seconds": first[1],
                "peak_bytes": peaks[0],
                "peer_peak_bytes": peaks[1],
                "distance": distance,
            }


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return np.inf
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _share(gflop: float, seconds: Sequence[float], rates: Sequence[float]) -> float:
    """Of the machine's rate, each round's time beside that round's: a shared machine is not always as fast."""
    return statistics.median(gflop / time / rate for time, rate in zip(seconds, rates, strict=True))


HEADINGS = (
    "system",
    "clips",
    "against",
    "time, s",
    "its time, s",
    "ratio",
    "audio s / s",
    "GFLOP/s",
    "of product",
    "its share",
    "compile, s",
    "peak, GB",
    "its peak, GB",
    "distance",
)


def markdown_row(row: Mapping[str, Any]) -> str:
    seconds, peer_seconds = (statistics.median(row[key]) for key in ("seconds", "peer_seconds"))
    cells = (
        row["system"] + row["ours"].removeprefix("gura_jax").replace(":", " "),
        row["workload"],
        row["peer"],
        f"{seconds:.2f}",
        f"{peer_seconds:.2f}",
        f"**{row['ratio']:.2f}**",
        f"{row['audio_seconds_per_second']:.1f}",
        f"{row['gflop_per_second']:.0f}",
        f"{100 * row['share_of_product']:.0f} %",
        f"{100 * row['peer_share_of_product']:.0f} %",
        f"{row['compile_seconds']:.1f}",
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['peer_peak_bytes'] / 1e9:.2f}",
        f"{row['distance']:.0e}",
    )
    return "| " + " | ".join(cells) + " |"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import jax

    packages = ("jax", "flax", "torch", "transformers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {jax.devices()[0].device_kind} for JAX",
        "python": platform.python_version(),
        "versions": {"gura-jax": gura_jax.__version__} | versions,
    }


def prepare(systems: Iterable[str], peers: Iterable[str], weights: Path) -> None:
    """Write what is missing of random weights, and of what peers read in a format of their own."""
    for system in systems:
        for member in work.CASES[system].members:
            if not (weights / str(member.encoder)).exists():
                random_weights(gura_jax.ENCODERS[str(member.encoder)].config, weights / str(member.encoder))
        for peer in map(PEERS.__getitem__, peers):
            if peer.export is None:
                continue
            command = [sys.executable, HERE / "export.py", peer.export, system, weights]
            code = subprocess.call(command, env=_environment(peer), stdout=_output(), stderr=_output())
            if code:
                raise RuntimeError(f"exporting {system} ended with exit code {code}: set VERBOSE=1 to see why")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=work.CASES, default=list(work.CASES))
    parser.add_argument("--workloads", nargs="+", choices=work.WORKLOADS, default=["4x4", "16x1", "1x30", "mixed"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["eager"])
    parser.add_argument("--ours", default="gura_jax", help="gura_jax[:dtype=bfloat16][:precision=default]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", type=Path, default=HERE / ".weights", help="where random weights are kept (7 GB)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu", help="NAME of NAME.json and NAME.md")
    arguments = parser.parse_args()

    packages = {name: package for name in arguments.peers if (package := PEERS[name].package) is not None}
    for name, package in packages.items():
        if package.version is None:
            target = package.folder.relative_to(HERE.parent) / "installed"
            parser.error(f"--peers {name}: expected the package {package.name}, found none: run make {target}")
    about = machine() | {"peers": {name: f"{package.name} {package.version}" for name, package in packages.items()}}
    prepare(arguments.systems, arguments.peers, arguments.weights)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    versions += "".join(f"; {name}: {version}" for name, version in about["peers"].items())
    lines = [
        f"{about['date']}; {about['machine']}; Python {about['python']}; {versions}. Random weights, "
        f"the same for both; float32 unless named; medians of {arguments.rounds} rounds in turns.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
    ]
    print("\n".join(lines), flush=True)
    rows: list[dict[str, Any]] = []
    table: list[str] = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for system in arguments.systems:
        for peer in arguments.peers:
            known = PEERS[peer].systems
            if known is not None and system not in known:
                continue
            for row in compare(system, peer, arguments.workloads, arguments):
                rows.append(row)
                table.append(markdown_row(row))
                print(table[-1], flush=True)
                arguments.out.with_suffix(".json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
                arguments.out.with_suffix(".md").write_text("\n".join([*lines, *table]) + "\n")


if __name__ == "__main__":
    main()
