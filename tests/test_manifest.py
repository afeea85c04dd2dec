"""gura_jax/dataset/sources: every kind of input as a table of clips, and inputs that are refused."""

import contextlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import csv, parquet
from toy import embedded, write_clips

from gura_jax import EmbeddingStore
from gura_jax.dataset.sources import SOURCES, Options, Source, decoded, encoded, read_inputs
from gura_jax.dataset.sources.source import clip_table
from gura_jax.errors import AudioError, InputError

SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def ids(*inputs: Any, **options: Any) -> list[str]:
    return read_inputs(inputs, **options)["id"].to_pylist()


def write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_manifests(tmp_path: Path, suffix: str) -> None:
    table = pa.table(
        {
            "id": ["a", "b", "c"],
            "path": ["x.wav", "sub/../y.wav", str(tmp_path / "z.wav")],
            "offset": [0.5, None, 2.0],
            "duration": [1.0, 2.5, None],
            "speaker": ["ann", None, "bob"],
            "age": [30, 40, 50],
        }
    )
    found = read_inputs([write(tmp_path / f"m.{suffix}", table)])
    assert found.column_names == ["id", "path", "offset", "duration", "speaker", "age"]
    assert found["id"].to_pylist() == ["a", "b", "c"]
    assert found["path"].to_pylist() == [f"{tmp_path}/x.wav", f"{tmp_path}/sub/../y.wav", f"{tmp_path}/z.wav"]
    assert found["offset"].to_pylist() == [0.5, 0.0, 2.0]
    assert found["duration"].to_pylist() == [1.0, 2.5, None]
    assert found["speaker"].to_pylist() == ["ann", None, "bob"]
    assert found["age"].to_pylist() == [30, 40, 50]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_ids_that_look_like_numbers(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"m.{suffix}", pa.table({"id": ["007", "8"], "path": ["1.wav", "2.wav"]}))
    assert ids(path) == ["007", "8"]
    path = write(path, pa.table({"id": [7, 8], "path": ["1.wav", "2.wav"]}))
    assert ids(path) == ["7", "8"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a"}], r"expected the columns id and path .*, found id$"),
        ([{"id": "a", "path": "x"}, {"id": "b", "path": "y"}, {"id": "a", "path": "z"}], "row 3: .*'a' of row 1 again"),
        ([{"id": "a", "path": "ftp://example.org/x.wav"}], "row 1: ftp://...: expected a path or a URL of s3"),
        (
            [{"id": "a", "path": "x"}, {"id": "b", "path": "s3://u:p@b/x.wav"}],
            "row 2: s3://.*x.wav: expected a URL",
        ),
        ([{"id": "a", "path": "../x.wav"}], "row 1: expected a path inside .*--allow-outside"),
        ([{"id": "a", "path": "/etc/passwd"}], "row 1: expected a path inside .*--allow-outside"),
        ([{"id": "a", "path": "sub/../../x.wav"}], "row 1: expected a path inside"),
        ([{"id": "a", "path": ""}], "row 1: expected an id and a path"),
        ([{"id": "", "path": "x"}], "row 1: expected an id and a path"),
        ([{"id": "a", "path": "x", "offset": -1.0}], "row 1: expected an offset of 0 s or more"),
        ([{"id": "a", "path": "x", "duration": 0.0}], "row 1: expected an offset .* and a duration over 0"),
        ([{"id": "a", "path": "x", "offset": "soon"}], "expected the column offset to hold seconds"),
        ([{"id": "a", "path": "x", "num_frames": 3}], "none that the store writes .*found num_frames: rename"),
        ([{"id": "a", "path": "x", "row": 3}], "none that the store writes .*found row: rename"),
        ([{"id": "a", "path": "x", "shard": 3}], "none that the store writes .*found shard: rename"),
        ([{"id": "a", "path": 3}], "expected the column path to hold strings"),
        ([{"id": ["a"], "path": "x"}], "expected the column id to hold strings"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_that_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str, suffix: str) -> None:
    path = write(tmp_path / f"m.{suffix}", pa.Table.from_pylist(rows))
    with pytest.raises(InputError, match=rf"m\.{suffix}.*{message}"):
        read_inputs([path])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"", "cannot be read"),
        ("m.csv", b"id,path\n", "an empty manifest"),
        ("m.csv", b"id,path\na,b,c\n", "cannot be read: .*Expected 2 columns, got 3"),
        ("m.csv", b"id,path\n\xff\xfe,x\n", "cannot be read"),
        ("m.csv", b"id,path,id\na,b,c\n", "expected each column once"),
        ("m.jsonl", b"", "cannot be read"),
        ("m.jsonl", b"[1, 2]\n", "cannot be read"),
        ("m.jsonl", b'{"id": "a"', "cannot be read"),
        ("m.parquet", b"PAR1", "cannot be read"),
        ("m.parquet", b"", "cannot be read"),
    ],
)
def test_files_that_are_no_manifests(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: .*{message}"):
        read_inputs([tmp_path / name])


@SETTINGS
@given(st.binary(max_size=200), st.sampled_from(["csv", "jsonl", "parquet"]))
def test_any_bytes_are_a_manifest_or_an_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        read_inputs([path])


@SETTINGS
@given(
    st.lists(
        st.fixed_dictionaries(
            {"id": st.text(max_size=4), "path": st.text(max_size=6)},
            optional={
                "offset": st.floats() | st.none(),
                "duration": st.floats() | st.none(),
                "note": st.none() | st.text(max_size=3) | st.lists(st.integers(0, 9), max_size=2),
            },
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_rows_are_clips_or_an_error(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        clips = read_inputs([path])
    except InputError:
        return
    assert len(set(clips["id"].to_pylist())) == len(clips) == len(rows)
    for file in clips["path"].to_pylist():
        assert os.path.realpath(decoded(file)).startswith(str(tmp_path.resolve()))


def test_the_root(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = write(tmp_path / "lists" / "m.csv", pa.table({"id": ["a"], "path": ["audio/x.wav"]}))
    assert read_inputs([path])["path"].to_pylist() == [f"{tmp_path}/lists/audio/x.wav"]
    assert read_inputs([path], root=tmp_path)["path"].to_pylist() == [f"{tmp_path}/audio/x.wav"]
    outside = write(tmp_path / "lists" / "o.csv", pa.table({"id": ["a"], "path": ["../x.wav"]}))
    assert read_inputs([outside], allow_outside=True)["path"].to_pylist() == [f"{tmp_path}/lists/../x.wav"]
    assert len(read_inputs([outside], root=tmp_path / "lists" / "..", allow_outside=True)) == 1


def test_links_that_lead_outside(tmp_path: Path) -> None:
    secret = write_clips(tmp_path / "secret", [1])[0]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link.wav").symlink_to(secret)
    (folder / "dir").symlink_to(secret.parent)
    with pytest.raises(InputError, match=r"in: expected a path inside .*link\.wav, which leads to .*secret"):
        read_inputs([folder])
    assert ids(folder, allow_outside=True) == ["link.wav"]
    for path in ("link.wav", "dir/clip-000.wav"):
        manifest = write(folder / "m.csv", pa.table({"id": ["a"], "path": [path]}))
        with pytest.raises(InputError, match=r"row 1: expected a path inside .*, which leads to .*secret"):
            read_inputs([manifest])
        assert ids(manifest, allow_outside=True) == ["a"]


def test_files_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clips(tmp_path / "a" / "b", [0.1, 0.1])
    write_clips(tmp_path, [0.1], "flac")
    (tmp_path / "a" / ".hidden.wav").touch()
    (tmp_path / "a" / "notes.txt").touch()
    assert ids(tmp_path) == ["a/b/clip-000.wav", "a/b/clip-001.wav", "clip-000.flac"]
    assert ids(f"{tmp_path}/**/*.wav") == ["clip-000.wav", "clip-001.wav"]
    assert ids(tmp_path / "clip-000.flac", tmp_path / "missing.wav") == ["clip-000.flac", "missing.wav"]
    (tmp_path / "odd[1].wav").touch()
    assert ids(tmp_path / "odd[1].wav") == ["odd[1].wav"]  # a file, not a pattern
    for nothing in (tmp_path / "*.ogg", tmp_path / "a" / "nothing*"):
        with pytest.raises(InputError, match="expected audio files, found none in"):
            read_inputs([nothing])
    with pytest.raises(InputError, match=r"ftp://\.\.\.: expected a path or a URL of s3"):
        read_inputs(["ftp://example.org/x.wav"])
    monkeypatch.chdir(tmp_path)
    # Named in several ways, one clip; of the same name elsewhere, another.
    inputs = ("clip-000.flac", tmp_path / "clip-000.flac", "a/../clip-000.flac", "a/b", "a")
    assert ids(*inputs) == ["clip-000.flac", "clip-000.wav", "clip-001.wav"]


def test_a_manifest_beside_a_folder(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", [0.1])
    manifest = write(tmp_path / "m.csv", pa.table({"id": ["clip-000.wav"], "path": ["in/clip-000.wav"], "age": [3]}))
    found = read_inputs([tmp_path / "in", manifest])
    assert found["id"].to_pylist() == ["clip-000.wav"]
    other = write(tmp_path / "n.jsonl", pa.table({"id": ["b"], "path": ["in/clip-000.wav"], "age": ["old"]}))
    with pytest.raises(InputError, match="columns are of the same types"):
        read_inputs([manifest, other])


def test_file_names_that_are_not_unicode(tmp_path: Path) -> None:
    path = write_clips(tmp_path, [0.1])[0]
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\\.wav")
    os.rename(path, odd)
    (row,) = read_inputs([tmp_path]).to_pylist()
    assert row["id"] == "caf\\udce9\\.wav"
    assert decoded(row["path"]) == odd


@given(st.binary(max_size=12))
def test_any_path_survives(path: bytes) -> None:
    text = os.fsdecode(path)
    assert decoded(encoded(text)) == text
    encoded(text).encode()


def hear_task(folder: Path, **changes: Any) -> Path:
    task = folder / "beep-v1-tiny"
    labels: dict[str, Any] = {"train": {"x.wav": ["a"]}, "valid": {"x.wav": []}, "test": {"y.wav": [{"start": 1.0}]}}
    for split, clips in labels.items():
        write_clips(task / "16000" / split, [0.1])[0].rename(task / "16000" / split / next(iter(clips)))
        (task / f"{split}.json").write_text(json.dumps(changes.get(split, clips)))
    metadata = {"splits": list(labels)} | {k: v for k, v in changes.items() if k == "splits"}
    (task / "task_metadata.json").write_text(json.dumps(metadata))
    return task


def test_hear_tasks(tmp_path: Path) -> None:
    task = hear_task(tmp_path)
    (task / "48000").mkdir()
    found = read_inputs([task]).to_pylist()
    assert [row["id"] for row in found] == [f"beep-v1-tiny/{x}" for x in ("train/x.wav", "valid/x.wav", "test/y.wav")]
    assert found[2] == {
        "id": "beep-v1-tiny/test/y.wav",
        "path": f"{task}/16000/test/y.wav",
        "offset": 0.0,
        "duration": None,
        "task": "beep-v1-tiny",
        "split": "test",
        "file": "y.wav",
        "labels": '[{"start": 1.0}]',
    }


@pytest.mark.parametrize(
    ("rates", "sample_rate", "chosen"),
    [
        ((16_000, 48_000), 16_000, 16_000),
        ((16_000, 48_000), 24_000, 48_000),
        ((22_050, 44_100, 48_000), 16_000, 22_050),
        ((16_000, 22_050), 48_000, 22_050),
    ],
)
def test_the_rate_of_a_hear_task(tmp_path: Path, rates: tuple[int, ...], sample_rate: int, chosen: int) -> None:
    """The model's own, else the next higher one, else the highest."""
    task = hear_task(tmp_path)
    (task / "16000").rename(task / str(rates[0]))
    for rate in rates[1:]:
        (task / str(rate)).mkdir()
    paths = read_inputs([task], sample_rate=sample_rate)["path"].to_pylist()
    assert {Path(path).relative_to(task).parts[0] for path in paths} == {str(chosen)}


def test_a_hear_task_without_audio(tmp_path: Path) -> None:
    task = hear_task(tmp_path)
    (task / "16000").rename(task / "audio")
    with pytest.raises(InputError, match="expected a folder of audio named by its sample rate, like 16000, found none"):
        read_inputs([task])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": None}, "expected 'splits', a list of names"),
        ({"splits": ["../train"]}, r"expected the name of a file in its folder, found '\.\./train'"),
        ({"train": {"../../x.wav": []}}, r"expected the name of a file in its folder"),
        ({"train": ["x.wav"]}, "expected an object of file names and labels"),
        ({"splits": ["nothing"]}, r"nothing\.json: cannot be read"),
    ],
)
def test_hear_tasks_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_inputs([hear_task(tmp_path, **changes)])


class ZipArchive(Source):
    """A kind of input that the package does not have: the files in an archive."""

    scheme = "zip"

    def recognises(self, given: str) -> bool:
        return given.endswith(".zip") and os.path.isfile(given)

    def table(self, given: str, options: Options) -> pa.Table | None:
        with zipfile.ZipFile(given) as archive:
            return clip_table([(name, f"zip://{given}!{name}") for name in archive.namelist()])

    def open(self, path: str, version: str | None = None) -> BinaryIO:
        archive, name = path.removeprefix("zip://").split("!")
        try:
            return io.BytesIO(zipfile.ZipFile(archive).read(name))
        except KeyError:
            raise AudioError(f"{path}: expected an audio file, found no such file") from None


def test_another_kind_of_input_is_a_class_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clips need not be files: they are planned, decoded and embedded, and its errors are reported."""
    monkeypatch.setattr("gura_jax.dataset.sources.SOURCES", [ZipArchive(), *SOURCES])
    files = [path for suffix in ("wav", "mp3") for path in write_clips(tmp_path / "in", [0.5, 1.2], suffix, 22_050)]
    archive = tmp_path / "clips.zip"
    with zipfile.ZipFile(archive, "w") as content:
        for path in files:
            content.write(path, path.name)
        content.writestr("broken.wav", "not audio")
    summary = embedded([archive, tmp_path / "in"], tmp_path / "out")
    assert [(failure.id, failure.path) for failure in summary.failed] == [("broken.wav", f"zip://{archive}!broken.wav")]
    assert "cannot be decoded" in summary.failed[0].reason
    store = EmbeddingStore(tmp_path / "out")
    assert len(store) == 8  # each file from the archive, and itself
    for path in files:
        np.testing.assert_array_equal(store[path.name].frames, store[str(path)].frames)
