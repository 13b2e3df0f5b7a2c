"""What each family of drafters feeds the objective, and what the target says to it.

The loop knows these protocols only: which states predict which tokens is the family's business,
and whether the target's distribution comes from a live model or, stored, from disk is the
teacher's.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from distill.batches import Batch
from distill.chunked import States

__all__ = ["Aligned", "Alignment", "Teacher", "TeacherSignal"]


@dataclass(frozen=True, slots=True)
class Aligned:
    """The states of T places, and the token that each is to predict.

    Attributes:
        states: the drafter's.
        labels: [T].
    """

    states: States
    labels: Tensor


class Alignment(Protocol):
    """One per drafter family."""

    def align(self, drafter: nn.Module, batch: Batch) -> Aligned:
        """Run the drafter on the batch; T is the number of places that `batch.loss_mask` names."""
        ...


class TeacherSignal(Protocol):
    """What the target says about the T tokens of a batch, in the order of `Alignment.align`."""

    def logits(self, begin: int, end: int) -> Tensor:
        """[end - begin, V] of tokens begin to end, without gradient."""
        ...


class Teacher(Protocol):
    """Where the target's distribution comes from."""

    def signal(self, batch: Batch) -> TeacherSignal:
        """The signal for a batch."""
        ...
