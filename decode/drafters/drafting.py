"""How a language model or heads draft, as settings: each builds the drafter of one checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from transformers import PreTrainedModel

from decode.cost import measure_by_batch, measure_costs
from decode.draft_length import Confidence, Constant, CostAware, Heuristic
from decode.drafters.gate import load_gate
from decode.drafters.growing import TreeShape
from decode.drafters.heads import HeadsDrafter
from decode.drafters.hybrid import HybridDrafter
from decode.drafters.likeliest_paths import LikeliestPaths
from decode.drafters.lm import LMDrafter
from decode.drafters.lm_tree import LMTreeDrafter
from decode.drafters.merged import MergedDrafter
from decode.drafters.model_free import SuffixDrafts
from decode.drafters.planned_trees import (
    DistinctChildren,
    IndependentChildren,
    LikeliestChildren,
)
from decode.models.heads import Heads
from decode.planner import TreePlan
from decode.protocols import Drafter
from decode.target import Target

LONGEST_TIMED = 16  # a longer suffix draft is taken to cost as much

DraftModel: TypeAlias = PreTrainedModel | Heads


class Drafting(Protocol):
    """How to draft with a model; one of the classes below."""

    def build(self, model: DraftModel, target: Target) -> Drafter:
        """A drafter for `target`; what it learns is its own."""
        ...


@dataclass(frozen=True, kw_only=True)
class Chains:
    """Chains of one length.

    Attributes:
        length: tokens per draft.
        min_confidence: where the drafter gives its likeliest token less than this, it stops (BiLD's
            fallback, Kim et al. 2023).
    """

    length: int = 5
    min_confidence: float = 0.0

    def build(self, model: DraftModel, target: Target) -> Drafter:
        """Their drafter; of heads the chains are no longer than there are heads."""
        if isinstance(model, Heads) and self.min_confidence == 0:
            shape = IndependentChildren(TreePlan.expansion([1] * self.length))
            return HeadsDrafter(model, target=target, shape=shape)
        length = Constant(self.length, self.min_confidence)
        return LMDrafter(_lm(model, "min_confidence"), target=target, draft_length=length)


@dataclass(frozen=True, kw_only=True)
class HeuristicChains:
    """Two tokens more after a wholly accepted draft, one less after another (transformers).

    Attributes:
        first: tokens of a sequence's first draft.
        longest: tokens at most.
    """

    first: int = 5
    longest: int = 20

    def build(self, model: DraftModel, target: Target) -> Drafter:
        """Their drafter."""
        length = Heuristic(longest=self.longest, first=self.first)
        return LMDrafter(_lm(model, type(self).__name__), target=target, draft_length=length)


@dataclass(frozen=True, kw_only=True)
class ConfidentChains:
    """Chains up to where the drafter is too unsure, by a threshold learnt while decoding.

    Attributes:
        longest: tokens at most.
        min_acceptance: the least chance of acceptance that is worth a token.
    """

    longest: int = 12
    min_acceptance: float = 0.4

    def build(self, model: DraftModel, target: Target) -> Drafter:
        """Their drafter."""
        length = Confidence(longest=self.longest, min_acceptance=self.min_acceptance)
        return LMDrafter(_lm(model, type(self).__name__), target=target, draft_length=length)


@dataclass(frozen=True, kw_only=True)
class CostAwareChains:
    """The length that gives most tokens a second, by costs measured at the start.

    Sampled outputs then follow the target's distribution as ever, but their draws depend on the
    lengths, and these on timings: two runs may differ.

    Attributes:
        longest: tokens at most.
    """

    longest: int = 8

    def build(self, model: DraftModel, target: Target) -> Drafter:
        """Their drafter; the forwards of both models are timed first."""
        drafter = LMDrafter(
            _lm(model, type(self).__name__), target=target, draft_length=self.longest
        )
        costs = measure_by_batch(target.cached, drafter.reader.cached, self.longest)
        drafter.length = CostAware(costs[1], shared=costs)
        return drafter


@dataclass(frozen=True, kw_only=True)
class HybridChains:
    """Text that was seen before where it promises more, chains of the model elsewhere.

    Sampled outputs follow the target's distribution as ever. Without a threshold their draws depend
    on costs that are timed at the start.

    Attributes:
        suffix: how suffixes are drafted.
        length: tokens that the model drafts.
        threshold: accepted tokens to expect of a suffix draft; None learns it.
        gate: folder of a network that says how many to expect; None goes by the score.
    """

    suffix: SuffixDrafts = field(default_factory=SuffixDrafts)
    length: int = 3
    threshold: float | None = None
    gate: str | None = None

    def build(self, model: DraftModel, target: Target) -> Drafter:
        """Their drafter; the forwards of both models are timed first.

        Raises:
            ValueError: the folder holds no gate.
        """
        gate = None if self.gate is None else load_gate(self.gate)
        trained = LMDrafter(
            _lm(model, type(self).__name__), target=target, draft_length=self.length
        )
        longest = max(self.length, min(self.suffix.max_tokens, LONGEST_TIMED))
        costs = measure_costs(target.cached, trained.reader.cached, longest)
        return HybridDrafter(
            self.suffix.build(target),
            trained,
            costs=costs,
            length=self.length,
            threshold=self.threshold,
            gate=gate,
        )


@dataclass(frozen=True, kw_only=True)
class ExpansionTrees:
    """Every node of depth i has counts[i] children: SpecInfer (Miao et al. 2023).

    Attributes:
        counts: children per node, level by level.
        children: "likeliest", "independent" (drawn; for `SpeculativeSampling` and `KSequence`) or
            "distinct" (drawn without replacement; for `RecursiveRejection`).
    """

    counts: tuple[int, ...] = (2, 2, 1)
    children: str = "likeliest"

    def build(self, model: DraftModel, target: Target) -> Drafter:
        """Their drafter."""
        shape = _children(self.children)(TreePlan.expansion(self.counts))
        return _trees(model, target, shape)


@dataclass(frozen=True, kw_only=True)
class PlannedTrees:
    """Trees of a shape that `decode.planner` found.

    Attributes:
        parents: of each drafted token, the root being 0.
        ranks: which of its parent's children each is.
        children: as for `ExpansionTrees`.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    children: str = "likeliest"

    def build(self, model: DraftModel, target: Target) -> Drafter:
        """Their drafter."""
        shape = _children(self.children)(TreePlan(self.parents, self.ranks))
        return _trees(model, target, shape)


@dataclass(frozen=True, kw_only=True)
class DynamicTrees:
    """Trees that grow where the drafter is sure: EAGLE-2 (Li et al. 2024).

    Attributes:
        width: nodes expanded per level, and children looked at for each.
        depth: of the deepest node.
        size: drafted nodes kept.
    """

    width: int = 4
    depth: int = 4
    size: int = 12

    def build(self, model: DraftModel, target: Target) -> Drafter:
        """Their drafter."""
        shape = LikeliestPaths(width=self.width, depth=self.depth, size=self.size)
        return _trees(model, target, shape)


@dataclass(frozen=True, kw_only=True)
class MergedTrees:
    """Branches of suffixes and of the model in one tree, verified together.

    Attributes:
        budget: drafted nodes at most: half of them for suffixes, the others for the model.
        suffix: how suffixes are drafted; as trees, whatever it says of that and of their size.
        width: see `DynamicTrees`.
        depth: see `DynamicTrees`.
    """

    budget: int = 12
    suffix: SuffixDrafts = field(default_factory=SuffixDrafts)
    width: int = 3
    depth: int = 3

    def build(self, model: DraftModel, target: Target) -> Drafter:
        """Their drafter."""
        share = self.budget // 2
        shape = LikeliestPaths(width=self.width, depth=self.depth, size=self.budget - share)
        suffix = replace(self.suffix, as_tree=True, max_tokens=share)
        return MergedDrafter([suffix.build(target), _trees(model, target, shape)])


CHILDREN: dict[str, Callable[[TreePlan], TreeShape]] = {
    "likeliest": LikeliestChildren,
    "independent": IndependentChildren,
    "distinct": DistinctChildren,
}


def _children(name: str) -> Callable[[TreePlan], TreeShape]:
    if name not in CHILDREN:
        raise ValueError(f"children must be one of {', '.join(CHILDREN)}, got {name!r}")
    return CHILDREN[name]


def _trees(model: DraftModel, target: Target, shape: TreeShape) -> Drafter:
    if isinstance(model, Heads):
        return HeadsDrafter(model, target=target, shape=shape)
    return LMTreeDrafter(model, target=target, shape=shape)


def _lm(model: DraftModel, wanted_by: str) -> PreTrainedModel:
    """`model`, where it is a language model."""
    if isinstance(model, Heads):
        raise ValueError(
            f"{wanted_by} is for drafters that are language models; heads draft with Chains, "
            "ExpansionTrees, PlannedTrees, DynamicTrees or MergedTrees"
        )
    return model
