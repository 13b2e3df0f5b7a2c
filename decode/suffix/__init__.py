"""Drafting from text that was seen before (SuffixDecoding, Oliaro et al. 2024)."""

from decode.suffix.cache import SuffixDecodingCache
from decode.suffix.drafts import SuffixDraft

__all__ = ["SuffixDecodingCache", "SuffixDraft"]
