"""gura_jax/finetune: labelled clips, the step, and a loop that resumes where it was killed."""

import csv
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from pyarrow import parquet
from reference import relative
from refusals import refusal, refuses
from test_evaluate import write_task
from toy import Toy, contents
from typer.testing import CliRunner

from gura_jax import (
    EmbeddingStore,
    Encoder,
    Family,
    FrameGrid,
    Member,
    Model,
    Options,
    Output,
    Preset,
    System,
    cli,
    load_model,
    parallel,
)
from gura_jax.errors import CheckpointError, GuraError, InputError, StoreError, SystemConfigError, TrainingError
from gura_jax.finetune import data, optimiser, step, store
from gura_jax.finetune.loop import Result, finetune
from gura_jax.finetune.scores import Best
from gura_jax.finetune.settings import Settings
from gura_jax.finetune.step import Network, State, Weights
from gura_jax.finetune.tasks import read_labelled
from gura_jax.models.encoder import Noise
from gura_jax.models.families import ENCODERS, FAMILIES
from gura_jax.models.layers import layer_weights, weighted_sum
from gura_jax.parallel import place_rows

RATE, HOP = 16_000, 320
FREQUENCIES = {"low": 300.0, "mid": 900.0, "high": 2700.0}
SUM_BOUND = 1e-5  # relative: a gradient summed in other parts, or on other devices
HALF_BOUND = 0.05  # relative, of a gradient in bfloat16, whose products have 8 bits
SETTINGS = Settings(epochs=3, batch_size=8, learning_rate=0.02, checkpoint_steps=2)


# An encoder that compiles within a second


@dataclasses.dataclass(frozen=True)
class PageConfig:
    model_type: str = "page"
    size: int = 16
    blocks: int = 3

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> Self:
        return cls(**config)

    def tiny(self) -> Self:
        return self


class PageEncoder(Encoder):
    """Spectra of 20 ms, and blocks of one layer."""

    sample_rate, grid = RATE, FrameGrid(HOP, HOP / 2, HOP)

    def __init__(self, config: PageConfig, options: Options) -> None:
        self.config, self.options = config, options
        self.feature_size, self.num_states = config.size, config.blocks + bool(config.blocks)
        self.weights = layer_weights(options.layers, config.blocks)

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        shapes = {"input.kernel": (HOP // 2 + 1, self.config.size)}
        shapes |= {f"blocks.{i}.kernel": (self.config.size, self.config.size) for i in range(self.config.blocks)}
        shapes |= {f"blocks.{i}.mean": (self.config.size,) for i in range(self.config.blocks)}

        @jax.jit
        def draw(key: jax.Array) -> dict[str, jax.Array]:
            keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
            return {n: jax.random.normal(keys[n], x) / np.float32(np.sqrt(x[0])) for n, x in shapes.items()}

        return draw(key)

    def prepare(self, params: Any) -> Any:
        dtype = self.options.compute_dtype
        return {name: x.astype(dtype) if name.endswith("kernel") else x for name, x in params.items()}

    def restore(self, params: Any) -> Any:
        return {name: x.astype(jnp.float32) for name, x in params.items()}

    def depths(self, params: Any) -> Mapping[str, np.ndarray]:
        return {n: np.asarray(int(n.split(".")[1]) + 1 if n.startswith("blocks") else 0, np.int32) for n in params}

    def states(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        counts, T = self.grid.count(lengths), audio.shape[1] // HOP
        spectra = jnp.abs(jnp.fft.rfft(audio[:, : T * HOP].reshape(-1, T, HOP)))
        x = self._product(spectra, params["input.kernel"])
        yield "state 0", x, counts
        for i in range(self.config.blocks):
            shift = params[f"blocks.{i}.mean"][None, None, :]
            x = x + jnp.tanh(self._product(x, params[f"blocks.{i}.kernel"]) + shift)
            yield f"state {i + 1}", x, counts

    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return (x.astype(kernel.dtype) @ kernel).astype(jnp.float32)

    def __call__(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Output:
        states = [x for _, x, _ in self.states(params, audio, lengths)]
        return Output(weighted_sum(states, self.weights), self.grid.count(lengths))

    def disturbed(self, params: Any, audio: jax.Array, lengths: jax.Array, noise: Noise) -> Output:
        out = self(params, audio, lengths)
        return out._replace(frames=jnp.where(jax.random.bernoulli(noise.key, 0.5, out.frames.shape), out.frames, 0.0))


@pytest.fixture(autouse=True, scope="module")
def _page() -> Iterator[None]:
    presets = {"page-one": Preset(PageConfig()), "page-flat": Preset(PageConfig(blocks=0))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "page", Family("page", PageConfig, PageEncoder, presets=presets))
        for name, preset in presets.items():
            patch.setitem(ENCODERS, name, preset)
        yield


def page_model(devices: int = 1, **options: Any) -> Model:
    return load_model("page-one", weights="random", devices=jax.local_devices()[:devices], **options)


# A task: tones


def write_tones(folder: Path, train: int = 21, valid: int = 9, test: int = 9) -> Path:
    """A manifest of clips of 0.2 to 0.4 s, with the columns label and split."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = []
    for split, clips in (("train", train), ("valid", valid), ("test", test)):
        for i in range(clips):
            label = list(FREQUENCIES)[i % 3]
            time = np.arange(RATE * (2 + i % 3) // 10) / RATE
            tone = 0.3 * np.sin(2 * np.pi * FREQUENCIES[label] * time + i) + 0.02 * random.standard_normal(len(time))
            soundfile.write(folder / f"{split}{i}.wav", tone, RATE)
            rows.append((f"{split}{i}", f"{split}{i}.wav", label, split))
    with open(folder / "tones.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "path", "label", "split"), *rows])
    return folder / "tones.csv"


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("tones") / "clips")


def tuned(tones: Path, out: Path, settings: Settings = SETTINGS, **options: Any) -> Result:
    return finetune(page_model(**options), read_labelled(tones, label="label"), settings, out)


def logged(out: Path) -> list[dict[str, str]]:
    with open(out / store.LOG, newline="") as file:
        return list(csv.DictReader(file))


# Training


def test_it_learns_and_becomes_a_system(tones: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", dataclasses.replace(SETTINGS, epochs=8, patience=8)
    model, task = page_model(), read_labelled(tones, label="label")
    result = finetune(model, task, settings, out)
    jax.tree.map(np.testing.assert_array_equal, model.params, page_model().params)  # it stays as it was
    rows = logged(out)
    assert [int(row["step"]) for row in rows] == list(range(1, 8 * 3 + 1))
    losses = [float(row["loss"]) for row in rows]
    assert losses[0] == pytest.approx(np.log(3), rel=1e-6)  # a head of zeros
    assert losses[-1] < 0.3 * losses[0]
    assert [bool(row["valid_score"]) for row in rows] == [False, False, True] * 8
    assert result.valid_score == result.test["top1_acc"] == 1
    assert result.valid_score == max(float(row["valid_score"]) for row in rows if row["valid_score"])
    loaded = load_model(out / store.MODEL)
    assert loaded.weights["page-one"]["source"] == "changed from random"
    assert result == tuned(tones, out, settings)  # it is read again
    # Its head on its scenes gives what was validated.
    files = list(task.clips["valid"])
    scenes = loaded.scene_embeddings([soundfile.read(tones.parent / f"{f}.wav", dtype="float32")[0] for f in files])
    logits = step.apply_head(store.read_head(out), jnp.asarray(scenes))
    assert [task.labels[i] for i in logits.argmax(1)] == [label for (label,) in task.clips["valid"].values()]


class KilledError(Exception):
    pass


NOISY = dataclasses.replace(SETTINGS, dropout=0.5)


@pytest.fixture(scope="module")
def whole(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The files of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    tuned(tones, out, NOISY)
    return contents(out)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("append_row", 1),  # nothing is there
        ("append_row", 4),  # after a checkpoint in an epoch, which the log is ahead of
        ("save_head", 1),  # the model is ahead of the checkpoint
        pytest.param("save", 2, marks=pytest.mark.slow),
        ("save", 3),
        pytest.param("read_head", 1, marks=pytest.mark.slow),  # all is trained
    ],
)
def test_killed_and_resumed_it_is_the_same(
    function: str,
    call: int,
    tones: Path,
    whole: Mapping[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit: the log, the model, its head and the result; with noise, which goes on too."""
    original, calls = getattr(store, function), 0

    def killed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KilledError
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store, function, killed)
        with pytest.raises(KilledError):
            tuned(tones, tmp_path, NOISY)
    tuned(tones, tmp_path, NOISY)
    resumed = contents(tmp_path)
    saved = [f"model/{name}" for name in ("system.json", "page-one/manifest.json")]  # which has the weights' hashes
    for name in (store.LOG, store.HEAD, store.RESULT, store.RUN, f"{store.CHECKPOINT}/{store.PROGRESS}", *saved):
        assert whole[name] == resumed[name], name


@pytest.mark.slow
def test_noise_and_seed_change_the_run(tones: Path, whole: Mapping[str, bytes], tmp_path: Path) -> None:
    logs = [whole[store.LOG]]
    for i, settings in enumerate([SETTINGS, dataclasses.replace(NOISY, seed=1)]):
        tuned(tones, tmp_path / str(i), settings)
        logs.append((tmp_path / str(i) / store.LOG).read_bytes())
    assert len(set(logs)) == 3


def test_it_stops_early(tones: Path, tmp_path: Path) -> None:
    """After as many epochs without a better score; where it was killed just then, too."""
    settings = dataclasses.replace(SETTINGS, epochs=9, learning_rate=0.0, patience=2)
    assert tuned(tones, tmp_path / "run", settings).epochs == 3
    (tmp_path / "run" / store.RESULT).unlink()
    assert tuned(tones, tmp_path / "run", settings).epochs == 3


def test_layer_weights(tones: Path, tmp_path: Path) -> None:
    """They are learned, the encoder stays as it is, and the saved system has them."""
    out = tmp_path / "run"
    result = tuned(tones, out, dataclasses.replace(SETTINGS, train="layer-weights", epochs=8, learning_rate=0.1))
    (weights,) = result.layer_weights.values()
    assert sum(weights) == pytest.approx(1)
    assert np.ptp(weights) > 0.01
    before, after = page_model(layers="last"), load_model(out / store.MODEL)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert after.system.members[0].layers == tuple(weights)
    clips = [0.1 * np.random.default_rng(0).standard_normal(RATE // 2).astype(np.float32)]
    (states,) = before.hidden_states(clips)
    assert relative(after.timestamp_embeddings(clips)[0][0], np.tensordot(weights, states, 1)) <= SUM_BOUND
    assert result.test["top1_acc"] == 1


@pytest.mark.parametrize("score_stopping", [True, False])
def test_events(score_stopping: bool, tmp_path: Path) -> None:
    task = write_task(
        tmp_path / "task",
        "event",
        use_scoring_for_early_stopping=score_stopping,
        evaluation_params={
            "event_postprocessing_grid": {
                "median_filter_ms": [60.0],
                "min_duration": [60.0, 125.0][: 2 if score_stopping else 1],
            }
        },
    )
    settings = dataclasses.replace(SETTINGS, epochs=10, learning_rate=0.05, patience=10)
    result = finetune(page_model(), read_labelled(task), settings, tmp_path / "run")
    assert result.chosen_by == ("event_onset_200ms_fms" if score_stopping else "loss")
    assert result.test["event_onset_200ms_fms"] > 0.8
    assert result.test["segment_1s_er"] < 0.2


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_any_number_of_labels(form: str, tones: Path, tmp_path: Path) -> None:
    with open(tones, newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        row["label"] = [[row["label"], "tone"], [], [row["label"]]][i % 4 % 3]
    path = tones.parent / f"many.{form}"
    if form == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    task = read_labelled(path, label="label")
    assert (task.prediction, task.metrics, task.labels) == ("multilabel", ("mAP",), ("high", "low", "mid", "tone"))
    result = finetune(page_model(), task, dataclasses.replace(SETTINGS, epochs=1), tmp_path / "run")
    assert 0 < result.test["mAP"] <= 1


# The step


def first_batch(model: Model, tones: Path, settings: Settings) -> tuple[Network, Weights, Weights, Weights, data.Batch]:
    """A network, its weights as :func:`step.divide` divides them, and a batch."""
    task = read_labelled(tones, label="label")
    found = data.load(task, model, task.folds[0], settings.batch_size)
    planned = data.plan(found.train, found.buckets, settings.batch_size)[-1:]  # not a full one
    (batch,) = data.read(task, model, found.train, planned, settings.batch_size, slice(0, settings.batch_size))
    net = step.network(model, settings, task.embedding, task.prediction)
    return net, *step.divide(model, net, settings, len(task.labels)), place_rows(batch, model.compilation.mesh)


@functools.cache
def stepped(tones: Path, settings: Settings = SETTINGS, devices: int = 1, **options: Any) -> tuple[State, step.Figures]:
    """The state after two steps, and the figures of the second."""
    model = page_model(devices, **options)
    net, trained, frozen, scales, batch = first_batch(model, tones, settings)
    transformation = optimiser.adamw(settings, 10)
    mesh = model.compilation.mesh
    placed: Any = step.place_replicated((trained, frozen), mesh)
    moments = step.place_replicated(transformation.init(placed[0]), mesh)
    state = State(placed[0], moments, step.place_replicated(np.int32(0), mesh))
    update = step.compile_step(step.train_step(net, transformation, scales, settings), state)
    state, _ = update(state, placed[1], batch)
    return update(state, placed[1], batch)


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 4), (8, 1), (4, 2)])
def test_parts_and_devices_do_not_matter(devices: int, accumulate: int, tones: Path) -> None:
    state, figures = stepped(tones)
    again, found = stepped(tones, dataclasses.replace(SETTINGS, accumulate=accumulate), devices)
    assert found.loss == pytest.approx(float(figures.loss), rel=SUM_BOUND)
    assert found.gradient_norm == pytest.approx(float(figures.gradient_norm), rel=SUM_BOUND)
    for a, b in zip(jax.tree.leaves(again.moments), jax.tree.leaves(state.moments), strict=True):
        assert relative(a, b) <= SUM_BOUND or not np.any(b)


def test_bfloat16_has_weights_in_float32(tones: Path) -> None:
    _, figures = stepped(tones)
    half, found = stepped(tones, dataclasses.replace(SETTINGS, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(half.trained)} == {jnp.dtype("float32")}
    assert float(found.gradient_norm) != float(figures.gradient_norm)
    assert found.gradient_norm == pytest.approx(float(figures.gradient_norm), rel=HALF_BOUND)
    kernel = half.trained.members["page-one"]["blocks.0.kernel"]
    assert relative(kernel.astype(jnp.bfloat16), kernel) > 1e-4  # it holds what bfloat16 does not


def test_the_last_blocks(tones: Path) -> None:
    """The others get no moments and do not change, nor do statistics."""
    settings = dataclasses.replace(SETTINGS, train="last:2")
    state, _ = stepped(tones, settings)
    assert set(state.trained.members["page-one"]) == {"blocks.1.kernel", "blocks.2.kernel"}
    everything, _ = stepped(tones)
    assert set(everything.trained.members["page-one"]) == {"input.kernel", *(f"blocks.{i}.kernel" for i in range(3))}
    before = page_model().params["page-one"]
    for name, value in state.trained.members["page-one"].items():
        assert relative(value, before[name]) > 1e-3


def test_rates_decay_with_depth() -> None:
    model = page_model()
    (member,) = model.fusion.members
    scales = optimiser.member_scales(member, model.params["page-one"], Settings().part, 0.5)
    assert [float(scales[f"blocks.{i}.kernel"]) for i in (2, 1, 0)] == [0.5, 0.25, 0.125]
    assert scales["input.kernel"] == 0.0625
    assert scales["blocks.0.mean"] == 0  # a statistic, by its name


def test_the_schedule() -> None:
    rate = [float(np.asarray(optimiser.schedule(Settings(learning_rate=1.0, warmup=0.2), 20)(i))) for i in range(21)]
    np.testing.assert_allclose(rate[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert rate[4:] == sorted(rate[4:], reverse=True)
    assert rate[-1] == 0


# Batches


def test_an_order_is_a_function_of_seed_and_epoch(tones: Path) -> None:
    task = read_labelled(tones, label="label")
    found = data.load(task, page_model(), task.folds[0], 4)

    def planned(seed: int, epoch: int) -> list[tuple[list[int], int]]:
        batches = data.plan(found.train, found.buckets, 4, data.epoch_order(seed, epoch))
        return [(b.clips.tolist(), b.samples) for b in batches]

    assert planned(1, 2) == planned(1, 2)
    assert len({str(planned(*x)) for x in ((1, 2), (1, 3), (2, 2))}) == 3
    for batches in (planned(1, 2), planned(1, 3)):
        assert len(batches) == len(planned(0, 0))
        assert sorted(i for clips, _ in batches for i in clips) == list(range(21))
        assert all(found.train.lengths[clips].max() <= samples for clips, samples in batches)


def test_lengths_are_few() -> None:
    lengths = np.random.default_rng(0).integers(1000, 9000, 1000)
    many, few, one = (data.buckets(lengths, size) for size in (1, 50, 400))
    assert len(many) > len(few) > len(one) == 1
    assert many[-1] == few[-1] == one[-1] == lengths.max()
    counts = np.diff([0, *(np.sum(lengths <= top) for top in few)])
    assert (counts[:-1] >= data.BATCHES_PER_BUCKET * 50).all()


def test_a_shape_is_compiled_once(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []
    original = step.predict

    def counted(net: Network, weights: Weights, batch: data.Batch, noise: Any = None) -> Any:
        traced.append(batch.audio[RATE].shape)
        return original(net, weights, batch, noise)

    monkeypatch.setattr(step, "predict", counted)
    tuned(tones, tmp_path / "run")
    assert len(traced) == 3  # to train, to validate, to test


def test_of_scores_the_best() -> None:
    assert Best().is_beaten_by(float("nan"), True)
    nan, some = Best(float("nan"), 0), Best(0.5, 0)
    assert nan.is_beaten_by(0.1, True)
    assert not nan.is_beaten_by(float("nan"), True)
    assert not some.is_beaten_by(float("nan"), False)
    assert some.is_beaten_by(0.6, True)
    assert not some.is_beaten_by(0.6, False)
    assert not some.is_beaten_by(0.5, True)


# What cannot be trained


def rewritten(tones: Path, change: Any) -> Path:
    """The manifest with rows changed by a function of (number, row)."""
    with open(tones, newline="") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        change(i, row)
    path = tones.parent / "changed.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda i, row: None, {}, "--label"),
        (lambda i, row: None, {"label": "word"}, "expected a column 'word', found id, path"),
        (lambda i, row: row.update(label="low"), {"label": "label"}, "those of one: low"),
        (lambda i, row: row.update(label="" if i < 9 else "low"), {"label": "label"}, "none for 9: train0, train1"),
        (lambda i, row: row.update(label=i / 2), {"label": "label"}, "integers, or lists of them, found double"),
        (lambda i, row: row.update(split="dev"), {"label": "label"}, "train, valid or test, found 'dev'"),
        (lambda i, row: row.update(split="train"), {"label": "label"}, "whose split is valid, found none"),
        (lambda i, row: row.update(label=i if i > 20 else i % 2), {"label": "label"}, "found 21, 22, 23, 24, 25 in"),
        (lambda i, row: row.update(path="none.wav"), {"label": "label"}, "/none.wav: "),
    ],
)  # fmt: skip
def test_manifests_that_make_no_sense(change: Any, options: Any, message: str, tones: Path, tmp_path: Path) -> None:
    def run() -> None:
        finetune(page_model(), read_labelled(rewritten(tones, change), **options), SETTINGS, tmp_path / "run")

    with refuses(InputError, message):
        run()


def test_a_task_that_is_not_there(tmp_path: Path) -> None:
    with refuses(InputError, "none.csv: expected the folder of a HEAR task, or a manifest, found no such file"):
        read_labelled(tmp_path / "none.csv", label="label")


def test_clips_that_are_too_short(tones: Path, tmp_path: Path) -> None:
    path = write_tones(tmp_path / "clips")
    soundfile.write(path.parent / "train2.wav", np.zeros(100), RATE)
    with refuses(InputError, "1 of 21", "train2.wav: expected at least 400 samples at 16 kHz for page-one, found 100"):
        tuned(path, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "some"}, "expected all, last:N (N blocks, from 1) or layer-weights, found 'some'"),
        ({"train": "last:0"}, "found 'last:0'"),
        ({"epochs": 0}, "epochs: expected a whole number from 1, found 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number from 0, found nan"),
        ({"dropout": 1.0}, "dropout: expected a number from 0, under 1, found 1.0"),
        ({"accumulate": 3}, "accumulate: expected a divisor of the batch size, 32, found 3"),
        ({"train": "layer-weights", "mask_time": 0.1}, "leaves the encoders as they are"),
    ],
)
def test_settings_that_make_no_sense(settings: Any, message: str) -> None:
    assert message in refusal(SystemConfigError, Settings, **settings)


@pytest.mark.parametrize(
    ("system", "settings", "message"),
    [
        ("page-one", {"train": "last:4"}, "at most last:3, as page-one has 3 blocks, found last:4"),
        ("page-one", {"batch_size": 12}, "batch size: expected a multiple of 8"),
        ("page-flat", {"train": "last:1"}, "found no transformer blocks for last:1: train all"),
        ("page-flat", {"train": "layer-weights"}, "no hidden states to weigh"),
        (System("mine", (Member(Toy()),)), {}, "is a Python object"),
    ],
)
def test_systems_that_cannot_be_trained_so(
    system: Any, settings: Any, message: str, tones: Path, tmp_path: Path
) -> None:
    model = load_model(system, weights="random")
    task = read_labelled(tones, label="label")
    with refuses(SystemConfigError, message):
        finetune(model, task, dataclasses.replace(SETTINGS, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_in_bfloat16(tones: Path, tmp_path: Path) -> None:
    with refuses(SystemConfigError, "expected a model with weights in float32, found bfloat16"):
        tuned(tones, tmp_path / "run", dtype="bfloat16")


def test_a_loss_that_is_not_finite(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is named, and what was good before is kept: it goes on from there."""
    out, plan, number = tmp_path / "run", place_rows, 0

    def damaged(batch: data.Batch, mesh: Any) -> data.Batch:
        nonlocal number
        number += 1
        return plan(batch._replace(targets=batch.targets * np.float32("nan")) if number == 8 else batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "place_rows", damaged)  # an epoch is 3 steps, and 2 batches to validate with
        with refuses(
            TrainingError,
            "step 6: expected a finite loss, found nan",
            "keeps the checkpoint of step 5 and the model of epoch 1",
        ):
            tuned(tones, out, dataclasses.replace(SETTINGS, checkpoint_steps=1))
    assert [int(row["step"]) for row in logged(out)] == [1, 2, 3, 4, 5]
    tuned(tones, out, dataclasses.replace(SETTINGS, checkpoint_steps=1))
    tuned(tones, tmp_path / "whole", dataclasses.replace(SETTINGS, checkpoint_steps=1))
    assert contents(out)[store.LOG] == contents(tmp_path / "whole")[store.LOG]


def test_devices_without_memory(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(step, "compile_step", lambda *_: full)
    with refuses(
        TrainingError, "no memory for 4 clips at once", "--accumulate, now 2", "--remat layers", "--batch-size"
    ):
        tuned(tones, tmp_path / "run", dataclasses.replace(SETTINGS, accumulate=2))


def test_a_folder_of_something_else(tones: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, epochs=1)
    out = tmp_path / "run"
    tuned(tones, out, settings)
    with refuses(StoreError, "holds another fine-tuning: learning_rate 0.01 here, 0.02 there", "--overwrite"):
        tuned(tones, out, dataclasses.replace(settings, learning_rate=0.01))
    with refuses(StoreError, "weights"):
        tuned(tones, out, settings, seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with refuses(StoreError, "expected an empty folder or a fine-tuning, found thesis.tex"):
        tuned(tones, tmp_path / "other", settings)
    (out / store.RESULT).unlink()
    (out / store.CHECKPOINT / store.PROGRESS).write_text("{")
    with refuses(CheckpointError, "cannot be read", "remove it to start again"):
        tuned(tones, out, settings)


# The command


def invoked(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["finetune", *map(str, arguments)], catch_exceptions=True)


def test_the_command(tones: Path, tmp_path: Path) -> None:
    """A real encoder, whose last block is trained alone; then the model embeds."""
    out = tmp_path / "run"
    options = (
        "--label",
        "label",
        "--size",
        "tiny",
        "--weights",
        "random",
        "--batch-size",
        8,
        "--epochs",
        2,
        "--lr",
        0.01,
    )
    ran = invoked(tones, "--system", "hubert_base", "--out", out, "--train", "last:1", *options, "--json")
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout)
    assert result["epochs"] == 2
    losses = [float(row["loss"]) for row in logged(out)]
    assert losses[-1] < losses[0]
    before = load_model("hubert_base", size="tiny", weights="random")
    after = load_model(out / store.MODEL)
    (member,) = before.fusion.members
    a, b = (member.encoder.restore(dict(model.params[member.name])) for model in (before, after))
    changed = {name for name in a if not np.array_equal(a[name], b[name])}
    assert changed
    assert all(name.startswith(f"encoder.layers.{member.encoder.num_states - 2}.") for name in changed)
    again = invoked(tones, "--system", "hubert_base", "--out", out, "--train", "last:1", *options)
    assert "epochs: 2, best: " in again.stdout
    ran = CliRunner().invoke(
        cli.app, ["embed", str(tones), "--system", str(out / store.MODEL), "--out", str(tmp_path / "e")]
    )
    assert ran.exit_code == 0, ran.output
    assert EmbeddingStore(tmp_path / "e").scenes().shape == (39, before.scene_embedding_size)
    wrong = invoked(tones, "--system", "hubert_base", "--out", out, "--train", "none", *options)
    assert isinstance(wrong.exception, GuraError)
