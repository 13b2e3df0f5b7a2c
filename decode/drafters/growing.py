"""A step's trees while they grow: what the drafter has read of them, and what it has drafted.

A drafter reads only the nodes that are to have children, level by level. So a node has two numbers:
its place among the nodes read, and its place in the draft.

Shape legend: B sequences, R nodes read, W nodes of one level, N nodes drafted, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from decode.draft import Draft
from decode.drafters.reading import Reader
from decode.sampling import SamplingBatch


class GrowingTree(Protocol):
    """The nodes read so far, the root first.

    Attributes:
        logits: [B, W, V] behind the nodes read last.
    """

    logits: Tensor

    @property
    def num_read(self) -> int:
        """R."""
        ...

    def read(self, tokens: Tensor, parents: Tensor) -> None:
        """Read the `tokens` [B, W] of the next level.

        `parents` [B, W] are places among the nodes read before, all in the level above.
        """
        ...


class TreeInCache(GrowingTree):
    """The tree that a language model reads.

    Nothing of it is committed to the cache: the keys of each level lie behind those of the levels
    above, so that no node is read twice.
    """

    def __init__(self, reader: Reader, slots: list[int], roots: Tensor, logits: Tensor):
        """Begin with `roots` [B, 1], which have been read; `logits` [B, 1, V] are theirs."""
        self.logits = logits
        self._reader = reader
        self._slots = slots
        self._tokens = roots
        self._parents = torch.full_like(roots, -1)
        self._is_chain = True

    @property
    def num_read(self) -> int:
        """How many nodes of each tree were read, the root included."""
        return self._tokens.shape[1]

    def read(self, tokens: Tensor, parents: Tensor) -> None:
        """Read `tokens` [B, W]; `parents` [B, W] are places among the nodes read before."""
        num_read = self.num_read
        self._is_chain &= tokens.shape[1] == 1
        self._tokens = torch.cat([self._tokens, tokens], dim=1)
        self._parents = torch.cat([self._parents, parents], dim=1)
        tree = Draft(
            self._tokens,
            self._parents,
            torch.full((len(tokens),), self.num_read, device=tokens.device),
            is_chain=self._is_chain,
        )
        forward = self._reader.cached.forward
        self.logits = forward(self._slots, tokens, tree=tree, num_read=num_read).logits


@dataclass(frozen=True, slots=True)
class Level:
    """The nodes of one depth, or of several, parents before children.

    Attributes:
        tokens: [B, W].
        parents: [B, W] places of the nodes above, among the nodes read.
        places: [B, W] their own places among the nodes read, -1 where they were not read.
        is_drafted: [B, W] False where the node is to be left out, with all that is below it.
    """

    tokens: Tensor
    parents: Tensor
    places: Tensor
    is_drafted: Tensor


@dataclass(frozen=True, slots=True)
class Growth:
    """What a shape has made of a growing tree.

    Attributes:
        levels: the drafted nodes.
        laws: [B, R, V] what the children of each node read were drawn from, or None where they
            were chosen with certainty.
        is_chain: no node has more than one child.
        without_replacement: siblings were drawn so.
    """

    levels: Sequence[Level]
    laws: Tensor | None = None
    is_chain: bool = False
    without_replacement: bool = False


class TreeShape(Protocol):
    """Decides which nodes a tree has."""

    @property
    def depth(self) -> int:
        """Of the deepest node."""
        ...

    @property
    def num_children(self) -> int:
        """Of the node that has most."""
        ...

    def grow(self, tree: GrowingTree, depths: list[int], sampling: SamplingBatch) -> Growth:
        """Grow `tree` from its root, no deeper than `depths`, the deepest at least 1."""
        ...


def harvest(roots: Tensor, growth: Growth) -> tuple[Draft, Tensor]:
    """The draft, without what is left out, and [B, N] the place of each node among those read.

    Nodes that were not read, and padding, have the place -1.
    """
    first = torch.zeros_like(roots)
    levels = [Level(roots, first, first, first == 0), *growth.levels]
    tokens = torch.cat([level.tokens for level in levels], dim=1)
    parents = torch.cat([level.parents for level in levels], dim=1)
    places = torch.cat([level.places for level in levels], dim=1)
    is_drafted = torch.cat([level.is_drafted for level in levels], dim=1)

    num_nodes = is_drafted.sum(1)
    order = is_drafted.byte().argsort(dim=1, descending=True, stable=True)
    order = order[:, : int(num_nodes.max())]
    nodes = torch.arange(order.shape[1], device=roots.device).expand_as(order)
    is_node = nodes < num_nodes[:, None]
    tokens = tokens.gather(1, order)
    places = torch.where(is_node, places.gather(1, order), -1)

    probs = None
    if growth.laws is not None:
        rows = torch.arange(len(roots), device=roots.device)[:, None]
        probs = growth.laws[rows, places.clamp(min=0)]
        probs *= (places >= 0)[..., None]
    if growth.is_chain:
        return Draft.chain(tokens, num_nodes=num_nodes, probs=probs), places
    # Which node of the draft lies at each place; what was not read goes behind the last one.
    num_places = int(places.max()) + 1
    node_at = nodes.new_zeros(len(roots), num_places + 1)
    node_at.scatter_(1, torch.where(places >= 0, places, num_places), nodes)
    above = node_at.gather(1, torch.where(is_node, parents.gather(1, order), 0))
    above[:, 0] = -1
    drawn_so = growth.without_replacement
    return Draft(tokens, above, num_nodes, probs, without_replacement=drawn_so), places
