"""When an output ends: EOS, stop strings and length, also inside an accepted path."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from decode.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Stopping:
    """What may end an output.

    Attributes:
        eos_token_ids: tokens that end it, unless the sequence ignores them.
        tokenizer: turns outputs into text, needed for stop strings only.
    """

    eos_token_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase | None = None

    def cut(
        self, output: Sequence[int], new: Sequence[int], params: SamplingParams
    ) -> tuple[int, str | None]:
        """How many of the `new` tokens belong to the output, and why it ends with them.

        Args:
            output: what was emitted before.
            new: the tokens of this step, at least one.
            params: limits of the sequence.

        Returns:
            the number of tokens kept, and "eos", "stop", "length" or None (it goes on).

        Raises:
            ValueError: the sequence has stop strings and there is no tokenizer.
        """
        limit = params.max_new_tokens - len(output)
        kept, reason = (limit, "length") if len(new) >= limit else (len(new), None)
        if not params.ignore_eos:
            at = first_of(new[:kept], self.eos_token_ids)
            if at is not None:
                kept, reason = at + 1, "eos"
        if params.stop:
            at = self._first_stop(output, new[:kept], params.stop)
            if at is not None and not (at + 1 == kept and reason == "eos"):
                kept, reason = at + 1, "stop"
        return kept, reason

    def _first_stop(
        self, output: Sequence[int], new: Sequence[int], stop: tuple[str, ...]
    ) -> int | None:
        """Index of the new token that completes a stop string."""
        if self.tokenizer is None:
            raise ValueError(
                f"stop strings {stop} need a tokenizer: SpeculativeDecoder(tokenizer=)"
            )
        # A stop string of n characters spans at most n tokens that carry text; twice that leaves
        # room for tokens that carry none.
        tail = list(output[-2 * max(map(len, stop)) - 8 :])
        # Half a character is no character yet: it counts with the token that completes it.
        before = len(self.tokenizer.decode(tail).rstrip("\ufffd")) if tail else 0
        for at in range(len(new)):
            text = self.tokenizer.decode([*tail, *new[: at + 1]])
            # Only texts that end among the new tokens count: older ones would have stopped before.
            if any(text.rfind(word) + len(word) > before for word in stop if word in text):
                return at
        return None


def first_of(tokens: Sequence[int], wanted: Collection[int]) -> int | None:
    """Index of the first token that is wanted."""
    return next((at for at, token in enumerate(tokens) if token in wanted), None)
