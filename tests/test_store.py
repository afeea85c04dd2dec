"""gura_jax/dataset/store.py: what is written reads back, and nothing is ever half written."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from gura_jax.dataset import store
from gura_jax.dataset.store import ShardWriter, write_json
from gura_jax.errors import StoreError


def add(writer: ShardWriter, index: int, num_frames: int = 3) -> None:
    writer.add(
        f"clip-{index}",
        f"in/clip-{index}.wav",
        num_samples=8000,
        scene=np.full(4, index, np.float32),
        frames=np.full((num_frames, 2), index, np.float32) if writer.timestamps else None,
        times=12.5 + 20.0 * np.arange(num_frames) if writer.timestamps else None,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_shards_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_CLIPS", 2)
    folder = tmp_path / "new" / "out"
    writer = ShardWriter(folder, timestamps=True)
    for index, num_frames in enumerate([3, 5, 1]):
        add(writer, index, num_frames)
    assert names(folder) == ["frames-00000.npy", "meta-00000.parquet", "scene-00000.npy"]
    writer.finish({"clips": 3})

    assert json.loads((folder / "run.json").read_text()) == {"clips": 3}
    scenes = [np.load(folder / f"scene-0000{k}.npy") for k in (0, 1)]
    assert [(s.shape, s.dtype) for s in scenes] == [((2, 4), np.float32), ((1, 4), np.float32)]
    np.testing.assert_array_equal(np.concatenate(scenes)[:, 0], [0, 1, 2])
    assert np.load(folder / "frames-00001.npy").shape == (1, 2)
    frames, meta = np.load(folder / "frames-00000.npy"), parquet.read_table(folder / "meta-00000.parquet")
    assert frames.dtype == np.float32
    assert meta.schema.equals(
        pa.schema(
            {
                "id": pa.string(),
                "path": pa.string(),
                "duration": pa.float64(),
                "num_samples": pa.int64(),
                "num_frames": pa.int64(),
                "frame_start": pa.int64(),
                "frame_offset_ms": pa.float64(),
                "frame_hop_ms": pa.float64(),
            }
        )
    )
    assert meta["id"].to_pylist() == ["clip-0", "clip-1"]
    assert meta["path"].to_pylist() == ["in/clip-0.wav", "in/clip-1.wav"]
    assert meta["duration"].to_pylist() == [0.5, 0.5]
    for row in meta.to_pylist():
        own = frames[row["frame_start"] :][: row["num_frames"]]
        assert own.shape == ({"clip-0": 3, "clip-1": 5}[row["id"]], 2)
        assert (own == int(row["id"][-1])).all()
        assert (row["frame_offset_ms"], row["frame_hop_ms"]) == (12.5, 20.0)


def test_without_timestamps(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, timestamps=False)
    add(writer, 0)
    writer.finish({})
    assert names(tmp_path) == ["meta-00000.parquet", "run.json", "scene-00000.npy"]
    assert parquet.read_schema(tmp_path / "meta-00000.parquet").names == ["id", "path", "duration", "num_samples"]


def test_a_shard_is_cut_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 2 * (4 * 4 + 3 * 2 * 4))
    writer = ShardWriter(tmp_path, timestamps=True)
    for index in range(3):
        add(writer, index)
    writer.finish({})
    assert [len(np.load(tmp_path / f"scene-0000{k}.npy")) for k in (0, 1)] == [2, 1]


def test_a_file_name_that_is_not_unicode(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, timestamps=False)
    writer.add(os.fsdecode(b"caf\xe9"), "café.wav", 400, np.zeros(4))
    writer.finish({})
    meta = parquet.read_table(tmp_path / "meta-00000.parquet")
    assert (meta["id"].to_pylist(), meta["path"].to_pylist()) == (["caf\\udce9"], ["café.wav"])


def test_a_store_is_not_overwritten_unasked(tmp_path: Path) -> None:
    for name in ("run.json", "scene-00000.npy", "frames-00012.npy", "meta-00003.parquet"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("old")
        with pytest.raises(StoreError, match=f"{folder.name}: .*found {name}: .*--overwrite"):
            ShardWriter(folder, timestamps=False)
        assert (folder / name).read_text() == "old"


def test_overwriting_takes_the_old_store_and_nothing_else(tmp_path: Path) -> None:
    foreign = ["notes.txt", "scene-1.npy", "meta-00000.parquet.bak", "run.json.old", "my-scene-00000.npy"]
    old = ["run.json", "scene-00000.npy", "scene-00007.npy", "frames-00007.npy", "meta-00007.parquet"]
    for name in foreign + old:
        (tmp_path / name).write_text("old")
    writer = ShardWriter(tmp_path, timestamps=False, overwrite=True)
    add(writer, 1)
    assert names(tmp_path) == sorted(foreign + old)  # nothing is gone before something is ready
    writer.finish({})
    assert names(tmp_path) == sorted([*foreign, "run.json", "scene-00000.npy", "meta-00000.parquet"])
    assert all((tmp_path / name).read_text() == "old" for name in foreign)
    assert np.load(tmp_path / "scene-00000.npy")[0, 0] == 1


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/nowhere"), tmp_path / ("x" * 300)):
        with pytest.raises(StoreError, match=f"{folder.name}: expected a folder that can be written to, found: "):
            ShardWriter(folder, timestamps=False)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 64 KiB: writes then fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_disk")
def test_a_write_that_fails_leaves_the_old_store_whole(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("old")
    writer = ShardWriter(tmp_path, timestamps=True, overwrite=True)
    add(writer, 0, num_frames=100_000)
    with pytest.raises(StoreError, match=f"{tmp_path.name}: "):
        writer.finish({})
    assert names(tmp_path) == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "old"


def test_a_full_disk_keeps_the_clips_for_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = ShardWriter(tmp_path, timestamps=True)
    add(writer, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=f"{tmp_path.name}: .*No space left on device"):
            writer.finish({})
    assert names(tmp_path) == []
    writer.finish({})
    assert len(np.load(tmp_path / "frames-00000.npy")) == 3


def test_the_meta_file_is_named_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        order.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    writer = ShardWriter(tmp_path, timestamps=True)
    add(writer, 0)
    writer.finish({})
    assert order == ["scene-00000.npy", "frames-00000.npy", "meta-00000.parquet", "run.json"]


def test_json_is_sorted_and_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"b": 1, "a": [2]})
    text = path.read_text()
    assert text == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"c": 3})
    assert path.read_text() == text
    assert names(tmp_path) == ["run.json"]
