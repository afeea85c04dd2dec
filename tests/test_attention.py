"""models/attention.py: work in blocks is the same as all at once, and holds no more than a block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import precise_jit, relative

from gura_jax.backend import PLATFORMS
from gura_jax.models import attention
from gura_jax.models.attention import (
    MIN_BLOCK,
    RelativeBias,
    blockwise_attention,
    even_blocks,
    over_frames,
    over_tokens,
)
from gura_jax.models.encoder import frame_mask

BLOCK_BOUND = 1e-6  # relative: the same sums in another order
B, T, HEADS = 2, 37, 4
MASK = frame_mask(jnp.array([T, 20]), T)


def heads(seed: int, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, T, HEADS, 8)), dtype)


# Attention


def at_once(q: jax.Array, k: jax.Array, v: jax.Array, bias: RelativeBias | None) -> jax.Array:
    """By JAX's own, with the bias of all queries and keys."""
    whole = None
    if bias is not None:
        positions = np.arange(T)[None, :] - np.arange(T)[:, None] + T - 1  # of a key from a query
        gate, table = (x if bias.gate.ndim == 4 else x[..., None] for x in bias)
        whole = jnp.einsum(
            "bqhc,qkhc->bhqk", gate, jnp.broadcast_to(table, (*table.shape[:1], HEADS, *table.shape[2:]))[positions]
        )
    return jax.nn.dot_product_attention(q, k, v, bias=whole, mask=MASK[:, None, None, :])


def relative_bias(table_heads: int = HEADS, size: tuple[int, ...] = ()) -> Any:
    rng = np.random.default_rng(4)
    shapes = (B, T, HEADS, *size), (2 * T - 1, table_heads, *size)
    gate, table = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return RelativeBias(gate, table)  # pyright: ignore[reportArgumentType] - NumPy's do as well


BIASES = {
    "plain": None,
    "gates": relative_bias(),
    "vectors": relative_bias(size=(5,)),
    "one-table": relative_bias(1, size=(5,)),
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_attention_in_blocks_is_attention(bias: RelativeBias | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some heads, or of some queries of one head, divided or not: the same as all at once."""
    monkeypatch.setattr(attention, "FEW_QUERIES", 8)
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 16)
    monkeypatch.setattr(attention, "KEYS_AT_ONCE", 10)  # the last blocks are but filling, or past the clip
    q, k, v = map(heads, range(3))
    expected = at_once(q, k, v, bias)
    one_head = B * T * T * 4  # bytes
    sizes = {
        "all heads": 1 << 20,
        "two heads of four, as three do not divide them": 3 * one_head,
        "one head": one_head,
        "some queries": B * 10 * T * 4,
        "some queries and keys": B * 6 * T * 4,
        "one query": 1,
    }
    for name, score_bytes in sizes.items():
        run = functools.partial(blockwise_attention, mask=MASK, score_bytes=score_bytes)
        ours = precise_jit(lambda q, k, v, bias, run=run: run(q, k, v, bias=bias))(q, k, v, bias)
        assert relative(ours, expected) <= BLOCK_BOUND, name


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_gradients_in_blocks_are_attentions(bias: RelativeBias | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the precision that the call was traced in, whatever the default is when the gradient is."""
    monkeypatch.setattr(attention, "FEW_QUERIES", 8)
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 16)
    monkeypatch.setattr(attention, "KEYS_AT_ONCE", 10)
    q, k, v, weights = map(heads, range(4))

    def of(function: Any) -> Any:
        total = lambda q, k, v, bias: (function(q, k, v, bias) * weights).sum()  # noqa: E731
        return jax.tree.leaves(precise_jit(jax.grad(total, argnums=(0, 1, 2, 3)))(q, k, v, bias))

    expected = of(at_once)
    for score_bytes in (1 << 20, B * T * T * 4, B * 10 * T * 4, 1):
        found = of(lambda q, k, v, bias, size=score_bytes: blockwise_attention(q, k, v, MASK, size, bias))
        for ours, theirs in zip(found, expected, strict=True):
            assert relative(ours, theirs) <= BLOCK_BOUND, score_bytes

    def loss(q: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return blockwise_attention(q, k, v, MASK, 1, bias).sum()

    text = jax.jit(jax.grad(loss)).lower(q).as_text()
    assert text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]") > 0


def test_gradients_never_hold_all_scores() -> None:
    """Their memory grows with the clip, and not with its square."""

    def temporary(frames: int) -> int:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            mask = jnp.ones((1, frames), bool)
            return jnp.square(attention.attention(q, k, v, mask, PLATFORMS["cpu"])).sum()

        shape = jax.ShapeDtypeStruct((1, frames, HEADS, 16), jnp.float32)
        memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*[shape] * 3).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary(16_000) < 2.5 * temporary(8_000)
    assert temporary(8_000) < 8_000**2 * 4  # the scores of one head


def test_a_clip_of_no_frames_is_finite() -> None:
    """A row that a batch was filled up with: its softmax is over nothing."""
    q, k, v = map(heads, range(3))
    assert np.isfinite(blockwise_attention(q, k, v, jnp.zeros_like(MASK), 1 << 20)).all()


def test_attention_of_bfloat16_sums_in_float32() -> None:
    q, k, v = (heads(seed, jnp.bfloat16) for seed in range(3))
    ours = attention.attention(q, k, v, MASK, PLATFORMS["cpu"])
    assert ours.dtype == jnp.bfloat16
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    exact = blockwise_attention(q, k, v, MASK, 1 << 20)
    assert relative(ours.astype(jnp.float32), exact) < 0.01  # its numbers have 8 bits


def test_attention_never_holds_all_scores() -> None:
    frames = 4000
    shapes = [jax.ShapeDtypeStruct((1, frames, HEADS, 16), jnp.float32)] * 3
    run = jax.jit(functools.partial(attention.attention, platform=PLATFORMS["cpu"]))
    memory = run.lower(*shapes, jax.ShapeDtypeStruct((1, frames), jnp.bool_)).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < HEADS * frames**2 * 4 / 3


# Functions of each frame, and of a block's samples


@pytest.mark.parametrize("tokens", [1, 7, 20, 39, 40])
def test_over_tokens(tokens: int) -> None:
    """Blocks that divide the frames of all clips, and that do not: the same as all at once."""
    x = np.random.default_rng(0).standard_normal((2, 20, 6)).astype(np.float32)
    sizes: list[int] = []

    def function(x: jax.Array) -> jax.Array:
        sizes.append(x.shape[0] * x.shape[1])
        return jnp.tanh(x) + x.sum(axis=-1, keepdims=True)

    expected = function(jnp.asarray(x))
    sizes.clear()
    assert relative(over_tokens(function, jnp.asarray(x), tokens), expected) <= BLOCK_BOUND
    assert max(sizes) <= max(tokens, len(x))  # a frame of each clip at least


@pytest.mark.parametrize("size", [1, 2 * 9, 2 * 13, 2 * 26, 1000])
def test_over_frames(size: int) -> None:
    """Every frame once, from its own samples; and each block says which its first frame is."""
    window, hop, num_frames = 5, 3, 26
    audio = np.random.default_rng(0).standard_normal((2, window + (num_frames - 1) * hop + 1)).astype(np.float32)

    def function(samples: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        frames = (samples.shape[1] - window) // hop + 1
        assert 2 * frames <= 1.5 * max(size, 2 * MIN_BLOCK)  # about the size that was asked for
        index = np.arange(frames)[:, None] * hop + np.arange(window)
        return samples[:, index].sum(axis=-1), jnp.broadcast_to(start, (2,))

    sums, starts = over_frames(function, jnp.asarray(audio), num_frames, window, hop, size)
    assert sums.shape[:2] == starts.shape
    np.testing.assert_array_equal(starts, np.tile(np.arange(sums.shape[1]) * sums.shape[2], (2, 1)))
    index = np.arange(num_frames)[:, None] * hop + np.arange(window)
    assert relative(sums.reshape(2, -1)[:, :num_frames], audio[:, index].sum(axis=-1)) <= BLOCK_BOUND


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_even_blocks(size: int) -> None:
    """They hold everything, none is empty, and they are about as large as they were asked to be."""
    for total in range(1, 400):
        blocks, each = even_blocks(total, size)
        assert (blocks - 1) * each < total <= blocks * each
        assert each <= max(1, 1.5 * size)
        assert blocks == 1 or each >= size // 2
