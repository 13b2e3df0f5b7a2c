"""Divergences against their definition, and their slopes against automatic differentiation."""

import math

import pytest
import torch

from distill.divergences import forward_kl
from distill.laws import Compared, FullLaw, Outcomes, TopLaw


def of(*probs):
    return Outcomes.of(torch.tensor([probs], dtype=torch.float64).log())


def test_forward_kl_of_two_coins():
    value, _ = forward_kl(of(0.5, 0.5), of(0.25, 0.75))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_forward_kl_gradient(temperature):
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    compared = Compared.at(FullLaw(target), draft, temperature)
    gradient = compared.logit_gradient(forward_kl(compared.target, compared.draft)[1])
    # d/dz KL(p_T || q_T) = (q_T - p_T) / T
    difference = (draft / temperature).softmax(-1) - (target / temperature).softmax(-1)
    torch.testing.assert_close(gradient, difference / temperature)


def test_a_stored_top_serves_its_own_temperature_only():
    law = TopLaw(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25]))
    with pytest.raises(ValueError, match=r"at temperature 1, not 0.5"):
        Compared.at(law, torch.zeros(1, 4), 0.5)
