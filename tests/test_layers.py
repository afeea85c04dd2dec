"""models/layers.py: the choice of hidden states, and their running sum."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refuses

from gura_jax.errors import SystemConfigError
from gura_jax.models.encoder import Options
from gura_jax.models.families import ENCODERS, build_encoder
from gura_jax.models.layers import layer_weights, weighted_sum


@pytest.mark.parametrize(
    ("layers", "weights"),
    [
        ("last", [0, 0, 0, 1]),
        ("mean", [0.25] * 4),
        ("mean_blocks", [0, 1 / 3, 1 / 3, 1 / 3]),
        ((-1, 0), [0.5, 0, 0, 0.5]),
        ([2], [0, 0, 1, 0]),
        ((0.5, -2.0, 0.0, 1.0), [0.5, -2, 0, 1]),
    ],
)
def test_layer_weights(layers: Any, weights: list[float]) -> None:
    found = layer_weights(layers, 3)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(weights, np.float32))


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
    """Also when an encoder is built, and not with its first batch."""
    with refuses(SystemConfigError, "layers: expected 'last', 'mean'", f"found {layers!r}"):
        layer_weights(layers, 3)
    with refuses(SystemConfigError, "layers: expected", f"found {layers!r}"):
        build_encoder(ENCODERS["hubert-base"].config.tiny(), Options(layers))


def test_weighted_sum_takes_no_more_states_than_it_needs() -> None:
    taken = []

    def states() -> Iterator[jax.Array]:
        for i in range(5):
            taken.append(i)
            yield jnp.full((1, 1, 1), 10.0**i, jnp.float32)

    total = weighted_sum(states(), np.array([0.0, 1.0, 0.5, 0.0, 0.0], np.float32))
    assert float(total[0, 0, 0]) == 60.0
    assert taken == [0, 1, 2]
