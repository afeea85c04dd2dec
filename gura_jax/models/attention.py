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


class RelativeBias(NamedTuple):
    """What is added to the scores: ``gate[b, q, h] * table[k - q + T - 1, h]`` for query q and key k.

    Or these are vectors, of which the scalar product is added; and a table for one head is that of all.
    """

    gate: jax.Array  # [B, T, H] or [B, T, H, C]
    table: jax.Array  # [2 T - 1, H] float32, or [2 T - 1, H, C] as the gates'


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, platform: Platform, bias: RelativeBias | None = None
) -> jax.Array:
    """Scaled dot-product attention over each clip's own frames.

    Args:
        q, k, v: [B, T, H, K].
        mask: [B, T], True for the keys that count.
        platform: says how much is computed at once, and whether the library's fused attention is used; only without a
            bias, as it would want [T, T] of all heads.
        bias: of the scores, by relative position.

    Returns:
        [B, T, H, K].
    """
    if platform.fused_attention and q.dtype == jnp.bfloat16 and bias is None:
        T, lengths = q.shape[1], mask.sum(axis=1, dtype=jnp.int32)
        # Its gradient takes even T alone.
        q, k, v = (jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")[:, :T]
    return blockwise_attention(q, k, v, mask, platform.scores, bias)


def blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, score_bytes: int, bias: RelativeBias | None = None
) -> jax.Array:
    """:func:`attention` of some heads, queries and keys at a time, all clips together: never [T, T] of all heads.

    Where a head's scores do not fit, its softmax runs over blocks of keys (Milakov and Gimelshein, 2018). The gradient
    computes the scores again, block by block (Dao et al., 2022), so its memory too grows with T, not with its square.

    Args:
        q, k, v, mask, bias: as of :func:`attention`.
        score_bytes: scores held at once.
    """
    q = q * np.asarray(q.shape[-1] ** -0.5, q.dtype)
    # The gradient is traced later, perhaps where another precision is the default.
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return _attention(q, k, v, mask, bias, score_bytes, precision)


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

    def cut_bias(self, bias: RelativeBias | None) -> tuple[Any, Any, Any]:
        """Cut the gates as queries are, and the table by heads; and say where the queries of a block begin in it.

        Returns:
            [H / heads, n, B, heads, size, ...], [H / heads, heads, P, ...] and [n]; or None of each. Of a table that is
            the same for all heads, [1, 1, P, ...].
        """
        if bias is None:
            return None, None, None
        (_, T, *_), (_, H, *size) = bias.gate.shape, bias.table.shape
        gates = self.cut(bias.gate.reshape(*bias.gate.shape[:3], -1), self.queries)
        gates = gates.reshape(*gates.shape[:5], *size)
        # Of queries and keys that only fill, too.
        table = jnp.pad(bias.table, ((-T % self.queries, -T % self.keys), *((0, 0),) * (1 + len(size))))
        table = jnp.moveaxis(table, 0, 1).reshape(-1, min(H, self.heads), len(table), *size)
        return gates, table, self.queries * _indices(gates.shape[1])[::-1]


class _Bias(NamedTuple):
    """The bias of a block of queries."""

    gate: jax.Array  # [B, h, Q, ...]
    table: jax.Array  # [h, P, ...]
    start: jax.Array  # [], of the first block of keys in it

    def of_keys(self, index: jax.Array, size: int) -> jax.Array:
        """[B, h, Q, size], of a block of keys."""
        queries = self.gate.shape[2]
        window = jax.lax.dynamic_slice_in_dim(self.table, self.start + size * index, queries + size - 1, axis=1)
        if self.gate.ndim == 3:
            rows = jnp.broadcast_to(window[:, None, :], (len(window), queries, window.shape[1]))
            return self.gate[..., None] * _by_key(rows)[None]
        return _by_key(jnp.matmul(self.gate, window.swapaxes(1, 2), preferred_element_type=jnp.float32))


def _by_key(rows: jax.Array) -> jax.Array:
    """[..., Q, Q + T - 1] by query and relative position, the lowest first -> [..., Q, T] by query and key.

    Each row is moved by one more than the one before it: rows of one number more, read as rows of the right length.
    """
    *others, queries, size = rows.shape
    flat = jnp.pad(rows, (*((0, 0),) * (len(others) + 1), (0, 1))).reshape(*others, -1)
    return flat[..., : queries * size].reshape(rows.shape)[..., queries - 1 :]


def _join(x: jax.Array, T: int) -> jax.Array:
    """[H / heads, n, B, heads, size, K] -> [B, T, H, K]."""
    groups, n, B, heads, size, K = x.shape
    return x.transpose(2, 1, 4, 0, 3, 5).reshape(B, n * size, groups * heads, K)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    bias: RelativeBias | None,
    score_bytes: int,
    precision: str | None,
) -> jax.Array:
    """Attention of scaled queries."""
    B, T, H, _ = q.shape
    cut = _Blocks.of(B, T, H, score_bytes)
    queries, k, v, mask = cut.cut(q, cut.queries), cut.cut(k, cut.keys), cut.cut(v, cut.keys), cut.cut_mask(mask)
    gates, table, starts = cut.cut_bias(bias)
    groups, blocks = queries.shape[:2]

    def block(i: jax.Array, out: jax.Array) -> jax.Array:
        group, part = i // blocks, i % blocks
        own = None if bias is None else _Bias(gates[group, part], table[group % len(table)], starts[part])
        attended, _ = _attend(out[group, part], k[group], v[group], mask, own)
        return jax.lax.dynamic_update_slice(out, attended[None, None], (group, part, *(jnp.zeros_like(i),) * 4))

    # Each block of results takes its queries' place: an array of zeros to fill, as lax.map has, would be made
    # for every layer at the very start.
    return _join(jax.lax.fori_loop(0, groups * blocks, block, queries), T)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, bias: _Bias | None
) -> tuple[jax.Array, jax.Array]:
    """Attention of some scaled queries over n blocks of keys.

    Args:
        q: [B, h, Q, K].
        k, v: [n, B, h, T, K].
        mask: [n, B, T].
        bias: of these queries.

    Returns:
        [B, h, Q, K], and the logarithm [B, h, Q] of the sum of the exponentials of each query's scores.
    """

    def block(carry: tuple[jax.Array, jax.Array, jax.Array], x: tuple[jax.Array, ...]) -> Any:
        highest, total, out = carry
        k, v, mask, index = x
        scores = _scores(q, k, mask, bias, index)
        new = jnp.maximum(highest, scores.max(axis=-1))
        weights, scale = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
        products = jnp.einsum("bhqt,bhtk->bhqk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (new, total * scale + weights.sum(axis=-1), out * scale[..., None] + products), None

    start = jnp.full(q.shape[:3], MASKED_SCORE, jnp.float32), jnp.zeros(q.shape[:3], jnp.float32)
    parts = k, v, mask, _indices(len(k))
    (highest, total, out), _ = jax.lax.scan(block, (*start, jnp.zeros(q.shape, jnp.float32)), parts)
    return (out / total[..., None]).astype(v.dtype), highest + jnp.log(total)


def _indices(size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array, bias: _Bias | None, index: jax.Array) -> jax.Array:
    """[B, h, Q, K], [B, h, T, K], [B, T] and the number of this block of keys -> [B, h, Q, T] float32."""
    scores = jnp.einsum("bhqk,bhtk->bhqt", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias.of_keys(index, k.shape[2])
    return jnp.where(mask[:, None, None, :], scores, MASKED_SCORE)


def _attention_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    bias: RelativeBias | None,
    score_bytes: int,
    precision: str | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    out: Any = _attention(q, k, v, mask, bias, score_bytes, precision)
    return out, (q, k, v, mask, bias, out)


def _attention_backward(
    score_bytes: int, precision: str | None, saved: tuple[Any, ...], gradient: jax.Array
) -> tuple[Any, ...]:
    """Gradients by the scaled queries, the keys, the values and the bias: a block of queries by a block of keys."""
    q, k, v, mask, bias, out = saved
    B, T, H, _ = q.shape
    cut = _Blocks.of(B, T, H, score_bytes)
    mask = cut.cut_mask(mask)
    # What each score's gradient has in common along the keys: [B, T, H, 1].
    common = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    queries = cut.cut(q, cut.queries), cut.cut(gradient, cut.queries), cut.cut(common, cut.queries)
    gates, table, starts = cut.cut_bias(bias)

    def group(x: tuple[Any, ...]) -> tuple[Any, ...]:
        # Of some heads: [n, B, h, size, K], [B, h, T, K] of each block, [n, B, h, size, ...] and [].
        queries, k, v, gates, index = x
        own_table = None if table is None else table[index % len(table)]  # [h, P, ...]

        def bias_of(gate: Any, start: Any) -> _Bias | None:
            return None if own_table is None else _Bias(gate, own_table, start)

        def sums_of(x: tuple[Any, ...]) -> jax.Array:
            q, *place = x
            return _attend(q, k, v, mask, bias_of(*place))[1]

        sums = jax.lax.map(sums_of, (queries[0], gates, starts))  # [n, B, h, Q]

        def keys(carry: Any, x: tuple[jax.Array, ...]) -> Any:
            by_queries, by_table = carry
            k, v, mask, index = x  # [B, h, T, K], [B, T], []

            def some_queries(carry: Any, x: tuple[Any, ...]) -> Any:
                by_k, by_v, by_table = carry
                q, gradient, common, sums, *place = x
                own = bias_of(*place)
                weights = jnp.exp(_scores(q, k, mask, own, index) - sums[..., None])  # [B, h, Q, T]
                by_v += _product("bhqt,bhqk->bhtk", weights.astype(v.dtype), gradient)
                by_scores = weights * (_product("bhqk,bhtk->bhqt", gradient, v) - common)
                by_gate = None
                if own is not None:
                    gate, table, start = own
                    of_keys = lambda gate, table: _Bias(gate, table, start).of_keys(index, k.shape[2])  # noqa: E731
                    by_gate, more = jax.vjp(of_keys, gate, table)[1](by_scores)
                    by_table += more
                by_scores = by_scores.astype(k.dtype)
                by_k += _product("bhqt,bhqk->bhtk", by_scores, q)
                return (by_k, by_v, by_table), (_product("bhqt,bhtk->bhqk", by_scores, k), by_gate)

            start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32), by_table
            parts = *queries, sums, gates, starts
            (by_k, by_v, by_table), more = jax.lax.scan(some_queries, start, parts)
            return (jax.tree.map(jnp.add, by_queries, more), by_table), (by_k, by_v)

        start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), ((queries[0], gates), own_table))
        ((by_q, by_gate), by_table), (by_k, by_v) = jax.lax.scan(keys, start, (k, v, mask, _indices(len(k))))
        return by_q, by_k, by_v, by_gate, by_table

    parts = queries, cut.cut(k, cut.keys), cut.cut(v, cut.keys), gates, _indices(H // cut.heads)
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        by_q, by_k, by_v, by_gate, by_table = jax.lax.map(group, parts)
    by_bias = None
    if bias is not None:
        if len(by_table) > len(table):  # of one that is the same for all heads
            by_table = by_table.sum(axis=0, keepdims=True)
        by_parts = jax.tree.map(lambda by, x: by.astype(x.dtype), (by_gate, by_table), (gates, table))
        (by_bias,) = jax.vjp(lambda bias: cut.cut_bias(bias)[:2], bias)[1](by_parts)
    out = (_join(by, T).astype(x.dtype) for by, x in ((by_q, q), (by_k, k), (by_v, v)))
    return *out, None, by_bias


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


def over_neighbours(
    function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, before: int, after: int, tokens: int
) -> jax.Array:
    """A function of each frame and its neighbours, [B, T, D] -> [B, T, D], over blocks as :func:`over_tokens`.

    Args:
        function: (frames [B, W, D], place of the first, which may be before the clip) -> [B, W - before - after, D].
        x: [B, T, D].
        before, after: neighbours that a frame sees; beyond the ends there are zeros.
        tokens: frames of all clips in a block, at most.
    """
    B, T, D = x.shape
    blocks = -(-T // max(1, tokens // B))
    size = -(-T // blocks)
    out = jnp.pad(x, ((0, 0), (0, blocks * size - T), (0, 0)))
    padded = jnp.pad(out, ((0, 0), (before, after), (0, 0)))

    def block(i: jax.Array, out: jax.Array) -> jax.Array:
        start = (jnp.zeros_like(i), size * i, jnp.zeros_like(i))
        some = jax.lax.dynamic_slice(padded, start, (B, before + size + after, D))
        return jax.lax.dynamic_update_slice(out, function(some, size * i - before), start)

    # Results take the place of a copy, as in attention.
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
