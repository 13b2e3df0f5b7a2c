"""The commonest next token behind the last few, by counts of what was seen: the floor."""

from collections import Counter
from collections.abc import Sequence

from decode.draft import Draft
from decode.protocols import Context, Drafter


class NGramDrafter(Drafter):
    """An n-gram model of finished outputs, a bigram model for `order` 2; no smoothing.

    Again and again the most frequent token behind the last `order` - 1 is taken, or behind fewer of
    them where so many were never seen. The draft ends where not even the last one was.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, *, order: int = 3, length: int = 4):
        """Draft up to `length` tokens from no counts.

        Raises:
            ValueError: `order` is below 2, or `length` negative.
        """
        if order < 2 or length < 0:
            raise ValueError(f"an order of {order} and drafts of {length} tokens cannot be made")
        self.order, self.length = order, length
        self.forget()

    def forget(self) -> None:
        """Begin with no counts."""
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._likeliest: dict[tuple[int, ...], int] = {}

    def learn(self, output: Sequence[int]) -> None:
        """Count the n-grams of a text."""
        for end in range(1, len(output)):
            for start in range(max(0, end + 1 - self.order), end):
                gram = tuple(output[start : end + 1])
                self._counts[gram] += 1
                before = self._likeliest.setdefault(gram[:-1], gram[-1])
                if self._counts[gram] > self._counts[(*gram[:-1], before)]:
                    self._likeliest[gram[:-1]] = gram[-1]

    def propose(self, context: Context) -> Draft:
        """Chains as long as `context.room` allows."""
        drafts = []
        for tokens, end, room in zip(
            context.tokens.numpy(), context.lengths, context.room, strict=True
        ):
            text = tokens[max(0, end - self.order + 1) : end].tolist()
            known = len(text)
            while len(text) < known + min(self.length, room):
                token = self._next(text)
                if token is None:
                    break
                text.append(token)
            drafts.append(text[known:])
        return Draft.from_lists(context.roots, drafts)

    def end(self, slot: int, output: Sequence[int]) -> None:
        """The output is counted."""
        self.learn(output)

    def _next(self, text: list[int]) -> int | None:
        for size in range(min(self.order - 1, len(text)), 0, -1):
            token = self._likeliest.get(tuple(text[-size:]))
            if token is not None:
                return token
        return None
