"""Settings of a fine-tuning, checked."""

import dataclasses
import re
from typing import Any, Literal, NamedTuple

from gura_jax.errors import SystemConfigError
from gura_jax.models.encoder import DTypeName

LAST = re.compile(r"last:([1-9]\d*)")


class Part(NamedTuple):
    """What of the encoders is trained beside the head.

    Attributes:
        kind: all weights, the last transformer blocks, or the weights of the hidden states.
        blocks: the number of those blocks.
    """

    kind: Literal["all", "last", "layer-weights"]
    blocks: int = 0


class _Range(NamedTuple):
    """The values that a setting may have."""

    kind: type
    least: float
    below: float = float("inf")

    def holds(self, value: Any) -> bool:
        known = isinstance(value, (int, self.kind)) and not isinstance(value, bool)
        return known and self.least <= value < self.below

    def __str__(self) -> str:
        noun = "a whole number" if self.kind is int else "a number"
        return f"{noun} from {self.least:g}" + (f", under {self.below:g}" if self.below < float("inf") else "")


_RANGES = {
    "epochs": _Range(int, 1),
    "batch_size": _Range(int, 1),
    "accumulate": _Range(int, 1),
    "learning_rate": _Range(float, 0),
    "layer_decay": _Range(float, 0, 1 + 1e-9),
    "warmup": _Range(float, 0, 1),
    "clip_norm": _Range(float, 1e-9),
    "weight_decay": _Range(float, 0),
    "patience": _Range(int, 1),
    "checkpoint_steps": _Range(int, 1),
    "dropout": _Range(float, 0, 1),
    "mask_time": _Range(float, 0, 1),
    "mask_features": _Range(float, 0, 1),
    "seed": _Range(int, 0, 2**32),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a system is fine-tuned.

    Attributes:
        train: ``"all"`` weights of the encoders; those of the last N transformer blocks of each, ``"last:N"``; or
            ``"layer-weights"``, a softmax over the hidden states of each encoder that has them. The head always.
        epochs: at most; the learning rate decays to zero over them.
        batch_size: clips of a step.
        accumulate: parts that a batch is computed in, one after the other; their gradients are summed.
        learning_rate: the highest, after warm-up; of the head, and without ``layer_decay`` of all weights.
        layer_decay: factor of the learning rate from each block to the one before it.
        warmup: share of the steps in which the learning rate rises from zero.
        clip_norm: largest norm of the gradient; a larger one is scaled down.
        weight_decay: AdamW's, of kernels.
        patience: epochs without a better validation score after which training stops.
        checkpoint_steps: steps between checkpoints; there is also one after each epoch.
        dropout: inside the encoders.
        mask_time, mask_features: SpecAugment's shares of what is masked at the transformer's input.
        dtype: of convolutions and matrix products; weights and optimiser are float32.
        seed: of the order of the clips, dropout and masks.

    Raises:
        SystemConfigError: a value out of range.
    """

    train: str = "all"
    epochs: int = 30
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-4
    layer_decay: float = 1.0
    warmup: float = 0.1
    clip_norm: float = 1.0
    weight_decay: float = 0.01
    patience: int = 5
    checkpoint_steps: int = 500
    dropout: float = 0.0
    mask_time: float = 0.0
    mask_features: float = 0.0
    dtype: DTypeName = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            if not allowed.holds(value := getattr(self, name)):
                raise SystemConfigError(f"{name}: expected {allowed}, found {value!r}")
        if self.batch_size % self.accumulate:
            raise SystemConfigError(
                f"accumulate: expected a divisor of the batch size, {self.batch_size}, found {self.accumulate}"
            )
        if self.part.kind == "layer-weights" and self.noisy:
            raise SystemConfigError(
                "dropout and masks: expected 0 with train='layer-weights', which leaves the encoders as they are"
            )

    @property
    def part(self) -> Part:
        """What ``train`` stands for."""
        if self.train in ("all", "layer-weights"):
            return Part(self.train)
        if not (match := LAST.fullmatch(self.train)):
            raise SystemConfigError(
                f"train: expected all, last:N (N blocks, from 1) or layer-weights, found {self.train!r}"
            )
        return Part("last", int(match[1]))

    @property
    def noisy(self) -> bool:
        """Whether training draws dropout or masks."""
        return max(self.dropout, self.mask_time, self.mask_features) > 0
