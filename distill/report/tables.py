"""Figures as Markdown and CSV."""

import csv
import io
import math
from collections.abc import Sequence

from distill.report.bootstrap import Interval
from distill.report.figures import DrafterFigures

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
    value, low, high = ((x - 1) * 100 for x in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"


def outcome(figures: DrafterFigures, exactness: str) -> str:
    """What became of the target's output."""
    if figures.mismatches is None:
        return exactness
    if figures.mismatches == 0:
        return f"{exactness}: all equal"
    return f"{exactness}: {figures.mismatches} differ, {figures.near_ties} of them near ties"


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
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def terminal(drafters: Sequence[DrafterFigures], exactness: str) -> str:
    """The headline table, aligned."""
    rows = [HEADER, *table_rows(drafters, exactness)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def as_csv(drafters: Sequence[DrafterFigures]) -> str:
    """One line per drafter and figure: name, figure, value, low, high."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["drafter", "figure", "value", "low", "high"])
    for d in drafters:
        named: dict[str, Interval | None] = {
            "alpha": d.alpha,
            "expected_alpha": d.expected_alpha,
            "draft_acceptance_rate": d.draft_acceptance_rate,
            "block_efficiency": d.block_efficiency,
            "tokens_per_second": d.tokens_per_second,
            "speedup_over_autoregressive": d.speedup_over_autoregressive,
            "speedup_over_transformers": d.speedup_over_transformers,
            "relative_alpha": d.relative_alpha,
            "relative_block_efficiency": d.relative_block_efficiency,
            "relative_speed": d.relative_speed,
        }
        named |= {f"accepted_at_{i}": x for i, x in enumerate(d.accepted_at)}
        named |= {
            f"accepted_at_{i}_conditional": x for i, x in enumerate(d.accepted_at_conditional)
        }
        for figure, x in named.items():
            if x is not None:
                writer.writerow([d.name, figure, x.value, x.low, x.high])
        for phase, value in d.milliseconds.items():
            writer.writerow([d.name, f"milliseconds_per_step_{phase}", value, "", ""])
    return buffer.getvalue()
