"""Gradients: those of single encoders are PyTorch's, and those through a whole system reach everything."""

import copy
import dataclasses
import functools
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import VARIANTS, encoder, padded, precise_jit, relative, speech, torch_encoder

from gura_jax import ENCODERS, Encoder, Member, Model, Options, System, load_model
from gura_jax.backend import PLATFORMS
from gura_jax.convert import convert, references
from gura_jax.convert.keys import KeyTable
from gura_jax.models.crepe import CREPE, CrepeConfig
from gura_jax.models.encoder import frame_mask
from gura_jax.models.families import FAMILIES, build_encoder

# A gradient sums over frames and layers, so float32 leaves it further from float64 than the values: PyTorch's as well.
ORACLE_BOUND = 1e-5  # relative, to PyTorch's in float64; or as far as PyTorch's own in float32, twice
# A central difference in float32, at the best of some widths: rounding on one side, bends (ReLU, maxima) on the other.
DIFFERENCE_BOUND = 1e-2
WIDTHS = (1e-3, 3e-4, 1e-4, 3e-3, 1e-2)
SAMPLES = 2400  # 0.15 s: 7 frames of the encoders, 4 of CREPE


def shallow(name: str) -> Member:
    """A small encoder of this kind, of one block."""
    config = dataclasses.replace(ENCODERS[name].config.tiny(), num_hidden_layers=1)
    return Member(build_encoder(config, Options("mean")), name=name)


SYSTEM = System(
    "mine", (shallow("hubert-large"), shallow("wav2vec2-base"), Member("crepe-tiny")), "interleave", feature_size=32
)


# Of encoders, beside PyTorch's


# Layers scanned and computed again, attention by a few queries and keys, and frames in blocks.
IN_BLOCKS = Options(platform=dataclasses.replace(PLATFORMS["tpu"], scores=64, frames=8, tokens=8), remat="layers")


CLIPS = [speech(3300, 1), speech(1500, 2)]


def projection(clip: int, frames: int, size: int) -> np.ndarray:
    """What a clip's frames [T, D] are multiplied with, so that their sum is a number that sees each of them."""
    return np.random.default_rng(clip).standard_normal((frames, size)).astype(np.float32)


def our_gradient(encoder: Encoder, params: Any) -> tuple[Any, jax.Array]:
    """With respect to weights and audio, of the clips in one padded batch."""
    audio, lengths = padded(CLIPS, 4000)

    def total(params: Any, audio: jax.Array) -> jax.Array:
        frames, counts, _ = encoder(params, audio, jnp.asarray(lengths))
        weights = np.zeros(frames.shape, np.float32)
        for b, clip in enumerate(CLIPS):
            count = encoder.grid.count(len(clip))
            weights[b, :count] = projection(b, count, frames.shape[-1])
        return jnp.where(frame_mask(counts, frames.shape[1])[:, :, None], frames * weights, 0.0).sum()

    return precise_jit(jax.grad(total, argnums=(0, 1)))(params, audio)


def torch_gradient(
    reference: Any, hop: int, part: str, by_audio: bool
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The same of the clips one by one, by the names of a state dict, in the precision of the network."""
    dtype = next(reference.parameters()).dtype
    clips = [torch.from_numpy(clip)[None].to(dtype).requires_grad_(by_audio) for clip in CLIPS]
    for b, clip in enumerate(clips):
        frames = dict(reference.parts(clip, hop))[part]
        (frames * torch.from_numpy(projection(b, *frames.shape)).to(dtype)).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in reference.model.named_parameters() if p.grad is not None}
    return gradients, [clip.grad.numpy()[0] for clip in clips if clip.grad is not None]


def converted(gradients: Mapping[str, np.ndarray], table: KeyTable) -> dict[str, np.ndarray]:
    """By our names and shapes: what converts weights linearly converts their gradients."""
    out = {}
    for name, gradient in gradients.items():
        for pattern, target, transform in table.rows:
            if match := re.fullmatch(pattern, name):
                out[match.expand(target)] = transform.apply(gradient)
    return out


def assert_gradients(ours: Mapping[str, Any], single: Mapping[str, Any], double: Mapping[str, Any]) -> None:
    assert single.keys() == double.keys()
    for name, exact in double.items():
        bound = max(ORACLE_BOUND, 2 * relative(single[name], exact))
        assert relative(ours[name], exact) <= bound, name


@pytest.mark.parametrize(
    "variant",
    ["hubert base", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wav2vec2 large", "wavlm large"))],
)
def test_gradients_of_a_speech_encoder_are_pytorchs(variant: str) -> None:
    model = encoder(variant)
    config = model.config
    plain, in_blocks = (build_encoder(config, options) for options in (Options(), IN_BLOCKS))
    by_params, by_audio = our_gradient(plain, model.params)
    stacked, by_audio_in_blocks = our_gradient(in_blocks, in_blocks.prepare(dict(model.params)))
    network = torch_encoder(VARIANTS[variant], seed=list(VARIANTS).index(variant))  # the same once more, to change
    conv = network.encoder.pos_conv_embed.conv
    torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")  # our kernel is the folded one
    found = []
    for dtype in (torch.float32, torch.float64):
        kind: Any = references.find_reference(FAMILIES[config.model_type].reference)
        reference = kind(config, copy.deepcopy(network).to(dtype))
        gradients, audio = torch_gradient(reference, config.hop, f"state {config.num_hidden_layers}", by_audio=True)
        named = converted(gradients, FAMILIES[config.model_type].keys["transformers"])
        found.append(named | {f"audio {b}": row for b, row in enumerate(audio)})
    # Softmax is blind to a bias of all keys: its gradient is rounding.
    single, double = ({k: v for k, v in each.items() if not k.endswith("k_proj.bias")} for each in found)
    for weights, audio in ((by_params, by_audio), (in_blocks.restore(stacked), by_audio_in_blocks)):
        ours = {**weights} | {f"audio {b}": audio[b, : len(clip)] for b, clip in enumerate(CLIPS)}
        assert single.keys() == {name for name in ours if not name.endswith("k_proj.bias")}
        assert_gradients(ours, single, double)


def test_gradients_of_crepe_are_pytorchs() -> None:
    """Of the kernels, through the frequency domain."""
    config = CrepeConfig("tiny")
    reference = references.Crepe.random(config, 0).eval()
    with tempfile.TemporaryDirectory() as folder:
        params = convert(reference.save(Path(folder) / "crepe")).params
    ours, _ = our_gradient(build_encoder(config, Options()), params)
    single, double = (
        converted(torch_gradient(network, 800, "frames", by_audio=False)[0], CREPE.keys["torchcrepe"])
        for network in (reference, copy.deepcopy(reference).double())
    )
    assert len(single) == 4 * 5  # kernel, bias, scale and offset of each layer of the embedding
    assert_gradients(ours, single, double)


# Through a whole system


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(SYSTEM, weights="random", devices=jax.local_devices()[:1])


@pytest.fixture(scope="module")
def value_and_grad(model: Model) -> Any:
    """Of a smooth number with respect to weights and audio; called seven times, so LLVM's optimisation pays."""
    optimised = {"xla_backend_optimization_level": 1}
    return precise_jit(jax.value_and_grad(functools.partial(loss, model), argnums=(0, 1)), compiler_options=optimised)


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
    point = jax.device_get({**model.params, "audio": audio})
    _, (by_params, by_audio) = jax.device_get(value_and_grad(model.params, audio, lengths))
    gradients = {**by_params, "audio": by_audio}
    rng = np.random.default_rng(3)

    @precise_jit
    def value(point: Any) -> jax.Array:
        return loss(model, {k: v for k, v in point.items() if k != "audio"}, point["audio"], lengths)

    def direction(gradient: np.ndarray) -> np.ndarray:
        """Half along the gradient, so that the slope stands out of the rounding; the other half anywhere."""
        return 0.5 * _unit(gradient) + 0.5 * _unit(rng.standard_normal(gradient.shape))

    for name, gradient in gradients.items():
        step = jax.tree.map(direction, gradient)
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, s: float(np.vdot(g, s)), gradient, step)))
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


def _unit(x: np.ndarray) -> np.ndarray:
    return (x / max(np.linalg.norm(x), 1e-12)).astype(np.float32)


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
