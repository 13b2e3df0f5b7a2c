"""What the target says about a token, and drafter and target over the same outcomes.

The target says it in full logits, or in its k likeliest tokens and the mass of all others. Then
the others are lumped into one outcome, for the drafter too: a divergence over these k + 1 outcomes
is a lower bound of the one over all tokens (lumping loses what distinguishes the lumped), and so
Σ min over the k <= α <= Σ min over the k + 1.

A drafter whose head covers only some ids has q = 0 on the others. These are no outcomes: the sums
go over the kept ids, with the target's probabilities as they are among all, never renormalised.

Shape legend: T places, V vocabulary, K kept ids, k stored tokens, O outcomes (V, or K, or k + 1
with the tail last).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

FLOOR = -1e3  # stands for log 0, so that 0·log 0 is 0 and no infinity meets another


@dataclass(frozen=True, slots=True)
class FullLaw:
    """The target's logits.

    Attributes:
        logits: [T, V] float32 or float64.
    """

    logits: Tensor


@dataclass(frozen=True, slots=True)
class TopLaw:
    """The target's likeliest tokens.

    Attributes:
        ids: [T, k], different ones at each place.
        logprobs: [T, k].
        tail_mass: [T] the probability of all other tokens.
        temperature: at which both are.
    """

    ids: Tensor
    logprobs: Tensor
    tail_mass: Tensor
    temperature: float = 1.0

    def __getitem__(self, rows: slice | Tensor) -> "TopLaw":
        """What it says about these of the T tokens."""
        return self._each(lambda tensor: tensor[rows])

    def cut(self, k: int) -> "TopLaw":
        """What it says with `k` tokens; what the others had joins the tail."""
        rest = self.logprobs[:, k:].exp().sum(-1)
        ids, logprobs = self.ids[:, :k], self.logprobs[:, :k]
        return TopLaw(ids, logprobs, self.tail_mass + rest, self.temperature)

    def to(self, device: torch.device | str) -> "TopLaw":
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    @staticmethod
    def cat(laws: Sequence["TopLaw"]) -> "TopLaw":
        """One behind the other; all have as many tokens, at one temperature."""
        return TopLaw(
            torch.cat([law.ids for law in laws]).long(),
            torch.cat([law.logprobs for law in laws]),
            torch.cat([law.tail_mass for law in laws]),
            laws[0].temperature,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TopLaw":
        return TopLaw(
            change(self.ids), change(self.logprobs), change(self.tail_mass), self.temperature
        )


TargetLaw = FullLaw | TopLaw


@dataclass(frozen=True, slots=True)
class Kept:
    """The ids that a trimmed head covers.

    Attributes:
        ids: [K], ascending.
        places: [V] where each id stands among them; K for those that are not kept.
    """

    ids: Tensor
    places: Tensor

    @staticmethod
    def of(ids: Tensor, vocab_size: int) -> "Kept":
        """These `ids` [K] of `vocab_size`."""
        places = torch.full((vocab_size,), len(ids), device=ids.device)
        places[ids] = torch.arange(len(ids), device=ids.device)
        return Kept(ids, places)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One side's distribution over the outcomes.

    Attributes:
        logprobs: [T, O], not below `FLOOR`.
        probs: [T, O].
    """

    logprobs: Tensor
    probs: Tensor

    @staticmethod
    def of(logits: Tensor) -> "Outcomes":
        """Of logits [T, O]."""
        probs = logits.softmax(-1)
        return Outcomes((logits - log_sum(logits, probs)).clamp_(min=FLOOR), probs)

    def __getitem__(self, rows: Tensor) -> "Outcomes":
        """At these of the T places."""
        return Outcomes(self.logprobs.index_select(0, rows), self.probs.index_select(0, rows))


def likeliest(probs: Tensor) -> Tensor:
    """The first of the likeliest tokens, [T, 1], of [T, V] in float32 or float64.

    On the CPU numpy's argmax is ten times as fast as torch's.
    """
    if probs.device.type == "cpu":
        return torch.from_numpy(probs.numpy().argmax(-1))[:, None]
    return probs.argmax(-1, keepdim=True)


def log_sum(logits: Tensor, probs: Tensor) -> Tensor:
    """Log Σ exp z, [T, 1], of logits whose softmax is there: one pass of exponentials fewer.

    The likeliest token tells it: log q = z - log Σ exp z, and its q does not underflow.
    """
    return logits.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()


@dataclass(frozen=True, slots=True)
class Goal:
    """The target over the outcomes of T places, at one temperature.

    Attributes:
        target: p.
        temperature: of it.
        peak: [T] the target's largest probability of all tokens.
        lumped: the law whose tokens the outcomes are, or None where every token is one.
        outside: [T] what the target gives to tokens that a trimmed head lacks, as far as they are
            known; None where the head has all. Else tokens are places among the kept.
    """

    target: Outcomes
    temperature: float
    peak: Tensor
    lumped: TopLaw | None = None
    outside: Tensor | None = None

    @staticmethod
    def of(law: TargetLaw, temperature: float, like: Tensor, kept: Kept | None = None) -> "Goal":
        """What the target says, for drafters whose logits are [T, V] `like` these.

        Where the two are padded to different vocabularies, ids that only one of them has stand for
        no token and are left out. With a trimmed head the drafter's logits are those of its `kept`
        ids [T, K].
        """
        if isinstance(law, TopLaw):
            return _of_top(law, temperature, like.dtype, kept)
        width = like.shape[-1] if kept is None else len(kept.places)
        logits = law.logits[:, :width]
        if temperature != 1:  # a pass over [T, V], so only where it changes something
            logits = logits / temperature
        if kept is None:
            target = Outcomes.of(logits)
            return Goal(target, temperature, target.probs.amax(-1))
        probs = logits.softmax(-1)  # over the kept ids, as they are among all
        logprobs = (logits[:, kept.ids] - log_sum(logits, probs)).clamp_(min=FLOOR)
        target = Outcomes(logprobs, probs[:, kept.ids])
        outside = (1 - target.probs.sum(-1)).clamp_(min=0)
        return Goal(target, temperature, probs.amax(-1), None, outside)

    def __getitem__(self, rows: Tensor) -> "Goal":
        """At these of the T places."""
        return Goal(
            self.target[rows],
            self.temperature,
            self.peak[rows],
            None if self.lumped is None else self.lumped[rows],
            None if self.outside is None else self.outside[rows],
        )


def _of_top(law: TopLaw, temperature: float, dtype: torch.dtype, kept: Kept | None) -> Goal:
    """Over the k tokens and the tail."""
    if temperature != law.temperature:
        raise ValueError(
            f"stored log-probabilities are the target's at temperature {law.temperature:g}, not "
            f"{temperature:g}; let the target run beside the drafter (teacher=live)"
        )
    if kept is not None:  # all ids that are not kept are one more, impossible token: the last
        law = replace(law, ids=kept.places[law.ids])
    tail_mass = law.tail_mass[:, None].clamp(min=0)  # 1 - Σ top, rounded, can lie below
    logprobs = torch.cat([law.logprobs, tail_mass.log()], -1).to(dtype).clamp_(min=FLOOR)
    probs = logprobs.exp()
    peak, outside = probs[:, :-1].amax(-1), None
    if kept is not None:
        is_outside = law.ids == len(kept.ids)
        outside = (probs[:, :-1] * is_outside).sum(-1)
        logprobs[:, :-1].masked_fill_(is_outside, FLOOR)
        probs[:, :-1].masked_fill_(is_outside, 0)
    return Goal(Outcomes(logprobs, probs), temperature, peak, law, outside)


@dataclass(frozen=True, slots=True)
class Compared:
    """Target and drafter over the same outcomes, at one depth of T places.

    Attributes:
        goal: what the target says.
        draft: q.
        token_probs: [T, V] the drafter's, all tokens apart.
    """

    goal: Goal
    draft: Outcomes
    token_probs: Tensor

    @staticmethod
    def at(goal: Goal, draft_logits: Tensor) -> "Compared":
        """Compare the drafter's logits [T, V] with what the target says, at its temperature."""
        if goal.lumped is None:
            draft_logits = draft_logits[:, : goal.target.probs.shape[-1]]
        if goal.temperature != 1:
            draft_logits = draft_logits / goal.temperature
        if goal.lumped is not None:
            return _lumped(goal, goal.lumped, draft_logits)
        draft = Outcomes.of(draft_logits)
        return Compared(goal, draft, draft.probs)

    @property
    def target(self) -> Outcomes:
        """The target's p."""
        return self.goal.target

    @property
    def outside(self) -> Tensor | None:
        """[T] what the target gives to tokens that a trimmed head lacks."""
        return self.goal.outside

    def apart(self) -> "Compared":
        """Token by token, for what asks how the drafter spreads q within the tail.

        Of the tail it is not known which token has p, so there p is 0 everywhere.
        """
        if self.goal.lumped is None:
            return self
        ids = self.goal.lumped.ids
        target = self.target.logprobs.new_full(self.token_probs.shape, FLOOR)
        target.scatter_(-1, ids, self.target.logprobs[:, :-1])
        known = torch.zeros_like(target).scatter_(-1, ids, self.target.probs[:, :-1])
        logprobs = self.token_probs.log().clamp_(min=FLOOR)
        logprobs.scatter_(-1, ids, self.draft.logprobs[:, :-1])  # exact also where q underflows
        width = -1 if self.outside is not None else None  # the ids that are not kept stand last
        target, known, logprobs = target[:, :width], known[:, :width], logprobs[:, :width]
        probs = self.token_probs[:, :width]
        goal = replace(self.goal, target=Outcomes(target, known), lumped=None)
        return Compared(goal, Outcomes(logprobs, probs), probs)

    def logit_gradient(self, slope: Tensor) -> Tensor:
        """The gradient of the drafter's logits [T, V] from that of its log-probabilities [T, O].

        With ``log q = z - log Σ exp z`` it is ``s - q Σ s``. `slope` is overwritten.
        """
        lumped = self.goal.lumped
        if lumped is None:
            return self.token_gradient(slope)
        if self.outside is not None:  # what lacks a logit has no slope
            slope[:, :-1].masked_fill_(lumped.ids == self.token_probs.shape[-1] - 1, 0)
        total = slope.sum(-1, keepdim=True)
        gradient = self.spread(slope.addcmul_(self.draft.probs, total, value=-1))
        return self._of_logits(gradient)

    def token_gradient(self, slope: Tensor) -> Tensor:
        """The same from a slope by all tokens apart, [T, V]."""
        total = slope.sum(-1, keepdim=True)
        probs = self.token_probs[:, : slope.shape[-1]]
        return self._of_logits(slope.addcmul_(probs, total, value=-1))

    def spread(self, slope: Tensor) -> Tensor:
        """What each token [T, V] has of a derivative by outcomes [T, O].

        Of what the tail has each of its tokens has its share q_j / q_tail.
        """
        lumped = self.goal.lumped
        if lumped is None:
            return slope
        tail = self.draft.probs[:, -1:].clamp(min=torch.finfo(slope.dtype).tiny)
        of_tokens = self.token_probs * (slope[:, -1:] / tail)
        of_tokens.scatter_(-1, lumped.ids, slope[:, :-1])
        return of_tokens if self.outside is None else of_tokens[:, :-1]

    def _of_logits(self, gradient: Tensor) -> Tensor:
        """By the logits as they are, not divided by the temperature."""
        temperature = self.goal.temperature
        return gradient if temperature == 1 else gradient.div_(temperature)


def _lumped(goal: Goal, law: TopLaw, draft_logits: Tensor) -> Compared:
    """The drafter over the target's k tokens and its tail."""
    if goal.outside is not None:  # the token that stands for those it lacks
        draft_logits = functional.pad(draft_logits, (0, 1), value=-torch.inf)
    token_probs = draft_logits.softmax(-1)
    normaliser = log_sum(draft_logits, token_probs)
    probs = token_probs.gather(-1, law.ids)
    # Summed without the top, not 1 - Σ top: a small tail would drown in the rounding of 1.
    tail = token_probs.scatter(-1, law.ids, 0).sum(-1, keepdim=True)
    logprobs = torch.cat([draft_logits.gather(-1, law.ids) - normaliser, tail.log()], -1)
    draft = Outcomes(logprobs.clamp_(min=FLOOR), torch.cat([probs, tail], -1))
    return Compared(goal, draft, token_probs)
