"""Processes that share a run: which shards each one has, and its loop over them."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gura_jax.dataset import commit
from gura_jax.dataset.commit import Failure
from gura_jax.dataset.progress import Progress
from gura_jax.dataset.run import Done, Run
from gura_jax.errors import InputError


class Worker(NamedTuple):
    """Process ``number`` (from 0) of ``total`` that share a run; ``found`` is where these come from."""

    number: int
    total: int
    found: str

    def share(self, shards: Sequence[int]) -> list[int]:
        """Return its shards: every ``total``-th, as clips are sorted by length."""
        return list(shards[self.number :: self.total])


# Environment variables of schedulers for the index of a process, the number of processes, and the lowest index.
# A job's batch script has SLURM_PROCID too, but is not a task of a step: it has no SLURM_STEP_NUM_TASKS.
_SCHEDULERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", None),
)


def this_worker(
    index: int | None = None, count: int | None = None, environment: Mapping[str, str] | None = None
) -> Worker:
    """Find which of how many processes this is: as given, else from ``jax.distributed`` or Slurm, else the only one.

    Raises:
        InputError: only one of both numbers is given, or they contradict each other.
    """
    environment = os.environ if environment is None else environment
    if index is not None or count is not None:
        if index is None or count is None or not 0 <= index < count:
            raise InputError(
                "expected --num-shards N together with --shard-index from 0 to N - 1, found "
                f"--num-shards {count} and --shard-index {index}"
            )
        return Worker(index, count, "--shard-index")
    import jax

    if jax.distributed.is_initialized():
        return Worker(jax.process_index(), jax.process_count(), "jax.distributed")
    for name, total, lowest in _SCHEDULERS:
        if name in environment and total in environment:
            try:
                first = int(environment.get(lowest, "0")) if lowest else 0
                worker = Worker(int(environment[name]) - first, int(environment[total]), name)
            except ValueError:
                worker = Worker(-1, 0, name)
            if not 0 <= worker.number < worker.total:
                raise InputError(
                    f"expected {name} from 0 to {total} - 1 (less {lowest or 0}), found {environment[name]} of "
                    f"{environment[total]}: give --shard-index and --num-shards"
                )
            return worker
    return Worker(0, 1, "the only process")


class Summary(NamedTuple):
    """Result of a run, for this process and in all."""

    done: Done  # by this process, now
    seconds: float  # of audio in ``done``
    before: int  # shards of this process that were finished already
    shards: int  # of this process
    left: int  # shards of the run that no process has finished
    failed: list[Failure]  # in all shards that are finished
    rates: Mapping[str, float]


def work(run: Run, worker: Worker, *, verify: bool = False) -> Summary:
    """Embed this process's shards, with progress on standard error.

    Args:
        run: opened by this process.
        worker: which process this is.
        verify: see :meth:`Run.pending`.
    """
    mine = worker.share(run.shards)
    pending = run.pending(mine, verify=verify)
    sizes = {number: run.size(number) for number in mine}
    before = Done(*(sum(sizes[n][i] for n in mine if n not in set(pending)) for i in range(3)))
    before = before._replace(clips=before.clips - before.failed)
    clips, samples = sum(s.clips for s in sizes.values()), sum(s.samples for s in sizes.values())
    with Progress(run.model.system.name, clips, samples, run.model.sample_rate, before) as progress:
        for _ in run.embed_shards(pending, progress):
            pass
    return finish_store(run.place, mine, len(mine) - len(pending), progress, run.shards)


def finish_store(
    place: commit.Location, mine: Sequence[int], before: int, progress: Progress, shards: Sequence[int]
) -> Summary:
    """Write ``failed.csv``, and sum up.

    Args:
        place: of the store.
        mine: shards of this process.
        before: how many of these were finished already.
        progress: of this process.
        shards: all of the run.
    """
    failed = commit.write_failed(place)
    finished = commit.shard_numbers(place)
    commit.remove_temporary(place, finished)
    left = len(set(shards) - set(finished))
    done = Done(*(a - b for a, b in zip(progress.done, progress.before, strict=True)))
    return Summary(done, done.samples / progress.sample_rate, before, len(mine), left, failed, progress.rates())
