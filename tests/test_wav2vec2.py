"""models/wav2vec2.py: every kind of encoder against PyTorch, part by part; padding, layers, memory, bfloat16."""

import dataclasses
import functools
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
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
)
from refusals import refuses

from gura_jax.backend import PLATFORMS
from gura_jax.convert.references import find_reference
from gura_jax.errors import SystemConfigError
from gura_jax.models import attention
from gura_jax.models.encoder import FrameGrid, Noise, Options, Output, frame_mask
from gura_jax.models.families import FAMILIES, build_encoder
from gura_jax.models.layers import Layers
from gura_jax.models.transformer import mask_spans
from gura_jax.models.wav2vec2 import Wav2Vec2Encoder
from gura_jax.models.wav2vec2_config import Wav2Vec2Config

TORCH_PADDING_FAULT = 1e-3  # PyTorch's group norm over padding is off by percents: far above rounding
SUM_BOUND = 1e-6  # a running sum of a few states against numpy's in float64
BLOCK_BOUND = 1e-6  # relative, in blocks against at once: the same sums in another order
GRADIENT_BOUND = 1e-4  # relative, likewise
SCAN_BOUND = 1e-6  # relative, scanned against unrolled: XLA fuses them in other ways
BFLOAT16_BOUND = 0.03  # relative; its numbers have 8 bits
LENGTHS = (8000, 1234, 3300)  # samples: 24, 3 and 10 frames
PADDED = 8900  # so that even the longest clip has padding
GARBAGE = 3.0  # amplitude of what lies past a clip: louder than any audio

Parts = dict[str, list[np.ndarray]]
"""Every named part of each clip [T, ...], without the padding."""

# Norms of two other variants together.
SECOND = ("group norm, pre-norm", "layer norm, post-norm", "batch norm, pre-norm")


@functools.cache
def clips() -> list[np.ndarray]:
    return [speech(n, seed) for seed, n in enumerate(LENGTHS)]


@functools.cache
def build(variant: str, layers: Layers = "last", dtype: Literal["float32", "bfloat16"] = "float32") -> Wav2Vec2Encoder:
    return built(encoder(variant).config, Options(layers, dtype))


def built(config: Wav2Vec2Config, options: Options) -> Wav2Vec2Encoder:
    found = build_encoder(config, options)
    assert isinstance(found, Wav2Vec2Encoder)
    return found


def in_blocks(variant: str, **sizes: int) -> Wav2Vec2Encoder:
    """One layer of an encoder, on a platform with blocks of these sizes."""
    config = dataclasses.replace(encoder(variant).config, num_hidden_layers=1)
    return built(config, Options("mean", platform=dataclasses.replace(PLATFORMS["cpu"], **sizes)))


def abstract(network: Wav2Vec2Encoder, samples: int, clips: int = 1) -> tuple[Any, ...]:
    """Shapes of an encoder's arguments."""
    audio, lengths = jax.ShapeDtypeStruct((clips, samples), jnp.float32), jax.ShapeDtypeStruct((clips,), "i4")
    return network.abstract_params(), audio, lengths


def temporary_bytes(function: Any, *arguments: Any) -> int:
    memory = precise_jit(function).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


# Parity with PyTorch and float64, part by part


def our_parts(variant: str, audio: np.ndarray, lengths: np.ndarray) -> Parts:
    network = build(variant)

    def every(params: Any, audio: jax.Array, lengths: jax.Array) -> Any:
        return {name: (value, counts) for name, value, counts in network.states(params, audio, lengths)}

    params = network.prepare(dict(encoder(variant).params))
    found = jax.device_get(precise_jit(every)(params, audio, lengths))
    assert all(np.isfinite(value).all() for value, _ in found.values())
    return {
        name: [row[:count] for row, count in zip(value, counts, strict=True)] for name, (value, counts) in found.items()
    }


def torch_parts(model: Encoder, network: Any, clip: np.ndarray) -> dict[str, np.ndarray]:
    """The same of one clip alone, in the precision of PyTorch's network."""
    kind: Any = find_reference(FAMILIES[model.config.model_type].reference)
    reference = kind(model.config, network)
    audio = torch.from_numpy(clip).to(next(network.parameters()).dtype)[None]
    with torch.inference_mode():
        return {name: value.numpy() for name, value in reference.parts(audio, model.config.hop)}


@functools.cache
def padded_parts(variant: str) -> Parts:
    """Of clips in one batch, with garbage past their ends."""
    return our_parts(variant, *padded(clips(), PADDED, GARBAGE))


@functools.cache
def padded_states(variant: str) -> list[np.ndarray]:
    """Hidden states [L + 1, T, D] of each of them."""
    parts = padded_parts(variant)
    names = [f"state {i}" for i in range(build(variant).num_states)]
    return [np.stack([parts[name][b] for name in names]) for b in range(len(clips()))]


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow) if name in SECOND else name for name in VARIANTS]
)
def test_every_part_in_a_padded_batch(variant: str) -> None:
    """Parity and padding at once: our padded batch with garbage against PyTorch's single clips."""
    model, parts = encoder(variant), padded_parts(variant)
    for b, clip in enumerate(clips()):
        singles, doubles = (torch_parts(model, network, clip) for network in (model.torch, model.double))
        assert set(parts) == set(singles)
        assert [*singles] == [*build(variant).parts]
        for name, ours in parts.items():
            assert_parity(ours[b], singles[name], doubles[name], f"{len(clip)} samples, {name}")


@pytest.mark.parametrize("variant", ["hubert base", "wav2vec2 large", "batch norm"])
def test_a_clip_of_one_frame(variant: str) -> None:
    model, clip = encoder(variant), speech(400)
    ours = our_parts(variant, *padded([clip], 700, GARBAGE))
    singles, doubles = (torch_parts(model, network, clip) for network in (model.torch, model.double))
    assert len(ours["state 0"][0]) == 1
    for name, (value,) in ours.items():
        assert_parity(value, singles[name], doubles[name], name)


@pytest.mark.parametrize(
    "variant", [pytest.param("wav2vec2 base", marks=pytest.mark.slow), "hubert large", "wavlm large"]
)
def test_every_array_matters(variant: str) -> None:
    """A converted array that parity could not see would be a hole in it: moving any one moves the output."""
    model, network = encoder(variant), build(variant)
    audio, lengths = speech(3000)[None], np.array([3000], np.int32)
    run = precise_jit(lambda params: network(params, jnp.asarray(audio), jnp.asarray(lengths)).frames)
    plain = run(model.params)
    for name, array in model.params.items():
        # Softmax is blind to what is added to all keys, so the keys' bias does not count, in PyTorch either.
        if not name.endswith("k_proj.bias"):
            noise = np.random.default_rng(0).standard_normal(array.shape).astype(np.float32)
            moved = relative(run({**model.params, name: array * (1 + 0.3 * noise)}), plain)
            assert moved > 2 * PARITY_BOUND, name


# Padding


@pytest.mark.parametrize("variant", ["hubert base", "hubert large", "batch norm", "other convolutions"])
def test_padding(variant: str) -> None:
    """Against our own clip alone; of every variant against PyTorch's, above."""
    shortest = int(np.argmin(LENGTHS))  # most padding
    clip = clips()[shortest]
    alone = our_parts(variant, clip[None], np.array([len(clip)], np.int32))
    for name, ours in padded_parts(variant).items():
        assert relative(ours[shortest], alone[name][0]) <= PADDING_BOUND, name


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # of transformers' own call
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
    model, clip = encoder("group norm, conv bias"), (0.9 + 0.001 * speech(4000)).astype(np.float32)
    ours = our_parts("group norm, conv bias", *padded([clip], 5000, GARBAGE))
    single, double = torch_states(model.torch, clip)[-1], torch_states(model.double, clip)[-1]
    ours_off, torch_off = relative(ours[f"state {model.config.num_hidden_layers}"][0], double), relative(single, double)
    assert ours_off <= max(2 * torch_off, PADDING_BOUND)


# Layers


@pytest.mark.parametrize("variant", [pytest.param("hubert base", marks=pytest.mark.slow), "xls-r"])
def test_layers(variant: str) -> None:
    """The frames are the weighted sum of the hidden states."""
    L = encoder(variant).config.num_hidden_layers
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

    def run(*batch: Any) -> Any:  # in one program: XLA then computes the states once
        return [build(variant, layers)(*batch).frames for layers in cases]

    outputs = precise_jit(run)(encoder(variant).params, *padded(clips(), PADDED, GARBAGE))
    for output, (layers, expected) in zip(outputs, cases.items(), strict=True):
        for row, stacked in zip(output, padded_states(variant), strict=True):
            assert relative(row[: stacked.shape[1]], expected(stacked.astype(np.float64))) <= SUM_BOUND, layers


def test_layers_past_the_last_one_that_counts_are_not_computed() -> None:
    config = encoder("xls-r").config

    def products(layers: Any) -> int:
        network = build("xls-r", layers)
        return str(jax.make_jaxpr(network.__call__)(*abstract(network, 4000))).count("dot_general")

    per_block = (products("last") - products((0,))) / config.num_hidden_layers
    assert per_block > 0
    assert products((2,)) == products((0,)) + 2 * per_block


def test_another_hop_is_refused() -> None:
    with refuses(SystemConfigError, "hop", "320 samples"):
        Wav2Vec2Encoder(encoder("hubert base").config, Options(hop=160))


# Blocks of frames and of tokens


@pytest.mark.parametrize("variant", ["hubert base", "hubert large", "other convolutions"])
def test_features_in_blocks_are_features(variant: str) -> None:
    """Also where blocks do not divide, some clips end before the last block, and some blocks hold no frame."""
    batch = padded(clips(), PADDED, GARBAGE)

    def features(*batch: Any) -> Any:
        every = [in_blocks(variant, frames=frames) for frames in (1000, 3 * 20, 3 * 9, 1)]
        return [network.network(batch[0]).feature_extractor(*batch[1:]) for network in every]

    (whole, counts), *others = precise_jit(features)(encoder(variant).params, *batch)
    assert whole.shape[1] == build(variant).grid.count(PADDED) > 20
    for x, other_counts in others:
        np.testing.assert_array_equal(other_counts, counts)
        for row, expected, count in zip(x, whole, counts, strict=True):
            assert relative(row[:count], expected[:count]) <= BLOCK_BOUND


@pytest.mark.parametrize("variant", ["hubert base", pytest.param("hubert large", marks=pytest.mark.slow)])
def test_gradients_through_blocks_that_hold_no_frame(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a short clip in a long batch: neither the mean of nothing nor the softmax of nothing may divide by zero."""
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 3)
    monkeypatch.setattr(attention, "KEYS_AT_ONCE", 5)
    audio, lengths = padded(clips(), PADDED)
    gradients = []
    for sizes in ({"frames": 1000, "scores": 1 << 30}, {"frames": 1, "scores": 60, "tokens": 4}):
        network = in_blocks(variant, **sizes)

        def loss(params: Any, audio: Any, network: Wav2Vec2Encoder = network) -> jax.Array:
            x, counts, _ = network(params, audio, jnp.asarray(lengths))
            return jnp.where(frame_mask(counts, x.shape[1])[:, :, None], x, 0.0).sum()

        gradients.append(precise_jit(jax.grad(loss, argnums=(0, 1)))(encoder(variant).params, audio))
    chex.assert_tree_all_finite(gradients)
    assert relative(gradients[1][1], gradients[0][1]) <= GRADIENT_BOUND


# Memory

# Little but the hidden states, so that holding them all would be the peak.
DEEP_AND_WIDE = {
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "num_attention_heads": 1,
    "conv_dim": [2] * 7,
    "num_conv_pos_embeddings": 4,
}


def test_the_layer_mean_holds_one_state_at_a_time() -> None:
    """XLA likes to put all the additions into one loop at the end, which takes every state as an operand."""
    config = Wav2Vec2Config.from_source({**VARIANTS["hubert large"], **DEEP_AND_WIDE})
    last, mean = (Wav2Vec2Encoder(config, Options(layers)) for layers in ("last", "mean"))

    def stacked(*batch: Any) -> jax.Array:
        states = [value for name, value, _ in last.states(*batch) if name.startswith("state")]
        return jnp.stack(states, axis=1).mean(axis=1)

    state = 199 * 256 * 4  # bytes of one hidden state of four seconds
    base, own, all_of_them = (
        temporary_bytes(f, *abstract(last, 64_000)) for f in (last.__call__, mean.__call__, stacked)
    )
    assert own - base <= 2 * state  # the running sum, and slack for how buffers are shared
    assert all_of_them - base > 6 * state  # the measure can tell


def test_memory_of_long_clips_grows_linearly() -> None:
    def temporary(seconds: int, layers: int = 3) -> int:
        config = Wav2Vec2Config.from_source({**VARIANTS["hubert base"], "num_hidden_layers": layers})
        network = Wav2Vec2Encoder(config, Options("mean"))
        return temporary_bytes(network.__call__, *abstract(network, 16_000 * seconds))

    ten_minutes = temporary(600)
    assert ten_minutes < 2.5 * temporary(300)
    state = 29_999 * 32 * 4
    assert temporary(600, layers=9) < ten_minutes + 2 * state  # not one for each layer
    # All scores of one head would be 3.6 GB, and the 17 values of each of 1.9 million frames of the first
    # convolution 123 MB; what there must be is the scores' block, 16 MB, and some arrays [T, 48], 6 MB each.
    assert ten_minutes < 120 * 2**20


def test_memory_of_gradients_grows_linearly() -> None:
    """And with recomputation hardly with the layers."""

    def temporary(seconds: int, layers: int = 3, remat: Any = None) -> int:
        config = Wav2Vec2Config.from_source({**VARIANTS["hubert base"], "num_hidden_layers": layers})
        network = Wav2Vec2Encoder(config, Options("mean", remat=remat))

        def loss(*batch: Any) -> jax.Array:
            return jnp.square(network(*batch).frames).mean()

        params, *batch = abstract(network, 16_000 * seconds)
        return temporary_bytes(jax.grad(loss), jax.eval_shape(network.prepare, dict(params)), *batch)

    plain, again = temporary(160), temporary(160, remat="layers")
    assert plain < 4.5 * temporary(40)
    assert again < 0.4 * plain
    state = 7_999 * 32 * 4
    assert temporary(160, 9, "layers") - again < 3 * 6 * state  # the input of each block alone


# Layers, scanned


@pytest.mark.parametrize(
    ("variant", "layers"),
    [
        *(("hubert base", layers) for layers in ("last", (0.5, 0.0, -1.0, 2.0))),
        *(pytest.param("hubert base", layers, marks=pytest.mark.slow) for layers in ("mean_blocks", (1,))),
        ("wav2vec2 large", (0, -1)),
        ("wavlm base", "mean"),
    ],
)
def test_scanned_layers_are_unrolled_ones(variant: str, layers: Any) -> None:
    config = encoder(variant).config
    params: Any = encoder(variant).params
    audio, lengths = padded([speech(4000, 1), speech(1500, 2)], 4000)
    scanned, unrolled = (
        built(config, Options(layers, platform=dataclasses.replace(PLATFORMS["cpu"], scan_layers=scan)))
        for scan in (True, False)
    )
    held = scanned.prepare(dict(params))
    assert len(held) < len(params) / 1.3
    ours, expected = (
        precise_jit(e.__call__)(p, audio, lengths).frames for e, p in ((scanned, held), (unrolled, params))
    )
    assert relative(ours, expected) <= SCAN_BOUND
    assert set(scanned.restore(held)) == set(params)
    depths = scanned.depths(held)
    blocks = config.num_hidden_layers
    assert depths["encoder.layers.attention.q_proj.kernel"].ravel().tolist() == list(range(1, blocks + 1))
    assert unrolled.depths(params)[f"encoder.layers.{blocks - 1}.attention.q_proj.kernel"] == blocks
    assert depths["feature_projection.projection.kernel"] == 0
    # Of the last block where it comes after it, of the input where it comes before the first.
    assert depths["encoder.layer_norm.scale"] == (blocks if config.do_stable_layer_norm else 0)


# Noise, in training


def test_spans_are_masked() -> None:
    masked = np.asarray(mask_spans(jax.random.key(0), (400, 500), 0.2, 10))
    assert 0.15 < masked.mean() < 0.2  # spans overlap
    edges = np.diff(np.pad(masked, ((0, 0), (1, 1))).astype(int), axis=1)
    begins, ends = (np.argwhere(edges == sign) for sign in (1, -1))
    inside = ends[:, 1] < masked.shape[1]  # the clip's end cuts a span short
    assert ((ends - begins)[inside, 1] >= 10).all()
    assert not np.asarray(mask_spans(jax.random.key(0), (4, 500), 0.0, 10)).any()


@pytest.mark.parametrize("platform", ["cpu", pytest.param("tpu", marks=pytest.mark.slow)])
def test_noise_disturbs_what_it_is_asked_to(platform: str) -> None:
    network = Wav2Vec2Encoder(encoder("hubert base").config, Options(platform=PLATFORMS[platform]))
    params = network.prepare(dict(encoder("hubert base").params))
    audio, lengths = padded([speech(4000, 1)], 4000)

    def call(params: Any, audio: Any, lengths: Any, key: Any, chosen: Any) -> Output:
        return network.disturbed(params, audio, lengths, Noise(key, **dict(chosen)))

    compiled = jax.jit(call, static_argnums=4)

    def frames(seed: int, **chosen: Any) -> jax.Array:
        return compiled(params, audio, lengths, jax.random.key(seed), tuple(chosen.items())).frames

    plain = precise_jit(network.__call__)(params, audio, lengths).frames
    assert relative(frames(0), plain) <= SCAN_BOUND
    choices: Any = {"dropout": 0.1}, {"mask_time": 0.5}, {"mask_features": 0.9, "mask_features_length": 4}
    for chosen in choices:
        first, again, other = (frames(seed, **chosen) for seed in (1, 1, 2))
        assert relative(first, plain) > 0.01
        np.testing.assert_array_equal(first, again)
        assert relative(first, other) > 0.01


# Precision


@pytest.mark.parametrize("variant", ["hubert base", pytest.param("batch norm, pre-norm", marks=pytest.mark.slow)])
def test_bfloat16(variant: str) -> None:
    """Close, finite for silence, constants and loud noise, and with its weights in half the space."""
    signals = [speech(8000, 1), np.zeros(8000, np.float32), np.full(6000, 0.9, np.float32)]
    signals.append(np.random.default_rng(0).uniform(-10, 10, 8000).astype(np.float32))
    audio, lengths = padded(signals, 8000)
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        network = build(variant, "mean", dtype)
        params = network.prepare(jax.tree.map(jnp.asarray, encoder(variant).params))
        assert params["encoder.layers.0.attention.q_proj.kernel"].dtype == dtype
        assert params["encoder.layer_norm.scale"].dtype == jnp.float32
        outputs[dtype] = precise_jit(network.__call__)(params, audio, lengths).frames
        assert outputs[dtype].dtype == jnp.float32
        assert np.isfinite(outputs[dtype]).all()
    difference = relative(outputs["bfloat16"][0], outputs["float32"][0])
    assert 1e-5 < difference < BFLOAT16_BOUND


# Frame counts


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 400_000),
    stack=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=7),
)
def test_frame_counts(n: int, stack: list[tuple[int, int]]) -> None:
    """Those of one grid are those of a stack of convolutions, for integers and arrays."""
    kernels, strides = zip(*stack, strict=True)
    sizes = {"conv_dim": (4,) * len(stack), "conv_kernel": kernels, "conv_stride": strides}
    config = Wav2Vec2Config("wav2vec2", **sizes)
    grid = FrameGrid(config.hop, config.window / 2, config.window)
    count = n
    for kernel, stride in stack:  # PyTorch's own rule, layer by layer
        count = max(0, (count - kernel) // stride + 1)
    assert grid.count(n) == count
    np.testing.assert_array_equal(grid.count(np.array([n, 0])), [count, 0])
    assert len(grid.times(n, 16_000)) == count


@settings(max_examples=200, deadline=None)
@given(n=st.integers(400, 10_000_000))
def test_frame_counts_are_transformers(n: int) -> None:
    for variant in ("hubert base", "wav2vec2 large"):
        theirs = encoder(variant).torch._get_feat_extract_output_lengths(torch.tensor(n))
        assert build(variant).grid.count(n) == int(theirs)


@pytest.mark.parametrize("n", [400, 719, 720, 721, 1039, 1040, 16080, 129040])
def test_shapes_have_the_frame_count(n: int) -> None:
    network = build("hubert base")
    out = jax.eval_shape(network.__call__, *abstract(network, n, clips=2))
    assert out.frames.shape == (2, 1 + (n - 400) // 320, 32)
    assert out.frames.dtype == jnp.float32
    assert out.counts.dtype == jnp.int32
