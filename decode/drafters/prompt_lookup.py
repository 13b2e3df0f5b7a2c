"""What followed the last few tokens earlier in the same text, or in another one, is copied."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from decode.draft import Draft
from decode.protocols import Context, Drafter


class PromptLookupDrafter(Drafter):
    """LLMA (Yang et al. 2023), prompt lookup decoding (Saxena 2023).

    The longest of the last `longest` to `shortest` tokens that stand earlier in prompt or output
    are looked for, most recent first; the next `length` tokens there are the draft. A request's
    material, LLMA's reference, stands before its prompt.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, *, longest: int = 3, shortest: int = 1, length: int = 10):
        """Draft up to `length` tokens.

        Raises:
            ValueError: the lengths are out of order.
        """
        if not 1 <= shortest <= longest or length < 0:
            raise ValueError(
                f"matches of {shortest} to {longest} tokens and copies of {length} cannot be made"
            )
        self.longest, self.shortest, self.length = longest, shortest, length
        self._material: dict[int, NDArray[np.int64]] = {}

    def consult(self, slot: int, material: Sequence[int]) -> None:
        """Copies may come from `material`."""
        self._material[slot] = np.array(material, dtype=np.int64)

    def propose(self, context: Context) -> Draft:
        """Copies, as long as `context.room` allows."""
        rows = zip(context.slots, context.lengths, context.room, strict=True)
        copies = []
        for row, (slot, length, room) in enumerate(rows):
            tokens = context.tokens[row, :length].numpy()
            if slot in self._material:
                tokens = np.concatenate([self._material[slot], tokens])
            copies.append(self.copy(tokens)[: min(self.length, room)].tolist())
        return Draft.from_lists(context.roots, copies)

    def end(self, slot: int, output: Sequence[int]) -> None:
        """Its material is of no use to others."""
        self._material.pop(slot, None)

    def copy(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands behind the last match; nothing without one."""
        for size in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            candidates = len(tokens) - size  # places where an earlier match may begin
            found = np.ones(candidates, dtype=bool)
            for offset in range(size):
                found &= tokens[offset : offset + candidates] == tokens[candidates + offset]
            places = np.flatnonzero(found)
            if len(places):
                start = int(places[-1]) + size
                return tokens[start : start + self.length]
        return tokens[:0]
