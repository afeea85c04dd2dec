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
import work
from peers import MATRIX
from run import machine

from gura_jax import ENCODERS, Options
from gura_jax.backend import platform_of
from gura_jax.models import attention as blocks
from gura_jax.models import convnets
from gura_jax.models.crepe import CrepeConfig, CrepeEncoder
from gura_jax.models.efficientnet import EfficientNetConfig, EfficientNetEncoder
from gura_jax.models.encoder import frame_mask
from gura_jax.models.layers import layer_weights, weighted_sum
from gura_jax.models.panns import PannsConfig, PannsEncoder
from gura_jax.models.transformer import gelu
from gura_jax.models.wav2vec2 import Wav2Vec2Encoder
from gura_jax.models.wav2vec2_config import Wav2Vec2Config
from gura_jax.parallel import PRECISION

ROUNDS = 7
LAYERS = 6  # of a transformer, enough to tell
RATE = 16_000
PRODUCT = f"{MATRIX} x {MATRIX} x {MATRIX}"  # the machine's rate
PLATFORM = platform_of(jax.devices())


class Variant(NamedTuple):
    """A function to compile, and its arguments."""

    function: Callable[..., Any]
    arguments: Sequence[Any]


def measure(title: str, variants: Mapping[str, Variant], gflop: Mapping[str, float] | None = None) -> None:
    """Print a table of medians, all variants in turns; with their arithmetic, also its rate beside a product's."""
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
    headings = ["variant", "ms", "compile, s", "temporary, MB", *(["GFLOP/s", "of product"] if gflop else [])]
    print(f"\n{title}\n\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for name, (program, seconds) in compiled.items():
        memory = program.memory_analysis().temp_size_in_bytes / 1e6
        row = f"| {name} | {1000 * statistics.median(times[name]):.0f} | {seconds:.1f} | {memory:.0f} |"
        if gflop:
            share = statistics.median(
                gflop[name] / gflop[PRODUCT] * product / own
                for own, product in zip(times[name], times[PRODUCT], strict=True)
            )
            row += f" {gflop[name] / statistics.median(times[name]):.0f} | {100 * share:.0f} % |"
        print(row, flush=True)


def in_use(size: int, used: int) -> str:
    """The mark of a variant."""
    return f" (in use on {PLATFORM.name})" if size == used else ""


def sized(**changes: Any) -> Options:
    """This platform, with other sizes or forms."""
    return Options(platform=dataclasses.replace(PLATFORM, **changes))


@functools.cache
def encoder(name: str, layers: int = LAYERS) -> tuple[Wav2Vec2Config, Any]:
    config = dataclasses.replace(ENCODERS[name].config, num_hidden_layers=layers)
    return config, Wav2Vec2Encoder(config, Options()).init(jax.random.key(0))


def audio(clips: int, seconds: float) -> tuple[jax.Array, jax.Array]:
    samples = int(RATE * seconds)
    noise = np.random.default_rng(0).standard_normal((clips, samples)).astype(np.float32)
    return jnp.asarray(noise), jnp.full(clips, samples, jnp.int32)


def parts() -> None:
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((MATRIX, MATRIX)), jnp.float32) for _ in range(2))
    for name, clips, seconds in (("wav2vec2-large", 4, 4), ("hubert-base", 4, 4), ("hubert-base", 1, 30)):
        config, params = encoder(name)
        each = work.wav2vec2_parts(config, RATE * seconds)
        gflop = {PRODUCT: 2 * MATRIX**3 / 1e9} | {part: clips * flops / 1e9 for part, flops in each.items()}
        inputs = audio(clips, seconds)
        network = Wav2Vec2Encoder(config, Options(platform=PLATFORM)).network
        frames = jax.eval_shape(lambda p, *a, network=network: network(p).project(*a)[0], params, *inputs).shape[1]
        H = config.num_attention_heads
        q, k, v = (
            jnp.asarray(rng.standard_normal((clips, frames, H, config.hidden_size // H)), jnp.float32) for _ in range(3)
        )
        hidden_frames, mask = hidden(config, clips, frames)

        def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
            for _ in range(LAYERS):
                q = blocks.attention(q, k, v, mask, PLATFORM)
            return q

        def layers(p: Any, x: Any, mask: Any, network: Any = network) -> Any:
            return [x := layer(x, mask) for layer in network(p).encoder.layers][-1]

        whole = f"{LAYERS} blocks"
        gflop[whole] = gflop.pop("rest of the blocks") + gflop["attention"]
        measure(
            f"Parts of {name}, {clips} x {seconds} s",
            {
                PRODUCT: Variant(jnp.matmul, (x, y)),
                "feature encoder": Variant(lambda p, *a, n=network: n(p).feature_extractor(*a), (params, *inputs)),
                "positional convolution": Variant(
                    lambda p, *a, n=network: n(p).encoder.pos_conv_embed(*a), (params, hidden_frames, mask)
                ),
                whole: Variant(layers, (params, hidden_frames, mask)),
                "attention": Variant(attend, (q, k, v, mask)),
            },
            gflop,
        )


def features() -> None:
    for name in ("hubert-large", "hubert-base"):
        config, params = encoder(name)
        variants = {}
        for frames in (16, 64, 256, 16 * 1024, 1 << 20):
            member = Wav2Vec2Encoder(config, sized(frames=frames))
            extract = lambda p, a, n, member=member: member.network(p).feature_extractor(a, n)  # noqa: E731
            label = f"{frames} frames" if frames < 1 << 20 else "all frames"
            variants[label + in_use(frames, PLATFORM.frames)] = Variant(extract, (params, *audio(4, 4)))
        measure(f"Feature encoder of {name}, 4 x 4 s: frames in a block, of all clips", variants)


def gradient() -> None:
    config, params = encoder("hubert-base", 1)
    for clips, seconds in ((1, 0.5), (4, 0.5)):  # by XLA's convolutions a longer one takes minutes on a CPU
        variants = {}
        for taps, name in ((False, "convolutions"), (True, "a product for each tap")):
            member = Wav2Vec2Encoder(config, sized(kernel_gradient_by_taps=taps))
            loss = lambda p, *a, n=member.network: jnp.square(n(p).feature_extractor(*a)[0]).sum()  # noqa: E731
            mark = in_use(taps, PLATFORM.kernel_gradient_by_taps)
            variants[f"by kernels: {name}{mark}"] = Variant(jax.grad(loss), (params, *audio(clips, seconds)))
        measure(f"Gradient of hubert-base's feature encoder, {clips} x {seconds} s", variants)


def hidden(config: Wav2Vec2Config, clips: int, frames: int) -> tuple[jax.Array, jax.Array]:
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
            attend = functools.partial(blocks.blockwise_attention, score_bytes=size << 20)
            mark = in_use(size << 20, PLATFORM.scores)
            variants[f"{size} MiB of scores at once{mark}"] = Variant(attend, (q, k, v, mask))
        measure(f"Attention of 16 heads of 64, {clips} x {frames} frames", variants)


def long_attention() -> None:
    frames = 29_999  # ten minutes
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, frames, 1, 64)), jnp.float32) for _ in range(3))
    mask = frame_mask(jnp.full(1, frames), frames)

    def with_sizes(queries: int, keys: int) -> Callable[..., Any]:
        def traced(*arguments: Any) -> Any:
            before = blocks.QUERIES_AT_ONCE, blocks.KEYS_AT_ONCE
            blocks.QUERIES_AT_ONCE, blocks.KEYS_AT_ONCE = queries, keys
            try:
                return functools.partial(blocks.attention, platform=PLATFORM)(*arguments)
            finally:
                blocks.QUERIES_AT_ONCE, blocks.KEYS_AT_ONCE = before

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
    network = Wav2Vec2Encoder(config, Options(platform=PLATFORM)).network
    prefix = "encoder.layers."
    names = sorted({name.split(".", 3)[3] for name in params if name.startswith(prefix)})
    stacked = {
        name: jnp.stack([params[f"{prefix}{i}.{name}"] for i in range(config.num_hidden_layers)]) for name in names
    }

    def unrolled(params: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        return weighted_sum(network(params).encoder(x, mask), weights)

    def scanned(params: Any, stacked: Any, x: jax.Array, mask: jax.Array, unroll: int) -> jax.Array:
        def layer(carry: tuple[jax.Array, jax.Array], own: Any) -> Any:
            x, total = carry
            mine = params | {f"{prefix}0.{name}": array for name, array in own.items()}
            x = network(mine).encoder.layers[0](x, mask)
            return (x, total + x * weights[0]), None

        encoder = network(params).encoder
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
        "x (1 + erf) / 2 (in use)": Variant(gelu, (x,)),
        "jax.nn.gelu(approximate=False)": Variant(functools.partial(jax.nn.gelu, approximate=False), (x,)),
        "jax.nn.gelu(approximate=True)": Variant(functools.partial(jax.nn.gelu, approximate=True), (x,)),
    }
    measure("GELU of 796 x 5120", variants)


def pitch() -> None:
    for capacity in ("full", "tiny"):
        variants = {}
        for spectral, frames in ((False, 64), (True, 16), (True, 64), (True, 256)):
            member = CrepeEncoder(CrepeConfig(capacity), sized(spectral_crepe=spectral, crepe_frames=frames))
            params = member.init(jax.random.key(0))
            name = f"{'frequency domain' if spectral else 'direct'}, {frames} frames at once"
            mark = in_use(frames, PLATFORM.crepe_frames) if spectral == PLATFORM.spectral_crepe else ""
            held = {**params, **member.derive(params)}
            variants[name + mark] = Variant(member.__call__, (held, *audio(4, 4)))
        measure(f"CREPE {capacity}, 4 x 4 s", variants)


def spectrograms() -> None:
    for clips, seconds in ((4, 4), (1, 30)):
        variants = {}
        for taps, name in ((False, "a convolution in groups"), (True, "a sum over taps")):
            member = EfficientNetEncoder(EfficientNetConfig(), sized(depthwise_by_taps=taps))
            params, mark = member.init(jax.random.key(0)), in_use(taps, PLATFORM.depthwise_by_taps)
            variants[f"of each channel: {name}{mark}"] = Variant(member.__call__, (params, *audio(clips, seconds)))
        measure(f"EfficientNet-B2, {clips} x {seconds} s", variants)
        member = PannsEncoder(PannsConfig(), Options())
        arguments = member.init(jax.random.key(0)), *audio(clips, 2 * seconds)  # of samples, at twice the rate
        variants = {}
        for least in (0, 1, 4, 8, 16):
            variants[f"{least} halos{in_use(least, convnets.LEAST_OF_HALO)}"] = Variant(halos(member, least), arguments)
        measure(f"CNN14 of PANNs, {clips} x {seconds} s: columns in a block of a clip, at least", variants)


def halos(member: PannsEncoder, least: int) -> Callable[..., Any]:
    """The encoder with other blocks."""

    def traced(*arguments: Any) -> Any:
        used, convnets.LEAST_OF_HALO = convnets.LEAST_OF_HALO, least
        try:
            return member(*arguments)
        finally:
            convnets.LEAST_OF_HALO = used

    return traced


CHOICES = {
    f.__name__: f
    for f in (
        *(parts, features, gradient, attention, long_attention, transformer, projections, activation, pitch),
        spectrograms,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choices", nargs="*", metavar="CHOICE", help=", ".join(CHOICES))
    chosen = parser.parse_args().choices or list(CHOICES)
    about = machine()
    print(f"{about['date']}; {about['machine']}; jax {about['versions']['jax']}; medians of {ROUNDS}")
    for name in chosen:
        CHOICES[name]()


if __name__ == "__main__":
    main()
