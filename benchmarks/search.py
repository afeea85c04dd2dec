"""Search in a store of made-up scenes: exact and by the index, beside NumPy and usearch alone.

python benchmarks/search.py [--clips 1000000] [--size 1024] [--data latent|gaussian] [--rounds 5] [--folder DIR]
    [--skip-index]

The store is written once, as gura-jax embed would write it, in float32, and left in the folder. Data sets:

- latent: 64 latent numbers in 1000 clusters, spread over all features by a random map, and noise. Embeddings are like
  this: far fewer directions than features.
- gaussian: independent numbers, in which all clips are nearly equally far from each other: the worst case of any index.

Each contender answers the same queries; the exact ones are compared with NumPy in float64 first. NumPy's rows are in
memory, and their lengths are known before; the store's are mapped from its files. "peak" is resident memory, of which
what is mapped counts too, and can be taken back. usearch alone has all vectors in memory in float16, as the index does.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from run import machine
from worker import peak, reset_peak

from gura_jax import EmbeddingStore
from gura_jax.dataset.commit import write_shard
from gura_jax.dataset.sinks import Shard
from gura_jax.nearest import similarity
from gura_jax.search import open_index
from gura_jax.search.index import EXPANSION, SPARE, default_folder

SHARD, TOP, SEED = 50_000, 10, 0
LATENT, CLUSTERS, NOISE = 64, 1000, 0.1


def make_rows(data: str, size: int) -> Callable[[int, int], np.ndarray]:
    """A function that makes ``count`` rows from a seed."""
    shared = np.random.default_rng(SEED)
    spread = shared.standard_normal((LATENT, size), np.float32) / np.sqrt(LATENT)
    centres = 2 * shared.standard_normal((CLUSTERS, LATENT), np.float32)

    def rows(seed: int, count: int) -> np.ndarray:
        rng = np.random.default_rng((SEED, seed))
        if data == "gaussian":
            return rng.standard_normal((count, size), np.float32)
        latent = centres[rng.integers(0, CLUSTERS, count)] + rng.standard_normal((count, LATENT), np.float32)
        return latent @ spread + NOISE * rng.standard_normal((count, size), np.float32)

    return rows


def write_store(folder: Path, clips: int, size: int, rows: Callable[[int, int], np.ndarray]) -> None:
    import pyarrow as pa

    shards = -(-clips // SHARD)
    run = {
        "fingerprint": f"made-up {folder.name}",
        "system": {"name": "made-up", "members": []},
        "scene_embedding_size": size,
        "timestamp_embedding_size": None,
        "storage": "float32",
        "sample_rate": 16_000,
        "shards": shards,
    }
    folder.mkdir(parents=True)
    for shard in range(shards):
        count = min(SHARD, clips - shard * SHARD)
        ids = [f"{shard}/{i}" for i in range(count)]
        meta = pa.table({"id": ids, "path": ids, "offset": [0.0] * count, "duration": [1.0] * count})
        meta = meta.append_column("num_samples", pa.array([16_000] * count))
        write_shard(folder, shard, run=run["fingerprint"], shard=Shard(meta, rows(shard, count), None), failed=[])
    (folder / "run.json").write_text(json.dumps(run))


def numpy_float64(store: EmbeddingStore, queries: np.ndarray) -> np.ndarray:
    """The ten best rows of each query, by NumPy in float64, block by block."""
    units = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    found = np.empty((len(queries), len(store)), np.float32)
    start = 0
    for number in store.records:
        scenes = store.rows(number)
        for first in range(0, store.records[number].clips, 10_000):
            block = scenes[first : first + 10_000].astype(np.float64)
            block /= np.linalg.norm(block, axis=1, keepdims=True)
            found[:, start : start + len(block)] = units @ block.T
            start += len(block)
    return np.argsort(-found, axis=1, kind="stable")[:, :TOP]


class Timing(NamedTuple):
    queries: np.ndarray
    wanted: np.ndarray  # [Q, TOP]
    rounds: int

    def measure(self, name: str, search: Callable[[np.ndarray], np.ndarray], *, exact: bool = False) -> None:
        """Print the time of one query and of all, and the recall against the exact results."""
        reset_peak()
        found = search(self.queries)
        pairs = zip(found.tolist(), self.wanted.tolist(), strict=True)
        recall = np.mean([len({*own} & {*wanted}) / TOP for own, wanted in pairs])
        assert not exact or (found == self.wanted).all(), f"{name} differs from NumPy in float64"
        search(self.queries[:1])
        one, many = [], []
        for i in range(self.rounds):
            for queries, times in ((self.queries[i : i + 1], one), (self.queries, many)):
                start = time.perf_counter()
                search(queries)
                times.append(1000 * (time.perf_counter() - start) / len(queries))
        figures = f"{statistics.median(one):.3g} | {statistics.median(many):.3g} | {recall:.4f}"
        print(f"| {name} | {figures} | {peak() / 1e9:.2f} |", flush=True)


def bench_memory(store: EmbeddingStore, timing: Timing, with_index: bool) -> Iterator[tuple[str, float, int]]:
    """NumPy and usearch with all scenes in memory; yield what building took."""
    scenes = store.scenes()
    lengths = np.sqrt(np.einsum("nd,nd->n", scenes, scenes))

    def by_numpy(queries: np.ndarray) -> np.ndarray:
        found = (scenes @ queries.T).T / lengths  # of one query far faster than the other way round
        best = np.argpartition(-found, TOP, axis=1)[:, :TOP]
        return np.take_along_axis(best, np.argsort(-np.take_along_axis(found, best, 1), axis=1), 1)

    timing.measure("NumPy, float32, in memory", by_numpy)
    if not with_index:
        return
    from usearch.index import Index  # pyright: ignore[reportMissingImports]

    scenes /= lengths[:, None]
    reset_peak()
    start = time.perf_counter()
    index = Index(ndim=scenes.shape[1], metric="cos", dtype="f16")
    index.add(np.arange(len(scenes), dtype=np.uint64), scenes)
    yield "usearch alone", time.perf_counter() - start, peak()
    for expansion in (64, EXPANSION):
        index.expansion_search = expansion
        timing.measure(
            f"usearch alone, expansion {expansion}",
            lambda queries: index.search(queries, TOP).keys.reshape(len(queries), TOP).astype(np.int64),
        )


def bench_index(store: EmbeddingStore, timing: Timing) -> Iterator[tuple[str, float, int]]:
    """The index of a store; yield what building and opening took."""
    shutil.rmtree(default_folder(store), ignore_errors=True)
    reset_peak()
    start = time.perf_counter()
    index = open_index(store)
    yield f"index, with its recall measured ({index.recall.share:.4f})", time.perf_counter() - start, peak()
    del index
    reset_peak()
    start = time.perf_counter()
    index = open_index(store)
    yield "index, opened again", time.perf_counter() - start, peak()
    name = f"index (expansion {EXPANSION}, {SPARE} candidates a result)"
    timing.measure(name, lambda queries: index.search(queries, TOP).clips)
    found = index.search(timing.queries[:1], 1)
    exact = similarity(index.stored.take(found.clips[0]), timing.queries[0]).astype(np.float32)
    assert (found.similarity[0] == exact).all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--data", choices=["latent", "gaussian"], default="latent")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gura-jax-search")
    parser.add_argument("--skip-index", action="store_true")
    arguments = parser.parse_args()
    rows = make_rows(arguments.data, arguments.size)
    folder = arguments.folder / f"{arguments.data}-{arguments.clips}x{arguments.size}"
    here = machine()
    print(f"{here['date']}; {here['machine']}; {arguments.clips} x {arguments.size} float32, {arguments.data}\n")
    if not (folder / "run.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_store(folder, arguments.clips, arguments.size, rows)
    store = EmbeddingStore(folder)
    queries = rows(1 << 20, arguments.queries)
    timing = Timing(queries, numpy_float64(store, queries.astype(np.float64)), arguments.rounds)
    print(f"| search | one query, ms | {len(queries)} at once, ms each | recall@{TOP} | peak, GB |")
    print("|---|---|---|---|---|")
    timing.measure("exact", lambda queries: store.search(queries, TOP).clips, exact=True)
    builds = list(bench_memory(store, timing, not arguments.skip_index))
    if not arguments.skip_index:
        builds += bench_index(store, timing)
        print("\n| building | s | peak, GB |\n|---|---|---|")
        for name, seconds, most in builds:
            print(f"| {name} | {seconds:.1f} | {most / 1e9:.2f} |")


if __name__ == "__main__":
    main()
