"""Blockwise heads (Stern et al. 2018, sections 3 and 4): one layer for all, one vocabulary."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from decode.models.heads import Heads, TargetEnds, check_counts


@dataclass(frozen=True, kw_only=True)
class Blockwise:
    """A feed-forward layer that gives one state per head, each added to the target's own.

    Its hidden layer is `num_heads` x `hidden_size` wide, its output `num_heads` x D; the target's
    vocabulary projection is shared by all. The paper's k counts the target's own prediction too:
    k = `num_heads` + 1.

    Attributes:
        num_heads: tokens that can be drafted.
        hidden_size: of the hidden layer, per head; None is the target's.
        one_at_a_time: train one head per micro-batch, drawn at random, as the paper does, not all:
            less work per step, and a gradient of the same direction on average.
        seed: of the initial weights.
    """

    family: ClassVar[str] = "blockwise"

    num_heads: int = 4
    hidden_size: int | None = None
    one_at_a_time: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse no heads, or heads of no size."""
        check_counts(num_heads=self.num_heads, hidden_size=self.hidden_size or 1)

    def build(self, target: PreTrainedModel) -> "BlockwiseHeads":
        """The untrained heads, in float32, on the target's device: each begins as the target's own.

        Raises:
            ValueError: the target's head is none that heads can share.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return BlockwiseHeads(self, TargetEnds.of(target)).to(target.device)


class BlockwiseHeads(Heads):
    """The modules."""

    def __init__(self, settings: Blockwise, ends: TargetEnds):
        """The two matrices; the second begins at zero."""
        super().__init__(settings, settings.num_heads, ends)
        self.one_at_a_time = settings.one_at_a_time
        inner = settings.num_heads * (settings.hidden_size or ends.hidden_size)
        self.inner = nn.Linear(ends.hidden_size, inner)
        self.outer = nn.Linear(inner, settings.num_heads * ends.hidden_size)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def prepare(self, hidden: Tensor) -> Tensor:
        """[.., D] to the states of all heads, one behind the other."""
        hidden = super().prepare(hidden)
        added: Tensor = self.outer(functional.relu(self.inner(hidden)))
        return added + hidden.repeat(*[1] * (hidden.ndim - 1), self.num_heads)

    def unscaled(self, depth: int, prepared: Tensor, tokens: Tensor) -> Tensor:
        """[.., D]; the tokens are not read."""
        size = self.ends.hidden_size
        return prepared[..., (depth - 1) * size : depth * size]
