"""Drafters, one way of drafting per file."""

from decode.drafters.likeliest_paths import LikeliestPaths
from decode.drafters.lm import LMDrafter
from decode.drafters.lm_tree import LMTreeDrafter
from decode.drafters.loading import load_drafter
from decode.drafters.none import NoDrafter
from decode.drafters.planned_trees import DistinctChildren, IndependentChildren, LikeliestChildren

__all__ = [
    "DistinctChildren",
    "IndependentChildren",
    "LMDrafter",
    "LMTreeDrafter",
    "LikeliestChildren",
    "LikeliestPaths",
    "NoDrafter",
    "load_drafter",
]
