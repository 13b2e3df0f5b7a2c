"""Drafters, one way of drafting per file."""

from decode.drafters.lm import LMDrafter
from decode.drafters.loading import load_drafter
from decode.drafters.none import NoDrafter

__all__ = ["LMDrafter", "NoDrafter", "load_drafter"]
