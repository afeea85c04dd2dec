"""Compiled for accelerators by their own compilers: what the programs hold and cost, and what is said of them."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from conftest import CACHE
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from toy import Toy, write_clips

from gura_jax import SYSTEMS, Member, System, cli, targets
from gura_jax.backend import PLATFORMS
from gura_jax.compiling import Compiled, Program, Report, compile_report, describe, device_hours, most_clips
from gura_jax.counting import count_work, find_instructions
from gura_jax.fusion import fuse
from gura_jax.loading import Size, outline
from gura_jax.parallel import Compilation, batch_program
from gura_jax.systems import PUBLISHED
from gura_jax.targets import DEVICES, Target, parse_target

RATE = 16_000
V5E, H100 = "tpu:v5e:2x2", "gpu:h100"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu here: pip install 'gura-jax[tpu]'"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="no CUDA plugin here: run make test-gpu"
)
# A small encoder of each kind; the blocks of all others are these.
KINDS = ("hubert_base", "beats", "crepe-tiny")
# The paper's, and of other encoders one each: the mean of the layers is computed alike for all.
DISTINCT = [name for name in SYSTEMS if name in PUBLISHED or not name.startswith("fusion_")]
TOY = System("toy", (Member(Toy(), name="toy"),))


def program(
    system: str | System, target: str = V5E, *, size: Size | None = "tiny", dtype: Any = "bfloat16", **options: Any
) -> Program:
    parsed = parse_target(target)
    return Program(outline(system, size=size, dtype=dtype, devices=parsed.devices()), parsed, **options)


@functools.cache
def compiled(system: str, target: str = V5E) -> Compiled:
    """Two clips of a second a device."""
    found = program(system, target).compile(2, RATE)
    assert found is not None
    return found


def compiled_text(function: Any, target: Target, *shapes: tuple[int, ...], devices: int = 4) -> str:
    """A function of float32 arrays that are sharded on their first axis."""
    mesh = Mesh(np.asarray(target.devices()[:devices]), ("data",))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharded) for shape in shapes]
    with target.compiling() as options:
        text = jax.jit(function).lower(*arguments).compile(options).as_text()
    assert text is not None
    return text


# What a traced function computes


def counted(function: Any, *arguments: Any) -> Any:
    return count_work(jax.make_jaxpr(function)(*arguments))


def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


def test_flops_of_products() -> None:
    work = counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), zeros(5, 2, 3), zeros(5, 3, 4))
    assert work == ({"float32": 2 * 5 * 2 * 3 * 4}, 0, 0)
    half = zeros(2, 3, dtype=jnp.bfloat16)
    assert counted(lambda a, b: a @ b.T, half, half).flops == {"bfloat16": 2 * 2 * 3 * 2}
    mixed = counted(lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ()))), half, zeros(2, 3))
    assert mixed.flops == {"float32": 2 * 2 * 3 * 2}


@pytest.mark.parametrize("groups", [1, 2])
def test_flops_of_convolutions_and_their_gradients(groups: int) -> None:
    """Each gradient multiplies every pair of a sample and a weight that the convolution does."""
    batch, channels, features, kernel, stride, length = 3, 4, 6, 5, 2, 21

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        dims = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(
            x, w, (stride,), "VALID", dimension_numbers=dims, feature_group_count=groups
        )

    x, w = zeros(batch, length, channels), zeros(kernel, channels // groups, features)
    frames = 1 + (length - kernel) // stride
    products = batch * frames * features * kernel * channels // groups
    assert counted(convolve, x, w).flops == {"float32": 2 * products}
    by_weights = counted(jax.grad(lambda w: convolve(x, w).sum()), w).flops["float32"]
    assert by_weights == pytest.approx(2 * 2 * products, rel=1e-9)  # with the convolution itself
    by_samples = counted(jax.vjp(lambda x: convolve(x, w), x)[1], zeros(batch, frames, features)).flops["float32"]
    # Frames past the ends are multiplied too.
    assert 2 * products <= by_samples <= 2 * products * length / stride / frames


def test_flops_in_loops_and_branches() -> None:
    x = zeros(4, 4)
    one = 2 * 4**3
    assert counted(lambda x: jax.lax.fori_loop(0, 7, lambda i, y: y @ y, x), x).flops == {"float32": 7 * one}
    nested = counted(
        lambda x: jax.lax.map(
            lambda _: jax.jit(lambda y: jax.lax.fori_loop(0, 3, lambda i, y: y @ y, y))(x),
            jnp.arange(5, dtype=jnp.int32),
        ),
        x,
    )
    assert nested.flops == {"float32": 15 * one}
    branch = counted(lambda n, x: jax.lax.cond(n, lambda x: x @ x @ x, lambda x: x @ x, x), jnp.asarray(True), x)
    assert branch.flops == {"float32": one}
    unknown = counted(
        lambda n, x: jax.lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] @ c[1]), (n, x)),
        jnp.asarray(3, jnp.int32),
        x,
    )
    assert unknown == ({"float32": one}, 0, 1)
    rematerialised = counted(jax.grad(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ x) @ x).sum())), x)
    assert (
        rematerialised.flops["float32"]
        > counted(jax.grad(lambda x: jnp.sin(jnp.sin(x @ x) @ x).sum()), x).flops["float32"]
    )


def test_flops_of_all_devices_together() -> None:
    mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
    spec = PartitionSpec("data")
    mapped = jax.shard_map(lambda x: jnp.einsum("bij,bjk->bik", x, x), mesh=mesh, in_specs=spec, out_specs=spec)
    x = zeros(16, 4, 4)
    assert counted(mapped, x).flops == counted(lambda x: jnp.einsum("bij,bjk->bik", x, x), x).flops


def test_flops_of_a_kernel_with_a_grid() -> None:
    from jax.experimental import pallas

    def kernel(x: Any, out: Any) -> None:
        out[...] = x[...] @ x[...]

    def call(x: jax.Array) -> jax.Array:
        spec = pallas.BlockSpec((8, 8), lambda i: (i, 0))
        return pallas.pallas_call(kernel, x, grid=(6,), in_specs=[spec], out_specs=spec, interpret=True)(x)

    assert counted(call, zeros(48, 8)).flops == {"float32": 6 * 2 * 8**3}


# What a compiled program's text holds


@needs_libtpu
def test_collectives_and_float32_products_are_found() -> None:
    def function(x: jax.Array) -> jax.Array:
        return jnp.einsum("bi,bj->ij", x, x, precision="highest")

    found = find_instructions(compiled_text(function, parse_target(V5E), (8, 256)))
    assert found.collectives == {"all-reduce": 1}
    assert sum(found.float32_products.values()) >= 1
    assert all("dot_general" in source for source in found.float32_products)
    alone = find_instructions(compiled_text(function, parse_target(V5E), (8, 256), devices=1))
    assert not alone.collectives


# The programs of systems


@needs_libtpu
@pytest.mark.parametrize("system", [*KINDS, pytest.param("wavlm_large", marks=pytest.mark.slow)])
def test_embedding_communicates_nothing_and_multiplies_in_bfloat16(system: str) -> None:
    found = compiled(system).found
    assert not found.collectives
    assert all("spectrogram" in product for product in found.float32_products)


@needs_libtpu
@pytest.mark.parametrize(
    "system", [*PUBLISHED, *(pytest.param(name, marks=pytest.mark.slow) for name in DISTINCT if name not in PUBLISHED)]
)
def test_every_system_is_traced_for_a_tpu_with_products_in_bfloat16(system: str) -> None:
    """But the spectrograms'."""
    traced = program(system)
    cost = traced.cost(2, traced.model.sample_rate)
    spectrogram = any({"log-mel", "spectrogram"} & set(m.encoder.parts) for m in traced.model.fusion.members)
    assert set(cost.flops) == ({"bfloat16", "float32"} if spectrogram else {"bfloat16"})
    assert cost.unknown_loops == 0


def test_a_gradient_computes_about_twice_more_and_gives_the_weights_shapes() -> None:
    found = program("hubert_base", "cpu", dtype="float32")
    forward, backward = found.cost(2, RATE), dataclasses.replace(found, gradient=True).cost(2, RATE)
    # A gradient by each operand of each product, and attention's products again.
    assert 2.5 < backward.flops["float32"] / forward.flops["float32"] < 4.5
    weights = 4 * sum(w.size for w in found.model.fusion.members[0].encoder.abstract_params().values())
    assert backward.bytes == 2 * weights + 2 * (4 * RATE + 4)


@pytest.mark.slow
@needs_libtpu
def test_pmap_compiles_for_a_tpu() -> None:
    model = program("hubert_base").model
    mapped = batch_program(
        functools.partial(fuse, model.fusion, frozenset({"scenes"})), Compilation(model.compilation.mesh, "pmap")
    )
    weights = jax.eval_shape(
        lambda: {m.name: m.encoder.prepare(m.encoder.init(jax.random.key(0))) for m in model.fusion.members}
    )
    audio = {RATE: jax.ShapeDtypeStruct((4, 2, RATE), jnp.float32)}
    text = mapped.lower(weights, audio, {RATE: jax.ShapeDtypeStruct((4, 2), jnp.int32)}).compile().as_text()
    assert not find_instructions(text).collectives


LONG = 600  # seconds
# Of the tiny encoder's heads at ten minutes; the whole scores of all heads are 14 GB, see Platform.scores.
SCORES = PLATFORMS["tpu"].scores


def test_scores_of_all_heads_are_nowhere() -> None:
    """Every array of the traced program is far smaller, so the compiler is never asked for them."""
    long = program("hubert_base")
    samples = LONG * long.model.sample_rate
    frames = long.model.num_frames(samples)
    heads = long.model.fusion.members[0].config.num_attention_heads
    sizes = [
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"\[([\d,]+)\]", str(long.trace(1, samples).jaxpr))
    ]
    assert heads * frames**2 > 10 * SCORES // 4  # else it would prove nothing
    assert max(sizes) <= SCORES // 4


# A collection, and clips that do not fit


def with_device(found: Program, **figures: Any) -> Program:
    """The same for a device with other figures."""
    device = dataclasses.replace(found.target.device, **figures)
    return dataclasses.replace(found, target=dataclasses.replace(found.target, device=device))


def toy(target: str = "cpu", **figures: Any) -> Program:
    return with_device(program(TOY, target, size=None, dtype="float32"), **figures)


def test_a_report_counts_what_is_held_and_moved() -> None:
    report = compile_report(toy(), 3, 2.0)
    devices = len(jax.local_devices())
    assert report.compiled is not None
    # Audio and a length for each clip; a scene of three numbers. The toy has no weights.
    assert report.cost == ({}, 3 * (4 * 2 * RATE + 4) + 3 * 3 * 4, 0)
    assert report.compiled.memory.arguments == 3 * (4 * 2 * RATE + 4)
    assert report.compiled.memory.outputs == 3 * 3 * 4
    content = json.loads(json.dumps(report.as_json()))
    assert (content["fits"], content["most_clips"], content["devices"]) == (True, 3, devices)
    assert content["bound_seconds"] is None
    assert "unknown" in describe(report)


def test_the_roofline_is_the_slower_of_products_and_memory() -> None:
    system = program("hubert_base", "cpu", dtype="float32")
    cost = system.cost(2, RATE)
    weights = sum(w.size for w in system.model.fusion.members[0].encoder.abstract_params().values())
    assert cost.bytes == 4 * weights + 2 * (4 * RATE + 4) + 2 * 4 * system.model.scene_embedding_size
    peak = {"bfloat16": 1e12, "float32": 1e11}
    for bandwidth, bound in ((1e15, cost.flops["float32"] / 1e11), (1e3, cost.bytes / 1e3)):
        report = Report(with_device(system, peak=peak, bandwidth=bandwidth), 2, 1.0, cost, None, 0)
        assert cost.bound(report.program.target.device) == pytest.approx(bound)
        assert report.audio_hours == pytest.approx(8 * 2 * 1.0 / bound)
        assert f"{bound:.3g} s a batch" in describe(report)


def test_clips_that_do_not_fit_and_how_many_do() -> None:
    one = toy().compile(1, RATE)
    assert one is not None
    report = compile_report(toy(memory=20 * one.memory.total), 64, 1.0)
    assert report.most_clips is not None
    assert 10 < report.most_clips < 64
    fits = toy().compile(report.most_clips, RATE)
    assert fits is not None
    assert fits.memory.total <= 20 * one.memory.total
    assert f"does not fit; clips that do: {report.most_clips}" in describe(report)


@needs_libtpu
def test_the_compiler_runs_out_of_the_devices_memory() -> None:
    found = toy("tpu:v5e:1x1")
    assert found.compile(200, 3600 * RATE) is None


@pytest.mark.parametrize("first", [0, 7, 1000])
@pytest.mark.parametrize("each", [1, 13])
@pytest.mark.parametrize("known", [True, False])
def test_most_clips_along_a_line(first: int, each: int, known: bool) -> None:
    memory = first + 41 * each + each // 2

    def size(clips: int) -> int | None:
        total = first + each * clips
        return total if known or total <= memory else None

    assert most_clips(size, memory, 64) == 41
    assert most_clips(size, memory, 42) == 41
    assert most_clips(size, first + each - 1, 64) == 0


def test_most_clips_of_steps_fit() -> None:
    """Blocks make sizes that are no line: the answer still fits."""
    asked: list[int] = []

    def size(clips: int) -> int:
        asked.append(clips)
        return 100 * (clips // 8) + clips

    found = most_clips(size, 350, 64)
    assert size(found) <= 350 < size(found + 8)
    assert len(asked) <= 7


# The command line


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
    """Run gura-jax in this process, and check how it ends."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ[CACHE])
    monkeypatch.setattr(sys, "argv", ["gura-jax", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0) == code


def test_compile_prints_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SYSTEMS, "toy", TOY)
    arguments = ("compile", "toy", "--target", "cpu", "--clips", 2, "--seconds", 1.5, "--timestamps")
    run(*arguments, monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    assert "frames and scenes of toy in float32, for cpu" in text
    assert "2 clips of 1.5 s a device" in text
    run(*arguments, "--json", monkeypatch=monkeypatch)
    content = json.loads(capsys.readouterr().out)
    assert (content["system"], content["clips"], content["wanted"]) == ("toy", 2, ["frames", "scenes"])


def test_compile_ends_with_1_where_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SYSTEMS, "toy", TOY)
    machine = parse_target("cpu").device
    monkeypatch.setattr(targets, "_this_machine", lambda: dataclasses.replace(machine, memory=4 * 2 * RATE))
    run("compile", "toy", "--target", "cpu", "--seconds", 1, "--clips", 3, monkeypatch=monkeypatch, code=1)
    assert "does not fit; clips that do: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--target", "tpu:v5e"], ["expected tpu:v5e:TOPOLOGY"]),
        (["--target", "cpu", "--seconds", "nan"], ["expected clips of", "found nan s"]),
        (["--target", "cpu", "--seconds", "0.001"], ["expected clips of", "found 0.001 s"]),
        (["--target", "cpu", "--seconds", "1e9"], ["expected clips of", "found 1e+09 s"]),
    ],
)
def test_compile_refuses(
    arguments: list[str], fragments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SYSTEMS, "toy", TOY)
    run("compile", "toy", *arguments, monkeypatch=monkeypatch, code=1)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(fragment in error for fragment in fragments), error


def test_a_collection_takes_the_sum_of_its_batches() -> None:
    found = with_device(program("hubert_base", "cpu"), peak={"bfloat16": 1e9, "float32": 1e9}, bandwidth=1e9)
    columns = {"batch": [0, 0, 1, 2, -1], "rows": [16, 16, 16, 8, 0], "padded": [RATE, RATE, RATE, 2 * RATE, 0]}
    each = [found.cost(clips, samples).bound(found.target.device) for clips, samples in ((2, RATE), (1, 2 * RATE))]
    assert None not in each
    hours = 8 * (2 * (each[0] or 0) + (each[1] or 0)) / 3600
    assert device_hours(found, pa.table(columns)) == pytest.approx(hours)
    assert device_hours(toy(), pa.table(columns)) is None


@needs_libtpu
def test_embed_plans_for_a_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clips(tmp_path / "clips", [1, 2, 3])
    arguments = ("embed", tmp_path / "clips", "--system", "hubert_base", "--size", "tiny", "--out", tmp_path / "out")
    run(*arguments, "--dry-run", "--target", V5E, "--dtype", "bfloat16", monkeypatch=monkeypatch)
    hours = re.search(rf"at least (\S+) hours of {V5E}", capsys.readouterr().out)
    assert hours is not None
    assert 0 < float(hours[1]) < 1e-6  # seconds of audio, microseconds of four chips
    run(*arguments, "--target", V5E, monkeypatch=monkeypatch, code=1)
    assert "expected --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Full size: make test-tpu, make test-gpu

CLIPS, SECONDS = 16, 10
TEMPORARIES = {V5E: 0.8e9, H100: 0.8e9}  # bytes a device; seen: at most 0.61e9 and 0.67e9
LONG_TEMPORARIES = 2.5e9  # of ten minutes: a clip's own size, not its square


@functools.cache
def whole(system: str, target: str) -> tuple[Program, Compiled]:
    found = program(system, target, size=None)
    result = found.compile(CLIPS, SECONDS * found.model.sample_rate)
    assert result is not None
    return found, result


def check_whole(system: str, target: str) -> None:
    _, found = whole(system, target)
    arguments, _, temporaries, _ = found.memory
    print(f"| `{system}` | {found.seconds:.0f} | {arguments / 1e9:.2f} | {temporaries / 1e9:.2f} |")
    assert not found.found.collectives
    assert all("spectrogram" in product for product in found.found.float32_products)
    assert found.memory.temporaries < TEMPORARIES[target]
    assert found.memory.total < DEVICES[target.split(":")[1]].memory


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("system", DISTINCT)
def test_every_system_compiles_for_a_tpu(system: str) -> None:
    check_whole(system, V5E)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("system", DISTINCT)
def test_every_system_compiles_for_a_gpu(system: str) -> None:
    check_whole(system, H100)


@pytest.mark.gpu
@needs_cuda
def test_a_gpu_runs_one_fused_attention_a_layer() -> None:
    found, result = whole("fusion_cat_xwc", H100)
    layers = sum(max(0, member.encoder.num_states - 1) for member in found.model.fusion.members)
    traced = found.trace(CLIPS, SECONDS * RATE).jaxpr
    assert count_work(traced).fused_attentions == layers == 72
    assert result.found.fused_attentions == 2  # in the loops over the layers of two encoders


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("target", ["gpu:a100", "gpu:h100", "gpu:h200"])
def test_gradients_compile_for_a_gpu(target: str) -> None:
    found = program("hubert_base", target, size=None, gradient=True).compile(1, SECONDS * RATE)
    assert found is not None
    assert found.found.fused_attentions == 2  # forward, and backward


@pytest.mark.tpu
@needs_libtpu
def test_gradients_are_added_up_over_a_tpu() -> None:
    found = program("hubert_base", gradient=True).compile(2, RATE)
    assert found is not None
    assert set(found.found.collectives) == {"all-reduce"}


@pytest.mark.tpu
@needs_libtpu
def test_ten_minutes_compile_for_a_tpu() -> None:
    found = program("fusion_cat_xwc", V5E, size=None).compile(1, LONG * RATE)
    assert found is not None
    assert found.memory.temporaries < LONG_TEMPORARIES
