"""The files of an evaluation's report: page, tables, plots and results.json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.prompts import Prompt
from distill.report.by_kind import Table, by_category, by_length
from distill.report.figures import AUTOREGRESSIVE, DrafterFigures, Measurement
from distill.report.html import Passage, page
from distill.report.plots import all_plots, save
from distill.report.prediction import predict
from distill.report.tables import as_csv, as_json, markdown, step_times, without_nan
from distill.run_folder import write_json, write_text


def write_report(
    folder: Path,
    *,
    title: str,
    lead: str,
    facts: Mapping[str, Any],
    exactness: str,
    drafters: Sequence[DrafterFigures],
    measurements: Sequence[Measurement],
    prompts: Sequence[Prompt],
    passages: Mapping[str, Sequence[Passage]],
    num_resamples: int,
    seed: int,
    record: Mapping[str, Any],
) -> None:
    """Write them.

    Args:
        folder: gets report.html, results.json, results.csv, results.md and plots/.
        title: of the page.
        lead: what was compared, in a line.
        facts: how it was measured.
        exactness: of the acceptance rule, in words.
        drafters: their figures.
        measurements: that these come from.
        prompts: that were continued.
        passages: of each drafter what the page shows.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
        record: what else results.json keeps.
    """
    names = [drafter.name for drafter in drafters]
    bootstrap = {"num_resamples": num_resamples, "seed": seed}
    times = step_times(measurements, [AUTOREGRESSIVE, *names], **bootstrap)
    prompt_lengths = {prompt.id: len(prompt.ids) for prompt in prompts}
    lengths = by_length(measurements, names, prompt_lengths, **bootstrap)
    kinds = {prompt.id: prompt.category for prompt in prompts}
    categories = by_category(measurements, names, kinds, **bootstrap)
    predictions = predict(drafters, times)
    plots = all_plots(drafters, times)
    save(plots, folder / "plots")
    write_text(folder / "results.csv", as_csv(drafters, times))
    write_text(folder / "results.md", markdown(drafters, exactness))
    write_text(
        folder / "report.html",
        page(
            title=title,
            lead=lead,
            drafters=drafters,
            exactness=exactness,
            plots=plots,
            passages=passages,
            facts=facts,
            times=times,
            lengths=lengths,
            categories=categories,
            predictions=predictions,
        ),
    )
    write_json(
        folder / "results.json",
        {
            "drafters": as_json(drafters, times),
            "block_efficiency_by_length": _as_json(lengths),
            "block_efficiency_by_category": _as_json(categories),
            "predicted_speed": {name: asdict(p) for name, p in predictions.items()},
            "exactness": exactness,
            "num_prompts": len(prompts),
            **record,
        },
    )


def _as_json(table: Table) -> dict[str, dict[str, Any]]:
    return {
        name: {kind: without_nan(asdict(found)) for kind, found in row.items()}
        for name, row in table.items()
    }
