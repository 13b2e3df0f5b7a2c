"""Greedy acceptance: a draft token is kept where it is the target's own argmax."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch


@dataclass(frozen=True)
class Greedy:
    """Keep the longest path on which every token is the target's argmax.

    Stern et al. 2018 (blockwise parallel decoding), section 3; on trees SpecInfer's VerifyGreedy
    (Miao et al. 2023, section 4.2). The output is the target's own greedy output, whatever the
    drafter proposes and however it was drawn. Sampling parameters are not looked at.
    """

    exactness: ClassVar[Exactness] = Exactness.GREEDY

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the argmax of the target's logits [B, N, V]."""
        choice = target_logits.argmax(-1)  # [B, N] the target's token behind each node
        if draft.tokens.shape[1] == 1:
            none = torch.zeros_like(draft.num_nodes)
            return Acceptance(none[:, None], none, choice[:, 0], none)
        if draft.is_chain:
            return _accept_chain(draft, choice)
        return _accept_tree(draft, choice)


def _accept_chain(draft: Draft, choice: Tensor) -> Acceptance:
    batch, width = draft.tokens.shape
    nodes = torch.arange(width, device=choice.device)
    matches = (draft.tokens[:, 1:] == choice[:, :-1]) & (nodes[1:] < draft.num_nodes[:, None])
    num_accepted = matches.long().cumprod(1).sum(1)
    next_token = choice.gather(1, num_accepted[:, None])[:, 0]
    path = torch.where(nodes <= num_accepted[:, None], nodes, -1)
    num_tried = torch.minimum(num_accepted + 1, draft.num_nodes - 1)
    return Acceptance(path, num_accepted, next_token, num_tried)


def _accept_tree(draft: Draft, choice: Tensor) -> Acceptance:
    batch, width = draft.tokens.shape
    rows = torch.arange(batch, device=choice.device)
    node = torch.zeros_like(draft.num_nodes)
    path = torch.full_like(draft.tokens, -1)
    path[:, 0] = 0
    depth = torch.zeros_like(node)
    num_tried = torch.zeros_like(node)
    for n in range(1, width):  # parents come first: a node's children are met after it
        tried = (draft.parents[:, n] == node) & (n < draft.num_nodes)
        accepted = tried & (draft.tokens[:, n] == choice[rows, node])
        num_tried += tried
        node = torch.where(accepted, n, node)
        depth += accepted
        path[rows, depth] = node
    return Acceptance(path, depth, choice[rows, node], num_tried)
