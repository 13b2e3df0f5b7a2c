"""Approximate greedy rules of blockwise decoding and of SpecDec. Lossy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decode.acceptance.longest_path import longest_path
from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch


@dataclass(frozen=True, kw_only=True)
class TopTokens:
    """Accept a draft token that is among the target's likeliest, and not far behind the first.

    Stern et al. 2018 (blockwise parallel decoding), section 5.1, is `max_gap` = inf; SpecDec (Xia
    et al. 2023), section 3.2, has both. The token behind the path is the target's likeliest.
    Temperature and the other sampling parameters are not looked at.

    Attributes:
        top: how many of the target's likeliest tokens are acceptable; 1 is greedy.
        max_gap: how much lower than the likeliest token's its log-probability may be.
        min_block: tokens a step gives at least, the target's own included, where the draft has them
            (Stern et al., section 5.3).
    """

    top: int = 3
    max_gap: float = float("inf")
    min_block: int = 1

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def __post_init__(self) -> None:
        """Refuse what accepts nothing."""
        if self.top < 1 or not self.max_gap >= 0 or self.min_block < 1:
            raise ValueError(
                "top and min_block must be >= 1 and max_gap >= 0, got "
                f"{self.top}, {self.min_block} and {self.max_gap}"
            )

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V]."""
        logits = target_logits.float()
        best = logits.topk(min(self.top, logits.shape[-1]), dim=-1).values
        lowest = torch.maximum(best[..., -1:], best[..., :1] - self.max_gap)
        return longest_path(
            draft,
            logits >= lowest,
            logits.softmax(-1),
            logits.argmax(-1),
            min_accepted=self.min_block - 1,
        )


@dataclass(frozen=True, kw_only=True)
class NearTokens:
    """Accept a draft token whose number is near that of the target's likeliest.

    Stern et al. 2018, section 5.2, for outputs whose tokens are numbers, such as intensities of
    pixels. The token behind the path is the target's likeliest.

    Attributes:
        distance: ε, how far apart the two ids may be.
        min_block: tokens a step gives at least, the target's own included, where the draft has
            them.
    """

    distance: int = 2
    min_block: int = 1

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def __post_init__(self) -> None:
        """Refuse what accepts nothing."""
        if self.distance < 0 or self.min_block < 1:
            raise ValueError(
                "distance must be >= 0 and min_block >= 1, got "
                f"{self.distance} and {self.min_block}"
            )

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V]."""
        choice = target_logits.argmax(-1)
        ids = torch.arange(target_logits.shape[-1], device=target_logits.device)
        near = (ids - choice[..., None]).abs() <= self.distance
        scores = target_logits.float().softmax(-1)
        return longest_path(draft, near, scores, choice, min_accepted=self.min_block - 1)
