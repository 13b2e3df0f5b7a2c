"""Objectives: what they sum, count and tell."""

import pytest
import torch

from distill.alignment import Aligned, Depth
from distill.chunked import projected_loss
from distill.objectives import CrossEntropy, ForwardKL
from distill.states import Head, States

TARGET = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
DRAFT = torch.tensor([[0.2, 0.7, 0.1], [0.3, 0.3, 0.4]])
LABELS = torch.tensor([1, 2])


def states(probs):
    return States(probs.log(), Head(None))


def terms_of(objective, target=TARGET):
    aligned = Aligned((Depth(states(DRAFT), LABELS),))
    return projected_loss(aligned, None if target is None else states(target), objective)


def test_cross_entropy_sums_over_tokens():
    terms = terms_of(CrossEntropy(), None)
    assert terms.loss.item() == pytest.approx(-(DRAFT[0, 1].log() + DRAFT[1, 2].log()).item())
    assert terms.num_tokens == 2
    assert [value.item() for value in terms.metrics["accuracy"]] == [2, 2]


def test_forward_kl_tells_the_acceptance_it_implies():
    terms = terms_of(ForwardKL())
    assert terms.loss.item() == pytest.approx((TARGET * (TARGET / DRAFT).log()).sum().item())
    total, count = terms.metrics["alpha"]
    assert total.item() == pytest.approx(0.2 + 0.3 + 0.1 + 0.1 + 0.1 + 0.4)  # Σ min(p, q)
    assert count == 2
    assert [value.item() for value in terms.metrics["top1_agreement"]] == [1, 2]
    assert terms.metrics["greedy_alpha"][0].item() == pytest.approx(0.3 + 0.8)  # p(argmax q)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="temperature must be > 0"):
        ForwardKL(temperature=0.0)
    with pytest.raises(ValueError, match="needs the target's logits"):
        terms_of(ForwardKL(), None)
