"""Planned trees of heads beside dense ones of as many nodes.

    python scripts/bench_trees.py runs/grid/medusa-* runs/grid/hydra-* --out runs/trees

A dense tree gives all nodes of a level the same number of children (the Cartesian product of the
heads' likeliest tokens, Cai et al. 2024); of those with at most as many nodes as the budget the
best is taken. The planned one has as many nodes as that, wherever they promise most. Both are
chosen by what the heads get right on prompts of the distillation split, and measured on others.
Runs that differ in nothing but the seed share a row; each has trees of its own.

τ carries 95 % intervals of a bootstrap over prompts and seeds at once, changes are paired.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import transformers
from plan_tree import calibration_texts
from tau import BATCH, Array, Samples, cell, count, keep, percent, table

from decode import SamplingParams, Target, TreePlan, expected_accepted, plan_best_first
from decode.calibration import acceptance_by_depth
from decode.drafters import PlannedTrees
from decode.models import Heads, load_heads
from distill.drafter_folder import check_target, read_description
from distill.errors import UserError
from distill.prompts import Prompt, StandardLibraryPrompts
from distill.runs import Run, rows_of
from distill.target import TargetSettings

HEAD = ("", "nodes", "children per level", "τ, dense", "τ, planned", "change", "τ, chain")


def dense_plans(budget: int, depth: int) -> Iterator[list[int]]:
    """Children per level of every dense tree of at most `budget` nodes and `depth` levels."""

    def below(width: int, left: int, levels: int) -> Iterator[list[int]]:
        yield []
        if levels:
            for children in range(1, left // width + 1):
                nodes = width * children
                for rest in below(nodes, left - nodes, levels - 1):
                    yield [children, *rest]

    return (counts for counts in below(1, budget, depth) if counts)


def best_dense(profile: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Children per level of the dense tree with the most expected tokens."""
    return max(
        dense_plans(budget, len(profile)),
        key=lambda counts: expected_accepted(TreePlan.expansion(counts), profile),
    )


def shapes(
    profile: Sequence[Sequence[float]], budgets: Sequence[int]
) -> dict[tuple[str, int], TreePlan]:
    """(kind, budget) -> plan; the chain is as long as there are heads, its budget 0."""
    plans = {("chain", 0): TreePlan.expansion([1] * len(profile))}
    for budget in budgets:
        dense = TreePlan.expansion(best_dense(profile, budget))
        planned = plan_best_first(profile, budget=dense.num_drafted, depth=len(profile))
        plans |= {("dense", budget): dense, ("planned", budget): planned}
    return plans


def widths(plan: TreePlan) -> str:
    """Children per level of a dense plan."""
    levels = [1, *(plan.depths.count(depth) for depth in range(1, plan.depth + 1))]
    return " x ".join(str(b // a) for a, b in itertools.pairwise(levels))


def main() -> None:
    """Plan, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of draftsmith train with heads")
    parser.add_argument("--target", default="embedded", help="folder, hub id or embedded")
    parser.add_argument("--budgets", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", type=int, default=24, help="for planning, and for measuring")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--ranks", type=int, default=16, help="children of a node looked at")
    parser.add_argument("--out", type=Path, required=True, help="folder of table and figures")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    runs = [run for run in map(Run, args.runs) if run.is_finished()]
    if not runs:
        raise SystemExit("none of the folders holds a finished run of draftsmith train")
    try:
        compare(runs, args)
    except UserError as error:
        raise SystemExit(str(error)) from error


def compare(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Write the table.

    Raises:
        UserError: seeds are missing, or a drafter was made for another target.
    """
    rows = rows_of(runs)
    target = TargetSettings(path=args.target, device="cpu").load()
    sampling = SamplingParams(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    prompts, texts = (
        StandardLibraryPrompts(
            split=split, limit=args.prompts, prompt_tokens=args.prompt_tokens
        ).load(target.tokenizer)
        for split in ("evaluate", "distill")
    )
    written = calibration_texts(target.model, [prompt.ids for prompt in texts], sampling)
    runtime = Target(target.model, max_batch_size=BATCH)
    lines, figures = [list(HEAD)], []
    for name, of_row in rows.items():
        plans, counts = [], []
        for run in of_row:
            check_target(read_description(run.drafter), run.drafter, target)
            heads = load_heads(str(run.drafter), target.model)
            profile = acceptance_by_depth(
                target.model, heads, written, num_ranks=args.ranks, sampling=sampling
            )
            plans.append(shapes(profile, args.budgets))
            counts.append(
                {key: of_tree(runtime, heads, p, prompts, sampling) for key, p in plans[-1].items()}
            )
            print(run.folder, flush=True)
        samples = Samples(len(of_row), len(prompts))

        def tau(kind: str, budget: int) -> Array:
            return samples.tau(np.stack([one[kind, budget] for one in counts]))  # noqa: B023

        for budget in args.budgets:
            dense, planned, chain = tau("dense", budget), tau("planned", budget), tau("chain", 0)
            found = {
                "dense": samples.interval(dense),
                "planned": samples.interval(planned),
                "change": samples.interval(planned / dense),
                "chain": samples.interval(chain),
            }
            of_seeds = dict.fromkeys(widths(one["dense", budget]) for one in plans)
            nodes = dict.fromkeys(str(one["dense", budget].num_drafted) for one in plans)
            lines.append(
                [
                    name,
                    ", ".join(nodes),
                    ", ".join(of_seeds),
                    cell(found["dense"]),
                    cell(found["planned"]),
                    percent(found["change"]),
                    cell(found["chain"]),
                ]
            )
            figures.append(
                {"drafter": name, "budget": budget, "dense_shapes": list(of_seeds)}
                | {key: asdict(one) for key, one in found.items()}
            )
    keep(args, table(lines), figures)


def of_tree(
    target: Target,
    heads: Heads,
    plan: TreePlan,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
) -> Array:
    """[2, P] counts of drafting trees of this plan."""
    drafting = PlannedTrees(parents=plan.parents, ranks=plan.ranks)
    return count(target, drafting.build(heads, target), prompts, sampling)


if __name__ == "__main__":
    main()
