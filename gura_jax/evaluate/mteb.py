"""MTEB's tasks by a system: which there are, and a run that resumes; a task that fails does not stop the others."""

import contextlib
import difflib
import io
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gura_jax import files
from gura_jax.errors import GuraError, InputError, StoreError
from gura_jax.mteb import AUDIO, MtebEncoder  # before MTEB: says what to install

# isort: split
import datasets
import mteb

LIST = "'gura-jax mteb --list' shows the tasks and benchmarks of audio"
NAMED = 5  # tasks of another modality in an error
RESULTS = "results"  # in the folder of a run: what is submitted to github.com/embeddings-benchmark/results
SETTINGS = "run_settings.jsonl"  # which MTEB extends with each task
TALKATIVE = ("mteb", "datasets", "huggingface_hub", "sentence_transformers")  # their loggers
REASON_CHARACTERS = 300  # of another library's error


class Score(NamedTuple):
    """The main score of a task.

    Attributes:
        task, type: MTEB's names.
        metric: name of the score.
        score: mean over the task's splits and subsets.
        resumed: it was there already.
    """

    task: str
    type: str
    metric: str
    score: float
    resumed: bool


class Outcome(NamedTuple):
    """Scores and failures of a run.

    Attributes:
        scores: of the tasks that are done, in their order.
        failed: reason by task.
        folder: of MTEB's files: ``model_meta.json`` and one file for each task.
    """

    scores: list[Score]
    failed: dict[str, str]
    folder: Path

    @property
    def mean(self) -> float:
        """Mean of the scores, as MTEB's leaderboard has it."""
        return sum(score.score for score in self.scores) / len(self.scores)

    def as_json(self) -> dict[str, Any]:
        """Return what the command prints."""
        scores = [score._asdict() for score in self.scores]
        return {"scores": scores, "failed": self.failed, "results": str(self.folder)}


def describe_task(task: Any) -> dict[str, Any]:
    """Describe a task: its name, its type, its score, and in how many languages it is."""
    metadata = task.metadata
    languages = len(set(metadata.languages))
    return {"task": metadata.name, "type": metadata.type, "metric": metadata.main_score, "languages": languages}


def audio_tasks() -> list[Any]:
    """List MTEB's tasks of nothing but audio, in order of their types and names."""
    tasks = mteb.get_tasks(modalities=[AUDIO], exclusive_modality_filter=True)
    return sorted(tasks, key=lambda task: (task.metadata.type, task.metadata.name))


def audio_benchmarks() -> list[str]:
    """List the names of MTEB's benchmarks of nothing but audio, with those that they go by too."""
    found = [benchmark for benchmark in mteb.get_benchmarks() if all(map(_is_audio, benchmark.tasks))]
    return sorted(name for benchmark in found for name in (benchmark.name, *(benchmark.aliases or ())))


def find_tasks(benchmark: str | None, names: Sequence[str] = ()) -> list[Any]:
    """Find the tasks of a benchmark, or tasks by their names.

    Args:
        benchmark: its name, or None.
        names: of tasks, without a benchmark.

    Raises:
        InputError: an unknown name, neither or both, or a task of another modality than audio.
    """
    if benchmark is not None and names:
        raise InputError("expected a benchmark or tasks, found both: pass one of --benchmark and --tasks")
    tasks: dict[str, Any] = {}
    if benchmark is not None:
        tasks = {task.metadata.name: task for task in _benchmark(benchmark).tasks}
    for name in names:
        tasks[name] = _task(name)
    if not tasks:
        raise InputError(f"expected a benchmark or tasks, found neither: {LIST}")
    others = [task.metadata for task in tasks.values() if not _is_audio(task)]
    if others:
        told = [f"{metadata.name} ({', '.join(metadata.modalities)})" for metadata in others[:NAMED]]
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        raise InputError(f"expected tasks of audio alone, found {', '.join(told)}{more}: {LIST}")
    return list(tasks.values())


def run(encoder: MtebEncoder, tasks: Iterable[Any], out: Path, *, show_progress_bar: bool = False) -> Outcome:
    """Evaluate an encoder on tasks, by MTEB's own code, and write the scores of each when they are there.

    Splits and subsets that are done are not computed again.

    Args:
        encoder: from :func:`gura_jax.mteb.load`.
        tasks: MTEB's, or your own subclasses of MTEB's.
        out: folder, for ``results/MODEL/REVISION/TASK.json``.
        show_progress_bar: for clips, on standard error.

    Raises:
        InputError: a task of another modality than audio.
        StoreError: the folder cannot be written.
    """
    tasks = list(tasks)
    if others := [task.metadata.name for task in tasks if not _is_audio(task)]:
        raise InputError(f"expected tasks of audio alone, found {', '.join(others[:NAMED])}")
    files.open_folder(out)
    cache, meta = _Results(out), encoder.mteb_model_meta
    model: Any = encoder  # MTEB's type of encoders has other arguments of __init__
    scores: list[Score] = []
    failed: dict[str, str] = {}
    for task in tasks:
        name = task.metadata.name
        print(f"{name}: {task.metadata.type}", file=sys.stderr)
        try:
            with _quiet():
                before = cache.load_task_result(name, meta)
                result = mteb.evaluate(
                    model,
                    task,
                    cache=cache,
                    co2_tracker=False,
                    encode_kwargs={"show_progress_bar": show_progress_bar},
                    show_progress_bar=False,
                )
            if result.exceptions:  # of a private data set that nobody may read
                raise InputError(result.exceptions[0].exception)
            (found,) = result.task_results
            resumed = before is not None and not before.get_missing_evaluations(task)
            scores.append(Score(name, task.metadata.type, task.metadata.main_score, float(found.get_score()), resumed))
            print(f"{name}: {scores[-1].metric} {scores[-1].score:.4f}{' (resumed)' * resumed}", file=sys.stderr)
        except Exception as error:  # whatever the task's own code raises: no network, no memory, damaged audio
            failed[name] = _reason(error)
            print(f"{name}: {failed[name]}", file=sys.stderr)
    return Outcome(scores, failed, cache.get_task_result_path("_", meta).parent)


class _Results(mteb.ResultCache):
    """MTEB's files of results, each complete or absent; that of a task is written last."""

    def load_task_result(self, *arguments: Any, **options: Any) -> Any:
        """Read the scores of a task; None: there are none."""
        try:
            return super().load_task_result(*arguments, **options)
        except (ValueError, KeyError, TypeError, OSError) as error:
            path = self.get_task_result_path(*arguments[:2])
            raise StoreError(f"{path}: expected MTEB's scores, found: {_reason(error)}: remove it") from None

    def save_to_cache(self, task_result: Any, model_name: Any, *arguments: Any, **options: Any) -> None:
        """Let MTEB write into a temporary folder, and move its files from there."""
        target = self.get_task_result_path(task_result.task_name, model_name)
        with tempfile.TemporaryDirectory() as temporary, files.locked(self.cache_path):
            elsewhere = mteb.ResultCache(temporary)
            written = elsewhere.get_task_result_path(task_result.task_name, model_name)
            if (target.parent / SETTINGS).is_file():
                written.parent.mkdir(parents=True)
                shutil.copy(target.parent / SETTINGS, written.parent)
            elsewhere.save_to_cache(task_result, model_name, *arguments, **options)
            files.open_folder(target.parent)
            for path in sorted(written.parent.iterdir(), key=lambda path: path.name == written.name):
                files.write_file(target.parent, path.name, path.read_bytes())


def _is_audio(task: Any) -> bool:
    return set(task.metadata.modalities) == {AUDIO}


def _benchmark(name: str) -> Any:
    known = [alias for one in mteb.get_benchmarks() for alias in (one.name, *(one.aliases or ()))]
    if name not in known:
        raise InputError(f"benchmark {name!r} is not known; {_near(name, known) or LIST}")
    return mteb.get_benchmark(name)


def _task(name: str) -> Any:
    try:
        return mteb.get_task(name)
    except KeyError:
        known = [task.metadata.name for task in audio_tasks()]
        raise InputError(f"task {name!r} is not known; {_near(name, known) or LIST}") from None


def _near(name: str, known: Iterable[str]) -> str:
    """Say which names are close to an unknown one, whatever their case; nothing if none are."""
    lower = {one.lower(): one for one in known}
    close = [lower[one] for one in difflib.get_close_matches(name.lower(), lower)]
    return f"did you mean {' or '.join(close)}?" if close else ""


def _reason(error: Exception) -> str:
    """Return the first line of an error, with its type where it is another library's."""
    text = str(error).strip().partition("\n")[0][:REASON_CHARACTERS]
    return text if isinstance(error, GuraError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what MTEB and its data sets log and print."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in TALKATIVE}
    bars = not datasets.utils.are_progress_bars_disabled()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            for logger, level in loggers.items():
                logger.setLevel(level)
            if bars:
                datasets.enable_progress_bars()
