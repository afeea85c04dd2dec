"""gura_jax/checkpoint.py: complete or absent, checked when read, and errors that say what to do."""

import dataclasses
import errno
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import refusals
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gura_jax
from gura_jax import CheckpointError, checkpoint
from gura_jax.checkpoint import (
    MANIFEST,
    Manifest,
    array_sha256,
    arrays_sha256,
    check_architecture,
    checkpoint_folder,
    load,
    save,
)
from gura_jax.models.crepe import CrepeConfig
from gura_jax.models.encoder import Config
from gura_jax.models.families import abstract_params
from gura_jax.models.wav2vec2_config import Wav2Vec2Config

# A restore that fails leaves Orbax's other coroutines unawaited, and they complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")

ARCHITECTURE = Wav2Vec2Config("hubert", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
REDO = "gura-jax convert"

Arrays = dict[str, np.ndarray]


def arrays(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"layers.0.kernel": (3, 5), "layers.0.bias": (5,), "layers.1.kernel": (64, 2, 7), "scalar": ()}
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


def manifest(params: Arrays, architecture: Config = ARCHITECTURE) -> Manifest:
    hashes = {name: array_sha256(array) for name, array in params.items()}
    return Manifest(architecture, "a source", {"model.safetensors": "0" * 64}, "0.1.0", hashes)


def write(path: Path, seed: int = 0, *, overwrite: bool = False) -> Arrays:
    params = arrays(seed)
    save(path, params, manifest(params), overwrite=overwrite)
    return params


def read(path: Path, like: Arrays | None = None) -> Arrays:
    loaded = load(path, outlines(like or arrays(0)), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return {name: np.asarray(array) for name, array in loaded.items()}


def assert_same(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


refusal = functools.partial(refusals.refusal, CheckpointError)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Whole ones


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "some" / "folder" / "mine"
    params = write(path)
    assert_same(read(path), params)
    assert checkpoint.read_manifest(path) == manifest(params)
    assert names(path.parent) == ["mine"]
    assert names(path) == [MANIFEST, "params"]


def test_to_every_device(tmp_path: Path) -> None:
    params = write(tmp_path / "mine")
    for name, array in load(tmp_path / "mine", outlines(params), over()).items():
        assert array.sharding.is_fully_replicated
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), params[name])


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = write(Path("mine"))
    assert_same(read(Path("mine")), params)


def test_the_same_input_gives_the_same_manifest(tmp_path: Path) -> None:
    write(tmp_path / "a")
    params = arrays(0)
    backwards = dict(reversed(params.items()))
    save(tmp_path / "b", backwards, manifest(backwards))
    text = (tmp_path / "a" / MANIFEST).read_bytes()
    assert (tmp_path / "b" / MANIFEST).read_bytes() == text
    write(tmp_path / "c", 1)
    assert (tmp_path / "c" / MANIFEST).read_bytes() != text


def test_fingerprint() -> None:
    params = arrays(0)
    one = manifest(params)
    assert one.fingerprint == dataclasses.replace(one, source="elsewhere", converter_version="9").fingerprint
    assert one.fingerprint != manifest(arrays(1)).fingerprint
    other = dataclasses.replace(ARCHITECTURE, do_stable_layer_norm=True)
    assert one.fingerprint != dataclasses.replace(one, architecture=other).fingerprint


def test_array_hash_tells_shape_type_and_bytes() -> None:
    a = np.arange(6, dtype=np.float32)
    variants = [a, a.reshape(2, 3), a.reshape(3, 2), a.astype(np.float64), a.view(np.int32), -a]
    assert len({array_sha256(v) for v in variants}) == len(variants)
    strided = np.arange(12, dtype=np.float32)[::2]
    assert array_sha256(strided) == array_sha256(strided.copy())
    assert array_sha256(np.ones((), np.float32)) != array_sha256(np.ones(1, np.float32))


def test_no_overwriting_unasked(tmp_path: Path) -> None:
    params = write(tmp_path / "mine")
    message = refusal(lambda: write(tmp_path / "mine", 1))
    assert str(tmp_path / "mine") in message
    assert "--overwrite" in message
    assert_same(read(tmp_path / "mine"), params)
    assert names(tmp_path) == ["mine"]


def test_overwriting(tmp_path: Path) -> None:
    write(tmp_path / "mine")
    params = write(tmp_path / "mine", 1, overwrite=True)
    assert_same(read(tmp_path / "mine"), params)
    assert names(tmp_path) == ["mine"]


# Sharded

SHAPES = {"cube": (8, 16, 3), "matrix": (16, 8), "vector": (8,), "scalar": ()}


def over(*axes: str | None, **mesh: int) -> NamedSharding:
    """A sharding of arrays' axes over the 8 devices."""
    mesh = mesh or {"x": 8}
    return NamedSharding(jax.make_mesh(tuple(mesh.values()), tuple(mesh), devices=jax.devices()), P(*axes))


SHARDINGS: dict[str, dict[str, NamedSharding]] = {
    "axis 0": {name: over("x") if shape else over() for name, shape in SHAPES.items()},
    "axis 1": {name: over(None, "x") if len(shape) > 1 else over() for name, shape in SHAPES.items()},
    "2 axes": {name: over("x", "y", x=2, y=4) if len(shape) > 1 else over() for name, shape in SHAPES.items()},
    "in pairs": {name: over("x", x=4, y=2) if shape else over() for name, shape in SHAPES.items()},
    "replicated": dict.fromkeys(SHAPES, over()),
}


def shaped(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def outlines(params: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in params.items()}


@pytest.mark.parametrize("how", SHARDINGS)
def test_arrays_are_restored_to_any_sharding(tmp_path: Path, how: str) -> None:
    params = shaped()
    save(tmp_path / "mine", params, manifest(params))
    loaded = load(tmp_path / "mine", outlines(params), SHARDINGS[how])
    assert {name: array.sharding for name, array in loaded.items()} == SHARDINGS[how]
    assert_same({name: np.asarray(array) for name, array in loaded.items()}, params)


@pytest.mark.parametrize("how", SHARDINGS)
@pytest.mark.parametrize("place", [0, -1])
def test_one_wrong_number_is_seen_in_whatever_shard_it_is(tmp_path: Path, how: str, place: int) -> None:
    params = shaped()
    right = manifest(params)
    params["cube"].flat[place] += 1
    save(tmp_path / "mine", params, right)
    message = refusal(lambda: load(tmp_path / "mine", outlines(params), SHARDINGS[how]))
    assert "is damaged: cube differ from the manifest" in message
    assert REDO in message


def test_a_sharding_that_does_not_divide_an_array(tmp_path: Path) -> None:
    params = shaped()
    save(tmp_path / "mine", params, manifest(params))
    shardings = SHARDINGS["axis 0"] | {"cube": over(None, None, "x"), "vector": over("x", "y", x=2, y=4)}
    message = refusal(lambda: load(tmp_path / "mine", outlines(params), shardings))
    assert str(tmp_path / "mine") in message
    assert "cube (8, 16, 3) with PartitionSpec(None, None, 'x') over {'x': 8}" in message
    assert "vector (8,) with PartitionSpec('x', 'y') over {'x': 2, 'y': 4}" in message
    assert "matrix" not in message
    assert "replicate the array" in message


def test_an_array_without_a_sharding(tmp_path: Path) -> None:
    params = shaped()
    save(tmp_path / "mine", params, manifest(params))
    message = refusal(lambda: load(tmp_path / "mine", outlines(params), {"scalar": over()}))
    assert "expected a sharding for every array, found none for cube, matrix, vector" in message


@pytest.mark.parametrize("sharding", [None, "cpu", jax.devices()[0], {"cube": None}])
def test_a_sharding_that_is_none(tmp_path: Path, sharding: Any) -> None:
    params = {"cube": shaped()["cube"]}
    save(tmp_path / "mine", params, manifest(params))
    message = refusal(lambda: load(tmp_path / "mine", outlines(params), sharding))
    assert "sharding: expected a jax.sharding.Sharding, or one for each array by its name, found " in message


def test_devices_of_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh says how the processes put an array together, to hash it; see test_sharding.py for real ones."""
    params = shaped()
    save(tmp_path / "mine", params, manifest(params))
    for name in ("is_fully_addressable", "is_fully_replicated"):
        monkeypatch.setattr(jax.sharding.SingleDeviceSharding, name, False)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    message = refusal(lambda: load(tmp_path / "mine", outlines(params), sharding))
    assert "expected a NamedSharding for what lies on several processes' devices, found SingleDevice" in message


@pytest.mark.parametrize("how", SHARDINGS)
def test_saving_arrays_of_any_sharding(tmp_path: Path, how: str) -> None:
    params = shaped()
    placed = {name: jax.device_put(array, SHARDINGS[how][name]) for name, array in params.items()}
    described = dataclasses.replace(manifest(params), arrays_sha256=arrays_sha256(placed))
    assert described == manifest(params)
    save(tmp_path / "mine", placed, described)
    assert_same(read(tmp_path / "mine", params), params)


@pytest.mark.parametrize("place", [lambda a: a, jnp.asarray, lambda a: jax.device_put(a, over("x"))])
def test_bfloat16_is_saved_as_float32(tmp_path: Path, place: Callable[[Any], Any]) -> None:
    params = {"a": place(shaped()["matrix"].astype(jnp.bfloat16)), "b": place(np.arange(8, dtype=np.float32))}
    exact = {name: np.asarray(array).astype(np.float32) for name, array in params.items()}
    described = dataclasses.replace(manifest(exact), arrays_sha256=arrays_sha256(params))
    assert described == manifest(exact)
    save(tmp_path / "mine", params, described)
    assert_same(read(tmp_path / "mine", exact), exact)


@pytest.mark.parametrize("how", SHARDINGS)
def test_what_is_copied_to_the_host_does_not_stay_with_the_array(how: str) -> None:
    array = jax.device_put(shaped()["matrix"], SHARDINGS[how]["matrix"])
    same = checkpoint._same_buffers(array)
    shards = [shard.data for shard in array.addressable_shards]
    for shard in [shard.data for shard in same.addressable_shards]:
        assert shard.unsafe_buffer_pointer() in [other.unsafe_buffer_pointer() for other in shards]  # no copy yet
        assert not any(shard is other for other in shards)
    assert len(same.addressable_shards) == (1 if how == "replicated" else 8)


SMALL_MEMORY = """
    import resource, sys
    from pathlib import Path
    import jax, numpy as np, orbax.checkpoint
    from jax.sharding import NamedSharding, PartitionSpec
    from gura_jax.checkpoint import Manifest, arrays_sha256, load, save
    from gura_jax.models.crepe import CrepeConfig

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # MB

    def measured(what):
        before = peak()
        what()
        return peak() - before

    path, everywhere = Path(sys.argv[1]), NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    params = {f"a{i}": jax.device_put(np.full((8, 1 << 17), i, np.float32), jax.devices()[0]) for i in range(64)}
    jax.block_until_ready(params)
    print(measured(lambda: save(path, params, Manifest(CrepeConfig("tiny"), "s", {}, "0", arrays_sha256(params)))))
    abstract = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in params.items()}
    loaded = {}
    print(measured(lambda: loaded.update(load(path, abstract, everywhere))))
"""


def test_saving_and_checking_hold_no_second_copy_of_all_arrays(tmp_path: Path) -> None:
    code = [sys.executable, "-c", textwrap.dedent(SMALL_MEMORY), str(tmp_path / "mine")]
    environment = os.environ | {"PYTHONPATH": str(Path(gura_jax.__file__).parent.parent)}
    saving, loading = subprocess.run(code, env=environment, capture_output=True, text=True, check=True).stdout.split()
    total = 64 * 8 * (1 << 17) * 4 / 1e6  # MB
    assert float(saving) < total / 2
    assert float(loading) < total * 3 / 2  # with the arrays themselves


# Killed


class Death(BaseException):
    """Nothing catches it: with the cleaning up switched off, the disk looks as after a SIGKILL there."""


def die(*_: Any, **__: Any) -> Any:
    raise Death


def kill_at(monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """Let the next save die at a point; what a dead process would not clean up stays."""
    monkeypatch.setattr(shutil, "rmtree", die if point == "old" else lambda *_, **__: None)
    real_rename = os.rename

    def renames(which: int) -> Callable[..., None]:
        calls: list[None] = []

        def rename(*args: Any, **options: Any) -> None:
            # Orbax renames inside its own folder; these are the checkpoint's.
            if Path(args[0]).parent == Path(args[1]).parent or "old" in (Path(args[0]).name, Path(args[1]).name):
                if MANIFEST not in os.listdir(args[0]):
                    return real_rename(*args, **options)
                calls.append(None)
                if len(calls) == which:
                    raise Death
            return real_rename(*args, **options)

        return rename

    def half(content: Any, file: Any, **options: Any) -> None:
        text = json.dumps(content, **options)
        file.write(text[: len(text) // 2])
        file.flush()
        raise Death

    match point:
        case "arrays":
            monkeypatch.setattr(ocp.Checkpointer, "save", die)
        case "manifest":
            monkeypatch.setattr(json, "dump", half)
        case "fsync":
            monkeypatch.setattr(os, "fsync", die)
        case "chmod":
            monkeypatch.setattr(Path, "chmod", die)
        case "rename 1":
            monkeypatch.setattr(os, "rename", renames(1))
        case "rename 2":
            monkeypatch.setattr(os, "rename", renames(2))


POINTS = ("arrays", "manifest", "fsync", "chmod", "rename 1", "rename 2", "old")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, overwrite: bool) -> None:
    path = tmp_path / "mine"
    old = write(path) if overwrite else None
    with monkeypatch.context() as patch:
        kill_at(patch, point)
        try:
            write(path, 1, overwrite=overwrite)
        except Death:
            pass
        else:
            assert not overwrite or point == "rename 2"  # one that is not reached
    if old is None and not path.exists():
        assert "no checkpoint" in refusal(lambda: read(path))
    else:
        found = read(path)
        assert_same(found, old if old is not None and np.array_equal(found["scalar"], old["scalar"]) else arrays(1))
    # What is left over is in nobody's way, and the next conversion works.
    new = write(path, 2, overwrite=path.exists())
    assert_same(read(path), new)
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["mine"]


@pytest.mark.parametrize("point", ["arrays", "manifest", "fsync", "chmod", "rename 1", "rename 2"])
def test_an_error_while_overwriting_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    path = tmp_path / "mine"
    old = write(path)
    with monkeypatch.context() as patch:
        real_rmtree = shutil.rmtree
        kill_at(patch, point)
        patch.setattr(shutil, "rmtree", real_rmtree)
        with pytest.raises(Death):
            write(path, 1, overwrite=True)
    assert_same(read(path), old)
    assert names(tmp_path) == ["mine"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    import jax
    from gura_jax.checkpoint import Manifest, array_sha256, save
    from gura_jax.models.wav2vec2_config import Wav2Vec2Config

    path, event, substring, count = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    params = {f"a{i}": np.full((64, 64), i + 100, np.float32) for i in range(20)}
    manifest = Manifest(Wav2Vec2Config("hubert"), "s", {}, "0", {k: array_sha256(a) for k, a in params.items()})
    seen = 0

    def hook(name, arguments):
        global seen
        if name == event and any(substring in str(a) for a in arguments):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(path, params, manifest, overwrite=True)
"""


@pytest.mark.parametrize(
    ("event", "substring", "count"), [("open", "params", 2), ("open", MANIFEST, 1), ("os.rename", ".mine.", 3)]
)
def test_killed_outright(tmp_path: Path, event: str, substring: str, count: int) -> None:
    path = tmp_path / "mine"
    params = {f"a{i}": np.full((64, 64), i, np.float32) for i in range(20)}
    save(path, params, manifest(params))
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(path), event, substring, str(count)],
        env=os.environ | {"PYTHONPATH": str(Path(gura_jax.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -9, run.stderr
    found = read(path, params)
    assert np.array_equal(found["a0"], params["a0"]) or np.array_equal(found["a0"], params["a0"] + 100)


# Damaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "mine"
    write(path)
    return path


@pytest.fixture
def mine(whole: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(whole, tmp_path / "mine"))
    gc.collect()  # the complaints come here, and in no later test


def edit(path: Path, **changes: Any) -> None:
    content = json.loads((path / MANIFEST).read_text())
    content.update(changes)
    (path / MANIFEST).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def test_nothing_there(tmp_path: Path) -> None:
    assert "no checkpoint at" in refusal(lambda: read(tmp_path / "mine"))
    (tmp_path / "file").write_text("")
    assert "no checkpoint at" in refusal(lambda: read(tmp_path / "file"))


def test_missing_manifest(mine: Path) -> None:
    (mine / MANIFEST).unlink()
    message = refusal(lambda: read(mine))
    assert MANIFEST in message
    assert REDO in message


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to remove it, but for half a checkpoint where checkpoints are."""
    (tmp_path / "music").mkdir()
    message = refusal(lambda: read(tmp_path / "music"))
    assert f"is no checkpoint: it has no {MANIFEST}" in message
    assert "remove" not in message
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(tmp_path))
    assert checkpoint.REDO in refusal(lambda: read(tmp_path / "music"))


def test_a_saved_model_is_no_checkpoint(mine: Path) -> None:
    """Its members are; one that is damaged cannot be converted again."""
    (mine.parent / checkpoint.SAVED_SYSTEM).write_text("{}")
    message = refusal(lambda: read(mine.parent))
    assert "is a saved model: load it by its path" in message
    assert "remove" not in message
    (mine / MANIFEST).unlink()
    message = refusal(lambda: read(mine))
    assert "half of a checkpoint; restore it from a copy" in message
    assert REDO not in message


@pytest.mark.parametrize("source", ["random", "changed from facebook/hubert-base-ls960@abc"])
def test_what_was_saved_is_restored_from_a_copy(mine: Path, source: str) -> None:
    edit(mine, source=source)
    shutil.rmtree(mine / "params")
    message = refusal(lambda: read(mine))
    assert "restore it from a copy" in message
    assert REDO not in message


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_truncated_manifest(mine: Path, kept: float) -> None:
    text = (mine / MANIFEST).read_bytes().strip()
    (mine / MANIFEST).write_bytes(text[: int(kept * len(text))])
    message = refusal(lambda: read(mine))
    assert MANIFEST in message
    assert REDO in message


@pytest.mark.parametrize(
    "text", ["[]", "null", "5", '"manifest"', "{}", "\xff", '{"format_version": 1}', "[" * 100_000]
)
def test_no_manifest_at_all(mine: Path, text: str) -> None:
    (mine / MANIFEST).write_bytes(text.encode("latin-1"))
    message = refusal(lambda: read(mine))
    assert MANIFEST in message
    assert REDO in message


def test_manifest_is_a_folder(mine: Path) -> None:
    (mine / MANIFEST).unlink()
    (mine / MANIFEST).mkdir()
    assert MANIFEST in refusal(lambda: read(mine))


WRONG: list[tuple[str, Any]] = [
    ("architecture", ...),
    ("architecture", None),
    ("architecture", []),
    ("architecture", "hubert"),
    ("architecture", {}),
    ("architecture", {"model_type": "crepe"}),
    ("architecture", {"model_type": "crepe", "capacity": {}}),
    ("architecture", {"model_type": "hubert", "hidden_size": "32"}),
    ("architecture", {"model_type": "hubert", "conv_dim": None}),
    ("architecture", {"model_type": "hubert", "unheard_of": 1}),
    ("architecture", {"model_type": ["hubert"]}),
    ("arrays_sha256", ...),
    ("arrays_sha256", None),
    ("arrays_sha256", []),
    ("arrays_sha256", {"scalar": 5}),
    ("source", ...),
    ("source", None),
    ("source", 5),
    ("source_sha256", None),
    ("source_sha256", "abc"),
    ("converter_version", ...),
    ("converter_version", 1),
    ("unheard_of", 1),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_types_in_the_manifest(mine: Path, key: str, value: Any) -> None:
    edit(mine, **{key: value})
    message = refusal(lambda: checkpoint.read_manifest(mine))
    assert str(mine / MANIFEST) in message
    assert REDO in message
    assert "NoneType" not in message
    if value in (None, []) and key == "architecture":
        assert f"expected architecture, an object, found {json.dumps(value)}" in message


@pytest.mark.parametrize("version", [2, 99, 10**30])
def test_newer_version(mine: Path, version: int) -> None:
    edit(mine, format_version=version, a_new_field={"of": "that version"})
    message = refusal(lambda: read(mine))
    assert f"version {version}" in message
    assert "update gura_jax" in message


@pytest.mark.parametrize("version", ["1", 1.5, None, ..., [], True, 0, -1])
def test_no_version(mine: Path, version: Any) -> None:
    edit(mine, format_version=version)
    assert str(mine) in refusal(lambda: read(mine))


@pytest.mark.parametrize("changed", ["fewer", "more", "renamed"])
def test_other_arrays_than_wanted(mine: Path, changed: str) -> None:
    wanted = arrays(0)
    if changed != "fewer":
        wanted["layers.2.kernel"] = np.zeros(3, np.float32)
    if changed != "more":
        del wanted["layers.0.bias"]
    message = refusal(lambda: read(mine, wanted))
    assert ("layers.0.bias" in message) == (changed != "more")
    assert ("layers.2.kernel" in message) == (changed != "fewer")


@pytest.mark.parametrize("shape", [(5, 3), (15,), (3, 6), (2, 5)])
def test_other_shapes_than_wanted(mine: Path, shape: tuple[int, ...]) -> None:
    message = refusal(lambda: read(mine, arrays(0) | {"layers.0.kernel": np.zeros(shape, np.float32)}))
    assert f"{mine} has arrays of other shapes: expected layers.0.kernel {shape}, found (3, 5); " in message


def test_an_array_that_the_manifest_has_and_the_folder_not(mine: Path) -> None:
    hashes = json.loads((mine / MANIFEST).read_text())["arrays_sha256"] | {"more": "0" * 64}
    edit(mine, arrays_sha256=hashes)
    message = refusal(lambda: read(mine, arrays(0) | {"more": np.zeros(3, np.float32)}))
    assert str(mine) in message
    assert REDO in message


def test_missing_folder_of_arrays(mine: Path) -> None:
    shutil.rmtree(mine / "params")
    message = refusal(lambda: read(mine))
    assert str(mine) in message
    assert REDO in message


def array_files(path: Path) -> list[Path]:
    return sorted(p for p in (path / "params").rglob("*") if p.is_file())


def refused_or_same(path: Path) -> bool:
    """Whether it was refused, in words that help."""
    try:
        found = read(path)
    except CheckpointError as error:
        message = str(error)
    else:
        assert_same(found, arrays(0))
        return False
    assert str(path) in message
    assert REDO in message
    return True


def test_every_missing_or_emptied_file_is_seen(mine: Path) -> None:
    """Or makes no difference: never other arrays, and never another kind of error."""
    seen = 0
    for file in array_files(mine):
        data = file.read_bytes()
        for emptied in (False, True):
            file.unlink()
            if emptied:
                file.write_bytes(b"")
            seen += refused_or_same(mine)
            file.write_bytes(data)
    assert seen > 0
    assert_same(read(mine), arrays(0))


def test_a_flipped_bit_is_seen_wherever_it_is(mine: Path) -> None:
    """Or makes no difference."""
    rng = np.random.default_rng(0)
    seen = 0
    biggest = max(array_files(mine), key=lambda file: file.stat().st_size)
    for file in array_files(mine):
        data = file.read_bytes()
        for place in rng.integers(0, len(data), 12 if file == biggest else 2) if data else ():
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            seen += refused_or_same(mine)
        file.write_bytes(data)
    assert seen > 0


def test_swapped_arrays_are_seen(tmp_path: Path) -> None:
    """Data that is well-formed, but not the manifest's."""
    one, other = tmp_path / "one", tmp_path / "other"
    write(one)
    write(other, 1)
    shutil.rmtree(one / "params")
    shutil.copytree(other / "params", one / "params")
    message = refusal(lambda: read(one))
    assert "damaged" in message
    assert "layers.0.kernel" in message


def test_errors_of_many_words(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's error may hold pages of its objects' state."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("Error while reading. See details: <object at 0x1>\nmore" if short else "word " * 1000)

    monkeypatch.setattr(ocp.Checkpointer, "restore", fail)
    for short in (True, False):
        message = refusal(lambda: read(mine))
        assert ("cannot be read: Error while reading; " in message) == short
        assert "details" not in message
        assert len(message) < 500


def test_errors_without_words(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's error may have an empty message."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(ocp.Checkpointer, "restore", fail)
    assert str(mine) in refusal(lambda: read(mine))


# Other architectures


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 2}, ["num_hidden_layers: expected 1, found 2"]),
        ({"do_stable_layer_norm": True}, ["do_stable_layer_norm: expected False, found True"]),
        (
            {"model_type": "wav2vec2", "hidden_size": 64},
            ["model_type: expected hubert, found wav2vec2", "hidden_size: expected 32, found 64"],
        ),
        ({"conv_dim": (256,) * 7}, ["conv_dim"]),
    ],
)
def test_another_architecture(changes: Mapping[str, Any], words: list[str]) -> None:
    found = dataclasses.replace(ARCHITECTURE, **changes)
    message = refusal(lambda: check_architecture("mine", ARCHITECTURE, found, "some/where"))
    assert "some/where" in message
    assert "mine" in message
    for word in words:
        assert word in message
    assert "intermediate_size" not in message


def test_crepe_is_no_hubert() -> None:
    check_architecture("mine", ARCHITECTURE, dataclasses.replace(ARCHITECTURE), "some/where")
    message = refusal(lambda: check_architecture("mine", ARCHITECTURE, CrepeConfig("tiny"), "some/where"))
    assert "model_type: expected hubert, found crepe" in message
    message = refusal(lambda: check_architecture("mine", CrepeConfig("full"), CrepeConfig("tiny"), "some/where"))
    assert "capacity: expected full, found tiny" in message
    assert "model_type" not in message


# Places that cannot be written


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = refusal(lambda: write(tmp_path / "file" / "mine"))
    assert str(tmp_path / "file" / "mine") in message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("where", ["mkdtemp", "mkdir", "fsync"])
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    old = write(tmp_path / "mine")

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code), "some/place")

    with monkeypatch.context() as patch:
        patch.setattr({"mkdtemp": tempfile, "mkdir": Path, "fsync": os}[where], where, fail)
        message = refusal(lambda: write(tmp_path / "mine", 1, overwrite=True))
    assert str(tmp_path / "mine") in message
    assert os.strerror(code) in message
    assert_same(read(tmp_path / "mine"), old)
    assert names(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError('RESOURCE_EXHAUSTED: Error writing "d/0" [os_error: No space left on device]\nmore\n'),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError(),
    ],
)
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    old = write(tmp_path / "mine")

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", fail)
        message = refusal(lambda: write(tmp_path / "mine", 1, overwrite=True))
    assert str(tmp_path / "mine") in message
    assert "more" not in message
    if str(error):
        assert "No space left on device" in message
    assert_same(read(tmp_path / "mine"), old)
    assert names(tmp_path) == ["mine"]


# Where checkpoints are


def test_folder_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(tmp_path))
    assert checkpoint_folder() == tmp_path


def test_folder_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GURA_JAX_CHECKPOINTS", raising=False)
    (tmp_path / "gura_jax").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "README.md").write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "gura_jax" / "checkpoint.py"))
    assert checkpoint_folder() == tmp_path / "checkpoints"
    (tmp_path / "pyproject.toml").unlink()
    assert checkpoint_folder() != tmp_path / "checkpoints"


@pytest.mark.parametrize("empty", [None, ""])
def test_folder_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty: str | None) -> None:
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "site-packages" / "gura_jax" / "checkpoint.py"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("GURA_JAX_CHECKPOINTS",):
        monkeypatch.delenv(name, raising=False) if empty is None else monkeypatch.setenv(name, empty)
    assert checkpoint_folder() == tmp_path / "cache" / "gura_jax" / "checkpoints"
    monkeypatch.delenv("XDG_CACHE_HOME") if empty is None else monkeypatch.setenv("XDG_CACHE_HOME", empty)
    assert checkpoint_folder() == tmp_path / "home" / ".cache" / "gura_jax" / "checkpoints"


@pytest.mark.parametrize("architecture", [ARCHITECTURE, CrepeConfig("tiny")])
def test_a_real_encoders_arrays(tmp_path: Path, architecture: Config) -> None:
    params = {k: np.full(a.shape, i + 1, a.dtype) for i, (k, a) in enumerate(abstract_params(architecture).items())}
    save(tmp_path / "mine", params, manifest(params, architecture))
    assert checkpoint.read_manifest(tmp_path / "mine").architecture == architecture
    assert_same(read(tmp_path / "mine", params), params)
