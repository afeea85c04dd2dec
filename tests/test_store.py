"""The store (commit, sinks, reader): what is written reads back, and nothing is ever half written."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import parquet
from toy import embedded, write_clips

from gura_jax import EmbeddingStore
from gura_jax.dataset.commit import (
    Failure,
    check_shard,
    is_store_file,
    read_shard,
    remove_store,
    remove_temporary,
    set_aside,
    shard_numbers,
    write_failed,
    write_shard,
)
from gura_jax.dataset.export import export
from gura_jax.dataset.sinks import SINKS, Create, Open, Shard, Sink
from gura_jax.dataset.table import Settings
from gura_jax.errors import InputError, StoreError
from gura_jax.files import LOCK_FILE

FRAMES = [3, 5]


def write(folder: Path, number: int = 0, run: str = "r", names: tuple[str, ...] = ("a", "b"), **options: Any) -> Any:
    meta = pa.table({"id": list(names), "path": list(names), "num_samples": [400] * len(names)})
    frames = [np.full((n, 2), i, np.float32) for i, n in enumerate(FRAMES[: len(names)])]
    arguments: dict[str, Any] = {"run": run, "failed": [], "frames": frames} | options
    shard = Shard(meta, np.arange(len(names) * 4.0).reshape(-1, 4), arguments.pop("frames"))
    return write_shard(folder, number, shard=shard, **arguments)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK_FILE)


def test_a_shard_reads_back(tmp_path: Path) -> None:
    record = write(tmp_path, 7, failed=[Failure("c", "in/c", "silly")])
    shard = ["frames-00007.npy", "meta-00007.parquet", "scene-00007.npy", "shard-00007.json"]
    assert names(tmp_path) == shard
    assert read_shard(tmp_path, 7) == check_shard(tmp_path, 7, "r") == record
    assert (record.clips, record.samples, record.failed) == (2, 800, (Failure("c", "in/c", "silly"),))
    for name, described in record.files.items():
        content = (tmp_path / name).read_bytes()
        assert described == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for name, array in (
        ("frames", np.repeat(np.array([[0, 0], [1, 1]], np.float32), FRAMES, axis=0)),
        ("scene", np.arange(8.0).reshape(2, 4)),
    ):
        np.save(expected := io.BytesIO(), array)
        assert (tmp_path / f"{name}-00007.npy").read_bytes() == expected.getvalue()
    assert parquet.read_table(tmp_path / "meta-00007.parquet")["id"].to_pylist() == ["a", "b"]


def test_a_shard_without_clips_and_one_without_frames(tmp_path: Path) -> None:
    write(tmp_path, 0, names=(), frames=[np.zeros((0, 2), np.float32)])
    assert np.load(tmp_path / "frames-00000.npy").shape == (0, 2)
    assert np.load(tmp_path / "scene-00000.npy").shape == (0, 4)
    assert check_shard(tmp_path, 0, "r") is not None
    write(tmp_path, 1, frames=None)
    assert not (tmp_path / "frames-00001.npy").exists()
    assert check_shard(tmp_path, 1, "r") is not None


def test_the_record_is_named_last(tmp_path: Path, renamed: list[str]) -> None:
    write(tmp_path)
    assert renamed == ["scene-00000.npy", "frames-00000.npy", "meta-00000.parquet", "shard-00000.json"]


@pytest.mark.parametrize("kind", ["scene-00000.npy", "frames-00000.npy", "meta-00000.parquet", "shard-00000.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "longer"])
def test_damage_is_seen(tmp_path: Path, kind: str, damage: str) -> None:
    write(tmp_path)
    path = tmp_path / kind
    content = bytearray(path.read_bytes())
    middle = content.index(b"sha256") + 20 if kind.endswith("json") else len(content) // 2
    content[middle] ^= 1
    changed = {"flip": content, "cut": content[:-3], "longer": content + b"x"}.get(damage)
    path.unlink() if changed is None else path.write_bytes(changed)
    assert check_shard(tmp_path, 0, "r") is None
    target = set_aside(tmp_path, 0)
    assert target is not None
    assert (Path(target) / kind).exists() == (damage != "missing")
    assert names(tmp_path) == ["aside"]
    assert set_aside(tmp_path, 0) is None


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", '{"number": 0}', '{"failed": 3}', '{"failed": [{"id": 3}]}', "\xff"]
)
def test_a_record_of_nonsense_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "shard-00000.json").write_text(content, encoding="latin-1")
    assert read_shard(tmp_path, 0) is None


def test_of_two_writers_the_first_wins(tmp_path: Path) -> None:
    write(tmp_path)
    before = (tmp_path / "scene-00000.npy").stat().st_ino
    write(tmp_path)
    assert (tmp_path / "scene-00000.npy").stat().st_ino == before
    write(tmp_path, run="another")
    assert (tmp_path / "scene-00000.npy").stat().st_ino != before
    assert check_shard(tmp_path, 0, "r") is None


def test_what_killed_writers_left_goes_when_the_shard_is_complete(tmp_path: Path) -> None:
    left = tmp_path / ".scene-00000.npy.0123456789abcdef.tmp"
    other = tmp_path / ".scene-00001.npy.0123456789abcdef.tmp"
    foreign = tmp_path / ".scene-00000.npy.tmp"
    for path in (left, other, foreign):
        path.touch()
    write(tmp_path)
    remove_temporary(tmp_path, [0])
    assert [path.exists() for path in (left, other, foreign)] == [False, True, True]


def test_removing_takes_the_store_and_nothing_else(tmp_path: Path) -> None:
    foreign = ["notes.txt", "scene-1.npy", "meta-00000.parquet.bak", "run.json.old", "my-scene-00000.npy", "aside"]
    ours = ["run.json", "plan-00000.parquet", "failed.csv"]
    for name in [*foreign, *ours]:
        (tmp_path / name).write_text("old")
    write(tmp_path)
    assert [is_store_file(name) for name in names(tmp_path)] == [name not in foreign for name in names(tmp_path)]
    remove_store(tmp_path)
    assert names(tmp_path) == sorted(foreign)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 64 KiB: writes then fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_disk")
def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    before = names(tmp_path)
    with pytest.raises(StoreError, match=f"{tmp_path.name}: .*File too large"):
        write(tmp_path, 1, frames=[np.zeros((100_000, 2), np.float32)])
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, full)
    with pytest.raises(StoreError, match=f"{tmp_path.name}: .*No space left on device"):
        write(tmp_path)
    assert names(tmp_path) == []


def test_failures_that_a_later_shard_made_good(tmp_path: Path) -> None:
    write(tmp_path, 0, names=("a",), failed=[Failure("b", "in/b", 'says "no", twice'), Failure("c", "in/c", "x")])
    assert [failure.id for failure in write_failed(tmp_path)] == ["b", "c"]
    assert (tmp_path / "failed.csv").read_text().splitlines()[:2] == ["id,path,reason", 'b,in/b,"says ""no"", twice"']
    write(tmp_path, 1, names=("b",), failed=[Failure("c", "in/c", "still")])
    assert write_failed(tmp_path) == [Failure("c", "in/c", "still")]
    write(tmp_path, 2, names=("c",))
    assert write_failed(tmp_path) == []
    assert not (tmp_path / "failed.csv").exists()
    assert shard_numbers(tmp_path) == [0, 1, 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 7 clips in several shards, with two columns of a manifest's."""
    folder = tmp_path_factory.mktemp("made")
    paths = write_clips(folder / "in", [0.5, 1.0, 1.5, 2.0, 0.7, 0.8, 0.9])
    rows = [{"id": p.stem, "path": f"in/{p.name}", "split": "ab"[i % 2], "age": i} for i, p in enumerate(paths)]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    embedded(folder / "m.jsonl", folder / "out", Settings(timestamps=True, shard_hours=3 / 3600, batch_seconds=2))
    return folder / "out"


def test_the_store(made: Path) -> None:
    whole = EmbeddingStore(made)
    assert len(whole) == 7
    assert len(set(whole.meta["shard"].to_pylist())) > 1
    assert repr(whole) == f"<gura_jax.EmbeddingStore {made}: 7 clips by toy>"
    assert set(whole.ids) == {f"clip-{i:03d}" for i in range(7)}
    assert "clip-003" in whole
    assert "clip-007" not in whole
    clip = whole["clip-003"]
    assert clip.frames is not None
    assert clip.times is not None
    assert (clip.meta["duration"], clip.meta["split"], clip.meta["age"]) == (2.0, "b", 3)
    assert clip.frames.shape == (clip.meta["num_frames"], 3) == (len(clip.times), 3)
    assert isinstance(clip.frames, np.memmap)
    np.testing.assert_allclose(clip.frames.mean(0), clip.scene, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(clip.times, 12.5 + 20 * np.arange(len(clip.times)))
    with pytest.raises(KeyError, match="no clip 'nobody'"):
        whole["nobody"]
    clips = list(whole)
    assert [each.meta["id"] for each in clips] == whole.ids
    np.testing.assert_array_equal(whole.scenes(), np.stack([each.scene for each in clips]))


def test_a_part_of_the_store(made: Path) -> None:
    whole = EmbeddingStore(made)
    part = whole.filter((pc.field("split") == "a") & (pc.field("age") > 1))
    assert sorted(part.ids) == ["clip-002", "clip-004", "clip-006"]
    assert "clip-000" not in part
    assert "clip-000" in whole
    np.testing.assert_array_equal(part["clip-004"].scene, whole["clip-004"].scene)
    np.testing.assert_array_equal(part.scenes(), np.stack([whole[name].scene for name in part.ids]))
    assert len(whole.filter(pc.field("age") > 100).scenes()) == 0
    with pytest.raises(StoreError, match=r"expected a filter on id, path, .*, age, shard, row, found: .*speaker"):
        whole.filter(pc.field("speaker") == "ann")
    table = whole.to_arrow(embeddings=True)
    np.testing.assert_array_equal(np.stack(table["scene"].to_pylist()), whole.scenes())
    assert whole.to_arrow().column_names[:5] == ["id", "path", "offset", "duration", "num_samples"]
    frame = whole.to_pandas()
    assert list(frame["id"]) == whole.ids


def test_stores_that_are_none(made: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", made / "run.json"):
        with pytest.raises(StoreError, match="expected a folder of embeddings"):
            EmbeddingStore(folder)
    (tmp_path / "run.json").write_text('{"clips": 3}')
    with pytest.raises(StoreError, match=r"run\.json: expected what a run of this version wrote"):
        EmbeddingStore(tmp_path)


@pytest.mark.parametrize("name", ["scene-00000.npy", "meta-00000.parquet", "shard-00000.json"])
def test_a_damaged_store_names_the_file(made: Path, tmp_path: Path, name: str) -> None:
    for path in made.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(b"short")
    with pytest.raises(StoreError, match=rf"{name}: .* run gura-jax embed again"):
        EmbeddingStore(tmp_path)


@pytest.mark.parametrize("name", ["scene-00000.npy", "frames-00000.npy", "meta-00000.parquet"])
def test_damage_that_leaves_the_size_names_the_file(made: Path, tmp_path: Path, name: str) -> None:
    for path in made.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(bytes((tmp_path / name).stat().st_size))
    with pytest.raises(StoreError, match=rf"{name}: .* run gura-jax embed again"):
        list(EmbeddingStore(tmp_path))


class JsonSink(Sink):
    """A format of one's own: all of a shard in one file."""

    def files(self, timestamps: bool, states: bool) -> tuple[str, ...]:
        return ("clips.json",)

    def write(self, shard: Shard, create: Create) -> None:
        frames = None if shard.frames is None else np.concatenate(shard.frames).tolist()
        states = None if shard.states is None else [own.tolist() for own in shard.states]
        content = {"meta": shard.meta.to_pylist(), "scenes": shard.scenes.tolist(), "frames": frames, "states": states}
        create("clips.json", lambda file: file.write(json.dumps(content).encode()))

    def meta(self, open: Open, columns: list[str] | None = None) -> pa.Table:
        table = pa.Table.from_pylist(self._read(open)["meta"])
        return table.select(columns) if columns else table

    def scenes(self, open: Open) -> np.ndarray:
        return np.array(self._read(open)["scenes"], np.float32)

    def frames(self, open: Open) -> np.ndarray:
        return np.array(self._read(open)["frames"], np.float32)

    def states(self, open: Open) -> list[np.ndarray]:
        return [np.array(own, np.float32) for own in self._read(open)["states"]]

    def _read(self, open: Open) -> Any:
        with open("clips.json") as file:
            return json.load(file)


@pytest.fixture
def own_format(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SINKS, "json", JsonSink())
    return "json"


def test_a_format_of_ones_own_is_one_row(made: Path, tmp_path: Path, own_format: str) -> None:
    settings = Settings(timestamps=True, shard_hours=3 / 3600, batch_seconds=2, format=own_format)
    inputs = made.parent / "m.jsonl"
    embedded(inputs, tmp_path, settings)
    shards = shard_numbers(tmp_path)
    wanted = [f"{kind}-{n:05d}.json" for kind in ("clips", "shard") for n in shards]
    assert names(tmp_path) == sorted([*wanted, "plan-00000.parquet", "run.json"])
    for ours, theirs in zip(EmbeddingStore(tmp_path), EmbeddingStore(made), strict=True):
        assert ours.meta == theirs.meta
        for name in ("scene", "frames", "times"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))

    (tmp_path / "clips-00000.json").write_text("{}")  # damaged: only its shard is computed anew
    assert embedded(inputs, tmp_path, settings).before == len(shards) - 1
    (aside,) = (tmp_path / "aside").iterdir()
    assert names(aside) == ["clips-00000.json", "shard-00000.json"]
    with pytest.raises(StoreError, match="format: json then, npy now"):
        embedded(inputs, tmp_path, dataclasses.replace(settings, format="npy"))
    remove_store(tmp_path)
    assert names(tmp_path) == ["aside"]


def test_failures_in_a_format_of_ones_own(tmp_path: Path, own_format: str) -> None:
    sink = SINKS[own_format]
    write(tmp_path, 0, names=("a",), failed=[Failure("b", "in/b", "x"), Failure("c", "in/c", "x")], sink=sink)
    write(tmp_path, 1, names=("b",), sink=sink)
    assert write_failed(tmp_path) == [Failure("c", "in/c", "x")]


@pytest.mark.usefixtures("own_format")
def test_the_names_of_files_tell_the_format() -> None:
    for what in itertools.product((False, True), repeat=2):
        assert len({sink.files(*what) for sink in SINKS.values()}) == len(SINKS)


@pytest.mark.usefixtures("own_format")
def test_a_format_that_is_not_known() -> None:
    with pytest.raises(InputError, match="format 'jsn' is not known; did you mean json"):
        Settings(format="jsn")


def test_a_folder_whose_name_is_not_unicode(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    write_clips(tmp_path / "in", [0.1, 0.2])
    for _ in range(2):  # the second goes on with what is there
        embedded(tmp_path / "in", folder / "store")
    made = EmbeddingStore(folder / "store")
    assert len(made) == 2
    assert export(made, folder / "new", "datasets") == 2


# Parquet


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("timestamps", [False, True])
def test_parquet_has_what_npy_has(
    tmp_path: Path, storage: Any, timestamps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clip by clip, in groups of rows, filtered; and resumed to the same bytes."""
    monkeypatch.setattr("gura_jax.dataset.sinks.parquet.GROUP_BYTES", 1)
    write_clips(tmp_path / "in", (0.3, 1.2, 0.7, 2.0))
    (tmp_path / "in" / "broken.wav").write_bytes(b"RIFF")
    settings = Settings(timestamps, storage, shard_hours=2 / 3600, batch_seconds=2)
    embedded(tmp_path / "in", tmp_path / "npy", settings)
    other = dataclasses.replace(settings, format="parquet")
    assert [f.id for f in embedded(tmp_path / "in", tmp_path / "parquet", other).failed] == ["broken.wav"]
    ours, plain = EmbeddingStore(tmp_path / "parquet"), EmbeddingStore(tmp_path / "npy")
    assert ours.meta.equals(plain.meta)
    np.testing.assert_array_equal(ours.scenes(), plain.scenes())
    for clip, expected in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(clip.scene, expected.scene)
        assert (clip.frames is None) == (not timestamps)
        if clip.frames is not None:
            np.testing.assert_array_equal(clip.frames, expected.frames)
    part = ours.filter(pc.field("id") == ours.ids[1])
    np.testing.assert_array_equal(part.scenes(), plain.scenes()[1:2])
    before = {path.name: path.read_bytes() for path in (tmp_path / "parquet").iterdir()}
    (tmp_path / "parquet" / "clips-00000.parquet").write_bytes(b"PAR1")
    assert embedded(tmp_path / "in", tmp_path / "parquet", other).before >= 1
    found = {path.name: path.read_bytes() for path in (tmp_path / "parquet").iterdir() if path.is_file()}
    assert found == before
    with pytest.raises(StoreError, match="format: parquet then, npy now"):
        embedded(tmp_path / "in", tmp_path / "parquet", settings)


def test_parquet_is_a_table_of_clips_and_one_of_frames(tmp_path: Path) -> None:
    """Of fixed sizes, as other tools want them."""
    write_clips(tmp_path / "in", (0.3, 1.2))
    embedded(tmp_path / "in", tmp_path / "out", Settings(timestamps=True, format="parquet"))
    clips = parquet.read_table(tmp_path / "out" / "clips-00000.parquet")
    frames = parquet.read_table(tmp_path / "out" / "frames-00000.parquet")
    store = EmbeddingStore(tmp_path / "out")
    assert clips.schema.field("scene").type == pa.list_(pa.float32(), store.run["scene_embedding_size"])
    assert frames.schema.field("frame").type == pa.list_(pa.float32(), store.run["timestamp_embedding_size"])
    assert frames.num_rows == sum(clips["num_frames"].to_pylist())
    clip = store[store.ids[1]]
    own = frames.filter(pc.field("id") == store.ids[1])
    np.testing.assert_array_equal(np.stack(own["frame"].to_pylist()), clip.frames)
    np.testing.assert_array_equal(own["time_ms"].to_numpy(), clip.times)


def test_files_that_vanish_while_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As temporary ones do that another process renames."""
    write(tmp_path)

    class Vanished:
        name = ".gone.tmp"

        def is_file(self) -> bool:
            return True

        def stat(self) -> None:
            raise FileNotFoundError(2, "No such file or directory")

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: contextlib.nullcontext([Vanished(), *scandir(path)]))
    assert shard_numbers(tmp_path) == [0]
