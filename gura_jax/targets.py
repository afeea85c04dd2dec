"""Devices to compile for, present or not: their published figures, and what their compilers are told of them.

The only module that uses JAX's private interface, for GPUs that are not here.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import jax

from gura_jax.backend import PlatformName
from gura_jax.errors import TargetError, expected

GB, GIB, TERA = 10**9, 1 << 30, 10**12


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """A kind of device.

    Attributes:
        name: as targets have it.
        platform: its row in :mod:`gura_jax.backend`.
        peak: FLOP/s of matrix products by type of their operands; empty: unknown. Float32 is in full precision.
        bandwidth: of its memory, in bytes/s; None: unknown.
        memory: in bytes.
        source: of these figures.
        compiler: what its compiler must be told, beside the name.
        axes: of the topologies that it comes in; 0: one device by itself.
        chips: of the largest topology.
    """

    name: str
    platform: PlatformName
    peak: Mapping[str, float]
    bandwidth: float | None
    memory: int
    source: str
    compiler: Mapping[str, Any]
    axes: int = 0
    chips: int = 1


def _tpu(
    name: str, bfloat16: float, bandwidth: float, memory: int, axes: int, chips: int, **compiler: Any
) -> DeviceKind:
    # A float32 product in full precision is six in bfloat16.
    peak = {"bfloat16": bfloat16 * TERA, "float32": bfloat16 * TERA / 6}
    source = f"cloud.google.com/tpu/docs/{name}; float32: a sixth of bfloat16"
    return DeviceKind(name, "tpu", peak, bandwidth * GB, memory * GIB, source, compiler, axes, chips)


def _gpu(name: str, bfloat16: float, float32: float, bandwidth: float, memory: int, **compiler: Any) -> DeviceKind:
    peak = {"bfloat16": bfloat16 * TERA, "float32": float32 * TERA}
    source = f"NVIDIA's data sheet of the {name.upper()} (SXM, without sparsity)"
    described = {"memory_bandwidth": int(bandwidth * GB), "device_memory_size": memory * GB} | compiler
    return DeviceKind(name, "gpu", peak, bandwidth * GB, memory * GB, source, described)


_HOPPER = {
    "capability": 9,
    "core_count": 132,
    "fpus_per_core": 128,
    "shared_memory_per_core": 228 << 10,
    "shared_memory_per_block_optin": 227 << 10,
    "l2_cache_size": 50 << 20,
    "clock_rate_ghz": 1.98,
}
_AMPERE = {
    "capability": 8,
    "core_count": 108,
    "fpus_per_core": 64,
    "shared_memory_per_core": 164 << 10,
    "shared_memory_per_block_optin": 163 << 10,
    "l2_cache_size": 40 << 20,
    "clock_rate_ghz": 1.41,
}

_ROWS = (
    # TFLOP/s, GB/s, GB, axes and chips; "megacore": the two cores of a chip are one device
    _tpu("v4", 275, 1228, 32, 3, 4096, chip_config_name="megacore"),
    _tpu("v5e", 197, 819, 16, 2, 256),
    _tpu("v5p", 459, 2765, 95, 3, 8960, chip_config_name="megacore"),
    _tpu("v6e", 918, 1640, 32, 2, 256),
    _gpu("a100", 312, 19.5, 2039, 80, **_AMPERE),
    _gpu("h100", 989, 67, 3350, 80, **_HOPPER),
    _gpu("h200", 989, 67, 4800, 141, **_HOPPER),
)
DEVICES: Mapping[str, DeviceKind] = {row.name: row for row in _ROWS}

KNOWN_JAX = "0.10"  # whose private interface compiling for a GPU was made for
_HOST_BOUNDS = (2, 2, 1)  # chips of a TPU host along each axis, at most
_TPU_ENVIRONMENT = {
    # Without them the compiler looks for the machine that it is on, writes logs, and is one process's alone.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Of every GPU of the table.
_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
  cuda_compute_capability {{ major: {capability} }}
  {fields}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
runtime_version {{ major: {cuda[0]} minor: {cuda[1]} }}
device_description_str: "NVIDIA {name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: as given.
        device: their kind.
        topology: of a TPU's chips, such as ``2x2``; empty for others.
    """

    name: str
    device: DeviceKind
    topology: str = ""

    def devices(self) -> list[Any]:
        """The devices as JAX has them, for a mesh; those of a GPU or TPU need not be here, and only compile.

        Raises:
            TargetError: their compiler is missing, or of another version; or the topology is not one of theirs.
        """
        return _DEVICES_OF[self.device.platform](self)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[dict[str, Any]]:
        """Lower and compile for the devices in this context, with these options of the compiler.

        Compiled programs are not cached: one for a device that is not here cannot be read again.
        """
        from jax.experimental.compilation_cache import compilation_cache

        before = jax.config.values["jax_enable_compilation_cache"]
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # else JAX goes on as it found the setting first
        try:
            if self.device.platform == "gpu":
                with _gpu_is_cuda():
                    yield {"xla_gpu_autotune_level": 0}  # nothing here to try kernels on
            else:
                yield {}
        finally:
            jax.config.update("jax_enable_compilation_cache", before)
            compilation_cache.reset_cache()


def parse_target(text: str) -> Target:
    """Read a target: ``tpu:NAME:TOPOLOGY`` such as ``tpu:v5e:2x2``, ``gpu:NAME`` such as ``gpu:h100``, or ``cpu``.

    Raises:
        TargetError: it is none of these, or its name is not in :data:`DEVICES`.
    """
    platform, *rest = text.split(":")
    if text == "cpu":
        return Target(text, _this_machine())
    names = [row.name for row in _ROWS if row.platform == platform]
    if not names:
        raise TargetError(f"target: expected tpu:NAME:TOPOLOGY, gpu:NAME or cpu, found {text!r}")
    name, topology = (*rest, "", "")[:2]
    if name not in names:
        raise TargetError(f"target {text!r}: {platform} {expected(name, names)}")
    device = DEVICES[name]
    if not device.axes:
        if len(rest) == 1:
            return Target(text, device)
        raise TargetError(f"target: expected {platform}:{name}, one device, found {text!r}")
    sizes = [int(size) for size in re.findall(r"\d+", topology)]
    if len(rest) != 2 or topology != "x".join(map(str, sizes)) or len(sizes) != device.axes or 0 in sizes:
        example = "x".join("221"[: device.axes])
        raise TargetError(
            f"target: expected {platform}:{name}:TOPOLOGY, such as {platform}:{name}:{example}, found {text!r}"
        )
    if math.prod(sizes) > device.chips:
        raise TargetError(
            f"target {text}: expected at most {device.chips} chips, the largest topology of the {name}, found "
            f"{math.prod(sizes)}"
        )
    return Target(text, device, topology)


def _this_machine() -> DeviceKind:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceKind("cpu", "cpu", {}, None, memory, "this machine", {})


def _cpu_devices(target: Target) -> list[Any]:
    return jax.local_devices(backend="cpu")


def _tpu_devices(target: Target) -> list[Any]:
    from jax.experimental.topologies import get_topology_desc

    _installed("libtpu", "tpu")
    sizes = [int(size) for size in f"{target.topology}x1".split("x")][:3]
    bounds = tuple(min(pair) for pair in zip(sizes, _HOST_BOUNDS, strict=True))
    with _environment(_TPU_ENVIRONMENT):
        try:
            described = get_topology_desc(
                platform="tpu",
                topology_name=f"{target.device.name}:{target.topology}",
                chips_per_host_bounds=bounds,
                **target.device.compiler,
            )
        except jax.errors.JaxRuntimeError as error:
            if "INVALID_ARGUMENT" not in str(error):
                raise TargetError(f"target {target.name}: its compiler fails: {error}") from None
            raise TargetError(
                f"target {target.name}: expected a topology of the {target.device.name}, found {target.topology}: "
                f"{error}"
            ) from None
    return described.devices


def _gpu_devices(target: Target) -> list[Any]:
    from jax.experimental.topologies import get_topology_desc

    _installed("jax-cuda13-plugin", "cuda")
    _check_private_interface()
    fields = dict(target.device.compiler)
    config = _GPU_CONFIG.format(
        capability=fields.pop("capability"),
        fields=" ".join(f"{name}: {value}" for name, value in fields.items()),
        cudnn=_installed("nvidia-cudnn-cu13", "cuda").split("."),
        cuda=_installed("nvidia-cuda-runtime", "cuda").split("."),
        name=target.device.name.upper(),
    )
    return get_topology_desc(platform="cuda", topology="1x1x1", target_config=config).devices


_DEVICES_OF = {"cpu": _cpu_devices, "tpu": _tpu_devices, "gpu": _gpu_devices}


def _installed(package: str, extra: str) -> str:
    """The version of a compiler's package; refuse one that is missing, or is not the one that this JAX is made for."""
    how = f"pip install 'gura-jax[{extra}]'"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise TargetError(f"expected {package}, for compiling, found none: {how}") from None
    needs = {
        match.rstrip(".")
        for line in requires("jax") or ()
        for match in re.findall(rf"^{package}\S*?[=<]=([\d.]+)", line)
    }
    if needs and not any(f"{found}.".startswith(f"{need}.") for need in needs):
        raise TargetError(
            f"expected {package} {' or '.join(sorted(needs))}, which jax {jax.__version__} is made for, found {found}: "
            f"{how}"
        )
    return found


def _check_private_interface() -> None:
    if not f"{jax.__version__}.".startswith(f"{KNOWN_JAX}."):
        raise TargetError(
            f"expected jax {KNOWN_JAX}, whose private interface compiling for a GPU that is not here needs, found "
            f"{jax.__version__}: pip install 'jax[cuda13]=={KNOWN_JAX}.*'"
        )


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, and take them away again."""
    own = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]


@contextlib.contextmanager
def _gpu_is_cuda() -> Iterator[None]:
    """Have JAX take "gpu" for CUDA, which it otherwise asks the devices of this machine (jax issue 23971)."""
    from jax._src import xla_bridge

    original = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda platform: "cuda" if platform == "gpu" else original(platform)
    try:
        yield
    finally:
        xla_bridge.canonicalize_platform = original
