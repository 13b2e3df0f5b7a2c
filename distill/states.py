"""Hidden states and the head that makes logits of them, in any slice and never all at once.

Shape legend: T places, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from distill.laws import FullLaw, Kept


@dataclass(frozen=True, slots=True)
class Head:
    """From the last hidden states to logits: ``softcap·tanh((h Wᵀ + b) / softcap)``.

    Attributes:
        weight: [V, D], or None where the states are logits already.
        bias: [V] or None.
        softcap: of Gemma 2; None for none.
        kept: which ids the V are, where the head is trimmed; None is all.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    softcap: float | None = None
    kept: Kept | None = None

    def detach(self, dtype: torch.dtype) -> "Head":
        """The same projection without gradients, its matrices in `dtype`."""
        weight, bias = (
            None if parameter is None else parameter.detach().to(dtype)
            for parameter in (self.weight, self.bias)
        )
        return Head(weight, bias, self.softcap, self.kept)

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

    def uncap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the projections from that of the logits: tanh' = 1 - tanh²."""
        if self.softcap is None:
            return gradient
        return gradient * (1 - (logits / self.softcap).square())


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states, and the head that makes logits of them in any slice.

    Attributes:
        hidden: [T, D].
        head: the projection.
    """

    hidden: Tensor
    head: Head

    @torch.no_grad()
    def law(self, rows: slice | Tensor) -> FullLaw:
        """Logits [t, V] of these rows, float32, or float64 where the states are."""
        dtype = compute_dtype(self.hidden)
        head = self.head.detach(dtype)
        with torch.autocast(self.hidden.device.type, enabled=False):
            projected = head.project(self.hidden[rows].to(dtype))
            return FullLaw(head.cap(at_least_float32(projected)))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that matrix products take here: autocast's where it is on, else the states'."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
