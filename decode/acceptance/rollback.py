"""BiLD's rollback: the drafter's text stands until the target finds a token too unlikely. Lossy."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from decode.acceptance.longest_path import longest_path
from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Accept a draft token x where -log p(x) is at most `threshold`.

    BiLD (Kim et al. 2023), rollback policy: the distance is the cross-entropy of the target's
    prediction with the drafter's token. p is at temperature 1. What follows the accepted path is
    the target's likeliest token. BiLD's other half, falling back to the target where the drafter is
    unsure, is the drafter's: `LMDrafter(min_confidence=...)`.

    Attributes:
        threshold: α_RB, in nats.
    """

    threshold: float = 2.0

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def __post_init__(self) -> None:
        """Refuse what is no threshold."""
        if not self.threshold > 0:
            raise ValueError(f"threshold must be > 0, got {self.threshold}")

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V]."""
        probs = target_logits.float().softmax(-1)
        enough = probs >= math.exp(-self.threshold)
        return longest_path(draft, enough, probs, probs.argmax(-1))
