"""gura_jax on one GPU beside PyTorch: exactness, speed, share of the device's peak, pmap and training.

python benchmarks/gpu.py [--size tiny] [--seconds-limit 460] [--out FILE]

Each section has a process of its own, and every line is written as it comes: a run that is cut keeps what it has. All
weights are random, and the same for both sides of a comparison. Needs jax, flax, torch, transformers and numpy alone;
gura_jax itself need not be installed. Runs on a CPU too.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import multiprocessing
import os
import pickle
import re
import statistics
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

HERE = Path(__file__).parent
SYSTEMS = ("hubert-base", "fusion_wav2vec2", "fusion_cat_xwc")
# Every network; group norm and layer norm.
PARITY = (
    *("hubert-base", "wav2vec2-large", "mms-1b-all", "wavlm-large", "data2vec-audio-base"),
    *("wav2vec2-conformer-rope-large", "w2v-bert-2", "whisper-tiny", "crepe-tiny"),
)
# But for those whose references are packages that such an image lacks.
NOT_COMPARED = (
    "audio-spectrogram-transformer",
    "beats",
    "dasheng",
    "passt",
    "panns_cnn14",
    "byol_s",
    "efficientnet_b2",
    "wav2clip",
    "tera",
    "vq-wav2vec",
)
SAME_PROGRAM = 1e-6  # relative, float32: jit and pmap differ in rounding alone
WARM_UP = 2  # calls after the first that are not timed
PARITY_SECONDS = (2.0, 1.3)  # of clips in one padded batch
TRAINING_SECONDS, CLASSES = 4.0, 2


class Sizes(NamedTuple):
    """How much is computed."""

    size: Literal["tiny"] | None  # of the encoders
    clips: int
    seconds: float  # of a clip
    matrix: int  # of the square bfloat16 product
    rounds: int
    steps: int  # of training


class Timed(NamedTuple):
    """Seconds of the first call and of a later one, and what the last returned."""

    first: float
    median: float
    out: Any


SIZES = {"full": Sizes(None, 32, 10.0, 8192, 10, 10), "tiny": Sizes("tiny", 2, 1.0, 256, 2, 6)}

Section = Callable[[Sizes, Path], Iterator[str]]
"""(sizes, a folder that the sections share) -> lines of Markdown; raises where what must hold does not."""


def product(sizes: Sizes, folder: Path) -> Iterator[str]:
    """The rate of one large product."""
    yield f"bfloat16, {sizes.matrix} x {sizes.matrix} x {sizes.matrix}. {_published_source()}\n"
    yield "| library | TFLOP/s | of published |\n|---|---|---|"
    for library, rate in (("JAX", jax_rate(sizes)), ("PyTorch", torch_rate(sizes))):
        yield f"| {library} | {rate / 1e12:.3g} | {_of_published(rate)} |"


def parity(sizes: Sizes, folder: Path) -> Iterator[str]:
    """Every part of every kind of encoder, as ``gura-jax parity`` compares them."""
    from torch_recipe import CrepeReference

    from gura_jax import ENCODERS, FAMILIES, Member, System
    from gura_jax.audio import synthetic_clip
    from gura_jax.convert.parity import LAYER_BOUND, ORACLE_FACTOR, compare

    name = f"{CrepeReference.__module__}.{CrepeReference.__qualname__}"  # the package torchcrepe need not be here
    FAMILIES["crepe"] = dataclasses.replace(FAMILIES["crepe"], reference=name)
    cases = [(Member(name, name=f"{name}, tiny"), ENCODERS[name].config.tiny()) for name in PARITY]
    if sizes.size is None:
        cases.append((Member("hubert-base"), ENCODERS["hubert-base"].config))
    clips = [synthetic_clip(seconds) for seconds in PARITY_SECONDS]
    yield (
        "Precision highest, beside PyTorch in float32 and in float64 on the CPU; relative distances, of the worst part "
        f"each. Bounds: {LAYER_BOUND:g} from PyTorch, and from float64 {ORACLE_FACTOR} times PyTorch's own.\n"
    )
    yield "| encoder | parts | from PyTorch | worst part | from float64 | PyTorch from float64 | within bounds |"
    yield "|---|---|---|---|---|---|---|"
    failed = []
    for member, config in cases:
        name = member.name
        rows = list(compare(System(name, (with_weights(member, config, folder),)), clips))
        worst = max(rows, key=lambda row: row.to_pytorch)
        passed = all(row.passed for row in rows)
        failed += [] if passed else [name]
        to_oracle, pytorch_to_oracle = (max(column) for column in zip(*(row[4:6] for row in rows), strict=True))
        yield (
            f"| {name} | {len(rows)} | {worst.to_pytorch:.1e} | {worst.layer} | {to_oracle:.1e} | "
            f"{pytorch_to_oracle:.1e} | {'yes' if passed else '**no**'} |"
        )
    if failed:
        raise RuntimeError(f"not within the bounds: {', '.join(failed)}")


def throughput(name: str, sizes: Sizes, folder: Path) -> Iterator[str]:
    """A batch through a system in bfloat16: ours, and PyTorch's."""
    import jax

    rate = jax_rate(sizes)
    yield (
        f"{sizes.clips} clips of {sizes.seconds:g} s, bfloat16, from audio to frames, both on the device. The peak of "
        "gura_jax includes loading in float32.\n"
    )
    yield _heading()
    system = _system(name, sizes, folder)
    timed = run_ours(system, _audio(sizes), sizes, dtype="bfloat16", devices=jax.local_devices()[:1])
    ours = Ours(system, timed.median, timed.out, rate)
    with (folder / f"{name}.pickle").open("wb") as file:
        pickle.dump(ours, file)
    yield _row("gura_jax", timed, ours, sizes, _jax_peak(), distance=None)
    _free()
    yield from _run_torch("PyTorch, SDPA", "bfloat16", ours, sizes)


def compiled(sizes: Sizes, folder: Path) -> Iterator[str]:
    """The same batches through ``torch.compile``."""
    yield "PyTorch in bfloat16; ratios to gura_jax above.\n"
    yield _heading()
    for name in SYSTEMS:
        path = folder / f"{name}.pickle"
        if path.exists():  # else its section failed
            yield from _run_torch(name, "bfloat16-compile", pickle.loads(path.read_bytes()), sizes)


class Ours(NamedTuple):
    """What PyTorch is compared with."""

    system: Any
    seconds: float  # a batch
    frames: Any  # [B, T, D]
    rate: float  # FLOP/s of a product


def _run_torch(title: str, mode: str, ours: Ours, sizes: Sizes) -> Iterator[str]:
    import torch
    from peers import SAME_BFLOAT16
    from torch_recipe import Recipe

    _free()
    device = _torch_device()
    weights = {m.name: Path(m.weights or str(m.encoder)) for m in ours.system.members}
    recipe = Recipe.load(ours.system, weights, mode, device)
    batch = torch.from_numpy(_audio(sizes)).to(device)
    timed = _timed(lambda: _finished(recipe.frames(batch)), sizes)
    distance = _distance(timed.out.cpu().numpy(), ours.frames)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    yield _row(title, timed, ours, sizes, peak, distance)
    if not distance <= SAME_BFLOAT16:
        raise RuntimeError(f"{title}: expected our frames, found others at a distance of {distance:.1e}")


def _heading() -> str:
    cells = ("", "ms", "ratio", "x real time", "TFLOP/s", "of product", "of published", "first call, s", "peak, GB")
    return "| " + " | ".join((*cells, "distance")) + " |\n|" + "---|" * (len(cells) + 1)


def _row(title: str, timed: Timed, ours: Ours, sizes: Sizes, peak: int | None, distance: float | None) -> str:
    import work

    per_second = work.flops(work.configs(ours.system), [sizes.seconds] * sizes.clips) / timed.median
    cells = (
        title,
        f"{1000 * timed.median:.1f}",
        f"{timed.median / ours.seconds:.2f}",
        f"{sizes.clips * sizes.seconds / timed.median:.0f}",
        f"{per_second / 1e12:.3g}",
        f"{100 * per_second / ours.rate:.0f} %",
        _of_published(per_second),
        f"{timed.first:.1f}",
        "" if peak is None else f"{peak / 1e9:.1f}",
        "" if distance is None else f"{distance:.0e}",
    )
    return "| " + " | ".join(cells) + " |"


def run_ours(system: Any, audio: Any, sizes: Sizes, **options: Any) -> Timed:
    """Our frames of a batch, and how long they took; ``options`` as of ``load_model``."""
    import jax
    import numpy as np

    from gura_jax import load_model

    model = load_model(system, **options)
    batch = jax.device_put(model.pad(list(audio), len(audio), audio.shape[1]))
    timed = _timed(lambda: jax.block_until_ready(model(*batch, scenes=False).frames), sizes)
    return timed._replace(out=np.asarray(timed.out))


def mapped(sizes: Sizes, folder: Path) -> Iterator[str]:
    """jit beside pmap."""
    import jax

    yield f"hubert-base, float32, {sizes.clips} clips of {sizes.seconds:g} s, {jax.local_device_count()} device(s).\n"
    yield "| | ms | first call, s | distance |\n|---|---|---|---|"
    options = {"layers": "mean", "weights": "random", "size": sizes.size}
    runs = {by: run_ours("hubert-base", _audio(sizes), sizes, parallel_by=by, **options) for by in ("jit", "pmap")}
    for by, timed in runs.items():
        distance = _distance(timed.out, runs["jit"].out)
        yield f"| {by} | {1000 * timed.median:.1f} | {timed.first:.1f} | {distance:.0e} |"
        if not distance <= SAME_PROGRAM:
            raise RuntimeError(f"{by}: expected the frames of jit, found others at a distance of {distance:.1e}")


def training(sizes: Sizes, folder: Path) -> Iterator[str]:
    """Fine-tune an encoder to tell tones from noise, by the step of ``gura-jax finetune``."""
    import numpy as np
    import work

    from gura_jax import load_model
    from gura_jax.finetune import optimiser, step
    from gura_jax.finetune.data import Batch
    from gura_jax.finetune.settings import Settings
    from gura_jax.parallel import place_rows

    model = load_model("hubert-base", layers="mean", weights="random", size=sizes.size)
    mesh = model.compilation.mesh
    settings = Settings(dtype="bfloat16", batch_size=sizes.clips, warmup=0.0)
    net = step.network(model, settings, "scene", "multiclass")
    *weights, scales = step.divide(model, net, settings, CLASSES)
    transformation = optimiser.adamw(settings, sizes.steps)
    trained, frozen = step.place_replicated(weights, mesh)
    moments, start = step.place_replicated((transformation.init(trained), np.int32(0)), mesh)
    state = step.State(trained, moments, start)
    samples = int(TRAINING_SECONDS * work.SAMPLE_RATE)
    noise = np.random.default_rng(0).standard_normal((sizes.clips, samples)).astype(np.float32)
    clips = [work.voice(TRAINING_SECONDS, i) if i % CLASSES else 0.1 * noise[i] for i in range(sizes.clips)]
    targets = np.eye(CLASSES, dtype=np.float32)[np.arange(sizes.clips) % CLASSES]
    batch = place_rows(Batch(*model.pad(clips, sizes.clips, samples), targets, np.ones(sizes.clips, np.float32)), mesh)
    update = step.compile_step(step.train_step(net, transformation, scales, settings), state)
    begin = time.perf_counter()
    program = update.lower(state, frozen, batch).compile()
    compiled, losses, times = time.perf_counter() - begin, [], []
    for _ in range(sizes.steps):
        begin = time.perf_counter()
        state, figures = program(state, frozen, batch)
        losses.append(float(figures.loss))
        times.append(time.perf_counter() - begin)
    yield (
        f"hubert-base, all weights in float32, computed in bfloat16; AdamW, {sizes.clips} clips of "
        f"{TRAINING_SECONDS:g} s a step.\n\n| ms a step | compile, s | temporaries, GB | loss |\n|---|---|---|---|"
    )
    temporary = program.memory_analysis().temp_size_in_bytes
    yield (
        f"| {1000 * statistics.median(times):.1f} | {compiled:.1f} | {temporary / 1e9:.1f} | "
        f"{', '.join(f'{loss:.3g}' for loss in losses)} |"
    )
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"expected the loss to fall, found {losses[-1]:.3g} after {losses[0]:.3g}")


SECTIONS: Mapping[str, Section] = {
    "Product": product,
    "Parity": parity,
    "hubert-base": functools.partial(throughput, "hubert-base"),
    "jit and pmap": mapped,
    "Training": training,
    **{name: functools.partial(throughput, name) for name in SYSTEMS[1:]},
    "torch.compile": compiled,  # last, as it takes longest
}


# Measuring


def _timed(call: Callable[[], Any], sizes: Sizes) -> Timed:
    times = []
    out = None
    for _ in range(1 + WARM_UP + sizes.rounds):
        start = time.perf_counter()
        out = call()
        times.append(time.perf_counter() - start)
    return Timed(times[0], statistics.median(times[1 + WARM_UP :]), out)


def jax_rate(sizes: Sizes) -> float:
    """FLOP/s of a bfloat16 product in JAX."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (sizes.matrix, sizes.matrix), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    return 2 * sizes.matrix**3 / _timed(lambda: product(x).block_until_ready(), sizes).median


def torch_rate(sizes: Sizes) -> float:
    """FLOP/s of a bfloat16 product in PyTorch."""
    import torch

    x = torch.randn(sizes.matrix, sizes.matrix, dtype=torch.bfloat16, device=_torch_device())
    return 2 * sizes.matrix**3 / _timed(lambda: _finished(x @ x), sizes).median


def _finished(tensor: Any) -> Any:
    import torch

    if tensor.is_cuda:
        torch.cuda.synchronize()
    return tensor


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _jax_peak() -> int | None:
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _free() -> None:
    """Give back the device's memory: the next contender's peak is its own."""
    import jax
    import torch

    jax.clear_caches()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _distance(a: Any, b: Any) -> float:
    import numpy as np

    if a.shape != b.shape:
        return np.inf
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _device_kind() -> Any:
    """The row of this device among those whose figures are published, if it is one."""
    import jax

    from gura_jax.targets import DEVICES

    found = jax.devices()[0].device_kind.lower()
    return next((kind for name, kind in DEVICES.items() if name in re.split(r"\W+", found)), None)


def _of_published(per_second: float) -> str:
    kind = _device_kind()
    return "" if kind is None else f"{100 * per_second / kind.peak['bfloat16']:.0f} %"


def _published_source() -> str:
    kind = _device_kind()
    if kind is None:
        return "No figure of this device is known."
    return f"Published: {kind.peak['bfloat16'] / 1e12:g} TFLOP/s, {kind.source}."


# Systems


def _system(name: str, sizes: Sizes, folder: Path) -> Any:
    """One of :mod:`work`'s, with random weights under ``folder``."""
    import work

    system = work.CASES[name]
    configs = [config if sizes.size is None else config.tiny() for config in work.configs(system)]
    members = [with_weights(member, config, folder) for member, config in zip(system.members, configs, strict=True)]
    return dataclasses.replace(system, members=tuple(members))


def with_weights(member: Any, config: Any, folder: Path) -> Any:
    """The member with an encoder of this config and random weights, as PyTorch has them, ``folder / member.name``."""
    from torch_recipe import random_weights

    from gura_jax import ENCODERS

    path = folder / member.name
    if not path.exists():
        random_weights(config, path)
    if path.is_dir():  # says what it is
        return dataclasses.replace(member, encoder=str(path))
    encoder = next(name for name, preset in ENCODERS.items() if preset.config == config)
    return dataclasses.replace(member, encoder=encoder, weights=str(path))


def _audio(sizes: Sizes) -> Any:
    """Clips [B, N]."""
    import numpy as np
    import work

    return np.stack([work.voice(sizes.seconds, seed) for seed in range(sizes.clips)])


# Sections, each in a process of its own


def describe(sizes: Sizes, folder: Path) -> Iterator[str]:
    """The device's name, and what everything was measured on."""
    import jax
    from run import machine

    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    yield jax.devices()[0].device_kind
    yield (
        f"{about['date']}; {about['machine']}; Python {about['python']}; {versions}. Random weights, the same for "
        f"both; medians of {sizes.rounds} calls."
    )


def _work(section: Section, sizes: Sizes, folder: Path, lines: Connection) -> None:
    """Send the lines of a section, and what went wrong."""
    try:
        for line in section(sizes, folder):
            lines.send(line)
    except Exception as error:
        traceback.print_exc()
        lines.send(f"\n{type(error).__name__}: {error}")
        sys.exit(1)


def run_section(section: Section, sizes: Sizes, folder: Path, deadline: float, write: Callable[[str], None]) -> bool:
    """Write a section's lines as they come, until the deadline; return whether nothing went wrong."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(section, sizes, folder, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            write(receiver.recv())
        write("\nCut at the time limit.")
        return True
    except EOFError:  # it ended
        process.join()
        if process.exitcode:
            write(f"\n**Failed** with exit code {process.exitcode}.")
        return not process.exitcode
    finally:
        process.kill()
        process.join()


def _describe_package(folder: Path) -> None:
    """Let sections import gura_jax, and read its version, where the checkout is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("gura-jax")
        return
    version = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"]
    metadata = folder / f"gura_jax-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: gura-jax\nVersion: {version}\n")
    sys.path[:0] = [str(HERE.parent), str(folder)]  # a process that is started has it too


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="of encoders and batches")
    parser.add_argument("--seconds-limit", type=float, default=460, help="after which it is cut")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/gpu-DEVICE.md")
    arguments = parser.parse_args()
    sizes, start = SIZES[arguments.size], time.monotonic()
    deadline = start + arguments.seconds_limit
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    about: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _describe_package(folder)
        if not run_section(describe, sizes, folder, deadline, about.append):
            return 1
        device, header = about
        out = arguments.out or HERE / "results" / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower())}.md"
        out.parent.mkdir(parents=True, exist_ok=True)
        failed = 0
        with out.open("w") as file:

            def write(line: str) -> None:
                print(line, flush=True)
                print(line, file=file, flush=True)

            write(header)
            for title, section in SECTIONS.items():
                write(f"\n## {title}\n")
                failed += not run_section(section, sizes, folder, deadline, write)
                print(f"({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
    print(f"written to {out}", file=sys.stderr)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
