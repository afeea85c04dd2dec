"""Search in stores: EmbeddingStore.search, duplicates, the index, and gura-jax search."""

import dataclasses
import hashlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import soundfile
from refusals import refuses
from toy import embedded, opened, write_clips
from typer.testing import CliRunner

from gura_jax import EmbeddingStore, Member, Model, System, cli, load_model, nearest
from gura_jax.dataset import search as module
from gura_jax.dataset.run import open_run
from gura_jax.dataset.search import StoredVectors, duplicates
from gura_jax.dataset.sources import read_inputs
from gura_jax.dataset.table import Settings
from gura_jax.dataset.workers import Worker, work
from gura_jax.errors import AudioError, GuraError, InputError, StoreError
from gura_jax.search import open_index, read_queries, results
from gura_jax.search.results import clock

SETTINGS = Settings(timestamps=True, shard_hours=3 / 3600, batch_seconds=2)
HOSTILE = "<img src=x onerror=alert(1)></script>\"'& clip"
needs_usearch = pytest.mark.skipif(importlib.util.find_spec("usearch") is None, reason="needs usearch")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24 clips in several shards; every fourth is the same recording."""
    folder = tmp_path_factory.mktemp("made")
    paths = write_clips(folder / "in", [0.4 + 0.05 * (i % 9) for i in range(24)])
    for path in paths[4::4]:
        shutil.copy(paths[0], path)
    rows = [{"id": p.stem, "path": f"in/{p.name}", "split": "ab"[i % 2]} for i, p in enumerate(paths)]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    embedded(folder / "m.jsonl", folder / "out", SETTINGS)
    return folder / "out"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 rows: every search here takes several, and reads parts of shards; with two open files at once."""
    monkeypatch.setattr(nearest, "BLOCK_BYTES", 8 * 3 * 4)
    monkeypatch.setattr(module, "OPEN_SHARDS", 2)


def cosines(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    queries, rows = (a.astype(np.float64) for a in (queries, rows))
    queries, rows = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (queries, rows))
    return (queries @ rows.T).astype(np.float32)


def best(similarity: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :top]
    return order, np.take_along_axis(similarity, order, 1)


def parts(store: EmbeddingStore) -> list[EmbeddingStore]:
    """The whole, one without most of each shard, and one clip."""
    return [store, store.filter(pc.field("split") == "b"), store.filter(pc.field("id") == "clip-007")]


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_scenes(made: Path, tmp_path: Path, form: str) -> None:
    if form == "parquet":
        embedded(made.parent / "m.jsonl", tmp_path, dataclasses.replace(SETTINGS, format=form))
    whole = EmbeddingStore(made if form == "npy" else tmp_path)
    assert len(set(whole.meta["shard"].to_pylist())) > 3
    queries = np.concatenate([whole.scenes()[:2], np.random.default_rng(0).standard_normal((2, 3), np.float32)])
    for store in parts(whole):
        found = store.search(queries, top=9)
        rows, similarity = best(cosines(queries, store.scenes()), 9)
        np.testing.assert_array_equal(found.clips, rows)
        np.testing.assert_array_equal(found.similarity, similarity)
        assert found.ids == [[store.ids[row] for row in each] for each in rows.tolist()]
        assert found.times is None
    assert parts(whole)[-1].search(queries).ids == [["clip-007"]] * 4
    np.testing.assert_array_equal(whole.search(queries[0]).clips, whole.search(queries[:1], 10).clips)
    products = (queries.astype(np.float64) @ whole.scenes().astype(np.float64).T).astype(np.float32)
    np.testing.assert_array_equal(whole.search(queries, 5, metric="dot").clips, best(products, 5)[0])


def test_frames(made: Path) -> None:
    """The best frame of each clip, and its time; the first of equal ones."""
    whole = EmbeddingStore(made)
    queries = np.random.default_rng(0).standard_normal((3, 3))
    for store in parts(whole):
        found = store.search(queries, 5, of="frames")
        clips = list(store)
        for i, query in enumerate(queries):
            wanted = []
            for row, clip in enumerate(clips):
                assert clip.frames is not None
                assert clip.times is not None
                (similarity,) = cosines(query[None], clip.frames)
                frame = int(similarity.argmax())
                wanted.append((-similarity[frame], row, clip.times[frame]))
            wanted = sorted(wanted)[:5]
            assert found.clips[i].tolist() == [row for _, row, _ in wanted]
            np.testing.assert_array_equal(found.similarity[i], [-value for value, *_ in wanted])
            assert found.times is not None
            np.testing.assert_array_equal(found.times[i], [time for *_, time in wanted])


def test_stores_and_vectors_that_do_not_fit(made: Path, tmp_path: Path) -> None:
    store = EmbeddingStore(made)
    with refuses(InputError, "expected vectors of 3 numbers, [n, 3], found [1, 4]"):
        store.search(np.ones(4))
    with refuses(InputError, "queries[0]: expected a vector with a direction, found zero"):
        store.search(np.zeros((1, 3)))
    wrong: Any = "layers"
    with refuses(InputError, "of: 'layers' is not known"):
        store.search(np.ones(3), of=wrong)
    with refuses(StoreError, "expected clips to search in, found none"):
        store.filter(pc.field("id") == "nobody").search(np.ones(3))
    embedded(made.parent / "m.jsonl", tmp_path / "scenes", dataclasses.replace(SETTINGS, timestamps=False))
    with refuses(StoreError, "expected a store with timestamps, found scene embeddings alone"):
        EmbeddingStore(tmp_path / "scenes").search(np.ones(3), of="frames")


def changed(made: Path, folder: Path, change: Callable[[np.ndarray], np.ndarray], kind: str = "scene") -> Any:
    """A copy of the store with another array in its second shard, of the same size."""
    shutil.copytree(made, folder)
    path = folder / f"{kind}-00001.npy"
    np.save(path, change(np.load(path)))
    return EmbeddingStore(folder)


def test_embeddings_that_are_wrong(made: Path, tmp_path: Path) -> None:
    def with_nan(array: np.ndarray) -> np.ndarray:
        array[1, 1] = np.nan
        return array

    store = changed(made, tmp_path / "nan", with_nan)
    name = next(clip.meta["id"] for clip in store if np.isnan(clip.scene).any())
    for call in (lambda: store.search(np.ones(3)), lambda: duplicates(store, 0.9, limit=9)):
        with refuses(StoreError, f"clip {name!r}: expected an embedding of finite numbers"):
            call()
    assert name not in store.filter(pc.field("id") != name).search(np.ones(3), 99).ids[0]
    store = changed(made, tmp_path / "nan-frames", with_nan, "frames")
    with refuses(StoreError, "expected an embedding of finite numbers"):
        store.search(np.ones(3), of="frames")
    store = changed(made, tmp_path / "shape", lambda array: array.reshape(1, -1))
    with refuses(StoreError, "shard 1: expected scenes of 3 numbers, as its metadata say"):
        store.search(np.ones(3))
    zeros = changed(made, tmp_path / "zeros", np.zeros_like)
    found = zeros.search(np.ones(3), 99)
    silent = [not clip.scene.any() for clip in zeros]
    assert any(silent)
    assert (found.similarity[0][np.isin(found.clips[0], np.flatnonzero(silent))] == 0).all()


def test_duplicates(made: Path) -> None:
    store = EmbeddingStore(made)
    found = duplicates(store, 1.0, limit=100)
    same = {f"clip-{i:03d}" for i in range(0, 24, 4)}
    assert {name for pair in found.ids for name in pair} == same
    assert (len(found.ids), found.complete) == (15, True)
    assert (found.similarity == 1).all()
    assert (found.clips[:, 0] < found.clips[:, 1]).all()
    similarity = cosines(store.scenes(), store.scenes())
    many = duplicates(store, 0.9, limit=1000)
    assert {*map(tuple, many.clips.tolist())} == {*map(tuple, np.argwhere(np.triu(similarity >= 0.9, 1)).tolist())}
    few = duplicates(store, 0.9, limit=4)
    assert (len(few.ids), few.complete) == (4, False)


def test_memory_is_bounded(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No read is larger than a block, and few files are open."""
    sizes: list[int] = []
    own = StoredVectors.take
    monkeypatch.setattr(StoredVectors, "take", lambda self, rows: sizes.append(len(rows)) or own(self, rows))
    store = EmbeddingStore(made)
    for of in ("scenes", "frames"):
        store.search(np.ones(3), of=of)
    assert max(sizes) == 8
    stored = StoredVectors(store)
    stored.read(0, len(stored))
    assert len(stored._open) == 2


# The index


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose shards hold 3000 made-up scenes of 3 numbers."""
    folder = tmp_path_factory.mktemp("large")
    paths = write_clips(folder / "in", [0.1] * 30)
    rows = [{"id": f"{i:04d}", "path": f"in/{paths[i % 30].name}", "offset": 0.0} for i in range(3000)]
    rows = [{**row, "duration": 0.05 + 1e-5 * i} for i, row in enumerate(rows)]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    embedded(folder / "m.jsonl", folder / "out", Settings(shard_hours=60 / 3600, batch_seconds=30))
    for i, path in enumerate(sorted((folder / "out").glob("scene-*.npy"))):
        np.save(path, np.random.default_rng(i).standard_normal(np.load(path).shape, np.float32))
    return folder / "out"


@needs_usearch
def test_an_index(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "BLOCK_BYTES", 32 << 20)
    store = EmbeddingStore(large)
    done: list[int] = []
    index = open_index(store, tmp_path / "index", report=done.append)
    assert (len(index), index.built, sum(done)) == (3000, 3000, 3000)
    assert index.recall.queries == 100
    assert index.recall.share > 0.95
    queries = np.random.default_rng(0).standard_normal((20, 3))
    exact, found = store.search(queries), index.search(queries)
    shared = [len({*a} & {*b}) for a, b in zip(exact.ids, found.ids, strict=True)]
    assert np.mean(shared) > 9
    for i in range(20):  # similarities are exact, best first
        np.testing.assert_array_equal(
            found.similarity[i], cosines(queries[i : i + 1], store.scenes()[found.clips[i]])[0]
        )
    np.testing.assert_array_equal(found.similarity, -np.sort(-found.similarity, axis=1))
    again = open_index(store, tmp_path / "index")
    assert (again.built, again.recall, len(again)) == (0, index.recall, 3000)
    assert again.search(queries).ids == found.ids
    assert again.search(queries[0]).ids == [found.ids[0]]
    assert len(again.search(queries[0], 4000).ids[0]) == 3000
    with refuses(InputError, "expected vectors of 3 numbers"):
        again.search(np.ones((1, 4)))
    with refuses(StoreError, "an index is of a whole store"):
        open_index(store.filter(pc.field("id") != "0000"), tmp_path / "index")


@needs_usearch
def test_an_index_of_frames(made: Path, tmp_path: Path) -> None:
    """One hit a clip, though a clip's frames are alike; as many as there are clips."""
    store = EmbeddingStore(made)
    index = open_index(store, tmp_path / "index", of="frames")
    assert len(index) == sum(store.meta["num_frames"].to_pylist())
    assert index.recall.share > 0.95
    queries = np.random.default_rng(0).standard_normal((5, 3))
    exact, found = store.search(queries, 5, of="frames"), index.search(queries, 5)
    assert found.times is not None
    assert np.mean(exact.similarity == found.similarity) > 0.9
    for i, query in enumerate(queries):
        for name, similarity, time in zip(found.ids[i], found.similarity[i], found.times[i], strict=True):
            clip = store[name]
            assert clip.frames is not None
            assert clip.times is not None
            frame = clip.frames[clip.times.tolist().index(time)]
            assert similarity == cosines(query[None], frame[None])
    assert sorted(index.search(queries[0], 99).ids[0]) == sorted(store.ids)
    with refuses(StoreError, "expected an index of the scenes of", "found one of frames"):
        open_index(store, tmp_path / "index")


@needs_usearch
def test_an_index_of_a_store_that_grows(made: Path, tmp_path: Path) -> None:
    run = opened(made.parent / "m.jsonl", tmp_path / "out", SETTINGS)
    list(run.embed_shards(run.shards[:2], lambda done: None))
    part = EmbeddingStore(tmp_path / "out")
    assert 0 < len(part) < 24
    assert open_index(part).built == len(part)
    embedded(made.parent / "m.jsonl", tmp_path / "out", SETTINGS)  # the index in its folder does not disturb it
    whole = EmbeddingStore(tmp_path / "out")
    index = open_index(whole)
    assert (index.built, len(index)) == (24 - len(part), 24)
    query = whole.scenes()[5]
    assert index.search(query, 24).ids == whole.search(query, 24).ids
    assert open_index(whole).built == 0


@needs_usearch
def test_an_index_of_another_store_or_damaged(made: Path, large: Path, tmp_path: Path) -> None:
    store, folder = EmbeddingStore(made), tmp_path / "index"
    open_index(store, folder)
    with refuses(
        StoreError, f"expected an index of the scenes of {large}, found one of another run", "remove that folder"
    ):
        open_index(EmbeddingStore(large), folder)
    record, graph = (folder / "index.json").read_bytes(), (folder / "graph.usearch").read_bytes()
    for content in (graph[:-9], graph + b"x", bytes([graph[0] ^ 1]) + graph[1:], b""):
        (folder / "graph.usearch").write_bytes(content)
        with refuses(StoreError, "graph.usearch as index.json describes it", "remove that folder"):
            open_index(store, folder)
    (folder / "graph.usearch").unlink()
    with refuses(StoreError, "graph.usearch: cannot be read"):
        open_index(store, folder)
    for text in ("{", "[]", "{}", '{"version": 2}', record.decode().replace('"version": 1', '"version": 7')):
        (folder / "index.json").write_text(text)
        with refuses(StoreError, "expected what this version writes", "remove that folder"):
            open_index(store, folder)
    # Its checksum may be right, and it is no index yet.
    nonsense = json.loads(record)

    (folder / "graph.usearch").write_bytes(b"x" * 500)
    nonsense["file"] = {"bytes": 500, "sha256": hashlib.sha256(b"x" * 500).hexdigest()}
    (folder / "index.json").write_text(json.dumps(nonsense))
    with refuses(StoreError, "graph.usearch cannot be read"):
        open_index(store, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "index.json").unlink()
    with refuses(StoreError, "expected an index, or a folder that is new, found other files"):
        open_index(store, folder)
    assert (folder / "notes.txt").read_text() == "mine"


@needs_usearch
def test_shards_that_were_computed_again_are_indexed_again(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "out")
    open_index(EmbeddingStore(tmp_path / "out"))
    path = tmp_path / "out" / "shard-00001.json"
    record = json.loads(path.read_text())
    record["files"]["scene-00001.npy"]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    assert open_index(EmbeddingStore(tmp_path / "out")).built == 24


def test_usearch_is_named_where_it_is_missing(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setitem(sys.modules, "usearch.index", None)
    monkeypatch.setitem(sys.modules, "usearch", None)
    with refuses(InputError, "expected usearch, found none", "pip install 'gura-jax[search]'"):
        open_index(EmbeddingStore(made))


# The command


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of ten tones by a small CREPE of random weights, with frames."""
    home = tmp_path_factory.mktemp("tones")
    (home / "audio").mkdir()
    lines = []
    for i in range(10):
        t = np.arange(16_000) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * 150 * 1.25**i * t) * (t > 0.5 * (i == 3))  # the fourth begins late
        soundfile.write(home / "audio" / f"{i}.wav", tone, 16_000)
        lines.append(json.dumps({"id": HOSTILE if i == 0 else f"tone {i}", "path": f"audio/{i}.wav", "note": i}))
    (home / "m.jsonl").write_text("\n".join(lines))
    model = load_model(System("small", (Member("crepe-tiny"),)), weights="random")
    run = open_run(model, read_inputs([home / "m.jsonl"]), home / "out", Settings(timestamps=True))
    assert not work(run, Worker(0, 1, "a test")).failed
    return home


def searched(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, ["search", *map(str, arguments)])
    if code:
        assert isinstance(result.exception, (GuraError, SystemExit)), result.output
        return result
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_a_recording_finds_itself(tones: Path, tmp_path: Path) -> None:
    """At another rate, too: it is embedded by the store's own system."""
    t = np.arange(44_100) / 44_100
    soundfile.write(tmp_path / "query.flac", 0.3 * np.sin(2 * np.pi * 150 * 1.25**6 * t), 44_100)
    queries = [tones / "audio" / "2.wav", tmp_path / "query.flac", "id:tone 4"]
    result = searched(tones / "out", *queries, "--top", 3)
    lines = result.stdout.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == list(map(str, queries))
    first = [line.split(maxsplit=2) for line in lines if line.startswith("  1")]
    assert [name for _, _, name in first] == ["tone 2", "tone 6", "tone 4"]
    assert [float(similarity) for _, similarity, _ in first] == pytest.approx([1, 1, 1], abs=1e-3)
    assert "3 queries, 10 clips, exact search" in result.stderr

    content = json.loads(searched(tones / "out", *queries, "--json").stdout)
    assert {name: content[name] for name in ("of", "metric", "clips", "missing_shards", "system")} == {
        "of": "scenes",
        "metric": "cosine",
        "clips": 10,
        "missing_shards": 0,
        "system": "small",
    }
    assert [len(each["matches"]) for each in content["queries"]] == [10, 10, 10]
    assert content["queries"][0]["matches"][0]["path"].endswith("2.wav")


def test_where_in_a_clip(tones: Path, tmp_path: Path) -> None:
    """A query of the tone alone is found in the second half of the clip in which it begins late."""
    t = np.arange(8000) / 16_000
    soundfile.write(tmp_path / "query.wav", 0.3 * np.sin(2 * np.pi * 150 * 1.25**3 * t), 16_000)
    content = json.loads(searched(tones / "out", tmp_path / "query.wav", "--frames", "--json").stdout)
    (match,) = [match for match in content["queries"][0]["matches"] if match["id"] == "tone 3"]
    assert 450 <= match["time_ms"] <= 1000
    assert re.search(r"tone 3\s+0:00\.\d\d", searched(tones / "out", tmp_path / "query.wav", "--frames").stdout)


def test_vectors_from_files(tones: Path, tmp_path: Path) -> None:
    store = EmbeddingStore(tones / "out")
    np.save(tmp_path / "one.npy", store["tone 5"].scene)
    np.save(tmp_path / "two.npy", np.stack([store["tone 7"].scene, store["tone 8"].scene]))
    content = json.loads(searched(tones / "out", tmp_path / "one.npy", tmp_path / "two.npy", "--json").stdout)
    firsts = [each["matches"][0] for each in content["queries"]]
    assert [match["id"] for match in firsts] == ["tone 5", "tone 7", "tone 8"]
    assert [match["similarity"] for match in firsts] == [1, 1, 1]
    assert [each["query"] for each in content["queries"]][1:] == [f"{tmp_path / 'two.npy'}[{i}]" for i in range(2)]
    np.save(tmp_path / "wrong.npy", np.ones(5))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "zero.npy", np.zeros(256))
    np.save(tmp_path / "complex.npy", np.ones(256, complex))
    (tmp_path / "text.npy").write_text("no array")
    with open(tmp_path / "archive.npy", "wb") as file:
        np.savez(file, store["tone 5"].scene)
    longer = (tmp_path / "wrong.npy").read_bytes().replace(b"(5,), }          ", b"(500000000000,), }")
    (tmp_path / "longer.npy").write_bytes(longer)  # than the file is, and than memory
    for name, message in (
        ("wrong", "expected vectors of 256 numbers, as the scenes of"),
        ("objects", "expected a .npy file of numbers, found a damaged one, or one of objects"),
        ("text", "expected a .npy file of numbers, found another file"),
        ("archive", "expected a .npy file of numbers, found another file"),
        ("longer", "expected a .npy file of numbers, found a damaged one"),
        ("complex", "expected a .npy file of real numbers, found complex128"),
        ("zero", "expected a vector with a direction, found zero"),
        ("none", "cannot be read: No such file"),
    ):
        with refuses(InputError, f"{name}.npy: {message}"):
            read_queries(store, [str(tmp_path / f"{name}.npy")])


def test_queries_that_fail_are_named_and_the_others_go_on(tones: Path, tmp_path: Path) -> None:
    scene = EmbeddingStore(tones / "out")["tone 7"].scene
    np.save(tmp_path / "two.npy", np.stack([np.zeros_like(scene), scene]))
    np.save(tmp_path / "zero.npy", np.zeros(256))
    (tmp_path / "text\x1b[31m.wav").write_text("no audio")
    soundfile.write(tmp_path / "short.wav", np.full(200, 0.1), 16_000)
    good = [str(tmp_path / "two.npy"), str(tones / "audio" / "2.wav"), "id:tone 4"]
    bad = [*(str(tmp_path / name) for name in ("zero.npy", "text\x1b[31m.wav", "short.wav", "none.wav")), "id:nobody"]
    mixed = [bad[0], good[0], *bad[1:3], good[1], *bad[3:], good[2]]
    page = tmp_path / "page.html"
    result = searched(tones / "out", *mixed, "--top", 1, "--out", page, code=3)
    assert result.exit_code == cli.EXIT_SOME_INPUTS_FAILED
    found = [line.split(maxsplit=2)[2] for line in result.stdout.splitlines() if line.startswith("  1")]
    assert found == ["tone 7", "tone 2", "tone 4"]
    assert page.read_text().count("<section>") == 3
    told = result.stderr[result.stderr.index("6 queries failed:") :].splitlines()[1:]
    names = [bad[0], f"{good[0]}[0]", *bad[1:]]
    assert len(told) == 6
    for line, name in zip(told, names, strict=True):
        assert line.startswith("  " + name.replace("\x1b", "\\x1b") + ": ")
    assert told[0].endswith("expected a vector with a direction, found zero")

    content = json.loads(searched(tones / "out", *mixed, "--json", code=3).stdout)
    assert [each["query"] for each in content["failed"]] == names
    assert [each["query"] for each in content["queries"]] == [f"{good[0]}[1]", *good[1:]]
    page.unlink()
    result = searched(tones / "out", *bad, "--out", page, code=1)
    assert result.exit_code == cli.EXIT_FAILED
    assert not page.exists()


def test_frames_that_a_store_does_not_have(made: Path, tmp_path: Path) -> None:
    embedded(made.parent / "m.jsonl", tmp_path / "scenes", dataclasses.replace(SETTINGS, timestamps=False))
    np.save(tmp_path / "one.npy", np.ones(3))
    for query in (tmp_path / "one.npy", "id:clip-000", made.parent / "in" / "clip-000.wav"):
        error = searched(tmp_path / "scenes", query, "--frames", code=1).exception
        assert str(error).endswith("expected a store with timestamps, found scene embeddings alone")


def test_what_is_wrong_is_found_before_the_search(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it searched")

    monkeypatch.setattr(module, "search", search)
    monkeypatch.setattr(module, "duplicates", search)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.html").mkdir()
    for arguments, message in (
        (["id:tone 1", "--out", tmp_path / "file" / "page.html"], "file: expected a folder that can be written to"),
        (["--duplicates", 0.9, "--out", tmp_path / "file" / "page.html"], "expected a folder that can be written to"),
        (["id:tone 1", "--out", tmp_path / "folder.html"], "--out: expected a page, found a folder"),
        (
            ["id:tone 1", "--index-folder", tmp_path / "index"],
            "--index-folder says where the index is: expected --index",
        ),
        (["--duplicates", 0.9, "--index-folder", tmp_path / "index"], "--index-folder says where the index is"),
    ):
        assert message in str(searched(tones / "out", *arguments, code=1).exception)


def test_control_characters_do_not_reach_the_terminal() -> None:
    hostile = "a\x1b[2J\nb\u202ec\u2028d\x9be\udc80"
    shown = r"a\x1b[2J\nb\u202ec\u2028d\x9be\udc80"
    hit = results.Hit({"id": hostile}, 0.5, 10.0)
    plain = results.Hit({"id": "caf\u00e9 \u97f3\u3000\u97f3"}, 0.25)
    assert list(results.table([results.Result(hostile, [hit, plain])])) == [
        shown,
        f"  1   0.5000  {shown}  0:00.01",
        f"  2   0.2500  {plain.meta['id']}",
    ]
    assert list(results.pair_table([results.Result(hostile, [hit])])) == [f" 0.5000  {shown}  {shown}"]


def test_a_page_of_matches(tones: Path, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "page.html"
    query = shutil.copy(tones / "audio" / "0.wav", tmp_path / "<b>query.wav")
    result = searched(tones / "out", query, "id:tone 1", "--top", 4, "--frames", "--out", page)
    assert "10 sounds play" in result.stderr
    text = page.read_text()
    assert text.count("<audio controls") == 10
    assert HOSTILE not in text
    assert "&lt;img src=x onerror=alert(1)&gt;&lt;/script&gt;&quot;&#x27;&amp; clip" in text
    assert "<b>query" not in text
    assert "<script" not in text
    assert " at 0:00." in text
    assert re.findall(r"""(?:src|href)=["'](?!data:)[^"']+""", text.replace("src=x", "")) == []
    moved = tmp_path / "moved"
    shutil.copytree(tones / "out", moved)
    record = searched(moved, "id:tone 1", "--top", 2, "--out", page)
    assert "3 sounds play" in record.stderr  # by their absolute paths
    for name in ("page.png", "s3://bucket/page.html"):
        assert "--out: expected a page on this machine" in str(
            searched(moved, "id:tone 1", "--out", name, code=1).exception
        )


def test_the_commands_duplicates(tones: Path, tmp_path: Path) -> None:
    result = searched(tones / "out", "--duplicates", 0.5, "--limit", 5, "--out", tmp_path / "page.html")
    assert len(result.stdout.splitlines()) == 5
    assert "5 pairs of 10 clips with a similarity of at least 0.5; there are more: pass --limit" in result.stderr
    assert (tmp_path / "page.html").read_text().count("<audio") == 10
    content = json.loads(searched(tones / "out", "--duplicates", 0.5, "--json").stdout)
    assert content["complete"]
    store = EmbeddingStore(tones / "out")
    similarity = cosines(store.scenes(), store.scenes())
    assert len(content["pairs"]) == (np.triu(similarity, 1) >= 0.5).sum()
    first = content["pairs"][0]
    assert first["similarity"] == np.triu(similarity, 1).max()
    assert set(first["ids"]) < set(store.ids)


@needs_usearch
def test_the_commands_index(tones: Path, tmp_path: Path) -> None:
    result = searched(tones / "out", "--index", "--index-folder", tmp_path / "index")
    assert "index: 10 scenes added, recall@10 1.0000 against exact search (10 clips as queries)" in result.stderr
    arguments = (tones / "out", "id:tone 3", "--index", "--index-folder", tmp_path / "index", "--json")
    content = json.loads(searched(*arguments).stdout)
    assert content["index"]["recall"]["share"] == 1
    assert content["queries"] == json.loads(searched(tones / "out", "id:tone 3", "--json").stdout)["queries"]


def test_queries_that_are_wrong(tones: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EmbeddingStore(tones / "out")
    with refuses(InputError, "id:nobody: expected the id of a clip"):
        read_queries(store, ["id:nobody"])
    soundfile.write(tmp_path / "short.wav", np.full(200, 0.1), 16_000)
    with refuses(AudioError, "short.wav: expected at least 400 samples at 16 kHz (25 ms), found 200"):
        read_queries(store, [str(tmp_path / "short.wav")])
    with monkeypatch.context() as patch:
        patch.setattr(Model, "shortest", lambda self, **of: 17_600)
        with refuses(AudioError, "0.wav: expected at least 1100 ms for small, found 1000 ms"):
            read_queries(store, [str(tones / "audio" / "0.wav")])
    with refuses(AudioError, "no such file"):
        read_queries(store, [str(tmp_path / "none.wav")])
    (tmp_path / "text.wav").write_text("no audio")
    with refuses(AudioError, "text.wav"):
        read_queries(store, [str(tmp_path / "text.wav")])
    with refuses(StoreError, "has a member that is a Python object"):
        read_queries(EmbeddingStore(made), [str(tones / "audio" / "0.wav")])
    for arguments, message in (
        ([], "expected queries, --index to build an index, or --duplicates"),
        (["id:tone 1", "--duplicates", "0.9"], "--duplicates compares all scenes"),
        (["--duplicates", "1.5"], "threshold: expected a cosine similarity"),
    ):
        assert message in str(searched(tones / "out", *arguments, code=1).exception)


def test_a_system_with_other_weights_is_refused(tones: Path, tmp_path: Path) -> None:
    shutil.copytree(tones / "out", tmp_path / "out")
    path = tmp_path / "out" / "run.json"
    run = json.loads(path.read_text())
    query = [str(tones / "audio" / "0.wav")]
    run["system"]["members"][0]["weights"] = {"source": "elsewhere", "fingerprint": "f" * 64}
    path.write_text(json.dumps(run))
    with refuses(StoreError, "expected the system and weights that the store was made with", "fingerprint: ffff"):
        read_queries(EmbeddingStore(tmp_path / "out"), query, weights="random")
    run["system"]["members"][0]["weights"] = {"source": "random", "seed": 7}
    path.write_text(json.dumps(run))
    seventh = read_queries(EmbeddingStore(tmp_path / "out"), query)[0].vector
    assert not np.allclose(seventh, read_queries(EmbeddingStore(tones / "out"), query)[0].vector, rtol=1e-3)
    run["system"]["members"][0]["layers"] = "mean"
    path.write_text(json.dumps(run))
    with pytest.raises(GuraError):
        read_queries(EmbeddingStore(tmp_path / "out"), query)
    del run["system"]["members"]
    path.write_text(json.dumps(run))
    with refuses(StoreError, "expected a run.json that describes the system"):
        read_queries(EmbeddingStore(tmp_path / "out"), query)


def test_a_store_that_is_being_written(made: Path, tmp_path: Path) -> None:
    run = opened(made.parent / "m.jsonl", tmp_path / "out", SETTINGS)
    list(run.embed_shards(run.shards[:2], lambda done: None))
    total = len(run.shards)
    result = searched(tmp_path / "out", "--duplicates", 1)
    assert f"note: {total - 2} of {total} shards are not finished, and not searched" in result.stderr


def test_clock() -> None:
    assert [clock(value) for value in (0, 12.5, 59_996, 62_350, 3_600_000)] == [
        "0:00.00",
        "0:00.01",
        "1:00.00",
        "1:02.35",
        "60:00.00",
    ]
