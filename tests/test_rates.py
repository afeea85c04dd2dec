"""Models of other and of several sample rates, from files and arrays to the store."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from reference import relative
from toy import Toy, contents, embedded, interrupt, opened, toy_model, write_clips

from gura_jax import EmbeddingStore, Member, Model, System, load_model
from gura_jax.audio import load_audio, resample, resampled_length
from gura_jax.dataset import commit
from gura_jax.dataset.sources import read_inputs
from gura_jax.dataset.table import Settings, plan_table, summarise
from gura_jax.errors import StoreError

HIGH, LOW = 24_000, 16_000
TWO_RATES = System("two_rates", (Member(Toy(HIGH), name="high"), Member(Toy(LOW), name="low")))
SMALL = Settings(timestamps=True, shard_hours=2 / 3600, batch_seconds=2)
BOUND = 1e-5  # relative: a clip in another batch, as the design has it
SECONDS = [0.5, 0.9, 1.3]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(TWO_RATES)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise at rates that are resampled to both, to one and to none of the model's; lengths round up at some."""
    folder = tmp_path_factory.mktemp("clips")
    for rate in (44_100, HIGH, LOW):
        write_clips(folder / str(rate), [n + 1 / rate for n in SECONDS], rate=rate)
    return folder


@pytest.fixture(scope="module")
def whole(model: Model, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    summary = embedded(clips, out, SMALL, model=model)
    assert (summary.done.clips, summary.left, summary.failed) == (9, 0, [])
    assert summary.seconds == pytest.approx(3 * sum(SECONDS), abs=1e-2)
    return out


def test_a_models_rate_is_its_members_highest(model: Model) -> None:
    assert (model.sample_rate, model.rates) == (HIGH, (HIGH, LOW))
    assert model.min_scene_samples == 600


def test_each_member_gets_audio_at_its_own_rate(model: Model, clips: Path, whole: Path) -> None:
    """The first member sees the decoded clip, the other one the same clip resampled once more."""
    store = EmbeddingStore(whole)
    assert store.run["sample_rate"] == HIGH
    for clip in store:
        audio = load_audio(clip.meta["path"], sample_rate=HIGH)
        assert clip.meta["num_samples"] == len(audio)
        assert clip.meta["duration"] == len(audio) / HIGH
        out = Toy(HIGH)({}, audio[None], np.array([len(audio)]))
        assert clip.frames is not None
        assert relative(clip.frames[:, :3], out.frames[0]) < BOUND
        low = resample(audio, HIGH, LOW)
        assert len(low) == resampled_length(len(audio), HIGH, LOW)
        out = Toy(LOW)({}, low[None], np.array([len(low)]))
        if out.counts[0] == len(clip.frames):  # else the frames of this member are resampled
            assert relative(clip.frames[:, 3:], out.frames[0]) < BOUND


def test_a_file_and_its_array_give_the_same(model: Model, whole: Path) -> None:
    stored = list(EmbeddingStore(whole))
    arrays = [load_audio(clip.meta["path"], sample_rate=model.sample_rate) for clip in stored]
    for clip, own in zip(stored, model.embed(arrays), strict=True):
        assert relative(clip.frames, own.frames) < BOUND
        assert relative(clip.scene, own.scene) < BOUND
        np.testing.assert_allclose(np.asarray(clip.times), np.asarray(own.times))


def test_a_clip_does_not_depend_on_its_batch(model: Model, clips: Path, whole: Path, tmp_path: Path) -> None:
    """One batch for all clips: most have neighbours, and padding at both rates."""
    embedded(clips, tmp_path / "out", Settings(timestamps=True, batch_seconds=60), model=model)
    for clip in EmbeddingStore(tmp_path / "out"):
        before = EmbeddingStore(whole)[clip.meta["id"]]
        assert relative(clip.frames, before.frames) < BOUND
        assert relative(clip.scene, before.scene) < BOUND


def test_interrupted_and_resumed(model: Model, clips: Path, whole: Path, tmp_path: Path) -> None:
    run = opened(clips, tmp_path / "out", SMALL, model=model)
    interrupt(run, batches=3)
    assert 0 < len(commit.shard_numbers(tmp_path / "out")) < len(run.shards)
    embedded(clips, tmp_path / "out", SMALL, model=model)
    assert contents(tmp_path / "out") == contents(whole)


def test_memory_that_does_not_suffice(clips: Path, whole: Path, tmp_path: Path, model: Model) -> None:
    """The halves of a batch have their rows at every rate."""

    class Small(Model):
        def __call__(self, audio: Any, lengths: Any, **options: Any) -> Any:
            assert {rate: x.shape[0] for rate, x in audio.items()} == {rate: len(x) for rate, x in lengths.items()}
            if len(audio[LOW]) > 2 or audio[LOW].shape[1] > LOW:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return super().__call__(audio, lengths, **options)

    small = Small(
        model.system, model.fusion, model.params, model.weights, model.compilation, model.dtype, model.platform
    )
    summary = embedded(clips, tmp_path / "out", Settings(batch_seconds=3.95), model=small)
    assert {failure.id for failure in summary.failed} == {f"{rate}/clip-002.wav" for rate in (44_100, HIGH, LOW)}
    assert "no memory for a clip of 1.3 s" in summary.failed[0].reason
    for clip in EmbeddingStore(tmp_path / "out"):
        assert relative(clip.scene, EmbeddingStore(whole)[clip.meta["id"]].scene) < BOUND


@pytest.mark.parametrize("rate", [HIGH, 22_050, 48_000])
def test_windows_at_any_rate(tmp_path: Path, rate: int) -> None:
    """Also where a window is a fraction of a sample, at the file's rate and at the model's."""
    model = toy_model(rate=rate)
    write_clips(tmp_path / "in", [2.53], rate=44_100)
    write_clips(tmp_path / "in", [2.53], "flac", rate=8_000)
    window = 0.70003
    embedded(tmp_path / "in", tmp_path / "out", Settings(timestamps=True, window=window), model=model)
    rows = sorted(EmbeddingStore(tmp_path / "out"), key=lambda clip: clip.meta["id"])
    assert [row.meta["id"] for row in rows] == [
        f"clip-000.{suffix}#{i}" for suffix in ("flac", "wav") for i in range(4)
    ]
    for row in rows:
        number = int(row.meta["id"].split("#")[1])
        assert row.meta["offset"] == pytest.approx(number * window)
        part = load_audio(row.meta["path"], row.meta["offset"], None if number == 3 else window, sample_rate=rate)
        assert row.meta["num_samples"] == len(part)
        assert row.meta["duration"] == len(part) / rate
        np.testing.assert_array_equal(row.frames, Toy(rate)({}, part[None], np.array([len(part)])).frames[0])


def test_limits_are_in_seconds_at_any_rate(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", [1.9, 2.1, 0.02])
    model = toy_model(rate=48_000)
    summary = embedded(tmp_path / "in", tmp_path / "out", Settings(max_duration=2), model=model)
    reasons = {failure.id: failure.reason for failure in summary.failed}
    assert set(reasons) == {"clip-001.wav", "clip-002.wav"}
    assert "expected at most 2 s, found 2.1 s" in reasons["clip-001.wav"]
    assert reasons["clip-002.wav"] == "expected at least 1200 samples at 48 kHz for toy, found 960"
    plan = summarise(model, Settings(), plan_table(model, read_inputs([tmp_path / "in"]), Settings()))
    assert plan.hours == pytest.approx(4.0 / 3600)
    assert plan.buckets == pytest.approx((2.1,))


def test_progress_is_in_seconds_of_audio(clips: Path, tmp_path: Path, capsys: Any) -> None:
    summary = embedded(clips, tmp_path / "out", model=toy_model(rate=48_000))
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    seconds = 3600 * summary.done.clips / last["clips_per_second"] / 3600
    assert last["audio_hours_per_hour"] * seconds == pytest.approx(summary.seconds, rel=0.05)


def test_a_rate_above_all_members(tmp_path: Path) -> None:
    """Decoded at the system's rate; no member takes that, and the store's times are at it all the same."""
    system = System("slow", (Member(Toy(LOW), name="low"),), sample_rate=48_000)
    model = load_model(system)
    assert (model.sample_rate, model.rates) == (48_000, (LOW,))
    write_clips(tmp_path / "in", [0.5], rate=44_100)
    embedded(tmp_path / "in", tmp_path / "out", model=model)
    (clip,) = EmbeddingStore(tmp_path / "out")
    audio = resample(load_audio(clip.meta["path"], sample_rate=48_000), 48_000, LOW)
    assert (clip.meta["num_samples"], clip.meta["duration"]) == (24_000, 0.5)
    assert relative(clip.frames, Toy(LOW)({}, audio[None], np.array([len(audio)])).frames[0]) < BOUND
    assert json.loads((tmp_path / "out" / "run.json").read_text())["system"]["sample_rate"] == 48_000
    other = load_model(dataclasses.replace(system, sample_rate=None))
    with pytest.raises(StoreError, match=r"system\.sample_rate: 48000 then, None now"):
        opened(tmp_path / "in", tmp_path / "out", model=other)
