"""Convolutions over time, and their gradients where XLA's are slow."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

DIMENSIONS = ("NWC", "WIO", "NWC")


def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Strided and without padding: [B, N, C], [K, C, C'] -> [B, (N - K) // stride + 1, C']."""
    return jax.lax.conv_general_dilated(x, kernel, (stride,), "VALID", dimension_numbers=DIMENSIONS)


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
    last = stride * (gradient.shape[1] - 1) + 1
    taps = [
        jnp.einsum("btc,btd->cd", x[:, k : k + last : stride], gradient, preferred_element_type=jnp.float32)
        for k in range(len(kernel))
    ]
    return by_x, jnp.stack(taps).astype(kernel.dtype)


convolution_by_taps.defvjp(_forward, _backward)


def grouped_convolution(x: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
    """Convolve each group of features by itself, one after the other.

    A convolution with ``feature_group_count`` is the same; but XLA gathers a sharded batch for it.

    Args:
        x: [B, T + K - 1, D].
        kernel: [K, D / groups, D'].
        groups: of features, in and out.

    Returns:
        [B, T, D'].
    """
    (B, N, _), (K, inputs, size) = x.shape, kernel.shape
    outputs = size // groups

    def group(i: jax.Array, out: jax.Array) -> jax.Array:
        zero = jnp.zeros_like(i)
        part = jax.lax.dynamic_slice(x, (zero, zero, i * inputs), (B, N, inputs))
        weights = jax.lax.dynamic_slice(kernel, (zero, zero, i * outputs), (K, inputs, outputs))
        return jax.lax.dynamic_update_slice(out, convolution(part, weights, 1), (zero, zero, i * outputs))

    return jax.lax.fori_loop(0, groups, group, jnp.zeros((B, N - K + 1, size), x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def grouped_convolution_by_taps(x: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
    """:func:`grouped_convolution` with the gradient of :func:`convolution_by_taps`."""
    return grouped_convolution(x, kernel, groups)


def _grouped_forward(x: jax.Array, kernel: jax.Array, groups: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    out: Any = grouped_convolution_by_taps(x, kernel, groups)
    return out, (x, kernel)


def _grouped_backward(
    groups: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    (B, T, size), (K, inputs, _) = gradient.shape, kernel.shape
    (by_x,) = jax.vjp(lambda x: grouped_convolution(x, kernel, groups), x)[1](gradient)
    x_groups = x.reshape(B, -1, groups, inputs).transpose(2, 0, 1, 3)  # [G, B, T + K - 1, D / G]
    by_group = gradient.reshape(B, T, groups, -1).transpose(2, 0, 1, 3)  # [G, B, T, D' / G]

    def tap(k: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x_groups, k, T, axis=2)
        return jnp.einsum("gbti,gbto->igo", part, by_group, preferred_element_type=jnp.float32)

    by_kernel = jax.lax.map(tap, jnp.arange(K, dtype=jnp.int32))  # [K, D / G, G, D' / G]
    return by_x, by_kernel.reshape(K, inputs, size).astype(kernel.dtype)


grouped_convolution_by_taps.defvjp(_grouped_forward, _grouped_backward)
