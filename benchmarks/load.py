"""Loading converted checkpoints: time and peak memory beside the bytes on disk.

python benchmarks/load.py [SYSTEM] [--weights FOLDER]

Checkpoints of random weights are made in FOLDER, where they are missing. Reading every file once into memory is timed
in turns with loading, each in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
from worker import peak

from gura_jax import ENCODERS, SYSTEMS, Options, checkpoint, load_model
from gura_jax.checkpoint import Manifest, arrays_sha256
from gura_jax.models.families import build_encoder

HERE = Path(__file__).parent


def make(encoder: str) -> None:
    """A checkpoint of random weights."""
    config = ENCODERS[encoder].config
    params = build_encoder(config, Options()).init(jax.random.key(0))
    manifest = Manifest(config, "random, for a benchmark", {}, "", arrays_sha256(params))
    checkpoint.save(checkpoint.checkpoint_folder() / encoder, params, manifest)


def read(folders: list[Path]) -> float:
    """Seconds to read every file once."""
    start = time.perf_counter()
    contents = [path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()]
    seconds = time.perf_counter() - start
    assert contents
    return seconds


def drop_page_cache() -> bool:
    """Have the next read come from the disk; only root can."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def child(system: str) -> None:
    import orbax.checkpoint  # noqa: F401 - its import is not loading

    before = peak()
    start = time.perf_counter()
    model = load_model(system)
    seconds = time.perf_counter() - start
    arrays = sum(array.nbytes for params in model.params.values() for array in params.values())
    print(json.dumps({"seconds": seconds, "peak_bytes": peak(), "before_bytes": before, "array_bytes": arrays}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="?", default="fusion_cat_xwc", choices=SYSTEMS)
    parser.add_argument("--weights", type=Path, default=HERE / ".weights" / "checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=["load", "read"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "load":
        child(arguments.system)
        return
    os.environ["GURA_JAX_CHECKPOINTS"] = str(arguments.weights)
    members = [str(m.encoder) for m in SYSTEMS[arguments.system].members]
    for encoder in members:
        if not (arguments.weights / encoder).exists():
            make(encoder)
    folders = [arguments.weights / encoder for encoder in members]
    if arguments.child == "read":
        print(read(folders))
        return
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    reading, loading, cold = [], [], False
    for _ in range(arguments.rounds):
        for results, what in ((reading, "read"), (loading, "load")):
            cold = drop_page_cache()
            command = [sys.executable, __file__, arguments.system, "--weights", arguments.weights, "--child", what]
            results.append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    seconds = statistics.median(each["seconds"] for each in loading)
    peak_bytes = max(each["peak_bytes"] for each in loading)
    print(
        f"{arguments.system}: {size / 1e9:.2f} GB, read from {'the disk' if cold else 'the page cache'} in "
        f"{statistics.median(reading):.1f} s; loaded in "
        f"{seconds:.1f} s ({seconds / statistics.median(reading):.2f} times); peak {peak_bytes / 1e9:.2f} GB, "
        f"of which {loading[0]['before_bytes'] / 1e9:.2f} GB were Python's own: "
        f"{peak_bytes / size:.2f} times the weights; {loading[0]['array_bytes'] / 1e9:.2f} GB on the devices"
    )


if __name__ == "__main__":
    main()
