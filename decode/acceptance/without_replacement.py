"""Recursive rejection sampling: trees whose siblings were drawn without replacement."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from decode.acceptance.greedy import Greedy
from decode.acceptance.judged import Judged
from decode.acceptance.sampling import accept_chain
from decode.acceptance.tree import descend, one_by_one
from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch

GREEDY = Greedy()


@dataclass(frozen=True)
class RecursiveRejection:
    """Speculative sampling where no sibling repeats another: each was drawn from what was left.

    Sequoia (Chen et al. 2024), Algorithm 2, and MCSD (Yang et al. 2024). A child x is
    accepted with probability min(1, p(x) / q(x)); behind a refusal p becomes (p - q)+ and q loses
    x, both normalised. Where the drafter is far off, siblings that differ find what it misses.
    Chains and drafts chosen with certainty are judged as `SpeculativeSampling` judges them.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSLESS

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V], warped as the sequences ask.

        Raises:
            ValueError: siblings that may repeat each other.
        """
        if sampling.is_greedy:
            return GREEDY.accept(draft, target_logits, sampling)
        if not (draft.without_replacement or draft.is_chain or draft.probs is None):
            raise ValueError(
                "RecursiveRejection is not lossless on children drawn independently; "
                "SpeculativeSampling is a rule for them"
            )
        target_probs = sampling.probs(target_logits)
        uniforms = sampling.uniforms(draft.num_nodes.tolist(), target_probs.device)
        accept = accept_chain if draft.is_chain else accept_distinct
        return accept(draft, target_probs, uniforms).on_host()


def accept_distinct(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Judged:
    """The rule on trees; the arguments are those of `descend`."""
    return descend(draft, target_probs, uniforms, select_distinct)


def without(law: Tensor, token: Tensor) -> Tensor:
    """[B, V] `law` without `token` [B, 1], normalised; zeros where nothing is left."""
    rest = law.scatter(1, token, 0.0)
    return rest / rest.sum(-1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)


select_distinct = partial(one_by_one, next_law=without)
