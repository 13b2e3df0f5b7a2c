"""Lenience: the target's probabilities are raised before they are compared. Lossy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decode.acceptance.longest_path import longest_path
from decode.acceptance.tree import Selection, Siblings, descend, one_by_one
from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch

FORMS = ("linear", "square", "exponential")


@dataclass(frozen=True, kw_only=True)
class Lenient:
    """Accept a draft token x with probability min(1, f(p(x)) / q(x)), else draw from (f(p) - q)+.

    With lenience l in (0, 1], 1 being lossless: f = p / l ("linear": Leviathan et al. 2023,
    appendix A.5; no token comes more often than p / l), p / l² ("square") or p^l ("exponential"):
    DistillSpec (Zhou et al. 2023), lossy speculative decoding. Greedy sequences accept x where the
    target at temperature 1 gives it at least l times what it gives its likeliest token. On trees
    the siblings are judged one by one.

    Attributes:
        lenience: l.
        form: of f.
    """

    lenience: float = 0.5
    form: str = "linear"

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def __post_init__(self) -> None:
        """Refuse what is no lenience."""
        if not 0 < self.lenience <= 1:
            raise ValueError(f"lenience must lie in (0, 1], got {self.lenience}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V].

        Raises:
            ValueError: siblings drawn without replacement, or greedy sequences among sampled ones.
        """
        if sampling.is_greedy:
            probs = target_logits.float().softmax(-1)
            likeliest = probs.max(-1)
            enough = probs >= self.lenience * likeliest.values[..., None]
            return longest_path(draft, enough, probs, likeliest.indices)
        if any(params.temperature == 0 for params in sampling.params):
            raise ValueError("Lenient cannot judge greedy and sampled sequences in one batch")
        if draft.without_replacement:
            raise ValueError("Lenient judges independent children, not ones without replacement")
        target_probs = sampling.probs(target_logits)
        uniforms = sampling.uniforms(draft.num_nodes.tolist(), target_probs.device)
        return descend(draft, target_probs, uniforms, self.select).on_host()

    def select(self, target_probs: Tensor, siblings: Siblings) -> Selection:
        """Judge the children of one node."""
        return one_by_one(target_probs, siblings, relax=self.raised)

    def raised(self, probs: Tensor) -> Tensor:
        """f(p)."""
        if self.form == "linear":
            return probs / self.lenience
        if self.form == "square":
            return probs / self.lenience**2
        return torch.where(probs > 0, probs**self.lenience, 0.0)
