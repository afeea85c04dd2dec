"""Large collections: plans, lists, stores that go on, formats, and a bucket beside a disk.

python benchmarks/scale.py [plan] [list] [resume] [formats] [bucket] [decode] [--rows 10000000] [--keys 1000000]
    [--shards 10000] [--clips 100000] [--folder DIR]

- plan: a Parquet manifest with durations, read and planned; nothing is opened.
- list: a prefix of a bucket, listed from a server here that answers with names alone.
- resume: a store of many shards, of which all are finished: what is left to do is found.
- formats: 3072 numbers a clip; sizes, writing, reading all, and a thousand clips at random; opened by other tools, if
  these are installed (duckdb, polars, datasets).
- bucket: the same clips from disk to disk and from bucket to bucket, in turns, on moto's server of S3, which is a
  process on the same machine and takes its time from the run.
- decode: rates of formats, and of two threads beside two processes.

Each in a process of its own, of which the peak memory is.
"""

import argparse
import contextlib
import http.server
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from run import machine
from worker import peak, reset_peak

HERE = Path(__file__).parent
SYSTEM = "crepe-tiny"


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    start, processor = time.perf_counter(), time.process_time()
    yield
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    print(f"| {name} | {seconds:.2f} | {processor:.2f} | {peak() / 1e9:.2f} |", flush=True)


def header() -> None:
    print("| | s | processor, s | peak so far, GB |\n|---|---|---|---|")


def plan(arguments: argparse.Namespace) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    from gura_jax.dataset import run as runs
    from gura_jax.dataset.identity import table_sha256
    from gura_jax.dataset.places import find_place
    from gura_jax.dataset.sources import read_inputs
    from gura_jax.dataset.table import Settings, plan_table, summarise
    from gura_jax.loading import outline
    from gura_jax.systems import find_system

    path = arguments.folder / "manifest.parquet"
    n, c = arguments.rows, pc
    rng = np.random.default_rng(0)
    schema = pa.schema([("id", pa.string()), ("path", pa.string()), ("duration", pa.float64())])
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, n, 1_000_000):
            text = pa.array(np.arange(start, min(n, start + 1_000_000))).cast(pa.string())
            files = c.binary_join_element_wise("s3://bucket/audio/", text, ".flac", "")  # pyright: ignore
            durations = np.round(rng.gamma(3, 4, len(text)) + 0.5, 2)
            writer.write_table(pa.table([text, files, pa.array(durations)], schema=schema))
    model, settings = outline(find_system(SYSTEM)), Settings()
    reset_peak()
    print(f"\n{n} rows with durations, a manifest of {path.stat().st_size / 1e6:.0f} MB\n")
    header()
    with timed("read and check"):
        clips = read_inputs([path], sample_rate=model.sample_rate)
    with timed("plan"):
        table = plan_table(model, clips, settings)
    with timed("hash both"):
        hashes = [table_sha256(each) for each in (clips, table)]
    assert len(set(hashes)) == 2
    with timed("write the plan"):
        runs._write_plan(find_place(arguments.folder), 0, table)
    print(f"\n{summarise(model, settings, table).shards} shards\n")


class _Names(http.server.BaseHTTPRequestHandler):
    """A bucket of so many names, in pages of a thousand."""

    total = 0
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        from urllib.parse import parse_qs, urlsplit

        query = parse_qs(urlsplit(self.path).query)
        start = int(query.get("continuation-token", ["0"])[0])
        stop = min(start + 1000, self.total)
        entries = "".join(
            f"<Contents><Key>clips/{i:09d}.flac</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{i:032x}&quot;</ETag><Size>{i}</Size></Contents>"
            for i in range(start, stop)
        )
        more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < self.total else ""
        body = (
            f"<ListBucketResult><Name>b</Name><IsTruncated>{str(stop < self.total).lower()}</IsTruncated>{more}"
            f"{entries}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def names(arguments: argparse.Namespace) -> None:
    import multiprocessing

    from gura_jax.dataset.sources import read_inputs

    _Names.total = arguments.keys
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Names)
    process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
    process.start()
    variables = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
    os.environ |= variables | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}"}
    print(f"\na prefix of {arguments.keys} objects\n")
    header()
    with timed("nothing yet"):
        read_inputs([__file__])
    with timed("list"):
        clips = read_inputs(["s3://b/clips"])
    print(f"\n{len(clips)} clips, {clips.nbytes / 1e6:.0f} MB as a table\n")
    process.terminate()


def resume(arguments: argparse.Namespace) -> None:
    import pyarrow as pa

    from gura_jax import EmbeddingStore
    from gura_jax.dataset import commit
    from gura_jax.dataset.run import open_run
    from gura_jax.dataset.sinks import Shard
    from gura_jax.dataset.sources import Inputs
    from gura_jax.dataset.table import Settings
    from gura_jax.loading import load_model

    out = arguments.folder / "store"
    shutil.rmtree(out, ignore_errors=True)
    rows = arguments.shards * 64
    manifest = arguments.folder / "m.csv"
    lines = (f"{i},s3://bucket/{i}.flac,3600" for i in range(rows))
    manifest.write_text("id,path,duration\n" + "\n".join(lines) + "\n")
    model, settings = load_model(SYSTEM, weights="random"), Settings(shard_hours=64)
    inputs = Inputs([manifest], sample_rate=model.sample_rate)
    run = open_run(model, inputs, out, settings)
    meta = pa.table({"id": ["x"], "num_samples": [1]})
    scenes = np.zeros((1, model.scene_embedding_size), np.float32)
    for number in run.shards:
        commit.write_shard(out, number, run=run.fingerprint, shard=Shard(meta, scenes, None), failed=[])
    reset_peak()
    print(f"\na store of {len(run.shards)} finished shards ({rows} clips)\n")
    header()
    with timed("open the run"):
        run = open_run(model, Inputs([manifest], sample_rate=model.sample_rate), out, settings)
    with timed("find what is left, by sizes"):
        left = run.pending()
    with timed("find what is left, reading all (--verify)"):
        run.pending(verify=True)
    with timed("EmbeddingStore"):
        EmbeddingStore(out)
    print(f"\n{len(left)} left\n")


def formats(arguments: argparse.Namespace) -> None:
    import pyarrow as pa

    from gura_jax import EmbeddingStore
    from gura_jax.dataset import commit
    from gura_jax.dataset.run import open_run
    from gura_jax.dataset.sinks import SINKS, Shard
    from gura_jax.dataset.table import SHARD_CLIPS, Settings
    from gura_jax.loading import load_model

    model, size, n = load_model(SYSTEM, weights="random"), 3072, arguments.clips
    clips = pa.table(
        {
            "id": [str(i) for i in range(n)],
            "path": [f"s3://bucket/{i}.flac" for i in range(n)],
            "offset": pa.array([0.0] * n),
            "duration": pa.array([1.0] * n),
        }
    )
    chosen = [str(i) for i in np.random.default_rng(0).integers(0, n, 1000)]
    rng = np.random.default_rng(1)
    block = rng.standard_normal((SHARD_CLIPS, size)).astype(np.float32)
    print(f"\n{n} x {size} float32, {n * size * 4 / 1e6:.0f} MB\n")
    header()
    for name, sink in SINKS.items():
        out = arguments.folder / name
        shutil.rmtree(out, ignore_errors=True)
        run = open_run(model, clips, out, Settings(shard_hours=1e6, format=name))
        described = json.loads((out / "run.json").read_text()) | {"scene_embedding_size": size}
        (out / "run.json").write_text(json.dumps(described))
        reset_peak()
        with timed(f"{name}: write"):
            for number in run.shards:
                table = run._shards[number].select(["id", "path", "offset", "duration"])
                meta = table.append_column("num_samples", pa.array([16_000] * len(table)))
                shard = Shard(meta, block[: len(table)], None)
                commit.write_shard(out, number, run=run.fingerprint, shard=shard, failed=[], sink=sink)
        with timed(f"{name}: open"):
            store = EmbeddingStore(out)
        with timed(f"{name}: read all"):
            store.scenes()
        store = EmbeddingStore(out)
        with timed(f"{name}: read 1000 clips, one by one"):
            for clip in chosen:
                _ = store[clip].scene.sum()
        total = sum(path.stat().st_size for path in out.iterdir())
        print(f"| {name}: {total / 1e6:.0f} MB | | | |")
    pattern = str(arguments.folder / "parquet" / "clips-*.parquet")
    for package, read in TOOLS.items():
        if importlib.util.find_spec(package):
            with timed(f"parquet opened by {package} {__import__(package).__version__}"):
                rows, width = read(pattern)
            assert (rows, width) == (n, size), (package, rows, width)
    print()


def _duckdb(pattern: str) -> tuple[int, int]:
    import duckdb  # pyright: ignore[reportMissingImports]

    found = duckdb.sql(f"select count(*), min(len(scene)), avg(scene[1]) from read_parquet('{pattern}')").fetchall()
    return found[0][0], found[0][1]


def _polars(pattern: str) -> tuple[int, int]:
    import polars  # pyright: ignore[reportMissingImports]

    table = polars.read_parquet(pattern)
    return table.height, len(table["scene"][0])


def _datasets(pattern: str) -> tuple[int, int]:
    import datasets

    cache = Path(pattern).parent.parent / "datasets"
    found: Any = datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(cache))
    return len(found), len(found[0]["scene"])


TOOLS: dict[str, Callable[[str], tuple[int, int]]] = {"duckdb": _duckdb, "polars": _polars, "datasets": _datasets}


def bucket(arguments: argparse.Namespace) -> None:
    sys.path.insert(0, str(HERE.parent / "tests"))
    import collection
    from s3_server import environment, serving, stored  # pyright: ignore[reportMissingImports]

    from gura_jax import load_model, objects
    from gura_jax.dataset.run import open_run
    from gura_jax.dataset.sources import read_inputs
    from gura_jax.dataset.table import Settings
    from gura_jax.dataset.workers import work

    count, settings = 160, Settings(timestamps=True, shard_hours=0.04)
    folder, out = arguments.folder / "clips", arguments.folder / "out"
    collection.make(folder, count, collection.SPEECH)
    print(f"\n{count} clips of 16 kHz, frames and scenes; medians of {arguments.rounds} rounds in turns\n")
    columns = ("system", "disk, s", "bucket, s", "share", "processor: disk, s", "bucket, s", "embeddings")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with serving("clips") as address:
        os.environ |= environment(address)
        for path in folder.rglob("*"):
            if path.is_file():
                key = path.relative_to(folder).as_posix()
                objects.put(objects.locate(f"s3://clips/in/{key}"), path.read_bytes())
        for name in ("crepe-tiny", "hubert_base"):
            model = load_model(name, weights="random")
            seconds: dict[str, list[float]] = {"disk": [], "bucket": []}
            processor: dict[str, list[float]] = {"disk": [], "bucket": []}
            for _ in range(arguments.rounds + 1):  # the first compiles
                for kind, given, place in (
                    ("disk", str(folder), str(out)),
                    ("bucket", "s3://clips/in", "s3://clips/out"),
                ):
                    start, before = time.perf_counter(), time.process_time()
                    clips = read_inputs([given], sample_rate=model.sample_rate)
                    work(open_run(model, clips, place, settings, overwrite=True), collection.ALONE)
                    seconds[kind].append(time.perf_counter() - start)
                    processor[kind].append(time.process_time() - before)
            own, theirs = collection.contents(out), stored("s3://clips/out")
            arrays = [name for name in own if name.startswith(("scene", "frames"))]
            same = set(own) == set(theirs) and all(own[name] == theirs[name] for name in arrays)
            disk, remote = (statistics.median(seconds[kind][1:]) for kind in ("disk", "bucket"))
            shares = statistics.median(a / b for a, b in zip(seconds["disk"][1:], seconds["bucket"][1:], strict=True))
            print(
                f"| {name} | {disk:.1f} | {remote:.1f} | {100 * shares:.0f} % "
                f"| {statistics.median(processor['disk'][1:]):.1f} | {statistics.median(processor['bucket'][1:]):.1f} "
                f"| {'equal' if same else 'DIFFER'} |",
                flush=True,
            )


# Suffix, rate, channels, and what soundfile calls it.
FORMS = {
    "WAV 16 kHz mono": ("wav", 16_000, 1, "WAV", "PCM_16"),
    "WAV 44.1 kHz stereo": ("wav", 44_100, 2, "WAV", "PCM_16"),
    "FLAC 44.1 kHz stereo": ("flac", 44_100, 2, "FLAC", "PCM_16"),
    "MP3 44.1 kHz stereo": ("mp3", 44_100, 2, "MP3", "MPEG_LAYER_III"),
    "OGG Vorbis 44.1 kHz stereo": ("ogg", 44_100, 2, "OGG", "VORBIS"),
    "Opus 48 kHz stereo": ("opus", 48_000, 2, "OGG", "OPUS"),
}
DECODED_SECONDS, DECODED_CLIPS = 10, 64


def _load(path: str) -> int:
    from gura_jax.audio import load_audio

    return len(load_audio(path))


def decode(arguments: argparse.Namespace) -> None:
    """Rates of one thread, and of two threads beside two processes, in turns."""
    import multiprocessing
    from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

    import soundfile

    folder = arguments.folder / "decode"
    folder.mkdir(exist_ok=True)
    print(f"\n{DECODED_CLIPS} clips of {DECODED_SECONDS} s, to 16 kHz; medians of {arguments.rounds} rounds in turns\n")
    columns = ("", "s of audio a core-second", "2 threads: s of audio/s", "2 processes", "threads / processes")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        for name, (suffix, rate, channels, form, subtype) in FORMS.items():
            path = folder / f"{rate}-{channels}.{suffix}"
            t = np.arange(DECODED_SECONDS * rate) / rate
            noise = 0.1 * np.random.default_rng(0).standard_normal((len(t), channels))
            soundfile.write(
                path, 0.3 * np.sin(2 * np.pi * 220 * t)[:, None] + noise, rate, format=form, subtype=subtype
            )
            paths, audio = [str(path)] * DECODED_CLIPS, DECODED_CLIPS * DECODED_SECONDS

            def seconds(pool: Executor, paths: list[str] = paths) -> float:
                start = time.perf_counter()
                list(pool.map(_load, paths, chunksize=4))
                return time.perf_counter() - start

            alone, both = [], []
            seconds(processes)
            for _ in range(arguments.rounds):
                start = time.process_time()
                for each in paths:
                    _load(each)
                alone.append(time.process_time() - start)
                both.append((seconds(threads), seconds(processes)))
            of_threads, of_processes = (statistics.median(column) for column in zip(*both, strict=True))
            ratio = statistics.median(b / a for a, b in both)
            print(
                f"| {name} | {audio / statistics.median(alone):.0f} | {audio / of_threads:.0f} "
                f"| {audio / of_processes:.0f} | {ratio:.2f} |",
                flush=True,
            )


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "plan": plan,
    "list": names,
    "resume": resume,
    "formats": formats,
    "bucket": bucket,
    "decode": decode,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=HERE / ".collection" / "scale")
    parser.add_argument("--here", action="store_true", help="in this process")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.here:
        for part in arguments.parts:
            PARTS[part](arguments)
        return
    about = machine()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "pyarrow", "obstore", "moto")]
    print(f"{about['date']}; {about['machine']}; Python {about['python']}, {', '.join(versions)}", flush=True)
    for part in arguments.parts or PARTS:
        options = [f"--{name}={value}" for name, value in vars(arguments).items() if name not in ("parts", "here")]
        subprocess.run([sys.executable, __file__, part, "--here", *options], check=True)


if __name__ == "__main__":
    main()
