"""Objectives: what they sum, count and tell."""

import pytest
import torch

from distill.objectives import CrossEntropy, ForwardKL

TARGET = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
DRAFT = torch.tensor([[0.2, 0.7, 0.1], [0.3, 0.3, 0.4]])
LABELS = torch.tensor([1, 2])


def test_cross_entropy_sums_over_tokens():
    terms = CrossEntropy()(DRAFT.log(), LABELS, None)
    assert terms.loss.item() == pytest.approx(-(DRAFT[0, 1].log() + DRAFT[1, 2].log()).item())
    assert terms.num_tokens == 2
    assert [value.item() for value in terms.metrics["accuracy"]] == [2, 2]


def test_forward_kl_tells_the_acceptance_it_implies():
    terms = ForwardKL()(DRAFT.log(), LABELS, TARGET.log())
    assert terms.loss.item() == pytest.approx((TARGET * (TARGET / DRAFT).log()).sum().item())
    total, count = terms.metrics["alpha"]
    assert total.item() == pytest.approx(0.2 + 0.3 + 0.1 + 0.1 + 0.1 + 0.4)  # Σ min(p, q)
    assert count == 2
    assert [value.item() for value in terms.metrics["top1_agreement"]] == [1, 2]


def test_terms_of_parts_add_up_to_the_whole():
    objective = ForwardKL(temperature=2.0)
    whole = objective(DRAFT.log(), LABELS, TARGET.log())
    parts = [
        objective(DRAFT[i, None].log(), LABELS[i, None], TARGET[i, None].log()) for i in (0, 1)
    ]
    assert whole.loss.item() == pytest.approx(sum(part.loss.item() for part in parts))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="temperature must be > 0"):
        ForwardKL(temperature=0.0)
    with pytest.raises(ValueError, match="needs the target's logits"):
        ForwardKL()(DRAFT.log(), LABELS, None)
