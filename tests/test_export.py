"""gura_jax/dataset/export.py: other tools read what it writes."""

import contextlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import parquet
from refusals import refuses
from test_manifest import hear_task
from toy import contents, embedded, interrupt, opened, write_clips

from gura_jax import EmbeddingStore, files
from gura_jax.dataset.commit import RUN_FILE, shard_numbers, write_shard
from gura_jax.dataset.export import export, hugging_face
from gura_jax.dataset.sinks import SINKS, Shard
from gura_jax.dataset.table import Settings
from gura_jax.errors import InputError, StoreError
from gura_jax.files import write_json


@pytest.fixture(scope="module", params=["float32", "float16"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    folder = tmp_path_factory.mktemp("made")
    write_clips(folder / "in" / "sub", [0.5, 1.0, 1.5, 0.7, 0.8])
    settings = Settings(timestamps=True, storage=request.param, shard_hours=2 / 3600, batch_seconds=2)
    embedded(folder / "in", folder / "out", settings)
    return EmbeddingStore(folder / "out")


@pytest.mark.parametrize("timestamps", [False, True])
def test_hugging_face_reads_it(
    made: EmbeddingStore, tmp_path: Path, timestamps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(hugging_face, "ROW_GROUP", 2)
    assert export(made, tmp_path / "hf", "datasets", timestamps=timestamps) == 5
    loaded = datasets.load_dataset(str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded["id"][:] == made.ids
    loaded = loaded.with_format("numpy")
    for row, clip in zip(loaded, made, strict=True):
        np.testing.assert_array_equal(row["scene"], clip.scene)
        assert row["duration"] == clip.meta["duration"]
        assert ("frames" in row) == timestamps
        if timestamps:
            np.testing.assert_array_equal(np.stack(list(row["frames"])), clip.frames)


def test_its_files_are_parquet(made: EmbeddingStore, tmp_path: Path) -> None:
    export(made, tmp_path / "hf", "datasets", timestamps=True)
    files = sorted((tmp_path / "hf" / "data").iterdir())
    assert len(files) == len(set(made.meta["shard"].to_pylist())) > 1
    assert files[0].name == f"train-00000-of-{len(files):05d}.parquet"
    row = parquet.read_table(files[0]).slice(0, 1).to_pylist()[0]
    np.testing.assert_array_equal(row["frames"], made[row["id"]].frames)


def test_hear_files_of_any_clips(made: EmbeddingStore, tmp_path: Path) -> None:
    export(made, tmp_path / "scenes", "hear")
    export(made, tmp_path / "frames", "hear", timestamps=True)
    for clip in made:
        scene = np.load(tmp_path / "scenes" / f"{clip.meta['id']}.embedding.npy")
        frames = np.load(tmp_path / "frames" / f"{clip.meta['id']}.embedding.npy")
        times = json.loads((tmp_path / "frames" / f"{clip.meta['id']}.timestamps.json").read_text())
        assert (scene.dtype, frames.dtype) == (np.float32, np.float32)
        np.testing.assert_array_equal(scene, clip.scene)
        np.testing.assert_array_equal(frames, clip.frames)
        np.testing.assert_array_equal(times, clip.times)


def test_hear_files_of_a_task(tmp_path: Path) -> None:
    embedded(hear_task(tmp_path), tmp_path / "out")
    export(EmbeddingStore(tmp_path / "out"), tmp_path / "hear", "hear")
    assert sorted(p.relative_to(tmp_path / "hear").as_posix() for p in (tmp_path / "hear").rglob("*.npy")) == [
        f"beep-v1-tiny/{name}.embedding.npy" for name in ("test/y.wav", "train/x.wav", "valid/x.wav")
    ]


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/../../../evil"])
def test_ids_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    write_clips(tmp_path, [0.5])
    (tmp_path / "m.jsonl").write_text(json.dumps({"id": name, "path": "clip-000.wav"}) + "\n")
    embedded(tmp_path / "m.jsonl", tmp_path / "out")
    with pytest.raises(StoreError, match="expected ids that are names of files"):
        export(EmbeddingStore(tmp_path / "out"), tmp_path / "a" / "hear", "hear")
    assert list((tmp_path / "a").iterdir()) == []


def test_what_cannot_be(made: EmbeddingStore, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for out in (tmp_path / "full", tmp_path / "full" / "x"):
        with pytest.raises(StoreError, match="expected a folder that is new or empty"):
            export(made, out, "hear")
    with pytest.raises(StoreError, match="expected a folder that can be written to"):
        export(made, Path("/proc/nowhere/x"), "hear")
    write_clips(tmp_path / "in", [0.5])
    embedded(tmp_path / "in", tmp_path / "out", Settings())
    with pytest.raises(StoreError, match="expected a store with timestamps"):
        export(EmbeddingStore(tmp_path / "out"), tmp_path / "new", "datasets", timestamps=True)
    (tmp_path / "empty").mkdir()
    assert export(made, tmp_path / "empty", "hear") == 5


# Copies


MANY = (0.3, 1.2, 0.7, 2.0, 0.5, 1.7)


def short_shards(**options: Any) -> Settings:
    return Settings(shard_hours=3 / 3600, batch_seconds=2.0, **options)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips with metadata of several types, some of them null; one cannot be read."""
    folder = tmp_path_factory.mktemp("manifest")
    names = [path.name for path in write_clips(folder, MANY)]
    (folder / "broken.wav").write_bytes(b"RIFF")
    rows = [
        {"id": f"é/{i}", "path": name, "label": "ab"[i % 2], "age": None if i % 3 else i, "tags": ["x"] * i}
        for i, name in enumerate([*names, "broken.wav"])
    ]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "clips.jsonl"


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_a_copy_is_a_run_in_that_format(
    manifest: Path, tmp_path: Path, timestamps: bool, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bytes, from and to each format; and embed has nothing left to do, or goes on with what the copy lacks."""
    monkeypatch.setattr("gura_jax.dataset.sinks.parquet.GROUP_BYTES", 100)  # several groups of rows
    settings = {form: short_shards(timestamps=timestamps, storage=storage, format=form) for form in SINKS}
    direct = {form: tmp_path / form for form in SINKS}
    for form, out in direct.items():
        assert embedded(manifest, out, settings[form]).shards > 2
    for source, target in itertools.product(SINKS, SINKS):
        copied = tmp_path / f"{source}-{target}"
        assert export(EmbeddingStore(direct[source]), copied, target) == len(MANY)
        assert contents(copied) == contents(direct[target])
    summary = embedded(manifest, tmp_path / "npy-parquet", settings["parquet"], verify=True)
    assert (summary.before, summary.left) == (summary.shards, 0)

    for source, target in (("npy", "parquet"), ("parquet", "npy")):
        unfinished, copied = tmp_path / f"half-{source}", tmp_path / f"half-{source}-{target}"
        interrupt(opened(manifest, unfinished, settings[source]), 3)
        assert 0 < export(EmbeddingStore(unfinished), copied, target) < len(MANY)
        assert embedded(manifest, copied, settings[target]).before > 0
        assert contents(copied) == contents(direct[target])


def test_clips_that_were_tried_again(tmp_path: Path) -> None:
    """Their plan and shards are copied; another plan of them is refused."""
    paths = write_clips(tmp_path / "in", MANY)
    good = [path.read_bytes() for path in paths[:2]]
    for path in paths[:2]:
        path.write_bytes(b"RIFF")
    embedded(tmp_path / "in", tmp_path / "out", short_shards())
    export(EmbeddingStore(tmp_path / "out"), tmp_path / "copy", "parquet")
    export(EmbeddingStore(tmp_path / "out"), tmp_path / "other", "parquet")
    assert len((tmp_path / "copy" / "failed.csv").read_text().splitlines()) == 3

    paths[0].write_bytes(good[0])
    embedded(tmp_path / "in", tmp_path / "other", short_shards(format="parquet"), retry_failed=True)
    embedded(tmp_path / "in", tmp_path / "other", short_shards(format="parquet"), retry_failed=True)
    paths[1].write_bytes(good[1])
    embedded(tmp_path / "in", tmp_path / "out", short_shards(), retry_failed=True)
    assert export(EmbeddingStore(tmp_path / "out"), tmp_path / "copy", "parquet") == len(MANY)
    assert not (tmp_path / "copy" / "failed.csv").exists()
    assert embedded(tmp_path / "in", tmp_path / "copy", short_shards(format="parquet")).left == 0
    with refuses(StoreError, "plan-00001.parquet: expected the store's plan of clips tried again, found another"):
        other = tmp_path / "other" / "plan-00001.parquet"
        other.write_bytes((tmp_path / "other" / "plan-00002.parquet").read_bytes())
        export(EmbeddingStore(tmp_path / "out"), tmp_path / "other", "parquet")


class Killed(BaseException):
    pass


def test_a_copy_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step that changes the disk, after which nothing else does: it goes on, to the same bytes."""
    write_clips(tmp_path / "in", [1.9, 1.0])
    (tmp_path / "in" / "broken.wav").write_text("not audio")
    embedded(tmp_path / "in", tmp_path / "out", Settings(timestamps=True, shard_hours=2 / 3600, batch_seconds=2))
    store, copied, kill_at, steps = EmbeddingStore(tmp_path / "out"), tmp_path / "copy", 0, 0

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps >= kill_at:
                raise Killed
            return function(*arguments, **options)

        return step

    export(store, tmp_path / "whole", "parquet")
    whole = contents(tmp_path / "whole")
    for kill_at in itertools.count(1):
        steps = 0
        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "unlink", "mkdir"):
                patch.setattr(os, name, mortal(getattr(os, name)))
            patch.setattr(files._Hashed, "write", mortal(files._Hashed.write))
            with contextlib.suppress(Killed):
                export(store, copied, "parquet")
                break
        if copied.exists():
            records = {name: content for name, content in contents(copied).items() if name.startswith("shard-")}
            assert records.items() <= whole.items(), kill_at
        export(store, copied, "parquet")
        assert contents(copied) == whole, kill_at
        shutil.rmtree(copied)
    assert kill_at > 40


def test_copies_that_are_refused(made: EmbeddingStore, tmp_path: Path) -> None:
    store = tmp_path / "store"
    export(made, store, "npy")
    copied = EmbeddingStore(store)
    with refuses(StoreError, f"{store}: expected a whole store to copy, found a part"):
        export(copied.filter(pc.field("duration") > 0.6), tmp_path / "part", "npy")
    with refuses(StoreError, f"{store}: expected the run that began here, found another", "format: npy then, parquet"):
        export(copied, store, "parquet")
    write_clips(tmp_path / "in", [0.5])
    embedded(tmp_path / "in", tmp_path / "out")
    with refuses(StoreError, f"{store}: expected the run that began here, found another", "inputs_sha256"):
        export(EmbeddingStore(tmp_path / "out"), store, "npy")
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "scene-00000.npy").touch()
    with refuses(StoreError, "expected a folder without embeddings", "found scene-00000.npy"):
        export(copied, tmp_path / "stray", "npy")
    with refuses(InputError, "format 'parket' is not known; did you mean parquet?"):
        export(copied, tmp_path / "new", "parket")
    with refuses(InputError, "s3://bucket/x: expected a folder for this format"):
        export(copied, "s3://bucket/x", "hear")

    damaged = bytearray((store / "scene-00001.npy").read_bytes())
    damaged[-1] ^= 1
    (store / "scene-00001.npy").write_bytes(damaged)
    with refuses(StoreError, f"{store}/shard-00001.json: expected files with the checksums in it", "--verify"):
        export(copied, tmp_path / "new", "parquet")
    assert shard_numbers(tmp_path / "new") == [0]


def test_a_damaged_copy_is_mended(made: EmbeddingStore, tmp_path: Path) -> None:
    export(made, tmp_path / "copy", "parquet")
    whole = contents(tmp_path / "copy")
    (tmp_path / "copy" / "clips-00001.parquet").write_bytes(b"PAR1")
    (tmp_path / "copy" / "shard-00000.json").unlink()
    export(made, tmp_path / "copy", "parquet")
    assert contents(tmp_path / "copy") == whole


# perch-hoplite, which make test-hoplite installs


def test_without_hoplite(made: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "perch_hoplite", None)
    with refuses(StoreError, "--format hoplite: expected perch-hoplite", "pip install 'gura-jax[hoplite]'"):
        export(made, tmp_path / "new", "hoplite")
    assert list(tmp_path.iterdir()) == []


FILES, CLIPS, SECONDS = 5, 40, 2.5


def scattered(folder: Path, form: str) -> EmbeddingStore:
    """A store of vectors in all directions and of norms from 1e-3 to 1e3; one is zero."""
    rng = np.random.default_rng(0)
    sizes = {"scene_embedding_size": 64, "timestamp_embedding_size": 32}
    run = {"fingerprint": "r", "system": {"name": "toy"}, "sample_rate": 16_000, "storage": "float32"} | sizes
    folder.mkdir()
    write_json(folder, RUN_FILE, run)
    for shard in range(2):
        meta = pa.table(
            {
                "id": [f"é/{shard}/{i}" for i in range(CLIPS)],
                "path": [f"in/{i % FILES}.wav" for i in range(CLIPS)],
                "offset": [SECONDS * (i // FILES + 100 * shard) for i in range(CLIPS)],
                "duration": [SECONDS] * CLIPS,
                "num_samples": [40_000] * CLIPS,
                "num_frames": [1 + i % 3 for i in range(CLIPS)],
                "frame_start": np.cumsum([0, *(1 + i % 3 for i in range(CLIPS - 1))]),
                "frame_offset_ms": [500.0] * CLIPS,
                "frame_hop_ms": [1000.0 if i % 3 else 0.0 for i in range(CLIPS)],
            }
        )
        scenes = (rng.standard_normal((CLIPS, 64)) * 10 ** rng.uniform(-3, 3, (CLIPS, 1))).astype(np.float32)
        scenes[7] *= shard
        frames = [rng.standard_normal((n, 32)).astype(np.float32) for n in meta["num_frames"].to_pylist()]
        write_shard(folder, shard, run="r", shard=Shard(meta, scenes, frames), failed=[], sink=SINKS[form])
    return EmbeddingStore(folder)


@pytest.mark.hoplite
@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("form", list(SINKS))
def test_hoplite_searches_it(form: str, timestamps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reopened, each vector's nearest neighbour is itself; recordings, time spans, ids and norms are there."""
    reason = "needs perch-hoplite: make test-hoplite"
    hoplite = pytest.importorskip("perch_hoplite.db.sqlite_usearch_impl", reason=reason)
    monkeypatch.setattr("gura_jax.dataset.export.hoplite.BATCH", 7)
    store = scattered(tmp_path / "out", form)
    assert export(store, tmp_path / "db", "hoplite", timestamps=timestamps) == 2 * CLIPS
    assert sorted(path.name for path in (tmp_path / "db").iterdir()) == ["hoplite.sqlite", "usearch.index"]

    database = hoplite.SQLiteUSearchDB.create(str(tmp_path / "db"), readonly=True)
    assert [(d.name, d.project) for d in database.get_all_deployments()] == [("out", "out")]
    paths = {recording.id: recording.filename for recording in database.get_all_recordings()}
    assert sorted(paths.values()) == [f"in/{i}.wav" for i in range(FILES)]
    windows = iter(database.get_all_windows(include_embedding=True))
    for clip in store:
        start, vectors = clip.meta["offset"], clip.frames if timestamps else clip.scene[None]
        assert vectors is not None
        spans = [(start + i, start + min(i + 1, SECONDS)) for i in range(len(vectors))]
        if not timestamps or len(vectors) == 1:
            spans = [(start, start + SECONDS)]
        for vector, span in zip(vectors, spans, strict=True):
            window = next(windows)
            assert (window.clip_id, paths[window.recording_id]) == (clip.meta["id"], clip.meta["path"])
            np.testing.assert_allclose(window.offsets, span)
            assert window.norm == pytest.approx(np.linalg.norm(vector))
            np.testing.assert_allclose(
                window.norm * window.embedding.astype(np.float32), vector, atol=5e-4 * window.norm
            )
            for approximate in (False, True) if vector.any() else ():
                found = list(database.search(vector, 3, approximate=approximate))
                assert found[0].window_id == window.id
    assert next(windows, None) is None
    model = database.get_metadata("model_config")
    assert (model.model_key, model.model_config.system) == ("gura_jax", "toy")
    sources = pytest.importorskip("perch_hoplite.agile.source_info").AudioSources
    (audio,) = sources.from_config_dict(database.get_metadata("audio_sources")).audio_globs
    assert (audio.dataset_name, audio.base_path) == ("out", ".")
