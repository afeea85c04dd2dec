"""The choices behind the encoders' speed, measured one against the other on this machine.

python benchmarks/choices.py [CHOICE ...]

Each table: variants of one computation, in turns, with random weights; the one in use is marked.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from run import machine

from gura_jax.fusion import weighted_sum
from gura_jax.models import crepe, speech
from gura_jax.models.crepe import CrepeConfig, CrepeFrames
from gura_jax.models.encoder import frame_mask
from gura_jax.models.speech import Blocks, SpeechConfig, SpeechFrames, layer_weights, speech_functional
from gura_jax.parallel import PRECISION
from gura_jax.systems import ENCODERS

ROUNDS = 7
LAYERS = 6  # of a transformer, enough to tell
BACKEND = jax.default_backend()


class Variant(NamedTuple):
    """A function to compile, and its arguments."""

    function: Callable[..., Any]
    arguments: Sequence[Any]


def measure(title: str, variants: Mapping[str, Variant]) -> None:
    """Print a table of medians, all variants in turns."""
    compiled, times = {}, {name: [] for name in variants}
    for name, (function, arguments) in variants.items():
        start = time.perf_counter()
        with jax.default_matmul_precision(PRECISION):
            program = jax.jit(function).lower(*arguments).compile()
        compiled[name] = program, time.perf_counter() - start
        jax.block_until_ready(program(*arguments))
    for _ in range(ROUNDS):
        for name, (_, arguments) in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[name][0](*arguments))
            times[name].append(time.perf_counter() - start)
    print(f"\n{title}\n\n| variant | ms | compile, s | temporary, MB |\n|---|---|---|---|")
    for name, (program, seconds) in compiled.items():
        memory = program.memory_analysis().temp_size_in_bytes / 1e6
        print(f"| {name} | {1000 * statistics.median(times[name]):.0f} | {seconds:.1f} | {memory:.0f} |", flush=True)


def with_blocks(function: Callable[..., Any], **changes: int) -> Callable[..., Any]:
    """A function traced with other block sizes."""

    def traced(*arguments: Any) -> Any:
        before = speech.blocks()
        speech.BLOCKS[BACKEND] = before._replace(**changes)
        try:
            return function(*arguments)
        finally:
            speech.BLOCKS[BACKEND] = before

    return traced


@functools.cache
def encoder(name: str, layers: int = LAYERS) -> tuple[SpeechConfig, Any]:
    architecture = ENCODERS[name].architecture
    assert isinstance(architecture, SpeechConfig)
    config = dataclasses.replace(architecture, num_hidden_layers=layers)
    return config, SpeechFrames(config).random_params(0)


def audio(clips: int, seconds: float) -> tuple[jax.Array, jax.Array]:
    samples = int(16_000 * seconds)
    noise = np.random.default_rng(0).standard_normal((clips, samples)).astype(np.float32)
    return jnp.asarray(noise), jnp.full(clips, samples, jnp.int32)


def features() -> None:
    for name in ("hubert-large", "hubert-base"):
        config, params = encoder(name)
        extractor = lambda p, a, n, config=config: speech_functional(config).merge(p).feature_extractor(a, n)  # noqa: E731
        marks = {16: "", 64: " (in use on CPUs)", 256: "", 1 << 20: ": all"}
        variants = {
            f"{frames} frames{mark}" if frames < 1 << 20 else "all frames": Variant(
                with_blocks(extractor, frames=frames), (params, *audio(4, 4))
            )
            for frames, mark in marks.items()
        }
        measure(f"Feature encoder of {name}, 4 x 4 s: frames in a block", variants)


def hidden(config: SpeechConfig, clips: int, frames: int) -> tuple[jax.Array, jax.Array]:
    x = np.random.default_rng(0).standard_normal((clips, frames, config.hidden_size)).astype(np.float32)
    return jnp.asarray(x), frame_mask(jnp.full(clips, frames), frames)


def attention() -> None:
    for clips, frames in ((4, 199), (1, 1499)):
        shape = (clips, frames, 16, 64)
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3))
        mask = frame_mask(jnp.full(clips, frames), frames)
        library = lambda q, k, v, m: jax.nn.dot_product_attention(q, k, v, mask=m[:, None, None, :])  # noqa: E731
        variants = {"jax.nn.dot_product_attention": Variant(library, (q, k, v, mask))}
        for size in (2, 8, 16, 64, 1024):
            mark = " (in use on CPUs)" if size == 16 else ""
            variants[f"{size} MiB of scores at once{mark}"] = Variant(
                with_blocks(speech.attention, scores=size << 20), (q, k, v, mask)
            )
        measure(f"Attention of 16 heads of 64, {clips} x {frames} frames", variants)


def long_attention() -> None:
    frames = 29_999  # ten minutes
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, frames, 1, 64)), jnp.float32) for _ in range(3))
    mask = frame_mask(jnp.full(1, frames), frames)

    def with_sizes(queries: int, keys: int) -> Callable[..., Any]:
        def traced(*arguments: Any) -> Any:
            before = speech.QUERIES_AT_ONCE, speech.KEYS_AT_ONCE
            speech.QUERIES_AT_ONCE, speech.KEYS_AT_ONCE = queries, keys
            try:
                return speech.attention(*arguments)
            finally:
                speech.QUERIES_AT_ONCE, speech.KEYS_AT_ONCE = before

        return traced

    variants = {
        f"{queries} queries x {keys if keys < frames else 'all'} keys{mark}": Variant(
            with_sizes(queries, keys), (q, k, v, mask)
        )
        for queries, keys, mark in ((128, frames, ""), (256, 512, ""), (1024, 512, " (in use)"), (2048, 1024, ""))
    }
    measure("Attention of one head of 64, 29999 frames", variants)


def transformer() -> None:
    config, params = encoder("hubert-xlarge", 12)
    x, mask = hidden(config, 4, 199)
    weights = layer_weights("mean", config.num_hidden_layers)
    network = speech_functional(config)
    prefix = "encoder.layers."
    names = sorted({name.split(".", 3)[3] for name in params if name.startswith(prefix)})
    stacked = {
        name: jnp.stack([params[f"{prefix}{i}.{name}"] for i in range(config.num_hidden_layers)]) for name in names
    }

    def unrolled(params: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        return weighted_sum(network.merge(params).encoder(x, mask), weights)

    def scanned(params: Any, stacked: Any, x: jax.Array, mask: jax.Array, unroll: int) -> jax.Array:
        def layer(carry: tuple[jax.Array, jax.Array], own: Any) -> Any:
            x, total = carry
            mine = params | {f"{prefix}0.{name}": array for name, array in own.items()}
            x = network.merge(mine).encoder.layers[0](x, mask)
            return (x, total + x * weights[0]), None

        encoder = network.merge(params).encoder
        x = x + encoder.pos_conv_embed(x, mask)
        return jax.lax.scan(layer, (x, x * weights[0]), stacked, unroll=unroll)[0][1]

    variants = {"unrolled (in use)": Variant(unrolled, (params, x, mask))}
    for unroll in (1, 4):
        variants[f"lax.scan over stacked weights, unroll={unroll}"] = Variant(
            functools.partial(scanned, unroll=unroll), (params, stacked, x, mask)
        )
    measure("12 blocks of hubert-xlarge, 4 x 4 s, all layers averaged", variants)


def projections() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((796, 1280)), jnp.float32)
    q, k, v = (jnp.asarray(rng.standard_normal((1280, 1280)), jnp.float32) for _ in range(3))
    together = jnp.concatenate([q, k, v], axis=1)
    variants = {
        "three products (in use)": Variant(lambda x, *w: [x @ each for each in w], (x, q, k, v)),
        "one product, then split": Variant(lambda x, w: jnp.split(x @ w, 3, axis=1), (x, together)),
    }
    measure("Query, key and value of hubert-xlarge, 4 x 4 s", variants)


def activation() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((796, 5120)), jnp.float32)
    variants = {
        "x (1 + erf) / 2 (in use)": Variant(speech.gelu, (x,)),
        "jax.nn.gelu(approximate=False)": Variant(functools.partial(jax.nn.gelu, approximate=False), (x,)),
        "jax.nn.gelu(approximate=True)": Variant(functools.partial(jax.nn.gelu, approximate=True), (x,)),
    }
    measure("GELU of 796 x 5120", variants)


def pitch() -> None:
    for capacity in ("full", "tiny"):
        variants = {}
        for spectral, frames in ((False, 64), (True, 16), (True, 64), (True, 256)):
            member = CrepeFrames(CrepeConfig(capacity), 800, spectral)
            params = member.prepare(member.random_params(0))

            def run(*arguments: Any, member: CrepeFrames = member, frames: int = frames) -> Any:
                before = dict(crepe.FRAMES_AT_ONCE)
                crepe.FRAMES_AT_ONCE[BACKEND] = frames
                try:
                    return member(*arguments)
                finally:
                    crepe.FRAMES_AT_ONCE.clear()
                    crepe.FRAMES_AT_ONCE.update(before)

            name = f"{'frequency domain' if spectral else 'direct'}, {frames} frames at once"
            mark = " (in use on CPUs)" if spectral and frames == 64 else ""
            variants[name + mark] = Variant(run, (params, *audio(4, 4)))
        measure(f"CREPE {capacity}, 4 x 4 s", variants)


CHOICES = {f.__name__: f for f in (features, attention, long_attention, transformer, projections, activation, pitch)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choices", nargs="*", metavar="CHOICE", help=", ".join(CHOICES))
    chosen = parser.parse_args().choices or list(CHOICES)
    about = machine()
    print(f"{about['date']}; {about['machine']}; jax {about['versions']['jax']}; medians of {ROUNDS}")
    for name in chosen:
        CHOICES[name]()


if __name__ == "__main__":
    assert isinstance(speech.blocks(), Blocks)
    main()
