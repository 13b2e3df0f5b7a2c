"""Text that was seen before where it promises more, a trained drafter elsewhere."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from decode.cost import StepCosts
from decode.draft import Draft
from decode.drafters.suffix import SuffixDrafter
from decode.protocols import Acceptance, Context, Drafter
from decode.sampling import SamplingBatch

KEPT = 0.95  # of what a running mean knew, at each new observation
EXPLORED = 32  # of so many steps that would go without a draft one is drafted, to see if it pays


class Choice(enum.Enum):
    """Whose draft a sequence takes in a step."""

    SUFFIX = enum.auto()
    TRAINED = enum.auto()
    NOTHING = enum.auto()


class HybridDrafter(Drafter):
    """Suffix first (SuffixDecoding v3, Oliaro et al. 2025, hybrid).

    A sequence takes the suffix draft where its score, the accepted tokens it expects, reaches
    `threshold`. Without a threshold it takes what gives most tokens per second, be it no draft at
    all: scores are corrected by how many tokens such drafts really had accepted, the trained
    drafter is credited with its running mean, and each pays what its step costs.

    The trained drafter reads what it has missed when its turn comes.
    """

    def __init__(
        self,
        suffix: SuffixDrafter,
        trained: Drafter,
        *,
        costs: StepCosts,
        length: int,
        threshold: float | None = None,
    ):
        """Draft with both.

        Args:
            suffix: chains, or trees where the trained drafter chooses with certainty.
            trained: drafts about `length` tokens.
            costs: seconds of the steps.
            length: tokens that the trained drafter drafts.
            threshold: accepted tokens to expect of a suffix draft; None learns it.
        """
        self.suffix, self.trained = suffix, trained
        self.costs, self.length, self.threshold = costs, length, threshold
        self.hidden_layers = trained.hidden_layers
        # Running sums: score of suffix drafts, what was accepted of them, and of trained ones.
        self._promised, self._kept = 1.0, 1.0
        self._drafts, self._accepted = 1.0, 1.0
        self._choices: list[Choice] = []
        self._steps_without = 0
        self._of_trained: tuple[Context, Draft] | None = None

    def consult(self, slot: int, material: Sequence[int]) -> None:
        """Let both know the text beside the prompt."""
        self.suffix.consult(slot, material)
        self.trained.consult(slot, material)

    def begin(self, slot: int, prompt: Tensor, hidden: Mapping[int, Tensor]) -> None:
        """A sequence enters `slot`."""
        self.suffix.begin(slot, prompt, hidden)
        # It reads what it has missed when its turn comes, which for some texts is never.
        self.trained.begin(slot, prompt if self.hidden_layers else prompt[:1], hidden)

    def propose(self, context: Context) -> Draft:
        """For each sequence the draft that promises more.

        Raises:
            ValueError: suffix trees beside drafts that were drawn at random.
        """
        found = self.suffix.propose(context)
        self._choices = [self._choose(d.score, len(d.token_ids)) for d in self.suffix.drafts]
        nothing = [row for row, choice in enumerate(self._choices) if choice is Choice.NOTHING]
        if nothing:
            num_nodes = found.num_nodes.clone()
            num_nodes[nothing] = 1
            width = int(num_nodes.max())
            found = replace(
                found,
                tokens=found.tokens[:, :width],
                parents=found.parents[:, :width],
                num_nodes=num_nodes,
            )
        rows = [row for row, choice in enumerate(self._choices) if choice is Choice.TRAINED]
        self._of_trained = None
        if not rows:
            return found
        part = _rows_of(context, rows)
        drafted = self.trained.propose(part)
        self._of_trained = part, drafted
        if len(rows) == len(self._choices):
            return drafted
        return _interleaved(found, drafted, rows)

    def observe(
        self, context: Context, draft: Draft, acceptance: Acceptance, target_logits: Tensor
    ) -> None:
        """Tell each of its own drafts, and learn what they are worth."""
        self.suffix.observe(context, draft, acceptance, target_logits)
        if not self._choices:  # a prompt's own forward
            self.trained.observe(context, draft, acceptance, target_logits)
            return
        counts = acceptance.num_accepted.tolist()
        for found, count, choice in zip(self.suffix.drafts, counts, self._choices, strict=True):
            if choice is Choice.SUFFIX:
                self._promised = KEPT * self._promised + found.score
                self._kept = KEPT * self._kept + count
            elif choice is Choice.TRAINED:
                self._drafts = KEPT * self._drafts + 1
                self._accepted = KEPT * self._accepted + count
        if self._of_trained is not None:
            part, own = self._of_trained
            rows = [row for row, choice in enumerate(self._choices) if choice is Choice.TRAINED]
            width = own.tokens.shape[1]
            told = Acceptance(
                acceptance.path[rows, :width],
                acceptance.num_accepted[rows],
                acceptance.next_token[rows],
                acceptance.num_tried[rows],
            )
            self.trained.observe(part, own, told, target_logits[rows, :width])
        self._choices, self._of_trained = [], None

    def end(self, slot: int, output: Sequence[int]) -> None:
        """The sequence in `slot` is finished."""
        self.suffix.end(slot, output)
        self.trained.end(slot, output)

    def learn(self, output: Sequence[int]) -> None:
        """Keep a finished output for the requests to come."""
        self.suffix.learn(output)

    def forget(self) -> None:
        """Begin with an empty cache; no sequence may be under way."""
        self.suffix.forget()
        self._promised = self._kept = self._drafts = self._accepted = 1.0
        self._steps_without = 0

    def _choose(self, score: float, size: int) -> Choice:
        if self.threshold is not None:
            return Choice.SUFFIX if size and score >= self.threshold else Choice.TRAINED
        costs = self.costs
        alone = 1 / costs.seconds(0)
        trained = (1 + self._accepted / self._drafts) / costs.seconds(self.length)
        suffix = 0.0
        if size:
            spent = costs.verify[min(size, costs.longest)] + costs.other
            suffix = (1 + score * self._kept / self._promised) / spent
        if suffix >= max(alone, trained):
            return Choice.SUFFIX
        if trained >= alone:
            return Choice.TRAINED
        self._steps_without += 1
        return Choice.TRAINED if self._steps_without % EXPLORED == 0 else Choice.NOTHING


def _rows_of(context: Context, rows: list[int]) -> Context:
    """The context of some of its sequences."""
    if len(rows) == len(context.slots):
        return context
    sampling = context.sampling
    lengths = context.lengths[rows]
    return replace(
        context,
        slots=context.slots[rows],
        tokens=context.tokens[rows, : int(lengths.max())],
        lengths=lengths,
        room=context.room[rows],
        hidden={layer: states[rows] for layer, states in context.hidden.items()},
        sampling=SamplingBatch.of(
            [sampling.params[row] for row in rows], [sampling.generators[row] for row in rows]
        ),
    )


def _interleaved(found: Draft, drafted: Draft, rows: list[int]) -> Draft:
    """One batch: `drafted` in these rows, `found` in the others."""
    width = max(found.tokens.shape[1], drafted.tokens.shape[1])
    found, drafted = _widened(found, width), _widened(drafted.to(found.tokens.device), width)
    tokens, parents = found.tokens.clone(), found.parents.clone()
    num_nodes = found.num_nodes.clone()
    tokens[rows], parents[rows], num_nodes[rows] = (
        drafted.tokens, drafted.parents, drafted.num_nodes,
    )  # fmt: skip
    probs = None
    if drafted.probs is not None:
        if not found.is_chain:
            raise ValueError(
                "suffix trees cannot be judged beside drafts that were drawn at random; draft "
                "chains of suffixes, or trees of the trained drafter's likeliest children"
            )
        probs = torch.zeros(*tokens.shape, drafted.probs.shape[-1])
        # Chosen with certainty: the law behind a node is one at its child.
        probs[:, :-1].scatter_(-1, tokens[:, 1:, None], 1.0)
        probs[rows] = drafted.probs
    is_chain = found.is_chain and drafted.is_chain
    return Draft(tokens, parents, num_nodes, probs, is_chain, drafted.without_replacement)


def _widened(draft: Draft, width: int) -> Draft:
    """The same with padding up to `width` nodes."""
    extra = width - draft.tokens.shape[1]
    if extra == 0:
        return draft
    batch, nodes = draft.tokens.shape
    tail = torch.arange(nodes - 1, width - 1).expand(batch, extra)
    return replace(
        draft,
        tokens=torch.nn.functional.pad(draft.tokens, (0, extra)),
        parents=torch.cat([draft.parents, tail], dim=1),
        probs=None
        if draft.probs is None
        else torch.nn.functional.pad(draft.probs, (0, 0, 0, extra)),
    )
