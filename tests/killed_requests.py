"""Kill a run before every request to a bucket, go on, and compare; run by test_buckets.py in a process of its own.

python killed_requests.py INPUTS PREFIX FORMAT

Prints how many requests there were. The parent never starts JAX, so that it can fork.
"""

import os
import signal
import sys
import traceback
from typing import Any

import filelock  # noqa: F401 - here, so that children need not
import obstore
import pandas  # noqa: F401 - Arrow imports it
import pyarrow.compute
import pyarrow.parquet  # noqa: F401
import soundfile  # noqa: F401
import soxr  # noqa: F401
from s3_server import stored
from toy import embedded

from gura_jax import objects
from gura_jax.dataset.table import Settings

REQUESTS = ("get", "put", "delete", "list", "head")
FAILED = 77


def embed(inputs: str, out: str, form: str, kill_at: int) -> bool:
    """Embed in a child that is killed before a request (0: before none); whether it got that far."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        objects._client.cache_clear()
        count = 0

        def counted(function: Any) -> Any:
            def request(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return request

        for name in REQUESTS:
            setattr(obstore, name, counted(getattr(obstore, name)))
        try:
            settings = Settings(timestamps=True, shard_hours=2 / 3600, batch_seconds=2, format=form)
            embedded([inputs], out, settings)
        except BaseException:
            os.write(1, traceback.format_exc().encode())
            os._exit(FAILED)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"the run failed: status {status}"
    return False


def main(inputs: str, prefix: str, form: str) -> None:
    embed(inputs, f"{prefix}/whole", form, 0)
    whole = stored(f"{prefix}/whole")
    step = 0
    while embed(inputs, out := f"{prefix}/{step + 1}", form, step + 1):
        step += 1
        finished = {name: content for name, content in stored(out).items() if name.startswith("shard-")}
        assert finished.items() <= whole.items(), f"request {step}: a shard that is marked as done is wrong"
        assert not embed(inputs, out, form, 0)
        again = stored(out)
        different = [name for name in {**whole, **again} if whole.get(name) != again.get(name)]
        assert not different, f"killed before request {step}, then resumed: {different} differ"
    print(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
