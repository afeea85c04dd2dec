"""gura_jax/dataset/run.py and workers.py: a collection is embedded whole, whatever happens on the way."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from toy import ALONE, RATE, ToyModel, contents, embedded, environment, interrupt, opened, toy_model, write_clips

from gura_jax import EmbeddingStore, Member, System, checkpoint, load_model
from gura_jax.audio import load_audio
from gura_jax.dataset import commit
from gura_jax.dataset.identity import describe
from gura_jax.dataset.sources import read_inputs
from gura_jax.dataset.table import Settings, plan_table, summarise
from gura_jax.dataset.workers import Worker, this_worker, work
from gura_jax.errors import InputError, StoreError
from gura_jax.loading import outline
from gura_jax.models.crepe import CrepeConfig
from gura_jax.models.encoder import Options
from gura_jax.models.families import build_encoder

SMALL = Settings(timestamps=True, shard_hours=4 / 3600, batch_seconds=2)
PADDING_BOUND = 1e-5  # relative: a clip in another batch, as design.md has it
SECONDS = [0.3, 2.2, 1.0, 0.9, 3.1, 0.4, 1.7, 1.2, 0.5, 1.1, 0.6, 2.9]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, SECONDS)
    return folder


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that an uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    summary = embedded(clips, out, SMALL)
    assert (summary.done.clips, summary.left, summary.failed) == (len(SECONDS), 0, [])
    return out


def test_every_clip_has_its_own_embedding(clips: Path, whole: Path) -> None:
    found = EmbeddingStore(whole)
    assert len(found) == len(SECONDS)
    assert sorted(found.meta["duration"].to_pylist()) == sorted(SECONDS)
    for clip in found:
        audio = soundfile.read(clip.meta["path"], dtype="float32")[0]
        frames = audio[: (1 + (len(audio) - 400) // 320) * 320].reshape(-1, 320)
        np.testing.assert_array_equal(clip.frames, np.stack([frames.mean(-1), frames.max(-1), frames.min(-1)], -1))
    run = json.loads((whole / "run.json").read_text())
    assert (run["clips"], run["shards"]) == (len(SECONDS), len(commit.shard_numbers(whole)))
    assert run["shards"] > 3
    assert not (whole / "failed.csv").exists()


def test_embeddings_are_those_of_the_model(tmp_path: Path) -> None:
    """A compiled system, batches that do not divide by the devices, and clips of other rates."""
    write_clips(tmp_path / "in", [0.5, 0.9, 0.9], rate=22_050)
    write_clips(tmp_path / "in", [0.5], "flac", rate=8_000)
    model = load_model("hubert_base", weights="random", size="tiny")
    embedded(tmp_path / "in", tmp_path / "out", Settings(timestamps=True, batch_seconds=3), model=model)
    clips = list(EmbeddingStore(tmp_path / "out"))
    frames, times = model.timestamp_embeddings([load_audio(clip.meta["path"]) for clip in clips])
    assert len(clips) == 4
    for clip, own, when in zip(clips, frames, times, strict=True):
        assert clip.frames is not None
        assert clip.times is not None
        assert np.linalg.norm(clip.frames - own) / np.linalg.norm(own) < PADDING_BOUND
        np.testing.assert_allclose(clip.times, when)


def test_the_next_batch_is_on_its_way(clips: Path, whole: Path, tmp_path: Path) -> None:
    """As on an accelerator, where a batch is dispatched before the previous one is fetched: the same bytes."""
    embedded(clips, tmp_path / "out", SMALL, model=toy_model(batches_in_flight=1))
    assert contents(tmp_path / "out") == contents(whole)


def test_run_again_and_nothing_is_done_twice(clips: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    summary = embedded(clips, tmp_path / "out", SMALL)
    assert summary.done == (0, 0, 0)
    assert summary.before == summary.shards > 3
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("kind", ["scene-00001.npy", "meta-00002.parquet", "shard-00000.json", "frames-00003.npy"])
@pytest.mark.parametrize("damage", ["flip", "missing", "half"])
def test_damaged_shards_are_computed_anew(clips: Path, whole: Path, tmp_path: Path, kind: str, damage: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    content = (whole / kind).read_bytes()
    (out / kind).unlink()
    flipped = content[:100] + bytes([content[100] ^ 4]) + content[101:]
    if damage != "missing":
        (out / kind).write_bytes(flipped if damage == "flip" else content[: len(content) // 2])
    if damage == "flip":
        embedded(clips, out, SMALL)  # compares no more than the sizes
        assert (out / kind).read_bytes() == flipped
    summary = embedded(clips, out, SMALL, verify=damage == "flip")
    assert summary.before == summary.shards - 1
    assert contents(out) == contents(whole)
    # What has no record is written over.
    assert (out / commit.ASIDE).exists() == ((kind, damage) != ("shard-00000.json", "missing"))


@pytest.mark.parametrize("damage", [b"", b"PAR1 and so on", None])
def test_a_damaged_plan_is_made_again(clips: Path, whole: Path, tmp_path: Path, damage: bytes | None) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "plan-00000.parquet").unlink()
    if damage is not None:
        (out / "plan-00000.parquet").write_bytes(damage)
    embedded(clips, out, SMALL)
    assert contents(out) == contents(whole)


def test_columns_whose_types_parquet_changes(clips: Path, tmp_path: Path) -> None:
    """The names of a list's elements, the index of a dictionary: resumed to the same bytes."""
    paths = sorted(map(str, clips.iterdir()))
    labels = pa.array(["b", "a", None, "b"] * (len(paths) // 4)).dictionary_encode()
    columns = {
        "tags": pa.array([["x"] * i for i in range(len(paths))]),
        "label": labels.cast(pa.dictionary(pa.int8(), pa.string())),
    }
    pq.write_table(pa.table({"id": paths, "path": paths} | columns), clips.parent / "types.parquet")
    embedded(clips.parent / "types.parquet", tmp_path / "whole", SMALL)
    interrupt(opened(clips.parent / "types.parquet", tmp_path / "out", SMALL), 4)
    assert embedded(clips.parent / "types.parquet", tmp_path / "out", SMALL).before > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_at_every_step(clips: Path, tmp_path: Path) -> None:
    few = tmp_path / "in"
    write_clips(few, [2.2, 1.0])
    (few / "broken.wav").write_text("not audio")
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, script, few, tmp_path / "runs"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 40


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        (
            Settings(timestamps=False, shard_hours=4 / 3600, batch_seconds=2),
            "timestamp_embedding_size: 3 then, None now",
        ),
        (Settings(True, "float16", shard_hours=4 / 3600, batch_seconds=2), "storage: float32 then, float16 now"),
        (Settings(True, window=1, shard_hours=4 / 3600, batch_seconds=2), "window: None then, 1 now"),
        (Settings(True, shard_hours=4 / 3600, batch_seconds=3), "batch_seconds: 2 then, 3 now"),
    ],
)
def test_another_run_is_refused(clips: Path, whole: Path, settings: Settings, difference: str) -> None:
    before = contents(whole)
    with pytest.raises(StoreError, match=f"expected the run that began here, found another:\n    {difference}"):
        opened(clips, whole, settings)
    assert contents(whole) == before


def test_other_inputs_are_refused(clips: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"inputs_sha256: .* then, .* now"):
        opened([clips, *write_clips(tmp_path, [1])], whole, SMALL)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", [0.5])
    system = System("two", (Member("crepe-tiny"),))
    model = load_model(system, weights="random")
    opened(tmp_path / "in", tmp_path / "out", model=model)
    other = load_model(system, weights="random", seed=1)
    with pytest.raises(StoreError, match=r"system\.members\.crepe-tiny\.weights\.seed: 0 then, 1 now"):
        opened(tmp_path / "in", tmp_path / "out", model=other)
    changed = model.with_params(jax.tree.map(lambda x: x * 1.5, model.params))
    with pytest.raises(StoreError, match=r"weights\.source: random then, changed from random now"):
        opened(tmp_path / "in", tmp_path / "out", model=changed)
    again = model.with_params(jax.tree.map(lambda x: x * 2.0, model.params))
    assert describe(changed, "", Settings())["system"] != describe(again, "", Settings())["system"]
    opened(tmp_path / "in", tmp_path / "out", model=other, overwrite=True)


def test_an_identity_has_new_fields_only_where_they_are_used() -> None:
    """Stores of earlier versions, which do not have them, can be resumed."""
    system = describe(load_model("crepe-tiny", weights="random"), "", Settings())["system"]
    assert set(system) == {"name", "members", "combination", "feature_size", "scene_groups"}
    assert set(system["members"][0]) == {"name", "encoder", "layers", "architecture", "weights"}
    assert system["members"][0]["architecture"] == {"capacity": "tiny", "model_type": "crepe"}
    assert system["members"][0]["weights"] == {"source": "random", "seed": 0}


def test_a_changed_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(tmp_path / "checkpoints"))
    write_clips(tmp_path / "in", [0.5])
    system, config = System("tiny", (Member("crepe-tiny"),)), CrepeConfig("tiny")
    for seed in (0, 1):
        arrays = build_encoder(config, Options()).init(jax.random.key(seed))
        manifest = checkpoint.Manifest(config, "a test", {}, "1", checkpoint.arrays_sha256(arrays))
        checkpoint.save(tmp_path / "checkpoints" / "crepe-tiny", arrays, manifest, overwrite=True)
        if not seed:
            opened(tmp_path / "in", tmp_path / "out", model=load_model(system))
    with pytest.raises(StoreError, match=r"system\.members\.crepe-tiny\.weights\.fingerprint: \w+ then, \w+ now"):
        opened(tmp_path / "in", tmp_path / "out", model=load_model(system))


def test_a_folder_of_something_else_is_refused(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "scene-00000.npy").write_text("precious")
    with pytest.raises(StoreError, match=r"found scene-00000\.npy: choose another folder, or remove"):
        opened(clips, tmp_path, SMALL)
    assert (tmp_path / "scene-00000.npy").read_text() == "precious"
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(StoreError, match=r"run\.json: expected what a run of this version wrote"):
        opened(clips, tmp_path, SMALL)
    assert embedded(clips, tmp_path, SMALL, overwrite=True).left == 0


@pytest.mark.parametrize("count", [2, 5, 40])
def test_processes_that_share_a_run_leave_the_same_bytes(clips: Path, whole: Path, tmp_path: Path, count: int) -> None:
    lefts = []
    for index in reversed(range(count)):
        summary = embedded(clips, tmp_path / "out", SMALL, Worker(index, count, "a test"))
        lefts.append(summary.left)
    assert lefts[-1] == 0
    assert lefts == sorted(lefts, reverse=True)
    assert contents(tmp_path / "out") == contents(whole)


def test_two_processes_with_the_same_shards(clips: Path, whole: Path, tmp_path: Path) -> None:
    """At once: each shard is written once, by one or the other."""
    script = (
        "import sys, toy; from gura_jax.dataset.table import Settings\n"
        "toy.embedded(sys.argv[1], __import__('pathlib').Path(sys.argv[2]), "
        "Settings(timestamps=True, shard_hours=4 / 3600, batch_seconds=2))"
    )
    here = environment(PYTHONPATH=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(clips), str(tmp_path / "out")]
    processes = [subprocess.Popen(command, env=here, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert contents(tmp_path / "out") == contents(whole)


def test_two_threads_with_the_same_shards(clips: Path, whole: Path, tmp_path: Path) -> None:
    """Closer still."""
    errors: list[BaseException] = []

    def go() -> None:
        try:
            embedded(clips, tmp_path / "out", SMALL)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert contents(tmp_path / "out") == contents(whole)


def test_which_process_this_is() -> None:
    assert this_worker(2, 3, {}) == (2, 3, "--shard-index")
    assert this_worker(None, None, {}) == (0, 1, "the only process")
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}
    assert this_worker(None, None, array) == (2, 4, "SLURM_ARRAY_TASK_ID")
    assert this_worker(None, None, {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"})[:2] == (3, 8)
    assert this_worker(None, None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})[:2] == (0, 1)  # a batch script
    assert this_worker(0, 2, array)[:2] == (0, 2)
    for index, count in ((None, 2), (0, None), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match="expected --num-shards N together with --shard-index from 0 to N - 1"):
            this_worker(index, count, {})
    for odd in ({"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2"}, array | {"SLURM_ARRAY_TASK_ID": "9"}):
        with pytest.raises(InputError, match="give --shard-index and --num-shards"):
            this_worker(None, None, odd)
    assert [Worker(i, 3, "").share([0, 1, 2, 3, 4, 5, 6]) for i in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.slow
def test_two_processes_of_jax_distributed(tmp_path: Path) -> None:
    """Real ones, on loopback: each finds its own share, and the bytes are those of one process."""
    import socket

    write_clips(tmp_path / "in", [0.5] * 24)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = (
        "import sys, jax\n"
        f"jax.distributed.initialize('127.0.0.1:{port}', 2, int(sys.argv[1]))\n"
        "from gura_jax.cli import main\n"
        "sys.argv[1:] = sys.argv[2:]\n"
        "main()\n"
    )
    arguments = [tmp_path / "in", "-s", "hubert_base", "--weights", "random", "--size", "tiny"]
    arguments += ["--shard-hours", "0.001", "--batch-seconds", "2"]
    command = [sys.executable, "-c", script]
    processes = [
        subprocess.Popen(
            [*command, str(index), "embed", *map(str, arguments), "--out", str(tmp_path / "two")],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for index, (stdout, _) in enumerate(outputs):
        assert f"this was process {index} of 2 (by jax.distributed)" in stdout
        assert not stdout.startswith("0 clips")
    alone = [Path(sys.executable).with_name("gura-jax"), "embed", *arguments, "--out", tmp_path / "one"]
    subprocess.run(list(map(str, alone)), env=environment(), check=True, capture_output=True)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def broken_files(folder: Path) -> dict[str, str]:
    """Files of every kind of damage, and a part of what is said of each."""
    folder.mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal(5 * RATE)
    expected = {
        "empty.wav": "cannot be decoded",
        "text.wav": "cannot be decoded",
        "short.wav": "expected at least 400 samples",
        "none.wav": "expected audio, found a file with no samples",
        "nan.wav": "NaN or infinity at 0.250 s",
        "loud.wav": "peak of 9000",
        "bomb.flac": "expected at most 60 s",
        "rate.wav": "the header is damaged",
        "length.flac": "cut short",
    }
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("This is not audio.")
    soundfile.write(folder / "short.wav", noise[:399], RATE)
    soundfile.write(folder / "none.wav", noise[:0], RATE)
    for name, value in (("nan", np.nan), ("loud", 9000.0)):
        bad = noise.copy()
        bad[4000] = value
        soundfile.write(folder / f"{name}.wav", bad, RATE, subtype="FLOAT")
    soundfile.write(folder / "bomb.flac", np.zeros(20 * 60 * RATE), RATE)
    soundfile.write(folder / "rate.wav", noise, RATE)
    data = bytearray((folder / "rate.wav").read_bytes())
    data[24:28] = (999_999_999).to_bytes(4, "little")
    (folder / "rate.wav").write_bytes(data)
    soundfile.write(folder / "length.flac", noise, RATE)
    data = bytearray((folder / "length.flac").read_bytes())
    data[22:26] = (50 * RATE).to_bytes(4, "big")  # of 5 s
    (folder / "length.flac").write_bytes(data)
    for suffix in ("wav", "flac", "ogg", "mp3"):
        path = folder / f"cut.{suffix}"
        soundfile.write(path, noise, RATE)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        expected[path.name] = "cannot be decoded" if suffix == "flac" else "cut short"
    (folder / "away.wav").symlink_to(folder / "nowhere.wav")
    expected["away.wav"] = "no such file"
    return expected


def test_broken_files_are_reported_and_do_not_stop_the_run(tmp_path: Path) -> None:
    broken = broken_files(tmp_path / "in")
    good = write_clips(tmp_path / "in", [1.0, 2.0])
    soundfile.write(tmp_path / "in" / "wide.wav", np.zeros((192_000, 8)), 192_000)  # 8 channels of silence
    settings = Settings(timestamps=True, max_duration=60)
    summary = embedded(tmp_path / "in", tmp_path / "out", settings)
    found = {failure.id: failure.reason for failure in summary.failed}
    assert set(found) == set(broken)
    for name, words in broken.items():
        assert words in found[name]
    lines = (tmp_path / "out" / "failed.csv").read_text().splitlines()
    assert len(lines) == 1 + len(broken)
    embeddings = EmbeddingStore(tmp_path / "out")
    assert set(embeddings.ids) == {"wide.wav", *(path.name for path in good)}
    assert (embeddings["wide.wav"].scene == 0).all()
    assert summary.done == (3, 4 * RATE, len(broken))


def test_flipped_bits_never_end_a_run(tmp_path: Path) -> None:
    """Damage that a decoder does not see gives other samples; what it sees is said; nothing else happens."""
    random = np.random.default_rng(0)
    for suffix in ("wav", "flac", "ogg", "mp3"):
        for path in write_clips(tmp_path / "in" / suffix, [0.5] * 6, suffix):
            data = bytearray(path.read_bytes())
            for position in random.integers(0, len(data), 5):
                data[position] ^= 1 << int(random.integers(8))
            path.write_bytes(data)
    settings = Settings(max_duration=60)
    summary = embedded(tmp_path / "in", tmp_path / "out", settings)
    assert summary.left == 0
    assert len(EmbeddingStore(tmp_path / "out")) + len(summary.failed) == 24
    assert len(summary.failed) >= 6  # FLAC has checksums


def test_failed_clips_are_tried_again_alone(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_clips(folder, SECONDS)
    text = folder / "later.wav"
    text.write_text("not yet audio")
    (folder / "never.wav").write_text("never audio")
    out = tmp_path / "out"
    assert len(embedded(folder, out, SMALL).failed) == 2
    before = contents(out)
    assert embedded(folder, out, SMALL).done == (0, 0, 0)  # not by itself
    text.unlink()
    write_clips(tmp_path / "other", [1.0])[0].rename(text)
    summary = embedded(folder, out, SMALL, retry_failed=True)
    assert summary.done == (1, RATE, 1)
    assert [failure.id for failure in summary.failed] == ["never.wav"]
    assert len(EmbeddingStore(out)["later.wav"].scene) == 3
    after = contents(out)
    assert {name: after[name] for name in before if name != "failed.csv"}.items() <= before.items()
    assert embedded(folder, out, SMALL).before == 1 + len(commit.shard_numbers(out)) - 1
    (folder / "never.wav").unlink()
    write_clips(tmp_path / "other", [1.0])[0].rename(folder / "never.wav")
    assert embedded(folder, out, SMALL, retry_failed=True).failed == []
    assert not (out / "failed.csv").exists()
    assert embedded(folder, out, SMALL, retry_failed=True).done == (0, 0, 0)


def test_windows(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", [2.51, 0.5, 1.0], rate=44_100)
    write_clips(tmp_path / "in", [3.01], "mp3", rate=44_100)
    out = tmp_path / "out"
    embedded(tmp_path / "in", out, Settings(window=1.0, max_duration=1.5))
    rows = {row["id"]: row for row in EmbeddingStore(out).meta.to_pylist()}
    assert {name for name in rows if name.startswith("clip-000.wav")} == {f"clip-000.wav#{i}" for i in range(3)}
    assert [rows[f"clip-000.wav#{i}"]["offset"] for i in range(3)] == [0, 1, 2]
    assert [rows[f"clip-000.wav#{i}"]["duration"] for i in range(3)] == [1, 1, 0.51]
    assert rows["clip-001.wav"]["source"] == "clip-001.wav"
    assert rows["clip-000.wav#2"]["source"] == "clip-000.wav"
    assert sum(row["duration"] for row in rows.values() if row["source"] == "clip-000.mp3") == pytest.approx(
        3.01, abs=0.1
    )
    part = load_audio(tmp_path / "in" / "clip-000.wav", 1.0, 1.0)
    np.testing.assert_allclose(EmbeddingStore(out)["clip-000.wav#1"].scene[0], part[:15920].mean(), atol=1e-4)


def test_segments_of_a_manifest(tmp_path: Path) -> None:
    path = write_clips(tmp_path, [4.0])[0]
    rows = [(0, 1), (0.5, 1), (3.5, None), (3.9, 0.2), (9, 1), (1, 500)]
    lines = [
        json.dumps({"id": f"s{i}", "path": path.name, "offset": a, "duration": b}) for i, (a, b) in enumerate(rows)
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    summary = embedded(tmp_path / "m.jsonl", tmp_path / "out", SMALL)
    assert {failure.id for failure in summary.failed} == {"s3", "s4", "s5"}
    assert all("expected a clip within the file's 4.000 s" in failure.reason for failure in summary.failed)
    found = EmbeddingStore(tmp_path / "out")
    assert {row["id"]: (row["offset"], row["duration"]) for row in found.meta.to_pylist()} == {
        "s0": (0.0, 1.0),
        "s1": (0.5, 1.0),
        "s2": (3.5, 0.5),
    }


class Memory(ToyModel):
    """A model whose devices hold two clips at once, and no clip of more than 3 s."""

    calls: list[int]

    def __call__(self, audio: Any, lengths: Any, **options: Any) -> Any:
        rows, samples = audio[RATE].shape
        self.calls.append(rows)
        if rows > 2 or samples > 3 * RATE:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
        return super().__call__(audio, lengths, **options)


def test_out_of_memory_halves_the_batch(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", [0.5] * 7 + [3.5])
    small = toy_model(Memory)
    small.calls = []
    settings = Settings(timestamps=True, batch_seconds=4)
    summary = embedded(tmp_path / "in", tmp_path / "out", settings, model=small)
    assert [(f.id, "no memory for a clip of 3.5 s" in f.reason) for f in summary.failed] == [("clip-007.wav", True)]
    assert max(small.calls) == 7
    (tmp_path / "in" / "clip-007.wav").unlink()
    embedded(tmp_path / "in", tmp_path / "plain", settings)
    for clip in EmbeddingStore(tmp_path / "plain"):
        np.testing.assert_array_equal(EmbeddingStore(tmp_path / "out")[clip.meta["id"]].scene, clip.scene)


def test_other_errors_of_the_devices_are_not_swallowed(tmp_path: Path) -> None:
    class Broken(ToyModel):
        def __call__(self, audio: Any, lengths: Any, **options: Any) -> Any:
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is on fire")

    write_clips(tmp_path / "in", [0.5])
    with pytest.raises(jax.errors.JaxRuntimeError, match="on fire"):
        embedded(tmp_path / "in", tmp_path / "out", model=toy_model(Broken))
    assert commit.shard_numbers(tmp_path / "out") == []


def test_half_precision(clips: Path, whole: Path, tmp_path: Path) -> None:
    embedded(clips, tmp_path / "half", Settings(timestamps=True, storage="float16"))
    half, full = EmbeddingStore(tmp_path / "half"), EmbeddingStore(whole)
    assert half.scenes().dtype == np.float16
    for clip in half:
        assert clip.frames is not None
        assert clip.frames.dtype == np.float16
        np.testing.assert_allclose(clip.frames, np.asarray(full[clip.meta["id"]].frames), rtol=1e-3, atol=1e-6)


def test_embeddings_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    class Huge(ToyModel):
        def __call__(self, audio: Any, lengths: Any, **options: Any) -> Any:
            out: Any = super().__call__(audio, lengths, **options)
            return out._replace(scenes=np.where(lengths[RATE][:, None] == 8000, 1e5, out.scenes))

    write_clips(tmp_path / "in", [0.5, 0.6])
    huge = toy_model(Huge)
    with np.errstate(over="ignore"):
        summary = embedded(tmp_path / "in", tmp_path / "out", Settings(storage="float16"), model=huge)
    assert [(f.id, f.reason) for f in summary.failed] == [
        ("clip-000.wav", "its embedding has values that are not finite in float16")
    ]
    assert embedded(tmp_path / "in", tmp_path / "full", Settings(), model=huge).failed == []


def test_a_full_disk(clips: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards before it are safe, and the rest follows when there is room."""
    written = 0
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left on device: make room"):
            embedded(clips, tmp_path / "out", SMALL)
    done = commit.shard_numbers(tmp_path / "out")
    assert done
    summary = embedded(clips, tmp_path / "out", SMALL)
    assert summary.before == len(done)
    assert contents(tmp_path / "out") == contents(whole)


MOUNT = ["unshare", "--mount", "--map-root-user", "sh", "-c"]


@pytest.mark.skipif(
    subprocess.run([*MOUNT, "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="no right to mount a file system",
)
@pytest.mark.parametrize(
    ("options", "words"), [("size=64k", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_small_disk_and_one_that_cannot_be_written(clips: Path, tmp_path: Path, options: str, words: str) -> None:
    """Real ones. On the small one some shards fit, and they stay whole."""
    out = tmp_path / "out"
    out.mkdir()
    script = (
        "import sys, toy; from pathlib import Path; from gura_jax.dataset import commit\n"
        "from gura_jax.dataset.table import Settings; from gura_jax.errors import StoreError\n"
        "out = Path(sys.argv[2])\n"
        "settings = Settings(timestamps=True, shard_hours=4 / 3600, batch_seconds=2)\n"
        "try: toy.embedded(sys.argv[1], out, settings)\n"
        "except StoreError as error: print(error)\n"
        "run = commit.read_run(out)\n"
        "print([bool(commit.check_shard(out, n, run['fingerprint'])) for n in commit.shard_numbers(out)])\n"
    )
    command = (
        f"mount -t tmpfs -o {options} tmpfs {out} && exec {sys.executable} -c '{script.replace(chr(39), chr(34))}'"
    )
    here = environment(PYTHONPATH=str(Path(__file__).parent))
    result = subprocess.run([*MOUNT, f"{command} {clips} {out}"], env=here, capture_output=True, text=True, check=False)
    message, *_, shards = result.stdout.splitlines()
    assert f"{out}: expected a folder that can be written to, found: {words}" in message
    assert shards == "[]" if options == "ro" else shards.startswith("[True")
    assert "False" not in shards


def test_an_interruption_keeps_what_is_finished(clips: Path, whole: Path, tmp_path: Path) -> None:
    run = opened(clips, tmp_path / "out", SMALL)
    interrupt(run, batches=6)
    finished = commit.shard_numbers(tmp_path / "out")
    assert 0 < len(finished) < len(run.shards)
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"]
    embedded(clips, tmp_path / "out", SMALL)
    assert contents(tmp_path / "out") == contents(whole)


def test_memory_does_not_grow_with_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch computes, only so many others are decoded."""
    from gura_jax.dataset import decode

    write_clips(tmp_path / "in", [1.0] * 30)
    decoded = 0
    load = decode.load_segments

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return load(*arguments, **options)

    monkeypatch.setattr(decode, "load_segments", counted)
    run = opened(tmp_path / "in", tmp_path / "out", Settings(batch_seconds=2))
    seen: list[int] = []
    list(run.embed_shards(run.shards, lambda done: seen.append(decoded)))
    assert len(seen) == 15
    assert all(count <= 2 * (i + 2 + decode.BATCHES_AHEAD) for i, count in enumerate(seen))


def test_a_plan_needs_no_weights(clips: Path, tmp_path: Path) -> None:
    settings = Settings(timestamps=True, shard_hours=0.002)
    model = outline("fusion_cat_xwc")
    assert (model.timestamp_embedding_size, model.scene_embedding_size) == (3072, 3072)
    summary = summarise(model, settings, plan_table(model, read_inputs([clips]), settings))
    frames = sum(1 + (round(s * RATE) - 400) // 320 for s in SECONDS)
    assert summary.clips == len(SECONDS)
    assert summary.hours == pytest.approx(sum(SECONDS) / 3600)
    assert summary.bytes == 4 * 3072 * (frames + len(SECONDS))
    assert summary.shards == len(plan_table(model, read_inputs([clips]), settings)["shard"].unique())


def test_columns_that_the_plan_has(tmp_path: Path) -> None:
    write_clips(tmp_path, [0.5])
    for column, settings in (("rows", Settings()), ("source", Settings(window=1))):
        (tmp_path / "m.jsonl").write_text(json.dumps({"id": "a", "path": "clip-000.wav", column: 1}) + "\n")
        with pytest.raises(InputError, match=f"without the column {column}, .*: rename it"):
            opened(tmp_path / "m.jsonl", tmp_path / "out", settings)


@pytest.mark.parametrize("field", ["window", "max_duration", "shard_hours", "batch_seconds"])
def test_settings_that_make_no_sense(field: Any) -> None:
    for value in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"{field}: expected a number over 0"):
            Settings(**{field: value})  # pyright: ignore[reportArgumentType]


def test_progress_without_a_terminal(clips: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from gura_jax.dataset import progress

    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    embedded(clips, tmp_path / "out", SMALL)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    counts = [line["clips"] for line in lines]
    assert counts == sorted(set(counts))  # each once, the last one too
    assert lines[-1] | {"clips_per_second": 0, "audio_hours_per_hour": 0, "seconds_left": 0} == {
        "clips": len(SECONDS), "of": len(SECONDS), "failed": 0, "seconds_left": 0, "clips_per_second": 0,
        "audio_hours_per_hour": 0,
    }  # fmt: skip


def test_progress_on_a_terminal(capsys: Any) -> None:
    import io

    from gura_jax.dataset.progress import Progress
    from gura_jax.dataset.run import Done

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress("crepe", 10, 10 * RATE, RATE, Done(2, 2 * RATE, 0), stream) as progress:
        progress(Done(7, 7 * RATE, 1))
    last = stream.getvalue().split("\r")[-1]
    assert "crepe:  90%" in last
    assert "9/10 clips" in last
    assert "1 failed" in last


def test_everything_failed(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no")
    summary = embedded([tmp_path / "a.wav", tmp_path / "missing.wav"], tmp_path / "out")
    assert [failure.reason[:19] for failure in summary.failed] == ["cannot be decoded (", "expected an audio f"]
    assert len(EmbeddingStore(tmp_path / "out")) == 0
    assert EmbeddingStore(tmp_path / "out").scenes().shape == (0, 3)
    assert pq.read_table(tmp_path / "out" / "meta-00000.parquet").num_rows == 0
    assert work(opened([tmp_path / "a.wav", tmp_path / "missing.wav"], tmp_path / "out"), ALONE).before == 1
