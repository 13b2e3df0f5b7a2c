"""Where the target's distribution comes from: the target beside the drafter, or the rows.

`draftsmith generate sampling.top_logprobs=K` stores the K likeliest tokens at each output place
with the mass of all others, at the temperature of sampling. From these every objective trains a
language model without running the target again; heads still read the target's states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.alignment import Teacher, TeacherSignal
from distill.alignment.lm import LiveTarget
from distill.batches import Batch, Example
from distill.errors import UserError
from distill.laws import TopLaw
from distill.objectives import Objective


@dataclass(frozen=True, kw_only=True)
class LiveTeacher:
    """The target itself, run on every batch: exact, at any temperature."""

    def build(
        self, live: LiveTarget, examples: Sequence[Example], objective: Objective, vocab_size: int
    ) -> Teacher:
        """The running target."""
        return live


@dataclass(frozen=True, kw_only=True)
class StoredTeacher:
    """The rows' top-k log-probabilities: what is not among the k is one outcome.

    No target runs, but for heads, which read its states.
    """

    def build(
        self, live: LiveTarget, examples: Sequence[Example], objective: Objective, vocab_size: int
    ) -> Teacher:
        """A reader of what the batches carry.

        Raises:
            UserError: some learnt tokens have nothing stored, or at another temperature than
                wanted, or with ids that the drafter does not have.
        """
        if any(example.learn_prompt for example in examples):
            raise UserError(
                "rows store what the target says about outputs, not about prompts",
                hint="data.learn_prompt=false, or teacher=live",
            )
        if any(example.top is None for example in examples):
            raise UserError(
                "some rows hold no top-k log-probabilities of the target",
                hint="generate them with sampling.top_logprobs=16, or train with teacher=live",
            )
        for stored in sorted({example.top.temperature for example in examples if example.top}):
            if stored != objective.temperature:
                raise UserError(
                    f"stored log-probabilities are the target's at temperature {stored:g}, not "
                    f"{objective.temperature:g}",
                    hint=f"objective.temperature={stored:g}, or teacher=live",
                )
        largest = max(
            (int(e.top.ids.max()) for e in examples if e.top and e.top.ids.numel()), default=0
        )
        if largest >= vocab_size:
            raise UserError(
                f"the rows store token {largest:,}, the drafter has {vocab_size:,} ids",
                hint="train with teacher=live, or another drafter",
            )
        return StoredTop(objective.temperature)


@dataclass(frozen=True, slots=True)
class StoredTop:
    """Hands on what a batch carries, at one temperature."""

    temperature: float = 1.0

    def signal(self, batch: Batch) -> TeacherSignal:
        """The stored laws of the batch's tokens."""
        if batch.top is None:
            if batch.loss_mask.any():
                raise ValueError("some of the batch's learnt tokens have nothing stored")
            nothing = torch.zeros(0, 1, device=batch.input_ids.device)
            return _Rows(TopLaw(nothing.long(), nothing, nothing[:, 0], self.temperature))
        return _Rows(batch.top)


@dataclass(frozen=True, slots=True)
class _Rows:
    top: TopLaw

    def law(self, rows: slice | Tensor) -> TopLaw:
        """What is stored about these tokens."""
        return self.top[rows]
