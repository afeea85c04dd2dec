"""Results of an audit: lines on the terminal, JSON, and a figure."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gura_jax.audit.cases import AGAIN
from gura_jax.audit.compare import Clip, Result
from gura_jax.audit.subjects import Subject
from gura_jax.errors import InputError, StoreError, SystemConfigError
from gura_jax.plot import STYLE

PICTURES = (".png", ".svg", ".pdf")
FLOOR = 1e-9  # of the figure's scale: below float32's resolution
HEADING = f"{'passed':18} {'companions':24} {'clip is':7} {'frames':>9} {'scene':>9} {'cosine':>9}  problem"


class Worst(NamedTuple):
    """The largest differences in batches of one length."""

    mode: str
    length: str  # in words
    frames: float
    scene: float | None


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

    def by_length(self) -> list["Worst"]:
        """Largest differences by mode and length of the batch."""
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            if result.problem is None:
                groups.setdefault((result.mode.name, _length(result)), []).append(result)
        return [
            Worst(
                mode,
                length,
                max(r.frames for r in own),
                max((r.scene for r in own if r.scene is not None), default=None),
            )
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
            "by_length": [row._asdict() for row in self.by_length()],
            "results": [_row(result, self.bound) for result in self.results],
        }

    def summary(self) -> str:
        """Say what was found, in a few lines."""
        worst, judged = self.worst, self.judged
        failed = [result for result in judged if not result.difference <= self.bound]
        where = f"{worst.clip}, {worst.mode.name}, {worst.case.describe()}, {worst.case.position()}"
        what = worst.problem or f"frames {worst.frames:.1e}, scene {_number(worst.scene).strip()}{_missing(worst)}"
        lines = [f"{'batch':34} {'frames':>9} {'scene':>9}"]
        for row in self.by_length():
            lines.append(f"{f'{row.mode}, {row.length}':34} {row.frames:9.1e} {_number(row.scene)}")
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
    start = f"{worst.mode.name:18} {case.describe():24} {case.position():7}"
    failed = "" if worst.difference <= bound else "FAILED" if worst.mode.judged else "past the bound"
    if worst.problem is not None:
        return f"{start} {'-':>9} {'-':>9} {'-':>9}  {failed}, {worst.clip}: {worst.problem}"
    return f"{start} {worst.frames:9.1e} {_number(worst.scene)} {worst.cosine:9.6f}  {failed}{_missing(worst)}".rstrip()


def _number(difference: float | None) -> str:
    return f"{'-':>9}" if difference is None else f"{difference:9.1e}"


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
        **{name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()},
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
    from matplotlib.ticker import FuncFormatter

    measured = [result for result in report.results if result.by_frame is not None]
    if not measured:
        raise InputError(f"--plot: expected a batch that {report.subject.name} embeds, found none")
    judged = [result for result in measured if result.mode.judged] or measured
    worst = max(judged, key=lambda result: max(result.frames, result.scene or 0.0))
    modes = [mode.name for mode in report.subject.modes]
    styles = {mode: (f"C{i}", ("-", "--", ":", "-.")[i % 4]) for i, mode in enumerate(modes)}
    settings: dict[Any, Any] = STYLE | {"text.parse_math": False, "svg.hashsalt": "gura_jax"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(10, 4.2), dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(report.subject.name, x=0.01, ha="left", fontsize=13, fontweight="bold")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.4, 1))
        for result in measured:
            if (result.clip, result.case) == (worst.clip, worst.case) and result.by_frame is not None:
                times = (np.arange(len(result.by_frame)) + 0.5) * worst.seconds / len(result.by_frame)
                color, dashes = styles[result.mode.name]
                values = np.maximum(result.by_frame, FLOOR)
                left.plot(times, values, dashes, color=color, lw=1.2, label=result.mode.name)
        left.set_title(f"{worst.clip}: {worst.case.describe()}, {worst.case.position()}", loc="left", fontsize=9.5)
        left.set(xlabel="seconds", ylabel="relative difference of a frame", yscale="log", xlim=(0, worst.seconds))
        rows = report.by_length()
        lengths = list(dict.fromkeys(row.length for row in rows))
        for i, mode in enumerate(modes):
            own = [row for row in rows if row.mode == mode]
            places = [lengths.index(row.length) + 0.15 * (i - (len(modes) - 1) / 2) for row in own]
            scenes = [np.nan if row.scene is None else row.scene for row in own]
            for marker, what, values in (("o", "frames", [row.frames for row in own]), ("x", "scenes", scenes)):
                label = f"{what}, {mode}"
                right.plot(
                    places, np.maximum(values, FLOOR), marker, color=styles[mode][0], ms=6, mfc="none", label=label
                )
        right.set_title("worst clip, by length of the batch", loc="left", fontsize=9.5)
        right.set_xticks(range(len(lengths)), lengths, rotation=20, ha="right")
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
        for axes in (left, right):
            axes.axhline(report.bound, color="#6b7280", lw=0.8, ls="--", label=f"bound, {report.bound:g}")
            axes.grid(axis="y", color="#e5e7eb", lw=0.6)
            axes.legend(frameon=False, fontsize=7.5)
        try:
            figure.savefig(path)
        except OSError as error:
            raise StoreError(f"--plot: {path} cannot be written: {error}") from None
