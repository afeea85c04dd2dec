"""Tar archives as inputs: clips as ranges of bytes, texts beside them, archives that are refused."""

import gzip
import io
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from pyarrow import parquet
from refusals import refuses
from toy import contents, embedded, opened, write_clips

from gura_jax import EmbeddingStore
from gura_jax.dataset.sources import decoded, gzips, open_clip, read_inputs
from gura_jax.dataset.table import Settings
from gura_jax.errors import AudioError, InputError

SECONDS = (0.3, 1.2, 0.7)


def pack(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def webdataset(folder: Path, name: str = "a.tar", form: int = tarfile.PAX_FORMAT) -> Path:
    files: list[tuple[str, bytes]] = []
    for i, path in enumerate(write_clips(folder / "clips", SECONDS)):
        long = "very/" * 30 + f"{i:03d}"  # longer than a plain header has room for
        files += [(f"{long}.wav", path.read_bytes()), (f"{long}.json", b'{"n": %d}' % i), (f"{long}.txt", b"words")]
    return pack(folder / name, files, form)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_clips_and_texts(tmp_path: Path, form: int) -> None:
    archive = webdataset(tmp_path, form=form)
    table = read_inputs([archive])
    assert [name.rsplit("/", 1)[1] for name in table["id"].to_pylist()] == ["000.wav", "001.wav", "002.wav"]
    assert table["json"].to_pylist() == ['{"n": 0}', '{"n": 1}', '{"n": 2}']
    assert table["txt"].to_pylist() == ["words"] * 3
    for path, plain in zip(table["path"].to_pylist(), sorted((tmp_path / "clips").iterdir()), strict=True):
        with open_clip(path) as file:
            assert file.read() == plain.read_bytes()
            assert file.seek(-4, io.SEEK_END) == plain.stat().st_size - 4
            assert (len(file.read(100)), file.read(1)) == (4, b"")


def test_embeddings_are_those_of_the_files(tmp_path: Path) -> None:
    """Several archives, by a pattern; and resumed to the same bytes."""
    paths = write_clips(tmp_path / "clips", SECONDS)
    pack(tmp_path / "s-0.tar", [("x/a.wav", paths[0].read_bytes()), ("x/b.wav", paths[1].read_bytes())])
    pack(tmp_path / "s-1.tar", [("c.wav", paths[2].read_bytes()), ("broken.wav", b"RIFF"), ("notes.txt", b"no clip")])
    settings = Settings(shard_hours=2 / 3600, batch_seconds=2)
    summary = embedded(str(tmp_path / "s-*.tar"), tmp_path / "out", settings)
    assert [failure.id for failure in summary.failed] == ["broken.wav"]
    embedded(tmp_path / "clips", tmp_path / "plain", settings)
    found, plain = EmbeddingStore(tmp_path / "out"), EmbeddingStore(tmp_path / "plain")
    for name, path in zip(("x/a.wav", "x/b.wav", "c.wav"), paths, strict=True):
        np.testing.assert_array_equal(found[name].scene, plain[path.name].scene)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "shard-00000.json").unlink()
    embedded(str(tmp_path / "s-*.tar"), tmp_path / "out", settings)
    assert contents(tmp_path / "out") == before


def test_a_flac_within(tmp_path: Path) -> None:
    out = io.BytesIO()
    noise = 0.1 * np.random.default_rng(0).standard_normal(16_000)
    soundfile.write(out, noise, 16_000, format="FLAC")
    archive = pack(tmp_path / "a.tar", [("b.c.flac", out.getvalue()), ("b.cls", b"3")])
    table = read_inputs([archive])
    assert (table["id"].to_pylist(), table["cls"].to_pylist()) == (["b.c.flac"], ["3"])
    (failure,) = embedded(archive, tmp_path / "out", Settings(batch_seconds=2)).failed or [None]
    assert failure is None


def test_archives_that_are_refused(tmp_path: Path) -> None:
    archive = webdataset(tmp_path)
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        third = tar.getmembers()[3]
    archive.write_bytes(whole[: third.offset_data + 100])
    with refuses(InputError, f"{archive}: expected a whole archive, found one that is cut within"):
        read_inputs([archive])
    archive.write_bytes(whole[: third.offset - 1024])  # between members, before the header of the long name
    with refuses(InputError, f"{archive}: expected a"):
        read_inputs([archive])
    twice = pack(tmp_path / "twice.tar", [("a.wav", b"x"), ("a.wav", b"y")])
    with refuses(InputError, f"{twice}: expected members that differ, found 'a.wav' twice"):
        read_inputs([twice])
    (tmp_path / "text.tar").write_text("no archive" * 100)
    with refuses(InputError, "text.tar: expected a tar archive, found one that cannot be read"):
        read_inputs([tmp_path / "text.tar"])
    with refuses(InputError, "a.tar.xz: expected a .tar or .tar.gz, found one compressed otherwise"):
        read_inputs([tmp_path / "a.tar.xz"])
    with refuses(InputError, "none.tar: expected a tar archive, found one that cannot be read: No such file"):
        read_inputs([tmp_path / "none.tar"])
    empty = pack(tmp_path / "empty.tar", [("notes.txt", b"x")])
    with refuses(InputError, "expected audio files, found none"):
        read_inputs([empty])
    with refuses(AudioError, "tar://x: expected tar://OFFSET+SIZE"):
        open_clip("tar://x")
    with refuses(AudioError, "expected an archive /none.tar, found none"):
        open_clip("tar://0+4//none.tar!a.wav")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in a process that has opened no compressed archive."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gzips._archives.clear()
    return tmp_path / "cache" / "gura_jax" / "gzip"


def test_a_compressed_archive(tmp_path: Path, cache: Path) -> None:
    """The same embeddings; also where the points that were found are not kept, as on another machine."""
    archive = webdataset(tmp_path)
    compressed = tmp_path / "a.tar.gz"
    compressed.write_bytes(gzip.compress(archive.read_bytes()))
    settings = Settings(batch_seconds=2)
    embedded(compressed, tmp_path / "out", settings)
    embedded(archive, tmp_path / "plain", settings)
    found, plain = EmbeddingStore(tmp_path / "out"), EmbeddingStore(tmp_path / "plain")
    assert found.meta["json"].to_pylist() == plain.meta["json"].to_pylist()
    np.testing.assert_array_equal(found.scenes(), plain.scenes())
    run = opened(compressed, tmp_path / "again", settings)
    shutil.rmtree(cache)
    gzips._archives.clear()
    list(run.embed_shards(run.shards))
    np.testing.assert_array_equal(EmbeddingStore(tmp_path / "again").scenes(), plain.scenes())


def test_points_are_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later process reads near the clip that it needs, not all before it; also several at once."""
    clips = [(f"{i:02d}.wav", np.random.default_rng(i).bytes(1_000_000)) for i in range(24)]
    compressed = tmp_path / "a.tar.gz"
    compressed.write_bytes(gzip.compress(pack(tmp_path / "a.tar", clips).read_bytes(), 1))
    paths = read_inputs([compressed])["path"].to_pylist()
    (kept,) = (path for path in cache.iterdir() if not path.name.startswith("."))
    assert kept.stat().st_size < 24_000_000 / 20
    gzips._archives.clear()
    sizes: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            sizes.append(super().readinto(buffer) or 0)
            return sizes[-1]

    monkeypatch.setattr(gzips, "open_container", lambda path, version: io.BufferedReader(Counted(path)))
    with open_clip(paths[22]) as file:
        assert file.read() == clips[22][1]
    assert sum(sizes) < 6_000_000
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda i: open_clip(paths[i]).read(), [3, 20, 7, 11, 2])
        assert [clips.index((f"{i:02d}.wav", content)) for i, content in zip([3, 20, 7, 11, 2], found, strict=True)]


def test_points_are_kept_where_the_content_is_known(cache: Path) -> None:
    """By a version, by the time of change, or by the name; else for this process alone."""
    url, commit = "https://host/a.tar.gz", "hf://datasets/owner/name@" + 40 * "0" + "/a.tar.gz"
    known = [("v1", None), ("v2", None), (None, "2026-01-01"), (None, "2026-01-02")]
    names = [gzips._index(url, SimpleNamespace(version=v, modified=m), 9) for v, m in known]
    names.append(gzips._index(commit, SimpleNamespace(version=None, modified=None), 9))
    assert None not in names
    assert len(set(names)) == 5
    assert gzips._index(url, SimpleNamespace(version=None, modified=None), 9) is None


def test_a_compressed_archive_that_cannot_be_read_for_a_while(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not damaged, and the reason is given."""
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(webdataset(tmp_path).read_bytes()))

    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(5, "no answer in time")

    with monkeypatch.context() as patched:
        patched.setattr(gzips, "open_container", lambda path, version: io.BufferedReader(Failing(path)))
        with refuses(InputError, f"{path}: expected a tar archive, found one that cannot be read: no answer in time"):
            read_inputs([path])
    assert len(read_inputs([path])) == len(SECONDS)


def test_compressed_archives_that_are_refused(tmp_path: Path, cache: Path) -> None:
    archive = webdataset(tmp_path).read_bytes()
    path = tmp_path / "b.tar.gz"
    path.write_bytes(gzip.compress(archive)[:-3000])
    with refuses(InputError, f"{path}: expected a tar archive, found one that cannot be read"):
        read_inputs([path])
    flipped = bytearray(gzip.compress(archive))
    flipped[-8] ^= 1  # of the checksum
    path.write_bytes(flipped)
    with refuses(InputError, f"{path}: expected a tar archive", "its compressed data are damaged or end too early"):
        read_inputs([path])
    path.write_bytes(b"")
    with refuses(InputError, f"{path}: expected a tar archive, found one that cannot be read"):
        read_inputs([path])
    path.write_bytes(archive)  # of another name
    with refuses(InputError, f"{path}: expected a tar archive, found one that cannot be read"):
        read_inputs([path])
    path.write_bytes(gzip.compress(pack(tmp_path / "bomb.tar", [("a.wav", bytes(50_000_000))]).read_bytes()))
    with refuses(InputError, f"{path}: expected audio, found 50000", "more than 200 times the compressed: a bomb?"):
        read_inputs([path])


def test_of_several_archives_the_others_go_on(tmp_path: Path) -> None:
    """One that cannot be read is named; names that repeat have the archive's before them."""
    noise = write_clips(tmp_path / "clips", [0.5])[0].read_bytes()
    for name in ("a", "b", "c"):
        pack(tmp_path / f"{name}.tar", [("x.wav", noise)])
    cut = tmp_path / "b.tar"
    cut.write_bytes(cut.read_bytes()[:1000])
    (failure,) = embedded(f"{tmp_path}/*.tar", tmp_path / "out", Settings(batch_seconds=2)).failed
    assert failure.id.endswith("b.tar")
    assert "found one that is cut within 'x.wav'" in failure.reason
    assert EmbeddingStore(tmp_path / "out").ids == ["a/x.wav", "c/x.wav"]


def test_a_folder_of_several_kinds(tmp_path: Path, cache: Path) -> None:
    """All are read; what cannot be is named."""
    noise = write_clips(tmp_path / "clips", [0.5])[0].read_bytes()
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.tar", "b.tar.gz", "deep/c.tgz", "d.TAR", "e.tar.xz"):
        packed = pack(folder / name, [("x.wav", noise)])
        if name.endswith("gz"):
            packed.write_bytes(gzip.compress(packed.read_bytes()))
    audio = pa.array([{"bytes": noise, "path": "t.wav"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    parquet.write_table(pa.table({"audio": audio}), folder / "t.parquet")
    (failure,) = embedded(folder, tmp_path / "out", Settings(batch_seconds=2)).failed
    assert failure.id.endswith("e.tar.xz")
    assert "found one compressed otherwise" in failure.reason
    assert set(EmbeddingStore(tmp_path / "out").ids) == {"a/x.wav", "b/x.wav", "c/x.wav", "d/x.wav", "t.wav"}


def test_archives_of_an_enemy(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    one = pack(tmp_path / "one.tar", [("a.wav", b"x")])
    path.write_bytes(one.read_bytes() + one.read_bytes())
    with refuses(InputError, f"{path}: expected one archive, found more after its end"):
        read_inputs([path])
    sparse = tarfile.TarInfo("hole.wav")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    path.write_bytes(sparse.tobuf(tarfile.GNU_FORMAT) + bytes(512) + bytes(1024))
    with refuses(InputError, f"{path}: expected files as they are, found 'hole.wav', packed as a sparse file"):
        read_inputs([path])
    folder, back = tarfile.TarInfo("folder"), tarfile.TarInfo("z")
    folder.type, back.type, back.size = tarfile.DIRTYPE, b"Z", -512
    path.write_bytes(folder.tobuf(tarfile.GNU_FORMAT) + back.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with refuses(InputError, f"{path}: expected a"):
        read_inputs([path])
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1
    path.write_bytes((long.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, bytes(1))) * 3000 + bytes(1024))
    with refuses(InputError, f"{path}: expected a tar archive, found one that cannot be read"):
        read_inputs([path])


def test_an_archive_whose_name_is_odd(tmp_path: Path) -> None:
    noise = write_clips(tmp_path / "clips", [0.5])[0].read_bytes()
    folder = tmp_path / "back\\slash"
    folder.mkdir()
    (path,) = read_inputs([pack(folder / "a.tar", [("x.wav", noise)])])["path"].to_pylist()
    assert open_clip(decoded(path)).read() == noise


def test_a_header_that_says_it_is_long(tmp_path: Path) -> None:
    """It is not read into memory, however long it says that it is."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    path = tmp_path / "a.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with refuses(InputError, f"{path}: expected a tar archive, found one that cannot be read"):
        read_inputs([path])


def test_a_cut_between_members(tmp_path: Path) -> None:
    """No error of the archive's own says so: the end is missing."""
    archive = pack(tmp_path / "a.tar", [("a.wav", bytes(512)), ("b.wav", bytes(512))])
    archive.write_bytes(archive.read_bytes()[: 2 * 512])
    with refuses(InputError, f"{archive}: expected a whole archive, found no end after 1 files: it was cut"):
        read_inputs([archive])
