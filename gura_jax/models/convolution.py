"""Convolutions over time, and in two dimensions of each channel by itself, and gradients, where XLA's are slow."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Convolution = Callable[[jax.Array, jax.Array, int], Any]  # of (x, kernel, stride)


def convolution(x: jax.Array, kernel: jax.Array, stride: int, dtype: Any = None) -> jax.Array:
    """Strided and without padding: [B, N, C], [K, C, C'] -> [B, (N - K) // stride + 1, C'], of a dtype if given."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), preferred_element_type=dtype
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution_by_taps(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """:func:`convolution` whose gradient by the kernel is a matrix product for each tap.

    It is a convolution too, as long as the clip, and inside a loop XLA computes it on a CPU hundreds of times slower.
    """
    return convolution(x, kernel, stride)


def _forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    out: Any = convolution_by_taps(x, kernel, stride)
    return out, (x, kernel)


def _backward(stride: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    (by_x,) = jax.vjp(lambda x: convolution(x, kernel, stride), x)[1](gradient)
    span = stride * (gradient.shape[1] - 1) + 1  # of a tap's samples

    def by_tap(k: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(x, k, span, axis=1)[:, ::stride]
        return jnp.einsum("btc,btd->cd", own, gradient, preferred_element_type=jnp.float32)

    return by_x, jax.lax.map(by_tap, jnp.arange(len(kernel), dtype=jnp.int32)).astype(kernel.dtype)


convolution_by_taps.defvjp(_forward, _backward)


def convolution_in_parts(x: jax.Array, kernel: jax.Array, stride: int, taps: int) -> jax.Array:
    """:func:`convolution` of many taps, some at a time; a TPU's compiler takes long over all at once.

    A strided one is not cut: each step of so many samples becomes one of as many more channels.

    Args:
        x: [B, N, C].
        kernel: [K, C, C']; K is a multiple of ``stride``, and of ``taps`` where that is 1.
        stride: in samples.
        taps: at a time.
    """
    (B, N, C), (K, _, size) = x.shape, kernel.shape
    if stride > 1:
        whole = x[:, : N // stride * stride].reshape(B, -1, stride * C)
        return convolution(whole, kernel.reshape(K // stride, stride * C, size), 1)
    positions = N - K + 1

    def part(total: jax.Array, own: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, kernel = own
        some = jax.lax.dynamic_slice_in_dim(x, index * taps, positions + taps - 1, axis=1)
        return total + convolution(some, kernel, 1, jnp.float32), None

    parts = jnp.arange(K // taps, dtype=jnp.int32), kernel.reshape(-1, taps, C, size)
    return jax.lax.scan(part, jnp.zeros((B, positions, size), jnp.float32), parts)[0].astype(x.dtype)


def depthwise_by_taps(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    """Convolve each channel by itself in two dimensions, adding up products with each tap.

    A convolution with ``feature_group_count`` is the same; but XLA computes it on a CPU up to 200 times slower.

    Args:
        x: [B, T, M, C].
        kernel: [K, K, 1, C].
        stride: of both dimensions.
        padding: zeros before and after both.

    Returns:
        [B, (T + padding - K) // stride + 1, (M + padding - K) // stride + 1, C].
    """
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    K = len(kernel)
    T, M = (size - K + 1 for size in x.shape[1:3])  # of a tap, of which the stride takes some
    taps = (
        kernel[i : i + 1, j : j + 1] * x[:, i : i + T : stride, j : j + M : stride] for i in range(K) for j in range(K)
    )
    return functools.reduce(jnp.add, taps)


def grouped_convolution(x: jax.Array, kernel: jax.Array, groups: int, convolve: Convolution) -> jax.Array:
    """Convolve each group of features by itself, one after the other.

    A convolution with ``feature_group_count`` is the same; but XLA gathers a sharded batch for it.

    Args:
        x: [B, T + K - 1, D].
        kernel: [K, D / groups, D'].
        groups: of features, in and out.
        convolve: of one group.

    Returns:
        [B, T, D'].
    """
    (B, N, _), (K, inputs, size) = x.shape, kernel.shape
    outputs = size // groups

    def group(i: jax.Array, out: jax.Array) -> jax.Array:
        zero = jnp.zeros_like(i)
        part = jax.lax.dynamic_slice(x, (zero, zero, i * inputs), (B, N, inputs))
        weights = jax.lax.dynamic_slice(kernel, (zero, zero, i * outputs), (K, inputs, outputs))
        return jax.lax.dynamic_update_slice(out, convolve(part, weights, 1), (zero, zero, i * outputs))

    return jax.lax.fori_loop(0, groups, group, jnp.zeros((B, N - K + 1, size), x.dtype))
