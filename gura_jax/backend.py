"""Platforms: one row each, with every size and form that depends on the hardware; nobody else chooses by it."""

import contextlib
import dataclasses
import os
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from gura_jax.errors import SystemConfigError


@dataclasses.dataclass(frozen=True)
class Platform:
    """How much is computed at once, and in which form; results are the same but for rounding.

    Attributes:
        name: as JAX has it.
        frames: of the wave encoders' convolutions in a block, all clips of a device together; their first layer has
            64 times as many.
        spectra: frames of spectrograms in a block, all clips of a device together.
        scores: bytes of attention scores held at once.
        tokens: in a block of a feed-forward layer.
        scan_layers: transformer blocks are stacked and scanned, not unrolled.
        fused_attention: cuDNN's attention for bfloat16.
        kernel_gradient_by_taps: gradients by the wave encoders' kernels as matrix products; else as XLA's convolutions.
        depthwise_by_taps: two-dimensional convolutions of each channel by itself as sums over taps; else as XLA's.
        spectral_crepe: CREPE's convolutions as products in the frequency domain; else directly.
        crepe_taps: of CREPE's second convolution at a time, and its first without a stride; None: both as they are.
        crepe_frames: in one pass of CREPE.
        batch_seconds: audio computed at once, by a device; with ``share_batch`` by all devices together.
        share_batch: the devices are parts of one processor.
        overhead_seconds: what a batch costs beyond its samples (reading weights, launching kernels), in seconds of
            audio.
        batches_in_flight: batches dispatched before the oldest is collected.
    """

    name: str
    frames: int
    spectra: int
    scores: int
    tokens: int
    scan_layers: bool
    fused_attention: bool
    kernel_gradient_by_taps: bool
    depthwise_by_taps: bool
    spectral_crepe: bool
    crepe_taps: int | None
    crepe_frames: int
    batch_seconds: float
    share_batch: bool
    overhead_seconds: float
    batches_in_flight: int


# A CPU is faster with what fits into its caches (benchmarks/README.md). An accelerator is full with far less than a
# batch: blocks larger than these only hold more, by its compiler's own figures (docs/accelerators.md).
_CPU = Platform(
    name="cpu",
    frames=64,
    spectra=512,
    scores=16 << 20,
    tokens=2048,
    scan_layers=False,  # each step would copy its block's weights: 14 % of a batch of 200 frames
    fused_attention=False,
    kernel_gradient_by_taps=True,
    depthwise_by_taps=True,
    spectral_crepe=True,
    crepe_taps=None,
    crepe_frames=64,
    batch_seconds=32,
    share_batch=True,
    overhead_seconds=0.5,
    batches_in_flight=0,  # the batch at hand has all cores: another one would only take memory
)
_GPU = Platform(
    name="gpu",
    frames=1024,
    spectra=1 << 13,
    scores=1 << 28,
    tokens=1 << 14,
    scan_layers=True,  # compiles one block, and holds one block's temporaries
    fused_attention=True,
    kernel_gradient_by_taps=False,
    depthwise_by_taps=False,
    spectral_crepe=False,
    crepe_taps=None,
    crepe_frames=512,
    batch_seconds=320,
    share_batch=False,
    overhead_seconds=16,
    batches_in_flight=1,
)
_TPU = dataclasses.replace(_GPU, name="tpu", fused_attention=False, crepe_taps=8, crepe_frames=256)

PlatformName = Literal["cpu", "gpu", "tpu"]
PLATFORMS: dict[str, Platform] = {row.name: row for row in (_CPU, _GPU, _TPU)}


def find_platform(name: str) -> Platform:
    """The row of this name.

    Raises:
        SystemConfigError: there is none.
    """
    if name not in PLATFORMS:
        raise SystemConfigError(f"platform: expected one of {', '.join(PLATFORMS)}, found {name!r}")
    return PLATFORMS[name]


def platform_of(devices: Iterable[Any]) -> Platform:
    """The row of these devices.

    Raises:
        SystemConfigError: they are of several platforms, or of one that has no row.
    """
    names = sorted({device.platform for device in devices})
    if len(names) != 1:
        raise SystemConfigError(f"devices: expected those of one platform, found {', '.join(names) or 'none'}")
    return find_platform(names[0])


def describe_devices(devices: Iterable[Any]) -> str:
    """Name devices for people, as in ``2 x NVIDIA H200``; a CPU by its cores and model."""
    kinds = Counter(device.device_kind for device in devices)
    return ", ".join(f"CPU, {processor()}" if kind == "cpu" else f"{count} x {kind}" for kind, count in kinds.items())


def processor() -> str:
    """Name this machine's processor: ``2 cores of AMD EPYC``."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # only Linux has it
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        model = next(names, model)
    return f"{os.cpu_count()} cores of {model}"
