"""Model.save, and load_model of what it wrote: the same model, its weights bit for bit, whole or not at all."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from reference import speech
from refusals import refuses
from toy import Toy

from gura_jax import CheckpointError, Member, Model, System, SystemConfigError, checkpoint, load_model
from gura_jax.checkpoint import SAVED_SYSTEM

# Every field of systems and members that a saved one must keep.
SYSTEM = System(
    "mine",
    (
        Member("hubert-large", (1, -1), name="speech"),
        Member("wav2vec2-base", (0.5, 0.0, 0.25, 1.0), name="other"),
        Member("crepe-tiny", name="pitch"),
    ),
    "interleave",
    feature_size=16,
    scene_groups=2,
    sample_rate=24_000,
)
PITCH = System("pitch", (Member("crepe-tiny"),))


def load(system: Any, **options: Any) -> Model:
    return load_model(system, devices=jax.local_devices()[:1], **options)


@functools.cache
def original(system: System = SYSTEM, **options: Any) -> Model:
    return load(system, weights="random", size="tiny", **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "some" / "model"
    original().save(path)
    return path


def assert_same_arrays(a: Model, b: Model) -> None:
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for (path, x), y in zip(jax.tree.leaves_with_path(a.params), jax.tree.leaves(b.params), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# The same model


def test_weights_and_embeddings_are_the_same_bit_for_bit(saved: Path) -> None:
    again = load(saved)
    assert_same_arrays(again, original())
    clips = [speech(n, seed=n) for n in (7200, 3000)]
    for ours, expected in zip(again.embed(clips), original().embed(clips), strict=True):
        for name in ("frames", "times", "scene"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name))


def test_the_description_is_kept(saved: Path) -> None:
    assert names(saved.parent) == ["model"]
    assert names(saved) == sorted([SAVED_SYSTEM, "speech", "other", "pitch"])
    for path in (saved, str(saved), saved / "."):
        system = load(path).system
        members = [
            dataclasses.replace(m, encoder=own.encoder) for m, own in zip(system.members, SYSTEM.members, strict=True)
        ]
        assert dataclasses.replace(system, members=tuple(members)) == SYSTEM
        assert [Path(str(m.encoder)).name for m in system.members] == ["speech", "other", "pitch"]


def test_pooled_scenes_are_kept(tmp_path: Path) -> None:
    model = original(PITCH)
    (member,) = model.system.members
    object.__setattr__(member, "scene", "pooled")  # no published encoder has one, and none is computed here
    try:
        model.save(tmp_path / "pooled")
    finally:
        object.__setattr__(member, "scene", "frames")
    content = json.loads((tmp_path / "pooled" / SAVED_SYSTEM).read_text())
    assert content["members"] == [
        {"encoder": "./crepe-tiny", "name": "crepe-tiny", "layers": "last", "scene": "pooled"}
    ]


def test_a_model_may_be_moved(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "elsewhere")
    assert_same_arrays(load(tmp_path / "elsewhere"), original())


def test_its_members_are_checkpoints(saved: Path) -> None:
    """Each can be loaded by itself, or given to a member of another system."""
    alone = load(saved / "pitch")
    assert alone.system == System("pitch", (Member(str(saved / "pitch")),))
    other = load(System("other", (Member(str(saved / "speech"), "mean"),)))
    for model, member in ((alone, "pitch"), (other, "speech")):
        arrays = original().params[member]
        for name, array in model.params[member].items():
            np.testing.assert_array_equal(array, arrays[name])


def test_crepes_kernels_are_written_and_not_its_spectra(saved: Path) -> None:
    """On every platform, from whichever it was saved."""
    assert original().platform.spectral_crepe
    manifest = checkpoint.read_manifest(saved / "pitch")
    assert {name for name in manifest.arrays_sha256 if "spectrum" in name} == set()
    direct = load(saved / "pitch", platform="gpu")
    np.testing.assert_array_equal(
        direct.params["pitch"]["layers.1.conv.kernel"], original().params["pitch"]["layers.1.conv.kernel"]
    )


def test_bfloat16_is_kept_exactly(tmp_path: Path) -> None:
    """Written as float32, which holds it; loaded in the type that is asked for."""
    system = System("half", (Member("hubert-large"),))
    model = original(system, dtype="bfloat16")
    kernel = "encoder.layers.0.attention.q_proj.kernel"
    assert model.params["hubert-large"][kernel].dtype == "bfloat16"
    model.save(tmp_path / "half")
    assert_same_arrays(load(tmp_path / "half", dtype="bfloat16"), model)
    exact = load(tmp_path / "half")
    np.testing.assert_array_equal(
        exact.params["hubert-large"][kernel], np.asarray(model.params["hubert-large"][kernel], np.float32)
    )


# Where it came from


def test_manifests_say_where_weights_came_from(saved: Path, tmp_path: Path) -> None:
    """Unchanged, changed, and both again from what was saved: with the hash of what it was."""
    assert checkpoint.read_manifest(saved / "pitch").source == "random"
    loaded = load(saved / "pitch")
    fingerprint = loaded.weights["pitch"]["fingerprint"]
    assert loaded.random_members == ["pitch"]  # also after it was saved
    changed = loaded.with_params(jax.tree.map(lambda x: 2 * x, loaded.params))
    for model, source in ((loaded, "random"), (changed, "changed from random")):
        model.save(tmp_path / "again", overwrite=True)
        manifest = checkpoint.read_manifest(tmp_path / "again" / "pitch")
        assert manifest.source == source
        assert manifest.source_sha256 == {"checkpoint": fingerprint}
        assert manifest.architecture == loaded.fusion.members[0].config
    again = load(tmp_path / "again")
    assert again.weights["pitch"]["source"] == "changed from random"
    assert_same_arrays(again, changed)


# Refused


def test_a_member_that_is_an_object(tmp_path: Path) -> None:
    model = load(System("toy", (Member(Toy(), name="mine"), Member("crepe-tiny"))), weights="random")
    with refuses(SystemConfigError, "member 'mine' is a Python object", "gura_jax.register"):
        model.save(tmp_path / "out")
    assert names(tmp_path) == []


def test_where_there_is_something(tmp_path: Path) -> None:
    model = original(PITCH)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with refuses(CheckpointError, name, "exists already", "overwrite=True"):
            model.save(tmp_path / name)
        with refuses(CheckpointError, name, "expected a saved model to overwrite"):
            model.save(tmp_path / name, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path / "folder") == []


def test_a_missing_member_is_not_taken_from_the_checkpoint_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(tmp_path))
    original(PITCH).save(tmp_path / "model")
    (tmp_path / "model" / "crepe-tiny").rename(tmp_path / "crepe-tiny")
    with refuses(SystemConfigError, str(tmp_path / "model" / "crepe-tiny"), "found none"):
        load(tmp_path / "model")


def test_what_could_not_be_loaded_again(tmp_path: Path) -> None:
    model = original(PITCH)
    lost = model.with_params(jax.tree.map(lambda x: x * np.float32("nan"), model.params))
    with refuses(CheckpointError, "crepe-tiny", "expected finite weights"):
        lost.save(tmp_path / "model")
    many = jax.tree.map(lambda x: np.stack([x, x]), model)
    with refuses(CheckpointError, "crepe-tiny", "expected an array of shape"):
        many.save(tmp_path / "model")
    assert names(tmp_path) == []


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with refuses(CheckpointError, "cannot write", "model"):
        original(PITCH).save(tmp_path / "file" / "model")


@pytest.mark.parametrize("name", ["..", ".", "../other", "a/b", "{tmp}/other", SAVED_SYSTEM])
def test_members_whose_names_no_folder_can_have(tmp_path: Path, name: str) -> None:
    """Nothing is written outside the model's folder, and no member over the description."""
    name = name.format(tmp=tmp_path)
    model = load(System("odd", (Member("crepe-tiny", name=name),)), weights="random")
    with refuses(SystemConfigError, f"member {name!r}", "expected the name of a folder"):
        model.save(tmp_path / "within" / "model")
    assert names(tmp_path) == []


# Whole or not at all


class Killed(BaseException):
    """Ends a process without its clean-up, as far as a test can."""


@pytest.mark.parametrize("part", ["first member", "second member", "description"])
@pytest.mark.parametrize("error", [OSError("disk full"), Killed()])
def test_half_a_model_is_none(part: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error removes what was written; a kill leaves it under a temporary name. Either may be repeated."""
    model = original(System("two", (Member("crepe-tiny", name="a"), Member("crepe-tiny", name="b"))))
    path = tmp_path / "model"
    parts = iter(("first member", "second member"))
    write = checkpoint.save

    def save(*arguments: Any, **options: Any) -> None:
        if next(parts) == part:
            raise error
        write(*arguments, **options)

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        if part == "description":
            patch.setattr("gura_jax.files.write_file", fail)
        if isinstance(error, Killed):
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises((CheckpointError, Killed)):
            model.save(path)
    assert not path.exists()
    assert isinstance(error, Killed) or names(tmp_path) == []
    model.save(path)
    assert_same_arrays(load(path), model)


def test_an_older_model_stands_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = original(PITCH), tmp_path / "model"
    model.save(path)
    changed = model.with_params(jax.tree.map(lambda x: 2 * x, model.params))

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("gura_jax.files.write_file", fail)
        with refuses(CheckpointError, "cannot write the model", "disk full"):
            changed.save(path, overwrite=True)
    assert names(tmp_path) == ["model"]
    assert_same_arrays(load(path), model)
    changed.save(path, overwrite=True)
    assert names(tmp_path) == ["model"]
    assert_same_arrays(load(path), changed)


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """The older model has been moved away, and the new one is not there yet: loading brings it back."""
    model, path = original(PITCH), tmp_path / "model"
    model.save(path)
    (tmp_path / ".model.old.abc").mkdir()
    path.rename(tmp_path / ".model.old.abc" / "old")
    assert_same_arrays(load(path), model)
    assert names(tmp_path) == ["model"]
