"""Lossless speculative sampling on chains and trees."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from decode.acceptance.greedy import Greedy
from decode.acceptance.judged import Judged
from decode.acceptance.tree import descend, one_by_one
from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch, draw

GREEDY = Greedy()


@dataclass(frozen=True)
class SpeculativeSampling:
    """Accept a draft token x with probability min(1, p(x) / q(x)), else draw from (p - q)+.

    p is the target's distribution, q the drafter's. Chains: Leviathan et al. 2023, Algorithm 1, and
    Chen et al. 2023, Algorithm 2. Trees: multi-step speculative sampling, SpecInfer (Miao et al.
    2023), Algorithm 2, with children drawn independently. Drafts without probabilities were chosen
    with certainty: q is one at the token. The output has exactly the target's distribution; at
    temperature 0 it is the target's own greedy output.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSLESS

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V], warped as the sequences ask."""
        if sampling.is_greedy:
            return GREEDY.accept(draft, target_logits, sampling)
        if draft.without_replacement:
            raise ValueError(
                "SpeculativeSampling is not lossless on children drawn without replacement; "
                "RecursiveRejection is the rule for them"
            )
        target_probs = sampling.probs(target_logits)
        counts = draft.num_nodes.tolist()
        uniforms = sampling.uniforms(counts, target_probs.device)
        accept = accept_chain if draft.is_chain else accept_tree
        return accept(draft, target_probs, uniforms).on_host()


def accept_chain(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Judged:
    """The rule on chains: only the drafted tokens' probabilities and one residual row are touched.

    Args:
        draft: chains of N nodes.
        target_probs: [B, N, V].
        uniforms: [B, N]; draw n judges node n + 1, and the one at the number of drafted tokens
            chooses the next token.
    """
    batch, width, _ = target_probs.shape
    rows = torch.arange(batch, device=target_probs.device)
    nodes = torch.arange(width, device=target_probs.device)
    num_drafted = draft.num_nodes - 1
    drafted = draft.tokens[:, 1:, None]
    p = target_probs[:, :-1].gather(2, drafted)[..., 0]
    q = (
        torch.ones_like(p)
        if draft.probs is None
        else draft.probs[:, :-1].gather(2, drafted)[..., 0]
    )
    accepted = (uniforms[:, :-1] * q < p) & (nodes[1:] < draft.num_nodes[:, None])
    num_accepted = accepted.long().cumprod(1).sum(1)
    num_tried = torch.minimum(num_accepted + 1, num_drafted)

    target_row = target_probs[rows, num_accepted]  # [B, V] the target's view where the path ends
    rejected = num_accepted < num_drafted
    if draft.probs is None:
        refused = draft.tokens[rows, (num_accepted + 1).clamp(max=width - 1)]
        residual = target_row.scatter(1, refused[:, None], 0.0)
        overlap = p
    else:
        residual = (target_row - draft.probs[rows, num_accepted]).clamp_min(0)
        overlap = torch.minimum(target_probs[:, :-1], draft.probs[:, :-1]).sum(-1)
    expected = pad(torch.where(nodes[1:] <= num_tried[:, None], overlap, 0.0), (1, 0))
    # The residual is empty only where p = q up to rounding, and then p itself is right.
    use_residual = rejected & (residual.sum(-1) > 0)
    weights = torch.where(use_residual[:, None], residual, target_row)
    next_token = draw(weights, uniforms[rows, num_drafted])
    path = torch.where(nodes <= num_accepted[:, None], nodes, -1)
    return Judged(path, num_accepted, next_token, num_tried, expected)


def accept_tree(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Judged:
    """The rule on any tree of independent children, and the reference for `accept_chain`.

    The arguments are those of `descend`.
    """
    return descend(draft, target_probs, uniforms, one_by_one)
