"""Drafters, one way of drafting per file."""

from decode.drafters.drafting import (
    Chains,
    ConfidentChains,
    CostAwareChains,
    Drafting,
    DynamicTrees,
    ExpansionTrees,
    HeuristicChains,
    HybridChains,
    MergedTrees,
    PlannedTrees,
)
from decode.drafters.gate import Gate, load_gate, save_gate
from decode.drafters.heads import HeadsDrafter
from decode.drafters.hybrid import HybridDrafter
from decode.drafters.input_guided import InputGuidedDrafter
from decode.drafters.likeliest_paths import LikeliestPaths
from decode.drafters.lm import LMDrafter
from decode.drafters.lm_tree import LMTreeDrafter
from decode.drafters.loading import load_drafter
from decode.drafters.merged import MergedDrafter
from decode.drafters.model_free import (
    InputGuided,
    ModelFree,
    NGram,
    PromptLookup,
    Rest,
    SuffixDrafts,
    TokenRecycling,
)
from decode.drafters.ngram import NGramDrafter
from decode.drafters.none import NoDrafter
from decode.drafters.planned_trees import DistinctChildren, IndependentChildren, LikeliestChildren
from decode.drafters.prompt_lookup import PromptLookupDrafter
from decode.drafters.rest import RestDrafter
from decode.drafters.suffix import SuffixDrafter
from decode.drafters.token_recycling import TokenRecyclingDrafter

__all__ = [
    "Chains",
    "ConfidentChains",
    "CostAwareChains",
    "DistinctChildren",
    "Drafting",
    "DynamicTrees",
    "ExpansionTrees",
    "Gate",
    "HeadsDrafter",
    "HeuristicChains",
    "HybridChains",
    "HybridDrafter",
    "IndependentChildren",
    "InputGuided",
    "InputGuidedDrafter",
    "LMDrafter",
    "LMTreeDrafter",
    "LikeliestChildren",
    "LikeliestPaths",
    "MergedDrafter",
    "MergedTrees",
    "ModelFree",
    "NGram",
    "NGramDrafter",
    "NoDrafter",
    "PlannedTrees",
    "PromptLookup",
    "PromptLookupDrafter",
    "Rest",
    "RestDrafter",
    "SuffixDrafter",
    "SuffixDrafts",
    "TokenRecycling",
    "TokenRecyclingDrafter",
    "load_drafter",
    "load_gate",
    "save_gate",
]
