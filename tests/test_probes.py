"""gura_jax/evaluate/probes.py: the network, its initialisation and its training, compared with PyTorch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gura_jax.evaluate import probes
from gura_jax.evaluate.probes import Point, Probes

STEP_BOUND = 1e-5  # relative to the largest value: float32 sums in another order
EPOCHS_BOUND = 1e-4  # after several steps: Adam divides small gradients by small numbers
D, H, C = 12, 16, 5


def point(layers: int = 1, **changes: Any) -> Point:
    return Point(layers, H, 0.1, 1e-2, "xavier_uniform", 8, 6, 3, 20)._replace(**changes)


def torch_probe(probe: Probes, masks: list[torch.Tensor]) -> torch.nn.Sequential:
    """Build the same network in PyTorch, with given masks of dropout."""

    class Masked(torch.nn.Module):
        def __init__(self, mask: torch.Tensor) -> None:
            super().__init__()
            self.mask = mask

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.mask if self.training else x

    modules: list[torch.nn.Module] = []
    for layer, mask in zip(probe.params["hidden"], masks, strict=True):
        norm = torch.nn.BatchNorm1d(H)
        modules += [linear(layer), norm, Masked(mask), torch.nn.ReLU()]
    return torch.nn.Sequential(*modules, linear(probe.params["projection"]))


def linear(layer: Any) -> torch.nn.Linear:
    module = torch.nn.Linear(*layer["weight"].shape)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(np.asarray(layer["weight"]).T))
        module.bias.copy_(torch.tensor(np.asarray(layer["bias"])))
    return module


def batch(rows: int, prediction: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, D)).astype(np.float32)
    if prediction == "multiclass":
        return x, np.eye(C, dtype=np.float32)[random.integers(C, size=rows)]
    return x, (random.random((rows, C)) < 0.3).astype(np.float32)


def torch_loss(outputs: torch.Tensor, y: np.ndarray, prediction: str) -> torch.Tensor:
    if prediction == "multiclass":
        return torch.nn.functional.cross_entropy(outputs, torch.tensor(y.argmax(1)))
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs, torch.tensor(y))


def close(found: Any, wanted: torch.Tensor) -> None:
    want = wanted.detach().numpy()
    assert np.abs(np.asarray(found) - want).max() <= STEP_BOUND * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("prediction", ["multiclass", "multilabel"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_steps_equal_pytorchs(layers: int, prediction: Any) -> None:
    rows, padding = 7, 4
    probe = probes.init(jax.random.key(1), point(layers), D, C)
    random = np.random.default_rng(5)
    masks = [(random.random((rows, H)) > 0.1).astype(np.float32) / np.float32(0.9) for _ in range(layers)]
    network = torch_probe(probe, [torch.tensor(mask) for mask in masks])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    moments = probes.ADAM.init(probe.params)
    step = jax.jit(probes.step, static_argnames="prediction")
    keep = [jnp.asarray(np.pad(mask, ((0, padding), (0, 0)))) for mask in masks]
    for seed in range(3):
        x, y = batch(rows, prediction, seed)
        optimizer.zero_grad()
        torch_loss(network(torch.tensor(x)), y, prediction).backward()
        optimizer.step()
        padded = (np.pad(x, ((0, padding), (0, 0)), constant_values=9), np.pad(y, ((0, padding), (0, 0))))
        probe, moments = step(probe, moments, jnp.float32(1e-2), *padded, jnp.int32(rows), keep, prediction=prediction)
    modules = [m for m in network if isinstance(m, torch.nn.Linear)]
    for layer, module in zip([*probe.params["hidden"], probe.params["projection"]], modules, strict=True):
        close(layer["weight"].T, module.weight)
        # Before BatchNorm a bias has no effect: its gradient is rounding error, which Adam amplifies.
        if layer is probe.params["projection"]:
            close(layer["bias"], module.bias)
    norms = [m for m in network if isinstance(m, torch.nn.BatchNorm1d)]
    for layer, stats, norm in zip(probe.params["hidden"], probe.stats, norms, strict=True):
        close(layer["scale"], norm.weight)
        close(layer["shift"], norm.bias)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        close(stats["var"], norm.running_var)
    network.eval()
    x, y = batch(9, prediction, 99)
    if not layers:
        close(probes.logits(probe, jnp.asarray(x)), network(torch.tensor(x)))


@pytest.mark.parametrize("prediction", ["multiclass", "multilabel"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_and_its_prediction_equal_pytorchs(layers: int, prediction: Any) -> None:
    """Every gradient, the statistics, and the predictions before and after the step."""
    probe = probes.init(jax.random.key(2), point(layers), D, C)
    network = torch_probe(probe, [torch.ones(6, H)] * layers)
    x, y = batch(6, prediction)
    with torch.no_grad():
        close(probes.logits(probe, jnp.asarray(x)), network.eval()(torch.tensor(x)))
    network.train()
    outputs = network(torch.tensor(x))
    wanted = torch_loss(outputs, y, prediction)
    wanted.backward()

    def objective(params: Any) -> tuple[jax.Array, Any]:
        found, stats = probes.training_logits(params, probe.stats, jnp.asarray(x), jnp.int32(6), [1.0] * layers)
        return probes.loss(found, jnp.asarray(y), jnp.int32(6), prediction), (found, stats)

    (loss, (found, stats)), gradients = jax.value_and_grad(objective, has_aux=True)(probe.params)
    close(loss, wanted)
    close(found, outputs)
    modules = [m for m in network if isinstance(m, torch.nn.Linear)]
    for layer, module in zip([*gradients["hidden"], gradients["projection"]], modules, strict=True):
        assert module.weight.grad is not None
        assert module.bias.grad is not None
        close(layer["weight"].T, module.weight.grad)
        close(layer["bias"], module.bias.grad)
    norms = [m for m in network if isinstance(m, torch.nn.BatchNorm1d)]
    for layer, norm in zip(stats, norms, strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        close(layer["mean"], norm.running_mean)
        close(layer["var"], norm.running_var)
    with torch.no_grad():
        close(probes.logits(Probes(probe.params, stats), jnp.asarray(x)), network.eval()(torch.tensor(x)))


@pytest.mark.parametrize("law", ["xavier_uniform", "xavier_normal"])
def test_a_probe_is_initialised_as_in_the_kit(law: Any) -> None:
    features, hidden, classes = 300, 200, 100
    probe = probes.init(jax.random.key(0), point(2, hidden_dim=hidden, initialization=law), features, classes)
    layers = [*probe.params["hidden"], probe.params["projection"]]
    for layer, size, out, gain in zip(
        layers, (features, hidden, hidden), (hidden, hidden, classes), (1, 2**0.5, 2**0.5), strict=True
    ):
        weight, bias = np.asarray(layer["weight"]), np.asarray(layer["bias"])
        std = gain * (2 / (size + out)) ** 0.5
        assert weight.shape == (size, out)
        assert weight.std() == pytest.approx(std, rel=0.02)
        widest = np.abs(weight).max() / std
        assert widest <= 3**0.5 if law == "xavier_uniform" else widest > 3
        assert np.abs(bias).max() <= size**-0.5
        assert bias.std() == pytest.approx(size**-0.5 / 3**0.5, rel=0.15)


def determined(found: Probes) -> list[Any]:
    """List all arrays except biases before BatchNorm, whose gradients are rounding error, and the means they shift."""
    layers = [{k: v for k, v in layer.items() if k != "bias"} for layer in found.params["hidden"]]
    return jax.tree.leaves([layers, found.params["projection"], [layer["var"] for layer in found.stats]])


def trained(rows: int, batch_size: int, points: list[Point], epochs: int = 2, seeds: int = 0) -> Any:
    x, y = batch(rows, "multilabel")
    keys = jax.random.split(jax.random.key(seeds), len(points))
    state, rates = probes.begin(keys, points, D, C)
    size = probes.padded(rows)
    data = probes.Rows(*(jnp.asarray(np.pad(a, ((0, size - rows), (0, 0)))) for a in (x, y)))
    data, plan = probes.place((data, probes.epochs([np.arange(rows)] * epochs, batch_size)), state)
    sizes = probes.batching(rows, batch_size)
    return probes.train(state, rates, data, plan, sizes=sizes, prediction="multilabel").probes, (x, y)


@pytest.mark.parametrize(("rows", "batch_size"), [(7, 8), (19, 8), (6, 3)])
def test_epochs_visit_every_row_in_its_batch(rows: int, batch_size: int) -> None:
    found, (x, y) = trained(rows, batch_size, [point(1, dropout=0.0)])
    wanted = probes.init(jax.random.split(jax.random.key(0), 1)[0], point(1), D, C)
    moments = probes.ADAM.init(wanted.params)
    for _ in range(2):
        for start in range(0, rows, batch_size):
            inputs, labels = (jnp.asarray(a[start : start + batch_size]) for a in (x, y))
            count = jnp.int32(min(batch_size, rows - start))
            wanted, moments = probes.step(
                wanted, moments, jnp.float32(1e-2), inputs, labels, count, [1.0], "multilabel"
            )
    for a, b in zip(determined(found), determined(wanted), strict=True):
        np.testing.assert_allclose(a[0], b, atol=EPOCHS_BOUND)


@pytest.mark.parametrize(("count", "devices"), [(4, 4), (10, 5)])
def test_points_together_are_points_alone(count: int, devices: int) -> None:
    """One point a device, and two."""
    points = [point(2, lr=(1e-2, 1e-3, 1e-4)[i % 3]) for i in range(count)]
    together, _ = trained(19, 8, points)
    assert len(together.params["projection"]["bias"].sharding.device_set) == devices
    keys = jax.random.split(jax.random.key(0), len(points))
    x, y = batch(19, "multilabel")
    size = probes.padded(19)
    data = probes.Rows(*(jnp.asarray(np.pad(a, ((0, size - 19), (0, 0)))) for a in (x, y)))
    state, rates = probes.begin(keys[1:2], points[1:2], D, C)
    data, plan = probes.place((data, probes.epochs([np.arange(19)] * 2, 8)), state)
    alone = probes.train(state, rates, data, plan, sizes=probes.batching(19, 8), prediction="multilabel").probes
    for a, b in zip(determined(together), determined(alone), strict=True):
        np.testing.assert_allclose(a[1], b[0], atol=EPOCHS_BOUND)


def test_dropout_drops_a_tenth() -> None:
    kept = np.asarray(probes._dropout(jax.random.key(0), jnp.float32(0.1), (1000, 100)))
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1) / np.float32(0.9)}
    assert (kept == 0).mean() == pytest.approx(0.1, abs=0.005)


def test_tasks_of_like_sizes_share_a_program() -> None:
    train: Any = probes._train
    before = train._cache_size()
    trained(33, 64, [point(1)])
    after = train._cache_size()
    assert after == before + 1
    for rows in (34, 37, 40):
        trained(rows, 64, [point(1, lr=1e-4, dropout=0.3)])
    assert train._cache_size() == after


def test_predictions_and_their_loss() -> None:
    probe = jax.tree.map(lambda x: x[None], probes.init(jax.random.key(0), point(2), D, C))
    x, y = batch(2100, "multiclass")
    data = probes.Rows(jnp.asarray(x), jnp.asarray(y))
    rows = np.arange(2100)[::-1].copy()
    placed = jax.device_put(probe, probes._sharding(1))
    probabilities, loss = probes.predict(placed, data, probes.choose(rows), "multiclass")
    outputs = probes.logits(jax.tree.map(lambda a: a[0], probe), data.x[rows])
    np.testing.assert_allclose(probabilities[0], jax.nn.softmax(outputs), atol=1e-6)
    wanted = torch_loss(torch.tensor(np.asarray(outputs)), y[rows], "multiclass")
    assert loss[0] == pytest.approx(float(wanted), rel=1e-5)
