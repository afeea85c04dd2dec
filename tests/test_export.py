"""gura_jax/dataset/export.py: other tools read what it writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from test_manifest import hear_task
from toy import embedded, write_clips

from gura_jax import EmbeddingStore
from gura_jax.dataset import export as export_module
from gura_jax.dataset.export import export
from gura_jax.dataset.table import Settings
from gura_jax.errors import StoreError


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
    monkeypatch.setattr(export_module, "ROW_GROUP", 2)
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
