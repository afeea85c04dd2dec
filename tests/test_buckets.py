"""Objects, inputs and stores in a bucket: read by ranges, written whole, resumed, with faults on the way."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import soundfile
from pyarrow import parquet
from refusals import refuses
from s3_server import environment, files_served, proxied, serving, stored
from toy import contents, embedded, opened, write_clips

from gura_jax import EmbeddingStore, nearest, objects
from gura_jax.audio import load_segments
from gura_jax.dataset import commit
from gura_jax.dataset.export import export
from gura_jax.dataset.places import Bucket, find_place
from gura_jax.dataset.sinks import Shard
from gura_jax.dataset.sources import decoded, open_clip, read_inputs
from gura_jax.dataset.table import Settings
from gura_jax.errors import InputError, StoreError
from gura_jax.search import open_index

BUCKET, OUT = "s3://clips", "s3://clips/out"
SETTINGS = Settings(timestamps=True, shard_hours=4 / 3600, batch_seconds=2)
SECONDS = (0.3, 1.2, 0.7, 2.0, 0.5, 1.7)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving("clips") as address:
        yield address


def use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name, value in environment(address).items():
        monkeypatch.setenv(name, value)
    objects._client.cache_clear()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket."""
    use(monkeypatch, server)
    for entry in list(objects.entries(objects.locate(BUCKET))):
        objects.delete(objects.locate(f"{BUCKET}/{entry.key}"))
    return BUCKET


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few repetitions of what fails."""
    config = {
        "max_retries": 3,
        "retry_timeout": timedelta(seconds=20),
        "backoff": {"init_backoff": timedelta(milliseconds=1)},
    }
    monkeypatch.setattr(objects, "RETRIES", config)


def put(name: str, content: bytes) -> None:
    objects.put(objects.locate(f"{BUCKET}/{name}"), content)


def wav(seconds: float, seed: int = 0, form: str = "WAV") -> bytes:
    out = io.BytesIO()
    noise = 0.1 * np.random.default_rng(seed).standard_normal(round(16_000 * seconds))
    soundfile.write(out, noise, 16_000, format=form)
    return out.getvalue()


def upload(folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        put(f"{prefix}/{path.name}", path.read_bytes())


# Objects


def test_an_object_is_a_file(bucket: str) -> None:
    """Whatever is read, in whatever order, of an object of many blocks; and of an empty one."""
    content = np.random.default_rng(0).bytes(5_000_000)
    put("a.bin", content)
    file, plain = objects.open_object(f"{bucket}/a.bin"), io.BytesIO(content)
    rng = np.random.default_rng(1)
    for size in [10, 100_000, 3_000_000, 1, *rng.integers(0, 200_000, 20).tolist()]:
        assert file.read(size) == plain.read(size)
        place = int(rng.integers(0, len(content)))
        assert file.seek(place) == plain.seek(place)
    assert file.seek(-7, io.SEEK_END) == plain.seek(-7, io.SEEK_END)
    assert (file.read(), file.read()) == (plain.read(), b"")
    assert file.range(5, 9) == content[5:9]
    put("empty", b"")
    assert objects.open_object(f"{bucket}/empty").read() == b""
    with pytest.raises(FileNotFoundError):
        objects.open_object(f"{bucket}/none")


def test_few_requests_for_a_part_of_a_long_clip(bucket: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 s of ten minutes: not the whole, and in blocks; of a short clip two requests."""
    content = wav(600)
    put("long.wav", content)
    put("short.wav", wav(4.0))
    sizes: list[int] = []
    own = objects.ObjectFile.range
    monkeypatch.setattr(
        objects.ObjectFile, "range", lambda self, start, stop: sizes.append(stop - start) or own(self, start, stop)
    )
    (clip,) = load_segments(f"{bucket}/long.wav", [(300.0, 10.0)], sample_rate=16_000, opener=open_clip)
    expected, _ = soundfile.read(io.BytesIO(content), start=4_800_000, frames=160_000, dtype="float32")
    np.testing.assert_array_equal(clip, expected)
    assert len(sizes) <= 4
    assert sum(sizes) < len(content) / 3
    sizes.clear()
    load_segments(f"{bucket}/short.wav", [(0.0, None)], sample_rate=16_000, opener=open_clip)
    assert len(sizes) == 1


def test_an_object_that_is_replaced_while_it_is_read(bucket: str) -> None:
    put("a.bin", bytes(200_000))
    file = objects.open_object(f"{bucket}/a.bin")
    file.read(10)
    put("a.bin", b"x" * 200_000)
    file.seek(150_000)
    with pytest.raises(OSError, match="replaced"):
        file.read(10)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://key:very-secret@clips/a.wav", "s3://.../a.wav: expected a URL without user"),
        ("https://host/a.wav?token=very-secret", "https://.../a.wav: expected a URL without user"),
        ("s3:///a.wav", "expected a bucket or a host after s3://"),
        ("s3://clips/a.wav?X-Amz-Signature=very-secret", "s3://.../a.wav: expected a URL without user"),
        ("s3://clips/a//b.wav", "expected a URL whose parts are names"),
        ("s3://clips//b.wav", "expected a URL whose parts are names"),
        ("s3://clips/a/../b.wav", "expected a URL whose parts are names"),
        ("s3://clips/a\nb.wav", "expected a URL whose parts are names"),
        ("http://host:99999/a.wav", "http://...: expected a URL, found one whose host or port is none"),
        ("s3://key:very-secret/more@clips/a.wav", "s3://...: expected a URL, found one whose host or port is none"),
        ("s3://key:/very-secret@clips/a.wav", "s3://...: expected a URL, found one whose host or port is none"),
        ("https://key:very-secret/more@host/a.wav", "https://...: expected a URL, found one whose host or port"),
        ("https://key:v@ery/very-secret@host/a.wav", "https://...host/a.wav: expected a URL without user"),
        ("https://host:very-secret/a.wav", "https://...: expected a URL, found one whose host or port is none"),
        ("s3:/key:very-secret@clips/a.wav", "s3:/...: expected a path or a URL, found one slash after s3"),
        ("s3:/clips/a.wav", "expected a path or a URL, found one slash after s3"),
        ("ftp://host/a.wav", "ftp://...: expected a path or a URL of s3, gs, az, https, http, hf"),
    ],
)
def test_urls_that_are_refused(url: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        read_inputs([url])
    assert words in str(refused.value)
    assert "very-secret" not in str(refused.value)


def test_places_of_stores_that_are_refused(bucket: str) -> None:
    with refuses(InputError, "https://...: expected a folder, or a URL of s3 or gs"):
        find_place("https://host/store")
    with refuses(InputError, "expected a URL whose parts are names"):
        find_place(f"{bucket}//store")
    with refuses(StoreError, "s3://nowhere/out: expected a bucket that can be written to", "no such object or bucket"):
        embedded([f"{bucket}/a.wav"], "s3://nowhere/out", SETTINGS)
    with refuses(StoreError, f"{bucket}/nothing: expected a folder of embeddings with a run.json, found none"):
        EmbeddingStore(f"{bucket}/nothing")


# Inputs


def test_prefixes_patterns_and_objects(bucket: str) -> None:
    for name in ("in/b.wav", "in/deep/a.flac", "in/.hidden.wav", "in/notes.txt", "in/deep/c.wav", "other/d.wav"):
        put(name, wav(0.1, form="FLAC" if name.endswith("flac") else "WAV"))
    table = read_inputs([f"{bucket}/in/"])
    assert table["id"].to_pylist() == ["b.wav", "deep/a.flac", "deep/c.wav"]
    assert table["path"].to_pylist()[1] == f"{bucket}/in/deep/a.flac"
    assert read_inputs([f"{bucket}/in/*/*.wav"])["id"].to_pylist() == ["deep/c.wav"]
    assert read_inputs([f"{bucket}/other/d.wav", f"{bucket}/in/b.wav"])["id"].to_pylist() == ["d.wav", "b.wav"]
    assert len(read_inputs([bucket])) == 4
    # As in a shell: "*" stays within a folder, and "**/" is any number of them.
    assert read_inputs([f"{bucket}/in/*.wav"])["id"].to_pylist() == ["b.wav"]
    assert read_inputs([f"{bucket}/in/**/*.wav"])["id"].to_pylist() == ["b.wav", "deep/c.wav"]
    assert read_inputs([f"{bucket}/in/deep/[ab].*"])["id"].to_pylist() == ["a.flac"]
    put("odd/br[0].wav", wav(0.1))
    assert read_inputs([f"{bucket}/odd/br[0].wav"])["id"].to_pylist() == ["br[0].wav"]
    with refuses(InputError, "expected audio files, found none"):
        read_inputs([f"{bucket}/nothing"])
    with refuses(InputError, "s3://nowhere: expected a bucket that can be listed", "no such object or bucket"):
        read_inputs(["s3://nowhere"])
    with refuses(InputError, "http://host/folder: expected an audio file or a manifest"):
        read_inputs(["http://host/folder"])


def test_manifests_in_and_into_a_bucket(bucket: str, tmp_path: Path) -> None:
    put("lists/all.csv", b"id,path,label\na,../in/a.wav,x\nb,s3://clips/in/b.wav,y\n")
    with refuses(InputError, f"{bucket}/lists/all.csv, row 1: expected a path below {bucket}/lists"):
        read_inputs([f"{bucket}/lists/all.csv"])
    put("lists/all.csv", b"id,path,label\na,in/a.wav,x\nb,s3://clips/in/b.wav,y\n")
    table = read_inputs([f"{bucket}/lists/all.csv"], root=bucket)
    assert table["path"].to_pylist() == [f"{bucket}/in/a.wav", f"{bucket}/in/b.wav"]
    assert table["label"].to_pylist() == ["x", "y"]
    (tmp_path / "own.jsonl").write_text(json.dumps({"id": "a", "path": f"{bucket}/in/a.wav"}) + "\n")
    assert read_inputs([tmp_path / "own.jsonl"])["path"].to_pylist() == [f"{bucket}/in/a.wav"]
    with refuses(InputError, f"{bucket}/none.csv: expected a manifest in CSV", "no such object"):
        read_inputs([f"{bucket}/none.csv"])


# Stores


def test_from_bucket_to_bucket_as_from_disk_to_disk(bucket: str, tmp_path: Path) -> None:
    """The same embeddings; resumed, read, filtered and exported alike; a clip that cannot be read is named."""
    folder = tmp_path / "in"
    write_clips(folder, SECONDS)
    (folder / "broken.wav").write_bytes(b"RIFF")
    upload(folder, "in")
    local = embedded(folder, tmp_path / "out", SETTINGS)
    remote = embedded([f"{bucket}/in"], f"{bucket}/out", SETTINGS)
    assert remote.done[::2] == local.done[::2] == (len(SECONDS), 1)
    assert [failure.path for failure in remote.failed] == [f"{bucket}/in/broken.wav"]
    here, there = contents(tmp_path / "out"), stored(OUT)
    assert here.keys() == there.keys()
    arrays = [name for name in here if name.endswith(".npy")]
    assert len(arrays) >= 4
    assert all(here[name] == there[name] for name in arrays)

    again = embedded([f"{bucket}/in"], f"{bucket}/out", SETTINGS)
    assert again.before == again.shards
    assert stored(OUT) == there

    store, own = EmbeddingStore(f"{bucket}/out"), EmbeddingStore(tmp_path / "out")
    assert store.ids == own.ids
    np.testing.assert_array_equal(store.scenes(), own.scenes())
    for clip, expected in zip(store, own, strict=True):
        np.testing.assert_array_equal(clip.scene, expected.scene)
        np.testing.assert_array_equal(clip.frames, expected.frames)
    name = store.ids[2]
    np.testing.assert_array_equal(store[name].frames, own[name].frames)
    part = store.filter(pc.field("id") == name)
    np.testing.assert_array_equal(part.scenes(), own.filter(pc.field("id") == name).scenes())


def test_parquet_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    """Embeddings of some clips, by ranges."""
    write_clips(tmp_path / "in", SECONDS)
    settings = dataclasses.replace(SETTINGS, format="parquet")
    embedded(tmp_path / "in", OUT, settings)
    embedded(tmp_path / "in", tmp_path / "out", settings)
    assert stored(OUT) == contents(tmp_path / "out")
    store, own = EmbeddingStore(OUT), EmbeddingStore(tmp_path / "out")
    np.testing.assert_array_equal(store.scenes(), own.scenes())
    np.testing.assert_array_equal(store[own.ids[3]].frames, own[own.ids[3]].frames)


def test_copies_from_and_to_a_bucket(
    bucket: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """The bytes of a run in that place and format; broken off and gone on with; damage is not copied."""
    write_clips(tmp_path / "in", SECONDS)
    (tmp_path / "in" / "broken.wav").write_bytes(b"RIFF")
    embedded(tmp_path / "in", tmp_path / "npy", SETTINGS)
    embedded(tmp_path / "in", tmp_path / "parquet", dataclasses.replace(SETTINGS, format="parquet"))
    copied: list[str] = []

    def fault(method: str, path: str, before: int) -> str:
        if method == "PUT" and "shard-" in path:
            copied.append(path)
        return "403" if method == "PUT" and len(copied) > 1 else ""

    with proxied(server, fault) as address:
        use(monkeypatch, address)
        with refuses(StoreError, f"{OUT}: expected a bucket that can be written to, found: access denied"):
            export(EmbeddingStore(tmp_path / "npy"), OUT, "parquet")
    use(monkeypatch, server)
    assert commit.shard_numbers(OUT) == [0]
    assert export(EmbeddingStore(tmp_path / "npy"), OUT, "parquet") == len(SECONDS)
    assert stored(OUT) == contents(tmp_path / "parquet")
    export(EmbeddingStore(OUT), f"{bucket}/again", "npy")
    assert stored(f"{bucket}/again") == contents(tmp_path / "npy")
    export(EmbeddingStore(f"{bucket}/again"), tmp_path / "back", "parquet")
    assert contents(tmp_path / "back") == contents(tmp_path / "parquet")

    frames = bytearray(stored(OUT)["frames-00001.parquet"])
    frames[1000] ^= 1
    put("out/frames-00001.parquet", bytes(frames))
    with refuses(StoreError, f"{OUT}/shard-00001.json: expected files with the checksums in it", "--verify"):
        export(EmbeddingStore(OUT), tmp_path / "damaged", "npy")


def test_damage_and_other_runs(bucket: str, tmp_path: Path) -> None:
    write_clips(tmp_path / "in", SECONDS)
    out = f"{bucket}/out"
    embedded(tmp_path / "in", out, SETTINGS)
    whole = stored(OUT)
    put("out/scene-00000.npy", whole["scene-00000.npy"][:-4])
    with refuses(StoreError, f"{out}/scene-00000.npy: expected a file as its shard describes it"):
        EmbeddingStore(out)
    assert embedded(tmp_path / "in", out, SETTINGS).before == 1
    assert stored(OUT) == whole
    aside = [entry.key for entry in objects.entries(objects.locate(f"{out}/{commit.ASIDE}"))]
    assert any(key.endswith("scene-00000.npy") for key in aside)

    flipped = bytearray(whole["scene-00000.npy"])
    flipped[-1] ^= 1
    put("out/scene-00000.npy", bytes(flipped))
    assert embedded(tmp_path / "in", out, SETTINGS).before == 2
    assert embedded(tmp_path / "in", out, SETTINGS, verify=True).before == 1
    assert stored(OUT) == whole

    with refuses(StoreError, f"{out}: expected the run that began here, found another", "shard_hours"):
        embedded(tmp_path / "in", out, Settings(timestamps=True, shard_hours=1.0, batch_seconds=2))
    put("out/mine.txt", b"mine")
    embedded(tmp_path / "in", out, Settings(batch_seconds=2), overwrite=True)
    found = stored(OUT)
    assert found["mine.txt"] == b"mine"
    assert not any(name.startswith("frames") for name in found)


def test_two_workers_with_one_shard(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal bytes one record stays; of different ones no record is left that describes others."""
    import pyarrow as pa

    def write(value: float) -> Any:
        meta = pa.table({"id": ["a"], "path": ["a"], "num_samples": [400]})
        scenes = np.full((1, 4), value, np.float32)
        return commit.write_shard(out, 0, run="r", shard=Shard(meta, scenes, None), failed=[])

    out = find_place(f"{bucket}/out")
    write(1.0)
    before = stored(OUT)
    write(1.0)
    assert stored(OUT) == before
    write(2.0)  # of devices of another kind: what is finished stays
    assert stored(OUT) == before
    original = Bucket.put
    theirs = ["scene-00000.npy"]

    def meets(self: Bucket, name: str, content: Any) -> str | None:
        """Another's objects are written after ours."""
        version = original(self, name, content)
        if name == "meta-00000.parquet":
            for each in theirs:
                original(self, each, before[each])
        return version

    monkeypatch.setattr(Bucket, "put", meets)
    out.remove("shard-00000.json")
    with refuses(StoreError, f"{bucket}/out/shard-00000.json: two processes wrote different embeddings at once"):
        write(3.0)
    assert commit.read_shard(out, 0) is None
    theirs.append("shard-00000.json")  # all of theirs is there
    write(3.0)
    assert stored(OUT) == before


def test_several_processes_at_once(bucket: str, tmp_path: Path) -> None:
    """They begin together, with the same shards: one run, whole."""
    write_clips(tmp_path / "in", SECONDS)
    errors: list[BaseException] = []

    def one() -> None:
        try:
            embedded(tmp_path / "in", f"{bucket}/out", SETTINGS)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    embedded(tmp_path / "in", tmp_path / "out", SETTINGS)
    assert stored(OUT) == contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("inputs", "form"),
    [
        ("in", "npy"),
        pytest.param("in", "parquet", marks=pytest.mark.slow),
        pytest.param("packed/a.tar", "npy", marks=pytest.mark.slow),
        pytest.param("packed/a.parquet", "parquet", marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_request(inputs: str, form: str, server: str, bucket: str, tmp_path: Path) -> None:
    """Resumed, the store has the same bytes, whichever request a process was killed before."""
    paths = write_clips(tmp_path / "in", SECONDS[:4])
    upload(tmp_path / "in", "in")
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "a.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    parquet.write_table(pa.table({"audio": rows}), tmp_path / "packed" / "a.parquet", row_group_size=2)
    upload(tmp_path / "packed", "packed")
    script = Path(__file__).with_name("killed_requests.py")
    run = subprocess.run(
        [sys.executable, str(script), f"{bucket}/{inputs}", f"{bucket}/runs", form],
        capture_output=True,
        text=True,
        env=os.environ | environment(server),
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    print(f"killed {run.stdout.split()[-1]} times, {inputs}, {form}")
    assert int(run.stdout.split()[-1]) > 20


# Faults


@pytest.mark.parametrize("kind", ["503", "429", "reset"])
def test_faults_that_pass(
    kind: str, bucket: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Every third request fails once: nothing is lost."""
    write_clips(tmp_path / "in", SECONDS[:4])
    upload(tmp_path / "in", "in")

    def fault(method: str, path: str, before: int) -> str:
        return kind if before % 3 == 2 and (kind != "reset" or method == "GET") else ""

    with proxied(server, fault) as address:
        use(monkeypatch, address)
        summary = embedded([f"{bucket}/in"], f"{bucket}/out", SETTINGS)
    assert (summary.done.clips, summary.failed) == (4, [])


def test_a_server_that_asks_for_a_pause(bucket: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses all requests until the pause is over, however many there are."""
    put("a.bin", b"content")
    refused: list[float] = []

    def fault(method: str, path: str, before: int) -> str:
        refused.append(time.monotonic())
        return "429" if refused[-1] - refused[0] < 2 else ""

    with proxied(server, fault) as address:
        use(monkeypatch, address)
        assert objects.read_object(f"{bucket}/a.bin") == b"content"
    assert 1 < len(refused) < 20


def test_a_clip_that_cannot_be_fetched(
    bucket: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """It is named, with the reason, and the others are embedded; tried again, it is."""
    paths = write_clips(tmp_path / "in", SECONDS[:3])
    upload(tmp_path / "in", "in")
    with proxied(server, lambda method, path, before: "503" if paths[1].name in path and method == "GET" else "") as at:
        use(monkeypatch, at)
        summary = embedded([f"{bucket}/in"], f"{bucket}/out", SETTINGS)
    assert [failure.id for failure in summary.failed] == [paths[1].name]
    assert "503" in summary.failed[0].reason
    use(monkeypatch, server)
    summary = embedded([f"{bucket}/in"], f"{bucket}/out", SETTINGS, retry_failed=True)
    assert summary.failed == []
    assert len(EmbeddingStore(f"{bucket}/out")) == 3


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("s3://clips/a.wav?X-Amz-Signature=very-secret", "expected a URL without user, password, query"),
        ("s3://clips/a.wav&X-Amz-Signature=very-secret", "expected a URL without user, password, query"),
        ("s3://key:very-secret@clips/a.wav", "expected a URL without user, password, query"),
        ("s3://clips/a//b.wav", "expected a URL whose parts are names"),
        ("s3://clips/./b.wav", "expected a URL whose parts are names"),
        ("s3://clips/a/..", "expected a URL whose parts are names"),
    ],
)
def test_urls_of_a_manifest_that_are_refused(tmp_path: Path, row: str, words: str) -> None:
    """As those of inputs, among others that need no look at each."""
    path = tmp_path / "m.csv"
    path.write_text(f"id,path\na,s3://clips/a.wav\nb,{row}\n")
    with refuses(InputError, f"{path}, row 2: ", words) as message:
        read_inputs([path])
    assert "very-secret" not in str(message.value)


@pytest.mark.parametrize("row", ["s3://clips/a b/c[0]\\d.wav", "s3://clips/ä?x.wav", "gs://b/..a/b..wav", "az://b/x/"])
def test_urls_of_a_manifest_that_are_kept(tmp_path: Path, row: str) -> None:
    (tmp_path / "m.csv").write_text(f"id,path\na,{row}\n")
    (found,) = read_inputs([tmp_path / "m.csv"])["path"].to_pylist()
    assert decoded(found) == objects.check_url(row)


def test_a_record_that_cannot_be_read(
    bucket: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """It is not taken for one that is not there: nothing is computed again, no failure is forgotten."""
    write_clips(tmp_path / "in", SECONDS[:2])
    (tmp_path / "in" / "broken.wav").write_text("not audio")
    embedded(tmp_path / "in", OUT, SETTINGS)
    before = stored(OUT)
    denied = proxied(server, lambda method, path, before: "403" if "shard-" in path and method == "GET" else "")
    with denied as address:
        use(monkeypatch, address)
        with refuses(StoreError, "shard-00000.json: cannot be read: access denied: check the credentials"):
            embedded(tmp_path / "in", OUT, SETTINGS)
        with refuses(StoreError, "shard-00000.json: cannot be read: access denied: check the credentials"):
            EmbeddingStore(OUT)
    use(monkeypatch, server)
    assert stored(OUT) == before


def test_reasons_have_no_numbers() -> None:
    """However often an error was raised from another."""
    failed = objects._as_os_error(OSError(5, "no answer", "a.wav"), "a.wav")
    assert failed.strerror == "no answer"
    assert objects.why(OSError("[Errno 5] [Errno 5] no answer")) == "no answer"


def test_a_key_with_an_empty_part(bucket: str, server: str) -> None:
    """No client of ours writes one, but others do: it is named, and where it was found."""
    import boto3

    access = environment(server)
    client = boto3.client(
        "s3",
        endpoint_url=server,
        region_name="us-east-1",
        aws_access_key_id=access["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=access["AWS_SECRET_ACCESS_KEY"],
    )
    client.put_object(Bucket="clips", Key="in/x//b.wav", Body=b"x")
    try:
        with refuses(InputError, f"{bucket}/in: expected a bucket that can be listed", "'in/x//b.wav'", "rename it"):
            read_inputs([f"{bucket}/in"])
    finally:
        client.delete_object(Bucket="clips", Key="in/x//b.wav")


def test_credentials_of_an_endpoint_are_not_repeated(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    use(monkeypatch, "http://user:very-secret@127.0.0.1:1")
    with pytest.raises(OSError, match="no connection to its server") as failed:
        objects.read_object(f"{BUCKET}/a.wav")
    assert "very-secret" not in str(failed.value)
    use(monkeypatch, "127.0.0.1:1")
    with refuses(InputError, "AWS_ENDPOINT_URL: expected http:// or https:// and a host"):
        objects.read_object(f"{BUCKET}/a.wav")


def test_writes_that_stop_in_the_middle(
    bucket: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """As where credentials expire: the run ends in words, what was finished is safe, and it goes on."""
    write_clips(tmp_path / "in", SECONDS)
    writes: list[str] = []

    def fault(method: str, path: str, before: int) -> str:
        if method == "PUT" and "shard-" in path:
            writes.append(path)
        return "403" if method == "PUT" and writes else ""

    def refused(method: str, path: str, before: int) -> str:
        return "403" if method == "PUT" else ""

    with proxied(server, refused) as address:
        use(monkeypatch, address)
        with refuses(StoreError, f"{bucket}/out: expected a bucket that can be written to, found: access denied"):
            embedded(tmp_path / "in", f"{bucket}/out", SETTINGS)
    use(monkeypatch, server)
    assert stored(OUT) == {}
    with proxied(server, fault) as address:
        use(monkeypatch, address)
        with refuses(StoreError, "expected a bucket that can be written to, found: access denied") as message:
            embedded(tmp_path / "in", f"{bucket}/out", SETTINGS)
    assert "very-secret" not in str(message.value)
    use(monkeypatch, server)
    assert embedded(tmp_path / "in", f"{bucket}/out", SETTINGS).left == 0
    embedded(tmp_path / "in", tmp_path / "out", SETTINGS)
    assert stored(OUT) == contents(tmp_path / "out")


def test_objects_that_are_replaced_after_the_plan(bucket: str, tmp_path: Path) -> None:
    """They are named as failed, by themselves and within an archive; tried again, they are taken as they are now."""
    paths = write_clips(tmp_path / "in", SECONDS[:3])
    upload(tmp_path / "in", "in")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in paths:
            tar.add(path, f"a/{path.name}")
    archive = (tmp_path / "a.tar").read_bytes()
    put("tars/a.tar", archive)
    inputs = [f"{bucket}/in", f"{bucket}/tars/*.tar"]
    opened(inputs, OUT, SETTINGS)
    put(f"in/{paths[1].name}", wav(1.2, seed=9))  # as long as it was
    put("tars/a.tar", archive.replace(b"RIFF", b"RIFX", 1))
    summary = embedded(inputs, OUT, SETTINGS)
    assert {failure.id for failure in summary.failed} == {paths[1].name, *(f"a/{path.name}" for path in paths)}
    assert all("it was replaced meanwhile" in failure.reason for failure in summary.failed)
    put("tars/a.tar", archive)
    assert embedded(inputs, OUT, SETTINGS, retry_failed=True).failed == []


def test_a_tar_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    """Its clips by ranges, of which none is outside the clip but for what is read ahead."""
    paths = write_clips(tmp_path / "clips", SECONDS)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    put("tars/a.tar", (tmp_path / "a.tar").read_bytes())
    embedded([f"{bucket}/tars/*.tar"], OUT, SETTINGS)
    embedded(tmp_path / "clips", tmp_path / "out", SETTINGS)
    store, own = EmbeddingStore(OUT), EmbeddingStore(tmp_path / "out")
    assert sorted(store.ids) == sorted(own.ids)
    for name in own.ids:
        np.testing.assert_array_equal(store[name].scene, own[name].scene)


# A web server


@pytest.mark.parametrize("ranges", [True, False])
def test_files_of_a_web_server(tmp_path: Path, ranges: bool) -> None:
    """Clips, a manifest and an archive by http://; also where the server answers with the whole file."""
    paths = write_clips(tmp_path / "web" / "clips", SECONDS)
    (tmp_path / "web" / "all.csv").write_text("id,path\n" + "".join(f"{p.name},clips/{p.name}\n" for p in paths))
    with tarfile.open(tmp_path / "web" / "a.tar", "w") as tar:
        for path in paths:
            tar.add(path, f"tar/{path.name}")
    with files_served(tmp_path / "web", ranges) as address:
        if not ranges:
            with refuses(InputError, f"{address}/a.tar: expected a tar archive, found one that cannot be read"):
                read_inputs([f"{address}/a.tar"])
            return
        inputs = [f"{address}/all.csv", f"{address}/a.tar", f"{address}/clips/{paths[0].name}"]
        assert embedded(inputs, tmp_path / "out", SETTINGS).failed == []
    embedded(tmp_path / "web" / "clips", tmp_path / "plain", SETTINGS)
    found, plain = EmbeddingStore(tmp_path / "out"), EmbeddingStore(tmp_path / "plain")
    assert len(found) == 12
    for path in paths:
        for name in (path.name, f"tar/{path.name}"):
            np.testing.assert_array_equal(found[name].scene, plain[path.name].scene)


def test_search_in_a_store_in_a_bucket(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder, by ranges of a few rows; its index is in the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nearest, "BLOCK_BYTES", 2 * 3 * 4)
    embedded(write_clips(tmp_path / "in", SECONDS), tmp_path / "out", SETTINGS)
    upload(tmp_path / "out", "out")
    here, there = EmbeddingStore(tmp_path / "out"), EmbeddingStore(OUT)
    queries = np.random.default_rng(0).standard_normal((2, 3))
    some = pc.field("duration") > 0.6
    for of in ("scenes", "frames"):
        for store, other in ((here, there), (here.filter(some), there.filter(some))):
            own, found = store.search(queries, 4, of=of), other.search(queries, 4, of=of)
            assert found.ids == own.ids
            np.testing.assert_array_equal(found.similarity, own.similarity)
            np.testing.assert_array_equal(found.times, own.times)
    if find_spec("usearch"):
        index = open_index(there)
        assert index.folder.parent == tmp_path / "cache" / "gura_jax" / "index-scenes"
        assert index.search(queries, 4).ids == here.search(queries, 4).ids
    for entry in list(objects.entries(objects.locate(OUT))):
        if "scene" in entry.key:
            objects.delete(objects.locate(f"{BUCKET}/{entry.key}"))
    with refuses(StoreError, "scene-00000.npy"):
        there.search(queries)
