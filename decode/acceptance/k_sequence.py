"""SpecTr's k-sequence selection: all siblings of a node share one acceptance level."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decode.acceptance.greedy import Greedy
from decode.acceptance.judged import Judged
from decode.acceptance.sampling import accept_chain, accept_tree
from decode.acceptance.tree import Selection, Siblings, descend
from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch

GREEDY = Greedy()
NUM_HALVINGS = 24  # of [1, K], which leaves float32 no more to halve


@dataclass(frozen=True)
class KSequence:
    """Accept child x of K independent ones with probability min(1, p(x) / (ρ q(x))).

    SpecTr (Sun et al. 2023), K-SEQ, applied at every node of a tree. ρ in [1, K] is
    the smallest level at which the accepted tokens take no more of any token than p has:
    1 - (1 - β)^K = ρ β, with β = Σ min(q, p / ρ). Chains have K = 1, and there, as with drafts
    chosen with certainty, this is `SpeculativeSampling`.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSLESS

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V], warped as the sequences ask.

        Raises:
            ValueError: siblings that were drawn without replacement.
        """
        if sampling.is_greedy:
            return GREEDY.accept(draft, target_logits, sampling)
        if draft.without_replacement:
            raise ValueError(
                "KSequence is not lossless on children drawn without replacement; "
                "RecursiveRejection is the rule for them"
            )
        target_probs = sampling.probs(target_logits)
        uniforms = sampling.uniforms(draft.num_nodes.tolist(), target_probs.device)
        if draft.is_chain:
            accept = accept_chain
        else:
            accept = accept_tree if draft.probs is None else accept_k_sequence
        return accept(draft, target_probs, uniforms).on_host()


def accept_k_sequence(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Judged:
    """The rule on trees; the arguments are those of `descend`."""
    return descend(draft, target_probs, uniforms, select_k_sequence)


def select_k_sequence(target_probs: Tensor, siblings: Siblings) -> Selection:
    """Judge K siblings, each by the same ratio."""
    law = siblings.law
    assert law is not None
    count = siblings.valid.sum(1, keepdim=True).clamp(min=1)  # [B, 1], K
    level = acceptance_level(target_probs, law, count)
    share = torch.minimum(law, target_probs / level)  # [B, V] accepted, per sibling that is tried
    chance = share.sum(-1, keepdim=True)  # β
    would = siblings.uniforms * law.gather(1, siblings.tokens) < share.gather(1, siblings.tokens)
    would &= siblings.valid
    is_accepted = would.any(1)
    first = would.byte().argmax(1)
    columns = torch.arange(would.shape[1], device=would.device)
    is_tried = siblings.valid & (columns <= torch.where(is_accepted, first, columns[-1])[:, None])
    tries = (1 - (1 - chance) ** count) / chance.clamp_min(torch.finfo(chance.dtype).tiny)
    remaining = (target_probs - share * tries).clamp_min(0)
    has_rest = remaining.sum(-1, keepdim=True) > 0
    return Selection(
        torch.where(is_accepted, first, -1),
        is_tried,
        chance.expand_as(siblings.uniforms),
        torch.where(has_rest, remaining, target_probs),
    )


def acceptance_level(target_probs: Tensor, law: Tensor, count: Tensor) -> Tensor:
    """[B, 1] ρ, from above: a little too large is lossless too, a little too small is not."""
    low, high = torch.ones_like(count, dtype=law.dtype), count.to(law.dtype)
    for _ in range(NUM_HALVINGS):
        level = (low + high) / 2
        chance = torch.minimum(law, target_probs / level).sum(-1, keepdim=True)
        takes_too_much = 1 - (1 - chance) ** count > level * chance
        low = torch.where(takes_too_much, level, low)
        high = torch.where(takes_too_much, high, level)
    return high
