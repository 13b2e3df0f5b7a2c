"""Figures as PNG: readable in print and by the colour-blind (Okabe & Ito 2008)."""

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill.report.bootstrap import Interval
from distill.report.figures import DrafterFigures

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
PHASES = {"draft": "#E69F00", "verify": "#0072B2", "other": "#999999"}


def all_plots(drafters: Sequence[DrafterFigures]) -> dict[str, bytes]:
    """Name -> PNG."""
    return {
        "block_efficiency": block_efficiency(drafters),
        "acceptance_by_position": acceptance_by_position(drafters),
        "time_split": time_split(drafters),
    }


def block_efficiency(drafters: Sequence[DrafterFigures]) -> bytes:
    """τ and speedup of each drafter, side by side, with intervals."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.6 * len(drafters) + 1.6), sharey=True)
    _points(left, [d.block_efficiency for d in drafters])
    left.set_xlabel("τ: tokens per target pass (1 = autoregressive)")
    _points(right, [d.speedup_over_autoregressive for d in drafters])
    right.set_xlabel("speedup over our autoregressive loop")
    for axes in (left, right):
        axes.axvline(1, color="#999999", linewidth=1, linestyle="--")
    left.set_yticks(range(len(drafters)), [d.name for d in drafters])
    left.set_ylim(len(drafters) - 0.5, -0.5)
    return _png(figure)


def acceptance_by_position(drafters: Sequence[DrafterFigures]) -> bytes:
    """Share of drafts accepted at each position, and given that the one before was."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for index, d in enumerate(drafters):
        color = COLORS[index % len(COLORS)]
        _curve(axes[0], d.accepted_at, color, d.name)
        _curve(axes[1], d.accepted_at_conditional, color, d.name)
    axes[0].set_ylabel("accepted")
    axes[0].set_xlabel("position in the draft (share of all drafts)")
    axes[1].set_xlabel("position (given that the one before was accepted)")
    axes[0].set_ylim(0, 1)
    axes[0].legend(frameon=False, fontsize=9)
    return _png(figure)


def time_split(drafters: Sequence[DrafterFigures]) -> bytes:
    """Milliseconds of a step, by phase."""
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(drafters) + 1.4))
    begins = [0.0] * len(drafters)
    for phase, color in PHASES.items():
        widths = [d.milliseconds[phase] for d in drafters]
        axes.barh(range(len(drafters)), widths, left=begins, color=color, label=phase, height=0.6)
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    axes.set_yticks(range(len(drafters)), [d.name for d in drafters])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per step")
    axes.set_xlim(0, max(begins) * 1.2)
    axes.legend(frameon=False, fontsize=9, loc="center right")
    return _png(figure)


def _points(axes: Axes, intervals: Sequence[Interval]) -> None:
    for index, x in enumerate(intervals):
        axes.errorbar(
            x.value,
            index,
            xerr=[[x.value - x.low], [x.high - x.value]],
            fmt="o",
            color=COLORS[index % len(COLORS)],
            capsize=4,
        )
        axes.annotate(
            f"{x.value:.2f}",
            (x.value, index),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=9,
        )


def _curve(axes: Axes, intervals: Sequence[Interval], color: str, name: str) -> None:
    positions = range(1, len(intervals) + 1)
    axes.plot(positions, [x.value for x in intervals], "o-", color=color, label=name, markersize=4)
    axes.fill_between(
        positions,
        [x.low for x in intervals],
        [x.high for x in intervals],
        color=color,
        alpha=0.18,
        linewidth=0,
    )
    axes.set_xticks(list(positions))


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return buffer.getvalue()
