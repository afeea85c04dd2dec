"""A training step: head, loss and gradient, as pure functions that are compiled for batches sharded over a mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gura_jax.errors import SystemConfigError
from gura_jax.evaluate.probes import Prediction
from gura_jax.finetune.data import Batch
from gura_jax.finetune.optimiser import member_scales
from gura_jax.finetune.settings import Settings
from gura_jax.fusion import FusedMember, Fusion, fuse
from gura_jax.model import Model
from gura_jax.models.encoder import DTypeName, Encoder, Noise, Output, Params, frame_mask
from gura_jax.models.families import build_encoders
from gura_jax.parallel import Precision, replicated

NORM_EPSILON = 1e-5
LAYER_LOGITS = "layer_logits"  # name of the learned layer weights among an encoder's weights
NOISE_STREAM = 1  # of the seed: the order of the clips has its own


class Weights(NamedTuple):
    """Weights of the head, and of the encoders by member and name; all, or those that are trained or are not."""

    head: Mapping[str, Any]
    members: Mapping[str, Mapping[str, Any]]


class State(NamedTuple):
    """What a step changes: float32 weights that are trained, the optimiser's moments, and the steps so far."""

    trained: Weights
    moments: Any
    step: Any  # [] int32


class Figures(NamedTuple):
    """Of one step: the mean loss of the batch, and the norm of its gradient before clipping."""

    loss: jax.Array
    gradient_norm: jax.Array


class Predicted(NamedTuple):
    """Of a batch: probabilities [B, C] or [B, T, C], and sum and weight of its losses."""

    probabilities: jax.Array
    loss_sum: jax.Array
    weight: jax.Array


@dataclasses.dataclass(frozen=True)
class Network:
    """A system with a head for a task.

    Attributes:
        fusion: the system, computing in its dtype.
        dtypes: of its weights as they are computed with, by member and name.
        embedding: whether the head is on scenes or on frames.
        prediction: one class (softmax) or any number (sigmoid).
        precision: of float32 products.
    """

    fusion: Fusion
    dtypes: Mapping[str, Mapping[str, Any]]
    embedding: Literal["scene", "event"]
    prediction: Prediction
    precision: Precision


class LearnedLayers(Encoder):
    """An encoder whose frames are a learned softmax-weighted sum of another's hidden states, as in SUPERB.

    Args:
        encoder: any encoder with hidden states; its weights, and ``layer_logits`` [num_states], are this one's.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.sample_rate, self.feature_size, self.grid = encoder.sample_rate, encoder.feature_size, encoder.grid
        self.num_states, self.pooled_size = encoder.num_states, 0

    def init(self, key: jax.Array) -> Params:
        return {**self.encoder.init(key), LAYER_LOGITS: jnp.zeros(self.num_states, jnp.float32)}

    def __call__(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Output:
        own = {name: value for name, value in params.items() if name != LAYER_LOGITS}
        weights = jax.nn.softmax(params[LAYER_LOGITS])  # [L + 1]
        index = {f"state {i}": i for i in range(self.num_states)}
        states = {index[n]: (x, counts) for n, x, counts in self.encoder.states(own, audio, lengths) if n in index}
        frames = sum((weights[i] * states[i][0] for i in range(1, len(states))), start=weights[0] * states[0][0])
        return Output(frames, states[0][1])


def network(model: Model, settings: Settings, embedding: Literal["scene", "event"], prediction: Prediction) -> Network:
    """Build the network that is trained, from a model whose weights are float32.

    Raises:
        SystemConfigError: the model is held in bfloat16; a member is an object, which cannot be saved; or
            ``layer-weights`` of a system without hidden states.
    """
    if model.dtype != "float32":
        raise SystemConfigError(
            f"expected a model with weights in float32, found {model.dtype}: Settings.dtype says what to compute in"
        )
    if objects := [member.name for member in model.fusion.members if member.config is None]:
        raise SystemConfigError(
            f"member {objects[0]!r} is a Python object: expected an encoder of a registered family, which can be saved "
            "when it is trained (gura_jax.register)"
        )
    members = tuple(_in_dtype(member, settings.dtype) for member in model.fusion.members)
    dtypes = {m.name: _dtypes(m.encoder) for m in members}
    if settings.part.kind == "layer-weights":
        members = tuple(_learned(member, embedding) for member in members)
        if not any(isinstance(member.encoder, LearnedLayers) for member in members):
            raise SystemConfigError(
                f"train: expected all or last:N for {model.system.name}, as it has no hidden states to weigh, found "
                "layer-weights"
            )
    fusion = model.fusion._replace(members=members)
    return Network(fusion, dtypes, embedding, prediction, model.compilation.precision)


def _in_dtype(member: FusedMember, dtype: DTypeName) -> FusedMember:
    """Return a member that computes in this dtype."""
    options = dataclasses.replace(member.options, dtype=dtype)
    encoder, scene_encoder = build_encoders(member.config, options, member.scene)
    return member._replace(encoder=encoder, scene_encoder=scene_encoder, options=options)


def _dtypes(encoder: Encoder) -> Mapping[str, Any]:
    held = jax.eval_shape(encoder.prepare, encoder.abstract_params())
    return {name: array.dtype for name, array in held.items()}


def _learned(member: FusedMember, embedding: Literal["scene", "event"]) -> FusedMember:
    """Return a member with learned layer weights, if it has hidden states that count."""
    if not member.encoder.num_states or (member.scene == "pooled" and embedding == "scene"):
        return member
    encoder = LearnedLayers(member.encoder)
    return member._replace(encoder=encoder, scene_encoder=encoder)


def divide(model: Model, net: Network, settings: Settings, classes: int) -> tuple[Weights, Weights, Weights]:
    """Divide weights into those that are trained and the rest.

    Args:
        model: has the encoders' weights.
        net: from :func:`network`.
        settings: say what is trained.
        classes: C, of the head.

    Returns:
        Trained weights, frozen weights, and for the trained ones the factors of the learning rate.

    Raises:
        SystemConfigError: nothing of the encoders would be trained, or there are fewer blocks.
    """
    size = model.scene_embedding_size if net.embedding == "scene" else model.timestamp_embedding_size
    head = {"kernel": np.zeros((size, classes), np.float32), "bias": np.zeros(classes, np.float32)}
    trained, frozen, scales = ({m.name: {} for m in net.fusion.members} for _ in range(3))
    for member, given in zip(net.fusion.members, model.fusion.members, strict=True):
        params, own = model.params[member.name], member.name
        factors = member_scales(given, params, settings.part, settings.layer_decay)
        for name, value in params.items():
            (trained if factors[name].any() else frozen)[own][name] = value
        scales[own] = {name: factors[name] for name in trained[own]}
        if isinstance(member.encoder, LearnedLayers):
            trained[own][LAYER_LOGITS] = np.zeros(member.encoder.num_states, np.float32)
            scales[own][LAYER_LOGITS] = np.float32(1)
    if not any(trained.values()):
        raise SystemConfigError(
            f"train: expected weights to train in {model.system.name}, found no transformer blocks for "
            f"{settings.train}: train all"
        )
    factors = {name: np.float32(1) for name in head}
    return Weights(head, trained), Weights({}, frozen), Weights(factors, scales)


def merge(trained: Weights, frozen: Weights) -> Weights:
    """Join what :func:`divide` divided."""
    members = {name: {**frozen.members[name], **own} for name, own in trained.members.items()}
    return Weights({**frozen.head, **trained.head}, members)


def apply_head(head: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Logits [..., C] of embeddings [..., D]: layer norm, so that one learning rate suits all systems, and a Linear."""
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + NORM_EPSILON)
    return x @ head["kernel"] + head["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def losses(logits: jax.Array, targets: jax.Array, prediction: Prediction) -> jax.Array:
    """Cross-entropy, or binary cross-entropy averaged over classes: [..., C] -> [...]."""
    if prediction == "multiclass":
        return optax.softmax_cross_entropy(logits, targets)
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=-1)


def predict(net: Network, weights: Weights, batch: Batch, noise: Noise | None = None) -> Predicted:
    """Predict a batch; pure, and differentiable in the weights.

    Args:
        net: the network.
        weights: all, in float32.
        batch: audio and lengths by rate, targets and weights of the rows.
        noise: dropout and masks in the encoders, in training.
    """
    params = {
        name: {key: value.astype(net.dtypes.get(name, {}).get(key, value.dtype)) for key, value in own.items()}
        for name, own in weights.members.items()
    }
    wanted = "scenes" if net.embedding == "scene" else "frames"
    with jax.default_matmul_precision(net.precision):
        out = fuse(net.fusion, frozenset({wanted}), params, batch.audio, batch.lengths, noise)
        x, weight = out.scenes, batch.real  # [B, S], [B]
        if net.embedding == "event":
            x = out.frames  # [B, T, D]
            assert x is not None
            assert out.counts is not None
            weight = jnp.where(frame_mask(out.counts, x.shape[1]), weight[:, None], 0.0)  # [B, T]
        assert x is not None
        logits = apply_head(weights.head, x)
    loss = losses(logits, batch.targets, net.prediction)
    activation = jax.nn.softmax if net.prediction == "multiclass" else jax.nn.sigmoid
    return Predicted(activation(logits), jnp.sum(loss * weight), jnp.sum(weight))


def train_step(
    net: Network, optimiser: optax.GradientTransformation, scales: Weights, settings: Settings
) -> Callable[[State, Weights, Batch], tuple[State, Figures]]:
    """Return (state, frozen weights, batch) -> (state, figures): one step of the optimiser; pure.

    Args:
        net: from :func:`network`.
        optimiser: any of optax's.
        scales: from :func:`divide`.
        settings: parts of a batch, noise.
    """
    parts = settings.accumulate

    def objective(trained: Weights, frozen: Weights, batch: Batch, noise: Noise | None) -> tuple[jax.Array, jax.Array]:
        found = predict(net, merge(trained, frozen), batch, noise)
        return found.loss_sum, found.weight

    def summed(trained: Weights, frozen: Weights, batch: Batch, key: jax.Array) -> Any:
        """Sums over the batch's parts: loss, its weight, and the gradient."""

        def some(batch: Batch, part: Any) -> Any:
            noise = _noise(settings, jax.random.fold_in(key, part))
            (loss, weight), gradient = jax.value_and_grad(objective, has_aux=True)(trained, frozen, batch, noise)
            return loss, weight, gradient

        if parts == 1:
            return some(batch, 0)
        # Part i has the rows i, i + parts, ...: every device keeps its own rows.
        divided = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        zero = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained)

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, some(*part)), None

        return jax.lax.scan(add, zero, (divided, jnp.arange(parts, dtype=jnp.int32)))[0]

    def step(state: State, frozen: Weights, batch: Batch) -> tuple[State, Figures]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), NOISE_STREAM), state.step)
        loss, weight, gradient = summed(state.trained, frozen, batch, key)
        # Stacked blocks may be trained in part.
        gradient = jax.tree.map(lambda g, s: jnp.where(s > 0, g / weight, 0.0), gradient, scales)
        norm = optax.tree.norm(gradient)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, moments = optimiser.update(gradient, state.moments, state.trained)
        trained = jax.tree.map(lambda p, u, s: p + s * u, state.trained, updates, scales)
        return State(trained, moments, state.step + 1), Figures(loss / weight, norm)

    return step


def _noise(settings: Settings, key: jax.Array) -> Noise | None:
    if not settings.noisy:
        return None
    return Noise(key, dropout=settings.dropout, mask_time=settings.mask_time, mask_features=settings.mask_features)


def compile_step(step: Any, state: State) -> Any:
    """Compile a step; weights stay where they are, and the old state's memory is used again."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def compile_predict(net: Network, mesh: Mesh) -> Callable[[Weights, Weights, Batch], Predicted]:
    """Compile :func:`predict` of (trained, frozen, batch); every process gets the whole result."""

    def function(trained: Weights, frozen: Weights, batch: Batch) -> Predicted:
        return predict(net, merge(trained, frozen), batch)

    return jax.jit(function, out_shardings=replicated(mesh))


def place_replicated(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of each array on every device of all processes; those that are there stay."""

    def one(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding.device_set == set(mesh.devices.flat):
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, replicated(mesh), lambda index: host[index])

    return jax.tree.map(one, tree)
