"""A model under JAX's transformations: as an argument of jit and grad, under vmap, and trained with optax."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import precise_jit, relative, speech
from refusals import refuses

from gura_jax import Member, Model, System, SystemConfigError, load_model

SYSTEM = System("mine", (Member("hubert-large", (1, -1)), Member("crepe-tiny")), "interleave", 16)
SAME_BOUND = 1e-6  # relative: the same operations, compiled into another program
SPECTRA_BOUND = 1e-5  # relative: CREPE's filters computed in float32 on the way, or in float64 once
SAMPLES = 1600  # 0.1 s
RATE, STEPS = 1e-3, 3


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(SYSTEM, weights="random", size="tiny", devices=jax.local_devices()[:1])


def batch() -> tuple[np.ndarray, np.ndarray]:
    audio = np.stack([speech(SAMPLES, seed) for seed in (1, 2)])
    audio[1, 1200:] = 0
    return audio, np.array([SAMPLES, 1200], np.int32)


def loss(model: Model, audio: Any, lengths: Any) -> jax.Array:
    """How far the scenes are from one."""
    scenes = model.fuse(model.params, audio, lengths).scenes
    assert scenes is not None
    return jnp.square(scenes - 1.0).mean()


value_and_grad = precise_jit(jax.value_and_grad(loss))


# A pytree: the weights are leaves, the rest is static


def test_its_leaves_are_the_weights(model: Model) -> None:
    leaves, structure = jax.tree.flatten(model)
    assert [id(leaf) for leaf in leaves] == [id(leaf) for leaf in jax.tree.leaves(model.params)]
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, Model)
    assert (again.system, again.sample_rate, again.min_samples) == (model.system, model.sample_rate, model.min_samples)
    assert jax.tree.structure(again) == structure
    shapes = jax.eval_shape(lambda m: m, model)
    assert jax.tree.structure(shapes) == structure


def test_jit_over_a_model(model: Model) -> None:
    """By its pure function and by a call: what the model itself computes; compiled once for models of one kind."""
    traces: list[Model] = []

    def scenes(model: Model, audio: Any, lengths: Any) -> Any:
        traces.append(model)
        return model.fuse(model.params, audio, lengths).scenes, model(audio, lengths, frames=False).scenes

    run = precise_jit(scenes)
    expected = model(*batch()).scenes
    for ours in run(model, *batch()):
        assert relative(ours, expected) <= SPECTRA_BOUND
    halved = jax.tree.map(lambda leaf: leaf / 2, model)
    assert isinstance(halved, Model)
    for ours in run(halved, *batch()):
        assert relative(ours, expected) > 0.01
    assert len(traces) == 1


def test_a_first_call_that_is_traced() -> None:
    """What is derived from the weights then is kept as arrays, and not as the tracers of that call."""
    model = load_model(System("pitch", (Member("crepe-tiny"),)), weights="random", devices=jax.local_devices()[:1])
    traced = jax.jit(lambda *batch: model(*batch, frames=False).scenes)(*batch())
    assert relative(traced, model(*batch(), frames=False).scenes) <= SAME_BOUND


def test_vmap_over_batches(model: Model) -> None:
    audio, lengths = batch()
    many = np.stack([audio, audio[::-1], 0.5 * audio])
    counts = np.stack([lengths, lengths[::-1], lengths])
    out = precise_jit(jax.vmap(model.fuse, in_axes=(None, 0, 0)))(model.params, many, counts)
    one = precise_jit(model.fuse)
    for b in range(len(many)):
        apart = one(model.params, many[b], counts[b])
        np.testing.assert_array_equal(out.counts[b], apart.counts)
        assert relative(out.frames[b], apart.frames) <= SAME_BOUND
        assert relative(out.scenes[b], apart.scenes) <= SAME_BOUND


# Gradients and training


def test_grad_with_respect_to_a_model(model: Model) -> None:
    """The gradient is a model too; CREPE's kernels have one, although its filters are derived from them."""
    value, gradient = value_and_grad(model, *batch())
    assert isinstance(gradient, Model)
    assert jax.tree.structure(gradient) == jax.tree.structure(model)
    chex.assert_tree_all_finite((value, gradient.params))
    for member, arrays in gradient.params.items():
        for name, array in arrays.items():
            assert array.shape == model.params[member][name].shape
            assert array.dtype == jnp.float32
            # CREPE's pitch head is not part of an embedding; softmax is blind to a bias of all keys.
            blind = member == "crepe-tiny" and name.startswith(("layers.5.", "classifier."))
            if not name.endswith("k_proj.bias"):
                assert bool(jnp.any(array != 0)) != blind, f"{member} {name}"


@pytest.fixture(scope="module")
def trained(model: Model) -> tuple[Model, list[float]]:
    """After some steps, and the losses on the way."""
    optimiser = optax.adam(RATE)
    params, losses = model.params, []
    state = optimiser.init(params)

    @jax.jit
    def update(gradient: Any, state: Any, params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, state = optimiser.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        value, gradient = value_and_grad(model.with_params(params), *batch())
        params, state = update(gradient.params, state, params)
        losses.append(float(value))
    return model.with_params(params), losses


def test_training_lowers_the_loss(trained: tuple[Model, list[float]]) -> None:
    _, losses = trained
    assert sorted(losses, reverse=True) == losses
    assert losses[-1] < 0.9 * losses[0]


def test_a_trained_model_computes_with_its_new_weights(model: Model, trained: tuple[Model, list[float]]) -> None:
    """As one that is built from them: CREPE's filters, which are derived once, are derived anew."""
    changed, _ = trained
    built = Model(
        model.system, model.fusion, changed.params, model.weights, model.compilation, model.dtype, model.platform
    )
    before, after, expected = (m(*batch()) for m in (model, changed, built))
    for name in ("frames", "scenes"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(expected, name))
        assert relative(getattr(after, name), getattr(before, name)) > 1e-3
    # Every other feature is CREPE's: its part alone has changed as well.
    assert relative(np.asarray(after.scenes)[:, 1::2], np.asarray(before.scenes)[:, 1::2]) > 1e-3
    pure = precise_jit(changed.fuse)(changed.params, *batch())
    assert relative(pure.scenes, after.scenes) <= SPECTRA_BOUND


def test_changed_weights_are_said_to_be(model: Model, trained: tuple[Model, list[float]]) -> None:
    changed, _ = trained
    assert model.random_members == ["hubert-large", "crepe-tiny"]
    assert changed.random_members == []
    assert {w["source"] for w in changed.weights.values()} == {"changed from random"}


@pytest.mark.parametrize("put", [np.asarray, jnp.asarray, lambda x: jax.device_put(x, jax.local_devices()[1])])
def test_with_params_places_weights(put: Any) -> None:
    """Wherever they are: in host memory, or on one device of several."""
    model = load_model(System("pitch", (Member("crepe-tiny"),)), weights="random")
    expected = model(*batch(), frames=False).scenes
    changed = model.with_params(jax.tree.map(put, jax.device_get(model.params)))
    assert {leaf.sharding for leaf in jax.tree.leaves(changed)} == {leaf.sharding for leaf in jax.tree.leaves(model)}
    chex.assert_trees_all_equal(changed(*batch(), frames=False).scenes, expected)


def test_with_params_refuses_other_weights(model: Model) -> None:
    alone = {"crepe-tiny": model.params["crepe-tiny"]}
    with refuses(SystemConfigError, "params: expected the weights of hubert-large, crepe-tiny", "found others"):
        model.with_params(alone)
    cut = dict(model.params["crepe-tiny"])
    cut["classifier.bias"] = cut["classifier.bias"][1:]
    with refuses(SystemConfigError, "params: crepe-tiny: classifier.bias: expected [360], found [359]"):
        model.with_params({**model.params, "crepe-tiny": cut})
