"""Compile a system's function for devices that need not be here, and report what it costs there."""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gura_jax import parallel
from gura_jax.audio import MAX_SECONDS, resampled_length
from gura_jax.counting import Found, count_work, find_instructions
from gura_jax.dataset.run import is_out_of_memory
from gura_jax.errors import AudioError, TargetError
from gura_jax.fusion import Wanted, fuse
from gura_jax.model import Model
from gura_jax.models.encoder import Encoder
from gura_jax.targets import GB, TERA, DeviceKind, Target

if TYPE_CHECKING:
    import pyarrow as pa

TRIES = 5  # programs compiled to find how many clips fit
SPREAD = 4  # times the clips of the first try in the second: far enough apart for a line through both


class Cost(NamedTuple):
    """What a program costs each device at least, counted from shapes.

    Attributes:
        flops: of matrix products and convolutions, by type of their operands.
        bytes: of weights, inputs and results, each moved once.
        unknown_loops: see :class:`gura_jax.counting.Work`.
    """

    flops: Mapping[str, float]
    bytes: int
    unknown_loops: int

    def compute_seconds(self, device: DeviceKind) -> float | None:
        """Time of the products at the device's peak; None where that is unknown."""
        return sum(flops / device.peak[kind] for kind, flops in self.flops.items()) if device.peak else None

    def memory_seconds(self, device: DeviceKind) -> float | None:
        """Time to move the bytes at the device's bandwidth; None where that is unknown."""
        return self.bytes / device.bandwidth if device.bandwidth else None

    def bound(self, device: DeviceKind) -> float | None:
        """Seconds that no such program can be faster than on the device; None where its peaks are unknown."""
        compute, memory = self.compute_seconds(device), self.memory_seconds(device)
        return None if compute is None or memory is None else max(compute, memory)


class Memory(NamedTuple):
    """Memory of a compiled program on each device, in bytes."""

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self)


class Compiled(NamedTuple):
    """What is known of a compiled program; ``seconds`` is how long compiling took."""

    seconds: float
    memory: Memory
    found: Found
    text: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A system's function as :class:`Model` compiles it, of weights that need not be there.

    Attributes:
        model: from :func:`gura_jax.loading.outline`, on the target's devices.
        target: those devices.
        wanted: results.
        gradient: in their place, of the mean square of the frames, or of the scenes where no frames are wanted, by all
            weights.
    """

    model: Model
    target: Target
    wanted: frozenset[Wanted] = frozenset({"scenes"})
    gradient: bool = False

    def trace(self, clips: int, samples: int) -> jax.stages.Traced:
        """Trace for ``clips`` on each device, of so many samples at the model's rate."""
        with self.target.compiling():
            return self._function.trace(*self._arguments(clips, samples))

    def cost(self, clips: int, samples: int) -> Cost:
        """Count the cost for ``clips`` on each device, of so many samples at the model's rate."""
        devices = self.model.compilation.mesh.size
        traced = self.trace(clips, samples)
        weights, *batch = self._arguments(clips, samples)
        work = count_work(traced.jaxpr)
        held = _bytes_on_device(weights)
        results = held if self.gradient else _bytes(traced.out_info) // devices
        flops = {kind: total / devices for kind, total in work.flops.items()}
        return Cost(flops, held + _bytes_on_device(batch) + results, work.unknown_loops)

    def compile(self, clips: int, samples: int) -> Compiled | None:
        """Compile for ``clips`` on each device, of so many samples; None where its compiler runs out of its memory.

        Raises:
            TargetError: the compiler fails in another way.
        """
        traced = self.trace(clips, samples)
        start = time.perf_counter()
        with self.target.compiling() as options:
            try:
                compiled = traced.lower().compile(options)
            except jax.errors.JaxRuntimeError as error:
                if is_out_of_memory(error) and "hbm" in str(error).lower():  # not of a core's own, small memory
                    return None
                raise TargetError(f"the compiler of {self.target.name} fails: {error}") from None
        seconds = time.perf_counter() - start
        sizes, text = compiled.memory_analysis(), compiled.as_text()
        assert sizes is not None
        assert text is not None
        memory = Memory(
            sizes.argument_size_in_bytes,
            sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
            sizes.temp_size_in_bytes,
            sizes.generated_code_size_in_bytes,
        )
        return Compiled(seconds, memory, find_instructions(text), text)

    @functools.cached_property
    def _function(self) -> Any:
        """One object, as JAX traces the same function for the same shapes but once."""
        program = parallel.batch_program(
            functools.partial(fuse, self.model.fusion, self.wanted), self.model.compilation
        )
        if not self.gradient:
            return program

        def loss(params: Any, audio: parallel.ByRate, lengths: parallel.ByRate) -> jax.Array:
            out = program(params, audio, lengths)
            return jnp.square(out.scenes if out.frames is None else out.frames).mean()

        return jax.jit(jax.grad(loss))

    def _arguments(self, clips: int, samples: int) -> tuple[Any, Any, Any]:
        """Shapes of weights, audio and lengths, where they are placed."""
        mesh = self.model.compilation.mesh
        batch = NamedSharding(mesh, PartitionSpec("data"))
        rows = clips * mesh.size
        audio, lengths = {}, {}
        for rate in self.model.rates:
            width = resampled_length(samples, self.model.sample_rate, rate)
            audio[rate] = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=batch)
            lengths[rate] = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=batch)
        return self._weights, audio, lengths

    @functools.cached_property
    def _weights(self) -> Mapping[str, Any]:
        """Shapes of the weights of each member, where they are placed."""
        return {member.name: self._held(member.encoder) for member in self.model.fusion.members}

    def _held(self, encoder: Encoder) -> Any:
        """Shapes of an encoder's weights as they are held; for inference, with what is derived from them."""
        mesh, shard = self.model.compilation.mesh, self.model.compilation.shard
        held = jax.eval_shape(encoder.prepare, encoder.abstract_params())
        derived = {} if self.gradient else jax.eval_shape(encoder.derive, held)
        shardings = parallel.weight_shardings(encoder, held, mesh, shard)
        shardings |= dict.fromkeys(derived, parallel.replicated(mesh))
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            for name, leaf in {**held, **derived}.items()
        }


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes_on_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Report(NamedTuple):
    """A system on a target; figures are of each device but for ``audio_hours``.

    Attributes:
        compiled: None where the compiler ran out of the device's memory.
        most_clips: that fit, see :func:`most_clips`; None where ``clips`` do.
    """

    program: Program
    clips: int
    seconds: float
    cost: Cost
    compiled: Compiled | None
    most_clips: int | None

    @property
    def audio_hours(self) -> float | None:
        """Hours of audio that all devices together can embed in an hour, at most; None: their peaks are unknown."""
        bound = self.cost.bound(self.program.target.device)
        return self.program.model.compilation.mesh.size * self.clips * self.seconds / bound if bound else None

    def as_json(self) -> dict[str, Any]:
        """The report as JSON has it: times in seconds, sizes in bytes."""
        model, target = self.program.model, self.program.target
        device, compiled = target.device, self.compiled
        return {
            "system": model.system.name,
            "target": target.name,
            "devices": model.compilation.mesh.size,
            "dtype": model.dtype,
            "clips": self.clips,
            "seconds": self.seconds,
            "wanted": sorted(self.program.wanted),
            "gradient": self.program.gradient,
            "device": {
                "peak_flops": dict(device.peak),
                "bandwidth": device.bandwidth,
                "memory": device.memory,
                "source": device.source,
            },
            "compile_seconds": compiled and compiled.seconds,
            "memory": compiled and compiled.memory._asdict() | {"total": compiled.memory.total},
            "fits": self.most_clips is None,
            "most_clips": self.clips if self.most_clips is None else self.most_clips,
            "flops": dict(self.cost.flops),
            "bytes": self.cost.bytes,
            "unknown_loops": self.cost.unknown_loops,
            "compute_seconds": self.cost.compute_seconds(device),
            "memory_seconds": self.cost.memory_seconds(device),
            "bound_seconds": self.cost.bound(device),
            "audio_hours_per_hour": self.audio_hours,
            "found": compiled and compiled.found._asdict(),
        }


def compile_report(program: Program, clips: int, seconds: float) -> Report:
    """Compile a program for ``clips`` of so many seconds on each device, and report on it.

    Raises:
        AudioError: clips that are too short.
        TargetError: the compiler fails.
    """
    model, memory = program.model, program.target.device.memory
    shortest = model.shortest(frames=True, scenes=True) / model.sample_rate
    if not shortest <= seconds <= MAX_SECONDS:
        raise AudioError(
            f"expected clips of {shortest:g} to {MAX_SECONDS:g} s for {model.system.name}, found {seconds:g} s"
        )
    samples = round(seconds * model.sample_rate)
    compiled = program.compile(clips, samples)
    most = None
    if compiled is None or compiled.memory.total > memory:

        def size(fewer: int) -> int | None:
            found = program.compile(fewer, samples)
            return found and found.memory.total

        most = most_clips(size, memory, clips)
    return Report(program, clips, seconds, program.cost(clips, samples), compiled, most)


def most_clips(size: Callable[[int], int | None], memory: int, too_many: int) -> int:
    """Find how many clips fit, along lines through the sizes seen; the answer was seen to fit.

    Args:
        size: bytes for a number of clips; None: too many to tell.
        memory: bytes that there are.
        too_many: clips that do not fit.
    """
    sizes: dict[int, int] = {}
    fits, guess = 0, 1
    for _ in range(TRIES):
        found = size(guess)
        if found is not None:
            sizes[guess] = found
        if found is not None and found <= memory:
            fits = guess
        else:
            too_many = guess
        if too_many - fits <= 1:
            break
        guess = SPREAD * fits
        if len(sizes) > 1:
            a, b = sorted(sizes)[-2:]
            step = max(1, (sizes[b] - sizes[a]) / (b - a))
            guess = int(a + (memory - sizes[a]) / step)
        guess = min(max(guess, fits + 1), too_many - 1)
    return fits


def device_hours(program: Program, plan: "pa.Table") -> float | None:
    """Hours of all devices together that a collection takes at least, from the shapes of its batches.

    Args:
        program: on the devices that the plan was made for.
        plan: as from :func:`gura_jax.dataset.table.plan_table`.

    Returns:
        None where the peak of the devices is unknown.
    """
    devices = program.model.compilation.mesh.size
    columns = (plan[name].to_pylist() for name in ("batch", "rows", "padded"))
    batches = {batch: shape for batch, *shape in zip(*columns, strict=True) if batch >= 0}
    seconds = 0.0
    for (rows, samples), count in collections.Counter(map(tuple, batches.values())).items():
        bound = program.cost(-(-rows // devices), samples).bound(program.target.device)
        if bound is None:
            return None
        seconds += count * bound
    return devices * seconds / 3600


def describe(report: Report) -> str:
    """The report as lines of text."""
    program, cost, compiled = report.program, report.cost, report.compiled
    model, device, devices = program.model, program.target.device, program.model.compilation.mesh.size
    what = ("gradient of " if program.gradient else "") + " and ".join(sorted(program.wanted))
    rows = [
        ("program", f"{what} of {model.system.name} in {model.dtype}, for {program.target.name}"),
        ("batch", f"{report.clips} clips of {report.seconds:g} s a device; devices: {devices}"),
    ]
    if compiled is None:
        rows.append(("memory", f"the compiler ran out of the {device.memory / GB:.3g} GB of a device"))
    else:
        kinds = ", ".join(f"{kind} {size / GB:.3g}" for kind, size in compiled.memory._asdict().items())
        rows.append(("compiled", f"in {compiled.seconds:.1f} s"))
        total = f"{compiled.memory.total / GB:.3g} of the {device.memory / GB:.3g} GB of a device"
        rows.append(("memory", f"{total}: {kinds}"))
    if report.most_clips is not None:
        rows.append(("", f"does not fit; clips that do: {report.most_clips}"))
    flops = ", ".join(f"{count / 1e9:.4g} GFLOP in {kind}" for kind, count in cost.flops.items())
    rows.append(("products", flops or "none"))
    if cost.unknown_loops:
        rows.append(("", f"and more in {cost.unknown_loops} loops whose length depends on data, counted once"))
    rows.append(("moved", f"{cost.bytes / GB:.3g} GB at least: weights, inputs and results, once each"))
    compute, memory, hours = cost.compute_seconds(device), cost.memory_seconds(device), report.audio_hours
    if compute is None or memory is None or hours is None:
        rows.append(("bound", f"unknown, as the peak of {device.source} is"))
    else:
        peaks = ", ".join(f"{device.peak[kind] / TERA:.4g} TFLOP/s in {kind}" for kind in cost.flops)
        rows += [
            ("bound", f"{max(compute, memory):.3g} s a batch"),
            ("", f"products {compute:.3g} s at {peaks}"),
            ("", f"memory {memory:.3g} s at {cost.bytes / memory / GB:.4g} GB/s"),
            ("", f"from {device.source}"),
            ("speed", f"{hours:.4g} hours of audio an hour at most, by all devices"),
        ]
    if compiled is not None:
        found = compiled.found
        collectives = ", ".join(f"{count} {kind}" for kind, count in found.collectives.items())
        rows += [
            ("collectives", collectives or "none"),
            ("attention", f"{found.fused_attentions} fused, where the body of a loop counts once"),
            ("float32", f"{sum(found.float32_products.values())} products and convolutions"),
        ]
        if model.dtype != "float32":
            rows += [("", f"{count} x {source}") for source, count in found.float32_products.items()]
    return "\n".join(f"{name:12} {text}" for name, text in rows)
