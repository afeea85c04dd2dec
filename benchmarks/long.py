"""Long clips, whole: time and peak memory of the process by the clip's length, and equality with the plain path.

python benchmarks/long.py [SYSTEM] [--seconds 30 60 600] [--plain 30]

``--plain`` computes that length also with everything at once, as far as memory allows, and prints the distance.
Ten minutes of fusion_cat_xwc take half an hour on two cores.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import work
from run import machine
from torch_recipe import random_weights
from worker import folders, peak, reset_peak

from gura_jax import load_model
from gura_jax.backend import PLATFORMS

HERE = Path(__file__).parent
EVERYTHING = {"frames": 1 << 30, "scores": 1 << 50, "tokens": 1 << 50, "crepe_frames": 1 << 30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="?", default="fusion_cat_xwc", choices=work.CASES)
    parser.add_argument("--seconds", type=float, nargs="+", default=[30, 60, 600])
    parser.add_argument("--plain", type=float)
    parser.add_argument("--weights", type=Path, default=HERE / ".weights")
    arguments = parser.parse_args()
    weights = folders(arguments.weights, arguments.system)
    system = work.CASES[arguments.system]
    for config, path in zip(work.configs(system), weights.values(), strict=True):
        if not path.exists():
            random_weights(config, path)
    about = machine()
    print(f"{about['date']}; {about['machine']}; jax {about['versions']['jax']}; {system.name}, float32")
    model = load_model(system, weights=weights)
    print(
        f"loaded: {resident() / 2**30:.2f} GiB\n\n| seconds | time, s | peak, GiB | frames |\n|---|---|---|---|",
        flush=True,
    )
    for seconds in arguments.seconds:
        clip = work.voice(seconds, 0)
        reset_peak()
        start = time.perf_counter()
        frames = model.timestamp_embeddings([clip])[0][0]
        assert np.isfinite(frames).all()
        taken = time.perf_counter() - start
        print(f"| {seconds:g} | {taken:.1f} | {peak() / 2**30:.2f} | {frames.shape} |", flush=True)
    if arguments.plain:
        clip = work.voice(arguments.plain, 0)
        frames = model.timestamp_embeddings([clip])[0][0]
        PLATFORMS[model.platform.name] = dataclasses.replace(model.platform, **EVERYTHING)
        plain = load_model(system, weights=weights).timestamp_embeddings([clip])[0][0]
        distance = np.linalg.norm(frames - plain) / np.linalg.norm(plain)
        print(f"\n{arguments.plain:g} s, in blocks and at once: relative distance {distance:.1e}")


def resident() -> int:
    """Resident memory of this process in bytes."""
    reset_peak()
    return peak()


if __name__ == "__main__":
    main()
