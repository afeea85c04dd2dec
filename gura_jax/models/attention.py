"""Attention and other work on long clips, in blocks of time that keep the batch an axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.backend import Platform

QUERIES_AT_ONCE, KEYS_AT_ONCE = 1024, 512  # of a head whose scores do not fit; they do in a core's own cache
FEW_QUERIES = 128  # a block of fewer, to have all keys at once, is slower than blocks of keys
MASKED_SCORE = -1e30  # of attention to what is past a clip's end: its exponential is zero
BLOCK_COST = 1 / 16  # of a block, beyond what is in it: reading the weights again
MIN_BLOCK = 8  # frames: neighbouring blocks of frames share samples, which fewer would compute too often


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, platform: Platform) -> jax.Array:
    """Scaled dot-product attention over each clip's own frames.

    Args:
        q, k, v: [B, T, H, K].
        mask: [B, T], True for the keys that count.
        platform: says how much is computed at once, and whether the library's fused attention is used.

    Returns:
        [B, T, H, K].
    """
    if platform.fused_attention and q.dtype == jnp.bfloat16:
        lengths = mask.sum(axis=1, dtype=jnp.int32)
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
    return blockwise_attention(q, k, v, mask, platform.scores)


def blockwise_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, score_bytes: int) -> jax.Array:
    """:func:`attention` of some heads, queries and keys at a time, all clips together: never [T, T] of all heads.

    Where a head's scores do not fit, its softmax runs over blocks of keys (Milakov and Gimelshein, 2018).

    Args:
        q, k, v, mask: as of :func:`attention`.
        score_bytes: scores held at once.
    """
    B, T, H, K = q.shape
    q = q * np.asarray(K**-0.5, q.dtype)
    limit = score_bytes // 4  # float32 scores at once
    keys = T
    size = min(T, limit // (B * T))  # queries
    if size < min(T, FEW_QUERIES):
        keys = min(T, KEYS_AT_ONCE)
        size = min(T, QUERIES_AT_ONCE, max(1, limit // (B * keys)))
    blocks = -(-T // size)
    size = -(-T // blocks)
    heads = max(h for h in range(1, H + 1) if H % h == 0 and h <= max(1, limit // (B * size * keys)))

    def cut(x: jax.Array, size: int) -> jax.Array:
        """[B, T, H, K] -> [H / heads, T / size, B, heads, size, K]."""
        x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0), (0, 0)))
        x = x.reshape(B, -1, size, H // heads, heads, K)
        return x.transpose(3, 1, 0, 4, 2, 5)

    queries, k, v = cut(q, size), cut(k, keys), cut(v, keys)
    mask = jnp.pad(mask, ((0, 0), (0, -T % keys))).reshape(B, -1, keys).swapaxes(0, 1)  # [T / keys, B, keys]

    def block(i: jax.Array, out: jax.Array) -> jax.Array:
        group, part = i // blocks, i % blocks
        attended = _attend(out[group, part], k[group], v[group], mask)
        return jax.lax.dynamic_update_slice(out, attended[None, None], (group, part, *(jnp.zeros_like(i),) * 4))

    # Each block of results takes its queries' place: an array of zeros to fill, as lax.map has, would be made
    # for every layer at the very start.
    out = jax.lax.fori_loop(0, H // heads * blocks, block, queries)
    return out.transpose(2, 1, 4, 0, 3, 5).reshape(B, blocks * size, H, K)[:, :T]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled queries [B, h, Q, K] over n blocks of keys and values [n, B, h, T, K], mask [n, B, T]: [B, h, Q, K]."""

    def block(carry: tuple[jax.Array, jax.Array, jax.Array], x: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        highest, total, out = carry
        k, v, mask = x
        scores = jnp.einsum("bhqk,bhtk->bhqt", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None, :], scores, MASKED_SCORE)
        new = jnp.maximum(highest, scores.max(axis=-1))
        weights, scale = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
        products = jnp.einsum("bhqt,bhtk->bhqk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (new, total * scale + weights.sum(axis=-1), out * scale[..., None] + products), None

    start = jnp.full(q.shape[:3], MASKED_SCORE, jnp.float32), jnp.zeros(q.shape[:3], jnp.float32)
    (_, total, out), _ = jax.lax.scan(block, (*start, jnp.zeros(q.shape, jnp.float32)), (k, v, mask))
    return (out / total[..., None]).astype(v.dtype)


def over_tokens(function: Callable[[jax.Array], jax.Array], x: jax.Array, tokens: int) -> jax.Array:
    """A function of each frame, [B, T, D] -> [B, T, D], over blocks of at most so many frames of all clips."""
    B, T, D = x.shape
    if tokens >= B * T:
        return function(x)
    blocks = -(-T // max(1, tokens // B))
    size = -(-T // blocks)

    def block(i: jax.Array, out: jax.Array) -> jax.Array:
        start = (jnp.zeros_like(i), size * i, jnp.zeros_like(i))
        return jax.lax.dynamic_update_slice(out, function(jax.lax.dynamic_slice(out, start, (B, size, D))), start)

    # Results take the tokens' place, as in attention.
    out = jnp.pad(x, ((0, 0), (0, blocks * size - T), (0, 0)))
    return jax.lax.fori_loop(0, blocks, block, out)[:, :T]


def even_blocks(total: int, size: int) -> tuple[int, int]:
    """Number and size of blocks of about ``size`` that hold ``total``, with few blocks and little room left over."""
    largest = max(1, size * 3 // 2)
    if total <= largest:
        return 1, total
    best = min(range(max(1, size // 2), largest + 1), key=lambda s: (-(-total // s) * (s + size * BLOCK_COST), -s))
    return -(-total // best), best


def over_frames(
    function: Callable[[jax.Array, jax.Array], Any], audio: jax.Array, num_frames: int, window: int, hop: int, size: int
) -> Any:
    """Call a function of a block's samples for every block of frames, all clips together.

    Args:
        function: (samples [B, W], first frame []) -> a pytree of arrays [B, ...].
        audio: [B, N].
        num_frames: how many there are.
        window, hop: of a frame, in samples.
        size: frames in a block, about, those of all clips together; at least :data:`MIN_BLOCK` of a clip.

    Returns:
        What the function returned, each array [B, n, ...].
    """
    B = len(audio)
    n, frames = even_blocks(num_frames, max(MIN_BLOCK, size // B))
    samples = (frames - 1) * hop + window
    missing = max(0, (n - 1) * frames * hop + samples - audio.shape[1])
    audio = jnp.pad(audio, ((0, 0), (0, missing)))

    def block(start: jax.Array) -> Any:
        return function(jax.lax.dynamic_slice(audio, (jnp.zeros_like(start), start * hop), (B, samples)), start)

    out = jax.lax.map(block, frames * jnp.arange(n, dtype=jnp.int32))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), out)
