"""Every objective as its paper writes it, from probabilities, for torch to differentiate.

p is the target's distribution [T, O] and q the drafter's; zeros are not looked after.
"""

import torch

from distill import objectives


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def alpha(p, q):
    return torch.minimum(p, q).sum(-1)


def sharpened(q, power):
    return q**power / (q**power).sum(-1, keepdim=True)


def jensen_shannon(p, q, beta):
    middle = beta * p + (1 - beta) * q
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def lk_lambda(p, q, eta):
    share = (-eta * alpha(p, q).detach()).exp()
    return share * kl(p, q) + (1 - share) * (1 - alpha(p, q))


def greedy_acceptance(p, q, sharpness, divergence=None):
    """With a forward KL over fewer outcomes where one is given."""
    sharp = sharpened(q, sharpness)
    accepted = (p * sharp).sum(-1)
    share = (1 - accepted / (q * sharp).sum(-1)).clamp(min=0).detach()
    divergence = kl(p, q) if divergence is None else divergence
    return share * divergence - (1 - share) * accepted.log()


VALUES = {
    objectives.ForwardKL(): kl,
    objectives.ReverseKL(): lambda p, q: kl(q, p),
    objectives.JensenShannon(beta=0.3): lambda p, q: jensen_shannon(p, q, 0.3),
    objectives.SkewedForwardKL(skew=0.2): lambda p, q: kl(p, 0.2 * p + 0.8 * q),
    objectives.SkewedReverseKL(skew=0.2): lambda p, q: kl(q, 0.8 * p + 0.2 * q),
    objectives.TotalVariation(): lambda p, q: (p - q).abs().sum(-1) / 2,
    objectives.LKAlpha(): lambda p, q: -alpha(p, q).log(),
    objectives.LKLambda(eta=3.0): lambda p, q: lk_lambda(p, q, 3.0),
    objectives.GreedyAcceptance(sharpness=2.0): lambda p, q: greedy_acceptance(p, q, 2.0),
}
POINTWISE = list(VALUES)
