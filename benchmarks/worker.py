"""One contender in a process of its own: reads a workload's name a line, answers with a line of JSON.

python benchmarks/worker.py PEER SYSTEM WEIGHTS_FOLDER
"""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import work
from peers import PEERS, Loaded, with_gura_jax

from gura_jax import System


def main() -> None:
    # What libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    contender, system, folder = sys.argv[1:]
    start = time.perf_counter()
    loaded = load(contender, work.CASES[system], folders(Path(folder), system))
    print(json.dumps({"load_seconds": time.perf_counter() - start, "peak_bytes": peak()}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(loaded, *line.split())), file=answers, flush=True)


def folders(root: Path, system: str) -> dict[str, Path]:
    """Where the PyTorch weights of each member of a system are."""
    return {m.name: root / str(m.encoder) for m in work.CASES[system].members}


def load(contender: str, system: System, weights: Mapping[str, Path]) -> Loaded:
    """A peer by its name, or ours by ``gura_jax[:OPTION=VALUE ...]``."""
    if contender in PEERS:
        return PEERS[contender].load(system, weights)
    return with_gura_jax(system, weights, **dict(option.split("=") for option in contender.split(":")[1:]))


def answer(loaded: Loaded, command: str, path: str = "") -> dict[str, float]:
    if command == "product":
        return {"seconds": timed(loaded.product)}
    audio = work.clips(command)
    reset_peak()
    start = time.perf_counter()
    frames = loaded.embed(audio)
    seconds = time.perf_counter() - start
    if path:
        np.savez(path, *[np.asarray(x) for x in frames])
    return {"seconds": seconds, "peak_bytes": peak()}


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak() -> int:
    """Peak resident memory of this process in bytes, since :func:`reset_peak` where the kernel can tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
