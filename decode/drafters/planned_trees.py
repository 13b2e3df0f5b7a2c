"""Trees of a planned shape: where the nodes hang is fixed, which tokens they are is found here.

Shape legend: B sequences, W nodes of one level, P parents of theirs, K children of each, V
vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from decode.drafters.growing import GrowingTree, Growth, Level
from decode.planner import TreePlan
from decode.sampling import SamplingBatch, draw


@dataclass(frozen=True)
class PlannedTree:
    """A tree whose shape is known beforehand.

    Attributes:
        plan: its shape.
    """

    plan: TreePlan

    def __post_init__(self) -> None:
        """Refuse a plan without a node."""
        if self.plan.num_drafted == 0:
            raise ValueError("the plan has no node below its root; or use NoDrafter")

    @property
    def depth(self) -> int:
        """Of the deepest node."""
        return self.plan.depth

    @property
    def num_children(self) -> int:
        """How far down a node's ranking children are looked for."""
        return max(self.plan.ranks) + 1


class LikeliestChildren(PlannedTree):
    """The child of rank r is the drafter's token of rank r: chosen with certainty.

    SpecInfer's expansion-based trees (Miao et al. 2023), where the plan is an expansion.
    """

    def grow(self, tree: GrowingTree, depths: list[int], sampling: SamplingBatch) -> Growth:
        """Grow `tree` from its root, no deeper than `depths`."""
        levels = _grow(self.plan, tree, depths, lambda logits, layer: likeliest(logits, layer.num))
        return Growth(levels, is_chain=self.plan.is_chain)


class IndependentChildren(PlannedTree):
    """Children are drawn independently from the law that the sequence's sampling makes.

    SpecInfer (Miao et al. 2023), and what its Algorithm 2, `SpeculativeSampling`, judges without
    loss. Equal children stay two nodes: the rule counts on how many were drawn. Greedy sequences
    get the likeliest children.
    """

    def grow(self, tree: GrowingTree, depths: list[int], sampling: SamplingBatch) -> Growth:
        """Grow `tree` from its root, no deeper than `depths`."""
        return _grow_drawn(self.plan, tree, depths, sampling, independent)


class DistinctChildren(PlannedTree):
    """Children are drawn without replacement: from what the law leaves without those before them.

    MCSD (Yang et al. 2024) and Sequoia (Chen et al. 2024). The rule for children drawn so is
    `RecursiveRejection`. `Draft.probs` holds the law of the first child.
    Where a law has no tokens left a node has fewer children than planned. Greedy sequences get the
    likeliest children.
    """

    def __post_init__(self) -> None:
        """Refuse a plan that leaves out a draw: those behind it hang on it."""
        super().__post_init__()
        if self.plan.has_gaps:
            raise ValueError("children drawn without replacement need ranks 0, 1, .. without gaps")

    def grow(self, tree: GrowingTree, depths: list[int], sampling: SamplingBatch) -> Growth:
        """Grow `tree` from its root, no deeper than `depths`."""
        growth = _grow_drawn(self.plan, tree, depths, sampling, distinct)
        return replace(growth, without_replacement=growth.laws is not None)


class _Layer(NamedTuple):
    """The nodes of one depth of a plan.

    Attributes:
        num: how many children each parent is asked for.
        nodes: [W] their numbers in the plan, without the root.
        columns: [W] which of the parents each hangs from.
        ranks: [W] which of its children it is.
        parents: [W] the parents' places among the nodes read.
        places: [W] their own, -1 where they have no children.
        inner: the columns of those that have children.
    """

    num: int
    nodes: Tensor
    columns: Tensor
    ranks: Tensor
    parents: Tensor
    places: Tensor
    inner: Tensor


Children = tuple[Tensor, Tensor]  # [B, P, K] tokens, and whether they are possible


def likeliest(logits: Tensor, num: int) -> Children:
    """The `num` likeliest tokens by `logits` [B, P, V], the likeliest first."""
    top = logits.topk(num, dim=-1)
    return top.indices, top.values > -torch.inf


def independent(laws: Tensor, uniforms: Tensor) -> Children:
    """Tokens by inversion: one from `laws` [B, P, V] for each of `uniforms` [B, P, K]."""
    rows = laws.flatten(0, 1)
    tokens = [draw(rows, column.flatten()).view_as(column) for column in uniforms.unbind(-1)]
    return torch.stack(tokens, dim=-1), torch.ones_like(uniforms, dtype=torch.bool)


def distinct(laws: Tensor, uniforms: Tensor) -> Children:
    """The same without replacement: draw k is from the law without draws 0 to k - 1.

    Which is the law of the k largest logits with Gumbel noise (Kool et al. 2019), at one uniform
    number per child instead of one per token.
    """
    rows = laws.flatten(0, 1).clone()
    tokens, possible = [], []
    for column in uniforms.unbind(-1):
        possible.append((rows.sum(-1) > 0).view_as(column))
        token = draw(rows, column.flatten())
        rows.scatter_(1, token[:, None], 0.0)
        tokens.append(token.view_as(column))
    return torch.stack(tokens, dim=-1), torch.stack(possible, dim=-1)


def _grow_drawn(
    plan: TreePlan,
    tree: GrowingTree,
    depths: list[int],
    sampling: SamplingBatch,
    draw_children: Callable[[Tensor, Tensor], Children],
) -> Growth:
    if sampling.is_greedy:
        return LikeliestChildren(plan).grow(tree, depths, sampling)
    device = tree.logits.device
    # Nodes come level by level: those within reach of a sequence are the first ones.
    counts = [sum(depth <= deepest for depth in plan.depths) for deepest in depths]
    uniforms = sampling.uniforms(counts, device)
    is_greedy = torch.tensor([params.temperature == 0 for params in sampling.params], device=device)
    laws = []

    def choose(logits: Tensor, layer: _Layer) -> Children:
        laws.append(sampling.probs(logits))
        own = uniforms.new_zeros(*logits.shape[:2], layer.num)
        own[:, layer.columns, layer.ranks] = uniforms[:, layer.nodes]
        drawn, is_possible = draw_children(laws[-1], own)
        if not is_greedy.any():
            return drawn, is_possible
        top, has_token = likeliest(logits, layer.num)
        certain = is_greedy[:, None, None]
        return torch.where(certain, top, drawn), torch.where(certain, has_token, is_possible)

    levels = _grow(plan, tree, depths, choose)
    return Growth(levels, torch.cat(laws, dim=1), plan.is_chain)


def _grow(
    plan: TreePlan,
    tree: GrowingTree,
    depths: list[int],
    choose: Callable[[Tensor, _Layer], Children],
) -> list[Level]:
    device, batch = tree.logits.device, len(depths)
    limits, deepest = torch.tensor(depths, device=device)[:, None], max(depths)
    is_there = limits > 0  # [B, P] whether the parents are drafted
    levels = []
    for depth, layer in enumerate(_layers(plan, device)[:deepest], start=1):
        tokens, is_possible = choose(tree.logits, layer)
        tokens = tokens[:, layer.columns, layer.ranks]
        is_drafted = is_possible[:, layer.columns, layer.ranks] & is_there[:, layer.columns]
        is_drafted = is_drafted & (depth <= limits)
        parents = layer.parents.expand(batch, -1)
        # The deepest nodes of a sequence are not read, or stand behind the drafter's context.
        places = torch.where(depth < limits, layer.places, -1)
        levels.append(Level(tokens, parents, places, is_drafted))
        if depth < deepest:
            tree.read(tokens[:, layer.inner], parents[:, layer.inner])
            is_there = is_drafted[:, layer.inner]
    return levels


@lru_cache(maxsize=64)
def _layers(plan: TreePlan, device: torch.device) -> list[_Layer]:
    """The plan, level by level, as indices on `device`."""
    has_children = set(plan.parents)
    place = {0: 0}  # of the nodes that are read
    column = {0: 0}  # of the same, in their level
    layers = []
    for depth in range(1, plan.depth + 1):
        nodes = [node for node, at in enumerate(plan.depths, start=1) if at == depth]
        inner = [index for index, node in enumerate(nodes) if node in has_children]
        for index, at in enumerate(inner):
            place[nodes[at]] = len(place)
            column[nodes[at]] = index
        above = [plan.parents[node - 1] for node in nodes]
        ranks = [plan.ranks[node - 1] for node in nodes]
        rows = [
            [node - 1 for node in nodes],
            [column[node] for node in above],
            ranks,
            [place[node] for node in above],
            [place.get(node, -1) for node in nodes],
            inner,
        ]
        layers.append(_Layer(max(ranks) + 1, *(torch.tensor(row, device=device) for row in rows)))
    return layers
