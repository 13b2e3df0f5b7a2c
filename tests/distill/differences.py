"""Gradients against finite differences of the loss, in float64."""

import torch

from distill.chunked import prediction_losses, projected_loss
from distill.objectives import ForwardKL, LKLambda, TotalVariation


def check_gradients(objective, aligned, signal, tensors, chunk_size=None):
    """Of the loss of `aligned(*tensors)` by all `tensors`.

    LK-λ's λ moves with α, and its gradient holds it: finite differences are then taken of the
    mixture with the λ of `tensors`.
    """

    def loss(objective, tensors, weights=None):
        return projected_loss(
            aligned(*tensors), signal, objective, token_weights=weights, chunk_size=chunk_size
        ).loss

    if not isinstance(objective, LKLambda):
        assert torch.autograd.gradcheck(lambda *tensors: loss(objective, tensors), tensors)
        return
    kl, tv = (kind(temperature=objective.temperature) for kind in (ForwardKL, TotalVariation))
    (rejected,) = prediction_losses(aligned(*tensors), signal, tv)
    share = (-objective.eta * (1 - rejected)).exp()

    def held(*tensors):
        """The mixture's value, and the gradient of `objective`."""
        ours = loss(objective, tensors)
        mixture = loss(kl, tensors, share) + loss(tv, tensors, 1 - share)
        return mixture.detach() + (ours - ours.detach())

    torch.testing.assert_close(held(*tensors), loss(objective, tensors))
    assert torch.autograd.gradcheck(held, tensors)
