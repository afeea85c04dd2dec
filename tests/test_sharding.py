"""parallel.py, loading.py: weights divided over a mesh, on 8 devices and in two processes, change no result."""

import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from reference import relative, speech
from refusals import refuses
from toy import environment

from gura_jax import CheckpointError, Member, Model, System, SystemConfigError, load_model, parallel
from gura_jax.models.encoder import Options
from gura_jax.models.families import ENCODERS, build_encoder
from gura_jax.models.wav2vec2 import Wav2Vec2Encoder

SHARDED_BOUND = 1e-6  # relative: sums over devices, in another order
SYSTEM = System("both", (Member("hubert-large", "mean"), Member("crepe-tiny")), "interleave", 64)
CLIPS = [speech(n, seed=n) for n in (3072, 2000, 2500, 800, 1600)]
THREE = jax.make_mesh((1, 3), ("data", "model"), devices=jax.devices()[:3])
MESHES: Any = {
    "fsdp": ((8,), ("data",)),
    "fsdp beside model": ((4, 2), ("data", "model")),
    "tensor": ((2, 4), ("data", "model")),
}


def load(how: str | None = None, system: Any = SYSTEM, **options: Any) -> Model:
    options = {"weights": "random", "size": "tiny"} | options
    if how is None:
        return load_model(system, devices=jax.local_devices()[:1], **options)
    shard: Any = how.split()[0]
    return load_model(system, mesh=jax.make_mesh(*MESHES[how]), shard=shard, **options)


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SMALL", 64)


@pytest.fixture(scope="module")
def whole() -> list[Any]:
    return load().embed(CLIPS)


@pytest.mark.parametrize(
    ("how", "platform"),
    [
        ("fsdp", "tpu"),
        ("tensor", "tpu"),
        *(pytest.param(how, "cpu", marks=pytest.mark.slow) for how in ("fsdp beside model", "fsdp", "tensor")),
    ],
)
def test_results_are_those_of_whole_weights(how: str, platform: str, whole: list[Any]) -> None:
    """Also of one clip of two frames, in a batch that is otherwise silence."""
    model = load(how, platform=platform)
    held = {k: v for k, v in model.params["hubert-large"].items() if not v.sharding.is_fully_replicated}
    assert any("q_proj.kernel" in name for name in held)
    axis = "model" if how == "tensor" else "data"
    for array in held.values():
        assert array.addressable_data(0).nbytes * model.compilation.mesh.shape[axis] == array.nbytes
    if how != "tensor":  # where others than those of layers are whole
        assert sum(v.nbytes for v in held.values()) > 0.8 * sum(v.nbytes for v in model.params["hubert-large"].values())
    for ours, expected in zip(model.embed(CLIPS), whole, strict=True):
        assert relative(ours.frames, expected.frames) < SHARDED_BOUND
        assert relative(ours.scene, expected.scene) < SHARDED_BOUND


def test_layers_are_divided_as_megatron_divides_them() -> None:
    params = load("tensor", platform="tpu").params["hubert-large"]
    specs = {name: tuple(array.sharding.spec) for name, array in params.items()}
    assert specs["encoder.layers.attention.q_proj.kernel"] == (None, None, "model")
    assert specs["encoder.layers.attention.out_proj.kernel"] == (None, "model", None)
    assert specs["encoder.layers.feed_forward.output_dense.kernel"] == (None, "model", None)
    assert not any(specs["feature_projection.projection.kernel"])


def test_gradients_and_saving(tmp_path: Path) -> None:
    """The gradient lies where the weights do; and a model whose weights are divided is saved and restored so."""
    one, many = (load(how, "hubert_base", platform="tpu", remat="layers") for how in (None, "fsdp"))
    audio = np.stack([speech(1600, seed) for seed in range(8)])
    lengths = np.full(8, 1600, np.int32)

    def gradient(model: Model) -> Any:
        def loss(params: Any, audio: Any, lengths: Any) -> jax.Array:
            scenes = model.fuse(params, audio, lengths).scenes
            assert scenes is not None
            return jnp.square(scenes).sum()

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(loss))(model.params, audio, lengths)["hubert-base"]

    found, expected = gradient(many), gradient(one)
    for name in ("encoder.layers.attention.v_proj.kernel", "feature_extractor.layers.0.conv.kernel"):
        assert relative(found[name], expected[name]) < 1e-5  # sums over clips too, in another order
    many.save(tmp_path / "saved")
    mesh = jax.make_mesh(*MESHES["fsdp"])
    again = load_model(tmp_path / "saved", mesh=mesh, shard="fsdp", platform="tpu")
    for name, array in again.params["hubert-base"].items():
        np.testing.assert_array_equal(array, one.params["hubert-base"][name])
        assert array.sharding.spec == many.params["hubert-base"][name].sharding.spec


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": jax.make_mesh((8,), ("data",)), "shard": "tensor"}, ["an axis model", "data=8"]),
        ({"mesh": jax.make_mesh((8,), ("rows",)), "shard": "fsdp"}, ["the axes data and model", "rows=8"]),
        ({"mesh": jax.make_mesh((4, 2), ("data", "model"))}, ["shard='tensor'", "model=2"]),
        ({"mesh": jax.make_mesh((8,), ("data",)), "shard": "fsdp", "parallel_by": "pmap"}, ["pmap", "'jit'"]),
        ({"mesh": jax.make_mesh((8,), ("data",)), "devices": jax.devices()}, ["one of them, found both"]),
        ({"mesh": "data", "shard": "fsdp"}, ["jax.sharding.Mesh", "'data'"]),
        ({"shard": "zero"}, ["shard", "fsdp", "tensor", "'zero'"]),
        ({"mesh": THREE, "shard": "tensor"}, ["3 devices divide", "attention", "[32]"]),
    ],
)  # fmt: skip
def test_meshes_that_do_not_suit(options: Any, words: list[str]) -> None:
    with refuses(SystemConfigError, *words):
        load_model(SYSTEM, weights="random", size="tiny", **options)


def test_rules_that_match_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wav2Vec2Encoder, "partition", {r"decoder\..*": -1})
    with refuses(SystemConfigError, "Wav2Vec2Encoder.partition", "decoder", "matches none"):
        load("tensor")


def test_a_damaged_checkpoint_is_found_whatever_its_sharding(tmp_path: Path) -> None:
    load(system="hubert_base").save(tmp_path / "saved")
    manifest = tmp_path / "saved" / "hubert-base" / "manifest.json"
    text = manifest.read_text()
    first = text.split('"feature_projection.projection.kernel": "')[1][:64]
    manifest.write_text(text.replace(first, "0" * 64))
    with refuses(CheckpointError, "damaged", "feature_projection.projection.kernel"):
        load_model(tmp_path / "saved", mesh=jax.make_mesh(*MESHES["fsdp"]), shard="fsdp")


TWO_PROCESSES = """
import sys, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from jax.sharding import Mesh
from gura_jax import load_model, parallel
parallel.SMALL = 64
saved, shard, out = sys.argv[3:]
shape, axes = ((4,), ("data",)) if shard == "fsdp" else ((2, 2), ("data", "model"))
mesh = Mesh(np.array(jax.devices()).reshape(shape), axes)
model = load_model(saved, mesh=mesh, shard=shard)
kernel = model.params["hubert-base"]["feature_projection.projection.kernel"]
assert shard != "fsdp" or not kernel.is_fully_addressable
rng = np.random.default_rng(jax.process_index())
frames = [clip.frames for clip in model.embed(list((0.1 * rng.standard_normal((3, 1600))).astype(np.float32)))]
np.save(f"{out}-{jax.process_index()}.npy", np.stack(frames))
"""


@pytest.mark.parametrize("shard", ["fsdp", pytest.param("tensor", marks=pytest.mark.slow)])
def test_two_processes(shard: str, tmp_path: Path) -> None:
    """Each restores its own part of the weights, gives clips of its own, and gets their embeddings back."""
    model = load(system="hubert_base")
    model.save(tmp_path / "saved")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), address]
    started = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path / "saved"), shard, str(tmp_path / "out")],
            env=environment(devices=2),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in started:
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
    for i in range(2):
        rng = np.random.default_rng(i)
        clips = list((0.1 * rng.standard_normal((3, 1600))).astype(np.float32))
        for ours, expected in zip(np.load(tmp_path / f"out-{i}.npy"), model.embed(clips), strict=True):
            assert relative(ours, expected.frames) < SHARDED_BOUND


def test_what_is_divided_evenly_or_not_at_all() -> None:
    encoder = build_encoder(ENCODERS["hubert-base"].config, Options())
    mesh = jax.make_mesh((8,), ("data",))
    shapes = encoder.abstract_params()
    shardings = parallel.weight_shardings(encoder, shapes, mesh, "fsdp")
    assert set(shardings) == set(shapes)
    assert shardings["encoder.layers.3.attention.q_proj.kernel"].spec in (P("data", None), P(None, "data"))
    assert shardings["encoder.pos_conv_embed.conv.kernel"].spec[0] is None  # not its taps
