"""Medusa heads (Cai et al. 2024, section 2.1): independent of each other."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from decode.models.heads import Heads, ResidualBlock, TargetEnds, check_counts, vocabulary_heads


@dataclass(frozen=True, kw_only=True)
class Medusa:
    """Head k gives ``softmax(W2_k (SiLU(W1_k h) + h))``.

    W1 begins at zero and W2 as the target's language-model head: untrained, every head predicts
    what the target predicts for the token before its own.

    Attributes:
        num_heads: tokens that can be drafted.
        share_head: all heads use the target's language-model head as it is, which saves most of
            their parameters: D x V each.
    """

    family: ClassVar[str] = "medusa"

    num_heads: int = 4
    share_head: bool = False

    def __post_init__(self) -> None:
        """Refuse no heads."""
        check_counts(num_heads=self.num_heads)

    def build(self, target: PreTrainedModel) -> "MedusaHeads":
        """The untrained heads, in float32, on the target's device.

        Raises:
            ValueError: the target's head is none that heads can share.
        """
        return MedusaHeads(self, TargetEnds.of(target)).to(target.device)


class MedusaHeads(Heads):
    """The modules."""

    def __init__(self, settings: Medusa, ends: TargetEnds):
        """Blocks, and vocabulary heads where they are not shared."""
        super().__init__(settings, settings.num_heads, ends)
        self.blocks = nn.ModuleList(
            ResidualBlock(ends.hidden_size) for _ in range(settings.num_heads)
        )
        if not settings.share_head:
            self.outputs = vocabulary_heads(settings.num_heads, ends)

    def unscaled(self, depth: int, prepared: Tensor, tokens: Tensor) -> Tensor:
        """[.., D]; the tokens are not read."""
        state: Tensor = self.blocks[depth - 1](prepared)
        return state
