"""Key tables as data: which tensor of a library's checkpoint becomes which array, and how.

A family has one :class:`KeyTable` for each library whose checkpoints it reads. Nothing here imports PyTorch.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]


class Transform(NamedTuple):
    """How a source tensor becomes an array, or one part of an array that :data:`COMBINE` puts together."""

    axes: tuple[int, ...]  # the permutation of the source's axes
    part: str = ""
    ones: tuple[int, ...] = ()  # permuted axes of size 1, whatever the array's size is there
    dropped: tuple[int, ...] = ()  # permuted axes of size 1 that the array does not have
    variance: bool = False  # no value may be negative
    piece: tuple[int, int] = (0, 1)  # which of so many equal pieces along the source's first axis

    @property
    def rank(self) -> int:
        """Axes of the array."""
        return len(self.axes) - len(self.dropped)

    def source_shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the source tensor must have to fill an array of shape ``target``."""
        permuted = list(target)
        for axis in self.dropped:
            permuted.insert(axis, 1)
        for axis in self.ones:
            permuted[axis] = 1
        first, *others = (permuted[self.axes.index(axis)] for axis in range(len(self.axes)))
        return first * self.piece[1], *others

    def apply(self, tensor: np.ndarray) -> np.ndarray:
        """The (part of the) array: a contiguous copy."""
        index, count = self.piece
        size = len(tensor) // count
        tensor = tensor[index * size : (index + 1) * size]
        return np.array(tensor.transpose(self.axes).squeeze(self.dropped), order="C")


LINEAR = Transform((1, 0))  # [out, in] -> [in, out]
CONV = Transform((2, 1, 0))  # [out, in, kernel] -> [kernel, in, out]
CONV2D = Transform((2, 3, 1, 0))  # [out, in, height, width] -> [height, width, in, out]
CONV2D_TRANSPOSED = Transform((3, 2, 1, 0))  # [out, in, height, width] -> [width, height, in, out]
CONV2D_COLUMN = Transform((2, 3, 1, 0), dropped=(1,))  # [out, in, kernel, 1] -> [kernel, in, out]
EMBEDDING = Transform((0, 1))  # as it is
VECTOR = Transform((0,))
VARIANCE = Transform((0,), variance=True)
WEIGHT_G = Transform((2, 1, 0), "g", ones=(1, 2))
WEIGHT_V = Transform((2, 1, 0), "v")

Row = tuple[str, str, Transform]
"""A regular expression that a whole source key must match, the array's path as a template for
``re.Match.expand``, and the transform."""


def weight_norm(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Kernel of PyTorch's ``weight_norm``: v, with its norm over the axes where g has size 1 replaced by g.

    In float64, so that the fold adds no error of its own.
    """
    g, v = parts["g"].astype(np.float64), parts["v"].astype(np.float64)
    axes = tuple(axis for axis, size in enumerate(g.shape) if size == 1)
    norm = np.sqrt(np.square(v).sum(axis=axes, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):  # a tap of zeros: the result is checked
        return (v * (g / norm)).astype(np.float32)


COMBINE: Mapping[frozenset[str], Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    frozenset({""}): lambda parts: parts[""],
    frozenset({"g", "v"}): weight_norm,
}


def dense(source: str, target: str) -> list[Row]:
    """Rows of a linear layer."""
    return [(rf"{source}\.weight", f"{target}.kernel", LINEAR), (rf"{source}\.bias", f"{target}.bias", VECTOR)]


def packed(source: str, targets: Iterable[str]) -> list[Row]:
    """Rows of several linear layers whose weights are one tensor, such as ``in_proj_weight``, one above the other."""
    targets = list(targets)
    return [
        (f"{source}{name}", f"{target}.{array}", transform._replace(piece=(i, len(targets))))
        for i, target in enumerate(targets)
        for name, array, transform in (("weight", "kernel", LINEAR), ("bias", "bias", VECTOR))
    ]


def norm(source: str, target: str) -> list[Row]:
    """Rows of a layer norm or group norm."""
    return [(rf"{source}\.weight", f"{target}.scale", VECTOR), (rf"{source}\.bias", f"{target}.bias", VECTOR)]


def conv(source: str, target: str, kernel: Transform = CONV) -> list[Row]:
    """Rows of a convolution; a 1-D one by default."""
    return [(rf"{source}\.weight", f"{target}.kernel", kernel), (rf"{source}\.bias", f"{target}.bias", VECTOR)]


def batch_norm(source: str, target: str) -> list[Row]:
    """Rows of a batch norm with its running statistics."""
    return [
        *norm(source, target),
        (rf"{source}\.running_mean", f"{target}.mean", VECTOR),
        (rf"{source}\.running_var", f"{target}.var", VARIANCE),
    ]


def conv2d_batch_norm(source: str, source_norm: str, target: str) -> list[Row]:
    """Rows of a 2-D convolution without bias, whose axes change places, and of its batch norm."""
    return [
        (rf"{source}\.weight", f"{target}.conv.kernel", CONV2D_TRANSPOSED),
        *batch_norm(source_norm, f"{target}.norm"),
    ]


@dataclass(frozen=True)
class Wrapping:
    """A pickle that holds the state dict under one of its entries, and settings under others."""

    state: tuple[str, ...]  # names of the entry with the weights, in order of preference
    settings: tuple[str, ...]  # names of the entries that ``KeyTable.config`` reads
    inert: tuple[str, ...] = ()  # classes among the rest, by dotted name: read without being imported
    nested: str = ""  # regular expression of entries among the weights that are dicts, which are ignored
    # Names of the entry that holds, by language, the weights that take the place of some others, wrapped as these are.
    languages: tuple[str, ...] = ()


class Contents(NamedTuple):
    """What a file holds, for reading an encoder's config from it."""

    shapes: Shapes
    settings: Mapping[str, Any]  # the wrapping's entries that are there


ReadConfig = Callable[[Contents, list[str]], Mapping[str, Any]]
"""Reads a config, ``model_type`` included, in the names of ``Config.from_source``, and ``do_normalize`` where clips are
normalised first; adds what is wrong to the list."""


@dataclass(frozen=True)
class KeyTable:
    """How a family reads the checkpoints of one library.

    Every key must match a row whose array the encoder has (the first such row counts), be ignored, or be refused;
    any other key is an error.

    Attributes:
        rows: see :data:`Row`.
        prefix: regular expression of what precedes the keys in models with a head; removed once.
        ignored: regular expression of whole keys that are not part of the encoder.
        refused: regular expression of whole keys -> why the encoder that they belong to is not supported.
        recognise: regular expression found in some key of every such checkpoint, by which a bare file is
            recognised; None: this library's weights come in folders with a ``config.json`` only.
        config: where the encoder's config comes from: ``"config.json"``, in the same folder; a function that
            reads it from the file; or None where the file does not say and the user names the encoder.
        wrapping: how the library wraps its state dicts; None: not at all.
        assets: published weights inside installed packages: ``"PACKAGE:NAME"`` -> the file's path there.
    """

    rows: tuple[Row, ...]
    prefix: str = ""
    ignored: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    recognise: str | None = None
    config: Literal["config.json"] | ReadConfig | None = "config.json"
    wrapping: Wrapping | None = None
    assets: Mapping[str, str] = field(default_factory=dict)

    def recognises(self, keys: Iterable[str]) -> bool:
        """Whether some key matches :attr:`recognise`."""
        pattern = self.recognise
        return pattern is not None and any(re.search(pattern, key) for key in keys)
