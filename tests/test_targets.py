"""Devices to compile for: their names, their topologies, and compilers that are missing."""

import importlib.metadata
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from refusals import refuses

from gura_jax import targets
from gura_jax.targets import DEVICES, TargetError, parse_target

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu here: pip install 'gura-jax[tpu]'"
)


@pytest.mark.parametrize(
    ("text", "name", "topology"),
    [("tpu:v5e:2x2", "v5e", "2x2"), ("tpu:v4:2x2x4", "v4", "2x2x4"), ("gpu:h100", "h100", "")],
)
def test_a_target_is_read(text: str, name: str, topology: str) -> None:
    target = parse_target(text)
    assert (target.name, target.device, target.topology) == (text, DEVICES[name], topology)


def test_the_cpu_is_this_machine_with_unknown_peaks() -> None:
    target = parse_target("cpu")
    assert target.devices() == jax.local_devices(backend="cpu")
    assert not target.device.peak
    assert target.device.bandwidth is None
    assert target.device.memory > 1 << 28


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["expected tpu:NAME:TOPOLOGY, gpu:NAME or cpu", "''"]),
        ("v5e", ["expected tpu:NAME:TOPOLOGY", "'v5e'"]),
        ("cpu:2", ["expected tpu:NAME:TOPOLOGY", "'cpu:2'"]),
        ("tpu", ["tpu ''", "v4, v5e, v5p, v6e"]),
        ("tpu:v5", ["'v5'", "v5e"]),
        ("tpu:h100:2x2", ["'h100'", "v5e"]),
        ("gpu:v5e", ["'v5e'", "h100"]),
        ("tpu:v5e", ["tpu:v5e:2x2", "found 'tpu:v5e'"]),
        ("tpu:v5e:", ["tpu:v5e:2x2"]),
        ("tpu:v5e:4", ["tpu:v5e:2x2"]),
        ("tpu:v5e:0x2", ["tpu:v5e:2x2"]),
        ("tpu:v5e:02x2", ["tpu:v5e:2x2"]),
        ("tpu:v5e:2x2x1", ["tpu:v5e:2x2"]),
        ("tpu:v5e:2x2:1", ["tpu:v5e:2x2"]),
        ("tpu:v5p:2x2", ["tpu:v5p:2x2x1"]),
        ("tpu:v5e:16x32", ["at most 256 chips", "found 512"]),
        ("gpu:h100:8", ["gpu:h100, one device", "found 'gpu:h100:8'"]),
    ],
)
def test_other_targets_are_refused(text: str, fragments: list[str]) -> None:
    with refuses(TargetError, *fragments):
        parse_target(text)


def test_every_device_has_the_figures_of_a_roofline() -> None:
    for device in DEVICES.values():
        assert set(device.peak) == {"bfloat16", "float32"}
        assert device.peak["bfloat16"] > 4 * device.peak["float32"], device.name
        assert device.bandwidth is not None
        assert 100 < device.peak["bfloat16"] / device.bandwidth < 1000, device.name  # FLOP a byte: all are alike
        assert device.source


@needs_libtpu
@pytest.mark.parametrize(
    ("target", "chips"),
    [
        ("v4:2x2x1", 4),
        ("v5e:1x1", 1),
        ("v5e:2x2", 4),
        ("v5e:4x4", 16),
        ("v5p:2x2x2", 8),
        ("v6e:1x1", 1),
        ("v6e:4x8", 32),
    ],
)
def test_a_topology_has_a_device_for_each_chip(target: str, chips: int) -> None:
    devices = parse_target(f"tpu:{target}").devices()
    assert len({device.id for device in devices}) == chips
    assert {device.platform for device in devices} == {"tpu"}


@needs_libtpu
def test_a_topology_that_the_tpu_has_not_is_refused() -> None:
    with refuses(TargetError, "tpu:v5e:3x3", "a topology of the v5e", "found 3x3"):
        parse_target("tpu:v5e:3x3").devices()


@needs_libtpu
def test_loading_the_compiler_leaves_the_environment_and_the_processs_devices() -> None:
    before = dict(os.environ)
    parse_target("tpu:v5e:2x2").devices()
    assert dict(os.environ) == before
    assert jax.default_backend() == "cpu"


@needs_libtpu
def test_compiled_programs_are_not_cached() -> None:
    """One for a device that is not here cannot be read again, and JAX would warn."""
    target = parse_target("tpu:v5e:1x1")
    mesh = Mesh(np.asarray(target.devices()), ("data",))
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    function = jax.jit(lambda x: x @ x)
    minimum = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        for _ in range(2):
            jax.clear_caches()  # the second time only the cache on disk could have it
            with target.compiling() as options:
                function.lower(x).compile(options)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", minimum)
    assert jax.config.values["jax_enable_compilation_cache"]


@pytest.mark.parametrize(
    ("target", "package", "extra"), [("tpu:v5e:2x2", "libtpu", "tpu"), ("gpu:h100", "jax-cuda13-plugin", "cuda")]
)
@pytest.mark.parametrize("found", [None, "0.0.1", "0.0.420"])
def test_a_compiler_that_is_missing_or_another_is_refused(
    target: str, package: str, extra: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name != package or found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(targets, "version", version)
    what = f"found {found}" if found else "found none"
    with refuses(TargetError, f"expected {package}", what, f"pip install 'gura-jax[{extra}]'"):
        parse_target(target).devices()


def test_a_gpu_needs_the_jax_whose_private_interface_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version__", "0.99.0")
    monkeypatch.setattr(targets, "version", lambda name: "0.99.0")
    monkeypatch.setattr(targets, "requires", lambda name: ['jax-cuda13-plugin<=0.99.0,>=0.99.0; extra == "cuda13"'])
    with refuses(TargetError, f"expected jax {targets.KNOWN_JAX}", "found 0.99.0"):
        parse_target("gpu:h100").devices()
