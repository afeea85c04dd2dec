"""gura_jax/evaluate: tasks, protocols, benchmarks, embeddings and the command, on tasks of a few clips."""

import csv
import dataclasses
import html
import json
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from reference import relative
from toy import Toy
from typer.testing import CliRunner

from gura_jax import EmbeddingStore, Member, Output, System, cli, load_model
from gura_jax.audio import load_audio
from gura_jax.dataset.sources import read_inputs
from gura_jax.errors import CheckpointError, GuraError, InputError, StoreError, SystemConfigError
from gura_jax.evaluate import embed, modules, probes, report, run
from gura_jax.evaluate.benchmarks import BENCHMARKS, Benchmark
from gura_jax.evaluate.embed import SystemEmbeddings
from gura_jax.evaluate.hear.protocol import PROTOCOLS, grid_points
from gura_jax.evaluate.hear.tasks import find_tasks, read_task
from gura_jax.evaluate.protocol import _Best, evaluate_task
from gura_jax.evaluate.tables import Comparison
from gura_jax.evaluate.task import Event, Fold, Task, frame_targets
from gura_jax.systems import SYSTEMS

RATE = 16_000
FREQUENCIES = {"low": 300.0, "mid": 900.0, "high": 2700.0}
# Few and small probes: their scores do not matter here.
SMALL = {"hidden_layers": [1], "hidden_dim": [16], "lr": [1e-2, 1e-3], "max_epochs": [9], "patience": [2]}
FUSED_BOUND = 1e-6  # relative norm: the same sums in another order
SCORES = BENCHMARKS["hear"].scores_file
KIT, FIXED = PROTOCOLS["hear2021"], PROTOCOLS["fixed"]


def write_task(folder: Path, kind: str = "scene", clips: int = 9, **meta: Any) -> Path:
    """A task of tones: a scene task with three splits or folds, or an event task."""
    fold = meta.get("split_mode", "trainvaltest") != "trainvaltest"
    splits = ["fold00", "fold01", "fold02"] if fold else ["train", "valid", "test"]
    description = {
        "task_name": folder.name,
        "embedding_type": kind,
        "prediction_type": "multiclass" if kind == "scene" else "multilabel",
        "split_mode": "trainvaltest",
        "sample_duration": 0.5,
        "splits": splits,
        "evaluation": ["top1_acc", "mAP"] if kind == "scene" else ["event_onset_200ms_fms", "segment_1s_er"],
        "evaluation_params": {"task_specific_param_grid": SMALL},
    } | meta
    random = np.random.default_rng(0)
    for split in splits:
        labels: dict[str, Any] = {}
        (folder / str(RATE) / split).mkdir(parents=True)
        for i in range(clips):
            label = list(FREQUENCIES)[i % 3]
            time = np.arange(RATE // 2) / RATE
            tone = 0.3 * np.sin(2 * np.pi * FREQUENCIES[label] * time + i) + 0.01 * random.standard_normal(len(time))
            if kind == "event":
                tone[time < 0.2] *= 0.01
            soundfile.write(folder / str(RATE) / split / f"{split}-{i}.wav", tone, RATE)
            event = {"label": label, "start": 200.0, "end": 500.0}
            labels[f"{split}-{i}.wav"] = [event] if kind == "event" else [label]
        (folder / f"{split}.json").write_text(json.dumps(labels))
    (folder / "labelvocabulary.csv").write_text("idx,label\n0,low\n1,mid\n2,high\n")
    (folder / "task_metadata.json").write_text(json.dumps(description))
    return folder


def spectra(task: Task) -> Any:
    """Return a lookup of log spectra, in frames of 25 ms."""

    def lookup(split: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        audio, _ = soundfile.read(task.folder / str(RATE) / split / name, dtype="float32")
        frames = np.log(np.abs(np.fft.rfft(audio.reshape(-1, 400), axis=1))[:, :80] + 1e-2).astype(np.float32)
        return (frames, 25.0 * np.arange(len(frames))) if task.embedding == "event" else (frames.mean(0), None)

    return lookup


def change(folder: Path, **meta: Any) -> Path:
    path = folder / "task_metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | meta))
    return folder


# Tasks and protocols


def test_folds_rotate(tmp_path: Path) -> None:
    task = read_task(write_task(tmp_path / "t", split_mode="new_split_kfold"))
    assert [(f.train, f.valid, f.test) for f in task.folds] == [
        (("fold02",), "fold01", "fold00"),
        (("fold00",), "fold02", "fold01"),
        (("fold01",), "fold00", "fold02"),
    ]


def test_frames_of_an_event() -> None:
    times = np.array([0.0, 50, 100, 150, 200])
    found = frame_targets([Event("b", 50, 150), Event("a", 199, 199.99999)], times, {"a": 0, "b": 1})
    np.testing.assert_array_equal(found, [[0, 0], [0, 1], [0, 1], [0, 1], [1, 0]])


def test_the_grid_is_the_kits(tmp_path: Path) -> None:
    task = read_task(write_task(tmp_path / "t"))
    found = [(p.hidden_layers, p.initialization[7], p.lr) for p in grid_points(dataclasses.replace(task, grid={}))]
    assert found == [
        (1, "n", 1e-4), (2, "u", 1e-3), (1, "n", 1e-3), (1, "n", 3.2e-4),
        (2, "n", 3.2e-4), (2, "u", 3.2e-4), (2, "n", 3.2e-3), (2, "u", 3.2e-3),
    ]  # fmt: skip
    (dcase, *_) = grid_points(dataclasses.replace(task, grid={}, task_name="dcase2016_task2"))
    assert dcase.check_val_every_n_epoch == 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_norm": [1]},
        {"lr": ["fast"]},
        {"lr": [math.nan]},
        {"max_epochs": [1]},
        {"max_epochs": [30.0]},
        {"hidden_dim": [10**9]},
        {"patience": [True]},
        {"dropout": [1]},
        {"initialization": ["zeros"]},
        {"initialization": [["xavier_normal"]]},
        {"lr": [0.1] * 1000},
    ],
)
def test_a_grid_that_makes_no_sense(tmp_path: Path, wrong: dict[str, Any]) -> None:
    task = read_task(write_task(tmp_path / "t"))
    with pytest.raises(InputError, match="grid"):
        grid_points(dataclasses.replace(task, grid=wrong))


@pytest.mark.parametrize("maximize", [True, False])
def test_early_stopping(maximize: bool) -> None:
    sign = 1 if maximize else -1
    best = _Best(2, maximize, KIT)
    seen = [best.update(sign * score, epoch) for epoch, score in enumerate([0.1, 0.3, 0.3, 0.3, 0.9])]
    assert seen == [True, True, False, False, False]  # a tie is no gain, and what has stopped stays so
    assert (best.epoch, best.running) == (1, False)
    assert best.score == pytest.approx(sign * 0.3)


def test_a_validation_that_is_not_a_number() -> None:
    for protocol, running in ((KIT, False), (FIXED, True)):
        best = _Best(2, True, protocol)
        assert best.update(0.5, 0)
        assert not best.update(math.nan, 1)
        assert (best.running, best.epoch, best.score) == (running, 0, 0.5)
        first = _Best(2, True, protocol)
        assert first.update(math.nan, 0)
        assert (first.running, first.score) == (running, -math.inf)


@pytest.mark.parametrize("protocol", [KIT, FIXED])
def test_a_scene_task(tmp_path: Path, protocol: Any) -> None:
    task = read_task(write_task(tmp_path / "t", split_mode="presplit_kfold"))
    scores = evaluate_task(task, spectra(task), protocol, seed=1)
    assert list(scores.folds) == ["fold00", "fold01", "fold02"]
    for fold in scores.folds.values():
        assert fold.test["test_score"] == fold.test["test_top1_acc"] > 0.6
        assert fold.epoch in (2, 5, 8)
    again = evaluate_task(task, spectra(task), protocol, seed=1)
    assert [f._replace(seconds=0) for f in again.folds.values()] == [
        f._replace(seconds=0) for f in scores.folds.values()
    ]


def test_nothing_is_compiled_for_another_task_of_the_shape(tmp_path: Path) -> None:
    first, second = (read_task(write_task(tmp_path / name)) for name in "ab")
    evaluate_task(first, spectra(first), KIT)
    functions: list[Any] = [probes._train, probes._predict]
    before = [function._cache_size() for function in functions]
    evaluate_task(second, spectra(second), KIT, seed=3)
    assert [function._cache_size() for function in functions] == before


@pytest.mark.parametrize("score_stopping", [True, False])
def test_an_event_task(tmp_path: Path, score_stopping: bool) -> None:
    grid = {"median_filter_ms": [0], "min_duration": [50, 250] if score_stopping else [50]}
    parameters = {"event_postprocessing_grid": grid, "task_specific_param_grid": SMALL | {"max_epochs": [60]}}
    folder = write_task(tmp_path / "t", "event", evaluation_params=parameters)
    task = read_task(change(folder, use_scoring_for_early_stopping=score_stopping))
    scores = evaluate_task(task, spectra(task), FIXED)
    (fold,) = scores.folds.values()
    assert fold.test["test_event_onset_200ms_fms"] == fold.test["test_event_onset_200ms_fms_f_measure"] > 0.5
    assert {"test_segment_1s_er_error_rate", "test_loss"} < set(fold.test)
    assert dict(fold.postprocessing)["min_duration"] in grid["min_duration"]
    assert scores.maximize is score_stopping


def test_a_last_batch_of_one(tmp_path: Path) -> None:
    grid = {"task_specific_param_grid": SMALL | {"batch_size": [4]}}
    task = read_task(write_task(tmp_path / "t", evaluation_params=grid))
    with pytest.raises(InputError, match="protocol fixed"):
        evaluate_task(task, spectra(task), KIT)
    assert evaluate_task(task, spectra(task), FIXED).folds["test"].test["test_score"] > 0.3
    one = read_task(write_task(tmp_path / "one", clips=1))
    with pytest.raises(InputError, match="found 1 rows"):
        evaluate_task(one, spectra(one), FIXED)


def test_embeddings_that_are_no_numbers(tmp_path: Path) -> None:
    task = read_task(write_task(tmp_path / "t"))

    def lookup(split: str, name: str) -> Any:
        return np.full(4, np.nan if name == "valid-1.wav" else 1, np.float32), None

    with pytest.raises(InputError, match=r"t/valid/valid-1\.wav: expected an embedding of finite numbers"):
        evaluate_task(task, lookup, FIXED)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"embedding_type": "frame"}, "embedding_type to be one of scene, event, found 'frame'"),
        ({"prediction_type": None}, "prediction_type"),
        ({"split_mode": "all"}, "split_mode"),
        ({"splits": ["train", "test"]}, "train, valid and test"),
        ({"split_mode": "presplit_kfold", "splits": ["train", "test"]}, "at least 3 folds"),
        ({"evaluation": ["segment_1s_er"]}, "found 'segment_1s_er'"),
        ({"evaluation": []}, "evaluation"),
        ({"evaluation_params": {"event_postprocessing_grid": {"width": [1]}}}, "found 'width'"),
        ({"evaluation_params": {"event_postprocessing_grid": {"min_duration": ["long"]}}}, "numbers from 0"),
        ({"evaluation_params": {"event_postprocessing_grid": {"median_filter_ms": [1e18]}}}, "numbers from 0"),
        ({"evaluation_params": 3}, "evaluation_params"),
    ],
)
def test_metadata_that_make_no_sense(tmp_path: Path, meta: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_task(change(write_task(tmp_path / "t"), **meta))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.json", '{"test-0.wav": ["purple"]}', "found 'purple'"),
        ("test.json", '{"test-0.wav": ["low", "mid"]}', "expected one label"),
        ("test.json", '{"../x.wav": ["low"]}', "name of a file"),
        ("test.json", '{"test-0.wav": "low"}', "list of labels"),
        ("test.json", "{}", "one clip at least"),
        ("labelvocabulary.csv", "idx,label\n0,low\n2,mid\n", "each idx"),
        ("labelvocabulary.csv", "a,b\n", "idx and label|each idx"),
        ("labelvocabulary.csv", None, "cannot be read"),
        ("valid.json", None, "cannot be read"),
        ("task_metadata.json", "[", "expected JSON"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = write_task(tmp_path / "t") / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_task(tmp_path / "t")


def test_no_tasks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        find_tasks(tmp_path)
    assert find_tasks(write_task(tmp_path / "t")) == [tmp_path / "t"]
    (write_task(tmp_path / "u") / "task_metadata.json").unlink()
    assert find_tasks(tmp_path) == [tmp_path / "t", tmp_path / "u"]  # so that somebody hears of it


def test_a_task_has_audio_at_several_rates(tmp_path: Path) -> None:
    """A model's own rate, else the next higher one; a module takes no other than its own."""
    task = read_task(write_task(tmp_path / "t", clips=1))
    (task.folder / "48000").mkdir()
    for rate, folder in ((16_000, "16000"), (24_000, "48000"), (96_000, "48000")):
        table = task.table(rate)
        assert {Path(path).parts[-3] for path in table["path"].to_pylist()} == {folder}
        assert table["id"].to_pylist() == [task.clip_id(split, f"{split}-0.wav") for split in task.splits]
        assert "labels" not in table.column_names
    assert task.audio_folder("train", 48_000) == task.folder / "48000" / "train"
    with pytest.raises(InputError, match="expected a folder 32000, of audio at the module's sample rate, found none"):
        task.audio_folder("train", 32_000)


# Modules with HEAR's common API


class Loud(torch.nn.Module):
    """The model of a HEAR module that counts the clips that it computes."""

    sample_rate = RATE
    scene_embedding_size = timestamp_embedding_size = 80
    computed = 0


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A HEAR module ``loud``, in PyTorch."""
    loud: Any = types.ModuleType("loud")

    def timestamps(audio: torch.Tensor, model: Loud) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(audio, torch.Tensor)
        model.computed += len(audio)
        frames = torch.log(torch.fft.rfft(audio.reshape(len(audio), -1, 400)).abs()[..., :80] + 1e-2)
        return frames, (25.0 * torch.arange(frames.shape[1])).expand(len(audio), -1)

    def load_model(path: str = "") -> Loud:
        loud.model = Loud()
        return loud.model

    loud.load_model = load_model
    loud.get_timestamp_embeddings = timestamps
    loud.get_scene_embeddings = lambda audio, model: timestamps(audio, model)[0].mean(1)
    monkeypatch.setitem(sys.modules, "loud", loud)
    return loud


def evaluated(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def test_a_module_of_torchs(tmp_path: Path, module: Any) -> None:
    write_task(tmp_path / "tasks" / "a")
    write_task(tmp_path / "tasks" / "b", "event")
    arguments = tmp_path / "tasks", "--module", "loud", "--out", tmp_path / "out"
    first = evaluated(*arguments)
    assert first.exit_code == 0, first.output
    assert module.model.computed == 54
    assert "top1_acc" in first.stdout
    page = html.unescape((tmp_path / "out" / "report-hear2021-0.html").read_text())
    assert "<td>loud</td><td>loud</td><td></td><td>the module's own</td><td>16000 Hz</td>" in page
    # Only missing embeddings are computed again.
    (tmp_path / "out/embeddings/loud/a/train/train-3.wav.embedding.npy").unlink()
    assert evaluated(*arguments).stdout == first.stdout
    assert module.model.computed == 1
    with pytest.raises(StoreError, match="choose another --out"):
        modules._check_module(modules.Module("loud", "other.pt"), tmp_path / "out/embeddings/loud/a")


def test_a_task_that_memory_does_not_hold(tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_task(tmp_path / "tasks" / name)

    def evaluate_large(task: Task, *arguments: Any, **options: Any) -> Any:
        if task.name == "a":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
        return evaluate_task(task, *arguments, **options)

    monkeypatch.setattr(run, "evaluate_task", evaluate_large)
    found = evaluated(tmp_path / "tasks", "--module", "loud", "--out", tmp_path / "out")
    assert found.exit_code == cli.EXIT_SOME_INPUTS_FAILED
    assert "larger machine" in found.stderr
    assert "b by loud: top1_acc" in found.stderr


def test_modules_that_are_none(module: Any) -> None:
    with pytest.raises(SystemConfigError, match="expected a module to import"):
        modules.Module("no_such_module")
    with pytest.raises(SystemConfigError, match="found no load_model"):
        modules.Module("json")
    module.load_model = lambda: torch.zeros(1)[2]
    with pytest.raises(SystemConfigError, match="load_model to load, found: IndexError"):
        modules.Module("loud")


@pytest.mark.parametrize(
    ("scenes", "frames"),
    [
        (lambda x: x[:1], lambda x: (x[:, :, None], x[:1])),
        (lambda x: x[0], lambda x: (x[:, :, None], x[:, 1:])),
        (lambda x: x[:, :, None], lambda x: (x, x)),
        (lambda x: x.sum(), lambda x: (x[:, :, None],)),
    ],
)
def test_a_module_that_returns_something_else(module: Any, scenes: Any, frames: Any) -> None:
    module.get_scene_embeddings = lambda audio, model: scenes(audio)
    module.get_timestamp_embeddings = lambda audio, model: frames(audio)
    with pytest.raises(SystemConfigError, match=r"expected \[n, D\]"):
        modules.Module("loud")(np.ones((3, 400), np.float32), frames=False)
    with pytest.raises(SystemConfigError, match="times"):
        modules.Module("loud")(np.ones((3, 400), np.float32), frames=True)


def test_a_module_that_returns_nan_is_asked_again(tmp_path: Path, module: Any) -> None:
    write_task(tmp_path / "tasks" / "a")
    arguments = tmp_path / "tasks", "--module", "loud", "--out", tmp_path / "out"
    scenes = module.get_scene_embeddings
    module.get_scene_embeddings = lambda audio, model: scenes(audio, model) * math.nan
    broken = evaluated(*arguments)
    assert broken.exit_code == cli.EXIT_FAILED
    assert "expected finite embeddings" in broken.stderr
    module.get_scene_embeddings = scenes
    assert evaluated(*arguments).exit_code == 0


def test_a_module_without_torch(tmp_path: Path, module: Any) -> None:
    module.load_model = lambda: types.SimpleNamespace(sample_rate=RATE)
    module.get_scene_embeddings = lambda audio, model: jax.numpy.asarray(audio)[:, :7]
    found, times = modules.Module("loud")(np.ones((2, 400), np.float32), frames=False)
    assert (found.shape, found.dtype, times) == ((2, 7), np.float32, None)


# The command, and benchmarks


@dataclasses.dataclass(frozen=True)
class Words(Task):
    """A task of another benchmark: a folder of WAV files named ``SPLIT-LABEL-NUMBER.wav``."""

    def table(self, sample_rate: int) -> pa.Table:
        return read_inputs([self.folder], sample_rate=sample_rate)

    def clip_id(self, split: str, file: str) -> str:
        return file

    def audio_folder(self, split: str, sample_rate: int) -> Path:
        return self.folder


def read_words(folder: Path) -> Words:
    clips: dict[str, dict[str, list[str]]] = {"train": {}, "valid": {}, "test": {}}
    for path in sorted(folder.glob("*.wav")):
        split, label, _ = path.stem.split("-")
        clips[split][path.name] = [label]
    fold = Fold(("train",), "valid", "test")
    about = (folder, folder.name, folder.name, "scene", "multiclass", tuple(clips), (fold,), tuple(FREQUENCIES))
    return Words(*about, ("top1_acc",), True, {}, {}, clips)


def test_a_benchmark_is_a_row(tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added from outside, it brings tasks, protocols and published scores; the command finds it by its protocol."""
    points = grid_points(read_task(write_task(tmp_path / "hear" / "t", clips=3)))
    words = Benchmark(
        name="words",
        find_tasks=lambda folder: [path for path in sorted(folder.iterdir()) if path.is_dir()],
        read_task=read_words,
        protocols={"words": FIXED._replace(name="words", points=lambda task: points)},
        scores_file="words.json",
        comparisons=[Comparison(1, "Table 1 of Words")],
        published=lambda task: {(1, "Whisper", "top1_acc"): 0.25} if task == "tones" else {},
    )
    monkeypatch.setitem(BENCHMARKS, words.name, words)
    (tmp_path / "words" / "tones").mkdir(parents=True)
    for path in (tmp_path / "hear").rglob("*.wav"):
        split, number = path.stem.split("-")
        label = list(FREQUENCIES)[int(number) % 3]
        path.rename(tmp_path / "words" / "tones" / f"{split}-{label}-{number}.wav")
    found = evaluated(tmp_path / "words", "--module", "loud", "--protocol", "words", "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert "Table 1 of Words" in found.stdout
    assert "(25.0)" in found.stdout
    assert (tmp_path / "out" / "scores" / "words-0" / "loud" / "tones" / "words.json").is_file()
    assert [row.task for row in report.read_table(tmp_path / "out")] == ["tones"]
    with pytest.raises(InputError, match="--protocol: expected one of hear2021, fixed, words, found 'word'"):
        evaluated(tmp_path / "words", "--module", "loud", "--protocol", "word", "--out", tmp_path / "out")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scene task, an event task and a broken one; then again; then with another seed and protocol."""
    tasks, out = tmp_path / "tasks", tmp_path / "out"
    write_task(tasks / "a", split_mode="new_split_kfold", clips=3)
    write_task(tasks / "b", "event", clips=3)
    (write_task(tasks / "c", clips=3) / str(RATE) / "train" / "train-1.wav").write_bytes(b"noise")
    system = tmp_path / "tiny.toml"
    system.write_text('name = "small"\n[[members]]\nencoder = "crepe-tiny"\n')
    arguments = tasks, "--system", system, "--weights", "random", "--out", out
    first = evaluated(*arguments)
    assert first.exit_code == cli.EXIT_SOME_INPUTS_FAILED
    assert "c/train/train-1.wav" in first.stderr
    scores = json.loads((out / "scores/hear2021-0/small-random/a" / SCORES).read_text())
    assert list(scores)[:4] == ["fold00", "fold01", "fold02", "aggregated_scores"]
    assert {"hparams", "postprocessing", "score_mode", "embedding_path"} < set(scores)
    assert {"test_score", "test_top1_acc", "test_mAP", "test_loss", "validation_score", "epoch", "time_in_min"} == set(
        scores["fold00"]
    )
    values = [scores[fold]["test_mAP"] for fold in ("fold00", "fold01", "fold02")]
    assert scores["aggregated_scores"]["test_mAP_mean"] == pytest.approx(np.mean(values))
    assert scores["aggregated_scores"]["test_mAP_std"] == pytest.approx(np.std(values, ddof=1))
    assert scores["hparams"]["hidden_dim"] == 16

    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_task", never)
        patch.setattr("gura_jax.dataset.run.Run.embed_shards", lambda self, numbers, report: iter(list(numbers)[:0]))
        assert evaluated(*arguments).stdout == first.stdout
    # Other seeds and protocols share the embeddings.
    (tasks / "c" / str(RATE) / "train" / "train-1.wav").unlink()
    monkeypatch.setattr("gura_jax.dataset.run._Computation._dispatch", never)
    assert evaluated(*arguments, "--protocol", "fixed", "--seed", 2).exit_code == cli.EXIT_SOME_INPUTS_FAILED
    with open(out / report.TABLE, newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["protocol"], row["task"], row["metric"]) for row in table if row["seed"] == "2"] == [
        ("fixed", "a", "mAP"),
        ("fixed", "a", "top1_acc"),
        ("fixed", "b", "event_onset_200ms_fms"),
        ("fixed", "b", "segment_1s_er"),
    ]
    assert len(table) == 8


def test_a_clip_that_was_mended(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", clips=3)
    clip = folder / str(RATE) / "train" / "train-1.wav"
    good = clip.read_bytes()
    clip.write_bytes(good[:600])
    model = load_model(System("small", (Member("crepe-tiny"),)), weights="random")
    task = read_task(folder)
    with pytest.raises(InputError, match="1 of them cannot be"):
        embed.embed_task(model, task, tmp_path / "out")
    clip.write_bytes(good)
    embed.embed_task(model, task, tmp_path / "out")
    assert EmbeddingStore(tmp_path / "out")["t/train/train-1.wav"].scene.shape == (model.scene_embedding_size,)


def test_the_command_needs_something(tmp_path: Path) -> None:
    for options, message in (
        ((), "expected --systems or --module"),
        (("--module", "x", "--size", "tiny"), "takes no --size"),
        (("--systems", "crepe,no_such"), "no_such"),
        (("--systems", "crepe", "--weights", "crepe-ful=random"), "found crepe-ful"),
        (("--systems", "crepe,crepe", "--weights", "random"), "found crepe-random twice"),
    ):
        with pytest.raises(GuraError, match=message):
            evaluated(tmp_path, "--out", tmp_path / "out", *options)


def test_weights_that_are_missing_are_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(tmp_path))
    with pytest.raises(CheckpointError, match="gura-jax convert wav2vec2-large"):
        evaluated(tmp_path, "--out", tmp_path / "out", "--systems", "crepe,cat_wc", "--weights", "crepe-full=random")
    assert not (tmp_path / "out").exists()


# Systems from their members


class Pooled(Toy):
    """An encoder with an embedding of the whole clip: loudness and its powers."""

    pooled_size = 5

    def __call__(self, params: Any, audio: Any, lengths: Any) -> Output:
        loudness = jnp.sum(jnp.abs(audio), axis=1) / lengths.astype(jnp.float32)
        pooled = jnp.stack([loudness**power for power in range(1, 6)], axis=-1)
        return super().__call__(params, audio, lengths)._replace(pooled=pooled)


WAVE, FASTER, CREPE = Member(Toy(), name="wave"), Member(Toy(24_000), name="faster"), Member("crepe-tiny")
CLIP = Member(Pooled(), name="clip", scene="pooled")
FUSED: Mapping[str, System] = {
    "interleave": System("interleave", (WAVE, FASTER, CREPE), "interleave", 64),
    "average": System("average", (WAVE, CREPE), "average", 64),
    "pooled": System("pooled", (CLIP, CREPE, WAVE), "interleave", 64),
    "groups": System("groups", (WAVE, CREPE), "interleave", 64, scene_groups=5),
    "time": System("time", (WAVE, CREPE), "interleave_time", 64),
}


@pytest.mark.parametrize(
    ("name", "kind", "parts"),
    [
        ("interleave", "scene", ["wave-24000Hz", "faster-scene-frames", "crepe-tiny.last-24000Hz-random-scene-frames"]),
        ("interleave", "event", ["wave-24000Hz", "faster", "crepe-tiny.last-24000Hz-random"]),
        pytest.param("average", "scene", ["wave", "crepe-tiny.last-random-scene-frames"], marks=pytest.mark.slow),
        ("pooled", "scene", ["clip", "crepe-tiny.last-random", "wave-scene-frames"]),
        ("time", "event", ["wave", "crepe-tiny.last-random"]),
    ],
)
def test_fused_from_members_it_is_the_same(name: str, kind: str, parts: list[str], tmp_path: Path) -> None:
    """As if the system had embedded the clips at once: members of several rates, pooled ones, clips of two lengths."""
    task = read_task(write_task(tmp_path / "t", kind, clips=1))
    clip = task.folder / str(RATE) / "train" / "train-0.wav"
    soundfile.write(clip, np.tile(soundfile.read(clip)[0], 2)[:-77], RATE)
    source = SystemEmbeddings(FUSED[name], "random")
    folders = []
    for part in source.parts(task):
        source.load(part)(task, tmp_path / part.name)
        folders.append(tmp_path / part.name)
    assert [folder.name.removeprefix(f"{name}.") for folder in folders] == parts
    lookup = source.open(task, folders).lookup
    model = load_model(FUSED[name], weights="random")
    files = [(split, file) for split in task.splits for file in task.clips[split]]
    paths = [task.folder / str(RATE) / split / file for split, file in files]
    wanted = model.embed([load_audio(path, sample_rate=model.sample_rate) for path in paths])
    for (split, file), whole in zip(files, wanted, strict=True):
        found, times = lookup(split, file)
        expected = whole.scene if kind == "scene" else whole.frames
        assert expected is not None
        assert relative(found, expected) < FUSED_BOUND
        if kind == "event":
            assert times is not None
            np.testing.assert_array_equal(times, np.asarray(whole.times))


def test_what_is_not_linear_is_embedded_whole(tmp_path: Path) -> None:
    """Groups of frames, and members in turn along time."""
    task = read_task(write_task(tmp_path / "scene", clips=1))
    for name in ("groups", "time"):
        (part,) = SystemEmbeddings(FUSED[name]).parts(task)
        assert part == embed.Part(name, FUSED[name])


def test_members_are_embedded_once(tmp_path: Path) -> None:
    tasks = {kind: read_task(write_task(tmp_path / kind, kind, clips=1)) for kind in ("scene", "event")}
    names = ["hubert_base", "fusion_hubert_base", "cat_wc_base", "cat_xwc_base", "avg_hubert_crepe_base", "crepe"]
    for kind, wanted in {
        "scene": {"hubert_base", "fusion_hubert_base", "wav2vec2_base", "crepe-scene-frames", "crepe"},
        "event": {"hubert_base", "fusion_hubert_base", "wav2vec2_base", "crepe"},
    }.items():
        parts = [part for name in names for part in SystemEmbeddings(SYSTEMS[name]).parts(tasks[kind])]
        assert {part.name for part in parts} == wanted
        assert len(set(parts)) == len(wanted)
    both = [SystemEmbeddings(SYSTEMS[f"{how}_hubert_wav2vec2"]).parts(tasks["scene"]) for how in ("avg", "cat")]
    assert both[0] == both[1]
    assert [part.name for part in both[0]] == ["hubert-large.last", "wav2vec2_large"]
    own = System("mine", (Member("hubert-base", layers=(1, 2)), Member("wav2vec2-base", weights="random")))
    assert [p.name for p in SystemEmbeddings(own).parts(tasks["scene"])] == [
        "mine.hubert-base",
        "mine.wav2vec2-base-random",
    ]


# Learned layers


def test_what_is_learned_from_are_the_means_of_hidden_states(tmp_path: Path) -> None:
    task = read_task(write_task(tmp_path / "t", clips=1))
    source = SystemEmbeddings(SYSTEMS["fusion_hubert_base"], "random", "tiny", learned=True)
    (part,) = source.parts(task)
    source.load(part)(task, tmp_path / "out")
    model = load_model("fusion_hubert_base", weights="random", size="tiny")
    lookup = source.open(task, [tmp_path / "out"]).lookup
    for split in task.splits:
        for file in task.clips[split]:
            clip = load_audio(task.folder / str(RATE) / split / file, sample_rate=model.sample_rate)
            (states,) = model.hidden_states([clip])
            assert relative(lookup(split, file)[0], states.mean(1).ravel()) < FUSED_BOUND
    assert source.mixer == probes.Mixer((4,))
    assert source.name == "fusion_hubert_base-tiny-random_learned"
    with pytest.raises(SystemConfigError, match="one encoder with hidden states, found cat_wc"):
        assert SystemEmbeddings(SYSTEMS["cat_wc"], "random", "tiny", learned=True).mixer
    for name, learnable in (("fusion_hubert_base", True), ("hubert_base", False), ("crepe", False), ("cat_wc", False)):
        assert SystemEmbeddings(SYSTEMS[name]).averages_layers is learnable


def test_the_layer_that_says_something_is_found(tmp_path: Path) -> None:
    """Of three states two are noise; weights that start equal end with most of the weight on the third."""
    grid = SMALL | {"max_epochs": [300], "patience": [100], "lr": [3e-2]}
    task = read_task(write_task(tmp_path / "t", evaluation_params={"task_specific_param_grid": grid}, clips=30))
    plain = spectra(task)
    noise = np.random.default_rng(0)

    def lookup(split: str, file: str) -> tuple[np.ndarray, None]:
        scene = plain(split, file)[0]
        return np.concatenate(
            [3 * noise.standard_normal((2, len(scene))).astype(np.float32), scene[None]]
        ).ravel(), None

    scores = evaluate_task(task, lookup, FIXED, mixer=probes.Mixer((3,)))
    assert len(scores.state_weights) == 3
    assert sum(scores.state_weights) == pytest.approx(1, abs=1e-5)
    assert scores.state_weights[2] > 0.5
    assert scores.folds["test"].test["test_score"] > 0.9


def test_systems_are_compared(tmp_path: Path) -> None:
    """The command with learned layers: members are embedded once, and the tables compare what they can."""
    tasks, out = tmp_path / "tasks", tmp_path / "out"
    write_task(tasks / "esc50-v1-full", split_mode="new_split_kfold", clips=3)
    write_task(tasks / "b", "event", clips=3)
    names = "hubert_base,fusion_hubert_base,avg_hubert_wav2vec2_base"
    arguments = tasks, "--systems", names, "--weights", "random", "--size", "tiny", "--learn-layers", "--out", out
    first = evaluated(*arguments)
    assert first.exit_code == 0, first.output
    assert sorted(path.name for path in (out / "embeddings").iterdir()) == [
        "fusion_hubert_base-tiny-random",
        "fusion_hubert_base-tiny-random-states",
        "hubert_base-tiny-random",
        "wav2vec2_base-tiny-random",
    ]
    found = report.read_table(out)
    assert {(row.system.split("-")[0], row.task) for row in found} == {
        (name, task) for name in names.split(",") for task in ("esc50-v1-full", "b")
    } | {("fusion_hubert_base", "esc50-v1-full")}
    assert "fusion_hubert_base-tiny-random_learned" in {row.system for row in found}
    for title in ("Table 2", "Table 3"):
        assert title in first.stdout
    assert "Table 4" not in first.stdout
    assert "PaSST" in first.stdout  # the paper has numbers of esc50
    assert evaluated(*arguments).stdout == first.stdout
    learned = out / "scores/hear2021-0/fusion_hubert_base-tiny-random_learned/esc50-v1-full" / SCORES
    assert len(json.loads(learned.read_text())["state_weights"]) == 4
    page = (out / "report-hear2021-0.html").read_text()
    assert page.count("Learned weights of the hidden states of fusion_hubert_base-tiny-random_learned") == 1
    assert page.count('class="bars"') == 1
