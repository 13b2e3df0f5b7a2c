"""What is minimised: a divergence per token, summed; and what is told about it meanwhile.

An objective is called on chunks of the places where a token is to be predicted. It returns sums
and counts; the loop divides once, by the number of tokens of the whole batch over all processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from distill.divergences import forward_kl


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Sums over tokens.

    Attributes:
        loss: scalar, summed over the tokens.
        num_tokens: how many tokens that were, scalar.
        metrics: name -> (sum, count), scalars without gradient.
    """

    loss: Tensor
    num_tokens: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]]


class Objective(Protocol):
    """What training minimises.

    Attributes:
        needs_target: the target's own logits are read, so it must run beside the drafter.
    """

    needs_target: ClassVar[bool]

    def __call__(
        self, draft_logits: Tensor, labels: Tensor, target_logits: Tensor | None
    ) -> LossTerms:
        """Judge the drafter's predictions.

        Args:
            draft_logits: [T, V] float32.
            labels: [T] the tokens that follow in the data.
            target_logits: [T, V], or None where the objective needs none.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Hard cross-entropy on the text, as Kim & Rush 2016 (Seq-KD) train on the teacher's own.

    On greedy target text `accuracy`, the share of tokens that the drafter would have drafted
    greedily, is the acceptance rate to be expected at temperature 0.
    """

    needs_target: ClassVar[bool] = False

    def __call__(
        self, draft_logits: Tensor, labels: Tensor, target_logits: Tensor | None
    ) -> LossTerms:
        """Sum of -log q(label)."""
        count = draft_logits.new_tensor(len(labels))
        hits = (draft_logits.detach().argmax(-1) == labels).sum()
        loss = functional.cross_entropy(draft_logits, labels, reduction="sum")
        return LossTerms(loss, count, {"accuracy": (hits, count)})


@dataclass(frozen=True, kw_only=True)
class ForwardKL:
    """KL from the target's distribution to the drafter's.

    `alpha` is the acceptance rate it implies at temperature 1, Σ min(p, q) (Leviathan et al. 2023,
    theorem 3.5); `top1_agreement` the one at temperature 0.

    Attributes:
        temperature: softens both distributions (Hinton et al. 2015).
    """

    temperature: float = 1.0

    needs_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse temperatures that soften nothing."""
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")

    def __call__(
        self, draft_logits: Tensor, labels: Tensor, target_logits: Tensor | None
    ) -> LossTerms:
        """Sum of KL(p || q)."""
        if target_logits is None:
            raise ValueError("ForwardKL needs the target's logits; give the loop a teacher")
        loss = forward_kl(target_logits, draft_logits, temperature=self.temperature).sum()
        count = draft_logits.new_tensor(len(labels))
        with torch.no_grad():
            agreed = (draft_logits.argmax(-1) == target_logits.argmax(-1)).sum()
            alpha = torch.minimum(target_logits.softmax(-1), draft_logits.softmax(-1)).sum()
        return LossTerms(loss, count, {"alpha": (alpha, count), "top1_agreement": (agreed, count)})
