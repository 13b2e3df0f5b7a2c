"""Drafters, one way of drafting per file."""

from decode.drafters.drafting import (
    Chains,
    ConfidentChains,
    CostAwareChains,
    Drafting,
    DynamicTrees,
    ExpansionTrees,
    HeuristicChains,
    PlannedTrees,
)
from decode.drafters.likeliest_paths import LikeliestPaths
from decode.drafters.lm import LMDrafter
from decode.drafters.lm_tree import LMTreeDrafter
from decode.drafters.loading import load_drafter
from decode.drafters.merged import MergedDrafter
from decode.drafters.none import NoDrafter
from decode.drafters.planned_trees import DistinctChildren, IndependentChildren, LikeliestChildren

__all__ = [
    "Chains",
    "ConfidentChains",
    "CostAwareChains",
    "DistinctChildren",
    "Drafting",
    "DynamicTrees",
    "ExpansionTrees",
    "HeuristicChains",
    "IndependentChildren",
    "LMDrafter",
    "LMTreeDrafter",
    "LikeliestChildren",
    "LikeliestPaths",
    "MergedDrafter",
    "NoDrafter",
    "PlannedTrees",
    "load_drafter",
]
