"""models/convolution.py: in parts and by taps, and gradients by taps, are XLA's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import precise_jit, relative

from gura_jax.models.convolution import (
    Convolution,
    convolution,
    convolution_by_taps,
    convolution_in_parts,
    depthwise_by_taps,
    grouped_convolution,
)

BOUND = 1e-6  # relative: sums of a few hundred float32 products in another order


def grouped(convolve: Convolution) -> Convolution:
    return lambda x, kernel, groups: grouped_convolution(x, kernel, groups, convolve)


def in_parts(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return convolution_in_parts(x, kernel, stride, 4)


@pytest.mark.parametrize(
    ("plain", "other", "samples", "channels", "kernel", "number"),
    [
        (convolution, convolution_by_taps, 40, 6, (3, 6, 8), 2),
        (convolution, convolution_by_taps, 41, 1, (10, 1, 8), 5),
        (convolution, convolution_by_taps, 10, 1, (10, 1, 8), 5),  # one frame
        (grouped(convolution), grouped(convolution_by_taps), 22, 6, (5, 3, 12), 2),
        (convolution, in_parts, 40, 6, (8, 6, 3), 1),
        (convolution, in_parts, 41, 2, (8, 2, 3), 4),
    ],
)
def test_results_and_gradients_are_those_of_xla(
    plain: Convolution,
    other: Convolution,
    samples: int,
    channels: int,
    kernel: tuple[int, int, int],
    number: int,  # the stride, or the groups
) -> None:
    assert_same(other, plain, (2, samples, channels), kernel, number)


def assert_same(other: Convolution, plain: Convolution, shape: tuple[int, ...], kernel: Any, number: int) -> None:
    """Results, and gradients by both."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (shape, kernel))
    out = plain(x, w, number)
    weights = jnp.asarray(rng.standard_normal(out.shape), jnp.float32)

    def gradients(function: Convolution) -> Any:
        return precise_jit(jax.grad(lambda x, w: (function(x, w, number) * weights).sum(), argnums=(0, 1)))

    assert relative(other(x, w, number), out) <= BOUND
    ours, expected = gradients(other)(x, w), gradients(plain)(x, w)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) <= BOUND


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "shape"),
    [
        (3, 1, (1, 1), (2, 7, 4, 6)),
        (3, 2, (0, 1), (2, 7, 4, 6)),
        (3, 2, (0, 1), (2, 8, 5, 6)),
        (5, 2, (1, 2), (1, 2, 3, 4)),  # smaller than the kernel
        (5, 1, (2, 2), (2, 9, 2, 4)),
    ],
)
def test_depthwise_by_taps_is_xlas(
    kernel: int, stride: int, padding: tuple[int, int], shape: tuple[int, int, int, int]
) -> None:
    def plain(x: jax.Array, w: jax.Array, stride: int) -> jax.Array:
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), (padding, padding), dimension_numbers=names, feature_group_count=x.shape[-1]
        )

    def by_taps(x: jax.Array, w: jax.Array, stride: int) -> jax.Array:
        return depthwise_by_taps(x, w, stride, padding)

    assert_same(by_taps, plain, shape, (kernel, kernel, 1, shape[-1]), stride)
