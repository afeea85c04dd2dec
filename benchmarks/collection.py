"""``gura-jax embed`` over a collection of files, beside the model alone on the same batches.

python benchmarks/collection.py [SYSTEM ...] [--clips 2000] [--speech] [--rounds 3] [--folder DIR] [--ray]

Makes the clips: half a second to ten, WAV, FLAC, OGG and MP3 of several rates, one in a thousand broken; with
``--speech`` 16 kHz WAV and FLAC alone, as corpora of speech are. The model alone computes the plan's batches from
memory, in turns with whole runs. On a CPU what decodes takes its time from the model, so the processor time of a run
that is not the model's is the other figure to look at. ``--ray`` runs once more with two workers on
a local cluster, kills one half-way, and compares every byte. Weights are random.
"""

import argparse
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import soundfile
import work
from run import machine
from worker import peak, reset_peak

from gura_jax import SYSTEMS, System, load_model
from gura_jax.dataset import commit
from gura_jax.dataset.decode import decode_ahead
from gura_jax.dataset.places import Folder
from gura_jax.dataset.ray_engine import work_with_ray
from gura_jax.dataset.run import Run, open_run
from gura_jax.dataset.sources import read_inputs
from gura_jax.dataset.table import Settings, plan_table, summarise
from gura_jax.dataset.workers import Summary, Worker
from gura_jax.dataset.workers import work as embed
from gura_jax.files import LOCK_FILE

HERE = Path(__file__).parent
# Suffix, rate and channels of clips, in turn.
SPEECH = (*[("wav", 16_000, 1)] * 4, *[("flac", 16_000, 1)] * 3)
FORMS = (*SPEECH, ("wav", 44_100, 2), ("ogg", 44_100, 1), ("mp3", 44_100, 1))
BROKEN = 1000  # one in so many
ALONE = Worker(0, 1, "a benchmark")


def make(folder: Path, clips: int, forms: Sequence[tuple[str, int, int]]) -> int:
    """Write the clips, if they are not there; how many are broken."""
    broken = 0
    for i in range(clips):
        random = np.random.default_rng(i)
        suffix, rate, channels = forms[i % len(forms)]
        path = folder / f"{i // 1000:03d}" / f"{i:06d}.{suffix}"
        broken += i % BROKEN == BROKEN // 2
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        n = int(rate * np.clip(random.lognormal(0.4, 0.7), 0.5, 10))
        t = np.arange(n) / rate
        samples = 0.3 * np.sin(2 * np.pi * random.uniform(80, 800) * t) + 0.02 * random.standard_normal(n)
        temporary = path.with_name(f".{path.name}")
        soundfile.write(temporary, np.stack([samples] * channels, 1), rate, format=suffix.upper())
        if i % BROKEN == BROKEN // 2:
            content = temporary.read_bytes()
            temporary.write_bytes([b"", b"no audio", content[: len(content) // 2]][broken % 3])
        temporary.rename(path)
    return broken


class Measured(NamedTuple):
    """A run from files, and the model alone."""

    summary: Summary
    seconds: float
    model_seconds: float
    processor: float  # share of the run's processor time that is not the model's
    peak: int


def measure(model: Any, clips: Any, out: Path, settings: Settings, alone: Callable[[], float]) -> Measured:
    """Once: a run from nothing, and then the model alone."""
    shutil.rmtree(out, ignore_errors=True)
    run = open_run(model, clips, out, settings)
    reset_peak()
    start, processor = time.perf_counter(), time.process_time()
    summary = embed(run, ALONE)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    most, before = peak(), time.process_time()
    model_seconds = alone()
    return Measured(summary, seconds, model_seconds, 1 - (time.process_time() - before) / processor, most)


def model_alone(model: Any, clips: Any, settings: Settings) -> Callable[[], float]:
    """A function that computes the plan's batches from memory, and says how long it took."""
    table = plan_table(model, clips, settings)
    run = Run(model, Folder(Path()), settings, "", [table])
    batches = [batch for number in run.shards for batch in run._batches(number) if batch.clips]
    arrays = []
    decoded = decode_ahead((batch.clips for batch in batches), model.sample_rate, settings.max_duration)
    for batch, audio in zip(batches, decoded, strict=True):
        clips = [clip if isinstance(clip, np.ndarray) else None for clip in audio]
        arrays.append(model.pad(clips, batch.rows, batch.samples))
    for padded in {padded.audio[model.rates[0]].shape: padded for padded in arrays}.values():
        jax.block_until_ready(model(*padded, frames=settings.timestamps))  # compiles

    def compute() -> float:
        start = time.perf_counter()
        for padded in arrays:
            jax.device_get(model(*padded, frames=settings.timestamps))
        return time.perf_counter() - start

    return compute


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != LOCK_FILE}


def with_ray(system: System, clips: Any, out: Path, settings: Settings, like: Path) -> None:
    """Two workers on a local cluster, one of them killed half-way; the bytes against those of one process."""
    from ray.cluster_utils import Cluster

    shutil.rmtree(out, ignore_errors=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    half = len(commit.shard_numbers(like)) // 2
    killed: list[int] = []

    def kill() -> None:
        while not (out.is_dir() and len(commit.shard_numbers(out)) >= half):
            time.sleep(0.1)
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and (entry / "cmdline").read_bytes().startswith(b"ray::_Worker.embed"):
                os.kill(int(entry.name), signal.SIGKILL)
                killed.append(int(entry.name))
                return

    threading.Thread(target=kill, daemon=True).start()
    try:
        start = time.perf_counter()
        model = {"system": system, "weights": "random"}
        summary = work_with_ray(model, clips, out, settings, address=cluster.address)
        seconds = time.perf_counter() - start
    finally:
        cluster.shutdown()
    same = contents(out) == contents(like)
    print(
        f"\nRay, two workers, {len(killed)} killed half-way: {summary.done.clips} clips in {seconds:.0f} s with the "
        f"start of the workers; every byte {'equals' if same else 'DIFFERS FROM'} that of one process"
    )


SHARD_HOURS = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=["crepe-tiny", "crepe", "fusion_cat_xwc_base"])
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--speech", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=HERE / ".collection")
    parser.add_argument("--ray", action="store_true")
    arguments = parser.parse_args()
    folder, out = arguments.folder / str(arguments.clips), arguments.folder / "out"
    folder = folder.with_name(f"{folder.name}-speech") if arguments.speech else folder
    broken = make(folder, arguments.clips, SPEECH if arguments.speech else FORMS)
    about = machine()
    print(f"{about['date']}; {about['machine']}; jax {about['versions']['jax']}; random weights, scenes, float32")
    kind = " of 16 kHz, WAV and FLAC" if arguments.speech else ""
    print(f"{arguments.clips} clips{kind}, {broken} broken; medians of {arguments.rounds} rounds in turns\n")
    columns = (
        *("system", "clips", "hours", "clips/s", "h of audio/h", "share of the model alone"),
        *("processor time beyond the model", "padding", "peak, GB", "failed"),
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    settings = Settings(shard_hours=SHARD_HOURS)
    for name in arguments.systems:
        system = work.CASES.get(name) or SYSTEMS[name]
        model = load_model(system, weights="random")
        clips = read_inputs([folder], sample_rate=model.sample_rate)
        alone = model_alone(model, clips, settings)
        rounds = [measure(model, clips, out, settings, alone) for _ in range(arguments.rounds)]
        summary = summarise(model, settings, plan_table(model, clips, settings))
        seconds = statistics.median(r.seconds for r in rounds)
        share = statistics.median(r.model_seconds / r.seconds for r in rounds)
        done, failed = rounds[0].summary.done, rounds[0].summary.failed
        print(
            f"| {name} | {done.clips} | {done.samples / model.sample_rate / 3600:.2f} | {done.clips / seconds:.0f} "
            f"| {done.samples / model.sample_rate / seconds:.0f} | {100 * share:.0f} % "
            f"| {100 * statistics.median(r.processor for r in rounds):.0f} % | {100 * summary.padding:.1f} % "
            f"| {max(r.peak for r in rounds) / 1e9:.2f} | {len(failed)} of {broken} |",
            flush=True,
        )
        if arguments.ray:
            with_ray(system, clips, arguments.folder / "ray", settings, out)


if __name__ == "__main__":
    main()
