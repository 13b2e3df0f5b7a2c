"""What the text itself says: cross-entropy on its labels, by Liger's kernel where that runs.

Of Liger's losses this one computes what ours does. Its divergences give one sum for a batch, with
no token's own value to be weighted and no acceptance rate beside it; those stay ours
(`distill/divergences.py`).

Shape legend: T places, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from distill.laws import FLOOR, Kept, likeliest, log_sum

IGNORED = -100  # instead of a label that a trimmed head cannot say
FIRST_LIGER = (0, 8)  # the first that is known to tell hits beside losses


@dataclass(frozen=True, slots=True)
class Labelled:
    """A drafter's predictions at one depth of T places, judged by the text's own tokens.

    Attributes:
        losses: [T] -log q(label), at most -`FLOOR`.
        hits: [T] 1 where the likeliest token is the label, else 0.
        logit_gradient: weights [T] -> the weighted losses' gradient by the logits [T, V]. Asked for
            once: it takes the memory of what it is made of.
    """

    losses: Tensor
    hits: Tensor
    logit_gradient: Callable[[Tensor], Tensor]

    @staticmethod
    def at(labels: Tensor, logits: Tensor, kept: Kept | None = None) -> "Labelled":
        """Judge the drafter's `logits` [T, V], or those of its `kept` ids [T, K].

        A label that is not kept has neither loss nor gradient. The logits may be overwritten.
        """
        if kept is not None:
            places = kept.places[labels]
            labels = torch.where(places < len(kept.ids), places, IGNORED)
        is_on_cuda = logits.is_cuda and logits.dtype is torch.float32
        if is_on_cuda and len(labels) > 0 and has_liger():  # its kernel takes no empty chunk
            return judged_by_liger(labels, logits)
        return judged_by_torch(labels, logits)


@cache
def has_liger() -> bool:
    """Whether the package liger-kernel is installed, and new enough."""
    try:
        found = version("liger-kernel").split(".")
    except PackageNotFoundError:
        return False
    return (int(found[0]), int(found[1])) >= FIRST_LIGER


def judged_by_torch(labels: Tensor, logits: Tensor) -> Labelled:
    """By the labels [T], `IGNORED` among them."""
    is_counted = (labels != IGNORED)[:, None]
    labels = torch.where(is_counted, labels[:, None], 0)
    probs = logits.softmax(-1)
    losses = (log_sum(logits, probs) - logits.gather(-1, labels)).clamp_(max=-FLOOR)
    hits = (likeliest(probs) == labels) & is_counted

    def logit_gradient(weights: Tensor) -> Tensor:
        """W (q - 1[label])."""
        weights = (weights[:, None] * is_counted).to(probs.dtype)
        return probs.mul_(weights).scatter_add_(-1, labels, -weights)

    return Labelled((losses * is_counted)[:, 0], hits[:, 0].to(probs.dtype), logit_gradient)


def judged_by_liger(labels: Tensor, logits: Tensor) -> Labelled:
    """The same in one kernel, which writes the gradient over the logits (Hsu et al. 2024)."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    gradient = logits.detach().contiguous()
    with torch.enable_grad():  # or the kernel would leave the gradient out
        told = liger_cross_entropy(
            gradient.detach().requires_grad_(),
            labels,
            ignore_index=IGNORED,
            reduction="none",
            return_token_accuracy=True,
        )
    return Labelled(
        told.loss.detach().clamp_(max=-FLOOR),
        told.token_accuracy.detach(),
        lambda weights: gradient.mul_(weights[:, None]),
    )
