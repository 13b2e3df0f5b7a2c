"""Drafters that need no model, as settings."""

from dataclasses import dataclass
from typing import Protocol

from decode.drafters.input_guided import InputGuidedDrafter
from decode.drafters.ngram import NGramDrafter
from decode.drafters.prompt_lookup import PromptLookupDrafter
from decode.drafters.rest import RestDrafter
from decode.drafters.suffix import SuffixDrafter
from decode.drafters.token_recycling import TokenRecyclingDrafter, spreading
from decode.protocols import Drafter
from decode.target import Target


class ModelFree(Protocol):
    """A way of drafting without a model; one of the classes below."""

    def build(self, target: Target) -> Drafter:
        """A drafter for `target` that has seen nothing yet."""
        ...


@dataclass(frozen=True, kw_only=True)
class SuffixDrafts:
    """SuffixDecoding: prompt, output, and the outputs of earlier requests.

    Attributes:
        max_tokens: per draft.
        factor: tokens drafted per matched token; 1 to 4.
        offset: tokens besides.
        min_prob: least estimated chance of acceptance of a drafted token.
        as_tree: draft trees instead of chains.
        sources: "both", "own" (prompt and output) or "past" (outputs, this one's included).
        depth: tokens of match and draft together.
        max_cached_tokens: of past outputs, the oldest go first; -1 for all.
    """

    max_tokens: int = 32
    factor: float = 1.0
    offset: float = 0.0
    min_prob: float = 0.1
    as_tree: bool = False
    sources: str = "both"
    depth: int = 64
    max_cached_tokens: int = -1

    def build(self, target: Target) -> SuffixDrafter:
        """Its drafter."""
        return SuffixDrafter(
            max_tokens=self.max_tokens,
            factor=self.factor,
            offset=self.offset,
            min_prob=self.min_prob,
            as_tree=self.as_tree,
            sources=self.sources,
            depth=self.depth,
            max_cached_tokens=self.max_cached_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Copies from the prompt and the output so far.

    Attributes:
        longest: tokens of a match, at first.
        shortest: at last.
        length: tokens copied.
    """

    longest: int = 3
    shortest: int = 1
    length: int = 10

    def build(self, target: Target) -> PromptLookupDrafter:
        """Its drafter."""
        return PromptLookupDrafter(longest=self.longest, shortest=self.shortest, length=self.length)


@dataclass(frozen=True, kw_only=True)
class InputGuided:
    """Input-guided aggressive decoding, for corrections: the rest of the input.

    Attributes:
        length: tokens per draft; the paper drafts all that is left.
    """

    length: int = 32

    def build(self, target: Target) -> InputGuidedDrafter:
        """Its drafter."""
        return InputGuidedDrafter(length=self.length)


@dataclass(frozen=True, kw_only=True)
class NGram:
    """The commonest next token, by counts of earlier outputs.

    Attributes:
        order: n; 2 is a bigram model.
        length: tokens per draft.
    """

    order: int = 3
    length: int = 4

    def build(self, target: Target) -> NGramDrafter:
        """Its drafter."""
        return NGramDrafter(order=self.order, length=self.length)


@dataclass(frozen=True, kw_only=True)
class Rest:
    """REST: what followed in earlier outputs, the most frequent beginnings as a tree.

    Attributes:
        longest: tokens of a match, at first.
        shortest: at last.
        length: tokens of a continuation.
        size: tokens per draft.
    """

    longest: int = 16
    shortest: int = 2
    length: int = 10
    size: int = 64

    def build(self, target: Target) -> RestDrafter:
        """Its drafter."""
        return RestDrafter(
            longest=self.longest, shortest=self.shortest, length=self.length, size=self.size
        )


@dataclass(frozen=True, kw_only=True)
class TokenRecycling:
    """The target's likeliest tokens behind each token it saw last, as trees of one shape.

    Attributes:
        size: tokens per draft.
        depth: of the deepest.
        width: successors kept per token.
    """

    size: int = 12
    depth: int = 5
    width: int = 8

    def build(self, target: Target) -> TokenRecyclingDrafter:
        """Its drafter."""
        plan = spreading(self.size, self.depth, self.width)
        return TokenRecyclingDrafter(plan, vocab_size=target.vocab_size)
