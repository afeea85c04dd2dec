"""From the start of a process to its first embedding, with a cold and a warm compilation cache.

python benchmarks/startup.py [SYSTEM] [--weights pretrained|random]

A clip of 4 seconds; the command line's own settings. Stages as the child sees them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

CHILD = """
import json, sys, time
start = time.time()
import jax
jax_imported = time.time()
import gura_jax, gura_jax.parallel
imported = time.time()
gura_jax.parallel.cache_compilations()
import numpy as np
model = gura_jax.load_model(sys.argv[1], weights=sys.argv[2])
loaded = time.time()
model.scene_embeddings(np.zeros((1, 64000), np.float32))
print(json.dumps({"began": start, "jax": jax_imported, "ours": imported, "loaded": loaded, "embedded": time.time()}))
"""


def run(system: str, weights: str, cache: str) -> dict[str, float]:
    """Seconds of each stage."""
    start = time.time()
    command = [sys.executable, "-c", CHILD, system, weights]
    environment = os.environ | {"XDG_CACHE_HOME": cache} | CHECKPOINTS
    out = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)
    return {
        "interpreter": out["began"] - start,
        "import jax": out["jax"] - out["began"],
        "import gura_jax": out["ours"] - out["jax"],
        "load": out["loaded"] - out["ours"],
        "first embedding": out["embedded"] - out["loaded"],
        "all": out["embedded"] - start,
    }


CHECKPOINTS: dict[str, str] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="?", default="crepe")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    from gura_jax import checkpoint

    CHECKPOINTS["GURA_JAX_CHECKPOINTS"] = str(checkpoint.checkpoint_folder())
    with tempfile.TemporaryDirectory() as cache:
        cold = run(arguments.system, arguments.weights, cache)
        warm = [run(arguments.system, arguments.weights, cache) for _ in range(arguments.rounds)]
    print(
        f"{arguments.system}, seconds; warm: the median of {arguments.rounds}\n\n| stage | cold | warm |\n|---|---|---|"
    )
    for stage in cold:
        print(f"| {stage} | {cold[stage]:.2f} | {statistics.median(each[stage] for each in warm):.2f} |")


if __name__ == "__main__":
    main()
