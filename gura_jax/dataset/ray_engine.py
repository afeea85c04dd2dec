"""A run on a Ray cluster: a worker on each host, shards handed out one by one, dead workers replaced.

Ray restarts a worker that died; until it is back, the others do its shards. All write into one folder that every host
sees, or into a bucket, with the credentials that each host has.
"""

import collections
import logging
import os
import re
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gura_jax.dataset.commit import Location
from gura_jax.dataset.progress import Progress
from gura_jax.dataset.run import Done, Run, open_run
from gura_jax.dataset.sources import Inputs
from gura_jax.dataset.table import Settings
from gura_jax.dataset.workers import Summary, finish_store
from gura_jax.errors import GuraError, InputError, StoreError

if TYPE_CHECKING:
    import pyarrow as pa

ATTEMPTS = 3  # at a shard whose workers die: after that the shard, not the worker, is at fault
CONNECT_SECONDS = 10.0  # to wait for a cluster to answer
ACCELERATORS = ("GPU", "TPU")  # as Ray names them
_PASSED_ON = ("GURA_JAX_", "JAX_", "XLA_", "XDG_CACHE_HOME")  # environment variables


class _Worker:
    """A process on a host of the cluster, with all its accelerators."""

    def __init__(
        self,
        model: Mapping[str, Any],
        clips: "pa.Table | Inputs",
        folder: Location,
        settings: Settings,
        working_folder: str,
    ) -> None:
        from gura_jax.loading import load_model
        from gura_jax.models.families import import_families
        from gura_jax.parallel import cache_compilations

        os.chdir(working_folder)
        cache_compilations()
        import_families()
        self.model = load_model(**model)
        self.clips, self.folder, self.settings = clips, folder, settings
        self._run: Run | None = None

    def ready(self) -> None:
        """Return when the model is loaded."""

    def begin(self, overwrite: bool, retry_failed: bool, verify: bool) -> tuple[dict[int, Done], list[int], int]:
        """Open the run for all workers: the size of each shard, the shards that are to do, and the sample rate."""
        self._run = open_run(
            self.model, self.clips, self.folder, self.settings, overwrite=overwrite, retry_failed=retry_failed
        )
        sizes = {number: self._run.size(number) for number in self._run.shards}
        return sizes, self._run.pending(verify=verify), self.model.sample_rate

    def embed(self, number: int) -> Done:
        """Embed a shard."""
        # A worker that was started again opens the run that is there: it never overwrites.
        self._run = self._run or open_run(self.model, self.clips, self.folder, self.settings)
        (record,) = self._run.embed_shards([number])
        return Done(record.clips, record.samples, len(record.failed))


def work_with_ray(
    model: Mapping[str, Any],
    clips: "pa.Table | Inputs",
    folder: Location,
    settings: Settings,
    *,
    address: str | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    verify: bool = False,
) -> Summary:
    """Embed a collection on all hosts of a Ray cluster.

    Args:
        model: arguments of :func:`gura_jax.load_model`, for each worker.
        clips, folder, settings, overwrite, retry_failed: as in :func:`gura_jax.dataset.run.open_run`.
        verify: see :meth:`gura_jax.dataset.run.Run.pending`.
        address: of the cluster; by default that of ``RAY_ADDRESS``, or else a cluster of this machine alone.

    Raises:
        InputError: Ray is missing, or no cluster answers.
        GuraError: what a worker raises when it loads the model or opens the run; a shard that cannot be written.
    """
    try:
        import ray
        from ray.exceptions import RayActorError, RayTaskError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ModuleNotFoundError:
        raise InputError("--engine ray: expected Ray, found none: pip install 'gura-jax[ray]'") from None

    address = address or os.environ.get("RAY_ADDRESS")
    if match := re.fullmatch(r"\[?(?P<host>[^/]+?)\]?:(?P<port>\d+)", address or ""):
        try:  # Ray itself would wait for many minutes
            socket.create_connection((match["host"], int(match["port"])), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"--engine ray: expected a cluster at {address}, found: {error}") from None
    variables = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": variables})
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--engine ray: expected a cluster at {address or 'this machine'}, found: {reason}") from None
    try:
        table = ray.put(clips)
        kind = ray.remote(max_restarts=-1)(_Worker)
        actors = []
        for node in _hosts(ray.nodes()):
            resources = {name: node["Resources"][name] for name in ACCELERATORS if name in node["Resources"]}
            options: dict[str, Any] = {
                "num_cpus": 1,
                "num_gpus": resources.pop("GPU", 0),
                "resources": resources,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=True),
            }
            actors.append(kind.options(**options).remote(model, table, folder, settings, os.getcwd()))
        try:
            sizes, pending, sample_rate = ray.get(actors[0].begin.remote(overwrite, retry_failed, verify))
        except RayTaskError as error:
            raise _cause(error) from None
        except RayActorError as error:
            raise _died(error) from None

        queue = collections.deque(pending)
        attempts: collections.Counter[int] = collections.Counter()
        todo = set(pending)
        ready = [actor.ready.options(max_task_retries=-1) for actor in actors]
        waiting = {ready[i].remote(): (i, -1) for i in range(len(actors))}  # worker and shard (-1: none) of each call
        before = Done(*(sum(size[i] for number, size in sizes.items() if number not in todo) for i in range(3)))
        before = before._replace(clips=before.clips - before.failed)
        clip_count, samples = (sum(size[i] for size in sizes.values()) for i in range(2))
        idle: list[int] = []
        given_up: list[int] = []
        with Progress(f"{len(actors)} workers", clip_count, samples, sample_rate, before) as progress:
            while todo:
                while queue and idle:
                    number, i = queue.popleft(), idle.pop()
                    waiting[actors[i].embed.remote(number)] = i, number
                (answered, *_), _ = ray.wait(list(waiting), num_returns=1)
                i, number = waiting.pop(answered)
                try:
                    done = ray.get(answered)
                except RayTaskError as error:
                    raise _cause(error) from None
                except RayActorError as error:
                    if number < 0:
                        raise _died(error) from None
                    attempts[number] += 1
                    if attempts[number] < ATTEMPTS:
                        queue.append(number)
                    else:
                        todo.remove(number)
                        given_up.append(number)
                    waiting[ready[i].remote()] = i, -1
                    continue
                idle.append(i)
                if number >= 0:
                    todo.remove(number)
                    progress(done)
        if given_up:
            raise StoreError(
                f"{folder}: shards {', '.join(map(str, given_up))} ended each of {ATTEMPTS} workers that tried them, "
                "as when memory runs out: see --batch-seconds and --window, and run again"
            )
        shards = sorted(sizes)
        return finish_store(folder, shards, len(shards) - len(pending), progress, shards)
    finally:
        ray.shutdown()


def _hosts(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose the nodes that get a worker: those with accelerators; if there are none, all with a processor."""
    alive = [node for node in nodes if node["Alive"]]
    with_accelerator = [node for node in alive if any(node["Resources"].get(name) for name in ACCELERATORS)]
    hosts = with_accelerator or [node for node in alive if node["Resources"].get("CPU")]
    if not hosts:
        raise InputError("--engine ray: expected a cluster with hosts that compute, found none")
    return hosts


def _cause(error: Any) -> Exception:
    """Return a worker's own error if it is one for the user, else Ray's."""
    return error.cause if isinstance(error.cause, GuraError) else error


def _died(error: Exception) -> GuraError:
    reason = str(error).strip().splitlines()
    return InputError(f"--engine ray: a worker could not start: {reason[-1] if reason else error!r}")
