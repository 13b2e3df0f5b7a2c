"""Figures as words: Markdown, CSV, JSON, and the verdict in plain language."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import numpy as np

from decode import Exactness
from distill.report.bootstrap import Interval, ratio, resamples
from distill.report.figures import DrafterFigures, Measurement, Sums

HEADER = (
    "drafter",
    "α",
    "τ",
    "τ vs first",
    "tokens/s",
    "speedup vs our loop",
    "vs transformers",
    "output",
)
PHASES = ("draft", "verify", "other")

StepTimes = Mapping[str, Interval]  # phase -> milliseconds per step; "step" is all of them
NO_TIMES: Mapping[str, StepTimes] = MappingProxyType({})


def cell(interval: Interval | None, digits: int = 2) -> str:
    """A figure with its interval: "2.41 [2.33, 2.50]"."""
    if interval is None:
        return "–"
    if math.isnan(interval.value):
        return "undefined"
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def change(interval: Interval | None) -> str:
    """A ratio as a change in per cent: "+18.2 % [+14.0, +22.1]"."""
    if interval is None:
        return "–"
    if math.isnan(interval.value):
        return "undefined"
    value, low, high = ((x - 1) * 100 for x in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"


def verdict(relative: Interval) -> str:
    """A ratio to the first drafter in words; "higher" and "lower" only where the interval says so.

    >>> verdict(Interval(1.2, 0.9, 1.4))
    'not distinguishable'
    """
    if not relative.clear_of(1.0):
        return "not distinguishable"
    return "higher" if relative.value > 1 else "lower"


def outcome(figures: DrafterFigures, exactness: str) -> str:
    """What became of the target's output."""
    if figures.mismatches is None:
        return exactness
    if figures.mismatches == 0:
        return f"{exactness}: all equal"
    return f"{exactness}: {figures.mismatches} differ, {figures.near_ties} of them near ties"


def verdicts(drafters: Sequence[DrafterFigures], exactness: str) -> list[str]:
    """The outcome in plain words: each drafter against the first, speed, and what went wrong."""
    first = drafters[0].name
    lines = [f"{d.name}: {_against(d, first)}." for d in drafters[1:]]
    best = max(drafters, key=lambda d: d.speedup.value)
    is_ours = best.speedup is best.speedup_over_autoregressive
    baseline = "our autoregressive loop" if is_ours else "transformers' generate"
    word = {"higher": "a gain", "lower": "a loss"}.get(verdict(best.speedup), "no clear gain")
    name = best.name if len(drafters) == 1 else f"{best.name}, the fastest,"
    lines.append(f"Speed: {name} runs at {cell(best.speedup)} times {baseline}: {word} here.")
    for d in drafters:
        if exactness == Exactness.APPROXIMATE.value and d.mismatches:
            lines.append(
                f"Lossy: {d.mismatches} outputs of {d.name} are not the target's own greedy ones, "
                "as the acceptance rule allows."
            )
        elif (d.mismatches or 0) > d.near_ties:
            wrong = (d.mismatches or 0) - d.near_ties
            lines.append(
                f"Wrong: {wrong} outputs of {d.name} differ from the target's own where it was not "
                "a near tie. There must be none; please report it."
            )
    return lines


def _against(d: DrafterFigures, first: str) -> str:
    compared = {"α": d.relative_alpha, "tokens/s": d.relative_speed}
    words = [f"{name} {verdict(x)} ({change(x)})" for name, x in compared.items() if x is not None]
    if d.relative_block_efficiency is not None:
        word = verdict(d.relative_block_efficiency)
        word += " than" if word in ("higher", "lower") else " from"
        words = [f"τ is {word} {first}'s ({change(d.relative_block_efficiency)})", *words]
    return "; ".join(words)


def step_times(
    measurements: Sequence[Measurement], modes: Sequence[str], *, num_resamples: int, seed: int
) -> dict[str, StepTimes]:
    """Milliseconds of a step by phase, for each mode; the prompts' own forwards are left out."""
    num_units = 1 + max(measurement.unit for measurement in measurements)
    draws = resamples(num_units, num_resamples, seed)
    times: dict[str, StepTimes] = {}
    for mode in modes:
        sums = Sums([m for m in measurements if m.mode == mode], num_units)
        spent = {
            phase: 1e3 * np.array([sum(m.split.get(phase, 0.0) for m in u) for u in sums.by_unit])
            for phase in PHASES
        }
        spent["step"] = np.sum(list(spent.values()), axis=0)
        steps = sums.count("num_steps")
        times[mode] = {phase: ratio(total, steps, draws) for phase, total in spent.items()}
    return times


def table_rows(drafters: Sequence[DrafterFigures], exactness: str) -> list[tuple[str, ...]]:
    """The headline table's cells, one row per drafter."""
    return [
        (
            d.name,
            cell(d.alpha, 3),
            cell(d.block_efficiency),
            change(d.relative_block_efficiency),
            cell(d.tokens_per_second, 0),
            cell(d.speedup_over_autoregressive),
            cell(d.speedup_over_transformers),
            outcome(d, exactness),
        )
        for d in drafters
    ]


def markdown(drafters: Sequence[DrafterFigures], exactness: str) -> str:
    """The headline table."""
    rows = [HEADER, tuple("---" for _ in HEADER), *table_rows(drafters, exactness)]
    escaped = [[text.replace("|", "\\|") for text in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped) + "\n"


def terminal(drafters: Sequence[DrafterFigures], exactness: str) -> str:
    """The headline table, aligned."""
    rows = [HEADER, *table_rows(drafters, exactness)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def all_figures(d: DrafterFigures, times: StepTimes = MappingProxyType({})) -> dict[str, Interval]:
    """Every figure of a drafter by name; what was not measured is left out."""
    named: dict[str, Interval | None] = {
        "alpha": d.alpha,
        "expected_alpha": d.expected_alpha,
        "draft_acceptance_rate": d.draft_acceptance_rate,
        "block_efficiency": d.block_efficiency,
        "tokens_per_second": d.tokens_per_second,
        "speedup": d.speedup,
        "speedup_over_autoregressive": d.speedup_over_autoregressive,
        "speedup_over_transformers": d.speedup_over_transformers,
        "relative_alpha": d.relative_alpha,
        "relative_block_efficiency": d.relative_block_efficiency,
        "relative_speed": d.relative_speed,
    }
    named |= {f"accepted_at_{i}": x for i, x in enumerate(d.accepted_at)}
    named |= {f"accepted_at_{i}_conditional": x for i, x in enumerate(d.accepted_at_conditional)}
    named |= {f"milliseconds_per_step_{phase}": x for phase, x in times.items()}
    return {name: x for name, x in named.items() if x is not None}


def as_csv(drafters: Sequence[DrafterFigures], times: Mapping[str, StepTimes] = NO_TIMES) -> str:
    """One line per drafter and figure: name, figure, value, low, high."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["drafter", "figure", "value", "low", "high"])
    for d in drafters:
        for figure, x in all_figures(d, times.get(d.name, {})).items():
            writer.writerow([d.name, figure, x.value, x.low, x.high])
    return buffer.getvalue()


def as_json(
    drafters: Sequence[DrafterFigures], times: Mapping[str, StepTimes]
) -> dict[str, dict[str, Any]]:
    """Name -> fields and what follows from them; what is undefined is null, for JSON has no NaN."""
    found = {}
    for d in drafters:
        relative = {
            "alpha": d.relative_alpha,
            "block_efficiency": d.relative_block_efficiency,
            "speed": d.relative_speed,
        }
        fields = asdict(d) | {
            "speedup": asdict(d.speedup),
            "milliseconds_per_step": {phase: asdict(x) for phase, x in times[d.name].items()},
            "against_first": {name: verdict(x) for name, x in relative.items() if x is not None},
        }
        found[d.name] = without_nan(fields)
    return found


def without_nan(value: Any) -> Any:
    """What is undefined becomes null, for JSON has no NaN."""
    if isinstance(value, dict):
        if isinstance(value.get("value"), float) and math.isnan(value["value"]):
            return None
        return {key: without_nan(entry) for key, entry in value.items()}
    return [without_nan(entry) for entry in value] if isinstance(value, list) else value
