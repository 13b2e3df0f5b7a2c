"""Text that was seen before where it promises more, a trained drafter elsewhere."""

import enum
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from decode.cost import StepCosts
from decode.draft import Draft
from decode.drafters.gate import Gate
from decode.drafters.suffix import SuffixDrafter
from decode.protocols import Acceptance, Context, Drafter
from decode.sampling import SamplingBatch

KEPT = 0.98  # of what a running mean knew, at each new observation
PRIOR = 4.0  # drafts: the weight of a score's own promise
TRIED = 0.01  # of the time of steps whose draft is declined; it goes into trying such drafts


class Choice(enum.Enum):
    """Whose draft a sequence takes in a step."""

    SUFFIX = enum.auto()
    TRAINED = enum.auto()
    NOTHING = enum.auto()


class HybridDrafter(Drafter):
    """Suffix first (SuffixDecoding v3, Oliaro et al. 2025, hybrid).

    A sequence takes the suffix draft where its score, the accepted tokens it expects, reaches
    `threshold`. Without a threshold it takes what gives most tokens per second, be it no draft at
    all: a score is corrected by how many tokens drafts of like scores really had accepted, the
    trained drafter is credited with its running mean, and each pays what its step costs.

    A gate's forecast, where there is one, takes the place of the score.

    The trained drafter reads what it has missed when its turn comes: as soon as it would have saved
    the time that this takes.
    """

    def __init__(
        self,
        suffix: SuffixDrafter,
        trained: Drafter,
        *,
        costs: StepCosts,
        length: int,
        threshold: float | None = None,
        gate: Gate | None = None,
    ):
        """Draft with both.

        Args:
            suffix: chains, or trees where the trained drafter chooses with certainty.
            trained: drafts about `length` tokens.
            costs: seconds of the steps.
            length: tokens that the trained drafter drafts.
            threshold: accepted tokens to expect of a suffix draft; None learns it.
            gate: says how many to expect; None goes by the score.
        """
        self.suffix, self.trained = suffix, trained
        self.costs, self.length, self.threshold, self.gate = costs, length, threshold, gate
        self.hidden_layers = trained.hidden_layers
        self._choices: list[Choice] = []
        self._promised: list[float] = []  # accepted tokens, by the score or by the gate
        self._read: dict[int, int] = {}  # slot -> tokens that the trained drafter has read
        self._saved: dict[int, float] = {}  # slot -> seconds that it would have saved since
        self._learn_anew()
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
        self._read[slot] = len(prompt) if self.hidden_layers else 1
        self._saved[slot] = 0.0

    def propose(self, context: Context) -> Draft:
        """For each sequence the draft that promises more.

        Raises:
            ValueError: suffix trees beside drafts that were drawn at random.
        """
        found = self.suffix.propose(context)
        self._of_trained = None
        drafts = self.suffix.drafts
        self._promised = [
            self.gate.expected(draft, length) if self.gate else draft.score
            for draft, length in zip(drafts, context.lengths, strict=True)
        ]
        sizes = [len(draft.token_ids) for draft in drafts]
        rows_of = zip(context.slots, context.lengths, sizes, self._promised, strict=True)
        self._choices = [self._choose(*row) for row in rows_of]
        nothing = [row for row, choice in enumerate(self._choices) if choice is Choice.NOTHING]
        if len(nothing) == len(self._choices):
            return Draft.chain(torch.tensor(context.roots)[:, None])
        if nothing:
            num_nodes = found.num_nodes.clone()
            num_nodes[nothing] = 1
            width = int(num_nodes.max())
            found = found._replace(
                tokens=found.tokens[:, :width],
                parents=found.parents[:, :width],
                num_nodes=num_nodes,
            )
        rows = [row for row, choice in enumerate(self._choices) if choice is Choice.TRAINED]
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
        counts = acceptance.num_accepted
        for promised, count, choice in zip(self._promised, counts, self._choices, strict=True):
            if choice is Choice.SUFFIX:
                _count(self._scores[_bin(promised)], count)
            elif choice is Choice.TRAINED:
                _count(self._of_model, count)
        if self._of_trained is not None:
            part, own = self._of_trained
            rows = [row for row, choice in enumerate(self._choices) if choice is Choice.TRAINED]
            width = own.tokens.shape[1]
            told = Acceptance(
                [acceptance.paths[row] for row in rows],
                [acceptance.next_tokens[row] for row in rows],
                [acceptance.num_tried[row] for row in rows],
            )
            self.trained.observe(part, own, told, target_logits[rows, :width])
        self._choices, self._of_trained = [], None

    def end(self, slot: int, output: Sequence[int]) -> None:
        """The sequence in `slot` is finished."""
        self.suffix.end(slot, output)
        self.trained.end(slot, output)
        self._read.pop(slot, None)
        self._saved.pop(slot, None)

    def learn(self, output: Sequence[int]) -> None:
        """Keep a finished output for the requests to come."""
        self.suffix.learn(output)

    def forget(self) -> None:
        """Begin with an empty cache; no sequence may be under way."""
        self.suffix.forget()
        self._learn_anew()

    def _learn_anew(self) -> None:
        # By score: how many such drafts were verified, how many of their tokens accepted.
        self._scores: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._of_model = [1.0, 1.0]  # the same of the trained drafter
        self._for_tries = {Choice.SUFFIX: 0.0, Choice.TRAINED: 0.0}  # seconds

    def _choose(self, slot: int, length: int, size: int, promised: float) -> Choice:
        """Whose draft a sequence of `length` tokens takes; `size` tokens were found for it.

        To read a text pays over many steps: the trained drafter does it when what it would have
        saved since its last turn makes up for it.
        """
        costs = self.costs
        if self.threshold is not None:
            return Choice.SUFFIX if size and promised >= self.threshold else Choice.TRAINED
        nothing, longer = costs.seconds(0), costs.verify[min(size, costs.longest)] + costs.other
        alone, suffix = 1 / nothing, 0.0
        if size:
            drafts, accepted = self._scores[_bin(promised)]
            suffix = (1 + (accepted + PRIOR * promised) / (drafts + PRIOR)) / longer
        seconds = costs.seconds(self.length)
        drafts, accepted = self._of_model
        saved = (1 + accepted / drafts) / max(alone, suffix) - seconds
        missed = max(0, length - self._read[slot] - self.length - 1)
        if saved > 0:
            self._saved[slot] += saved
            if self._saved[slot] >= costs.read * missed:
                return self._read_by(slot, length)
        if size and (suffix >= alone or self._may_try(Choice.SUFFIX, longer - nothing)):
            return Choice.SUFFIX
        if self._may_try(Choice.TRAINED, seconds - nothing + costs.read * missed):
            return self._read_by(slot, length)
        return Choice.NOTHING

    def _read_by(self, slot: int, length: int) -> Choice:
        self._read[slot], self._saved[slot] = length, 0.0
        return Choice.TRAINED

    def _may_try(self, choice: Choice, seconds: float) -> bool:
        """Whether the share of time for trying what is declined has grown to so many seconds."""
        self._for_tries[choice] += TRIED * self.costs.seconds(0)
        if self._for_tries[choice] < seconds:
            return False
        self._for_tries[choice] = 0.0
        return True


def _bin(score: float) -> int:
    """Scores that are alike: 1 + score, the tokens of a step, differs by a fifth at most."""
    return int(4 * math.log2(1 + score))


def _count(running: list[float], accepted: int) -> None:
    """One draft more in a running number of drafts and of what was accepted of them."""
    running[:] = KEPT * running[0] + 1, KEPT * running[1] + accepted


def _rows_of(context: Context, rows: list[int]) -> Context:
    """The context of some of its sequences."""
    if len(rows) == len(context.slots):
        return context
    sampling = context.sampling
    lengths = [context.lengths[row] for row in rows]
    return Context(
        slots=[context.slots[row] for row in rows],
        tokens=context.tokens[rows, : max(lengths)],
        roots=[context.roots[row] for row in rows],
        lengths=lengths,
        room=[context.room[row] for row in rows],
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
    return draft._replace(
        tokens=torch.nn.functional.pad(draft.tokens, (0, extra)),
        parents=torch.cat([draft.parents, tail], dim=1),
        probs=None
        if draft.probs is None
        else torch.nn.functional.pad(draft.probs, (0, 0, 0, extra)),
    )
