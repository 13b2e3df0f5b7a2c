"""Rules that call each token acceptable or not: the longest acceptable path is kept."""

import torch
from torch import Tensor

from decode.draft import Draft
from decode.protocols import Acceptance


def longest_path(
    draft: Draft, acceptable: Tensor, scores: Tensor, next_tokens: Tensor, *, min_accepted: int = 0
) -> Acceptance:
    """Keep the longest path on which every token is acceptable; of several, the likeliest.

    Args:
        draft: any trees of N nodes.
        acceptable: [B, N, V] bool, by what the target says behind node n, of each token.
        scores: [B, N, V] probabilities, of which the product on a path says how likely it is.
        next_tokens: [B, N] what follows where the path ends at node n.
        min_accepted: how many levels of a draft are accepted whatever they hold.
    """
    rows = torch.arange(len(draft.tokens), device=draft.tokens.device)[:, None]
    parents = draft.parents.clamp(min=0)
    is_good = acceptable[rows, parents, draft.tokens].tolist()
    score = scores[rows, parents, draft.tokens].log().tolist()
    tokens_after, above = next_tokens.tolist(), draft.parents.tolist()
    paths, tokens, tries = [], [], []
    for row, num_nodes in enumerate(draft.num_nodes.tolist()):
        depth = {0: 0}  # of the nodes whose whole path is acceptable
        value = {0: 0.0}
        num_tried = 0
        for node in range(1, num_nodes):
            parent = above[row][node]
            if parent not in depth:
                continue
            num_tried += 1
            if is_good[row][node] or depth[parent] < min_accepted:
                depth[node] = depth[parent] + 1
                value[node] = value[parent] + score[row][node]
        best = max(depth, key=lambda node: (depth[node], value[node]))
        path = []
        node = best
        while node >= 0:
            path.append(node)
            node = above[row][node]
        paths.append(path[::-1])
        tokens.append(tokens_after[row][best])
        tries.append(num_tried)
    return Acceptance(paths, tokens, tries)
