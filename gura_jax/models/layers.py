"""The choice of an encoder's hidden states, and their weighted sum."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.errors import SystemConfigError

Layers = Literal["last", "mean", "mean_blocks"] | tuple[int, ...] | tuple[float, ...]
"""Which hidden states an encoder's frames are made of: see :func:`layer_weights`."""


def layer_weights(layers: Layers, num_hidden_layers: int) -> np.ndarray:
    """Weights [L + 1] of the hidden states, state 0 being the transformer's input.

    Args:
        layers: ``"last"``; ``"mean"`` of all L + 1 states, as the authors' code has it; ``"mean_blocks"``,
            the L blocks' outputs alone, as the paper's Equation 1 has it; integers, the mean of these states
            (negative ones count from the end); or L + 1 floats, a weighted sum.
        num_hidden_layers: L.

    Raises:
        SystemConfigError: anything else.
    """
    num_states = num_hidden_layers + 1
    weights = np.zeros(num_states, np.float32)
    listed: Sequence[Any] = layers if isinstance(layers, (tuple, list)) else ()
    if isinstance(layers, str):
        chosen = {"last": slice(-1, None), "mean": slice(None), "mean_blocks": slice(1, None)}.get(layers)
        if chosen is not None:
            weights[chosen] = 1.0
            return weights / weights.sum()
    elif listed and all(isinstance(x, int) and not isinstance(x, bool) for x in listed):
        states = {int(x) % num_states for x in listed if -num_states <= x < num_states}
        if len(states) == len(listed):  # in range, and distinct
            weights[sorted(states)] = 1.0
            return weights / weights.sum()
    elif len(listed) == num_states and all(isinstance(x, float) for x in listed):
        with np.errstate(over="ignore"):
            weights[:] = listed
        if np.isfinite(weights).all() and weights.any():
            return weights
    raise SystemConfigError(
        f"layers: expected 'last', 'mean', 'mean_blocks', distinct integers from {-num_states} to "
        f"{num_states - 1}, or {num_states} finite floats, not all zero (one for each hidden state of this "
        f"encoder: its input and {num_hidden_layers} blocks), found {layers!r}"
    )


def weighted_sum(states: Iterable[jax.Array], weights: np.ndarray) -> jax.Array:
    """Running sum of ``weights[i] * states[i]``; takes no more states than have a weight.

    Args:
        states: hidden states [B, T, D], one by one.
        weights: [L + 1]; zeros are skipped.
    """
    last = int(np.flatnonzero(weights)[-1])
    total = None
    for i, state in zip(range(last + 1), states, strict=False):
        if weights[i]:
            term = state if weights[i] == 1.0 else state * weights[i]
            total = term if total is None else _add_now(total, term)
    assert total is not None
    return total


class Collect(NamedTuple):
    """Hidden states to keep beside their sum.

    Attributes:
        states: which, in increasing order.
        reduce: what is kept of a state [B, T, D].
    """

    states: tuple[int, ...]
    reduce: Callable[[jax.Array], jax.Array]


def sum_of_states(
    block: Callable[[Any, jax.Array], jax.Array],
    x: jax.Array,
    blocks: Any,
    weights: np.ndarray,
    finish: Callable[[jax.Array], jax.Array],
    collect: Collect | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Weighted sum of a transformer's hidden states, of which one is held at a time.

    Args:
        block: (arguments of a block, state [B, T, D]) -> the next state.
        x: the first state.
        blocks: the arguments of each block, as a list; or stacked on a leading axis, and then scanned over.
        weights: [L + 1], of the states; blocks past the last one that is needed are not computed.
        finish: applied to the last state, where it is needed.
        collect: states to keep as well.

    Returns:
        [B, T, D]; and the K kept states, [K, ...].
    """
    L = len(weights) - 1
    chosen = () if collect is None else collect.states
    last = max(int(np.flatnonzero(weights)[-1]), *chosen, 0)
    if isinstance(blocks, list):
        kept = []

        def states() -> Iterator[jax.Array]:
            state = x
            for i, arguments in enumerate([None, *blocks[:last]]):
                state = state if arguments is None else block(arguments, state)
                state = finish(state) if i == L else state
                if collect is not None and i in chosen:
                    kept.append(collect.reduce(state))
                yield state

        walked = states()
        total = weighted_sum(walked, weights)
        for _ in walked:  # those after the last one with a weight
            pass
        return total, jnp.stack(kept) if kept else None
    inner = np.where(np.arange(L + 1) < L, weights, np.float32(0))  # the last state is finished first
    places = {state: place for place, state in enumerate(chosen)}
    kept = None
    if collect is not None:
        shape = jax.eval_shape(collect.reduce, x)
        kept = jnp.zeros((len(chosen), *shape.shape), shape.dtype)

    def keep(kept: jax.Array | None, state: jax.Array, place: jax.Array | int | None) -> jax.Array | None:
        if collect is None or kept is None or place is None:
            return kept
        return kept.at[place].set(collect.reduce(state), mode="drop")  # past the end: not chosen

    def step(carry: Any, of_block: Any) -> Any:
        state, total, kept = carry
        arguments, weight, place = of_block
        state = block(arguments, state)
        return (state, None if total is None else total + weight * state, keep(kept, state, place)), None

    start = x, x * inner[0] if inner.any() else None, keep(kept, x, places.get(0))
    some = blocks if last == L else jax.tree.map(lambda a: a[:last], blocks)
    scanned = np.array([places.get(i, len(chosen)) if i < L else len(chosen) for i in range(1, last + 1)], np.int32)
    steps = some, jnp.asarray(inner[1 : last + 1]), jnp.asarray(scanned)
    (x, total, kept), _ = jax.lax.scan(step, start, steps)
    if last == L:
        x = finish(x)
        kept = keep(kept, x, places.get(L))
    if not weights[L]:
        assert total is not None  # of the states that have a weight
        return total, kept
    x = x if weights[L] == 1.0 else x * weights[L]
    return x if total is None else total + x, kept


def _add_now(a: jax.Array, b: jax.Array) -> jax.Array:
    """a + b, as a matrix product: XLA would defer plain additions to the end and keep every state alive till then."""
    return jnp.einsum("kbtd,k->btd", jnp.stack([a, b]), jnp.ones(2, a.dtype), precision="highest")
