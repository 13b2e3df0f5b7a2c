"""For outputs that repeat their input with corrections: the rest of the input is drafted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from decode.draft import Draft
from decode.protocols import Context, Drafter


@dataclass(slots=True)
class _Alignment:
    """Where a sequence is in its input.

    `place` is that of the next token in `text`, -1 where it is not known; `length` counts the
    sequence's tokens, `prompt_length` of which are the prompt's, up to there.
    """

    text: NDArray[np.int64]
    place: int
    prompt_length: int
    length: int


class InputGuidedDrafter(Drafter):
    """Input-guided aggressive decoding (Sun et al. 2021, section 3.2; Ge et al. 2022).

    The output is taken to be its input, word for word: a request's material, or the prompt where
    there is none. Where the target writes something else nothing is drafted until the output's last
    tokens occur at one place of the input only; the draft goes on from there.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, *, length: int = 32):
        """Draft up to `length` tokens of the input.

        Raises:
            ValueError: `length` is negative.
        """
        if length < 0:
            raise ValueError(f"{length} tokens cannot be copied")
        self.length = length
        self._material: dict[int, Sequence[int]] = {}
        self._alignments: dict[int, _Alignment] = {}

    def consult(self, slot: int, material: Sequence[int]) -> None:
        """The input is `material`."""
        self._material[slot] = material

    def begin(self, slot: int, prompt: Tensor, hidden: Mapping[int, Tensor]) -> None:
        """Material is copied from its first token; where in a prompt the input begins, is open."""
        material = self._material.pop(slot, None)
        text = prompt.numpy() if material is None else np.array(material, dtype=np.int64)
        place = -1 if material is None else 0
        self._alignments[slot] = _Alignment(text, place, len(prompt), len(prompt))

    def propose(self, context: Context) -> Draft:
        """The rest of each input, as far as `context.room` allows."""
        rows = zip(context.slots, context.lengths, context.room, strict=True)
        copies = []
        for row, (slot, length, room) in enumerate(rows):
            aligned = self._alignments[slot]
            _follow(aligned, context.tokens[row, :length].numpy())
            copy = aligned.text[:0]
            if aligned.place >= 0:
                copy = aligned.text[aligned.place : aligned.place + min(self.length, room)]
            copies.append(copy.tolist())
        return Draft.from_lists(context.roots, copies)

    def end(self, slot: int, output: Sequence[int]) -> None:
        """Its input is of no use to others."""
        self._alignments.pop(slot, None)


def _follow(aligned: _Alignment, tokens: NDArray[np.int64]) -> None:
    """Go on in the input by the new ones of `tokens` [T], or find another place."""
    text, new = aligned.text, tokens[aligned.length :]
    aligned.length = len(tokens)
    if aligned.place >= 0 and np.array_equal(text[aligned.place : aligned.place + len(new)], new):
        aligned.place += len(new)
    else:
        aligned.place = only_place(text, tokens[aligned.prompt_length :])


def only_place(text: NDArray[np.int64], output: NDArray[np.int64]) -> int:
    """The place in `text` behind the last tokens of `output`, as many as make it one; -1: none."""
    ends = np.arange(len(text))
    for size in range(len(output)):
        ends = ends[ends >= size]
        ends = ends[text[ends - size] == output[len(output) - 1 - size]]
        if len(ends) < 2:
            break
    return int(ends[0]) + 1 if len(ends) == 1 else -1
