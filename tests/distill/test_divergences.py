"""Divergences against their definition, and their gradients against finite differences."""

import math

import pytest
import torch

from distill.divergences import forward_kl


def test_forward_kl_of_two_coins():
    target, draft = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert forward_kl(target, draft).item() == pytest.approx(expected, rel=1e-6)


def test_forward_kl_is_zero_for_the_target_itself_and_positive_elsewhere():
    target, draft = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0))
    assert forward_kl(target, target + 3.0).abs().max() < 1e-6  # logits are free up to a constant
    assert (forward_kl(target, draft) > 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_forward_kl_gradient(temperature):
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    draft.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: forward_kl(target, logits, temperature=temperature), draft
    )
    # d/dz T² KL(p_T || q_T) = T (q_T - p_T)
    (gradient,) = torch.autograd.grad(
        forward_kl(target, draft, temperature=temperature).sum(), draft
    )
    difference = (draft / temperature).softmax(-1) - (target / temperature).softmax(-1)
    torch.testing.assert_close(gradient, temperature * difference)


def test_no_gradient_reaches_the_target():
    target = torch.zeros(1, 4, requires_grad=True)
    draft = torch.randn(1, 4, requires_grad=True)
    forward_kl(target, draft).sum().backward()
    assert target.grad is None
