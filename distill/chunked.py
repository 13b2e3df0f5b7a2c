"""Projection and objective in chunks of tokens, forward and backward at once.

Logits are the largest tensor of a training step: 8,192 tokens x 128,000 tokens of vocabulary are
4 GB in float32, and a divergence makes several of them. Here they live one chunk at a time: the
forward projects a chunk, judges it, forms the gradient of its logits and folds that into the
gradients of the hidden states and of the weights; the backward only scales these.

Shape legend: T tokens to be predicted, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from distill.objectives import LossTerms, Objective

CHUNK_ELEMENTS = {"cpu": 2**20}  # logits per chunk: what a core's cache holds
CHUNK_ELEMENTS_ACCELERATOR = 2**27  # 512 MB in float32

TargetLogits = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Head:
    """From the last hidden states to logits: ``softcap·tanh((h Wᵀ + b) / softcap)``.

    Attributes:
        weight: [V, D], or None where the states are logits already.
        bias: [V] or None.
        softcap: of Gemma 2; None for none.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    softcap: float | None = None

    def detach(self, dtype: torch.dtype) -> "Head":
        """The same projection without gradients, its matrices in `dtype`."""
        weight, bias = (
            None if parameter is None else parameter.detach().to(dtype)
            for parameter in (self.weight, self.bias)
        )
        return Head(weight, bias, self.softcap)

    def project(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, V], the cap not applied yet."""
        if self.weight is None:
            return hidden
        return functional.linear(hidden, self.weight, self.bias)

    def cap(self, projected: Tensor) -> Tensor:
        """[T, V] -> [T, V]: logits."""
        if self.softcap is None:
            return projected
        return self.softcap * torch.tanh(projected / self.softcap)


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states, and the head that makes logits of them in any slice.

    Attributes:
        hidden: [T, D].
        head: the projection.
    """

    hidden: Tensor
    head: Head

    def logits(self, begin: int, end: int) -> Tensor:
        """[end - begin, V] float32, or float64 where the states are, without gradient."""
        with torch.no_grad():
            dtype = compute_dtype(self.hidden)
            head = self.head.detach(dtype)
            with torch.autocast(self.hidden.device.type, enabled=False):
                return head.cap(at_least_float32(head.project(self.hidden[begin:end].to(dtype))))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that matrix products take here: autocast's where it is on, else the states'."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def projected_loss(
    states: States,
    labels: Tensor,
    target_logits: TargetLogits | None,
    objective: Objective,
    *,
    chunk_size: int | None = None,
) -> LossTerms:
    """The objective's sums over all T tokens; `loss` carries the gradient, the rest does not.

    Where drafter and target are padded to different vocabularies, ids that only one of them has
    stand for no token and are left out.

    Args:
        states: the drafter's.
        labels: [T] token ids.
        target_logits: (begin, end) -> the target's logits [end - begin, V] of those tokens.
        objective: what is minimised.
        chunk_size: tokens per chunk; by default what suits the device.
    """
    head = states.head
    inputs = (states.hidden, head.weight, head.bias)
    if torch.is_grad_enabled():
        wanted = [tensor is not None and tensor.requires_grad for tensor in inputs]
    else:
        wanted = [False, False, False]
    terms, gradients = _in_chunks(
        states, labels, target_logits, objective, chunk_size or _chunk_size(states), wanted
    )
    if not any(wanted):
        return terms
    loss = cast(Any, _WithGradients).apply(terms.loss, *inputs, *gradients)
    return LossTerms(loss, terms.num_tokens, terms.metrics)


@torch.no_grad()
def _in_chunks(
    states: States,
    labels: Tensor,
    target_logits: TargetLogits | None,
    objective: Objective,
    chunk_size: int,
    wanted: list[bool],
) -> tuple[LossTerms, list[Tensor | None]]:
    """The summed terms, and the gradients of hidden states, weight and bias that are wanted."""
    dtype = compute_dtype(states.hidden)
    hidden, head = states.hidden.detach().to(dtype), states.head.detach(dtype)
    inputs = (states.hidden, states.head.weight, states.head.bias)
    gradients = [
        torch.zeros_like(tensor) if tensor is not None and is_wanted else None
        for tensor, is_wanted in zip(inputs, wanted, strict=True)
    ]
    parts = []
    # No tokens at all make one empty chunk: the terms are zeros then, under their usual names.
    for begin in range(0, max(len(labels), 1), chunk_size):
        end = min(begin + chunk_size, len(labels))
        target = None if target_logits is None else target_logits(begin, end)
        with torch.autocast(hidden.device.type, enabled=False):
            projected = at_least_float32(head.project(hidden[begin:end]))
            with torch.enable_grad():
                projected.requires_grad_(any(wanted))
                logits = head.cap(projected)
                if target is not None:
                    width = min(logits.shape[-1], target.shape[-1])
                    logits, target = logits[:, :width], target[:, :width]
                terms = objective(logits, labels[begin:end], target)
            if any(wanted):
                (gradient,) = torch.autograd.grad(terms.loss, projected)
                _fold(gradient.to(dtype), hidden[begin:end], head, gradients, begin)
        parts.append(LossTerms(terms.loss.detach(), terms.num_tokens, terms.metrics))
    return _sum(parts), gradients


def _fold(
    gradient: Tensor, hidden: Tensor, head: Head, gradients: list[Tensor | None], begin: int
) -> None:
    """Add what the gradient [t, V] of a chunk's projections means for the projection's inputs."""
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None:
        of_hidden[begin : begin + len(hidden)] = (
            gradient if head.weight is None else gradient @ head.weight
        )
    if of_weight is not None:
        of_weight += gradient.T @ hidden
    if of_bias is not None:
        of_bias += gradient.sum(0)


def _sum(parts: list[LossTerms]) -> LossTerms:
    def total(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).sum(0)

    return LossTerms(
        total(part.loss for part in parts),
        total(part.num_tokens for part in parts),
        {
            name: (
                total(part.metrics[name][0] for part in parts),
                total(part.metrics[name][1] for part in parts),
            )
            for name in parts[0].metrics
        },
    )


def _chunk_size(states: States) -> int:
    elements = CHUNK_ELEMENTS.get(states.hidden.device.type, CHUNK_ELEMENTS_ACCELERATOR)
    weight = states.head.weight
    vocab_size = states.hidden.shape[1] if weight is None else weight.shape[0]
    return max(elements // vocab_size, 16)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        of_hidden: Tensor | None,
        of_weight: Tensor | None,
        of_bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if known is None else known * scale for known in ctx.saved_tensors)
        return (None, *scaled, None, None, None)
