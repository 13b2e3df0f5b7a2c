"""What is minimised: a divergence per prediction, summed; and what is told about it meanwhile.

An objective is called on chunks of the places where tokens are to be predicted, all depths of the
draft together. What comes out are sums and counts; the loop divides once, by the number of learnt
tokens of the whole batch over all processes.

Shape legend: K depths of a draft, T places, O outcomes (all tokens, or a stored top-k and a tail).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from distill import divergences
from distill.labels import Labelled
from distill.laws import Compared


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

    def judge(self, depths: Sequence[Any], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Judge the drafter's predictions.

        Args:
            depths: K of T places each: `Compared` with the target, or `Labelled` where it is not
                needed.
            weights: [K, T]; 0 where there is nothing to predict.

        Returns:
            The weighted sum, and its derivatives [T, V] by each depth's logits.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """Sums a divergence over all predictions, each weighted as its depth is.

    Attributes:
        temperature: the serving temperature, at which drafter and target are compared.
        block: of a language model, how many consecutive tokens are one draft, whose depths
            `depth_weights` weighs; heads draft as many as they are.
    """

    temperature: float = 1.0
    block: int = 1

    needs_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what no server samples at, and drafts of nothing."""
        _check_serving(self)

    def divergence(self, compared: Compared) -> tuple[Tensor, Tensor]:
        """The value [T] and its derivative [T, O] by the drafter's log-probabilities."""
        raise NotImplementedError

    def logit_gradient(self, compared: Compared, slope: Tensor) -> Tensor:
        """The gradient of the drafter's logits [T, V] from that derivative."""
        return compared.logit_gradient(slope)

    def judge(self, depths: Sequence[Compared], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Σ w D, and its derivatives."""
        values, gradients = [], []
        for compared, weight in zip(depths, weights, strict=True):
            value, slope = self.divergence(compared)
            values.append((value * weight).sum())
            gradients.append(self.logit_gradient(compared, slope.mul_(weight[:, None])))
        return torch.stack(values).sum(), gradients


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Hard cross-entropy on the text, as Kim & Rush 2016 (Seq-KD) train on the teacher's own.

    `accuracy` is the share of tokens that the drafter would have drafted greedily: on greedy target
    text the acceptance rate to be expected at temperature 0, on sampled text that of greedy drafts
    under a target that samples, p(argmax q).

    Attributes:
        temperature: that of the text and of serving: the drafter's law is taken at it.
        block: see `Pointwise`.
    """

    temperature: float = 1.0
    block: int = 1

    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what no server samples at, and drafts of nothing."""
        _check_serving(self)

    def judge(self, depths: Sequence[Labelled], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """-Σ w log q(label)."""
        values, gradients = [], []
        for depth, weight in zip(depths, weights, strict=True):
            values.append((depth.losses * weight).sum())
            gradients.append(depth.logit_gradient(weight / self.temperature))
        return torch.stack(values).sum(), gradients


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Pointwise):
    """KL(p || q) from the target to the drafter (Hinton et al. 2015; DistillSpec)."""

    def divergence(self, compared: Compared) -> tuple[Tensor, Tensor]:
        """KL(p || q)."""
        return divergences.forward_kl(compared.target, compared.draft)


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Pointwise):
    """KL(q || p) from the drafter to the target (MiniLLM; DistillSpec)."""

    def divergence(self, compared: Compared) -> tuple[Tensor, Tensor]:
        """KL(q || p)."""
        return divergences.reverse_kl(compared.target, compared.draft)


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Pointwise):
    """The generalised Jensen-Shannon divergence (GKD, Agarwal et al. 2023, section 2).

    Attributes:
        beta: the target's share of the mixture: near 0 like forward KL, near 1 like reverse KL.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        """Refuse mixtures of one side only."""
        Pointwise.__post_init__(self)
        _check(beta=(self.beta, 0 < self.beta < 1, "between 0 and 1"))

    def divergence(self, compared: Compared) -> tuple[Tensor, Tensor]:
        """JSD(β)."""
        value, slope = divergences.jensen_shannon(compared.target, compared.draft, self.beta)
        return _with_outside(value, compared, -self.beta * math.log(self.beta)), slope


@dataclass(frozen=True, kw_only=True)
class SkewedForwardKL(Pointwise):
    """KL(p || λ p + (1 - λ) q) (DistiLLM, Ko et al. 2024, section 3.1).

    Attributes:
        skew: λ, the share of the other side that is mixed in.
    """

    skew: float = 0.1

    def __post_init__(self) -> None:
        """Refuse mixtures of one side only."""
        Pointwise.__post_init__(self)
        _check(skew=(self.skew, 0 < self.skew < 1, "between 0 and 1"))

    def divergence(self, compared: Compared) -> tuple[Tensor, Tensor]:
        """KL(p || m)."""
        value, slope = divergences.skewed_forward_kl(compared.target, compared.draft, self.skew)
        return _with_outside(value, compared, -math.log(self.skew)), slope


@dataclass(frozen=True, kw_only=True)
class SkewedReverseKL(Pointwise):
    """KL(q || (1 - λ) p + λ q) (DistiLLM, Ko et al. 2024, section 3.1).

    Attributes:
        skew: λ, the share of the own side that is mixed in.
    """

    skew: float = 0.1

    def __post_init__(self) -> None:
        """Refuse mixtures of one side only."""
        Pointwise.__post_init__(self)
        _check(skew=(self.skew, 0 < self.skew < 1, "between 0 and 1"))

    def divergence(self, compared: Compared) -> tuple[Tensor, Tensor]:
        """KL(q || m)."""
        return divergences.skewed_reverse_kl(compared.target, compared.draft, self.skew)


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Pointwise):
    """1 - α, the share of sampled drafts that is rejected; for drafters that agree already."""

    def divergence(self, compared: Compared) -> tuple[Tensor, Tensor]:
        """½ Σ |p - q|."""
        return divergences.total_variation(compared.target, compared.draft)


@dataclass(frozen=True, kw_only=True)
class LKAlpha(Pointwise):
    """-log α: the acceptance rate itself, with a gradient that starts from scratch (LK losses)."""

    def divergence(self, compared: Compared) -> tuple[Tensor, Tensor]:
        """-log Σ min(p, q)."""
        return divergences.lk_alpha(compared.target, compared.draft)


@dataclass(frozen=True, kw_only=True)
class LKLambda(Pointwise):
    """From forward KL to total variation, token by token, as they agree (LK losses).

    Attributes:
        eta: how soon: forward KL's share is exp(-η α).
    """

    eta: float = 3.0

    def __post_init__(self) -> None:
        """Refuse a share that grows with the agreement."""
        Pointwise.__post_init__(self)
        _check(eta=(self.eta, self.eta >= 0, ">= 0"))

    def divergence(self, compared: Compared) -> tuple[Tensor, Tensor]:
        """λ KL + (1 - λ) TV."""
        return divergences.lk_lambda(compared.target, compared.draft, self.eta)


@dataclass(frozen=True, kw_only=True)
class GreedyAcceptance(Pointwise):
    """A smooth p(argmax q): for servers whose drafter is greedy and whose target samples.

    vLLM drafts so by default: the draft is accepted with the probability that the target gives to
    the drafter's likeliest token, and how q spreads over the others is of no account.

    ``λ KL(p || q) - (1 - λ) log Σ p q̂`` with q̂ ∝ q^sharpness; λ, a constant to the gradient, is by
    how much the drafter overrates Σ p q̂ (`divergences.greedy_acceptance`): forward KL teaches those
    who are sure of wrong tokens, as heads are that begin as the target's own.

    Attributes:
        sharpness: the power of q that stands for its likeliest token.
    """

    sharpness: float = 2.0

    def __post_init__(self) -> None:
        """Refuse powers that flatten."""
        Pointwise.__post_init__(self)
        _check(sharpness=(self.sharpness, self.sharpness >= 1, ">= 1"))

    def divergence(self, compared: Compared) -> tuple[Tensor, Tensor]:
        """The value, its derivative by the log-probabilities of all tokens apart.

        The lumped tail does not tell Σ q^s.
        """
        apart = compared.apart()
        greedy, slope, share = divergences.greedy_acceptance(
            apart.target, apart.draft, self.sharpness
        )
        divergence, of_outcomes = divergences.forward_kl(compared.target, compared.draft)
        spread = compared.spread(of_outcomes)
        slope = slope.mul_((1 - share)[:, None]).addcmul_(spread, share[:, None])
        return share * divergence + (1 - share) * greedy, slope

    def logit_gradient(self, compared: Compared, slope: Tensor) -> Tensor:
        """From a slope by all tokens apart."""
        return compared.token_gradient(slope)


@dataclass(frozen=True, kw_only=True)
class EndToEndTV:
    """Rejected tokens of whole drafts: Σ_j (1 - Π_{i <= j} α_i) over the depths (Bebop).

    Divided by the number of depths it is ``1 - 1/K Σ_j Π_{i <= j} (1 - TV_i)``; an early depth
    counts in all later terms. Like total variation it wants a drafter that agrees already.

    Attributes:
        temperature: the serving temperature.
        block: the length of the drafts that an independent model learns, teacher-forced; heads
            have theirs.
    """

    temperature: float = 1.0
    block: int = 5

    needs_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse drafts of nothing."""
        _check_serving(self)

    def judge(self, depths: Sequence[Compared], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The expected number of rejected tokens, those behind a rejected one among them."""
        rates, slopes = zip(
            *(divergences.acceptance(depth.target, depth.draft) for depth in depths), strict=True
        )
        reached = (weights > 0).cumprod(0)  # a place without a token ends the draft
        with torch.enable_grad():
            alphas = torch.stack(rates).requires_grad_()
            loss = (weights * reached * (1 - alphas.cumprod(0))).sum()
            (shares,) = torch.autograd.grad(loss, alphas)
        return loss.detach(), [
            compared.logit_gradient(slope.mul_(share[:, None]))
            for compared, slope, share in zip(depths, slopes, shares, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class AdaSPEC(ForwardKL):
    """Forward KL on the tokens that the drafter can still learn (AdaSPEC, 2510.19779).

    Those with the largest excess of its divergence over a reference drafter's, which was trained
    before on the same data: what even that one has not learnt, a small model does not learn.

    Attributes:
        reference: the reference drafter, a language model or, for heads, heads: a local folder or
            a hub id.
        fraction: how many of a micro-batch's tokens are kept.
    """

    reference: str
    fraction: float = 0.4

    def __post_init__(self) -> None:
        """Refuse fractions that keep nothing."""
        ForwardKL.__post_init__(self)
        _check(fraction=(self.fraction, 0 < self.fraction <= 1, "in (0, 1]"))


def _with_outside(value: Tensor, compared: Compared, cost: float) -> Tensor:
    """Value [T] and what the target's tokens outside a trimmed head add, where q = 0: p · cost."""
    return value if compared.outside is None else value + compared.outside * cost


def _check_serving(objective: Objective) -> None:
    """Refuse temperatures that nobody samples at, and drafts of nothing."""
    temperature, block = objective.temperature, objective.block
    _check(temperature=(temperature, temperature > 0, "> 0"), block=(block, block >= 1, ">= 1"))


def _check(**settings: tuple[float, bool, str]) -> None:
    """Name the first setting that is not as it must be."""
    for name, (value, is_right, wanted) in settings.items():
        if not is_right:
            raise ValueError(f"{name} must be {wanted}, got {value}")
