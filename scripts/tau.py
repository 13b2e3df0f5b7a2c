"""τ of drafters over prompts and seeds, by counting: no time is taken, so prompts share batches."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from decode import Drafter, Request, SamplingParams, SpeculativeDecoder, Target
from distill.prompts import Prompt
from distill.report.bootstrap import Interval, divide, interval, resamples

RESAMPLES = 2000
BATCH = 8
Array = npt.NDArray[np.float64]


def count(
    target: Target, drafter: Drafter, prompts: Sequence[Prompt], sampling: SamplingParams
) -> Array:
    """[2, P] tokens emitted and forwards of the target, of the output of each prompt."""
    requests = [Request(id=prompt.id, prompt=prompt.ids, sampling=sampling) for prompt in prompts]
    all_stats = [one.stats for one in SpeculativeDecoder(target, drafter).generate(requests)]
    found = [(stats.num_emitted_tokens, stats.num_steps) for stats in all_stats]
    return np.array(found, dtype=float).T


class Samples:
    """Draws of prompts and of seeds at once, the same for whatever is compared."""

    def __init__(self, num_seeds: int, num_prompts: int):
        """Draw them."""
        self.num_prompts = num_prompts
        self._prompts = resamples(num_prompts, RESAMPLES, 0)
        self._seeds = resamples(num_seeds, RESAMPLES, 1)

    def tau(self, counts: Array) -> Array:
        """[1 + R] of `counts` [S, 2, P]: the figure, then that of each draw."""
        by_prompt = counts[self._seeds].sum(1)  # [R, 2, P]
        drawn = np.take_along_axis(by_prompt, self._prompts[:, None], axis=2).sum(2)
        sums = np.concatenate([counts.sum((0, 2))[None], drawn])
        return divide(sums[:, 0], sums[:, 1])

    def interval(self, samples: Array) -> Interval:
        """Of [1 + R] figures."""
        return interval(samples[0], samples[1:], self.num_prompts)


def cell(found: Interval) -> str:
    """The value and its interval."""
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def percent(found: Interval) -> str:
    """A ratio as a change."""
    value, low, high = (100 * (x - 1) for x in (found.value, found.low, found.high))
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown; the first line is the head."""
    head, *rest = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *rest])


def keep(args: argparse.Namespace, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table, and write it and its figures into the folder `args.out`."""
    record = {
        "settings": {key: str(value) for key, value in vars(args).items() if key != "runs"},
        "torch": torch.__version__,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(table)
    (args.out / "figures.json").write_text(json.dumps(record, indent=2) + "\n")
    print(table)
