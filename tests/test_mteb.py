"""gura_jax.mteb and gura-jax mteb: MTEB's own code evaluates systems, on its mock tasks and on tasks made here."""

import importlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import jax
import mteb
import numpy as np
import pytest
import soundfile
from mteb._create_dataloaders import create_dataloader
from mteb.mocks.mock_tasks import MockAudioClassification
from refusals import refuses
from toy import RATE, Toy, environment, toy_model

from gura_jax import AudioError, InputError, Member, System, SystemConfigError, cli
from gura_jax import mteb as adapter
from gura_jax.audio import load_audio, resample
from gura_jax.errors import StoreError
from gura_jax.evaluate import mteb as runs
from gura_jax.mteb import MtebEncoder, load

ROOT = Path(__file__).parent.parent
SAME_BOUND = 1e-5  # relative norm of a clip's embedding, alone and among others
OTHER_BOUND = 1e-3  # relative norm; MTEB's wrapper of a small HuBERT is off by 8e-3
MOCK = MockAudioClassification.metadata
AUDIO_MOCKS = {
    "MockAudioClassification", "MockAudioClassificationCrossVal", "MockAudioMultilabelClassification",
    "MockAudioClusteringTask", "AbsTaskAudioPairClassification", "MockAudioReranking", "MockAny2AnyRetrievalA2A",
}  # fmt: skip


def script(folder: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


digits, padding = script("examples", "mteb_digits"), script("benchmarks", "mteb_padding")


@pytest.fixture
def toy() -> MtebEncoder:
    return MtebEncoder(toy_model(), "toy")


@pytest.fixture
def wav_by_soundfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode arrays by soundfile: datasets does by torchcodec, which needs FFmpeg on the machine."""

    def encode(self: datasets.Audio, value: Any) -> dict[str, Any]:
        if "array" not in value:
            return {"bytes": value.get("bytes"), "path": value.get("path")}
        return {"bytes": wav(np.asarray(value["array"], np.float32), value["sampling_rate"]), "path": None}

    monkeypatch.setattr(datasets.Audio, "encode_example", encode)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Recordings named as spoken digits are; a digit is a level, so that no classifier mistakes it."""
    folder = tmp_path / "digits"
    folder.mkdir()
    for i, speaker in enumerate(("ann", "bob", "cid")):
        for digit in range(2):
            for take in range(4):
                time = np.arange(RATE // 4 + 800 * take) / RATE
                tone = digit - 0.5 + 0.1 * (i + 1) * np.sin(2 * np.pi * (200 + 30 * take) * time)
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", tone, RATE)
    return folder


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def noise(seconds: float, rate: int = RATE, channels: int | None = None) -> np.ndarray:
    shape = (round(seconds * rate), *([channels] if channels else []))
    return 0.1 * np.random.default_rng(round(1000 * seconds)).standard_normal(shape).astype(np.float32)


def encode(encoder: MtebEncoder, data: datasets.Dataset, batch_size: int = 32, **options: Any) -> np.ndarray:
    """Encode as MTEB's tasks do."""
    loader = create_dataloader(data, task_metadata=MOCK, batch_size=batch_size)
    return encoder.encode(
        loader, task_metadata=MOCK, hf_split="test", hf_subset="default", show_progress_bar=False, **options
    )


def of_files(contents: list[bytes], **columns: Any) -> datasets.Dataset:
    audio = [{"bytes": content, "path": None} for content in contents]
    return datasets.Dataset.from_dict({"audio": audio, **columns}).cast_column("audio", datasets.Audio())


# Embeddings


def test_clips_of_any_rate_length_and_channels(toy: MtebEncoder, tmp_path: Path) -> None:
    """As files, whose other columns do not matter; in order, and each as if it were alone."""
    clips = [noise(1.0), noise(40.0), noise(0.5, 8000), noise(0.7, 44100, channels=2), noise(0.3)]
    rates = [RATE, RATE, 8000, 44100, RATE]
    contents = [wav(clip, rate) for clip, rate in zip(clips, rates, strict=True)]
    found = encode(toy, of_files(contents, label=list(range(5))))
    assert found.dtype == np.float32
    for i, content in enumerate(contents):
        (path := tmp_path / f"{i}.wav").write_bytes(content)
        np.testing.assert_array_equal(found[i], toy.model.scene_embeddings([load_audio(path, sample_rate=RATE)])[0])


def test_arrays_and_paths(toy: MtebEncoder, tmp_path: Path) -> None:
    clip, stereo = noise(0.5, 8000), noise(0.4, channels=2)
    arrays = datasets.Dataset.from_dict({"audio": [{"array": clip, "sampling_rate": 8000}]})
    expected = toy.model.scene_embeddings([resample(clip, 8000, RATE)])
    np.testing.assert_array_equal(encode(toy, arrays), expected)
    np.testing.assert_array_equal(encode(toy, arrays.with_format("numpy")), expected)
    channels_first = datasets.Dataset.from_dict({"audio": [{"array": stereo.T, "sampling_rate": RATE}]})
    np.testing.assert_allclose(
        encode(toy, channels_first), toy.model.scene_embeddings([stereo.mean(axis=1)]), atol=1e-7
    )
    soundfile.write(tmp_path / "a.flac", clip, 8000)
    path = datasets.Dataset.from_dict({"audio": [str(tmp_path / "a.flac")]}).cast_column("audio", datasets.Audio())
    np.testing.assert_allclose(encode(toy, path), expected, atol=1e-4)  # 16 bits


@pytest.mark.parametrize("together", [1e-3, 0.05, 8])
def test_neither_batches_nor_groups_matter(together: float, toy: MtebEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    data = of_files([wav(noise(0.1 + 0.07 * (7 * i % 20))) for i in range(20)])
    monkeypatch.setattr(adapter, "BATCHES_TOGETHER", 1e9)
    expected = encode(toy, data)
    monkeypatch.setattr(adapter, "BATCHES_TOGETHER", together)
    embedded: list[int] = []
    scenes = toy.model.scene_embeddings

    def counted(clips: Any, **options: Any) -> np.ndarray:
        embedded.append(len(clips))
        return scenes(clips, **options)

    monkeypatch.setattr(toy.model, "scene_embeddings", counted)
    for batch_size in (1, 3, 32):
        np.testing.assert_array_equal(encode(toy, data, batch_size), expected)
    assert sum(embedded) == 3 * len(data)
    assert (len(embedded) == 3) == (together == 8)


def test_bad_clips(toy: MtebEncoder) -> None:
    good, name = wav(noise(1.0)), "MockAudioClassification, default, test: clip 1"
    with refuses(AudioError, name, "expected at least 400 samples", "found 100"):
        encode(toy, of_files([good, wav(noise(100 / RATE))]))
    with refuses(AudioError, name, "cut short"):
        encode(toy, of_files([good, good[:-8000]]))
    with refuses(AudioError, name, "finite"):
        encode(toy, of_files([good, wav(np.full(RATE, np.nan, np.float32))]))
    with refuses(AudioError, name):
        encode(toy, of_files([good, b"RIFF and so on"]))
    with refuses(AudioError, "clip 0: expected an audio file, found none"):
        encode(toy, datasets.Dataset.from_dict({"audio": [{"bytes": None, "path": None}]}))
    with refuses(AudioError, "clip 0: expected an array and its sampling_rate, found str"):
        encode(toy, datasets.Dataset.from_dict({"audio": ["a.wav"]}))
    with refuses(AudioError, "clip 0", "divide by the full scale"):
        encode(toy, datasets.Dataset.from_dict({"audio": [{"array": [1] * RATE, "sampling_rate": RATE}]}))
    with refuses(InputError, "expected a column 'audio', found none"):
        encode(toy, datasets.Dataset.from_dict({"text": ["a"]}))
    with refuses(InputError, "precision: expected float32 embeddings, found 'int8'"):
        encode(toy, of_files([good]), precision="int8")
    assert encode(toy, of_files([good]).select([])).shape == (0, toy.model.scene_embedding_size)


def test_a_clip_alone_and_among_others() -> None:
    """On several devices."""
    encoder = load("hubert_base", weights="random", size="tiny")
    assert encoder.model.compilation.batch_devices == jax.local_device_count() == 8
    clips = [wav(noise(seconds)) for seconds in (0.9, 0.5)]
    together = encode(encoder, of_files(clips))
    alone = np.concatenate([encode(encoder, of_files([clip])) for clip in clips])
    assert together.shape == (2, encoder.mteb_model_meta.embed_dim)
    distances = np.linalg.norm(together - alone, axis=1) / np.linalg.norm(alone, axis=1)
    assert distances.max() < SAME_BOUND


def test_mtebs_wrapper_of_hubert_is_not_exact(tmp_path: Path) -> None:
    """The same random weights: MTEB's wrapper derives the number of frames from a ratio, and loses one of a clip."""
    clips = [noise(1.0), noise(0.505)]
    theirs, ours = padding.wrappers(padding.save("hubert-large", tmp_path / "hubert", "tiny"))
    assert padding.compare(ours, clips).distance < SAME_BOUND
    assert padding.compare(theirs, clips).distance > OTHER_BOUND
    (a,), (b,) = theirs(clips[:1]), ours(clips[:1])
    assert np.linalg.norm(a - b) < SAME_BOUND * np.linalg.norm(a)


# What MTEB is told


def test_description() -> None:
    toys = System("toys", (Member(Toy(8000), name="a"), Member(Toy(RATE), name="b")))
    meta = load(toys).mteb_model_meta
    assert (meta.name, meta.framework, meta.modalities, meta.embed_dim) == ("gura-jax/toys", ["JAX"], ["audio"], 6)
    assert (meta.license, meta.open_weights, meta.training_datasets, meta.languages) == (None, None, None, None)
    assert meta.similarity_fn_name == "cosine"
    members = meta.loader_kwargs["system"]["members"]
    assert [member["weights"]["source"] for member in members] == ["given as Toy", "given as Toy"]
    assert json.loads(json.dumps(meta.to_dict()))["loader_kwargs"] == meta.loader_kwargs


def test_the_revision_is_that_of_the_weights(tmp_path: Path) -> None:
    first = load("hubert-base", weights="random", size="tiny")
    assert first.mteb_model_meta.name == "gura-jax/hubert-base-tiny-random"
    assert first.mteb_model_meta.n_parameters == sum(x.size for x in jax.tree.leaves(first.model.params))
    revision = first.mteb_model_meta.revision
    assert len(revision or "") == 40
    assert load("hubert_base", weights="random", size="tiny").mteb_model_meta.revision == revision  # by another name
    assert load("hubert_base", weights="random", size="tiny", seed=1).mteb_model_meta.revision != revision
    assert load("hubert-base", layers="mean", weights="random", size="tiny").mteb_model_meta.revision != revision
    half = load("hubert_base", weights="random", size="tiny", dtype="bfloat16").mteb_model_meta
    assert (half.revision, half.experiment_kwargs) == (revision, {"dtype": "bfloat16"})  # MTEB keeps its results apart
    first.model.save(tmp_path / "a")
    first.model.save(tmp_path / "b")
    saved = [load(tmp_path / name).mteb_model_meta for name in "ab"]
    assert saved[0].revision == saved[1].revision != revision
    assert "fingerprint" in saved[0].loader_kwargs["system"]["members"][0]["weights"]


def test_licences() -> None:
    assert adapter._licence(["MIT", "MIT"]) == "mit"
    assert adapter._licence(["MIT", "Apache-2.0"]) == "multiple"
    assert adapter._licence(["MIT", ""]) is None


def test_names_are_no_paths() -> None:
    with refuses(InputError, "expected the name of a file in its folder, found '../toys'"):
        load(System("../toys", (Member(Toy(), name="a"),)))


# MTEB's own tasks


def mock_run(encoder: Any) -> dict[str, float]:
    """The scores of mock tasks, all of which pass; MTEB's ``all_passed`` counts those that were skipped too."""
    ran: dict[str, Any] = {name: status for name, status in mteb.mock_run(encoder).items() if status is not None}
    errors = {name: status.exception for name, status in ran.items() if hasattr(status, "exception")}
    assert errors == {}
    return {name: status.get_score() for name, status in ran.items()}


@pytest.mark.usefixtures("wav_by_soundfile")
def test_mock_run(toy: MtebEncoder) -> None:
    assert set(mock_run(toy)) == AUDIO_MOCKS


@pytest.mark.slow
@pytest.mark.usefixtures("wav_by_soundfile")
@pytest.mark.parametrize("system", ["hubert_base", "fusion_cat_xwc_base", "whisper_base", "crepe"])
def test_mock_run_of_systems(system: str) -> None:
    scores = mock_run(load(system, weights="random", size="tiny"))
    for name, score in scores.items():
        print(f"{system}: {name} {score:.4f}")
    assert set(scores) == AUDIO_MOCKS


# Runs


@pytest.fixture
def tasks(recordings: Path) -> Callable[[], list[Any]]:
    return lambda: [digits.SpokenDigits(recordings), digits.SpokenDigitsSpeakers(recordings)]


class Broken(digits.SpokenDigits):
    metadata = digits.SpokenDigits.metadata.model_copy(update={"name": "Broken"})

    def load_data(self, *_: Any, **__: Any) -> None:
        print("MTEB's tasks print")
        raise ConnectionError("no network\nat all")


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.rglob("*.json*")}


def test_run(
    toy: MtebEncoder,
    tasks: Callable[[], list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run by MTEB's own code; what is submitted; what is done is not done again; a failure does not stop the rest."""
    first, second = tasks()
    outcome = runs.run(toy, [Broken(first.folder), first, second], tmp_path / "out")
    assert outcome.failed == {"Broken": "ConnectionError: no network"}
    assert [(score.task, score.resumed) for score in outcome.scores] == [
        ("SpokenDigits", False),
        ("SpokenDigitsSpeakers", False),
    ]
    assert outcome.scores[0].score == 1
    assert outcome.mean == pytest.approx(np.mean([score.score for score in outcome.scores]))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[:2] == ["Broken: AudioClassification", "Broken: ConnectionError: no network"]
    assert len(captured.err.splitlines()) == 6
    meta = toy.mteb_model_meta
    assert outcome.folder == tmp_path / "out" / "results" / "gura-jax__toy" / str(meta.revision)
    written = {"model_meta.json", "run_settings.jsonl", "SpokenDigits.json", "SpokenDigitsSpeakers.json"}
    assert set(os.listdir(outcome.folder)) == written
    # MTEB reads them.
    table = mteb.ResultCache(tmp_path / "out").load_results(models=[meta]).to_dataframe()
    assert set(table["task_name"]) == {"SpokenDigits", "SpokenDigitsSpeakers"}

    monkeypatch.setattr(MtebEncoder, "encode", None)  # nothing is embedded again
    before = files_of(tmp_path / "out")
    again = runs.run(toy, tasks(), tmp_path / "out")
    assert [score.resumed for score in again.scores] == [True, True]
    assert files_of(tmp_path / "out") == before

    (outcome.folder / "SpokenDigits.json").write_text('{"half')
    third = runs.run(toy, tasks(), tmp_path / "out")
    assert [score.task for score in third.scores] == ["SpokenDigitsSpeakers"]
    assert "SpokenDigits.json: expected MTEB's scores, found" in third.failed["SpokenDigits"]


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {examples!r}]
from pathlib import Path
from toy import toy_model
from gura_jax import files
from gura_jax.evaluate.mteb import run
from gura_jax.mteb import MtebEncoder
import mteb_digits

replace, names = os.replace, []

def killed(source, target):
    names.append(Path(target).name)
    if names[-1] == "SpokenDigitsSpeakers.json":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = killed
folder = Path({recordings!r})
tasks = [mteb_digits.SpokenDigits(folder), mteb_digits.SpokenDigitsSpeakers(folder)]
run(MtebEncoder(toy_model(), "toy"), tasks, Path({out!r}))
"""


@pytest.mark.slow
def test_killed(toy: MtebEncoder, tasks: Callable[[], list[Any]], recordings: Path, tmp_path: Path) -> None:
    """Killed while the second task's scores are written, a run goes on with it."""
    out = tmp_path / "out"
    places = {"tests": ROOT / "tests", "examples": ROOT / "examples", "recordings": recordings, "out": out}
    program = KILLED.format(**{name: str(path) for name, path in places.items()})
    killed = subprocess.run(
        [sys.executable, "-c", program], env=environment(8), capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {name for name in files_of(out) if not name.startswith(".")} == {
        "model_meta.json", "run_settings.jsonl", "SpokenDigits.json"
    }  # fmt: skip
    outcome = runs.run(toy, tasks(), out)
    assert [score.resumed for score in outcome.scores] == [True, False]
    whole = runs.run(toy, tasks(), tmp_path / "whole")
    assert [score._replace(resumed=False) for score in outcome.scores] == whole.scores
    assert set(files_of(out)) == set(files_of(tmp_path / "whole"))  # nothing half-written is left


@pytest.mark.slow
@pytest.mark.skipif("DIGITS" not in os.environ, reason="needs DIGITS, a folder of spoken digits")
def test_spoken_digits(tmp_path: Path) -> None:
    folder = Path(os.environ["DIGITS"])
    outcome = runs.run(load("crepe", weights="pretrained"), [digits.SpokenDigits(folder)], tmp_path)
    assert outcome.scores[0].score > 0.2  # chance: 0.1


# The command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    first = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)

    def run(*arguments: object, code: int = 0) -> Any:
        monkeypatch.setattr(sys, "argv", ["gura-jax", "mteb", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert (ended.value.code or 0) == code, captured.err
        return captured

    return run


def test_list(command: Callable[..., Any]) -> None:
    listed = json.loads(command("--list", "--benchmark", "MAEB(audio-only)", "--json").out)
    assert len(listed["tasks"]) == 19
    assert listed["tasks"][1] == {
        "task": "BeijingOpera", "type": "AudioClassification", "metric": "accuracy", "languages": 1
    }  # fmt: skip
    assert "MAEB(audio-only)" in listed["benchmarks"]
    said = command("--list", "--tasks", "GTZANAudioReranking").out
    assert said.splitlines()[0].split() == ["AudioReranking", "GTZANAudioReranking", "map_at_1000", "1", "languages"]
    assert {task.metadata.name for task in runs.audio_tasks()} > {task["task"] for task in listed["tasks"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy"], "expected SYSTEM and --out, or --list"),
        (["toy", "--out", "o"], "expected a benchmark or tasks, found neither"),
        (
            ["toy", "--out", "o", "--benchmark", "MAEB(audio-only)", "--tasks", "BeijingOpera"],
            "expected a benchmark or tasks, found both: pass one of --benchmark and --tasks",
        ),
        (["--list", "--benchmark", "MAEB(audio-only)", "--tasks", "BeijingOpera"], "found both"),
        (["toy", "--out", "o", "--tasks", "beijingopra"], "'beijingopra' is not known; did you mean BeijingOpera?"),
        (["toy", "--out", "o", "--tasks", "zzz"], "task 'zzz' is not known; 'gura-jax mteb --list' shows"),
        (["toy", "--out", "o", "--benchmark", "maeb(audio)"], "did you mean MAEB(audio-only)"),
        (["toy", "--out", "o", "--benchmark", "zzz"], "benchmark 'zzz' is not known; 'gura-jax mteb --list' shows"),
        (["toy", "--out", "o", "--benchmark", "MAEB"], "ClothoT2ARetrieval (text, audio)"),
        (["toy", "--out", "o", "--tasks", "BeijingOpera,Banking77Classification"], "Banking77Classification (text)"),
        (["hubert_bse", "--out", "o", "--tasks", "BeijingOpera"], "did you mean"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, command: Callable[..., Any], tmp_path: Path) -> None:
    os.chdir(tmp_path)
    assert message in command(*arguments, code=1).err
    assert not os.listdir(tmp_path)


def test_command(
    command: Callable[..., Any], recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks by name; one of them fails."""
    registry = sys.modules["mteb.get_tasks"]
    made = {"SpokenDigits": digits.SpokenDigits, "Broken": Broken}
    for name, task in made.items():
        monkeypatch.setitem(
            registry._TASKS_REGISTRY,  # pyright: ignore[reportAttributeAccessIssue]
            name,
            lambda task=task: task(recordings),
        )
    arguments = ["hubert-base", "--size", "tiny", "--weights", "random", "--out", tmp_path / "out"]
    said = command(*arguments, "--tasks", "Broken,SpokenDigits", code=3)
    assert "note: random weights for hubert-base: what they contribute means nothing" in said.err
    assert "1 failed: Broken" in said.err
    folder = next((tmp_path / "out" / "results" / "gura-jax__hubert-base-tiny-random").iterdir())
    assert said.out.splitlines()[-1] == f"1 of 2 tasks -> {folder}"
    found = json.loads(command(*arguments, "--tasks", "SpokenDigits", "--json").out)
    (score,) = found["scores"]
    assert score == score | {"task": "SpokenDigits", "metric": "accuracy", "resumed": True}
    assert found["results"] == str(folder)
    command(*arguments, "--tasks", "Broken", code=1)


def test_without_mteb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gura_jax.mteb")
    monkeypatch.setitem(sys.modules, "mteb.models.abs_encoder", None)
    with refuses(SystemConfigError, "gura_jax.mteb needs the package", "pip install 'gura-jax[mteb]'"):
        importlib.import_module("gura_jax.mteb")


def test_results_that_cannot_be_written(toy: MtebEncoder, tasks: Callable[[], list[Any]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refuses(StoreError, "expected a folder that can be written to"):
        runs.run(toy, tasks(), tmp_path / "file")
    text = type("Text", (), {"metadata": MOCK.model_copy(update={"name": "Words", "modalities": ["text"]})})
    with refuses(InputError, "expected tasks of audio alone, found Words"):
        runs.run(toy, [text()], tmp_path / "out")
