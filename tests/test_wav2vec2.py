"""models/speech.py: every kind of encoder against PyTorch, module by module; padding; configs; layers."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    PADDING_BOUND,
    PARITY_BOUND,
    VARIANTS,
    Encoder,
    assert_parity,
    encoder,
    padded,
    precise_jit,
    relative,
    speech,
    torch_states,
    unoptimised_jit,
)
from transformers import HubertConfig, Wav2Vec2Config

from gura_jax.errors import SystemConfigError
from gura_jax.models import speech as speech_module
from gura_jax.models.encoder import frame_mask
from gura_jax.models.speech import (
    BLOCKS,
    INT_FIELDS,
    NEUTRAL,
    TUPLE_FIELDS,
    Blocks,
    SpeechConfig,
    SpeechFrames,
    attention,
    layer_weights,
    speech_functional,
)

TORCH_PADDING_FAULT = 1e-3  # PyTorch's group norm over padding is off by percents: far above rounding
SUM_BOUND = 1e-6  # a running sum of a few states against numpy's in float64
BLOCK_BOUND = 1e-6  # relative, in blocks against at once: the same sums in another order
BFLOAT16_BOUND = 0.03  # relative; its numbers have 8 bits
CLIP = 8000  # samples, half a second: 24 frames
LENGTHS = (8000, 1234, 3300)
PADDED = 8900  # so that even the longest clip has padding
GARBAGE = 3.0  # amplitude of what lies past a clip: louder than any audio

variants = pytest.mark.parametrize("variant", VARIANTS)


def every_state(model: Encoder, audio: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All hidden states [B, L + 1, T, D], and counts."""
    frames = SpeechFrames(model.config)
    states = tuple(range(model.config.num_hidden_layers + 1))

    def run(params: Any, audio: Any, lengths: Any) -> Any:
        return frames.hidden_states(params, audio, lengths, states)

    out, counts = unoptimised_jit(run)(model.params, audio, lengths)
    return np.asarray(out), np.asarray(counts)


@functools.cache
def padded_states(variant: str) -> list[np.ndarray]:
    """Hidden states [L + 1, T, D] of clips in one batch with garbage past their ends, trimmed."""
    out, counts = every_state(encoder(variant), *padded(clips(), PADDED, GARBAGE))
    assert np.isfinite(out).all()
    return [states[:, :count] for states, count in zip(out, counts, strict=True)]


@functools.cache
def clips() -> list[np.ndarray]:
    return [speech(n, seed) for seed, n in enumerate(LENGTHS)]


# Parity, module by module, each fed the same input on both sides


@variants
def test_modules(variant: str) -> None:
    model = encoder(variant)
    config = model.config
    rng = np.random.default_rng(1)
    audio = np.stack([speech(4000, 1), speech(4000, 2)])
    num_frames = 1 + (4000 - config.window) // config.hop
    features = rng.standard_normal((2, num_frames, config.conv_dim[-1])).astype(np.float32)
    hidden = rng.standard_normal((2, num_frames, config.hidden_size)).astype(np.float32)
    inputs = {
        "feature extractor": audio,
        "feature projection": features,
        "positional convolution": hidden,
        "encoder layer": hidden,
    }

    def run(params: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        network = speech_functional(config).merge(params)
        counts = jnp.full(2, num_frames, jnp.int32)
        mask = frame_mask(counts, num_frames)
        out, counted = network.feature_extractor(inputs["feature extractor"], jnp.full(2, 4000, jnp.int32))
        return {
            "feature extractor": out,
            "feature projection": network.feature_projection(inputs["feature projection"]),
            "positional convolution": network.encoder.pos_conv_embed(inputs["positional convolution"], mask),
            "encoder layer": network.encoder.layers[0](inputs["encoder layer"], mask),
            "counts": counted - counts,
        }

    ours = unoptimised_jit(run)(model.params, inputs)
    assert not ours.pop("counts").any()
    for name, x in inputs.items():
        single, double = (torch_module(net, name, x) for net in (model.torch, model.double))
        assert_parity(ours[name], single, double, name)


def torch_module(network: Any, name: str, x: np.ndarray) -> np.ndarray:
    module = {
        "feature extractor": network.feature_extractor,
        "feature projection": network.feature_projection,
        "positional convolution": network.encoder.pos_conv_embed,
        "encoder layer": network.encoder.layers[0],
    }[name]
    with torch.inference_mode():
        out = module(torch.from_numpy(x).to(next(network.parameters()).dtype))
        out = out[0] if isinstance(out, tuple) else out
        return (out.transpose(1, 2) if name == "feature extractor" else out).numpy()


@variants
def test_every_hidden_state_in_a_padded_batch(variant: str) -> None:
    """Parity and padding at once: our padded batch with garbage against PyTorch's single clips."""
    model = encoder(variant)
    for ours, clip in zip(padded_states(variant), clips(), strict=True):
        singles, doubles = torch_states(model.torch, clip), torch_states(model.double, clip)
        assert len(ours) == len(singles) == model.config.num_hidden_layers + 1
        for i, triple in enumerate(zip(ours, singles, doubles, strict=True)):
            assert_parity(*triple, name=f"{len(clip)} samples, state {i}")


@pytest.mark.parametrize("variant", ["hubert base", "wav2vec2 large", "batch norm"])
def test_a_clip_of_one_frame(variant: str) -> None:
    model = encoder(variant)
    clip = speech(400)
    ours, counts = every_state(model, *padded([clip], 700, GARBAGE))
    assert counts == [1]
    for i, state in enumerate(torch_states(model.torch, clip)):
        assert_parity(ours[0, i, :1], state, torch_states(model.double, clip)[i], f"state {i}")


@pytest.mark.parametrize("variant", ["wav2vec2 base", "hubert large"])
def test_every_array_matters(variant: str) -> None:
    """A converted array that parity could not see would be a hole in it: moving any one moves the output."""
    model = encoder(variant)
    frames = SpeechFrames(model.config)
    audio, lengths = speech(3000)[None], np.array([3000], np.int32)
    run = unoptimised_jit(lambda params: frames(params, jnp.asarray(audio), jnp.asarray(lengths))[0])
    plain = run(model.params)
    for name, array in model.params.items():
        # Softmax is blind to what is added to all keys, so the keys' bias does not count, in PyTorch either.
        if not name.endswith("k_proj.bias"):
            noise = np.random.default_rng(0).standard_normal(array.shape).astype(np.float32)
            moved = relative(run({**model.params, name: array * (1 + 0.3 * noise)}), plain)
            assert moved > 2 * PARITY_BOUND, name


# Padding


@variants
def test_padding(variant: str) -> None:
    model = encoder(variant)
    for ours, clip in list(zip(padded_states(variant), clips(), strict=True))[1:2]:  # the shortest: most padding
        alone, counts = every_state(model, clip[None], np.array([len(clip)], np.int32))
        assert counts[0] == alone.shape[2] == ours.shape[1]
        for i in range(len(ours)):
            assert relative(ours[i], alone[0, i]) <= PADDING_BOUND, f"{len(clip)} samples, state {i}"


@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v].get("feat_extract_norm") != "layer"])
def test_pytorch_depends_on_padding_with_group_norm(variant: str) -> None:
    """The fact that the masked group norm is there for: should PyTorch mend it, our words need mending too."""
    assert max(torch_padding_deviations(variant)[1:]) > TORCH_PADDING_FAULT


def torch_padding_deviations(variant: str) -> list[float]:
    """How far PyTorch's clips in a zero-padded batch with an attention mask are from the same clips alone."""
    model = encoder(variant).torch
    batch, lengths = padded(clips(), LENGTHS[0])
    mask = torch.from_numpy(np.arange(LENGTHS[0])[None] < lengths[:, None]).long()
    with torch.inference_mode():
        out = model(torch.from_numpy(batch), attention_mask=mask).last_hidden_state.numpy()
    alone = [torch_states(model, clip)[-1] for clip in clips()]
    return [relative(row[: len(one)], one) for row, one in zip(out, alone, strict=True)]


def test_group_norm_has_the_variance_of_loud_and_shifted_input() -> None:
    """The fast formula E[x^2] - E[x]^2 would lose all digits on an offset; PyTorch's does not."""
    model = encoder("group norm, conv bias")
    clip = (0.9 + 0.001 * speech(4000)).astype(np.float32)
    ours, _ = every_state(model, *padded([clip], 5000, GARBAGE))
    single, double = torch_states(model.torch, clip), torch_states(model.double, clip)
    ours_off, torch_off = relative(ours[0, -1, : len(single[-1])], double[-1]), relative(single[-1], double[-1])
    assert ours_off <= max(2 * torch_off, PADDING_BOUND)


# Layers


@pytest.mark.parametrize("variant", ["hubert base", "xls-r"])
def test_layers(variant: str) -> None:
    model = encoder(variant)
    L = model.config.num_hidden_layers
    states = padded_states(variant)
    audio, lengths = padded(clips(), PADDED, GARBAGE)
    weighted = tuple(float(w) for w in np.random.default_rng(0).standard_normal(L + 1))
    cases: dict[Any, Any] = {
        "last": lambda s: s[-1],
        "mean": lambda s: s.mean(axis=0),
        "mean_blocks": lambda s: s[1:].mean(axis=0),
        (0,): lambda s: s[0],
        (1, -1): lambda s: (s[1] + s[-1]) / 2,
        (-2, 0, 1): lambda s: (s[-2] + s[0] + s[1]) / 3,
        weighted: lambda s: np.tensordot(weighted, s, axes=1),
        (0.0, 2.5, *(0.0,) * (L - 1)): lambda s: 2.5 * s[1],
    }

    def run(params: Any, audio: Any, lengths: Any) -> Any:  # in one program: XLA then computes the states once
        return [SpeechFrames(model.config, layers)(params, audio, lengths)[0] for layers in cases]

    outputs = unoptimised_jit(run)(model.params, audio, lengths)
    for output, (layers, expected) in zip(outputs, cases.items(), strict=True):
        for row, stacked in zip(output, states, strict=True):
            assert relative(row[: stacked.shape[1]], expected(stacked.astype(np.float64))) <= SUM_BOUND, layers


def test_chosen_hidden_states_come_in_the_order_asked() -> None:
    model = encoder("hubert base")
    audio, lengths = padded(clips(), PADDED, GARBAGE)
    frames = SpeechFrames(model.config)
    out, counts = unoptimised_jit(lambda p, a, n: frames.hidden_states(p, a, n, (3, 0, 1)))(
        model.params, audio, lengths
    )
    for row, count, stacked in zip(np.asarray(out), counts, padded_states("hubert base"), strict=True):
        chex.assert_trees_all_close(row[:, :count], stacked[[3, 0, 1]], rtol=1e-4, atol=1e-5)


# Little but the hidden states, so that holding them all would be the peak.
DEEP_AND_WIDE = {"num_hidden_layers": 8, "hidden_size": 256, "num_attention_heads": 1, "conv_dim": [2] * 7}


def temporary_bytes(layers: Any, stacked: bool = False) -> int:
    config = SpeechConfig.from_transformers({**VARIANTS["hubert large"], **DEEP_AND_WIDE})
    frames = SpeechFrames(config, layers)

    def run(params: Any, audio: Any, lengths: Any) -> Any:
        if stacked:
            states, counts = frames.hidden_states(params, audio, lengths, tuple(range(9)))
            return states.mean(axis=1), counts
        return frames(params, audio, lengths)

    shapes = (frames.abstract_params, jax.ShapeDtypeStruct((1, 64_000), jnp.float32), jax.ShapeDtypeStruct((1,), "i4"))
    memory = jax.jit(run).lower(*shapes).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_the_layer_mean_holds_one_state_at_a_time() -> None:
    """XLA likes to put all the additions into one loop at the end, which takes every state as an operand."""
    state = 199 * 256 * 4  # bytes of one hidden state of four seconds
    last = temporary_bytes("last")
    assert temporary_bytes("mean") - last <= 2 * state  # the running sum, and slack for how buffers are shared
    assert temporary_bytes("mean", stacked=True) - last > 6 * state  # the measure can tell


# Blocks


def test_attention_in_blocks_is_attention() -> None:
    """Of some heads, or of some queries of one head, divided or not: the same as all at once."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 37, 4, 8)), jnp.float32) for _ in range(3))
    mask = frame_mask(jnp.array([37, 20]), 37)
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
    for scores in (1 << 20, 3 * 37 * 37 * 4, 37 * 37 * 4, 10 * 37 * 4, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(speech_module, "QUERIES_AT_ONCE", 16)
            patch.setattr(speech_module, "KEYS_AT_ONCE", 10)  # the last blocks are but filling, or past the clip
            patch.setitem(BLOCKS, "cpu", Blocks(64, 1, scores))
            assert relative(precise_jit(attention)(q, k, v, mask), expected) <= BLOCK_BOUND, scores


def test_attention_never_holds_all_scores() -> None:
    T = 4000
    shapes = [jax.ShapeDtypeStruct((1, T, 4, 16), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((1, T), jnp.bool_)]
    memory = jax.jit(attention).lower(*shapes).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * T * T * 4 / 3


@pytest.mark.parametrize("tokens", [1, 7, 20, 39, 40])
def test_a_feed_forward_layer_in_blocks(tokens: int) -> None:
    """Blocks that divide the tokens, and that do not: the same as all at once."""
    layer = speech_module.FeedForward(encoder("hubert base").config, jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))
    x = jnp.asarray(
        np.random.default_rng(0).standard_normal((2, 20, layer.intermediate_dense.in_features)), jnp.float32
    )
    expected = layer(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCKS, "cpu", BLOCKS["cpu"]._replace(tokens=tokens))
        assert relative(layer(x), expected) <= BLOCK_BOUND


@pytest.mark.parametrize("variant", ["hubert base", "hubert large", "other convolutions"])
def test_features_in_blocks_are_features(variant: str) -> None:
    """Also where blocks do not divide, some clips end before the last block, and some blocks hold no frame."""
    model = encoder(variant)
    audio, lengths = padded(clips(), PADDED, GARBAGE)

    def features(params: Any, audio: Any, lengths: Any) -> Any:
        return speech_functional(model.config).merge(params).feature_extractor(audio, lengths)

    outputs = []
    for blocks in (Blocks(1000, 1, 1), Blocks(7, 1, 1), Blocks(7, 4, 1), Blocks(1, 3, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(BLOCKS, "cpu", blocks)
            outputs.append(unoptimised_jit(lambda *x: features(*x))(model.params, audio, lengths))
    (whole, counts), *others = outputs
    for x, other_counts in others:
        np.testing.assert_array_equal(other_counts, counts)
        for row, expected, count in zip(x, whole, counts, strict=True):
            assert relative(row[:count], expected[:count]) <= BLOCK_BOUND


@pytest.mark.parametrize("variant", ["hubert base", "hubert large"])
def test_gradients_through_blocks_that_hold_no_frame(variant: str) -> None:
    """Of a short clip in a long batch: neither the mean of nothing nor the softmax of nothing may divide by zero."""
    model = encoder(variant)
    frames = SpeechFrames(model.config, "mean")
    audio, lengths = padded(clips(), PADDED)

    def loss(params: Any, audio: Any) -> jax.Array:
        x, counts = frames(params, audio, jnp.asarray(lengths))
        return jnp.where(frame_mask(counts, x.shape[1])[:, :, None], x, 0.0).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech_module, "QUERIES_AT_ONCE", 3)
        patch.setattr(speech_module, "KEYS_AT_ONCE", 5)
        gradients = []
        for blocks in (Blocks(1000, 1, 1 << 30), Blocks(2, 1, 60, 4)):
            patch.setitem(BLOCKS, "cpu", blocks)
            gradients.append(unoptimised_jit(jax.grad(lambda *x: loss(*x), argnums=(0, 1)))(model.params, audio))
    chex.assert_tree_all_finite(gradients)
    assert relative(gradients[1][1], gradients[0][1]) <= 1e-4


def test_memory_of_long_clips_grows_linearly() -> None:

    def temporary(seconds: int, layers: int = 3) -> int:
        config = SpeechConfig.from_transformers({**VARIANTS["hubert base"], "num_hidden_layers": layers})
        frames = SpeechFrames(config, "mean")
        audio = jax.ShapeDtypeStruct((1, 16_000 * seconds), jnp.float32)
        shapes = (frames.abstract_params, audio, jax.ShapeDtypeStruct((1,), "i4"))
        memory = jax.jit(frames.__call__).lower(*shapes).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary(600) < 2.5 * temporary(300)
    state = 29_999 * 32 * 4
    assert temporary(600, layers=9) < temporary(600) + 2 * state  # not one for each layer
    # All scores of one head would be 3.6 GB, and the 17 values of each of 1.9 million frames of the first
    # convolution 123 MB; what there must be is the scores' block, 16 MB, and some arrays [T, 48], 6 MB each.
    assert temporary(600) < 120 * 2**20


# Precision


@pytest.mark.parametrize("variant", ["hubert base", "hubert large", "batch norm"])
def test_bfloat16(variant: str) -> None:
    """Close, finite for silence, constants and loud noise, and with its weights in half the space."""
    model = encoder(variant)
    signals = [speech(8000, 1), np.zeros(8000, np.float32), np.full(6000, 0.9, np.float32)]
    signals.append(np.random.default_rng(0).uniform(-10, 10, 8000).astype(np.float32))
    audio, lengths = padded(signals, 8000)
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        frames = SpeechFrames(model.config, "mean", dtype)
        params = frames.prepare(jax.tree.map(jnp.asarray, model.params))
        assert params["encoder.layers.0.attention.q_proj.kernel"].dtype == dtype
        assert params["encoder.layer_norm.scale"].dtype == jnp.float32
        outputs[dtype], _ = unoptimised_jit(frames.__call__)(params, audio, lengths)
        assert outputs[dtype].dtype == jnp.float32
        assert np.isfinite(outputs[dtype]).all()
    difference = relative(outputs["bfloat16"][0], outputs["float32"][0])
    assert 1e-5 < difference < BFLOAT16_BOUND


def test_layers_past_the_last_one_that_counts_are_not_computed() -> None:
    config = encoder("xls-r").config
    params = SpeechFrames(config).abstract_params
    shapes = (params, jax.ShapeDtypeStruct((1, 4000), jnp.float32), jax.ShapeDtypeStruct((1,), "i4"))

    def products(layers: Any) -> int:
        return str(jax.make_jaxpr(SpeechFrames(config, layers).__call__)(*shapes)).count("dot_general")

    per_block = (products("last") - products((0,))) / config.num_hidden_layers
    assert per_block > 0
    assert products((2,)) == products((0,)) + 2 * per_block


@pytest.mark.parametrize(
    "layers",
    [
        "first",
        "",
        (),
        (4,),
        (-5,),
        (0, 0),
        (3, -1),
        (0, True),
        (0.5, 0.5),
        (0.0, 0.0, 0.0, 0.0),
        (1.0, float("nan"), 0.0, 0.0),
        (1.0, float("inf"), 0.0, 0.0),
        (1, 0.5, 0.0, 0.0),
        ("mean",),
        (None,),
        3,
        None,
        True,
        1.5,
    ],
)
def test_wrong_layers(layers: Any) -> None:
    with pytest.raises(SystemConfigError, match=r"layers: expected 'last', 'mean'.*found"):
        layer_weights(layers, 3)
    with pytest.raises(SystemConfigError, match="found"):
        SpeechFrames(encoder("hubert base").config, layers)


def test_layer_weights() -> None:
    np.testing.assert_array_equal(layer_weights("last", 3), [0, 0, 0, 1])
    np.testing.assert_array_equal(layer_weights("mean", 3), [0.25] * 4)
    np.testing.assert_allclose(layer_weights("mean_blocks", 3), [0, 1 / 3, 1 / 3, 1 / 3], rtol=1e-7)
    np.testing.assert_array_equal(layer_weights((-1, 0), 3), [0.5, 0, 0, 0.5])
    np.testing.assert_array_equal(layer_weights((0.5, -2.0, 0.0, 1.0), 3), [0.5, -2, 0, 1])
    assert layer_weights("mean", 48).dtype == np.float32


# Frame counts


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 400_000),
    stack=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=7),
)
def test_frame_counts(n: int, stack: list[tuple[int, int]]) -> None:
    kernels, strides = zip(*stack, strict=True)
    sizes = {"conv_dim": (4,) * len(stack), "conv_kernel": kernels, "conv_stride": strides}
    frames = SpeechFrames(SpeechConfig("wav2vec2", **sizes))
    count = n
    for kernel, stride in stack:  # PyTorch's own rule, layer by layer
        count = (count - kernel) // stride + 1
        if count < 1:
            break
    assert (n >= frames.min_samples) == (count >= 1)
    if count >= 1:
        assert 1 + (n - frames.min_samples) // frames.hop == count


@settings(max_examples=200, deadline=None)
@given(n=st.integers(400, 10_000_000))
def test_frame_counts_are_transformers(n: int) -> None:
    for variant in ("hubert base", "wav2vec2 large"):
        model = encoder(variant)
        assert int(model.torch._get_feat_extract_output_lengths(torch.tensor(n))) == 1 + (n - 400) // 320
        assert (SpeechFrames(model.config).min_samples, SpeechFrames(model.config).hop) == (400, 320)


@pytest.mark.parametrize("n", [400, 719, 720, 721, 1039, 1040, 16080, 129040])
def test_shapes_have_the_frame_count(n: int) -> None:
    frames = SpeechFrames(encoder("hubert base").config)
    shapes = (frames.abstract_params, jax.ShapeDtypeStruct((2, n), jnp.float32), jax.ShapeDtypeStruct((2,), "i4"))
    out, counts = jax.eval_shape(frames.__call__, *shapes)
    assert out.shape == (2, 1 + (n - 400) // 320, 32)
    assert out.dtype == jnp.float32
    assert counts.dtype == jnp.int32


# Configs


def refusal(attributes: dict[str, Any]) -> str:
    with pytest.raises(SystemConfigError) as caught:
        SpeechConfig.from_transformers(attributes)
    return str(caught.value)


WRONG_VALUES = {
    "adapter_attn_dim": 16,
    "add_adapter": True,
    "chunk_size_feed_forward": 64,
    "cross_attention_hidden_size": 32,
    "is_decoder": True,
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "pruned_heads": {"0": [1]},
    "quantization_config": {"bits": 4},
    "tie_encoder_decoder": True,
}


def test_every_neutral_attribute_has_a_wrong_value_here() -> None:
    assert WRONG_VALUES.keys() == NEUTRAL.keys()


@pytest.mark.parametrize(("name", "value"), [("conv_pos_batch_norm", True), ("feat_proj_layer_norm", False)])
def test_an_attribute_of_huberts_alone(name: str, value: bool) -> None:
    """transformers' wav2vec 2.0 does not look at it, so its weights cannot be meant for it."""
    assert f"{name} = {value}" in refusal({"model_type": "wav2vec2", name: value})
    assert getattr(SpeechConfig.from_transformers({"model_type": "hubert", name: value}), name) is value


@pytest.mark.parametrize("name", NEUTRAL)
def test_an_attribute_that_changes_the_computation_is_refused(name: str) -> None:
    assert f"{name} = " in refusal({"model_type": "wav2vec2", name: WRONG_VALUES[name]})
    for value in NEUTRAL[name]:
        assert SpeechConfig.from_transformers({"model_type": "wav2vec2", name: value}) == SpeechConfig("wav2vec2")


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"model_type": "hubert", "position_embeddings_type": "rotary"}, "position_embeddings_type = 'rotary'"),
        ({"model_type": "hubert", "conv_depthwise_kernel_size": 31}, "conv_depthwise_kernel_size = 31"),
        ({"model_type": "wavlm", "num_buckets": 320}, "model_type: expected hubert or wav2vec2, found 'wavlm'"),
        ({"model_type": "wavlm", "num_buckets": 320}, "num_buckets = 320"),
        ({"model_type": "data2vec-audio"}, "'data2vec-audio'"),
        ({"model_type": ["hubert"]}, "model_type: expected"),
        ({}, "model_type: expected hubert or wav2vec2, found None"),
        ({"model_type": "hubert", "hidden_size": "768"}, "hidden_size: expected a positive integer, found '768'"),
        ({"model_type": "hubert", "hidden_size": 768.0}, "hidden_size: expected a positive integer, found 768.0"),
        ({"model_type": "hubert", "num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer"),
        ({"model_type": "hubert", "num_hidden_layers": True}, "num_hidden_layers: expected a positive integer"),
        ({"model_type": "hubert", "conv_dim": 512}, "conv_dim: expected a list of positive integers, found 512"),
        ({"model_type": "hubert", "conv_dim": []}, "conv_dim: expected a list of positive integers"),
        ({"model_type": "hubert", "conv_kernel": [10, 3]}, "expected lists of one length, found 7, 2, 7"),
        ({"model_type": "hubert", "conv_stride": [5, 2, 2, 2, 2, 2, 0]}, "conv_stride: expected a list of positive"),
        ({"model_type": "hubert", "conv_dim": [[512]]}, "conv_dim: expected a list of positive"),
        ({"model_type": "hubert", "num_feat_extract_layers": 6}, "num_feat_extract_layers: expected the length"),
        (
            {"model_type": "hubert", "conv_dim": 512, "num_feat_extract_layers": 7},
            "conv_dim: expected a list of positive integers, found 512",
        ),
        ({"model_type": "hubert", "conv_bias": "true"}, "conv_bias: expected true or false, found 'true'"),
        ({"model_type": "hubert", "do_stable_layer_norm": None}, "do_stable_layer_norm: expected true or false"),
        ({"model_type": "hubert", "layer_norm_eps": "1e-5"}, "layer_norm_eps: expected a small positive number"),
        ({"model_type": "hubert", "layer_norm_eps": float("nan")}, "layer_norm_eps: expected a small positive"),
        ({"model_type": "hubert", "feat_extract_norm": "instance"}, "feat_extract_norm: expected one of group, layer"),
        ({"model_type": "hubert", "hidden_act": "quick_gelu"}, "hidden_act: expected one of gelu"),
        ({"model_type": "hubert", "hidden_act": ["gelu"]}, "hidden_act: expected one of gelu"),
        ({"model_type": "hubert", "feat_extract_activation": "mish"}, "feat_extract_activation: expected one of"),
        (
            {"model_type": "hubert", "num_attention_heads": 7},
            "hidden_size 768 is not a multiple of num_attention_heads",
        ),
        (
            {"model_type": "hubert", "num_conv_pos_embedding_groups": 9},
            "hidden_size 768 is not a multiple of num_conv_pos_embedding_groups 9",
        ),
    ],
)
def test_a_wrong_config_is_refused_by_name(attributes: dict[str, Any], named: str) -> None:
    assert named in refusal(attributes)


def test_all_faults_are_listed_at_once() -> None:
    message = refusal({"model_type": "wavlm", "add_adapter": True, "sparkle": 1})
    assert all(word in message for word in ("model_type", "add_adapter", "sparkle"))


# What published config.json files hold besides the sizes.
_MASKING = {
    "activation_dropout": 0.1,
    "attention_dropout": 0.1,
    "final_dropout": 0.0,
    "feat_proj_dropout": 0.1,
    "hidden_dropout": 0.1,
    "hidden_dropout_prob": 0.1,
    "layerdrop": 0.1,
    "initializer_range": 0.02,
    "gradient_checkpointing": False,
    "apply_spec_augment": True,
    "mask_time_prob": 0.05,
    "mask_time_length": 10,
    "mask_feature_prob": 0.0,
    "mask_feature_length": 10,
    "ctc_loss_reduction": "sum",
    "ctc_zero_infinity": False,
    "vocab_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_feat_extract_layers": 7,
}
_SIZES_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "feat_extract_activation": "gelu",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
}
_QUANTIZER = {
    "codevector_dim": 768,
    "contrastive_logits_temperature": 0.1,
    "diversity_loss_weight": 0.1,
    "feat_quantizer_dropout": 0.0,
    "num_codevector_groups": 2,
    "num_codevectors_per_group": 320,
    "num_negatives": 100,
    "proj_codevector_dim": 768,
}
PUBLISHED_CONFIGS: dict[str, dict[str, Any]] = {
    "wav2vec2-large-960h-lv60-self": _MASKING
    | _SIZES_LARGE
    | _QUANTIZER
    | {
        "model_type": "wav2vec2",
        "architectures": ["Wav2Vec2ForCTC"],
        "feat_extract_dropout": 0.0,
        "transformers_version": "4.7.0.dev0",
    },
    "wav2vec2-xls-r-300m": _MASKING
    | _SIZES_LARGE
    | _QUANTIZER
    | {
        "model_type": "wav2vec2",
        "architectures": ["Wav2Vec2ForPreTraining"],
        "add_adapter": False,
        "adapter_kernel_size": 3,
        "adapter_stride": 2,
        "num_adapter_layers": 3,
        "output_hidden_size": 1024,
        "classifier_proj_size": 256,
        "use_weighted_layer_sum": False,
        "tdnn_dilation": [1, 2, 3, 1, 1],
        "tdnn_dim": [512, 512, 512, 512, 1500],
        "tdnn_kernel": [5, 3, 3, 1, 1],
        "xvector_output_dim": 512,
        "mask_time_min_masks": 2,
        "mask_feature_min_masks": 0,
        "torch_dtype": "float32",
        "transformers_version": "4.12.0.dev0",
    },
    "hubert-xlarge-ll60k": _MASKING
    | _SIZES_LARGE
    | {
        "model_type": "hubert",
        "architectures": ["HubertModel"],
        "hidden_size": 1280,
        "num_hidden_layers": 48,
        "intermediate_size": 5120,
        "feat_extract_dropout": 0.0,
        "feat_proj_layer_norm": True,
        "mask_channel_length": 10,
        "mask_channel_min_space": 1,
        "mask_channel_other": 0.0,
        "mask_channel_prob": 0.0,
        "mask_channel_selection": "static",
        "mask_time_min_space": 1,
        "mask_time_other": 0.0,
        "mask_time_selection": "static",
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "transformers_version": "4.10.0.dev0",
    },
    "distilhubert": _MASKING
    | {
        "_name_or_path": "ntu-spml/distilhubert",
        "model_type": "hubert",
        "architectures": ["HubertModel"],
        "num_hidden_layers": 2,
        "feat_proj_layer_norm": False,
        "conv_pos_batch_norm": None,
        "finetuning_task": "x",
        "id2label": {"0": "a"},
        "label2id": {"a": 0},
        "use_weighted_layer_sum": True,
    },
}


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_published_configs_are_accepted(name: str) -> None:
    attributes = PUBLISHED_CONFIGS[name]
    config = SpeechConfig.from_transformers(attributes)
    for field in dataclasses.fields(config):
        if attributes.get(field.name) is not None:
            value = attributes[field.name]
            assert getattr(config, field.name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("kind", [HubertConfig, Wav2Vec2Config])
def test_a_whole_config_of_transformers_is_accepted(kind: Any) -> None:
    """Every attribute at its default, and our defaults are theirs."""
    config = SpeechConfig.from_transformers(kind().to_dict())
    assert config == SpeechConfig(config.model_type)
    assert config == SpeechConfig.from_transformers(kind().to_diff_dict() | {"model_type": config.model_type})


@pytest.mark.parametrize("name", INT_FIELDS + TUPLE_FIELDS)
@pytest.mark.parametrize("value", [None, -1, "x", 1.5, {}])
def test_sizes_of_wrong_type(name: str, value: Any) -> None:
    assert f"{name}: expected" in refusal({"model_type": "hubert", name: value})
