"""Embedding speed and memory: gura_jax beside PyTorch (and transformers' Flax), with the same weights.

python benchmarks/run.py [--systems ...] [--workloads ...] [--peers ...] [--rounds 3] [--out benchmarks/results/NAME]

Each contender has a process of its own and all cores; two at a time, they take turns in one run. Writes NAME.json
and NAME.md. Needs jax, flax, torch, transformers and numpy alone.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import work
from torch_recipe import random_weights

HERE = Path(__file__).parent
PEERS = ("eager", "compile", "bfloat16", "flax")
PRODUCTS = 5  # matrix products a round; the fastest of all is the machine's rate
SAME = {"bfloat16": 0.2}  # relative distance of the frames, over which two contenders did not do the same work
SAME_FLOAT32 = 1e-4


class Contender:
    """A worker process; see worker.py."""

    def __init__(self, peer: str, system: str, weights: Path, flax_path: Path | None) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        if peer == "flax":
            environment["PYTHONPATH"] = str(flax_path)
        self.process = subprocess.Popen(
            [sys.executable, HERE / "worker.py", peer, system, weights],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.peer = peer
        self.loaded = self._answer()

    def ask(self, *words: object) -> dict[str, float]:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.peer} stopped with exit code {self.process.wait()}: set VERBOSE=1 to see why")
        return json.loads(line)


@contextlib.contextmanager
def contenders(peers: list[str], system: str, weights: Path, flax_path: Path | None) -> Iterator[list[Contender]]:
    started: list[Contender] = []
    try:
        for peer in peers:
            started.append(Contender(peer, system, weights, flax_path))
        yield started
    finally:
        for contender in started:
            contender.process.kill()
            contender.process.wait()


def compare(system: str, peer: str, workloads: list[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a workload: both contenders' times, in turns."""
    ours, rounds = arguments.ours, arguments.rounds
    with (
        contenders([ours, peer], system, arguments.weights, arguments.flax_path) as pair,
        tempfile.TemporaryDirectory() as folder,
    ):
        rate = 0.0
        for workload in workloads:
            outputs, first, times, peaks = [], [], [[], []], [0.0, 0.0]
            for i, contender in enumerate(pair):  # compiles; and shows that both compute the same
                path = Path(folder) / f"{i}.npz"
                first.append(contender.ask(workload, path)["seconds"])
                outputs.append(np.load(path))
            distance = max(_distance(outputs[0][k], outputs[1][k]) for k in outputs[0].files)
            if not distance <= SAME.get(peer, SAME_FLOAT32):
                raise RuntimeError(f"{system} {workload}: {ours} and {peer} differ by {distance:.1e}")
            for _ in range(rounds):
                for i, contender in enumerate(pair):
                    answer = contender.ask(workload)
                    times[i].append(answer["seconds"])
                    peaks[i] = max(peaks[i], answer["peak_bytes"])
                    fastest = min(contender.ask("product")["seconds"] for _ in range(PRODUCTS))
                    rate = max(rate, 2 * 2048**3 / fastest / 1e9)
            medians = [statistics.median(each) for each in times]
            audio, flops = sum(work.WORKLOADS[workload]), work.flops(work.CASES[system], workload)
            yield {
                "system": system,
                "workload": workload,
                "ours": ours,
                "peer": peer,
                "seconds": times[0],
                "peer_seconds": times[1],
                "ratio": statistics.median(b / a for a, b in zip(*times, strict=True)),
                "audio_seconds_per_second": audio / medians[0],
                "gflop": flops / 1e9,
                "gflop_per_second": flops / medians[0] / 1e9,
                "product_gflop_per_second": rate,
                "share_of_product_rate": flops / medians[0] / 1e9 / rate,
                "compile_seconds": first[0] - medians[0],
                "peer_first_seconds": first[1],
                "peak_bytes": peaks[0],
                "peer_peak_bytes": peaks[1],
                "distance": distance,
            }


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


HEADINGS = (
    "system",
    "clips",
    "against",
    "time, s",
    "its time, s",
    "ratio",
    "audio s / s",
    "GFLOP/s",
    "of matrix product",
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
        f"{100 * row['share_of_product_rate']:.0f} %",
        f"{row['compile_seconds']:.1f}",
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['peer_peak_bytes'] / 1e9:.2f}",
        f"{row['distance']:.0e}",
    )
    return "| " + " | ".join(cells) + " |"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import jax

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    packages = ("gura-jax", "jax", "flax", "torch", "transformers", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores of {cpu}, {jax.devices()[0].device_kind} for JAX",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=work.CASES, default=list(work.CASES))
    parser.add_argument("--workloads", nargs="+", choices=work.WORKLOADS, default=["4x4", "16x1", "1x30", "mixed"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["eager"])
    parser.add_argument("--ours", default="gura_jax", help="gura_jax[:dtype=bfloat16][:precision=default]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flax-path", type=Path, help="folder with transformers 4, for the peer flax")
    parser.add_argument("--weights", type=Path, default=HERE / ".weights", help="where random weights are kept (7 GB)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu", help="NAME of NAME.json and NAME.md")
    arguments = parser.parse_args()

    for encoder in dict.fromkeys(str(m.encoder) for name in arguments.systems for m in work.CASES[name].members):
        if not (arguments.weights / encoder).exists():
            random_weights(encoder, arguments.weights / encoder)
    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['date']}; {about['machine']}; Python {about['python']}; {versions}. Random weights, "
        f"the same for both; float32 unless named; medians of {arguments.rounds} rounds in turns.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
    ]
    print("\n".join(lines), flush=True)
    rows = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for system in arguments.systems:
        for peer in arguments.peers:
            if peer == "flax" and system != "fusion_wav2vec2":  # transformers' Flax has no HuBERT
                continue
            for row in compare(system, peer, arguments.workloads, arguments):
                rows.append(row)
                lines.append(markdown_row(row))
                print(lines[-1], flush=True)
                arguments.out.with_suffix(".json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
                arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
