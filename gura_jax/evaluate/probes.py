"""Probes: small networks trained on embeddings, many together, on the device that holds the embeddings.

A probe is hidden_layers times [Linear, BatchNorm, Dropout, ReLU], and a Linear to the classes. If an embedding consists
of tokens, such as the hidden states of encoders, the probe starts with a :class:`Mixer` of them, which it learns (the
paper's conclusion leaves the weights open). Every array of a probe has a leading axis of points. :func:`train` and
:func:`predict` are compiled once for each shape, whatever the task.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gura_jax.batching import bucket_length
from gura_jax.parallel import PRECISION

Prediction = Literal["multiclass", "multilabel"]
Initialization = Literal["xavier_uniform", "xavier_normal"]

# PyTorch's defaults, which HEAR's kit does not change.
MOMENTUM = 0.1  # of BatchNorm's running statistics
NORM_EPSILON = 1e-5
ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
RELU_GAIN = math.sqrt(2)
BLOCK = 1024  # rows predicted at once
SHORTEST = 8  # least rows of a batch; rows without a clip are masked


class Point(NamedTuple):
    """A point of the grid: sizes and settings of a probe and its training."""

    hidden_layers: int
    hidden_dim: int
    dropout: float
    lr: float
    initialization: Initialization
    batch_size: int
    max_epochs: int
    check_val_every_n_epoch: int
    patience: int


class Mixer(NamedTuple):
    """How the tokens that an embedding consists of become features; at first each has the same weight.

    Attributes:
        groups: tokens of each group; all are of one size F. Each group becomes its weighted sum, whose weights are a
            learned softmax (as SUPERB weighs layers; Yang et al., 2021), and the sums follow one another.
        averaged: their mean, in place of the sums one after the other.
        heads: of attention, in place of the sums: each head pools its part of the features of all tokens by a learned
            query (multi-head attention pooling). 0: none.
    """

    groups: tuple[int, ...]
    averaged: bool = False
    heads: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(self.groups)

    def features(self, size: int) -> int:
        """Number of features that tokens of a size become."""
        return size if self.heads or self.averaged else size * len(self.groups)

    def init(self, size: int) -> dict[str, Any]:
        """Arrays for tokens of a size."""
        if self.heads:
            return {"query": np.zeros((self.heads, size // self.heads), np.float32)}
        name = "averaged" if self.averaged else "states"
        return {name: tuple(np.zeros(tokens, np.float32) for tokens in self.groups)}


class Probes(NamedTuple):
    """Trained arrays of several probes, a row a point.

    Attributes:
        params: ``hidden``, for each layer weight [P, D, H], bias, scale and shift [P, H]; ``projection``, weight
            [P, H, C] and bias [P, C]; and where tokens are mixed ``states`` or ``averaged``, for each group the logits
            [P, K] of their weights, or ``query`` [P, heads, F / heads].
        stats: for each hidden layer, mean and var [P, H].
    """

    params: Any
    stats: Any


class State(NamedTuple):
    """Probes in training."""

    probes: Probes
    moments: Any  # Adam's
    keys: jax.Array  # [P]
    step: jax.Array  # batches so far


class Rates(NamedTuple):
    """Settings that may differ among points trained together."""

    lr: jax.Array  # [P]
    dropout: jax.Array  # [P]


class Rows(NamedTuple):
    """A task's data on the device."""

    x: jax.Array  # [N, D] embeddings
    y: jax.Array  # [N, C], 1 if the row belongs to the class


class Epochs(NamedTuple):
    """The batches of several epochs.

    Attributes:
        order: [E, M] int32, rows in the order of visiting, then padding.
        full: number of full batches in an epoch.
        last: rows of the incomplete batch after them, or 0.
    """

    order: jax.Array
    full: jax.Array
    last: jax.Array


class Batching(NamedTuple):
    """Static sizes: rows of a full batch, and of the last one with its padding; 0 if there is none."""

    full: int
    last: int


def init(key: jax.Array, point: Point, features: int, classes: int, mixer: Mixer | None = None) -> Probes:
    """Initialise one probe as PyTorch and HEAR's kit do: Xavier weights, biases uniform within 1 / sqrt(fan in).

    The gain is 1 for the first layer and sqrt 2 after a ReLU. NumPy draws the values, so that nothing is compiled. The
    arrays have no axis of points.
    """
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    hidden, stats = [], []
    size, gain, mixing = features, 1.0, {}
    if mixer is not None:
        mixing = mixer.init(features // mixer.tokens)
        size = mixer.features(features // mixer.tokens)
    for _ in range(point.hidden_layers):
        linear = _linear(random, point.initialization, size, point.hidden_dim, gain)
        one, zero = np.ones(point.hidden_dim, np.float32), np.zeros(point.hidden_dim, np.float32)
        hidden.append(linear | {"scale": one, "shift": zero})
        stats.append({"mean": zero, "var": one})
        size, gain = point.hidden_dim, RELU_GAIN
    projection = _linear(random, point.initialization, size, classes, gain)
    return Probes({"hidden": tuple(hidden), "projection": projection} | mixing, tuple(stats))


def _linear(
    random: np.random.Generator, initialization: Initialization, size: int, out: int, gain: float
) -> dict[str, np.ndarray]:
    assert initialization in get_args(Initialization)
    scale = gain * math.sqrt(2 / (size + out))  # standard deviation of both distributions
    if initialization == "xavier_normal":
        values = scale * random.standard_normal((size, out), np.float32)
    else:
        values = math.sqrt(3) * scale * (2 * random.random((size, out), np.float32) - 1)
    bias = (2 * random.random(out, np.float32) - 1) / math.sqrt(size)
    return {"weight": values.astype(np.float32), "bias": bias.astype(np.float32)}


def logits(probes: Probes, x: jax.Array) -> jax.Array:
    """Compute one probe's logits [B, C] of rows [B, D], with running statistics, as after training."""
    x = mixed(probes.params, x)
    for layer, stats in zip(probes.params["hidden"], probes.stats, strict=True):
        scale = layer["scale"] * jax.lax.rsqrt(stats["var"] + NORM_EPSILON)
        x = jax.nn.relu(
            _row(scale) * (x @ layer["weight"] + _row(layer["bias"] - stats["mean"])) + _row(layer["shift"])
        )
    return x @ probes.params["projection"]["weight"] + _row(probes.params["projection"]["bias"])


def mixed(params: Any, x: jax.Array) -> jax.Array:
    """Mix tokens as one probe's :class:`Mixer` does, [B, N F] -> [B, D]; other embeddings are returned unchanged."""
    if "query" in params:
        heads, size = params["query"].shape
        tokens = x.reshape(len(x), -1, heads, size)
        scores = jnp.einsum("bnhd,hd->bnh", tokens, params["query"]) / math.sqrt(size)
        return jnp.einsum("bnhd,bnh->bhd", tokens, jax.nn.softmax(scores, axis=1)).reshape(len(x), -1)
    logits = group_logits(params)
    if not logits:
        return x
    weights = [jax.nn.softmax(group) for group in logits]
    tokens = x.reshape(len(x), sum(map(len, weights)), -1)
    sums, start = [], 0
    for own in weights:
        sums.append(jnp.einsum("bkd,k->bd", tokens[:, start : start + len(own)], own))
        start += len(own)
    return sum(sums[1:], start=sums[0]) / len(sums) if "averaged" in params else jnp.concatenate(sums, axis=-1)


def group_logits(params: Any) -> tuple[jax.Array, ...]:
    """Return the logits of the weights of each group of tokens; none where there are no such weights."""
    return params.get("states", params.get("averaged", ()))


def _row(x: jax.Array) -> jax.Array:
    return x[None, :]


def training_logits(
    params: Any, stats: Any, x: jax.Array, count: jax.Array, keep: Sequence[jax.Array | float]
) -> tuple[jax.Array, Any]:
    """Compute one probe's logits [B, C] of a training batch, and its updated running statistics.

    Args:
        params, stats: as in :class:`Probes`, without the axis of points.
        x: [B, D].
        count: number of real rows, which come first; the others are padding.
        keep: for each hidden layer, the factor of dropout: [B, H], or 1.
    """
    real = (jnp.arange(x.shape[0]) < count).astype(jnp.float32)[:, None]  # [B, 1]
    total = count.astype(jnp.float32)
    x = mixed(params, x)
    updated = []
    for layer, running, kept in zip(params["hidden"], stats, keep, strict=True):
        h = x @ layer["weight"] + _row(layer["bias"])  # [B, H]
        mean = jnp.sum(h * real, 0) / total
        centred = (h - _row(mean)) * real
        var = jnp.sum(centred**2, 0) / total  # biased for normalisation, unbiased in the statistics
        unbiased = var * (total / (total - 1))
        updated.append(
            {
                "mean": (1 - MOMENTUM) * running["mean"] + MOMENTUM * mean,
                "var": (1 - MOMENTUM) * running["var"] + MOMENTUM * unbiased,
            }
        )
        scale = layer["scale"] * jax.lax.rsqrt(var + NORM_EPSILON)
        x = jax.nn.relu((centred * _row(scale) + _row(layer["shift"])) * kept)
    return x @ params["projection"]["weight"] + _row(params["projection"]["bias"]), jax.lax.stop_gradient(
        tuple(updated)
    )


def loss(outputs: jax.Array, y: jax.Array, count: jax.Array, prediction: Prediction) -> jax.Array:
    """Mean loss of the first ``count`` rows: cross-entropy, or binary cross-entropy averaged over classes."""
    if prediction == "multiclass":
        rows = optax.softmax_cross_entropy(outputs, y)
    else:
        rows = jnp.mean(optax.sigmoid_binary_cross_entropy(outputs, y), 1)
    real = jnp.arange(rows.shape[0]) < count
    return jnp.sum(jnp.where(real, rows, 0.0)) / count.astype(jnp.float32)


def step(
    probes: Probes,
    moments: Any,
    lr: jax.Array,
    x: jax.Array,
    y: jax.Array,
    count: jax.Array,
    keep: Sequence[jax.Array | float],
    prediction: Prediction,
) -> tuple[Probes, Any]:
    """One step of Adam on one batch, for one probe; arguments as in :func:`training_logits`."""

    def objective(params: Any) -> tuple[jax.Array, Any]:
        outputs, stats = training_logits(params, probes.stats, x, count, keep)
        return loss(outputs, y, count, prediction), stats

    gradients, stats = jax.grad(objective, has_aux=True)(probes.params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        updates, moments = ADAM.update(gradients, moments)
    params = jax.tree.map(lambda p, u: p - lr * u, probes.params, updates)
    return Probes(params, stats), moments


def begin(
    keys: jax.Array, points: Sequence[Point], features: int, classes: int, mixer: Mixer | None = None
) -> tuple[State, Rates]:
    """Initialise probes of one shape, distributed over the devices.

    Args:
        keys: random keys, one a point.
        points: all of one ``hidden_layers`` and ``hidden_dim``.
        features: D.
        classes: C.
        mixer: of the tokens that the features consist of; None: they are features as they are.
    """
    sizes = features, classes, mixer
    each = [init(key, point, *sizes) for key, point in zip(keys, points, strict=True)]
    probes = jax.tree.map(lambda *x: np.stack(x), *each)
    moments: Any = ADAM.init(probes.params)
    counts = jnp.asarray(np.zeros(len(points), np.int32))
    state = State(probes, moments._replace(count=counts), keys, counts.copy())
    rates = Rates(*(jnp.asarray(np.asarray([getattr(p, n) for p in points], np.float32)) for n in Rates._fields))
    return jax.device_put((state, rates), _sharding(len(points)))


def _sharding(points: int) -> NamedSharding:
    """Distribute points over the largest number of devices that divides them."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if points % n == 0)
    return NamedSharding(Mesh(np.asarray(devices[:count]), ("point",)), PartitionSpec("point"))


def pick(probes: Probes, index: int) -> Probes:
    """Select one probe, on one device."""
    return jax.device_put(jax.tree.map(lambda x: x[index : index + 1], probes), _sharding(1))


def place(arrays: Any, like: State) -> Any:
    """Copy arrays to every device that holds these probes."""
    sharding = like.keys.sharding
    assert isinstance(sharding, NamedSharding)
    return jax.device_put(arrays, NamedSharding(sharding.mesh, PartitionSpec()))


def batching(rows: int, batch_size: int) -> Batching:
    """Return the static sizes for an epoch of ``rows`` rows."""
    last = rows % batch_size
    return Batching(batch_size if rows >= batch_size else 0, min(batch_size, padded(last)) if last else 0)


def padded(rows: int) -> int:
    """Return the number of rows to pad to, so that tasks of many sizes share few compiled shapes."""
    return bucket_length(max(SHORTEST, rows))


def epochs(orders: Sequence[np.ndarray], batch_size: int) -> Epochs:
    """Make the batches of several epochs, each with its own order of the rows; all orders have one length."""
    rows = len(orders[0])
    order = np.zeros((len(orders), padded(rows) + batch_size), np.int32)
    order[:, :rows] = np.stack(orders)
    return Epochs(jnp.asarray(order), jnp.int32(rows // batch_size), jnp.int32(rows % batch_size))


def _each(function: Callable[..., Any], *points: Any) -> Any:
    """Map a function of one point over the axis of points; without vmap for one, which is faster."""
    if len(jax.tree.leaves(points)[0]) > 1:
        return jax.vmap(function)(*points)
    return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], points)))


def _over_devices(function: Callable[..., Any], mesh: Mesh, *, points: int, shared: int) -> Callable[..., Any]:
    """Let each device compute its own points; the first ``points`` arguments have the axis of points."""
    specs = (PartitionSpec("point"),) * points + (PartitionSpec(),) * shared
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("point"), check_vma=False)


def train(state: State, rates: Rates, rows: Rows, plan: Epochs, *, sizes: Batching, prediction: Prediction) -> State:
    """Train all points for several epochs on the same batches; ``state`` is donated."""
    return _train(state, rates, rows, plan, mesh=_mesh(state.keys), sizes=sizes, prediction=prediction)


def _mesh(points: jax.Array) -> Mesh:
    assert isinstance(points.sharding, NamedSharding)
    mesh = points.sharding.mesh
    assert isinstance(mesh, Mesh)
    return mesh


@functools.partial(jax.jit, static_argnames=("mesh", "sizes", "prediction"), donate_argnames=("state",))
def _train(
    state: State, rates: Rates, rows: Rows, plan: Epochs, *, mesh: Mesh, sizes: Batching, prediction: Prediction
) -> State:
    function = functools.partial(_train_some, sizes=sizes, prediction=prediction)
    return _over_devices(function, mesh, points=2, shared=2)(state, rates, rows, plan)


def _train_some(
    state: State, rates: Rates, rows: Rows, plan: Epochs, *, sizes: Batching, prediction: Prediction
) -> State:
    def batch(state: State, order: jax.Array, start: jax.Array, size: int, count: jax.Array) -> State:
        chosen = jax.lax.dynamic_slice_in_dim(order, start, size)
        x, y = rows.x[chosen], rows.y[chosen]  # [B, D], [B, C]

        def one(probes: Probes, moments: Any, key: jax.Array, number: jax.Array, rates: Rates) -> Any:
            key = jax.random.fold_in(key, number + 1)
            keep = [
                _dropout(jax.random.fold_in(key, i), rates.dropout, (size, *layer["bias"].shape))
                for i, layer in enumerate(probes.params["hidden"])
            ]
            return step(probes, moments, rates.lr, x, y, count, keep, prediction)

        probes, moments = _each(one, state.probes, state.moments, state.keys, state.step, rates)
        return State(probes, moments, state.keys, state.step + 1)

    def epoch(state: State, order: jax.Array) -> tuple[State, None]:
        if sizes.full:
            state = jax.lax.fori_loop(
                0, plan.full, lambda i, s: batch(s, order, i * sizes.full, sizes.full, jnp.int32(sizes.full)), state
            )
        if sizes.last:
            state = batch(state, order, plan.full * max(1, sizes.full), sizes.last, plan.last)
        return state, None

    with jax.default_matmul_precision(PRECISION):
        return jax.lax.scan(epoch, state, plan.order)[0]


def _dropout(key: jax.Array, rate: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw factors: 0 with probability ``rate``, else 1 / (1 - rate)."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), 1 / (1 - rate), 0.0)


@functools.partial(jax.jit, static_argnames=("mesh", "prediction"))
def _predict(
    probes: Probes, rows: Rows, order: jax.Array, count: jax.Array, *, mesh: Mesh, prediction: Prediction
) -> tuple[jax.Array, jax.Array]:
    function = functools.partial(_predict_some, prediction=prediction)
    return _over_devices(function, mesh, points=1, shared=3)(probes, rows, order, count)


def _predict_some(
    probes: Probes, rows: Rows, order: jax.Array, count: jax.Array, *, prediction: Prediction
) -> tuple[jax.Array, jax.Array]:
    def block(x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chosen, number = x
        inputs, y = rows.x[chosen], rows.y[chosen]
        outputs = _each(lambda probe: logits(probe, inputs), probes)  # [P, B, C]
        real = jnp.clip(count - number * len(chosen), 1, len(chosen))
        sums = jax.vmap(lambda o: loss(o, y, real, prediction) * real.astype(jnp.float32))(outputs)
        activation = jax.nn.softmax if prediction == "multiclass" else jax.nn.sigmoid
        return activation(outputs), jnp.where(number * len(chosen) < count, sums, 0.0)

    with jax.default_matmul_precision(PRECISION):
        probabilities, sums = jax.lax.map(block, (order, jnp.arange(len(order), dtype=jnp.int32)))
    P, C = probabilities.shape[1], probabilities.shape[3]
    return jnp.swapaxes(probabilities, 0, 1).reshape(P, -1, C), jnp.sum(sums, 0) / count.astype(jnp.float32)


class Chosen(NamedTuple):
    """Rows to predict, in blocks on the device."""

    order: jax.Array  # [K, B]
    rows: int


def choose(rows: np.ndarray) -> Chosen:
    """Arrange rows to predict in blocks, padded."""
    block = min(BLOCK, padded(len(rows)))
    blocks = -(-len(rows) // block)
    order = np.zeros(block * (blocks if blocks < SHORTEST else bucket_length(blocks)), np.int32)
    order[: len(rows)] = rows
    return Chosen(jnp.asarray(order.reshape(-1, block)), len(rows))


def predict(probes: Probes, rows: Rows, chosen: Chosen, prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
    """Predict the chosen rows; returns probabilities [P, n, C] and the mean loss [P]."""
    count = jnp.int32(chosen.rows)
    mesh = _mesh(probes.params["projection"]["bias"])
    probabilities, losses = jax.device_get(
        _predict(probes, rows, chosen.order, count, mesh=mesh, prediction=prediction)
    )
    return probabilities[:, : chosen.rows], losses


@functools.partial(jax.jit, donate_argnames=("best",))
def keep(best: Probes, probes: Probes, better: jax.Array) -> Probes:
    """Select for each point ``probes`` if ``better`` [P], else ``best``; ``best`` is donated."""
    return jax.tree.map(lambda b, p: jnp.where(better.reshape(-1, *[1] * (p.ndim - 1)), p, b), best, probes)
