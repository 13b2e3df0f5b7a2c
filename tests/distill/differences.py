"""Gradients against finite differences of the loss, in float64."""

from dataclasses import dataclass

import torch

from distill import divergences
from distill.chunked import prediction_losses, projected_loss
from distill.objectives import ForwardKL, GreedyAcceptance, LKLambda, Pointwise, TotalVariation


@dataclass(frozen=True, kw_only=True)
class Surrogate(GreedyAcceptance):
    """-log Σ p q̂ alone."""

    def divergence(self, compared):
        apart = compared.apart()
        return divergences.greedy_acceptance(apart.target, apart.draft, self.sharpness)[:2]


@dataclass(frozen=True, kw_only=True)
class Overrated(Pointwise):
    """By how much Σ p q̂ is."""

    sharpness: float

    def divergence(self, compared):
        apart = compared.apart()
        share = divergences.greedy_acceptance(apart.target, apart.draft, self.sharpness)[2]
        return share, torch.zeros_like(compared.draft.probs)


def mixture(objective, aligned, signal):
    """What forward KL is mixed with, and forward KL's share [T]; or None."""
    temperature = objective.temperature
    if isinstance(objective, LKLambda):
        other = TotalVariation(temperature=temperature)
        (rejected,) = prediction_losses(aligned, signal, other)
        return other, (-objective.eta * (1 - rejected)).exp()
    if isinstance(objective, GreedyAcceptance):
        settings = {"temperature": temperature, "sharpness": objective.sharpness}
        (share,) = prediction_losses(aligned, signal, Overrated(**settings))
        return Surrogate(**settings), share
    return None


def check_gradients(objective, aligned, signal, tensors, chunk_size=None):
    """Of the loss of `aligned(*tensors)` by all `tensors`.

    The shares of a mixture move with the drafter, and its gradient holds them: finite differences
    are then taken of the mixture with the shares of `tensors`.
    """

    def loss(objective, tensors, weights=None):
        return projected_loss(
            aligned(*tensors), signal, objective, token_weights=weights, chunk_size=chunk_size
        ).loss

    mixed = mixture(objective, aligned(*tensors), signal)
    if mixed is None:
        assert torch.autograd.gradcheck(lambda *tensors: loss(objective, tensors), tensors)
        return
    other, share = mixed
    assert share.std() > 0.01  # or the mixing would not be seen
    kl = ForwardKL(temperature=objective.temperature)

    def held(*tensors):
        """The mixture's value, and the gradient of `objective`."""
        ours = loss(objective, tensors)
        mixture = loss(kl, tensors, share) + loss(other, tensors, 1 - share)
        return mixture.detach() + (ours - ours.detach())

    torch.testing.assert_close(held(*tensors), loss(objective, tensors))
    assert torch.autograd.gradcheck(held, tensors)
