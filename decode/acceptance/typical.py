"""Typical acceptance: what the target finds plausible is kept. Lossy."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from decode.acceptance.longest_path import longest_path
from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch


@dataclass(frozen=True, kw_only=True)
class Typical:
    """Accept a draft token x where p(x) > min(ε, δ exp(-H(p))), H being the entropy of p.

    Medusa (Cai et al. 2024), section 2.3.1. Where the target is unsure it takes more. The longest
    acceptable path of a tree is kept, and the token behind it is the target's likeliest: the output
    is less varied than the target's own samples. At temperature 0 it is the greedy output.

    Attributes:
        epsilon: ε, no token above it is refused.
        delta: δ, how far below a typical token one may lie.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def __post_init__(self) -> None:
        """Refuse what is no threshold."""
        if not (0 < self.epsilon < 1 and self.delta > 0):
            raise ValueError(
                f"epsilon must lie in (0, 1) and delta be > 0, got {self.epsilon}, {self.delta}"
            )

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V], warped as the sequences ask."""
        probs = sampling.probs(target_logits)
        entropy = -(probs * probs.clamp_min(1e-30).log()).sum(-1, keepdim=True)
        threshold = (self.delta * (-entropy).exp()).clamp(max=self.epsilon)
        return longest_path(draft, probs > threshold, probs, probs.argmax(-1))
