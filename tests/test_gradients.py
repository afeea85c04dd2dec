"""Gradients through a whole system, with respect to audio and to weights."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import precise_jit, speech, unoptimised_jit

from gura_jax import Member, Model, System, load_model

# A central difference in float32, at the best of some widths: rounding on one side, bends (ReLU, maxima) on the other.
DIFFERENCE_BOUND = 1e-2
WIDTHS = (1e-3, 3e-4, 1e-4, 3e-3, 1e-2)
SAMPLES = 2400  # 0.15 s: 7 frames of the encoders, 4 of CREPE

SYSTEM = System(
    "mine",
    (Member("hubert-large", "mean"), Member("wav2vec2-base", "mean"), Member("crepe-tiny")),
    "interleave",
    feature_size=32,
)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(SYSTEM, weights="random", size="tiny", devices=jax.local_devices()[:1])


@pytest.fixture(scope="module")
def value_and_grad(model: Model) -> Any:
    """Of a smooth number with respect to weights and audio."""
    return unoptimised_jit(jax.value_and_grad(functools.partial(loss, model), argnums=(0, 1)))


def loss(model: Model, params: Any, audio: jax.Array, lengths: jax.Array) -> jax.Array:
    """All of the frames and the scenes, each with a weight of its own."""
    out = model.fuse(params, audio, lengths)
    assert out.frames is not None
    assert out.scenes is not None
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(x.shape).astype(np.float32) for x in (out.frames, out.scenes))
    return (out.frames * a).sum() + 10 * (out.scenes * b).sum()


def batch() -> tuple[jax.Array, jax.Array]:
    audio = np.stack([speech(SAMPLES, 1), speech(SAMPLES, 2)])
    return jnp.asarray(audio), jnp.array([SAMPLES, 1700], jnp.int32)


def test_finite_and_reaching_everything(model: Model, value_and_grad: Any) -> None:
    audio, lengths = batch()
    _, (by_params, by_audio) = value_and_grad(model.params, audio, lengths)
    chex.assert_tree_all_finite((by_params, by_audio))
    assert (np.abs(np.asarray(by_audio[0])) > 0).mean() > 0.9
    assert not np.asarray(by_audio[1, 1700:]).any()  # past the clip's end
    unused = {"layers.5.", "classifier."}  # CREPE's pitch head, which an embedding does not see
    for member, arrays in by_params.items():
        for name, gradient in arrays.items():
            seen = not (member.startswith("crepe") and any(name.startswith(u) for u in unused))
            # Softmax is blind to a bias of all keys: its gradient is rounding.
            if not name.endswith("k_proj.bias"):
                assert bool(jnp.any(gradient != 0)) == seen, f"{member} {name}"


def test_directional_derivatives(model: Model, value_and_grad: Any) -> None:
    """Along a direction of the audio and of each member's weights, against a central difference."""
    audio, lengths = batch()
    point = {**model.params, "audio": audio}
    _, (by_params, by_audio) = value_and_grad(model.params, audio, lengths)
    gradients = {**by_params, "audio": by_audio}
    rng = np.random.default_rng(3)

    @precise_jit
    def value(point: Any) -> jax.Array:
        return loss(model, {k: v for k, v in point.items() if k != "audio"}, point["audio"], lengths)

    def direction(gradient: jax.Array) -> jax.Array:
        """Half along the gradient, so that the slope stands out of the rounding; the other half anywhere."""
        return 0.5 * _unit(gradient) + 0.5 * _unit(rng.standard_normal(gradient.shape).astype(np.float32))

    for name, gradient in gradients.items():
        step = jax.tree.map(direction, gradient)
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, s: float(jnp.vdot(g, s)), gradient, step)))
        errors = []
        for width in WIDTHS:
            sides = [
                float(value({**point, name: jax.tree.map(lambda v, s, w=w: v + np.float32(w) * s, point[name], step)}))
                for w in (width, -width)
            ]
            errors.append(abs((sides[0] - sides[1]) / (2 * width) - slope) / abs(slope))
            if errors[-1] <= DIFFERENCE_BOUND:
                break
        assert errors[-1] <= DIFFERENCE_BOUND, f"{name}: {errors}"


def _unit(x: Any) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x), np.float32(1e-12))


def test_silence(model: Model, value_and_grad: Any) -> None:
    """A silent clip, and a clip with silent frames: finite, whatever norms divide by."""
    audio, lengths = batch()
    silent = jnp.stack([jnp.zeros(SAMPLES, jnp.float32), audio[0].at[900:].set(0.0)])
    value, gradients = value_and_grad(model.params, silent, lengths)
    chex.assert_tree_all_finite((value, gradients))


def test_constant_audio(model: Model, value_and_grad: Any) -> None:
    """An offset and nothing else: no variance anywhere but at the ends."""
    _, lengths = batch()
    chex.assert_tree_all_finite(value_and_grad(model.params, jnp.full((2, SAMPLES), 0.5, jnp.float32), lengths))


def test_what_is_past_the_end_does_not_spoil_gradients(model: Model, value_and_grad: Any) -> None:
    """NaN in the padding must not reach the gradient through 0 * NaN."""
    audio, lengths = batch()
    plain = value_and_grad(model.params, audio.at[1, 1700:].set(0.0), lengths)
    spoiled = value_and_grad(model.params, audio.at[1, 1700:].set(jnp.nan), lengths)
    chex.assert_trees_all_equal(plain, spoiled)
