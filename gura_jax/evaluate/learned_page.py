"""What was learned for a task as an HTML page of one file."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gura_jax.evaluate import learn, report
from gura_jax.evaluate.benchmarks import Benchmark
from gura_jax.evaluate.figures import interval, text
from gura_jax.evaluate.learn import Learned
from gura_jax.evaluate.page import NONE, by_class, counted, figure, random_note, read, settings, table, write
from gura_jax.evaluate.protocol import Protocol
from gura_jax.evaluate.statistics import Difference

LEARNED_PAGE = "learned.html"


def write_learned(
    learned: Learned, system: str, out: Path, benchmark: Benchmark, protocol: Protocol, seeds: Sequence[int]
) -> Path:
    """Write what was learned for a task as a page, ``TASK/learned.html``, beside the systems.

    Args:
        learned: what was found.
        system: name of the system that was learned from.
        out: folder of the study, with its score files.
        benchmark: of the task.
        protocol, seeds: of the probes.

    Returns:
        The page's path.

    Raises:
        StoreError: it cannot be written.
    """
    shown = dict.fromkeys((learn.EQUAL, learned.best))
    found = {
        (way, seed): read(out / "scores" / f"{protocol.name}-{seed}", way, learned.task, benchmark.scores_file)
        for way in shown
        for seed in seeds
    }
    by_way = {way: [scores for (own, _), scores in found.items() if own == way] for way in shown}
    recorded = {(system, f"{way}, seed {seed}"): scores for (way, seed), scores in found.items()}
    parts = [random_note(recorded.values()), "<h2>Ways of fusing</h2>", _ways(learned), *_mixtures(learned)]
    if learned.ablation:
        parts += ["<h2>What each member adds</h2>", _ablation(learned)]
    parts += ["<h2>Classes</h2>", by_class({way: _merged(scores) for way, scores in by_way.items()})]
    if learned.systems:
        files_written = [[name, f"<code>{text(Path(path).name)}</code>"] for name, path in learned.systems.items()]
        parts += ["<h2>Systems written beside this page</h2>", table(["way", "file"], files_written)]
    parts += settings(protocol, ", ".join(map(str, seeds)), recorded)
    about = f"{learned.metric}; {counted(len(learned.results[0].test), 'score')} each, of every seed and fold"
    return write(out / learned.task, LEARNED_PAGE, f"{system}: learned fusion for {learned.task}", about, parts)


def _ways(learned: Learned) -> str:
    own = learned.interval
    limit = _limit([result.gain for result in learned.results if result.name != learn.EQUAL])
    rows = []
    for result in learned.results:
        first = result.name == learn.EQUAL
        name = f"<b>{text(result.name)}</b> (best on validation)" if result.name == learned.best else text(result.name)
        gain = ["", "", "", ""] if first else [*_gain(result.gain, limit), _decimals(result.p, 3)]
        rows.append([name, _mean(result.validation), _mean(result.test), *gain])
    between = "" if own.low is None or own.high is None else f", 95 % interval {own.low:.4f} to {own.high:.4f}"
    return (
        f"<p>{learn.EQUAL}: the system's own fusion, {own.mean:.4f} on test{between}. Gains are over it, on test, with "
        "95 % intervals of the corrected resampled t-test; p: of no gain, adjusted for the number of ways (Holm).</p>"
        + table(["way", "validation", "test", "gain", "95 % interval", "", "p"], rows)
    )


def _ablation(learned: Learned) -> str:
    limit = _limit(learned.ablation.values())
    rows = [[text(name), *_gain(own, limit), _decimals(own.p, 3)] for name, own in learned.ablation.items()]
    about = "<p>The system's test score less that of the system without the member; p is not adjusted.</p>"
    return about + table(["member", "gain", "95 % interval", "", "p"], rows)


def _gain(own: Difference, limit: float) -> list[str]:
    between = NONE if own.low is None or own.high is None else f"{own.low:+.4f} to {own.high:+.4f}"
    return [f"{own.mean:+.4f}", between, interval(own.mean, own.low, own.high, limit)]


def _limit(differences: Iterable[Difference]) -> float:
    values = (value for own in differences for value in (own.mean, own.low, own.high) if value is not None)
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _mixtures(learned: Learned) -> list[str]:
    """Figures of learned weights by member, for each way that has them."""
    out = []
    for result in learned.results:
        if not result.weights:
            continue
        named = list(zip(learned.tokens, result.weights, strict=True))
        groups = {name: list(own) for name, own in itertools.groupby(named, key=lambda item: item[0][0])}
        apart = result.name == learn.LAYERS  # a mixture for each member
        drawn = {name: own for name, own in groups.items() if len(own) > 1 or not apart}
        out.append(f"<h2>Learned weights: {text(result.name)}</h2>")
        out.append(
            "<p>Mean over the seeds, of states that were first scaled to one size; dashed: equal weights."
            + (" Each member's weights sum to 1.</p>" if apart else " All weights sum to 1.</p>")
        )
        highest = max((weight for own in drawn.values() for _, weight in own), default=0.0)
        for name, own in drawn.items():
            total = "" if apart else f": {100 * sum(weight for _, weight in own):.1f} % of all"
            values = [("no layers" if state is None else f"state {state}", weight) for (_, state), weight in own]
            out.append(f"<h3>{text(name)}{total}</h3>")
            out.append(figure(values, highest, len(own) if apart else len(named)))
        if left := [name for name in groups if name not in drawn]:
            out.append(f"<p>Without layers to weigh: {text(', '.join(left))}.</p>")
    return out


def _merged(scores: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Sum the confusion matrices of several seeds; other results by class are the first seed's."""
    if not all(report.CONFUSION in own for own in scores):
        return scores[0]
    total: dict[str, Counter[str]] = {}
    for own in scores:
        for true, row in own[report.CONFUSION].items():
            total.setdefault(true, Counter()).update(row)
    return {report.CONFUSION: total}


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f}"


def _decimals(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"
