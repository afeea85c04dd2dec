"""Kill a run at every step that changes the disk, go on, and compare; run by test_embed.py in a process of its own.

python killed.py INPUTS FOLDER

Prints how many steps there were. The parent never starts JAX, so that it can fork.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock  # noqa: F401 - here, so that children need not
import pandas  # noqa: F401 - Arrow imports it
import pyarrow.compute
import pyarrow.parquet  # noqa: F401
import soundfile  # noqa: F401
import soxr  # noqa: F401
from toy import contents, embedded

from gura_jax import files
from gura_jax.dataset.table import Settings
from gura_jax.fusion import Keep

INPUTS, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
SETTINGS = Settings(timestamps=True, shard_hours=2 / 3600, batch_seconds=2, keep=Keep("mean"))
NOT_REACHED = 77


def run(out: Path, kill_at: int | None) -> bool:
    """Embed in a child that is killed before a step; whether it got that far."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        steps = 0

        def counted(function: Callable[..., Any], counts: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
            def step(*arguments: Any, **options: Any) -> Any:
                nonlocal steps
                if counts(*arguments):
                    steps += 1
                    if steps == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return step

        for name in ("replace", "fsync", "unlink", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        halves: set[int] = set()

        def is_half_written(file: Any, data: Any) -> bool:
            """Once a file, when something of it is there."""
            if not file.size or id(file) in halves:
                return False
            halves.add(id(file))
            file.file.flush()
            return True

        files._Hashed.write = counted(files._Hashed.write, is_half_written)
        embedded(INPUTS, out, SETTINGS)
        os._exit(NOT_REACHED)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == NOT_REACHED, f"the run failed: status {status}"
    return False


def main() -> None:
    run(FOLDER / "whole", None)
    whole = contents(FOLDER / "whole")
    steps = 0
    while run(out := FOLDER / "killed", steps + 1):
        steps += 1
        finished = {name: content for name, content in contents(out).items() if name.startswith("shard-")}
        assert finished.items() <= whole.items(), f"step {steps}: a shard that is marked as done is wrong"
        run(out, None)
        again = contents(out)
        different = [name for name in {**whole, **again} if whole.get(name) != again.get(name)]
        assert not different, f"killed at step {steps}, then resumed: {different} differ"
        shutil.rmtree(out)
    print(steps)


if __name__ == "__main__":
    main()
