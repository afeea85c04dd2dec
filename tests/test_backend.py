"""backend.py: the platform is chosen in one place, from the devices or by name, and changes no result."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from reference import relative, speech
from refusals import refuses

import gura_jax
from gura_jax import Member, Model, System, SystemConfigError, load_model
from gura_jax.backend import PLATFORMS, find_platform, platform_of
from gura_jax.loading import outline

PLATFORM_BOUND = 1e-5  # relative: the same sums in another order, and CREPE's convolutions in another domain
SYSTEM = System("both", (Member("hubert-large", "mean"), Member("crepe-tiny")), "interleave", 32)
CLIPS = [speech(n, seed=n) for n in (8000, 3000)]


def load(platform: str | None = None, **options: Any) -> Model:
    devices = jax.local_devices()[:1]
    return load_model(SYSTEM, weights="random", size="tiny", platform=platform, devices=devices, **options)


# Which one


def test_the_devices_say_which() -> None:
    assert platform_of(jax.local_devices()) is PLATFORMS["cpu"]
    assert load().platform is outline(SYSTEM).platform is PLATFORMS["cpu"]


@pytest.mark.parametrize("name", PLATFORMS)
def test_the_caller_may_say_which(name: str) -> None:
    """For tests, and to compile for hardware that is not at hand."""
    assert find_platform(name).name == name
    model = outline(SYSTEM, platform=name)
    assert model.platform is PLATFORMS[name]
    assert {member.options.platform for member in model.fusion.members} == {PLATFORMS[name]}


@pytest.mark.parametrize("name", ["cuda", "GPU", "", None])
def test_unknown_platforms(name: Any) -> None:
    with refuses(SystemConfigError, "platform: expected one of cpu, gpu, tpu", f"found {name!r}"):
        find_platform(name)


def test_load_model_refuses_them_too() -> None:
    for function in (load_model, outline):
        with refuses(SystemConfigError, "platform: expected one of cpu, gpu, tpu", "found 'npu'"):
            function(SYSTEM, platform="npu")


def test_devices_of_several_platforms() -> None:
    devices = [SimpleNamespace(platform=name) for name in ("gpu", "cpu", "gpu")]
    with refuses(SystemConfigError, "devices: expected those of one platform", "found cpu, gpu"):
        platform_of(devices)
    with refuses(SystemConfigError, "found none"):
        platform_of([])
    with refuses(SystemConfigError, "expected one of cpu, gpu, tpu", "'rocket'"):
        platform_of([SimpleNamespace(platform="rocket")])


def test_nobody_else_asks() -> None:
    root = Path(gura_jax.__file__).parent
    for path in [*root.rglob("*.py"), *(root / "convert").glob("*.py")]:
        if path.name not in ("backend.py", "targets.py"):  # targets.py: compilers without their devices
            asked = re.findall(r"default_backend|device_kind|get_backend|xla_bridge", path.read_text())
            assert asked == [], path


# What it changes, and what not


@pytest.fixture(scope="module")
def on_cpu() -> list[Any]:
    return load().embed(CLIPS)


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_every_platform_computes_the_same(name: str, on_cpu: list[Any]) -> None:
    """The forms of accelerators, on a CPU: other blocks, and CREPE's convolutions directly."""
    model = load(name)
    assert not any("spectrum" in key for m in model.fusion.members for key in m.encoder.derive(model.params[m.name]))
    for ours, expected in zip(model.embed(CLIPS), on_cpu, strict=True):
        assert relative(ours.frames, expected.frames) < PLATFORM_BOUND
        assert relative(ours.scene, expected.scene) < PLATFORM_BOUND


def test_bfloat16_weights_are_where_the_platform_computes_in_it() -> None:
    for name, dtype in (("cpu", "float32"), ("gpu", "bfloat16")):
        params = load(name, dtype="bfloat16").params
        assert params["crepe-tiny"]["layers.0.conv.kernel"].dtype == dtype
        layers = "layers.0" if name == "cpu" else "layers"
        assert params["hubert-large"][f"encoder.{layers}.attention.q_proj.kernel"].dtype == "bfloat16"


def test_weights_are_the_same_on_every_platform() -> None:
    """However they are held: stacked where layers are scanned."""
    stacked, unrolled = load("gpu"), load("cpu")
    kernel = "encoder.layers.attention.q_proj.kernel"
    assert stacked.params["hubert-large"][kernel].shape == (3, 32, 32)
    assert "encoder.layers.2.attention.q_proj.kernel" in unrolled.params["hubert-large"]
    for one, other in zip(stacked.fusion.members, unrolled.fusion.members, strict=True):
        restored = [m.encoder.restore(model.params[m.name]) for m, model in ((one, stacked), (other, unrolled))]
        jax.tree.map(np.testing.assert_array_equal, *map(dict, restored))
