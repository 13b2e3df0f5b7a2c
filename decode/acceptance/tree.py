"""From the root of a draft to a leaf: at every node one of its children is accepted, or none.

Which one is what rules differ in: a `Select` judges the children of one node. That one node's
selection is lossless is enough for the whole tree to be (Sun et al. 2023, SpecTr).

Shape legend: B sequences, N nodes, K children of one node, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from decode.acceptance.judged import Judged
from decode.draft import Draft
from decode.sampling import draw


class Siblings(NamedTuple):
    """The children of one node of each sequence, in the order they were drawn.

    Attributes:
        tokens: [B, K].
        valid: [B, K] False where a sequence has fewer children, or is not asked.
        uniforms: [B, K] one for each.
        law: [B, V] what they were drawn from, or None where they were chosen with certainty.
    """

    tokens: Tensor
    valid: Tensor
    uniforms: Tensor
    law: Tensor | None


class Selection(NamedTuple):
    """What became of them.

    Attributes:
        chosen: [B] the accepted one, -1 where there is none.
        is_tried: [B, K] those judged; behind the accepted one none is.
        expected: [B, K] the chance that each tried one had, given those before it.
        remaining: [B, V] what the target still wants where none was accepted; need not sum to one.
    """

    chosen: Tensor
    is_tried: Tensor
    expected: Tensor
    remaining: Tensor


Select = Callable[[Tensor, Siblings], Selection]  # of the target's probabilities [B, V]


def descend(draft: Draft, target_probs: Tensor, uniforms: Tensor, select: Select) -> Judged:
    """Walk down the tree by `select`, level by level, all sequences at once.

    Args:
        draft: trees of N nodes.
        target_probs: [B, N, V].
        uniforms: [B, N]; draw n - 1 judges node n, and the one at the number of drafted nodes
            chooses the next token.
        select: judges the children of one node.
    """
    batch, width, _ = target_probs.shape
    rows = torch.arange(batch, device=target_probs.device)
    children = draft.children()
    node = torch.zeros_like(draft.num_nodes)
    depth = torch.zeros_like(node)
    path = torch.full_like(draft.tokens, -1)
    path[:, 0] = 0
    num_tried = torch.zeros_like(node)
    expected = target_probs.new_zeros(batch, width)
    remaining = target_probs[:, 0]  # what the target still wants behind `node`
    is_going = torch.ones_like(node, dtype=torch.bool)
    while True:
        below = children[rows, node]  # [B, K]
        valid = (below > 0) & is_going[:, None]
        if not valid.any():
            break
        found = select(
            remaining,
            Siblings(
                draft.tokens.gather(1, below),
                valid,
                uniforms.gather(1, (below - 1).clamp(min=0)),
                None if draft.probs is None else draft.probs[rows, node],
            ),
        )
        # What is not there has the number 0, and the root expects nothing.
        expected.scatter_add_(1, below, torch.where(found.is_tried, found.expected, 0.0))
        num_tried += found.is_tried.sum(1)
        is_going = found.chosen >= 0
        node = torch.where(is_going, below[rows, found.chosen.clamp(min=0)], node)
        depth += is_going
        path[rows, depth] = node
        behind = torch.where(is_going[:, None], target_probs[rows, node], found.remaining)
        remaining = torch.where(valid.any(1)[:, None], behind, remaining)
    next_token = draw(remaining, uniforms[rows, draft.num_nodes - 1])
    return Judged(path, depth, next_token, num_tried, expected)


def unchanged(law: Tensor, token: Tensor) -> Tensor:
    """The law of the next sibling after `token` [B, 1], where they are drawn independently."""
    return law


def one_by_one(
    target_probs: Tensor,
    siblings: Siblings,
    *,
    next_law: Callable[[Tensor, Tensor], Tensor] = unchanged,
    relax: Callable[[Tensor], Tensor] = lambda probs: probs,
) -> Selection:
    """Judge each sibling by what those before it have left: min(1, p(x) / q(x)), then (p - q)+.

    Args:
        target_probs: [B, V], p.
        siblings: drawn from q = `siblings.law`, or chosen with certainty.
        next_law: q of the next sibling, behind a token [B, 1] that was refused.
        relax: what stands for p; anything but p itself is lossy.
    """
    remaining = target_probs
    law = siblings.law
    chosen = torch.full_like(siblings.tokens[:, 0], -1)
    tried = torch.zeros_like(siblings.valid)
    expected = torch.zeros_like(siblings.uniforms)
    for column in range(siblings.tokens.shape[1]):
        is_tried = siblings.valid[:, column] & (chosen < 0)
        if not is_tried.any():
            break  # those behind it are not there either, or have an accepted one before them
        token = siblings.tokens[:, column : column + 1]
        if siblings.law is None:
            law = torch.zeros_like(remaining).scatter_(1, token, 1.0)
        assert law is not None
        wanted = relax(remaining)
        threshold = siblings.uniforms[:, column : column + 1] * law.gather(1, token)
        is_accepted = is_tried & (threshold < wanted.gather(1, token))[:, 0]
        tried[:, column] = is_tried
        expected[:, column] = torch.minimum(law, wanted).sum(-1)
        chosen = torch.where(is_accepted, column, chosen)
        is_refused = (is_tried & ~is_accepted)[:, None]
        remaining = torch.where(is_refused, residual(wanted, law, remaining), remaining)
        if siblings.law is not None:
            law = torch.where(is_refused, next_law(law, token), law)
    return Selection(chosen, tried, expected, remaining)


def residual(wanted: Tensor, law: Tensor, otherwise: Tensor) -> Tensor:
    """[B, V] (wanted - law)+, normalised; `otherwise` where nothing is left, by rounding."""
    rest = (wanted - law).clamp_min(0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, otherwise)
