"""What followed the last tokens in other texts, the most frequent beginnings as one tree."""

from collections.abc import Sequence

from decode.draft import Draft
from decode.protocols import Context, Drafter
from decode.suffix import SuffixDecodingCache


class RestDrafter(Drafter):
    """REST (He et al. 2023): retrieval from a datastore of texts, here of finished outputs.

    The last `longest` to `shortest` tokens are looked for, the first length that is found counts.
    Of the continuations of `length` tokens every beginning is counted; the `size` most frequent
    ones are a tree.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, *, longest: int = 16, shortest: int = 2, length: int = 10, size: int = 64):
        """Draft from an empty datastore.

        Raises:
            ValueError: the lengths are out of order.
        """
        if not 1 <= shortest <= longest or length < 1 or size < 0:
            raise ValueError(
                f"matches of {shortest} to {longest} tokens and trees of {size} nodes down to "
                f"{length} cannot be made"
            )
        self.longest, self.shortest, self.length, self.size = longest, shortest, length, size
        self.forget()

    def forget(self) -> None:
        """Begin with an empty datastore."""
        self.cache = SuffixDecodingCache(self.longest + self.length)

    def learn(self, output: Sequence[int]) -> None:
        """Put a text into the datastore."""
        self.cache.add_output(output)

    def propose(self, context: Context) -> Draft:
        """Trees as deep as `context.room` allows."""
        drafts = []
        for tokens, end, room in zip(
            context.tokens.numpy(), context.lengths, context.room, strict=True
        ):
            drafts.append(
                self.cache.continuations(
                    tokens[max(0, end - self.longest) : end],
                    longest=self.longest,
                    shortest=self.shortest,
                    length=min(self.length, room),
                    max_tokens=self.size,
                )
            )
        return Draft.from_lists(
            context.roots,
            [draft.token_ids for draft in drafts],
            [[parent + 1 for parent in draft.parents] for draft in drafts],
        )

    def end(self, slot: int, output: Sequence[int]) -> None:
        """The output goes into the datastore."""
        self.learn(output)
