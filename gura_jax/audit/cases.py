"""The batches that a clip is embedded in, as data."""

from typing import Literal, NamedTuple

import numpy as np

RATIOS = (0.5, 1.0, 2.0, 5.0)  # lengths of companions by the clip's
NOISE = 0.1  # root mean square, as loud as speech


class Case(NamedTuple):
    """A batch: a clip and its companions.

    Attributes:
        companions: lengths, as multiples of the clip's.
        content: of the companions.
        row: of the clip in the batch.
    """

    companions: tuple[float, ...]
    content: Literal["silence", "noise"]
    row: int

    @property
    def longest(self) -> float:
        """Length of the batch by the clip's: more than 1 where the clip is padded."""
        return max(1.0, *self.companions) if self.companions else 1.0

    def describe(self) -> str:
        """Name the companions."""
        if not self.companions:
            return "none"
        return f"{self.content}, " + ", ".join(f"{ratio:g}x" for ratio in self.companions)

    def position(self) -> str:
        """Name the clip's row."""
        last = len(self.companions)
        return "first" if self.row == 0 else "last" if self.row == last else "middle"

    def batch(self, clip: np.ndarray, shortest: int) -> list[np.ndarray]:
        """Make the batch of clips [samples]; no companion is shorter than ``shortest``."""
        generator = np.random.default_rng(0)
        clips = []
        for ratio in self.companions:
            samples = max(round(ratio * len(clip)), shortest)
            noise = NOISE * generator.standard_normal(samples)
            clips.append((noise if self.content == "noise" else np.zeros(samples)).astype(np.float32))
        clips.insert(self.row, clip)
        return clips


AGAIN = Case((), "noise", 0)  # the clip alone again: a model that differs here is not deterministic
_LENGTHS = tuple(Case((ratio,), content, 0) for ratio in RATIOS for content in ("silence", "noise"))
_POSITIONS = (Case((2.0, 2.0), "noise", 1), Case((2.0, 2.0), "noise", 2))
_ORDERS = (Case((0.5, 1.0, 2.0), "noise", 1), Case((2.0, 1.0, 0.5), "noise", 1))

CASES: tuple[Case, ...] = (AGAIN, *_LENGTHS, *_POSITIONS, *_ORDERS)
FEW_CASES: tuple[Case, ...] = (AGAIN, Case((2.0,), "noise", 0), _ORDERS[1])
