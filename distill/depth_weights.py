"""How much each depth of a draft counts in the loss. One depth alone always counts fully."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class DepthWeights(Protocol):
    """Weights from how likely each depth is accepted."""

    def weights(self, alphas: Tensor) -> Tensor:
        """[K, T] for the expected acceptance rates [K, T] of K depths at T places."""
        ...


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every depth counts as much."""

    def weights(self, alphas: Tensor) -> Tensor:
        """1 everywhere."""
        return torch.ones_like(alphas)


@dataclass(frozen=True, kw_only=True)
class Decay:
    """Depth k counts factor^(k - 1): Medusa's weights (Cai et al. 2024, section 2.2.1).

    Attributes:
        factor: from one depth to the next.
    """

    factor: float = 0.8

    def __post_init__(self) -> None:
        """Refuse weights that grow or vanish."""
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor must be in (0, 1], got {self.factor}")

    def weights(self, alphas: Tensor) -> Tensor:
        """factor^0, factor^1, ..."""
        depth = torch.arange(len(alphas), dtype=alphas.dtype, device=alphas.device)
        return torch.ones_like(alphas) * (self.factor**depth)[:, None]


@dataclass(frozen=True, kw_only=True)
class Survival:
    """A depth counts as likely as it is reached: the product of α over the depths before it.

    No gradient flows through the weights. Tokens behind a certain rejection are not learnt.
    """

    def weights(self, alphas: Tensor) -> Tensor:
        """1, α_1, α_1 α_2, ..."""
        return torch.cat([torch.ones_like(alphas[:1]), alphas[:-1]]).cumprod(0)
