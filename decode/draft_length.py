"""How many tokens to draft: constant, by rule of thumb, by confidence, or by what it costs.

Every choice looks at the past and at the drafter's law of the next token, never at the token drawn
from it: so a lossless rule stays lossless.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from decode.cost import StepCosts, best_length


class DraftLength(Protocol):
    """Decides how long the next draft of each sequence is.

    Attributes:
        longest: no draft is longer.
        min_confidence: drafting stops before a token where the drafter gives its likeliest one
            less than this; 0 lets it go on.
    """

    @property
    def longest(self) -> int: ...  # noqa: D102

    @property
    def min_confidence(self) -> float: ...  # noqa: D102

    def begin(self, slot: int) -> None:
        """A sequence enters `slot`."""
        ...

    def choose(self, slots: Sequence[int]) -> list[int]:
        """Tokens to draft for each sequence."""
        ...

    def observe(
        self,
        slots: Sequence[int],
        drafted: Sequence[int],
        accepted: Sequence[int],
        confidences: Sequence[Sequence[float]],
    ) -> None:
        """How many of the drafted tokens were accepted, and how sure the drafter was of each."""
        ...


@dataclass(frozen=True)
class Constant:
    """Always the same.

    Attributes:
        longest: how many.
        min_confidence: where drafting stops earlier (BiLD's fallback, Kim et al. 2023).
    """

    longest: int = 5
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no length."""
        if self.longest < 1:
            raise ValueError(f"draft_length must be >= 1, got {self.longest}; or use NoDrafter")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must lie in [0, 1], got {self.min_confidence}")

    def begin(self, slot: int) -> None:
        """Nothing is kept."""

    def choose(self, slots: Sequence[int]) -> list[int]:
        """The longest."""
        return [self.longest] * len(slots)

    def observe(
        self,
        slots: Sequence[int],
        drafted: Sequence[int],
        accepted: Sequence[int],
        confidences: Sequence[Sequence[float]],
    ) -> None:
        """Nothing is learnt."""


@dataclass
class Heuristic:
    """Two more where the whole draft was accepted, one less where it was not.

    The schedule of transformers' assisted generation ("heuristic"), for each sequence by itself.

    Attributes:
        longest: no draft is longer.
        first: of a sequence's first draft.
    """

    longest: int = 20
    first: int = 5
    min_confidence: float = field(default=0.0, init=False)
    _lengths: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what is no length."""
        if not 1 <= self.first <= self.longest:
            raise ValueError(f"first must lie in 1..{self.longest} (longest), got {self.first}")

    def begin(self, slot: int) -> None:
        """Start anew."""
        self._lengths[slot] = self.first

    def choose(self, slots: Sequence[int]) -> list[int]:
        """By what became of the last draft."""
        return [self._lengths.get(slot, self.first) for slot in slots]

    def observe(
        self,
        slots: Sequence[int],
        drafted: Sequence[int],
        accepted: Sequence[int],
        confidences: Sequence[Sequence[float]],
    ) -> None:
        """Two more, or one less."""
        for slot, count, kept in zip(slots, drafted, accepted, strict=True):
            if count:
                change = 2 if kept == count else -1
                length = self._lengths.get(slot, self.first) + change
                self._lengths[slot] = min(max(length, 1), self.longest)


@dataclass
class Confidence:
    """Stop where the drafter is so unsure that its token would most likely be refused.

    The threshold is learnt: what share of the tokens drafted at each confidence was accepted is
    counted, old counts fading, and drafting stops below the lowest confidence from which on the
    share is at least `min_acceptance`. A confidence not seen yet is taken to be as good as the one
    above it, and so is tried.

    Attributes:
        longest: no draft is longer.
        min_acceptance: the least chance of acceptance that is worth a token.
        memory: how many tokens the counts go back.
    """

    longest: int = 12
    min_acceptance: float = 0.4
    memory: float = 500.0
    min_confidence: float = field(default=0.0, init=False)
    _accepted: list[float] = field(default_factory=list, init=False, repr=False)
    _tried: list[float] = field(default_factory=list, init=False, repr=False)

    NUM_CELLS = 20
    PRIOR = 4.0  # tokens that the confidence above weighs

    def __post_init__(self) -> None:
        """Refuse what is no length and no chance."""
        if self.longest < 1 or self.memory <= 0:
            raise ValueError(
                f"longest must be >= 1 and memory > 0, got {self.longest} and {self.memory}"
            )
        if not 0 <= self.min_acceptance <= 1:
            raise ValueError(f"min_acceptance must lie in [0, 1], got {self.min_acceptance}")
        self.min_confidence = 1 / self.NUM_CELLS
        self._accepted, self._tried = [0.0] * self.NUM_CELLS, [0.0] * self.NUM_CELLS

    def begin(self, slot: int) -> None:
        """What is learnt stays: it is the drafter's, not the sequence's."""

    def choose(self, slots: Sequence[int]) -> list[int]:
        """The longest; where to stop is seen on the way."""
        return [self.longest] * len(slots)

    def observe(
        self,
        slots: Sequence[int],
        drafted: Sequence[int],
        accepted: Sequence[int],
        confidences: Sequence[Sequence[float]],
    ) -> None:
        """Count, and set the threshold anew."""
        for count, kept, row in zip(drafted, accepted, confidences, strict=True):
            for position in range(min(kept + 1, count)):
                cell = min(int(row[position] * self.NUM_CELLS), self.NUM_CELLS - 1)
                fading = 1 - 1 / self.memory
                self._tried = [fading * tried for tried in self._tried]
                self._accepted = [fading * accepted for accepted in self._accepted]
                self._tried[cell] += 1
                self._accepted[cell] += position < kept
        self.min_confidence = self._threshold()

    def _threshold(self) -> float:
        """Never so high that nothing is tried, or so low that nothing is looked at."""
        share = 1.0
        lowest = self.NUM_CELLS - 1
        for cell in reversed(range(1, self.NUM_CELLS)):
            share = (self._accepted[cell] + self.PRIOR * share) / (self._tried[cell] + self.PRIOR)
            if share < self.min_acceptance:
                break
            lowest = cell
        return lowest / self.NUM_CELLS


@dataclass
class CostAware:
    """The length that gives most tokens a second, by measured costs and running acceptance.

    The acceptance at each position, given the positions before, is counted per sequence, old
    counts fading; what a sequence has not shown yet is taken from all. Where no length pays,
    nothing is drafted but a token now and then, ever more seldom, to see whether that has changed.

    Attributes:
        costs: what steps of one sequence take; `longest` is theirs.
        shared: what those take that several share, by how many; the next larger number stands for
            those between, and `costs` for all where there is none.
        memory: how many steps the counts go back.
        prior: the acceptance rate to begin with.
    """

    costs: StepCosts
    shared: Mapping[int, StepCosts] = field(default_factory=dict)
    memory: float = 64.0
    prior: float = 0.7
    min_confidence: float = field(default=0.0, init=False)
    _everyone: "_Counts" = field(init=False, repr=False)
    _own: dict[int, "_Counts"] = field(default_factory=dict, init=False, repr=False)
    _idle: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _patience: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _probing: set[int] = field(default_factory=set, init=False, repr=False)

    WEIGHT = 8.0  # steps that the prior, or everyone's counts, weigh
    PROBE_AFTER, PROBE_AT_MOST = 16, 256  # steps without a draft

    def __post_init__(self) -> None:
        """Begin with the prior."""
        if not (0 <= self.prior <= 1 and self.memory > 0):
            raise ValueError(
                f"prior must lie in [0, 1] and memory be > 0, got {self.prior} and {self.memory}"
            )
        self._everyone = _Counts(self.costs.longest)

    @property
    def longest(self) -> int:
        """The longest draft whose verification was measured."""
        return self.costs.longest

    def begin(self, slot: int) -> None:
        """A new sequence has shown nothing yet."""
        self._own[slot] = _Counts(self.longest)
        self._probing.discard(slot)
        self._idle[slot] = 0
        self._patience[slot] = self.PROBE_AFTER

    def acceptance(self, slot: int) -> list[float]:
        """The estimate at each position, given that those before it were accepted."""
        own = self._own[slot]
        estimates: list[float] = []
        above = self.prior
        for position in range(self.longest):
            pooled = self._everyone.rate(position, above, self.WEIGHT)
            above = own.rate(position, pooled, self.WEIGHT)
            estimates.append(above)
        return estimates

    def choose(self, slots: Sequence[int]) -> list[int]:
        """The length that is best for all of them together, or where it is none a probe."""
        costs = self.costs_of(len(slots))
        best = best_length(costs, *(self.acceptance(slot) for slot in slots))
        lengths = []
        for slot in slots:
            length = best
            if length == 0:
                self._idle[slot] += 1
                if self._idle[slot] > self._patience[slot]:
                    self._idle[slot], length = 0, 1
                    self._probing.add(slot)
            lengths.append(length)
        return lengths

    def costs_of(self, batch_size: int) -> StepCosts:
        """What steps take that so many sequences share."""
        sizes = sorted(self.shared)
        size = next((size for size in sizes if size >= batch_size), sizes[-1] if sizes else 0)
        return self.shared.get(size, self.costs)

    def observe(
        self,
        slots: Sequence[int],
        drafted: Sequence[int],
        accepted: Sequence[int],
        confidences: Sequence[Sequence[float]],
    ) -> None:
        """Count what was accepted, position by position."""
        for slot, count, kept in zip(slots, drafted, accepted, strict=True):
            if count == 0:
                continue
            if slot in self._probing:
                self._probing.remove(slot)
                patience = self.PROBE_AFTER if kept else 2 * self._patience[slot]
                self._patience[slot] = min(patience, self.PROBE_AT_MOST)
            for counts in (self._everyone, self._own[slot]):
                counts.add(count, kept, 1 - 1 / self.memory)


class _Counts:
    """Fading counts of tries and acceptances, by position."""

    def __init__(self, longest: int):
        self.tried = [0.0] * longest
        self.accepted = [0.0] * longest

    def add(self, drafted: int, accepted: int, fading: float) -> None:
        for position in range(min(accepted + 1, drafted)):
            self.tried[position] = fading * self.tried[position] + 1
            self.accepted[position] = fading * self.accepted[position] + (position < accepted)

    def rate(self, position: int, prior: float, weight: float) -> float:
        return (self.accepted[position] + weight * prior) / (self.tried[position] + weight)
