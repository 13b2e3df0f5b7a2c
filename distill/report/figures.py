"""The figures of an evaluation: what was measured per prompt becomes rates with intervals."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import UserError
from distill.report.bootstrap import Array, Interval, ratio, ratio_of_ratios, resamples

AUTOREGRESSIVE = "autoregressive"
TRANSFORMERS = "transformers"


@dataclass(frozen=True, slots=True)
class Output:
    """What one mode wrote for one prompt.

    Attributes:
        prompt_id: of the prompt.
        tokens: output ids.
        steps: (drafted, accepted, emitted, whether the accepted path ended at a leaf) per target
            forward; empty for transformers' generate.
    """

    prompt_id: str
    tokens: list[int]
    steps: list[list[int]]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed run of one mode over one unit: a prompt, or as many as share a batch.

    Attributes:
        unit: index of the unit.
        mode: "autoregressive", "transformers", or a drafter's name.
        repeat: which of the repeated timings.
        seconds: wall clock.
        split: seconds by phase, of our own decoder.
        counts: sums of `GenerationStats`, per position too.
        outputs: one for each prompt of the unit.
    """

    unit: int
    mode: str
    repeat: int
    seconds: float
    split: dict[str, float]
    counts: dict[str, Any]
    outputs: list[Output]

    @property
    def num_tokens(self) -> int:
        """Output tokens of the unit."""
        return sum(len(output.tokens) for output in self.outputs)


@dataclass(frozen=True, slots=True)
class DrafterFigures:
    """All figures of one drafter.

    Attributes:
        name: of the drafter.
        alpha: accepted / tried.
        expected_alpha: Σ min(target, draft) over tried tokens; None at temperature 0.
        draft_acceptance_rate: accepted / drafted.
        block_efficiency: τ, tokens per target forward.
        tokens_per_second: prompts' forwards included.
        speedup_over_autoregressive: over our own loop.
        speedup_over_transformers: over `generate`; None where that was not timed.
        accepted_at: share of all drafts in which position i was accepted, as vLLM reports it.
        accepted_at_conditional: share of tries of position i that were accepted.
        milliseconds: per step, by phase.
        relative_alpha: α over the first drafter's, paired; None for the first.
        relative_block_efficiency: τ likewise.
        relative_speed: tokens/s likewise.
        mismatches: prompts whose greedy output differs from the autoregressive one; None when
            sampling.
        near_ties: how many of these are near ties of the target's two best tokens.
    """

    name: str
    alpha: Interval
    expected_alpha: Interval | None
    draft_acceptance_rate: Interval
    block_efficiency: Interval
    tokens_per_second: Interval
    speedup_over_autoregressive: Interval
    speedup_over_transformers: Interval | None
    accepted_at: list[Interval]
    accepted_at_conditional: list[Interval]
    milliseconds: dict[str, float]
    relative_alpha: Interval | None
    relative_block_efficiency: Interval | None
    relative_speed: Interval | None
    mismatches: int | None
    near_ties: int

    @property
    def speedup(self) -> Interval:
        """The smaller of the two speedups, which is the one to quote."""
        candidates = [self.speedup_over_autoregressive]
        if self.speedup_over_transformers is not None:
            candidates.append(self.speedup_over_transformers)
        return min(candidates, key=lambda interval: interval.value)

    @property
    def verdict(self) -> str:
        """τ against the first drafter's, in words."""
        relative = self.relative_block_efficiency
        if relative is None:
            return "the reference"
        if not relative.clear_of(1.0):
            return "not distinguishable"
        return "higher" if relative.value > 1 else "lower"


class Sums:
    """Per-unit sums of one mode, over repeats: arrays [P]."""

    def __init__(self, measurements: Sequence[Measurement], num_units: int):
        """Add up; every unit must have been measured."""
        self.by_unit: list[list[Measurement]] = [[] for _ in range(num_units)]
        for measurement in measurements:
            self.by_unit[measurement.unit].append(measurement)
        self.seconds = self._sum(lambda m: m.seconds)
        self.tokens = self._sum(lambda m: m.num_tokens)

    def count(self, name: str) -> Array:
        """One of `GenerationStats`' counts."""
        return self._sum(lambda m: m.counts.get(name, 0))

    def at(self, name: str, position: int) -> Array:
        """One of the counts per position."""
        return self._sum(
            lambda m: m.counts[name][position] if position < len(m.counts[name]) else 0
        )

    def depth(self) -> int:
        """How many positions were ever tried."""
        return max(
            (len(m.counts["num_tried_per_pos"]) for unit in self.by_unit for m in unit), default=0
        )

    def phase(self, name: str) -> float:
        """Seconds of a phase, all together."""
        return float(self._sum(lambda m: m.split.get(name, 0.0)).sum())

    def _sum(self, value: Any) -> Array:
        return np.array([sum(map(value, unit)) for unit in self.by_unit], dtype=np.float64)


def figures(
    measurements: Sequence[Measurement],
    drafters: Sequence[str],
    *,
    is_greedy: bool,
    ties: dict[str, tuple[int, int]],
    num_resamples: int,
    seed: int,
) -> list[DrafterFigures]:
    """Every drafter's figures, paired against the first.

    Args:
        measurements: all of them, of every mode.
        drafters: names, in order.
        is_greedy: temperature 0.
        ties: name -> (mismatches, near ties among them); greedy only.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    num_units = 1 + max(measurement.unit for measurement in measurements)
    draws = resamples(num_units, num_resamples, seed)

    def sums(mode: str) -> Sums:
        return Sums([m for m in measurements if m.mode == mode], num_units)

    plain = sums(AUTOREGRESSIVE)
    has_transformers = any(m.mode == TRANSFORMERS for m in measurements)
    theirs = sums(TRANSFORMERS) if has_transformers else None
    first = sums(drafters[0])
    result = []
    for name in drafters:
        ours = sums(name)
        accepted, tried = ours.count("num_accepted_tokens"), ours.count("num_tried_tokens")
        emitted, steps = ours.count("num_emitted_tokens"), ours.count("num_steps")

        def relative(numerator: str, denominator: str, ours: Sums = ours) -> Interval | None:
            if ours.by_unit == first.by_unit:
                return None
            return ratio_of_ratios(
                ours.count(numerator),
                ours.count(denominator),
                first.count(numerator),
                first.count(denominator),
                draws,
            )

        positions = range(ours.depth())
        num_steps = max(steps.sum(), 1.0)
        result.append(
            DrafterFigures(
                name=name,
                alpha=ratio(accepted, tried, draws),
                expected_alpha=None
                if is_greedy
                else ratio(ours.count("expected_accepted"), tried, draws),
                draft_acceptance_rate=ratio(accepted, ours.count("num_draft_tokens"), draws),
                block_efficiency=ratio(emitted, steps, draws),
                tokens_per_second=ratio(ours.tokens, ours.seconds, draws),
                speedup_over_autoregressive=_speed(ours, plain, draws),
                speedup_over_transformers=None if theirs is None else _speed(ours, theirs, draws),
                accepted_at=[
                    ratio(
                        ours.at("num_accepted_tokens_per_pos", i),
                        ours.count("num_drafts"),
                        draws,
                    )
                    for i in positions
                ],
                accepted_at_conditional=[
                    ratio(
                        ours.at("num_accepted_tokens_per_pos", i),
                        ours.at("num_tried_per_pos", i),
                        draws,
                    )
                    for i in positions
                ],
                milliseconds={
                    phase: ours.phase(phase) / num_steps * 1e3
                    for phase in ("draft", "verify", "other")
                },
                relative_alpha=relative("num_accepted_tokens", "num_tried_tokens"),
                relative_block_efficiency=relative("num_emitted_tokens", "num_steps"),
                relative_speed=None if name == drafters[0] else _speed(ours, first, draws),
                mismatches=ties[name][0] if is_greedy else None,
                near_ties=ties[name][1] if is_greedy else 0,
            )
        )
    return result


def _speed(ours: Sums, other: Sums, draws: Any) -> Interval:
    return ratio_of_ratios(ours.tokens, ours.seconds, other.tokens, other.seconds, draws)


def load_results(folder: Path) -> dict[str, Any]:
    """`results.json` of a finished evaluation.

    Raises:
        UserError: there is none.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise UserError("there is no finished evaluation", folder, "run `draftsmith evaluate`")
    results: dict[str, Any] = json.loads(path.read_text())
    return results
