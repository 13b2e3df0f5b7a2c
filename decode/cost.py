"""What a draft length is worth: measured step times and acceptance make expected tokens a second.

Leviathan et al. 2023, section 3, with two of its assumptions dropped: verification need not cost
the same for every number of tokens, and acceptance need not be the same at every position.

Shape legend: γ tokens drafted, c drafter step / target step, v(k) target step on k + 1 tokens / on
one.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from decode.cached_model import CachedModel

REPEATS = 7


@dataclass(frozen=True)
class StepCosts:
    """Seconds that the parts of a step take.

    Attributes:
        draft: of one drafter forward on one token.
        verify: of a target forward; verify[k] is on k drafted tokens and the root.
        other: between the forwards: once per step.
        read: of each token more in a drafter forward.
    """

    draft: float
    verify: tuple[float, ...]
    other: float = 0.0
    read: float = 0.0

    @property
    def longest(self) -> int:
        """The longest draft whose verification was measured."""
        return len(self.verify) - 1

    @property
    def c(self) -> float:
        """Drafter step over target step."""
        return self.draft / self.verify[0]

    def v(self, k: int) -> float:
        """Target step on k + 1 tokens over target step on one."""
        return self.verify[k] / self.verify[0]

    def seconds(self, draft_length: int) -> float:
        """Of a step with a draft of this length."""
        return draft_length * self.draft + self.verify[draft_length] + self.other


def expected_tokens(acceptance: Sequence[float], draft_length: int) -> float:
    """Tokens that a step gives, the target's own included.

    Args:
        acceptance: the chance at each position, given that those before it were accepted; the last
            stands for all behind it.
        draft_length: γ.
    """
    total, reached = 1.0, 1.0
    for position in range(draft_length):
        reached *= acceptance[min(position, len(acceptance) - 1)]
        total += reached
    return total


def best_length(costs: StepCosts, *acceptances: Sequence[float]) -> int:
    """The draft length that gives most tokens a second; 0 where drafting cannot pay.

    Args:
        costs: of the step.
        acceptances: of each sequence that shares it: all wait for the longest draft, so that one
            length for all wastes nothing.
    """
    chosen, best = 0, len(acceptances) / costs.seconds(0)
    tokens, reached = float(len(acceptances)), [1.0] * len(acceptances)
    for position in range(costs.longest):
        for row, acceptance in enumerate(acceptances):
            reached[row] *= acceptance[min(position, len(acceptance) - 1)]
        tokens += sum(reached)
        rate = tokens / costs.seconds(position + 1)
        if rate > best:
            chosen, best = position + 1, rate
    return chosen


def break_even(costs: StepCosts, draft_length: int) -> float:
    """The acceptance rate, the same at every position, from which such drafts pay; inf if never."""
    needed = costs.seconds(draft_length) / costs.seconds(0)
    if expected_tokens([1.0], draft_length) < needed:
        return math.inf
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if expected_tokens([middle], draft_length) < needed:
            low = middle
        else:
            high = middle
    return high


def explain(costs: StepCosts, acceptance: Sequence[float]) -> str:
    """A table of what every draft length costs and brings, and which is chosen."""
    chosen = best_length(costs, acceptance)
    plain = 1 / costs.seconds(0)
    lines = [
        f"c = {costs.c:.3f}; acceptance by position: {', '.join(f'{a:.2f}' for a in acceptance)}",
        "draft length | v(k) | ms a step | tokens a step | tokens/s | speedup | pays from α =",
    ]
    for length in range(costs.longest + 1):
        tokens = expected_tokens(acceptance, length)
        rate = tokens / costs.seconds(length)
        lines.append(
            f"{length:12} | {costs.v(length):4.2f} | {1e3 * costs.seconds(length):9.2f} | "
            f"{tokens:13.2f} | {rate:8.1f} | {rate / plain:7.2f} | "
            + (f"{break_even(costs, length):.2f}" if length else "-")
            + (" <- chosen" if length == chosen else "")
        )
    return "\n".join(lines)


@torch.inference_mode()
def measure_costs(
    target: CachedModel, drafter: CachedModel, longest: int, *, batch_size: int = 1
) -> StepCosts:
    """Time the forwards of both models, so many sequences in an otherwise empty cache.

    Medians of a few repeats, target and drafter interleaved; it takes some tenths of a second on
    models that run in milliseconds. To be called while no sequence is decoded.

    Args:
        target: its forwards on 1 to `longest` + 1 tokens.
        drafter: its forward on one token, and on `longest` + 1.
        longest: γ, at most.
        batch_size: how many sequences share the forwards.
    """
    slots = list(range(batch_size))
    length = min(target.max_length, drafter.max_length) - longest - 1
    start = max(1, min(128, length))
    for model in (target, drafter):
        tokens = torch.zeros(batch_size, start, dtype=torch.long, device=model.device)
        model.forward(slots, tokens, keep=[], encoded=model.encode(list(tokens)))
        for slot in slots:
            model.cache.truncate(slot, 0)
        model.cache.commit(slots, [start] * batch_size)
    try:
        timed: list[list[float]] = [[] for _ in range(longest + 3)]
        for _ in range(REPEATS):
            timed[-1].append(_seconds(drafter, slots, longest + 1))
            timed[-2].append(_seconds(drafter, slots, 1))
            for k in range(longest + 1):
                timed[k].append(_seconds(target, slots, k + 1))
    finally:
        for model in (target, drafter):
            for slot in slots:
                model.release(slot)
    medians = [statistics.median(seconds) for seconds in timed]
    draft, wide = medians[-2:]
    read = max(0.0, wide - draft) / max(1, longest)
    return StepCosts(draft, tuple(medians[:-2]), read=read)


def measure_by_batch(
    target: CachedModel, drafter: CachedModel, longest: int
) -> dict[int, StepCosts]:
    """`measure_costs` of 1, 2, 4, ... sequences, up to all slots of the target's cache."""
    most = target.cache.num_slots
    sizes = sorted({min(2**power, most) for power in range(most.bit_length() + 1)})
    return {size: measure_costs(target, drafter, longest, batch_size=size) for size in sizes}


def _seconds(model: CachedModel, slots: list[int], width: int) -> float:
    tokens = torch.zeros(len(slots), width, dtype=torch.long, device=model.device)
    started = time.perf_counter()
    model.forward(slots, tokens)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started
