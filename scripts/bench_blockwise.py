"""Blockwise heads as Stern et al. 2018 measured them: k, the backbone, and the data.

    for k in 2 4 6 8; do for data in text seq_kd; do
      train="draftsmith train drafter=blockwise drafter.num_heads=$((k - 1)) data=$data ..."
      $train output=runs/blockwise/$k-frozen-$data
      $train output=runs/blockwise/$k-tuned-$data lora=all_linear
    done; done
    python scripts/bench_blockwise.py runs/blockwise/* --out runs/blockwise/table

τ is the mean accepted block of greedy decoding, the target's own token included, on other prompts
and against the target that belongs to the heads: where that was fine-tuned, its own greedy output.
How far it has moved is told. A cell that was not trained stays empty.

Runs that differ in nothing but the seed share a cell. 95 % intervals of a bootstrap over prompts
and seeds at once, which few seeds make too narrow: their lowest and highest τ stand beside. Changes
are paired by prompt.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tau import BATCH, Array, Samples, cell, count, keep, percent, table

from decode import SamplingParams, Target
from decode.drafters import load_drafter
from distill.drafter_folder import check_target, read_description
from distill.errors import UserError
from distill.prompts import Prompt, StandardLibraryPrompts
from distill.report.bootstrap import divide
from distill.runs import Run, check_seeds
from distill.target import LoadedTarget, TargetSettings

BACKBONES = ("frozen", "fine-tuned")
DATA = {"Text": "text", "SeqKD": "Seq-KD"}
Cell = tuple[int, str, str]  # k, backbone, data


def cell_of(run: Run) -> Cell:
    """Where a run stands in the table.

    Raises:
        UserError: it is none of blockwise heads on text or Seq-KD rows.
    """
    settings = run.settings()
    if settings["drafter.type"] != "Blockwise" or settings["data.type"] not in DATA:
        raise UserError("no blockwise heads on text or Seq-KD rows", run.folder)
    backbone = BACKBONES[run.own_target is not None]
    return settings["drafter.num_heads"] + 1, backbone, DATA[settings["data.type"]]


def counts_of(run: Run, given: LoadedTarget, prompts: Sequence[Prompt], new_tokens: int) -> Array:
    """[2, P] of one run, on the target that was trained with it, or on the `given` one."""
    own = run.own_target
    loaded = given if own is None else TargetSettings(path=str(own), device="cpu").load()
    check_target(read_description(run.drafter), run.drafter, loaded)
    runtime = Target(loaded.model, max_batch_size=BATCH)
    drafter = load_drafter(
        run.drafter,
        target=runtime,
        draft=run.settings()["drafter.num_heads"],
        tokenizer=loaded.tokenizer,
    )
    found = count(runtime, drafter, prompts, SamplingParams(max_new_tokens=new_tokens))
    print(run.folder, flush=True)
    return found


def report(
    counts: Mapping[Cell, Array], moved: Mapping[Cell, tuple[float, float]]
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Lines of the table, and the figures behind them.

    Args:
        counts: of each cell [S, 2, P], with the same seeds and prompts.
        moved: of the fine-tuned cells KL and agreement with the target as it was.
    """
    first = next(iter(counts.values()))
    samples = Samples(len(first), first.shape[2])
    taus = {where: samples.tau(found) for where, found in counts.items()}
    blocks = sorted({k for k, _, _ in counts})
    lines = [["", *(f"k = {k}" for k in blocks)]]
    figures: list[dict[str, Any]] = []

    def line(name: str, found: Mapping[int, Array], *, is_change: bool = False) -> None:
        cells = {k: samples.interval(found[k]) for k in blocks if k in found}
        shown = {k: percent(one) if is_change else cell(one) for k, one in cells.items()}
        lines.append([name, *(shown.get(k, "–") for k in blocks)])
        figures.append({"row": name, **{f"k={k}": asdict(one) for k, one in cells.items()}})

    def line_of_seeds(name: str, backbone: str, data: str) -> None:
        found = {k: counts.get((k, backbone, data)) for k in blocks}
        each = {k: tau_of_seeds(one) for k, one in found.items() if one is not None}
        shown = {k: f"{min(taus):.2f}–{max(taus):.2f}" for k, taus in each.items()}
        lines.append([name, *(shown.get(k, "–") for k in blocks)])
        figures.append({"row": name, **{f"k={k}": taus for k, taus in each.items()}})

    def of(backbone: str, data: str) -> dict[int, Array]:
        return {k: taus[k, backbone, data] for k in blocks if (k, backbone, data) in taus}

    def ratio(above: Mapping[int, Array], below: Mapping[int, Array]) -> dict[int, Array]:
        return {k: above[k] / below[k] for k in above if k in below}

    for backbone in BACKBONES:
        text, rows = (of(backbone, data) for data in DATA.values())
        for data, found in zip(DATA.values(), (text, rows), strict=True):
            line(f"{backbone}, {data}", found)
            line_of_seeds(f"{backbone}, {data}: of the seeds", backbone, data)
        line(f"{backbone}: Seq-KD over text", ratio(rows, text), is_change=True)
    for data in DATA.values():
        frozen, tuned = (of(backbone, data) for backbone in BACKBONES)
        line(f"{data}: fine-tuned over frozen", ratio(tuned, frozen), is_change=True)
    for data in DATA.values():
        distances = [moved.get((k, BACKBONES[1], data)) for k in blocks]
        cells = [
            "–" if one is None else f"KL {one[0]:.2f}, {one[1]:.0%} alike" for one in distances
        ]
        lines.append([f"{data}: how far the target moved", *cells])
    return lines, figures


def tau_of_seeds(counts: Array) -> list[float]:
    """Of every seed by itself, from [S, 2, P]."""
    emitted, steps = counts.sum(2).T
    return [float(tau) for tau in divide(emitted, steps)]


def how_far(runs: Sequence[Run]) -> tuple[float, float]:
    """Mean KL and agreement, as training measured them on its held-out prompts."""
    measured = [read_description(run.drafter)["measured"] for run in runs]
    kl, agreement = (
        statistics.mean(one[name] for one in measured) for name in ("target_kl", "target_agreement")
    )
    return kl, agreement


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of draftsmith train")
    parser.add_argument("--target", default="embedded", help="folder, hub id or embedded")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, required=True, help="folder of table and figures")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    runs = [run for run in map(Run, args.runs) if run.is_finished()]
    if not runs:
        raise SystemExit("none of the folders holds a finished run of draftsmith train")
    try:
        groups: dict[Cell, list[Run]] = defaultdict(list)
        for run in sorted(runs, key=Run.seed):
            groups[cell_of(run)].append(run)
        check_seeds({str(where): [run.seed() for run in cell] for where, cell in groups.items()})
        given = TargetSettings(path=args.target, device="cpu").load()
        source = StandardLibraryPrompts(
            split="evaluate", limit=args.prompts, prompt_tokens=args.prompt_tokens
        )
        prompts = source.load(given.tokenizer)
        counts = {
            where: np.stack([counts_of(r, given, prompts, args.max_new_tokens) for r in of_cell])
            for where, of_cell in groups.items()
        }
    except UserError as error:
        raise SystemExit(str(error)) from error
    moved = {where: how_far(of_cell) for where, of_cell in groups.items() if where[1] != "frozen"}
    lines, figures = report(counts, moved)
    keep(args, table(lines), figures)


if __name__ == "__main__":
    main()
