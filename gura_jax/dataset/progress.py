"""Progress of a run: a bar on a terminal, JSON lines elsewhere."""

import json
import sys
import time
from typing import Any, TextIO

from gura_jax.dataset.run import Done

LINE_SECONDS = 10.0  # between two lines without a terminal


class Progress:
    """Count what is done, and report it; a context manager.

    Args:
        name: of the system.
        clips, samples: to do in all.
        sample_rate: of the samples, in Hz.
        done: of these, when the run was opened.
        stream: to write to; by default standard error.
    """

    def __init__(
        self, name: str, clips: int, samples: int, sample_rate: int, done: Done, stream: TextIO | None = None
    ) -> None:
        self.name, self.clips, self.samples, self.sample_rate = name, clips, samples, sample_rate
        self.stream = stream or sys.stderr
        self.before = self.done = done
        self.start = self._last = time.monotonic()
        self._bar: Any = None
        self._printed: Done | None = None

    def __enter__(self) -> "Progress":
        if self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self.name,
                total=self.samples,
                initial=self.before.samples,
                file=self.stream,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]",
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._printed != self.done:
            self._line()

    def __call__(self, done: Done) -> None:
        """Count a batch."""
        self.done = Done(*(a + b for a, b in zip(self.done, done, strict=True)))
        if self._bar is not None:
            rates = self.rates()
            text = (
                f"{self.done.clips}/{self.clips} clips, {rates['clips_per_second']:.1f} clips/s, "
                f"{rates['audio_hours_per_hour']:.0f} h of audio/h, {self.done.failed} failed"
            )
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done.samples)
        elif time.monotonic() - self._last >= LINE_SECONDS:
            self._line()

    def rates(self) -> dict[str, float]:
        """Return clips per second and hours of audio per hour, since the start."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        return {
            "clips_per_second": (self.done.clips - self.before.clips) / seconds,
            "audio_hours_per_hour": (self.done.samples - self.before.samples) / self.sample_rate / seconds,
        }

    def _line(self) -> None:
        self._last, self._printed = time.monotonic(), self.done
        rates = self.rates()
        left = (self.samples - self.done.samples) / self.sample_rate
        speed = rates["audio_hours_per_hour"]
        content = {
            "clips": self.done.clips,
            "of": self.clips,
            "failed": self.done.failed,
            "seconds_left": round(left / speed, 1) if speed else None,
        } | {name: round(rate, 2) for name, rate in rates.items()}
        print(json.dumps(content), file=self.stream, flush=True)
