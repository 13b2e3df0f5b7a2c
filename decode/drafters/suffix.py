"""What followed the last tokens before, in this request or in an earlier one, is drafted again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from decode.draft import Draft
from decode.protocols import Context, Drafter
from decode.suffix import SuffixDecodingCache, SuffixDraft


@dataclass(slots=True)
class _Sequence:
    """Who is in a slot: its key in the cache, and how many of its tokens are there."""

    key: int
    prompt_length: int
    length: int


class SuffixDrafter(Drafter):
    """SuffixDecoding (Oliaro et al. 2024): no model, no training, some microseconds a draft.

    It learns from every finished output. Drafts are chosen with certainty, so every rule that
    judges such drafts is lossless on them at any temperature.

    Attributes:
        drafts: what was looked up for the last context, one per sequence.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(
        self,
        *,
        max_tokens: int = 32,
        factor: float = 1.0,
        offset: float = 0.0,
        min_prob: float = 0.1,
        as_tree: bool = False,
        sources: str = "both",
        depth: int = 64,
        max_cached_tokens: int = -1,
    ):
        """Draft from a new cache; the arguments are those of `SuffixDecodingCache`."""
        self.max_tokens, self.factor, self.offset = max_tokens, factor, offset
        self.min_prob, self.as_tree, self.sources = min_prob, as_tree, sources
        self.depth, self.max_cached_tokens = depth, max_cached_tokens
        self.drafts: list[SuffixDraft] = []
        self.forget()

    def forget(self) -> None:
        """Begin with an empty cache; no sequence may be under way."""
        self.cache = SuffixDecodingCache(self.depth, max_cached_tokens=self.max_cached_tokens)
        self._sequences: dict[int, _Sequence] = {}
        self._material: dict[int, Sequence[int]] = {}
        self._started = 0

    def learn(self, output: Sequence[int]) -> None:
        """Keep a finished output for the requests to come."""
        self.cache.add_output(output)

    def consult(self, slot: int, material: Sequence[int]) -> None:
        """Index `material` before the prompt that comes."""
        self._material[slot] = material

    def begin(self, slot: int, prompt: Tensor, hidden: Mapping[int, Tensor]) -> None:
        """Index the prompt, for this request alone."""
        self._started += 1
        sequence = _Sequence(self._started, len(prompt), len(prompt))
        text = prompt.numpy()
        if slot in self._material:
            text = np.concatenate([self._material.pop(slot), text])
        self.cache.start_request(sequence.key, text)
        self._sequences[slot] = sequence

    def propose(self, context: Context) -> Draft:
        """What followed before, as far as `context.room` allows."""
        self.drafts = []
        rows = zip(context.slots, context.lengths, context.room, strict=True)
        for row, (slot, length, room) in enumerate(rows):
            sequence, tokens = self._sequences[slot], context.tokens[row, :length].numpy()
            self.cache.add_active_response(sequence.key, tokens[sequence.length :])
            sequence.length = length
            self.drafts.append(
                self.cache.speculate(
                    sequence.key,
                    tokens[-self.depth :],
                    max_spec_tokens=min(self.max_tokens, room),
                    max_spec_factor=self.factor,
                    max_spec_offset=self.offset,
                    min_token_prob=self.min_prob,
                    use_tree_spec=self.as_tree,
                    sources=self.sources,
                )
            )
        parents = None
        if self.as_tree:  # here the context has the number 0
            parents = [[parent + 1 for parent in draft.parents] for draft in self.drafts]
        roots = context.roots
        return Draft.from_lists(roots, [draft.token_ids for draft in self.drafts], parents)

    def end(self, slot: int, output: Sequence[int]) -> None:
        """The output stays in the cache, for other requests."""
        sequence = self._sequences.pop(slot)
        read = sequence.length - sequence.prompt_length
        self.cache.add_active_response(sequence.key, output[read:])
        self.cache.stop_request(sequence.key)
