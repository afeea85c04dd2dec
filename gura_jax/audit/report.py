"""Results of an audit: lines on the terminal, JSON, and a figure."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gura_jax.audit.cases import AGAIN
from gura_jax.audit.compare import Clip, Result
from gura_jax.audit.subjects import Subject
from gura_jax.errors import InputError, StoreError, SystemConfigError
from gura_jax.plot import STYLE

PICTURES = (".png", ".svg", ".pdf")
FLOOR = 1e-9  # of the figure's scale: below float32's resolution
HEADING = f"{'passed':18} {'companions':32} {'clip is':7} {'frames':>9} {'scene':>9} {'cosine':>9}  problem"


@dataclasses.dataclass(frozen=True)
class Report:
    """An audit that was run.

    Attributes:
        subject: what was audited.
        clips: that it was audited with.
        results: of every clip, mode and case.
        bound: what differences are judged by.
    """

    subject: Subject
    clips: Sequence[Clip]
    results: Sequence[Result]
    bound: float

    @property
    def judged(self) -> list[Result]:
        """Results that decide."""
        return [result for result in self.results if result.mode.judged]

    @property
    def passed(self) -> bool:
        """No judged result is past the bound."""
        return all(result.difference <= self.bound for result in self.judged)

    @property
    def worst(self) -> Result:
        """The largest judged difference."""
        return max(self.judged, key=lambda result: result.difference)

    def by_length(self) -> list[tuple[str, str, float, float]]:
        """Largest differences by mode and length of the batch: (mode, length, of frames, of scenes)."""
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            if result.problem is None:
                groups.setdefault((result.mode.name, _length(result)), []).append(result)
        return [
            (mode, length, max(r.frames for r in own), max(r.scene for r in own))
            for (mode, length), own in groups.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured; differences that there are not are null."""
        return {
            "model": self.subject.name,
            "sample_rate": self.subject.sample_rate,
            "versions": {name: version(name) for name in self.subject.packages},
            "bound": self.bound,
            "passed": self.passed,
            "worst": _row(self.worst, self.bound),
            "by_length": [
                {"mode": mode, "length": length, "frames": frames, "scene": scene}
                for mode, length, frames, scene in self.by_length()
            ],
            "results": [_row(result, self.bound) for result in self.results],
        }

    def summary(self) -> str:
        """Say what was found, in a few lines."""
        worst, judged = self.worst, self.judged
        failed = [result for result in judged if not result.difference <= self.bound]
        where = f"{worst.clip}, {worst.mode.name}, {worst.case.describe()}, {worst.case.position()}"
        what = worst.problem or f"frames {worst.frames:.1e}, scene {worst.scene:.1e}{_missing(worst)}"
        lines = [f"{'batch':34} {'frames':>9} {'scene':>9}"]
        lines += [
            f"{f'{mode}, {length}':34} {frames:9.1e} {scene:9.1e}" for mode, length, frames, scene in self.by_length()
        ]
        lines += [
            "",
            f"{len(judged) - len(failed)} of {len(judged)} batches give the clip's own embedding within {self.bound:g}",
            f"worst: {where}: {what}",
        ]
        if others := sorted({result.mode.name for result in self.results if not result.mode.judged}):
            lines.append(f"not judged, as the model's own feature extractor does otherwise: {', '.join(others)}")
        return "\n".join(lines)


def describe(subject: Subject, clips: Sequence[Clip]) -> str:
    """Name what is audited, with versions of packages, and the clips."""
    versions = ", ".join(f"{name} {version(name)}" for name in subject.packages)
    lengths = ", ".join(f"{len(clip.audio) / subject.sample_rate:g}" for clip in clips)
    return f"{subject.name}: {subject.sample_rate} Hz, {versions}; clips of {lengths} s"


def line(results: Sequence[Result], bound: float) -> str:
    """One line for a mode and case: its worst clip."""
    worst = max(results, key=lambda result: result.difference)
    case = worst.case
    start = f"{worst.mode.name:18} {case.describe():32} {case.position():7}"
    if worst.problem is not None:
        return f"{start} {'-':>9} {'-':>9} {'-':>9}  FAILED {worst.clip}: {worst.problem}"
    failed = "" if worst.difference <= bound else "FAILED" if worst.mode.judged else "past the bound"
    return f"{start} {worst.frames:9.1e} {worst.scene:9.1e} {worst.cosine:9.6f}  {failed}{_missing(worst)}".rstrip()


def _missing(result: Result) -> str:
    if result.counts is None or result.counts[0] == result.counts[1]:
        return ""
    return f", {result.counts[0]} frames and not {result.counts[1]}"


def _length(result: Result) -> str:
    longest = result.case.longest
    return "alone" if result.case == AGAIN else "not padded" if longest <= 1 else f"padded to {longest:g}x"


def _row(result: Result, bound: float) -> Mapping[str, Any]:
    case, counts = result.case, result.counts or (None, None)
    numbers = {"frames": result.frames, "scene": result.scene, "cosine": result.cosine}
    return {
        "clip": result.clip,
        "seconds": result.seconds,
        "mode": result.mode.name,
        "judged": result.mode.judged,
        "companions": list(case.companions),
        "content": case.content,
        "row": case.row,
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "frames_in_batch": counts[0],
        "frames_alone": counts[1],
        "problem": result.problem,
        "passed": result.difference <= bound,
    }


def check_picture(path: Path) -> None:
    """Refuse, before anything is computed, a figure that could not be drawn.

    Raises:
        InputError: another suffix, or no such folder.
        SystemConfigError: matplotlib is missing.
    """
    if path.suffix not in PICTURES:
        raise InputError(f"--plot: expected {', '.join(PICTURES)}, found {path}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot: expected a folder that exists, found {path}")
    try:
        import matplotlib  # noqa: F401 - whether it is there
    except ModuleNotFoundError:
        raise SystemConfigError("--plot: expected matplotlib: pip install 'gura-jax[plot]'") from None


def draw(report: Report, path: Path) -> None:
    """Draw where in the worst clip the padding leaks, and the worst difference by the length of the batch.

    Raises:
        InputError: every batch failed, and there is nothing to draw.
        StoreError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [result for result in report.results if result.by_frame is not None]
    if not measured:
        raise InputError(f"--plot: expected a batch that {report.subject.name} embeds, found none")
    judged = [result for result in measured if result.mode.judged] or measured
    worst = max(judged, key=lambda result: max(result.frames, result.scene))
    modes = [mode.name for mode in report.subject.modes]
    colors = dict(zip(modes, ("#2563eb", "#f59e0b", "#10b981", "#a855f7"), strict=False))
    settings: dict[Any, Any] = STYLE | {"text.parse_math": False, "svg.hashsalt": "gura_jax"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(10, 4.2), dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(report.subject.name, x=0.01, ha="left", fontsize=13, fontweight="bold")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.4, 1))
        for result in measured:
            if (result.clip, result.case) == (worst.clip, worst.case) and result.by_frame is not None:
                times = (np.arange(len(result.by_frame)) + 0.5) * worst.seconds / len(result.by_frame)
                values = np.maximum(result.by_frame, FLOOR)
                left.plot(times, values, color=colors[result.mode.name], lw=1.2, label=result.mode.name)
        left.set_title(f"{worst.clip}: {worst.case.describe()}, {worst.case.position()}", loc="left", fontsize=9.5)
        left.set(xlabel="seconds", ylabel="relative difference of a frame", yscale="log", xlim=(0, worst.seconds))
        rows = report.by_length()
        lengths = list(dict.fromkeys(length for _, length, _, _ in rows))
        for mode in modes:
            own = [row for row in rows if row[0] == mode]
            places = [lengths.index(length) for _, length, _, _ in own]
            for index, marker, what in ((2, "o", "frames"), (3, "x", "scenes")):
                values = [max(row[index], FLOOR) for row in own]
                right.plot(places, values, marker, color=colors[mode], ms=6, mfc="none", label=f"{what}, {mode}")
        right.set_title("worst clip, by length of the batch", loc="left", fontsize=9.5)
        right.set_xticks(range(len(lengths)), lengths, rotation=20, ha="right")
        for axes in (left, right):
            axes.axhline(report.bound, color="#6b7280", lw=0.8, ls="--", label=f"bound, {report.bound:g}")
            axes.grid(axis="y", color="#e5e7eb", lw=0.6)
            axes.legend(frameon=False, fontsize=7.5)
        try:
            figure.savefig(path)
        except OSError as error:
            raise StoreError(f"--plot: {path} cannot be written: {error}") from None
