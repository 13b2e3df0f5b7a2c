"""A batch of drafts: token trees whose root is the last committed token.

Shape legend: B sequences, N nodes (root included), V vocabulary.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Draft(NamedTuple):
    """A batch of draft token trees, padded to the widest.

    Node 0 is the root: the last committed token, whose keys and values are not cached yet. So
    `tokens` is exactly the input of the target's verification forward, row n of its logits is the
    target's view behind node n, and row n of `probs` is what the children of node n were drawn
    from. A chain is a tree of width one; a draft of the root alone is autoregressive decoding.

    Example: root "a", children "b" and "c", and "d" below "b"::

        tokens  = [[a, b, c, d]]      parents = [[-1, 0, 0, 1]]      num_nodes = [4]

    Attributes:
        tokens: [B, N] int64; column 0 holds the roots.
        parents: [B, N] int64; parents[b, n] < n, and -1 at the root.
        num_nodes: [B] int64; nodes at or past it are padding.
        probs: [B, N, V], the law of each node's children, or None where the children were chosen
            with certainty (n-gram, suffix and greedy drafters).
        is_chain: every node's parent is the node before it, in every row.
        without_replacement: siblings were drawn one after the other from what `probs` leaves
            without those before them; else each was drawn from `probs` as it stands.
    """

    tokens: Tensor
    parents: Tensor
    num_nodes: Tensor
    probs: Tensor | None = None
    is_chain: bool = False
    without_replacement: bool = False

    @classmethod
    def chain(
        cls, tokens: Tensor, *, num_nodes: Tensor | None = None, probs: Tensor | None = None
    ) -> "Draft":
        """Chains from `tokens` [B, N], roots first; `num_nodes` [B] where they differ in length."""
        batch, width = tokens.shape
        parents, full = _chain_of(batch, width, "cpu" if tokens.is_cpu else tokens.device)
        return cls(tokens, parents, full if num_nodes is None else num_nodes, probs, is_chain=True)

    @classmethod
    def from_lists(
        cls,
        roots: list[int],
        tokens: list[list[int]],
        parents: list[list[int]] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> "Draft":
        """Trees from ragged lists, without probabilities.

        Args:
            roots: the last committed token of each sequence.
            tokens: the drafted tokens of each sequence, without the root.
            parents: for each drafted token the node above it (0 is the root, node n is drafted
                token n-1); None makes chains.
            device: where the tensors go.
        """
        num_nodes = [1 + len(row) for row in tokens]
        width = max(num_nodes, default=1)
        padded = [
            [root, *row, *[0] * (width - 1 - len(row))]
            for root, row in zip(roots, tokens, strict=True)
        ]
        tokens_BN = torch.tensor(padded, dtype=torch.long, device=device).view(len(roots), width)
        counts = torch.tensor(num_nodes, dtype=torch.long, device=device)
        if parents is None:
            return cls.chain(tokens_BN, num_nodes=counts)
        above = [[-1, *row, *range(len(row), width - 1)] for row in parents]
        draft = cls(tokens_BN, torch.tensor(above, dtype=torch.long, device=device), counts)
        draft.validate()
        return draft

    def to(self, device: torch.device) -> "Draft":
        """The same on another device."""
        if self.tokens.device == device:
            return self
        return self._replace(
            tokens=self.tokens.to(device),
            parents=self.parents.to(device),
            num_nodes=self.num_nodes.to(device),
            probs=None if self.probs is None else self.probs.to(device),
        )

    @property
    def valid(self) -> Tensor:
        """[B, N] bool: which nodes are not padding."""
        nodes = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return nodes < self.num_nodes[:, None]

    def ancestors(self) -> Tensor:
        """[B, N, N] bool: True where the column is the row's node or above it.

        This is the part of the attention mask that lies inside the tree.
        """
        batch, width = self.tokens.shape
        eye = torch.eye(width, dtype=torch.bool, device=self.tokens.device)
        if self.is_chain:
            return eye.new_ones(width, width).tril().expand(batch, width, width)
        mask = eye.expand(batch, width, width).clone()
        rows = torch.arange(batch, device=self.tokens.device)
        for node in range(1, width):
            mask[:, node] |= mask[rows, self.parents[:, node]]
        return mask

    def children(self) -> Tensor:
        """[B, N, K] int64: the children of each node in their order, then 0, which is nobody's."""
        nodes = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        is_child = (self.parents[:, None] == nodes[:, None]) & self.valid[:, None]  # [B, N, N]
        counts = is_child.sum(-1)
        order = is_child.byte().argsort(dim=-1, descending=True, stable=True)
        order = order[..., : max(int(counts.max()), 1)]
        return torch.where(nodes[: order.shape[-1]] < counts[..., None], order, 0)

    def depths(self) -> Tensor:
        """[B, N] int64: edges between each node and the root."""
        if self.is_chain:
            return torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(
                self.tokens
            )
        return self.ancestors().sum(-1) - 1

    def validate(self) -> None:
        """Raise ValueError where the shapes or the parents are not those of a token tree."""
        if self.tokens.shape != self.parents.shape or self.tokens.ndim != 2:
            raise ValueError(
                f"tokens and parents must both be [B, N], got {tuple(self.tokens.shape)} "
                f"and {tuple(self.parents.shape)}"
            )
        nodes = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        if not ((self.parents[:, 0] == -1).all() and (self.parents < nodes).all()):
            raise ValueError("every parent must come before its child, and the root's must be -1")
        if not (self.parents[:, 1:] >= 0).all():
            raise ValueError("only node 0 may be a root")
        if self.num_nodes.min() < 1 or self.num_nodes.max() > self.tokens.shape[1]:
            raise ValueError(f"num_nodes must lie in 1..{self.tokens.shape[1]}")


@lru_cache(maxsize=64)
def _chain_of(batch: int, width: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Parents [B, N] and number of nodes [B] of full chains; the same for every step."""
    parents = torch.arange(-1, width - 1, device=device).expand(batch, width)
    return parents, torch.full((batch,), width, device=device)
