"""models/convolution.py: gradients by taps are XLA's own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import precise_jit, relative

from gura_jax.models.convolution import (
    convolution,
    convolution_by_taps,
    grouped_convolution,
    grouped_convolution_by_taps,
)

BOUND = 1e-6  # relative: sums of a few hundred float32 products in another order


@pytest.mark.parametrize(
    ("plain", "by_taps", "samples", "kernel", "number"),
    [
        (convolution, convolution_by_taps, 40, (3, 6, 8), 2),
        (convolution, convolution_by_taps, 41, (10, 1, 8), 5),
        (convolution, convolution_by_taps, 10, (10, 1, 8), 5),  # one frame
        (grouped_convolution, grouped_convolution_by_taps, 22, (5, 3, 12), 2),
    ],
)
def test_gradients_by_taps_are_those_of_xla(
    plain: Callable[..., Any],
    by_taps: Callable[..., Any],
    samples: int,
    kernel: tuple[int, int, int],
    number: int,  # the stride, or the groups
) -> None:
    rng = np.random.default_rng(0)
    channels = kernel[1] * (number if plain is grouped_convolution else 1)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, samples, channels), kernel))
    out = plain(x, w, number)
    weights = jnp.asarray(rng.standard_normal(out.shape), jnp.float32)

    def gradients(function: Callable[..., Any]) -> Any:
        return precise_jit(jax.value_and_grad(lambda x, w: (function(x, w, number) * weights).sum(), argnums=(0, 1)))

    ours, expected = gradients(by_taps)(x, w), gradients(plain)(x, w)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) <= BOUND
