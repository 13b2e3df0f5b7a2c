"""Block verification: a chain is judged as a whole."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decode.acceptance.greedy import Greedy
from decode.acceptance.judged import Judged
from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch, draw

GREEDY = Greedy()


@dataclass(frozen=True)
class BlockVerification:
    """Accept the longest prefix of a chain that its joint probability allows.

    Sun et al. 2024 (Block Verification Accelerates Speculative Decoding), Algorithm 2. What a token
    has more of in the target than it needs pays for a later one that has less: never fewer tokens
    are accepted, on average, than by judging token by token, and the output has the same
    distribution. Every token of the block is looked at, so that its acceptance rate, over the
    tokens up to the first one left out, is no mean of min(p, q).
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSLESS

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V], warped as the sequences ask.

        Raises:
            ValueError: a tree.
        """
        if sampling.is_greedy:
            return GREEDY.accept(draft, target_logits, sampling)
        if not draft.is_chain:
            raise ValueError("BlockVerification judges chains; SpeculativeSampling takes any tree")
        target_probs = sampling.probs(target_logits)
        uniforms = sampling.uniforms(draft.num_nodes.tolist(), target_probs.device)
        return accept_block(draft, target_probs, uniforms).on_host()


def accept_block(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Judged:
    """The rule.

    Args:
        draft: chains of N nodes.
        target_probs: [B, N, V].
        uniforms: [B, N]; draw n judges the block that ends with node n + 1, and the one at the
            number of drafted tokens chooses the next token.
    """
    batch, width, _ = target_probs.shape
    rows = torch.arange(batch, device=target_probs.device)
    num_drafted = draft.num_nodes - 1
    # weight[n] is min(1, weight[n - 1] p / q): how much of the target the path to node n stands for
    weight = torch.ones_like(target_probs[:, 0, 0])
    num_accepted = torch.zeros_like(num_drafted)
    remaining = target_probs[:, 0] if width == 1 else _missing(draft, target_probs, weight, 0)
    for node in range(1, width):
        token = draft.tokens[:, node]
        p = target_probs[rows, node - 1, token]
        q = torch.ones_like(p) if draft.probs is None else draft.probs[rows, node - 1, token]
        weight = (weight * p / q.clamp_min(torch.finfo(q.dtype).tiny)).clamp(max=1.0)
        is_last = num_drafted == node
        missing = _missing(draft, target_probs, weight, node)
        total = missing.sum(-1)
        chance = total / (total + 1 - weight).clamp_min(torch.finfo(q.dtype).tiny)
        chance = torch.where(is_last, weight, chance)
        is_accepted = (uniforms[:, node - 1] < chance) & (node <= num_drafted)
        num_accepted = torch.where(is_accepted, node, num_accepted)
        left = torch.where(is_last[:, None], target_probs[:, node], missing)
        remaining = torch.where(is_accepted[:, None], left, remaining)
    at_end = target_probs[rows, num_accepted]
    has_rest = (remaining.sum(-1, keepdim=True) > 0) & (num_drafted > 0)[:, None]
    next_token = draw(torch.where(has_rest, remaining, at_end), uniforms[rows, num_drafted])
    nodes = torch.arange(width, device=target_probs.device)
    path = torch.where(nodes <= num_accepted[:, None], nodes, -1)
    num_tried = torch.minimum(num_accepted + 1, num_drafted)
    return Judged(path, num_accepted, next_token, num_tried)


def _missing(draft: Draft, target_probs: Tensor, weight: Tensor, node: int) -> Tensor:
    """[B, V] (weight p - q)+ behind `node`: what the target has more of than the drafter."""
    scaled = weight[:, None] * target_probs[:, node]
    if draft.probs is not None:
        return (scaled - draft.probs[:, node]).clamp_min(0)
    below = draft.tokens[:, min(node + 1, draft.tokens.shape[1] - 1)]
    return scaled.scatter(1, below[:, None], 0.0)
