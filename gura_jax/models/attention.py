"""Attention and other work on long clips, in blocks of time that keep the batch an axis."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
        T, lengths = q.shape[1], mask.sum(axis=1, dtype=jnp.int32)
        # Its gradient takes even T alone.
        q, k, v = (jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")[:, :T]
    return blockwise_attention(q, k, v, mask, platform.scores)


def blockwise_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, score_bytes: int) -> jax.Array:
    """:func:`attention` of some heads, queries and keys at a time, all clips together: never [T, T] of all heads.

    Where a head's scores do not fit, its softmax runs over blocks of keys (Milakov and Gimelshein, 2018). The gradient
    computes the scores again, block by block (Dao et al., 2022), so its memory too grows with T, not with its square.

    Args:
        q, k, v, mask: as of :func:`attention`.
        score_bytes: scores held at once.
    """
    q = q * np.asarray(q.shape[-1] ** -0.5, q.dtype)
    # The gradient is traced later, perhaps where another precision is the default.
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return _attention(q, k, v, mask, score_bytes, precision)


class _Blocks(NamedTuple):
    """Sizes that attention is computed in."""

    queries: int
    keys: int
    heads: int

    @classmethod
    def of(cls, B: int, T: int, H: int, score_bytes: int) -> "_Blocks":
        limit = score_bytes // 4  # float32 scores at once
        keys = T
        size = min(T, limit // (B * T))
        if size < min(T, FEW_QUERIES):
            keys = min(T, KEYS_AT_ONCE)
            size = min(T, QUERIES_AT_ONCE, max(1, limit // (B * keys)))
        size = -(-T // -(-T // size))
        return cls(
            size, keys, max(h for h in range(1, H + 1) if H % h == 0 and h <= max(1, limit // (B * size * keys)))
        )

    def cut(self, x: jax.Array, size: int) -> jax.Array:
        """[B, T, H, K] -> [H / heads, T / size, B, heads, size, K]."""
        B, T, H, K = x.shape
        x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0), (0, 0)))
        return x.reshape(B, -1, size, H // self.heads, self.heads, K).transpose(3, 1, 0, 4, 2, 5)

    def cut_mask(self, mask: jax.Array) -> jax.Array:
        """[B, T] -> [T / keys, B, keys]."""
        B, T = mask.shape
        return jnp.pad(mask, ((0, 0), (0, -T % self.keys))).reshape(B, -1, self.keys).swapaxes(0, 1)


def _join(x: jax.Array, T: int) -> jax.Array:
    """[H / heads, n, B, heads, size, K] -> [B, T, H, K]."""
    groups, n, B, heads, size, K = x.shape
    return x.transpose(2, 1, 4, 0, 3, 5).reshape(B, n * size, groups * heads, K)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, score_bytes: int, precision: str | None
) -> jax.Array:
    """Attention of scaled queries."""
    B, T, H, _ = q.shape
    cut = _Blocks.of(B, T, H, score_bytes)
    queries, k, v, mask = cut.cut(q, cut.queries), cut.cut(k, cut.keys), cut.cut(v, cut.keys), cut.cut_mask(mask)
    groups, blocks = queries.shape[:2]

    def block(i: jax.Array, out: jax.Array) -> jax.Array:
        group, part = i // blocks, i % blocks
        attended, _ = _attend(out[group, part], k[group], v[group], mask)
        return jax.lax.dynamic_update_slice(out, attended[None, None], (group, part, *(jnp.zeros_like(i),) * 4))

    # Each block of results takes its queries' place: an array of zeros to fill, as lax.map has, would be made
    # for every layer at the very start.
    return _join(jax.lax.fori_loop(0, groups * blocks, block, queries), T)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention of some scaled queries over n blocks of keys.

    Args:
        q: [B, h, Q, K].
        k, v: [n, B, h, T, K].
        mask: [n, B, T].

    Returns:
        [B, h, Q, K], and the logarithm [B, h, Q] of the sum of the exponentials of each query's scores.
    """

    def block(carry: tuple[jax.Array, jax.Array, jax.Array], x: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        highest, total, out = carry
        k, v, mask = x
        scores = _scores(q, k, mask)
        new = jnp.maximum(highest, scores.max(axis=-1))
        weights, scale = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
        products = jnp.einsum("bhqt,bhtk->bhqk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (new, total * scale + weights.sum(axis=-1), out * scale[..., None] + products), None

    start = jnp.full(q.shape[:3], MASKED_SCORE, jnp.float32), jnp.zeros(q.shape[:3], jnp.float32)
    (highest, total, out), _ = jax.lax.scan(block, (*start, jnp.zeros(q.shape, jnp.float32)), (k, v, mask))
    return (out / total[..., None]).astype(v.dtype), highest + jnp.log(total)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, h, Q, K], [B, h, T, K], [B, T] -> [B, h, Q, T] float32."""
    scores = jnp.einsum("bhqk,bhtk->bhqt", q, k, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, None, :], scores, MASKED_SCORE)


def _attention_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, score_bytes: int, precision: str | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out: Any = _attention(q, k, v, mask, score_bytes, precision)
    return out, (q, k, v, mask, out)


def _attention_backward(
    score_bytes: int, precision: str | None, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Gradients by the scaled queries, the keys and the values: a block of queries by a block of keys at a time."""
    q, k, v, mask, out = saved
    B, T, H, _ = q.shape
    cut = _Blocks.of(B, T, H, score_bytes)
    mask = cut.cut_mask(mask)
    # What each score's gradient has in common along the keys: [B, T, H, 1].
    common = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    queries = cut.cut(q, cut.queries), cut.cut(gradient, cut.queries), cut.cut(common, cut.queries)

    def group(x: tuple[Any, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        queries, k, v = x  # of some heads: [n, B, h, size, K]
        sums = jax.lax.map(lambda q: _attend(q, k, v, mask)[1], queries[0])  # [n, B, h, Q]

        def keys(by_q: jax.Array, x: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
            k, v, mask = x  # [B, h, T, K], [B, T]

            def some_queries(carry: tuple[jax.Array, jax.Array], x: tuple[jax.Array, ...]) -> Any:
                by_k, by_v = carry
                q, gradient, common, sums = x
                weights = jnp.exp(_scores(q, k, mask) - sums[..., None])  # [B, h, Q, T]
                by_v += _product("bhqt,bhqk->bhtk", weights.astype(v.dtype), gradient)
                by_scores = weights * (_product("bhqk,bhtk->bhqt", gradient, v) - common)
                by_scores = by_scores.astype(k.dtype)
                by_k += _product("bhqt,bhqk->bhtk", by_scores, q)
                return (by_k, by_v), _product("bhqt,bhtk->bhqk", by_scores, k)

            start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
            by_keys, by_queries = jax.lax.scan(some_queries, start, (*queries, sums))
            return by_q + by_queries, by_keys

        by_q, (by_k, by_v) = jax.lax.scan(keys, jnp.zeros(queries[0].shape, jnp.float32), (k, v, mask))
        return by_q, by_k, by_v

    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        by_q, by_k, by_v = jax.lax.map(group, (queries, cut.cut(k, cut.keys), cut.cut(v, cut.keys)))
    return _join(by_q, T).astype(q.dtype), _join(by_k, T).astype(k.dtype), _join(by_v, T).astype(v.dtype), None


def _product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


_attention.defvjp(_attention_forward, _attention_backward)


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
