"""Drafting from text that was seen before (SuffixDecoding, Oliaro et al. 2024)."""

from decode.suffix.cache import SuffixDecodingCache
from decode.suffix.drafts import SuffixDraft
from decode.suffix.for_vllm import install_for_vllm

__all__ = ["SuffixDecodingCache", "SuffixDraft", "install_for_vllm"]
