"""What plugs into the decoder: drafters and acceptance rules, and what passes between them."""

import enum
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from decode.draft import Draft
from decode.sampling import SamplingBatch


class Exactness(enum.Enum):
    """What a rule keeps of the target's behaviour; printed beside every figure."""

    LOSSLESS = "lossless"  # the target's distribution
    GREEDY = "greedy-identical"  # the target's own greedy output, token for token
    APPROXIMATE = "approximate"  # neither


class Context(NamedTuple):
    """What a drafter may know; built by the decoder for each step. Bookkeeping is on the CPU.

    Numbers that are one per sequence are lists, for that is how drafters go through them.

    Attributes:
        slots: B cache slots, of the active sequences.
        tokens: [B, L] committed tokens, left-aligned; what lies behind the root means nothing.
        roots: the last committed token of each sequence, at tokens[b, lengths[b] - 1].
        lengths: B numbers of committed tokens.
        room: B numbers of draft tokens that still fit (context and output length).
        hidden: target layer -> [B, K, D], the states of the tokens committed in the last step but
            the root's own, which are not known yet, for the layers the drafter asked for. They are
            right-aligned: the last column holds those of the token before the root.
        sampling: parameters and generator of each sequence.
    """

    slots: list[int]
    tokens: Tensor
    roots: list[int]
    lengths: list[int]
    room: list[int]
    hidden: Mapping[int, Tensor]
    sampling: SamplingBatch


class Acceptance(NamedTuple):
    """What a rule decided, in lists of one entry per sequence: the loop goes on on the host.

    Attributes:
        paths: accepted nodes of each draft, root first.
        next_tokens: the target's own token: recovered after a rejection, bonus after a leaf.
        num_tried: draft tokens that were tried, accepted or not; those behind a rejection were not.
        expected_accepted: [B, N] Σ min(target, draft) at each tried node, 0 at the others, or None
            where the rule is deterministic.
    """

    paths: list[list[int]]
    next_tokens: list[int]
    num_tried: list[int]
    expected_accepted: Tensor | None = None

    @property
    def num_accepted(self) -> list[int]:
        """Accepted draft tokens: without the root, without the target's own token."""
        return [len(path) - 1 for path in self.paths]


class Drafter(Protocol):
    """Proposes drafts. Drafters without state inherit the empty methods."""

    hidden_layers: tuple[int, ...]  # target layers it reads; () for independent drafters

    def consult(self, slot: int, material: Sequence[int]) -> None:
        """The sequence that enters `slot` next may copy from this text, which is not its prompt."""
        return

    def begin(self, slot: int, prompt: Tensor, hidden: Mapping[int, Tensor]) -> None:
        """A sequence enters `slot`; `prompt` [T] on the CPU, `hidden` layer -> [T - 1, D]."""
        return

    def propose(self, context: Context) -> Draft:
        """A draft for every sequence, at most `context.room` tokens deep.

        It may lie in memory that the next draft is written to.
        """
        ...

    def observe(
        self, context: Context, draft: Draft, acceptance: Acceptance, target_logits: Tensor
    ) -> None:
        """The outcome of the step: roll back what was rejected, learn online.

        `target_logits` [B, N, V] are the model's own behind each node, before penalty and warping.
        """
        return

    def end(self, slot: int, output: Sequence[int]) -> None:
        """The sequence in `slot` is finished with this output."""
        return


class AcceptanceRule(Protocol):
    """Decides which path of a draft is kept; the target's forward has already happened."""

    exactness: ClassVar[Exactness]

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V]."""
        ...
