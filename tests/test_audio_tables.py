"""Parquet tables with a column of audio: as datasets writes them, compressed or not, local, in a folder, on the hub."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from pyarrow import parquet
from refusals import refuses
from toy import contents, embedded, interrupt, opened, write_clips

from gura_jax import EmbeddingStore, objects
from gura_jax.dataset import sources
from gura_jax.dataset.sources import Inputs, open_clip, read_inputs, tables, units
from gura_jax.dataset.table import Settings
from gura_jax.errors import AudioError, InputError

SETTINGS = Settings(timestamps=True, shard_hours=4 / 3600, batch_seconds=2)
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def flac(seconds: float, seed: int) -> bytes:
    out = io.BytesIO()
    noise = 0.1 * np.random.default_rng(seed).standard_normal(round(16_000 * seconds))
    soundfile.write(out, noise, 16_000, format="FLAC")
    return out.getvalue()


def clips(count: int, first: int = 0) -> list[dict[str, Any]]:
    seconds = np.random.default_rng(count + first).uniform(0.3, 1.2, count)
    return [{"bytes": flac(s, first + i), "path": f"clip-{first + i:03d}.flac"} for i, s in enumerate(seconds.tolist())]


def write(path: Path, rows: list[Any], group: int = 3, columns: dict[str, Any] | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"audio": pa.array(rows, AUDIO)} | (columns or {}))
    parquet.write_table(table, path, row_group_size=group, **options)
    return path


def unpack(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(parents=True)
    for row in rows:
        (folder / row["path"]).write_bytes(row["bytes"])
    return folder


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_the_same_embeddings_as_of_files(tmp_path: Path, compression: str) -> None:
    rows = clips(8)
    path = write(tmp_path / "t.parquet", rows, columns={"text": [f"t{i}" for i in range(8)]}, compression=compression)
    embedded(path, tmp_path / "out", SETTINGS)
    embedded(unpack(tmp_path / "files", rows), tmp_path / "plain", SETTINGS)
    found, plain = EmbeddingStore(tmp_path / "out"), EmbeddingStore(tmp_path / "plain")
    assert set(found.ids) == set(plain.ids) == {row["path"] for row in rows}
    for clip in plain:
        own = found[clip.meta["id"]]
        np.testing.assert_array_equal(own.scene, clip.scene)
        np.testing.assert_array_equal(own.frames, clip.frames)
        assert own.meta["text"] == f"t{int(clip.meta['id'][5:8])}"


def test_what_datasets_writes(tmp_path: Path) -> None:
    """Its own features and names; columns with names of ours are renamed, other files of bytes left out."""
    datasets = pytest.importorskip("datasets")
    rows = clips(4)
    features = datasets.Features(
        {"audio": datasets.Audio(), "noise": {"bytes": datasets.Value("binary")}, "id": datasets.Value("int64")}
    )
    noise = pa.array([{"bytes": b"x"}] * 4, pa.struct([("bytes", pa.binary())]))
    table = pa.table({"audio": pa.array(rows, AUDIO), "noise": noise, "id": [3, 4, 5, 6]})
    datasets.Dataset(table).cast(features).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    found = read_inputs([tmp_path])
    assert found.column_names == ["id", "path", "offset", "duration", "row_id"]
    assert found["id"].to_pylist() == [row["path"] for row in rows]
    assert found["row_id"].to_pylist() == [3, 4, 5, 6]
    assert open_clip(found["path"][2].as_py()).read() == rows[2]["bytes"]


def test_rows_without_a_name_or_without_bytes(tmp_path: Path) -> None:
    rows = [*clips(3), {"bytes": None, "path": "gone.flac"}, None]
    rows[1]["path"] = None
    path = write(tmp_path / "t.parquet", rows)
    failed = {failure.id: failure.reason for failure in embedded(path, tmp_path / "out", SETTINGS).failed}
    assert set(failed) == {"gone.flac", "t#4"}
    for reason in failed.values():
        assert "expected the bytes of a file, found none in this row of the table" in reason
    assert set(EmbeddingStore(tmp_path / "out").ids) == {"clip-000.flac", "t#1", "clip-002.flac"}


def test_columns_with_names_of_the_store(tmp_path: Path) -> None:
    """They are renamed, and the store can be opened."""
    path = write(tmp_path / "t.parquet", clips(2), columns={"row": [7, 8], "shard": ["x", "y"]})
    embedded(path, tmp_path / "out", SETTINGS)
    store = EmbeddingStore(tmp_path / "out")
    found = {clip.meta["id"]: (clip.meta["row_row"], clip.meta["row_shard"]) for clip in store}
    assert found == {"clip-000.flac": (7, "x"), "clip-001.flac": (8, "y")}


def test_each_group_of_rows_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although clips are sorted by length and decoded by several threads; once for the plan, once for the run."""
    path = write(tmp_path / "t.parquet", clips(24), group=4)
    read: list[int] = []
    own = tables._read_group
    monkeypatch.setattr(tables, "_read_group", lambda *given: read.append(given[1]) or own(*given))
    monkeypatch.setattr(tables, "_groups", tables._Groups())
    run = opened(path, tmp_path / "out", Settings(shard_hours=6 / 3600, batch_seconds=2))
    assert sorted(read) == list(range(6))
    assert len(run.shards) > 2
    read.clear()
    monkeypatch.setattr(tables, "_groups", tables._Groups())
    list(run.embed_shards(run.shards))
    assert sorted(read) == list(range(6))


def test_what_is_held_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.parquet", clips(12), group=2, compression="none")
    size = parquet.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size
    groups = tables._Groups()
    monkeypatch.setattr(tables, "CACHE_BYTES", 2 * size)
    monkeypatch.setattr(tables, "_groups", groups)
    held: list[int] = []
    reserve = groups._reserve
    monkeypatch.setattr(
        groups, "_reserve", lambda key, size: reserve(key, size) or held.append(sum(groups._sizes.values()))
    )
    embedded(path, tmp_path / "out", SETTINGS)
    assert len(held) >= 12
    assert max(held) <= 2 * size
    monkeypatch.setattr(tables, "CACHE_BYTES", 1)  # less than any: one at a time
    embedded(path, tmp_path / "again", SETTINGS)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_run_that_is_interrupted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", clips(12))
    embedded(path, tmp_path / "whole", SETTINGS)
    interrupt(opened(path, tmp_path / "out", SETTINGS), 2)
    embedded(path, tmp_path / "out", SETTINGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_tables_that_are_refused(tmp_path: Path) -> None:
    two = pa.table({"a": pa.array(clips(1), AUDIO), "b": pa.array(clips(1), AUDIO)})
    parquet.write_table(two, tmp_path / "two.parquet")
    with refuses(InputError, "two.parquet: expected one column of audio", "found the columns a, b"):
        read_inputs([tmp_path / "two.parquet"])
    write(tmp_path / "some" / "a.parquet", clips(1))
    parquet.write_table(two, tmp_path / "some" / "b.parquet")
    for content, words in ((None, "expected one column of audio"), (b"PAR1", "found one that cannot be read")):
        if content is not None:
            (tmp_path / "some" / "b.parquet").write_bytes(content)
        out = tmp_path / f"out-{content is None}"
        (failure,) = embedded(f"{tmp_path}/some/*.parquet", out, SETTINGS).failed  # the other goes on
        assert failure.id == f"{tmp_path}/some/b.parquet"
        assert words in failure.reason
        assert EmbeddingStore(out).ids == ["clip-000.flac"]
    with refuses(AudioError, "parquet://x: expected parquet://GROUP/FILE!ROW/NAME"):
        open_clip("parquet://x")
    with refuses(AudioError, "/none.parquet: expected a table, found none"):
        open_clip("parquet://0//none.parquet!0/a.wav")
    with refuses(AudioError, "expected a Parquet table, found one that is damaged"):
        open_clip(f"parquet://9/{tmp_path}/some/a.parquet!0/a.wav")


@pytest.mark.parametrize("content", [b"PAR1", None])
def test_a_bad_table_before_good_ones(tmp_path: Path, content: bytes | None) -> None:
    """One that is damaged, or has no audio: the others are read."""
    write(tmp_path / "in" / "b.parquet", clips(2))
    parquet.write_table(pa.table({"x": [1]}), tmp_path / "in" / "a.parquet")
    if content is not None:
        (tmp_path / "in" / "a.parquet").write_bytes(content)
    (failure,) = embedded(tmp_path / "in", tmp_path / "out", SETTINGS).failed
    assert failure.id.endswith("a.parquet")
    assert sorted(EmbeddingStore(tmp_path / "out").ids) == ["clip-000.flac", "clip-001.flac"]


def test_columns_that_differ_from_table_to_table(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", clips(1), columns={"x": [1]})
    write(tmp_path / "b.parquet", clips(1, 1), columns={"x": ["one"]})
    for given in ([tmp_path], [f"{tmp_path}/*.parquet"], [tmp_path / "a.parquet", tmp_path / "b.parquet"]):
        with refuses(InputError, "expected inputs whose columns are of the same types, found: "):
            read_inputs(given)


@pytest.mark.parametrize("name", ["audio", "x"])
def test_a_column_twice(tmp_path: Path, name: str) -> None:
    audio = pa.array(clips(1), AUDIO)
    values = {"audio": audio, "x": pa.array([1])}
    twice = pa.Table.from_arrays([audio, values["x"], values[name]], ["audio", "x", name])
    write(tmp_path / "a.parquet", clips(1, 1))
    parquet.write_table(twice, tmp_path / "b.parquet")
    with refuses(InputError, f"b.parquet: expected each column once, found more of {name}"):
        read_inputs([tmp_path / "b.parquet"])
    assert read_inputs([tmp_path])["id"].to_pylist() == ["clip-001.flac", str(tmp_path / "b.parquet")]


def test_a_column_that_has_the_new_name_of_another(tmp_path: Path) -> None:
    for names in (("id", "row_id"), ("row_id", "id")):
        columns = {name: [name] for name in names}
        (row,) = read_inputs([write(tmp_path / "t.parquet", clips(1), columns=columns)]).to_pylist()
        assert (row["row_row_id"], row["row_id"]) == ("id", "row_id")


def test_a_table_that_is_damaged_after_the_plan(tmp_path: Path) -> None:
    """Its clips are named, the others are embedded."""
    path = write(tmp_path / "t.parquet", clips(6), compression="none")
    write_clips(tmp_path / "in", [0.5])
    run = opened([str(path), str(tmp_path / "in")], tmp_path / "out", SETTINGS)
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)  # the header of the first page
    path.write_bytes(content)
    tables._groups.__init__()
    records = list(run.embed_shards(run.shards))
    failed = {failure.id for record in records for failure in record.failed}
    assert failed == {"clip-000.flac", "clip-001.flac", "clip-002.flac"}


def test_units_of_mixed_paths() -> None:
    paths = ["a.wav", "parquet://0/x.parquet!0/a", "parquet://1/x.parquet!0/a", "parquet://0/x.parquet!7/b!1/c"]
    found = units(pa.chunked_array([paths[:2], paths[2:]]))
    assert found is not None
    assert found.tolist() == [-1, 0, 1, 0]
    assert units(pa.chunked_array([["a.wav", "s3://b/parquet://0/x"]])) is None


# Inputs that need not be read again


def test_a_run_goes_on_without_reading_what_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.parquet", clips(6))
    write_clips(tmp_path / "in", [0.5, 0.7])
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,path\na,in/clip-000.wav\nb,in/clip-001.wav\n")
    given = [str(path), str(manifest)]
    embedded_inputs(given, tmp_path / "out")
    before = contents(tmp_path / "out")
    read: list[Any] = []
    own = sources.read_inputs
    monkeypatch.setattr(sources, "read_inputs", lambda *given, **options: read.append(given) or own(*given, **options))
    (tmp_path / "out" / "shard-00000.json").unlink()
    embedded_inputs(given, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert not read
    path.touch()  # the same content: it is read, and found to be the same
    embedded_inputs(given, tmp_path / "out")
    assert len(read) == 1
    manifest.write_text("id,path\na,in/clip-000.wav\n")
    with pytest.raises(Exception, match=r"inputs_sha256: .* then, .* now"):
        embedded_inputs(given, tmp_path / "out")
    assert Inputs([tmp_path / "in"]).signature is None  # of a folder only the list tells


def embedded_inputs(given: list[str], out: Path) -> None:
    from toy import toy_model

    from gura_jax.dataset.run import open_run
    from gura_jax.dataset.workers import Worker, work

    model = toy_model()
    work(open_run(model, Inputs(given, sample_rate=model.sample_rate), out, SETTINGS), Worker(0, 1, "alone"))


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.HubServer]:
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    objects._client.cache_clear()
    (tmp_path / "hub").mkdir()
    yield from hub_server.serve(tmp_path / "hub", tmp_path / "cache", monkeypatch)
    objects._client.cache_clear()


def test_a_data_set_on_the_hub(hub: hub_server.HubServer, tmp_path: Path) -> None:
    """Its revision becomes a commit; tables are read by ranges, each group of rows once for the plan and the run."""
    rows = clips(12)
    home = hub.root / "datasets" / "owner" / "birds"
    write(home / "data" / "train-0.parquet", rows[:6])
    write(home / "data" / "train-1.parquet", rows[6:])
    (home / "README.md").write_text("birds")
    settings = Settings(shard_hours=4 / 3600, batch_seconds=2)
    embedded("hf://datasets/owner/birds", tmp_path / "out", settings)
    embedded(unpack(tmp_path / "files", rows), tmp_path / "plain", settings)
    found, plain = EmbeddingStore(tmp_path / "out"), EmbeddingStore(tmp_path / "plain")
    assert set(found.ids) == set(plain.ids)
    for clip in plain:
        np.testing.assert_array_equal(found[clip.meta["id"]].scene, clip.scene)
    start = f"parquet://0/hf://datasets/owner/birds@{hub_server.COMMIT}/data/train-0.parquet!0/"
    assert any(path.startswith(start) for path in found.meta["path"].to_pylist())
    assert max(hub.sizes) < (home / "data" / "train-0.parquet").stat().st_size
    one = read_inputs(["hf://datasets/owner/birds/data/train-1.parquet"])
    assert one["id"].to_pylist() == [row["path"] for row in rows[6:]]
    assert len(read_inputs(["hf://datasets/owner/birds@main/data/*-0.parquet"])) == 6
    assert Inputs(["hf://datasets/owner/birds"]).signature is not None


def test_files_of_a_data_set(hub: hub_server.HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Audio files, manifests and compressed archives, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "points"))
    home = hub.root / "datasets" / "owner" / "files"
    write_clips(home / "deep", [0.5, 0.7])
    (home / "all.csv").write_text("id,path\na,deep/clip-001.wav\n")
    with tarfile.open(home / "a.tar.gz", "w:gz") as tar:
        tar.add(home / "deep" / "clip-001.wav", "x.wav")
    assert read_inputs(["hf://datasets/owner/files"])["id"].to_pylist() == ["deep/clip-000.wav", "deep/clip-001.wav"]
    inputs = ["hf://datasets/owner/files/all.csv", "hf://datasets/owner/files/a.tar.gz"]
    assert embedded(inputs, tmp_path / "out", SETTINGS).done.clips == 2
    assert len([path for path in (tmp_path / "points" / "gura_jax" / "gzip").iterdir() if path.name[0] != "."]) == 1


def test_data_sets_that_are_refused(hub: hub_server.HubServer, tmp_path: Path) -> None:
    with refuses(InputError, "hf://models/x: expected hf://datasets/OWNER/NAME"):
        read_inputs(["hf://models/x"])
    with refuses(InputError, "hf://datasets/owner/none: expected a data set on the hub, found: no such data set"):
        read_inputs(["hf://datasets/owner/none"])
    write(hub.root / "datasets" / "owner" / "gated" / "a.parquet", clips(1))
    hub.denied["datasets/owner/gated"] = 403
    with refuses(InputError, "gated/a.parquet: expected a data set on the hub, found: access denied"):
        read_inputs(["hf://datasets/owner/gated/a.parquet"])
    with refuses(InputError, "hf://...: expected a folder, or a URL of s3 or gs"):
        embedded(write_clips(tmp_path, [0.5]), "hf://datasets/owner/out", SETTINGS)
