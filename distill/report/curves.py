"""Trainings beside each other: a table, their curves, and the page that holds both."""

import html
import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from distill.report.parts import STYLE, image, table
from distill.report.plots import COLORS, png
from distill.runs import Run, how_far_moved

HEAD = (
    "settings",
    "seeds",
    "τ",
    "of the seeds",
    "α",
    "parameters",
    "tokens read",
    "training tokens/s",
)
RUN_HEAD = ("run", "settings", "seed", "step", "best step", "τ", "α", "last loss")
# Where these differ, τ was not measured alike.
STYLES = ("-", "--", ":", "-.")  # of lines, when colours run out
MEASURE = ("target_fingerprint", "held_out_hash", "draft_length", "num_held_out", "sampling.")
Metrics = dict[str, float]


def best(run: Run) -> Metrics | None:
    """The line of the best τ so far, the earlier of equals; None before the first."""
    measured = [line for line in run.metrics() if "heldout_tau" in line]
    return max(measured, key=lambda line: line["heldout_tau"], default=None)


def ranked(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Names of the groups, the best mean τ first, those without any last."""
    return sorted(groups, key=lambda name: -(_mean_of(groups[name], "heldout_tau") or 0.0))


def rows(groups: Mapping[str, Sequence[Run]]) -> list[list[str]]:
    """The table: a line for the runs that differ in nothing but the seed."""
    lines = [list(HEAD)]
    for name in ranked(groups):
        runs = groups[name]
        finished = [run for run in runs if run.is_finished()]
        taus = [line["heldout_tau"] for run in runs if (line := best(run))]
        trained = [run.training() for run in runs]
        seconds = sum(seconds for _, seconds in trained)
        tokens = [tokens for tokens, _ in trained]
        parameters = max((run.parameters() for run in finished), default=0)
        unfinished = len(runs) - len(finished)
        lines.append(
            [
                name
                + (how_far_moved(finished) if finished else "")
                + (f" ({unfinished} of {len(runs)} unfinished)" if unfinished else ""),
                ", ".join(str(run.seed()) for run in runs),
                _shown(_mean_of(runs, "heldout_tau"), ".3f"),
                f"{min(taus):.3f}–{max(taus):.3f}" if len(taus) > 1 else "–",
                _shown(_mean_of(runs, "heldout_alpha"), ".3f"),
                f"{parameters / 1e6:.2f} M" if parameters else "–",
                f"{statistics.mean(tokens):,.0f}",
                f"{sum(tokens) / seconds:,.0f}" if seconds else "–",
            ]
        )
    return lines


def run_rows(groups: Mapping[str, Sequence[Run]], folder: Path) -> list[list[str]]:
    """A line for each run, named as it lies in `folder`."""
    lines = [list(RUN_HEAD)]
    for name in ranked(groups):
        for run in groups[name]:
            found, metrics = best(run) or {}, run.metrics()
            losses = [line["loss"] for line in metrics if "loss" in line]
            step = int(metrics[-1]["step"]) if metrics else 0
            lines.append(
                [
                    str(run.folder.relative_to(folder)),
                    name,
                    str(run.seed()),
                    f"{step:,} of {run.settings()['trainer.steps']:,}",
                    _shown(found.get("step"), ",.0f"),
                    _shown(found.get("heldout_tau"), ".3f"),
                    _shown(found.get("heldout_alpha"), ".3f"),
                    _shown(losses[-1] if losses else None, ".4g"),
                ]
            )
    return lines


def measured_unlike(runs: Sequence[Run]) -> list[str]:
    """Settings of the measurement of τ in which runs differ: then their τ are no comparison."""
    settings = [run.settings() for run in runs]
    names = sorted({n for one in settings for n in one if n.startswith(MEASURE)})
    return [name for name in names if len({repr(one.get(name)) for one in settings}) > 1]


def curves(groups: Mapping[str, Sequence[Run]]) -> bytes:
    """τ by step, and the loss by step: a panel per objective, for their sizes say nothing."""
    objectives = sorted({_objective(run) for runs in groups.values() for run in runs})
    figure, axes = plt.subplots(
        1 + len(objectives), 1, figsize=(9, 2.8 * (1 + len(objectives))), sharex=True
    )
    panels = dict(zip(["τ", *objectives], axes, strict=True))
    looks = cycle(product(STYLES, COLORS))
    for name, (style, color) in zip(ranked(groups), looks, strict=False):
        for run in groups[name]:
            look = {"color": color, "linestyle": style, "label": name}
            _line(panels["τ"], run, "heldout_tau", marker="o", **look)
            _line(panels[_objective(run)], run, "loss", **look)
    panels["τ"].set_ylabel("τ on held-out prompts")
    for objective in objectives:
        panels[objective].set_ylabel(f"loss: {objective}")
    axes[-1].set_xlabel("step")
    lines = {line.get_label(): line for panel in panels.values() for line in panel.get_lines()}
    named = [name for name in ranked(groups) if name in lines]
    figure.legend(
        [lines[name] for name in named],
        named,
        frameon=False,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(0.91, 0.89),
    )
    return png(figure)


def page(title: str, folder: Path, groups: Mapping[str, Sequence[Run]]) -> str:
    """The whole page about the runs in `folder`."""
    lead = f"{sum(map(len, groups.values()))} runs of draftsmith train in {folder}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(lead)}</p>
<div class="verdict">{html.escape(caution(groups))}</div>
<div class="scroll">{table(rows(groups))}</div>
<h2>Curves</h2>
{image("τ and loss by step, a line per run", curves(groups))}
<h2>Runs</h2>
<div class="scroll">{table(run_rows(groups, folder))}</div>
</body></html>
"""


def markdown(groups: Mapping[str, Sequence[Run]]) -> str:
    """The table, and what is to be known about it."""
    head, *lines = rows(groups)
    cells = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells) + f"\n{caution(groups)}\n"


def caution(groups: Mapping[str, Sequence[Run]]) -> str:
    """What these τ are good for."""
    runs = [run for of_group in groups.values() for run in of_group]
    prompts = sorted({int(run.settings()["num_held_out"]) for run in runs})
    text = (
        "τ and α are those by which each run chose its best checkpoint, on "
        f"{' or '.join(map(str, prompts))} held-out prompts: without intervals, and a little too "
        "good for having been chosen by. draftsmith evaluate compares drafters."
    )
    if unlike := measured_unlike(runs):
        text += f" These runs measured τ differently ({', '.join(unlike)}): it does not rank them."
    return text


def _line(axes: Axes, run: Run, name: str, **look: str) -> None:
    points = [(line["step"], line[name]) for line in run.metrics() if name in line]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, linewidth=1.4, markersize=4, **look)  # type: ignore[arg-type]


def _objective(run: Run) -> str:
    return str(run.settings()["objective.type"])


def _mean_of(runs: Sequence[Run], name: str) -> float | None:
    found = [line[name] for run in runs if (line := best(run)) and name in line]
    return statistics.mean(found) if found else None


def _shown(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)
