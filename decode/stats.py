"""What a generation did: sums and counts only, so that figures add over sequences and runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class StepTrace(NamedTuple):
    """One step of one sequence; the first is the prompt's own forward, without a draft.

    The emitted tokens are the accepted ones and then the target's own token: a bonus where the
    whole draft was accepted, recovered otherwise. An EOS inside the accepted path, or the length
    limit, cuts them: then `num_emitted` is `num_accepted`.

    Attributes:
        num_drafted: tokens in the draft.
        reached_leaf: nothing was drafted behind the accepted path, so that the target's own token
            is a bonus and no recovery.
        num_tried: draft tokens that were tried; those behind a rejection were not.
        num_accepted: draft tokens that were accepted.
        num_emitted: tokens added to the output.
    """

    num_drafted: int
    reached_leaf: bool
    num_tried: int
    num_accepted: int
    num_emitted: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one sequence in full, for who looks into single steps.

    Attributes:
        request_id: of the sequence.
        step: target forward, counted from 1; the prompt's own is the first and leaves no record.
        length: tokens of prompt and output before the step.
        tokens: of the draft's nodes, the root first.
        parents: of the draft's nodes, -1 for the root.
        path: accepted nodes, the root left out.
        emitted: tokens added to the output.
        seconds: "draft", "verify" and "other" of the step, whoever shared it.
    """

    request_id: str
    step: int
    length: int
    tokens: list[int]
    parents: list[int]
    path: list[int]
    emitted: list[int]
    seconds: dict[str, float]


@dataclass(slots=True)
class GenerationStats:
    """Counts of a generation, by vLLM's names; every rate is a property.

    Position i counts from 0, the first drafted token; in trees it is the depth below the root.

    Attributes:
        num_steps: target forwards behind the prompt's own, counted per sequence.
        num_prefill_tokens: tokens that the prompts' own forwards gave: one per sequence.
        num_drafts: steps in which anything was drafted.
        num_draft_tokens: drafted tokens.
        num_tried_tokens: drafted tokens that were tried; those behind a rejection were not.
        num_accepted_tokens: accepted draft tokens.
        num_emitted_tokens: output tokens that the steps gave.
        num_tried_per_pos: drafts whose position i was tried.
        num_accepted_tokens_per_pos: drafts whose position i was accepted.
        expected_accepted: Σ min(target, draft) summed over tried tokens (sampling only).
        seconds: "prefill", "draft", "verify", "other"; a step's time is shared evenly by the
            sequences in it.
    """

    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_tried_tokens: int = 0
    num_accepted_tokens: int = 0
    num_emitted_tokens: int = 0
    num_tried_per_pos: list[int] = field(default_factory=list)
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    expected_accepted: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def block_efficiency(self) -> float:
        """τ: tokens emitted per target forward, the target's own included; 1 is autoregressive.

        The prompt's forward and the token it gives are left out.
        """
        return self.num_emitted_tokens / self.num_steps if self.num_steps else float("nan")

    @property
    def alpha(self) -> float:
        """α: the share of tried draft tokens that was accepted."""
        return (
            self.num_accepted_tokens / self.num_tried_tokens
            if self.num_tried_tokens
            else float("nan")
        )

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted over drafted (vLLM's figure): it depends on the draft's size."""
        return (
            self.num_accepted_tokens / self.num_draft_tokens
            if self.num_draft_tokens
            else float("nan")
        )

    @property
    def total_seconds(self) -> float:
        """Everything, the prompt's forward included."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """All output tokens over all seconds."""
        num_tokens = self.num_prefill_tokens + self.num_emitted_tokens
        return num_tokens / self.total_seconds if self.seconds else float("nan")

    @classmethod
    def of(cls, steps: Sequence[StepTrace]) -> "GenerationStats":
        """The counts of one sequence's steps, the prompt's own forward first."""
        stats = cls(
            num_steps=max(len(steps) - 1, 0),
            num_prefill_tokens=sum(s.num_emitted for s in steps[:1]),
        )
        for step in steps[1:]:
            stats.num_emitted_tokens += step.num_emitted
            stats.num_drafts += step.num_drafted > 0
            stats.num_draft_tokens += step.num_drafted
            stats.num_tried_tokens += step.num_tried
            stats.num_accepted_tokens += step.num_accepted
            is_cut = step.num_emitted <= step.num_accepted
            levels = step.num_accepted + (not is_cut and not step.reached_leaf)  # one was refused
            _count_up_to(stats.num_tried_per_pos, levels)
            _count_up_to(stats.num_accepted_tokens_per_pos, step.num_accepted)
        return stats

    def __add__(self, other: "GenerationStats") -> "GenerationStats":
        """Both together."""
        return GenerationStats(
            num_steps=self.num_steps + other.num_steps,
            num_prefill_tokens=self.num_prefill_tokens + other.num_prefill_tokens,
            num_drafts=self.num_drafts + other.num_drafts,
            num_draft_tokens=self.num_draft_tokens + other.num_draft_tokens,
            num_tried_tokens=self.num_tried_tokens + other.num_tried_tokens,
            num_accepted_tokens=self.num_accepted_tokens + other.num_accepted_tokens,
            num_emitted_tokens=self.num_emitted_tokens + other.num_emitted_tokens,
            num_tried_per_pos=_added(self.num_tried_per_pos, other.num_tried_per_pos),
            num_accepted_tokens_per_pos=_added(
                self.num_accepted_tokens_per_pos, other.num_accepted_tokens_per_pos
            ),
            expected_accepted=self.expected_accepted + other.expected_accepted,
            seconds={
                name: self.seconds.get(name, 0.0) + other.seconds.get(name, 0.0)
                for name in self.seconds | other.seconds
            },
        )


def _count_up_to(counts: list[int], length: int) -> None:
    counts.extend([0] * (length - len(counts)))
    for position in range(length):
        counts[position] += 1


def _added(a: list[int], b: list[int]) -> list[int]:
    width = max(len(a), len(b))
    return [(a[i] if i < len(a) else 0) + (b[i] if i < len(b) else 0) for i in range(width)]
