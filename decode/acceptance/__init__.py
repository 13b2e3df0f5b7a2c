"""Acceptance rules, one per file."""

from decode.acceptance.greedy import Greedy
from decode.acceptance.sampling import SpeculativeSampling

__all__ = ["Greedy", "SpeculativeSampling"]
