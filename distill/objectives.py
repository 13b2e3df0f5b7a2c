"""What is minimised: a divergence per prediction, summed; and what is told about it meanwhile.

An objective is called on chunks of the places where tokens are to be predicted, all depths of the
draft together. What comes out are sums and counts; the loop divides once, by the number of learnt
tokens of the whole batch over all processes.

Shape legend: K depths of a draft, T places, O outcomes (all tokens, or a stored top-k and a tail).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from distill.divergences import forward_kl
from distill.laws import Compared, Outcomes


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Sums over predictions.

    Attributes:
        loss: scalar, summed over the predictions.
        num_tokens: how many predictions that were, scalar.
        metrics: name -> (sum, count), scalars without gradient.
    """

    loss: Tensor
    num_tokens: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]]


class Objective(Protocol):
    """What training minimises.

    Attributes:
        needs_target: it asks what the target says, not only which token the data has.
    """

    needs_target: ClassVar[bool]

    @property
    def temperature(self) -> float:
        """The serving temperature at which drafter and target are compared."""
        ...

    @property
    def block(self) -> int:
        """How many consecutive tokens an independent model's places predict together."""
        ...

    def judge(self, depths: Sequence[Compared], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Judge the drafter's predictions.

        Args:
            depths: K of T places each.
            weights: [K, T]; 0 where there is nothing to predict.

        Returns:
            The weighted sum, and its derivatives [T, O] by each depth's log-probabilities.
        """
        ...


class DepthWeights(Protocol):
    """How much each depth of a draft counts."""

    def weights(self, alphas: Tensor) -> Tensor:
        """[K, T] for the expected acceptance rates [K, T] of each depth."""
        ...


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every depth counts as much."""

    def weights(self, alphas: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(alphas)


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """Sums a divergence over all predictions, each weighted as its depth is.

    Attributes:
        temperature: the serving temperature.
    """

    temperature: float = 1.0

    needs_target: ClassVar[bool] = True
    block: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Refuse what no server samples at."""
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")

    def divergence(self, target: Outcomes, draft: Outcomes) -> tuple[Tensor, Tensor]:
        """The value [T] and its derivative [T, O] by the drafter's log-probabilities."""
        raise NotImplementedError

    def judge(self, depths: Sequence[Compared], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Σ w D, and its derivatives."""
        values, slopes = [], []
        for compared, weight in zip(depths, weights, strict=True):
            value, slope = self.divergence(compared.target, compared.draft)
            values.append((value * weight).sum())
            slopes.append(slope.mul_(weight[:, None]))
        return torch.stack(values).sum(), slopes


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Pointwise):
    """Hard cross-entropy on the text, as Kim & Rush 2016 (Seq-KD) train on the teacher's own.

    On greedy target text `accuracy`, the share of tokens that the drafter would have drafted
    greedily, is the acceptance rate to be expected at temperature 0.
    """

    needs_target: ClassVar[bool] = False

    def divergence(self, target: Outcomes, draft: Outcomes) -> tuple[Tensor, Tensor]:
        """-log q(label), as the forward KL from the label's point mass."""
        return forward_kl(target, draft)


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Pointwise):
    """KL from the target's distribution to the drafter's (Hinton et al. 2015; DistillSpec)."""

    def divergence(self, target: Outcomes, draft: Outcomes) -> tuple[Tensor, Tensor]:
        """KL(p || q)."""
        return forward_kl(target, draft)


def judged(
    objective: Objective,
    depth_weights: DepthWeights,
    depths: Sequence[Compared],
    labels: Sequence[Tensor],
    valid: Sequence[Tensor | None],
) -> tuple[LossTerms, list[Tensor]]:
    """The objective of a chunk: its sums, and the derivatives by each depth's log-probabilities.

    Told besides, per depth where there are several: `alpha`, the expected acceptance rate of a
    drafter that samples at the objective's temperature, Σ min(p, q) (Leviathan et al. 2023,
    theorem 3.5), or its bounds `alpha_lower` and `alpha_upper` where the target's tail is lumped;
    `greedy_alpha`, p(argmax q), that of one that drafts greedily; `top1_agreement`, that at
    temperature 0; and `accepted_length` of drafts of all depths. Without a target, `accuracy`.
    """
    exists = [
        torch.ones_like(truth, dtype=torch.bool) if there is None else there
        for truth, there in zip(labels, valid, strict=True)
    ]
    is_real = torch.stack(exists).to(depths[0].draft.probs.dtype)  # [K, T]
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    rates: dict[str, list[Tensor]] = {}
    for number, (compared, truth) in enumerate(zip(depths, labels, strict=True)):
        suffix = f"_{number + 1}" if len(depths) > 1 else ""
        told = _rates(compared) if objective.needs_target else _hits(compared, truth)
        for name, rate in told.items():
            rate = rate * is_real[number]
            metrics[_numbered(name, suffix)] = (rate.sum(), is_real[number].sum())
            rates.setdefault(name, []).append(rate)
    if len(depths) > 1:
        for name in ("alpha", "alpha_lower", "alpha_upper", "accuracy"):
            if name in rates:  # a draft is accepted up to its first rejected token
                length = torch.stack(rates[name]).cumprod(0).sum()
                told_as = name.replace("accuracy", "alpha").replace("alpha", "accepted_length")
                metrics[told_as] = (length, is_real[0].sum())
    main = next(name for name in ("alpha", "alpha_upper", "accuracy") if name in rates)
    weights = depth_weights.weights(torch.stack(rates[main])) * is_real
    loss, slopes = objective.judge(depths, weights)
    return LossTerms(loss, is_real.sum(), metrics), slopes


def _numbered(name: str, suffix: str) -> str:
    """alpha_lower of depth 1 is alpha_1_lower."""
    head, _, tail = name.partition("_")
    return f"{head}{suffix}_{tail}" if tail in ("lower", "upper") else f"{name}{suffix}"


def _rates(compared: Compared) -> dict[str, Tensor]:
    """Acceptance rates [T] that the two distributions imply."""
    target, draft, lumped = compared.target.probs, compared.draft.probs, compared.lumped
    drafted = compared.token_probs.argmax(-1, keepdim=True)
    both = torch.minimum(target, draft)
    if lumped is None:
        greedy = target.gather(-1, drafted)[:, 0]
        agreed = (greedy == target.amax(-1)).to(greedy.dtype)
        return {"alpha": both.sum(-1), "greedy_alpha": greedy, "top1_agreement": agreed}
    known = (target[:, :-1] * (lumped.ids == drafted)).sum(-1)
    likeliest = lumped.ids.gather(-1, target[:, :-1].argmax(-1, keepdim=True))
    return {
        "alpha_lower": both[:, :-1].sum(-1),
        "alpha_upper": both.sum(-1),
        "greedy_alpha_lower": known,
        "top1_agreement": (likeliest == drafted)[:, 0].to(known.dtype),
    }


def _hits(compared: Compared, labels: Tensor) -> dict[str, Tensor]:
    """Where the likeliest token is the label, [T]."""
    drafted = compared.token_probs.argmax(-1)
    return {"accuracy": (drafted == labels).to(compared.token_probs.dtype)}
