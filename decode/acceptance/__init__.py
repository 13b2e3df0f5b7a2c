"""Acceptance rules, one per file."""

from decode.acceptance.block import BlockVerification
from decode.acceptance.blockwise import NearTokens, TopTokens
from decode.acceptance.greedy import Greedy
from decode.acceptance.k_sequence import KSequence
from decode.acceptance.lenient import Lenient
from decode.acceptance.rollback import Rollback
from decode.acceptance.sampling import SpeculativeSampling
from decode.acceptance.traversal import TraversalVerification
from decode.acceptance.typical import Typical
from decode.acceptance.without_replacement import RecursiveRejection

__all__ = [
    "BlockVerification",
    "Greedy",
    "KSequence",
    "Lenient",
    "NearTokens",
    "RecursiveRejection",
    "Rollback",
    "SpeculativeSampling",
    "TopTokens",
    "TraversalVerification",
    "Typical",
]
