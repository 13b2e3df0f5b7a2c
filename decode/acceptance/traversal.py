"""Traversal verification: a tree is judged from its leaves up."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from decode.acceptance.block import accept_block
from decode.acceptance.greedy import Greedy
from decode.acceptance.judged import Judged
from decode.acceptance.tree import unchanged
from decode.acceptance.without_replacement import without
from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch, draw

GREEDY = Greedy()


@dataclass(frozen=True)
class TraversalVerification:
    """Accept a whole path at its leaf, or else give its surplus to the paths beside and above it.

    Weng et al. 2025 (Traversal Verification for Speculative Tree Decoding). A node carries the
    weight min(1, w p(x) / q(x)) of its parent's weight w: its leaf is accepted, and the path with
    it, with that probability; a refused child leaves (w p - q)+ to its siblings and its parent.
    A token that looks bad by itself is not refused before those behind it were seen. On chains this
    is `BlockVerification`. Children may be drawn independently or without replacement.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSLESS

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V], warped as the sequences ask."""
        if sampling.is_greedy:
            return GREEDY.accept(draft, target_logits, sampling)
        target_probs = sampling.probs(target_logits)
        uniforms = sampling.uniforms(draft.num_nodes.tolist(), target_probs.device)
        accept = accept_block if draft.is_chain else accept_traversal
        return accept(draft, target_probs, uniforms).on_host()


def accept_traversal(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Judged:
    """The rule.

    Args:
        draft: trees of N nodes.
        target_probs: [B, N, V].
        uniforms: [B, N]; draw n - 1 judges node n, and the one at the number of drafted nodes
            chooses the next token.
    """
    batch = len(target_probs)
    ends = torch.zeros(batch, dtype=torch.long, device=target_probs.device)
    remaining = target_probs[:, 0].clone()
    shapes: dict[tuple[int, ...], list[int]] = {}  # trees of one shape are walked together
    for row, (parents, count) in enumerate(
        zip(draft.parents.tolist(), draft.num_nodes.tolist(), strict=True)
    ):
        shapes.setdefault(tuple(parents[:count]), []).append(row)
    for parents_of, members in shapes.items():
        rows = torch.tensor(members, device=target_probs.device)
        walk = _Walk(
            parents_of,
            draft.tokens[rows],
            None if draft.probs is None else draft.probs[rows],
            target_probs[rows],
            uniforms[rows],
            without if draft.without_replacement else unchanged,
        )
        walk.visit(0, torch.ones(len(rows), device=rows.device), target_probs[rows, 0])
        ends[rows], remaining[rows] = walk.ends, walk.remaining
    all_rows = torch.arange(batch, device=ends.device)
    next_token = draw(remaining, uniforms[all_rows, draft.num_nodes - 1])
    return _judged(draft, ends, next_token)


class _Walk:
    """Trees of one shape: R rows, each decided at the first node that accepts."""

    def __init__(
        self,
        parents: tuple[int, ...],
        tokens: Tensor,
        laws: Tensor | None,
        target_probs: Tensor,
        uniforms: Tensor,
        next_law: Callable[[Tensor, Tensor], Tensor],
    ):
        self.children: list[list[int]] = [[] for _ in parents]
        for node, parent in enumerate(parents):
            if parent >= 0:
                self.children[parent].append(node)
        self.tokens, self.laws, self.target_probs = tokens, laws, target_probs
        self.uniforms, self.next_law = uniforms, next_law
        self.ends = torch.full_like(tokens[:, 0], -1)
        self.remaining = target_probs[:, 0].clone()

    def visit(self, node: int, weight: Tensor, wanted: Tensor) -> None:
        """Judge the subtree of `node`: its children first, then itself.

        Args:
            node: number of the node.
            weight: [R] the chance with which it is to be accepted, alone or with what is below.
            wanted: [R, V] what the target wants behind it.
        """
        law = None if self.laws is None else self.laws[:, node]
        tiny = torch.finfo(wanted.dtype).tiny
        for child in self.children[node]:
            token = self.tokens[:, child : child + 1]
            if self.laws is None:
                law = torch.zeros_like(wanted).scatter_(1, token, 1.0)
            assert law is not None
            ratio = wanted.gather(1, token) / law.gather(1, token).clamp_min(tiny)
            self.visit(child, (weight * ratio[:, 0]).clamp(max=1.0), self.target_probs[:, child])
            if (self.ends >= 0).all():
                return
            missing = (weight[:, None] * wanted - law).clamp_min(0)
            total = missing.sum(-1)
            weight = total / (total + 1 - weight).clamp_min(tiny)
            has_rest = (total > 0)[:, None]
            wanted = torch.where(has_rest, missing / total[:, None].clamp_min(tiny), wanted)
            law = self.next_law(law, token)
        is_accepted = self.ends < 0
        if node > 0:
            is_accepted &= self.uniforms[:, node - 1] < weight
        self.ends = torch.where(is_accepted, node, self.ends)
        self.remaining = torch.where(is_accepted[:, None], wanted, self.remaining)


def _judged(draft: Draft, ends: Tensor, next_token: Tensor) -> Judged:
    """The path to each end; tried are its tokens, their elder siblings and the end's children."""
    parents = draft.parents.tolist()
    width = draft.tokens.shape[1]
    paths, counts, tried = [], [], []
    for row, (end, num_nodes) in enumerate(
        zip(ends.tolist(), draft.num_nodes.tolist(), strict=True)
    ):
        path = [end]
        while path[-1] > 0:
            path.append(parents[row][path[-1]])
        path.reverse()
        follower = dict(pairwise(path))  # of a node on the path, the one after
        tried.append(
            sum(
                parents[row][node] in path and node <= follower.get(parents[row][node], num_nodes)
                for node in range(1, num_nodes)
            )
        )
        counts.append(len(path) - 1)
        paths.append(path + [-1] * (width - len(path)))
    device = ends.device
    return Judged(
        torch.tensor(paths, device=device),
        torch.tensor(counts, device=device),
        next_token,
        torch.tensor(tried, device=device),
    )
