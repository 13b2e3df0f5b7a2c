"""Which tree to draft: the best shape for a node budget, from measured acceptance.

An acceptance profile holds the probability that a node's child of rank r (0 is the likeliest, or
the first drawn) is the accepted one, given that the node was accepted: a vector [R] where depth
does not matter, else one row per depth, [D][R]. A tree is expected to give the sum over its nodes
of the product of the probabilities on the way down to each.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Path = tuple[int, ...]  # a node, as the ranks on the way down to it
Profile = Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class TreePlan:
    """The shape of a draft tree, level by level; `dataclasses.asdict` of it is JSON.

    Example: two children below the root, and the likeliest child below the first of them::

        TreePlan(parents=(0, 0, 1), ranks=(0, 1, 0))

    Attributes:
        parents: for each drafted token the node above it: 0 is the root, node n is drafted token
            n - 1.
        ranks: which of its parent's children it is, 0 the likeliest or the first drawn.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what is no tree; lists, as JSON gives them, become tuples."""
        object.__setattr__(self, "parents", tuple(self.parents))
        object.__setattr__(self, "ranks", tuple(self.ranks))
        if len(self.parents) != len(self.ranks):
            raise ValueError(
                f"a plan needs a rank for every parent, got {len(self.parents)} parents and "
                f"{len(self.ranks)} ranks"
            )
        for node, parent in enumerate(self.parents, start=1):
            if not 0 <= parent < node:
                raise ValueError(f"the parent of node {node} must lie before it, got {parent}")
        if min(self.ranks, default=0) < 0:
            raise ValueError(f"ranks count from 0, got {min(self.ranks)}")
        depths = self.depths
        if list(depths) != sorted(depths):
            raise ValueError(f"nodes must come level by level, got the depths {depths}")
        if len(set(zip(self.parents, self.ranks, strict=True))) < len(self.parents):
            raise ValueError("two children of one node have the same rank")

    @classmethod
    def expansion(cls, counts: Sequence[int]) -> "TreePlan":
        """Every node of depth i has counts[i] children: SpecInfer (Miao et al. 2023).

        Raises:
            ValueError: a count is below 1.
        """
        if min(counts, default=1) < 1:
            raise ValueError(f"every level needs at least one child per node, got {list(counts)}")
        parents: list[int] = []
        ranks: list[int] = []
        level = [0]
        for count in counts:
            first = len(parents) + 1
            for node in level:
                parents += [node] * count
                ranks += range(count)
            level = list(range(first, len(parents) + 1))
        return cls(tuple(parents), tuple(ranks))

    @property
    def num_drafted(self) -> int:
        """Nodes without the root."""
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """The depth of each drafted token, 1 below the root."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths[1:])

    @property
    def depth(self) -> int:
        """Of the deepest node; 0 for the root alone."""
        return max(self.depths, default=0)

    @property
    def is_chain(self) -> bool:
        """Every node's parent is the node before it."""
        return self.parents == tuple(range(len(self.parents)))

    @property
    def has_gaps(self) -> bool:
        """Some node has a child of rank r but none of rank r - 1."""
        children = set(zip(self.parents, self.ranks, strict=True))
        return any(rank > 0 and (parent, rank - 1) not in children for parent, rank in children)


def expected_accepted(plan: TreePlan, acceptance: Profile) -> float:
    """Draft tokens that `plan` is expected to have accepted; 0 for what the profile leaves out."""
    rows = _rows(acceptance, plan.depth)
    reached = [1.0]
    for parent, rank, depth in zip(plan.parents, plan.ranks, plan.depths, strict=True):
        row = rows[depth - 1] if depth <= len(rows) else []
        reached.append(reached[parent] * (row[rank] if rank < len(row) else 0.0))
    return math.fsum(reached[1:])


def plan_without_gaps(acceptance: Sequence[float], *, budget: int, depth: int) -> TreePlan:
    """The best tree whose nodes have children of rank 0, 1, .. without gaps, as drawn ones do.

    Sequoia's dynamic programme (Chen et al. 2024), with its limit on depth: the best
    subtree gives some of its nodes to the child of rank 0, some of the rest to that of rank 1, and
    so on. The acceptance need not fall with the rank.

    Args:
        acceptance: [R], the same at every depth.
        budget: drafted nodes at most; the root is not counted.
        depth: of the deepest node at most.

    Raises:
        ValueError: a probability outside [0, 1], or a limit below 0.
    """
    _check_limits(budget, depth)
    (chances,) = _rows(acceptance, 1)
    # best[d, n]: value of the best subtree of n nodes, its top counted as one, d levels below it.
    # split[r, m]: of m nodes shared out among the children of rank r and above.
    best = np.full((depth + 1, budget + 2), -np.inf)
    best[:, 1] = 1.0
    shares = np.zeros((depth + 1, len(chances), budget + 1), dtype=np.int64)
    for level in range(1, depth + 1):
        split = np.full((len(chances) + 1, budget + 1), -np.inf)
        split[:, 0] = 0.0
        is_possible = np.isfinite(best[level - 1])
        for rank, chance in reversed(list(enumerate(chances))):
            gain = np.where(
                is_possible, chance * np.where(is_possible, best[level - 1], 0), -np.inf
            )
            for nodes in range(1, budget + 1):
                values = gain[1 : nodes + 1] + split[rank + 1, nodes - 1 :: -1]
                share = int(values.argmax())
                split[rank, nodes] = values[share]
                shares[level, rank, nodes] = share + 1
        best[level, 1:] = 1.0 + split[0]
    num_nodes = int(best[depth, 1:].argmax()) + 1  # of the best, the smallest
    return _from_paths(list(_paths(shares, num_nodes, depth)))


def plan_best_first(acceptance: Profile, *, budget: int, depth: int) -> TreePlan:
    """The best tree where any of a node's children may be chosen, as among the likeliest tokens.

    Medusa (Cai et al. 2024): the most valuable node that hangs on the tree comes
    next. No node is worth more than its parent: the result holds the most valuable nodes of all.

    Args:
        acceptance: [D][R], or [R] for the same at every depth.
        budget: drafted nodes at most; the root is not counted.
        depth: of the deepest node at most.

    Raises:
        ValueError: a probability outside [0, 1], or a limit below 0.
    """
    _check_limits(budget, depth)
    rows = _rows(acceptance, depth)[:depth]
    chosen: list[Path] = []
    waiting: list[tuple[float, Path]] = [(-1.0, ())]
    while waiting and len(chosen) <= budget:
        value, path = heapq.heappop(waiting)
        chosen.append(path)
        for rank, chance in enumerate(rows[len(path)] if len(path) < len(rows) else []):
            if chance > 0:
                heapq.heappush(waiting, (value * chance, (*path, rank)))
    return _from_paths(chosen[1:])


def _paths(shares: NDArray[np.int64], num_nodes: int, depth: int) -> Iterator[Path]:
    """The nodes below the top of the best subtree of `num_nodes` nodes.

    Args:
        shares: [depth, rank, nodes], how many of the nodes for this rank and above it gets.
        num_nodes: top included.
        depth: levels below the top.
    """
    left, rank = num_nodes - 1, 0
    while left:
        share = int(shares[depth, rank, left])
        yield (rank,)
        yield from ((rank, *path) for path in _paths(shares, share, depth - 1))
        left, rank = left - share, rank + 1


def _from_paths(paths: Sequence[Path]) -> TreePlan:
    ordered = sorted(paths, key=lambda path: (len(path), path))
    number = {(): 0} | {path: node for node, path in enumerate(ordered, start=1)}
    parents = tuple(number[path[:-1]] for path in ordered)
    return TreePlan(parents, tuple(path[-1] for path in ordered))


def _rows(acceptance: Profile, depth: int) -> list[list[float]]:
    """One row per depth; a vector is repeated down to `depth`."""
    flat = [value for value in acceptance if not isinstance(value, Sequence)]
    rows = [list(value) for value in acceptance if isinstance(value, Sequence)]
    if flat and rows:
        raise ValueError("an acceptance profile is a vector or a matrix, got something of both")
    rows = rows or [flat] * depth
    for value in itertools.chain(flat, *rows):
        if not 0 <= value <= 1:
            raise ValueError(f"acceptance must lie in [0, 1], got {value}")
    return rows


def _check_limits(budget: int, depth: int) -> None:
    if budget < 0 or depth < 0:
        raise ValueError(f"budget and depth must be >= 0, got {budget} and {depth}")
