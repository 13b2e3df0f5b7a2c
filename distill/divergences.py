"""Divergences between the target's distribution p and the drafter's q, token by token.

Pure functions ``(target, draft) -> (value [T], slope [T, O])`` over O outcomes: every token, or a
stored top-k and its tail. The slope s is the derivative by the drafter's log-probabilities, formed
by hand: automatic differentiation keeps and passes over [T, O] several times more. By the logits
it is ``s - q Σ s`` (`Compared.logit_gradient`), so slopes that differ by a multiple of q are the
same. Log-probabilities are finite, so an outcome that p or q rules out adds 0·log 0 = 0.
"""

import torch
from torch import Tensor

from distill.laws import Outcomes


def forward_kl(target: Outcomes, draft: Outcomes) -> tuple[Tensor, Tensor]:
    """KL(p || q) = Σ p (log p - log q), in nats; s = -p, so ∂/∂z = q - p.

    Hinton et al. 2015; DistillSpec (Zhou et al. 2023, section 3).
    """
    value = _dot(target.probs, target.logprobs - draft.logprobs)
    return value, target.probs.neg()


def reverse_kl(target: Outcomes, draft: Outcomes) -> tuple[Tensor, Tensor]:
    """KL(q || p) = Σ q (log q - log p); s = q (log q - log p), up to a multiple of q.

    DistillSpec (Zhou et al. 2023, section 3): it prefers to leave out what the target says over
    saying what it does not.
    """
    slope = (draft.logprobs - target.logprobs).mul_(draft.probs)
    return slope.sum(-1), slope


def jensen_shannon(target: Outcomes, draft: Outcomes, beta: float) -> tuple[Tensor, Tensor]:
    """β KL(p || m) + (1 - β) KL(q || m) with m = β p + (1 - β) q; s = (1 - β) q log(q / m).

    GKD (Agarwal et al. 2023, section 2); to first order β times the forward KL as β -> 0.
    """
    middle = _log_mix(target, draft, beta)
    slope = (draft.logprobs - middle).mul_(draft.probs).mul_(1 - beta)
    value = beta * _dot(target.probs, target.logprobs - middle) + slope.sum(-1)
    return value, slope


def skewed_forward_kl(target: Outcomes, draft: Outcomes, skew: float) -> tuple[Tensor, Tensor]:
    """KL(p || m) with m = λ p + (1 - λ) q; s = -(1 - λ) p q / m.

    DistiLLM (Ko et al. 2024, section 3.1): p / m is bounded by 1 / λ, and with it the gradient.
    """
    middle = _log_mix(target, draft, skew)
    ratio = (target.logprobs - middle).exp_()  # p / m
    slope = ratio.mul_(draft.probs).mul_(skew - 1)
    return _dot(target.probs, target.logprobs - middle), slope


def skewed_reverse_kl(target: Outcomes, draft: Outcomes, skew: float) -> tuple[Tensor, Tensor]:
    """KL(q || m) with m = (1 - λ) p + λ q; s = q (log(q / m) - λ q / m).

    DistiLLM (Ko et al. 2024, section 3.1).
    """
    log_ratio = draft.logprobs - _log_mix(draft, target, skew)  # log q / m
    value = _dot(draft.probs, log_ratio)
    return value, (log_ratio - skew * log_ratio.exp()).mul_(draft.probs)


def acceptance(target: Outcomes, draft: Outcomes) -> tuple[Tensor, Tensor]:
    """α = Σ min(p, q), the share of drafted tokens that are accepted; s = q where q < p.

    Leviathan et al. 2023 (theorem 3.5). Where p = q the slope is the middle of the one-sided ones,
    q / 2, so that a drafter that is the target has none to follow.
    """
    value = torch.minimum(target.probs, draft.probs).sum(-1)
    return value, _below(target, draft).mul_(draft.probs)


def total_variation(target: Outcomes, draft: Outcomes) -> tuple[Tensor, Tensor]:
    """½ Σ |p - q| = 1 - α (DistillSpec; LK losses).

    Its gradient is bounded by q, which a drafter that knows nothing spreads over the vocabulary:
    it barely begins to move. Start from a trained drafter, or use `lk_lambda` or `lk_alpha`.
    """
    alpha, slope = acceptance(target, draft)
    return 1 - alpha, slope.neg_()


def lk_alpha(target: Outcomes, draft: Outcomes) -> tuple[Tensor, Tensor]:
    """-log α (LK losses): total variation, its gradient divided by α, so that it starts.

    α is summed in the logarithm: a point mass that the drafter all but rules out still pulls.
    """
    smaller = torch.minimum(target.logprobs, draft.logprobs)
    log_alpha = smaller.logsumexp(-1, keepdim=True)
    slope = _below(target, draft).mul_((smaller - log_alpha).exp_()).neg_()
    return -log_alpha[:, 0], slope


def lk_lambda(target: Outcomes, draft: Outcomes, eta: float) -> tuple[Tensor, Tensor]:
    """λ KL(p || q) + (1 - λ) TV with λ = exp(-η α), a constant to the gradient (LK losses).

    Forward KL while the drafter knows nothing, total variation when it agrees.
    """
    alpha, accepted = acceptance(target, draft)
    divergence, slope = forward_kl(target, draft)
    share = (-eta * alpha).exp()
    slope = slope.mul_(share[:, None]).sub_(accepted.mul_((1 - share)[:, None]))
    return share * divergence + (1 - share) * (1 - alpha), slope


def greedy_acceptance(
    target: Outcomes, draft: Outcomes, sharpness: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-log Σ p q̂ with q̂ ∝ q^sharpness: a smooth p(argmax q), which a greedy draft is accepted with.

    As the sharpness grows q̂ becomes the drafter's likeliest token. The logarithm makes it train
    from q = 1/V: of Σ p q̂ itself the gradient is of the size of q̂; divided by the sum it is
    sharpness·(1/V - p), forward KL's up to the scale. It ends elsewhere: at q̂ on the target's
    likeliest tokens rather than at q = p. s = sharpness·(q̂ - p q̂ / Σ p q̂).

    What pulls is p q̂, so a drafter that is sure of a wrong token is hardly told of the right one.
    The third of the results says how sure beyond its merit it is: 1 - Σ p q̂ / Σ q q̂, [T], cut at
    0; the denominator is what Σ p q̂ would be if the drafter were right about the target.
    """
    sharp = (draft.logprobs * sharpness).log_softmax(-1)
    joint = target.logprobs + sharp
    log_value = joint.logsumexp(-1, keepdim=True)
    slope = sharp.exp_()
    believed = _dot(draft.probs, slope)
    overrated = (1 - log_value[:, 0].exp() / believed).clamp_(min=0)
    slope = slope.sub_((joint - log_value).exp_()).mul_(sharpness)
    return -log_value[:, 0], slope, overrated


def _log_mix(first: Outcomes, second: Outcomes, share: float) -> Tensor:
    """Log of share·first + (1 - share)·second: never below the shares' own logarithms."""
    mixed = first.probs.mul(share).add_(second.probs, alpha=1 - share)
    return mixed.clamp_(min=torch.finfo(mixed.dtype).tiny).log_()


def _below(target: Outcomes, draft: Outcomes) -> Tensor:
    """1 where q < p, ½ where they are equal, 0 elsewhere: the derivative of min(p, q) by q."""
    return (target.probs - draft.probs).sign_().add_(1).mul_(0.5)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Σ over outcomes, [T]."""
    return (first * second).sum(-1)
