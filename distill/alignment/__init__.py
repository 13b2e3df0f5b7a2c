"""What each family of drafters feeds the objective, and what the target says to it.

The loop knows these protocols only: which states predict which tokens is the family's business,
and whether the target's distribution comes from a live model or, stored, from disk is the
teacher's.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from distill.batches import Batch
from distill.laws import TargetLaw
from distill.states import States

__all__ = ["Aligned", "Alignment", "Depth", "Teacher", "TeacherSignal"]


@dataclass(frozen=True, slots=True)
class Depth:
    """What is predicted one depth of a draft ahead, at T places.

    Attributes:
        states: [T, D] and the head that projects them; heads may differ from depth to depth.
        labels: [T] the token that each place is to predict.
        rows: [T] which of the batch's learnt tokens (the True places of `batch.loss_mask` in
            row-major order) each label is, hence where the teacher's signal on it stands; None is
            all of them in order.
        valid: [T] whether a place has such a token; None is all. Labels and rows of places that
            have none are 0 and count for nothing.
        kept: [T] whether a place is learnt; None is all. Others count in the rates, not in the
            loss.
    """

    states: States
    labels: Tensor
    rows: Tensor | None = None
    valid: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Aligned:
    """The predictions of a batch.

    Attributes:
        depths: one for an independent model, K for K heads; depth d is the d-th drafted token. All
            have the same T places.
    """

    depths: tuple[Depth, ...]


class Alignment(Protocol):
    """One per drafter family."""

    def align(self, drafter: nn.Module, batch: Batch) -> Aligned:
        """Run the drafter on the batch."""
        ...


class TeacherSignal(Protocol):
    """What the target says about the learnt tokens of a batch, in row-major order."""

    def law(self, rows: slice | Tensor) -> TargetLaw:
        """What it says about these of them, without gradient."""
        ...


class Teacher(Protocol):
    """Where the target's distribution comes from."""

    def signal(self, batch: Batch) -> TeacherSignal:
        """The signal for a batch."""
        ...
