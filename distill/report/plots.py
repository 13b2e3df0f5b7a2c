"""Figures as PNG: readable in print and by the colour-blind (Okabe & Ito 2008)."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill.report.bootstrap import Interval
from distill.report.figures import DrafterFigures
from distill.report.tables import NO_TIMES, StepTimes

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "osD^vP*X"
PHASE_COLORS = {"draft": "#E69F00", "verify": "#0072B2", "other": "#999999"}


def all_plots(
    drafters: Sequence[DrafterFigures], times: Mapping[str, StepTimes] = NO_TIMES
) -> dict[str, bytes]:
    """Name -> PNG; `times` of `tables.step_times` adds an interval to each drafter's step."""
    return {
        "block_efficiency": block_efficiency(drafters),
        "acceptance_by_position": acceptance_by_position(drafters),
        "time_split": time_split(drafters, times),
    }


def save(plots: Mapping[str, bytes], folder: Path) -> None:
    """Write <name>.png for each, whole or not at all."""
    folder.mkdir(exist_ok=True)
    for name, data in plots.items():
        partial = folder / f".{name}.png.{os.getpid()}.partial"
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(folder / f"{name}.png")
        finally:
            partial.unlink(missing_ok=True)


def block_efficiency(drafters: Sequence[DrafterFigures]) -> bytes:
    """τ and both speedups of each drafter, side by side, with intervals."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.7 * len(drafters) + 1.6), sharey=True)
    for index, d in enumerate(drafters):
        color = COLORS[index % len(COLORS)]
        _point(left, d.block_efficiency, index, color)
        theirs = d.speedup_over_transformers
        _point(right, d.speedup_over_autoregressive, index - 0.15 * (theirs is not None), color)
        if theirs is not None:
            _point(right, theirs, index + 0.25, color, face="white")
    left.set_xlabel("τ: tokens per target pass (1 = autoregressive)")
    right.set_xlabel("speedup (filled: over our own loop,\nhollow: over transformers' generate)")
    for axes in (left, right):
        axes.axvline(1, color="#777777", linewidth=1, linestyle="--")
        axes.margins(x=0.12)
    left.set_yticks(range(len(drafters)), [d.name for d in drafters])
    left.set_ylim(len(drafters) - 0.5, -0.55)
    return png(figure)


def acceptance_by_position(drafters: Sequence[DrafterFigures]) -> bytes:
    """Share of drafts accepted at each position, and given that the one before was."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for index, d in enumerate(drafters):
        shift = 0.08 * (index - (len(drafters) - 1) / 2)  # else the intervals hide one another
        _curve(axes[0], d.accepted_at, index, shift, d.name)
        _curve(axes[1], d.accepted_at_conditional, index, shift, d.name)
    axes[0].set_ylabel("accepted (share)")
    axes[0].set_xlabel("position in the draft (share of all drafts)")
    axes[1].set_xlabel("position (given that the one before was accepted)")
    axes[0].set_ylim(0, 1)
    axes[1].legend(frameon=False, fontsize=9, loc="best")
    return png(figure)


def time_split(
    drafters: Sequence[DrafterFigures], times: Mapping[str, StepTimes] = NO_TIMES
) -> bytes:
    """Milliseconds of a step, by phase; the interval is that of the whole step."""
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(drafters) + 1.7))
    begins = [0.0] * len(drafters)
    for phase, color in PHASE_COLORS.items():
        widths = [d.milliseconds[phase] for d in drafters]
        axes.barh(range(len(drafters)), widths, left=begins, color=color, label=phase, height=0.6)
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    for index, d in enumerate(drafters):
        if d.name in times:
            _error_bar(axes, times[d.name]["step"], index, "#222222", fmt="none")
    axes.set_yticks(range(len(drafters)), [d.name for d in drafters])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per step")
    axes.legend(
        frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0
    )
    return png(figure)


def _point(axes: Axes, x: Interval, y: float, color: str, face: str | None = None) -> None:
    _error_bar(axes, x, y, color, fmt="o", mfc=face or color)
    axes.annotate(
        f"{x.value:.2f}",
        (x.value, y),
        textcoords="offset points",
        xytext=(0, 6),
        ha="center",
        fontsize=9,
    )


def _error_bar(
    axes: Axes, x: Interval, y: float, color: str, *, fmt: str, mfc: str | None = None
) -> None:
    axes.errorbar(x.value, y, xerr=_whiskers([x]), fmt=fmt, color=color, mfc=mfc, capsize=4)


def _curve(axes: Axes, found: Sequence[Interval], index: int, shift: float, name: str) -> None:
    places = [number + shift for number in range(1, len(found) + 1)]
    axes.errorbar(
        places,
        [x.value for x in found],
        yerr=_whiskers(found),
        fmt=f"{MARKERS[index % len(MARKERS)]}-",
        color=COLORS[index % len(COLORS)],
        label=name,
        markersize=5,
        capsize=3,
    )
    axes.set_xticks(range(1, len(found) + 1))


def _whiskers(found: Sequence[Interval]) -> list[list[float]]:
    """Lengths below and above; of a few prompts the interval may lie beside the figure itself."""
    below = [max(x.value - x.low, 0.0) for x in found]
    return [below, [max(x.high - x.value, 0.0) for x in found]]


def png(figure: Figure) -> bytes:
    """The figure as a file; it is closed."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return buffer.getvalue()
