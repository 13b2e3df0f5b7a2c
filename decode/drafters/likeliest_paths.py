"""Trees that grow where the drafter is sure: EAGLE-2's dynamic trees.

Shape legend: B sequences, W nodes of one level, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from decode.drafters.growing import GrowingTree, Growth, Level
from decode.sampling import SamplingBatch


@dataclass(frozen=True, kw_only=True)
class LikeliestPaths:
    """Expand the likeliest nodes of each level, and keep the likeliest nodes of all.

    EAGLE-2 (Li et al. 2024), expansion and reranking. The value of a node is the product of the
    drafter's probabilities on the way to it, an estimate of the chance that it is accepted. Nodes
    are chosen with certainty. The values of greedy sequences are at temperature 1, those of others
    are warped as their sampling asks: an impossible token is never drafted.

    Attributes:
        width: nodes expanded per level, and children looked at for each.
        depth: of the deepest node.
        size: drafted nodes kept.
    """

    width: int = 10
    depth: int = 6
    size: int = 60

    def __post_init__(self) -> None:
        """Refuse what makes no tree."""
        if min(self.width, self.depth, self.size) < 1:
            raise ValueError(
                f"width, depth and size must be >= 1, got {self.width}, {self.depth}, {self.size}"
            )

    @property
    def num_children(self) -> int:
        """Of the node that has most."""
        return self.width

    def grow(self, tree: GrowingTree, depths: list[int], sampling: SamplingBatch) -> Growth:
        """Grow `tree` from its root, no deeper than `depths`."""
        device = tree.logits.device
        limits, deepest = torch.tensor(depths, device=device)[:, None], max(depths)
        above = tree.logits.new_zeros(len(depths), 1, dtype=torch.float32)  # of the nodes expanded
        first = 0  # place of the first of them
        levels, values = [], []
        for depth in range(1, deepest + 1):
            children = above[..., None] + log_probs(tree.logits, sampling)
            top = children.topk(self.width, dim=-1)
            tokens, value = top.indices.flatten(1), top.values.flatten(1)
            value = value.masked_fill(depth > limits, -torch.inf)
            parents = first + torch.arange(above.shape[1], device=device)
            parents = parents.repeat_interleave(self.width).expand_as(tokens)
            places = torch.full_like(tokens, -1)
            if depth < deepest:
                first = tree.num_read
                best = value.topk(min(self.width, value.shape[1]), dim=1).indices
                new = first + torch.arange(best.shape[1], device=device)
                places.scatter_(1, best, new.expand_as(best))
                places = torch.where(depth < limits, places, -1)
                tree.read(tokens.gather(1, best), parents.gather(1, best))
                above = value.gather(1, best)
            values.append(value)
            levels.append((tokens, parents, places))
        tokens, parents, places = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        # A node is worth no more than its parent, which comes before it: those kept hang together.
        ranked = torch.cat(values, dim=1).sort(dim=1, descending=True, stable=True)
        is_kept = ranked.values > -torch.inf
        is_kept[:, self.size :] = False
        is_drafted = torch.zeros_like(is_kept).scatter_(1, ranked.indices, is_kept)
        return Growth([Level(tokens, parents, places, is_drafted)])


def log_probs(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """[B, W, V] what the drafter gives each token, greedy sequences at temperature 1."""
    plain = logits.float().log_softmax(-1).clamp(max=0)
    if sampling.is_greedy:
        return plain
    is_greedy = [params.temperature == 0 for params in sampling.params]
    certain = torch.tensor(is_greedy, device=logits.device)[:, None, None]
    return torch.where(certain, plain, sampling.probs(logits).log().clamp(max=0))
