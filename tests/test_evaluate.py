"""gura_jax/evaluate: tasks, protocols, score files and the command, on tasks of a few clips."""

import csv
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from gura_jax import Member, System, cli, load_model
from gura_jax.errors import GuraError, InputError, StoreError, SystemConfigError
from gura_jax.evaluate import embed, probes, report, run
from gura_jax.evaluate.protocol import PROTOCOLS, _Best, evaluate_task, grid_points
from gura_jax.evaluate.tasks import Event, Task, find_tasks, frame_targets, read_task

RATE = 16_000
FREQUENCIES = {"low": 300.0, "mid": 900.0, "high": 2700.0}
# Few and small probes: what is tested is what becomes of them.
SMALL = {"hidden_layers": [1], "hidden_dim": [16], "lr": [1e-2, 1e-3], "max_epochs": [9], "patience": [2]}
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
    """A lookup of log spectra, of frames of 25 ms."""

    def lookup(split: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        audio, _ = soundfile.read(task.folder / str(RATE) / split / name, dtype="float32")
        frames = np.log(np.abs(np.fft.rfft(audio.reshape(-1, 400), axis=1))[:, :80] + 1e-2).astype(np.float32)
        return (frames, 25.0 * np.arange(len(frames))) if task.embedding == "event" else (frames.mean(0), None)

    return lookup


def change(folder: Path, **meta: Any) -> Path:
    path = folder / "task_metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | meta))
    return folder


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
    found = [(p.hidden_layers, p.initialization[7], p.lr) for p in grid_points(task._replace(grid={}))]
    assert found == [
        (1, "n", 1e-4), (2, "u", 1e-3), (1, "n", 1e-3), (1, "n", 3.2e-4),
        (2, "n", 3.2e-4), (2, "u", 3.2e-4), (2, "n", 3.2e-3), (2, "u", 3.2e-3),
    ]  # fmt: skip
    (dcase, *_) = grid_points(task._replace(grid={}, task_name="dcase2016_task2"))
    assert dcase.check_val_every_n_epoch == 10
    for wrong in ({"hidden_norm": [1]}, {"lr": ["fast"]}, {"max_epochs": [1]}, {"initialization": ["zeros"]}):
        with pytest.raises(InputError, match="grid"):
            grid_points(task._replace(grid=wrong))


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
    before = probes.train._cache_size(), probes._predict._cache_size()
    evaluate_task(second, spectra(second), KIT, seed=3)
    assert (probes.train._cache_size(), probes._predict._cache_size()) == before


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


class Loud(torch.nn.Module):
    """The model of a HEAR module that counts what it computes."""

    sample_rate = RATE
    scene_embedding_size = timestamp_embedding_size = 80
    computed = 0


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A HEAR module of torch's: ``loud``."""
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
    # What is missing is computed again, and nothing else.
    (tmp_path / "out/embeddings/loud/a/train/train-3.wav.embedding.npy").unlink()
    assert evaluated(*arguments).stdout == first.stdout
    assert module.model.computed == 1
    with pytest.raises(StoreError, match="choose another --out"):
        embed._check_module(embed.Module("loud", "other.pt"), tmp_path / "out/embeddings/loud/a")


def test_modules_that_are_none(module: Any) -> None:
    with pytest.raises(SystemConfigError, match="expected a module to import"):
        embed.Module("no_such_module")
    with pytest.raises(SystemConfigError, match="found no load_model"):
        embed.Module("json")
    module.get_scene_embeddings = lambda audio, model: audio[:1]
    with pytest.raises(SystemConfigError, match="a row for each of 3 clips"):
        embed.Module("loud")(np.zeros((3, 400), np.float32), frames=False)


def test_a_module_without_torch(tmp_path: Path, module: Any) -> None:
    module.load_model = lambda: types.SimpleNamespace(sample_rate=RATE)
    module.get_scene_embeddings = lambda audio, model: jax.numpy.asarray(audio)[:, :7]
    found, times = embed.Module("loud")(np.ones((2, 400), np.float32), frames=False)
    assert (found.shape, found.dtype, times) == ((2, 7), np.float32, None)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task each of scenes and events, and one that is broken; then again; then another seed and protocol."""
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
    scores = json.loads((out / "scores/hear2021-0/small-random/a" / report.SCORES).read_text())
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
    scene, times = embed.embed_task(model, task, tmp_path / "out")("train", "train-1.wav")
    assert scene.shape == (model.scene_embedding_size,)
    assert times is None


def test_the_command_needs_one_of_both(tmp_path: Path) -> None:
    for options in ((), ("--system", "crepe", "--module", "x")):
        with pytest.raises(GuraError, match="one of them"):
            evaluated(tmp_path, "--out", tmp_path / "out", *options)
