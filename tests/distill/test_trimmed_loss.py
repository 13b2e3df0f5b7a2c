"""The loss of a drafter whose head covers some ids: the target's law stays that over all."""

from dataclasses import replace

import pytest
import torch
from torch.special import xlogy

from distill import objectives
from distill.alignment import Aligned, Depth
from distill.chunked import projected_loss
from distill.laws import Kept, TopLaw
from distill.objectives import CrossEntropy, EndToEndTV, ForwardKL, GreedyAcceptance
from distill.states import Head, States
from tests.distill.differences import check_gradients
from tests.distill.plain import POINTWISE, alpha, greedy_acceptance
from tests.distill.stored import Stored, check_bounds

TOKENS, HIDDEN, VOCAB = 7, 4, 9
KEPT = torch.tensor([0, 2, 3, 7, 8])
NAMED = {"ids": lambda objective: type(objective).__name__}


def kl(p, q):
    """With 0 log 0 = 0; infinite where q alone is 0."""
    return (xlogy(p, p) - xlogy(p, q)).sum(-1)


def kept_kl(p, q):
    """Forward KL as a trimmed drafter has it: without the outcomes that are infinite for all."""
    return kl(p[:, KEPT], q[:, KEPT])


def jensen_shannon(p, q, beta):
    middle = beta * p + (1 - beta) * q
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def kept_lk_lambda(p, q, eta):
    share = (-eta * alpha(p, q).detach()).exp()
    return share * kept_kl(p, q) + (1 - share) * (1 - alpha(p, q))


VALUES = {
    objectives.ForwardKL(temperature=1.5): kept_kl,
    objectives.ReverseKL(): lambda p, q: kl(q[:, KEPT], p[:, KEPT]),
    objectives.JensenShannon(beta=0.3): lambda p, q: jensen_shannon(p, q, 0.3),
    objectives.SkewedForwardKL(skew=0.2): lambda p, q: kl(p, 0.2 * p + 0.8 * q),
    objectives.SkewedReverseKL(skew=0.2): lambda p, q: kl(q, 0.8 * p + 0.2 * q),
    objectives.TotalVariation(): lambda p, q: (p - q).abs().sum(-1) / 2,
    objectives.LKAlpha(): lambda p, q: -alpha(p, q).log(),
    objectives.LKLambda(): lambda p, q: kept_lk_lambda(p, q, 3.0),
    objectives.GreedyAcceptance(): lambda p, q: greedy_acceptance(p, q, 2.0, kept_kl(p, q)),
}


def inputs():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    target = States(random(TOKENS, 3), Head(random(VOCAB, 3)))
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return random(TOKENS, HIDDEN), random(len(KEPT), HIDDEN), labels, target


def trimmed(hidden, weight, labels):
    return Aligned((Depth(States(hidden, Head(weight, kept=Kept.of(KEPT, VOCAB))), labels),))


def scattered(hidden, weight, temperature):
    """Of the drafter, over the whole vocabulary."""
    logits = (hidden @ weight.T / temperature).softmax(-1)
    return logits.new_zeros(TOKENS, VOCAB).index_copy(1, KEPT, logits)


@pytest.mark.parametrize("chunk_size", [3, 100])
@pytest.mark.parametrize("objective", VALUES, **NAMED)
def test_a_divergence_is_that_from_the_whole_law_to_q_with_zeros(objective, chunk_size):
    hidden, weight, labels, target = inputs()
    p = (target.law(slice(None)).logits / objective.temperature).softmax(-1)
    plain = VALUES[objective](p, scattered(hidden, weight, objective.temperature)).sum()
    expected = torch.autograd.grad(plain, [hidden, weight])
    terms = projected_loss(
        trimmed(hidden, weight, labels), target, objective, chunk_size=chunk_size
    )
    torch.testing.assert_close(terms.loss, plain)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, [hidden, weight]), expected)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("objective", [*POINTWISE, EndToEndTV()], **NAMED)
def test_gradients_against_finite_differences(objective, k):
    hidden, weight, labels, target = inputs()
    signal = target if k is None else Stored(target, k)
    check_gradients(objective, lambda *t: trimmed(*t, labels), signal, (hidden, weight))


@pytest.mark.parametrize("objective", [*POINTWISE, EndToEndTV()], **NAMED)
def test_a_law_that_is_stored_whole_says_the_same(objective):
    hidden, weight, labels, target = inputs()
    aligned = trimmed(hidden, weight, labels)
    live, stored = (
        projected_loss(aligned, signal, objective) for signal in (target, Stored(target, VOCAB))
    )
    torch.testing.assert_close(stored.loss, live.loss)
    gradients = [torch.autograd.grad(terms.loss, [hidden, weight]) for terms in (live, stored)]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert stored.metrics["top1_agreement"] == live.metrics["top1_agreement"]
    torch.testing.assert_close(stored.metrics["alpha_lower"], live.metrics["alpha"])


def test_the_acceptance_rate_counts_what_is_outside_as_rejected():
    hidden, weight, labels, target = inputs()
    p, q = target.law(slice(None)).logits.softmax(-1), scattered(hidden, weight, 1.0)
    metrics = projected_loss(trimmed(hidden, weight, labels), target, ForwardKL()).metrics
    torch.testing.assert_close(metrics["alpha"][0], alpha(p, q).sum().detach())
    drafted = q.argmax(-1, keepdim=True)
    torch.testing.assert_close(metrics["greedy_alpha"][0], p.gather(-1, drafted).sum())
    agreed = (drafted[:, 0] == p.argmax(-1)).double().sum()
    outside = ~torch.isin(p.argmax(-1), KEPT)
    assert outside.any()  # or the next line would hold also where p is cut
    assert metrics["top1_agreement"][0] == agreed


def test_a_stored_top_bounds_the_acceptance_of_one_depth_and_of_several():
    """A stored token that is outside is rejected for sure, one in the tail perhaps."""
    hidden, weight, labels, target = inputs()
    (first,) = trimmed(hidden, weight, labels).depths
    rows = torch.arange(TOKENS) + 1
    valid = rows < TOKENS
    second = replace(first, rows=rows.where(valid, 0), valid=valid)
    is_inside = torch.isin(target.law(slice(None)).logits.topk(3).indices, KEPT)
    assert is_inside.any()
    assert not is_inside.all()
    for aligned in (Aligned((first,)), Aligned((first, second))):
        check_bounds(aligned, target)


def test_a_label_outside_is_counted_and_teaches_nothing():
    hidden, weight, _, _ = inputs()
    labels = torch.tensor([0, 1, 2, 1, 8, 5, 3])
    terms = projected_loss(trimmed(hidden, weight, labels), None, CrossEntropy())
    inside = torch.isin(labels, KEPT)
    q = scattered(hidden, weight, 1.0)
    plain = -q[inside].gather(-1, labels[inside, None]).log().sum()
    expected = torch.autograd.grad(plain, [hidden, weight])
    torch.testing.assert_close(terms.loss, plain)
    assert terms.num_tokens == len(labels)
    hits = (q.argmax(-1) == labels).double()
    assert terms.metrics["accuracy"] == (hits.sum(), len(labels))
    torch.testing.assert_close(torch.autograd.grad(terms.loss, [hidden, weight]), expected)


@pytest.mark.parametrize("objective", [*POINTWISE, EndToEndTV()], **NAMED)
@pytest.mark.parametrize("tail", [0.0, 1e-6])
def test_a_place_of_which_the_head_has_nothing_moves_nothing_out_of_bounds(objective, tail):
    """All stored tokens are outside: the loss is finite, and what is inside as good as before."""
    hidden, weight, labels, _ = inputs()

    class Outside:
        def law(self, rows):
            ids = torch.tensor([[1, 4]]).expand(TOKENS, -1)[rows]
            logprobs = torch.tensor([[0.75, 0.25]]).mul(1 - tail).log().expand(TOKENS, -1)[rows]
            return TopLaw(ids, logprobs, torch.full((len(ids),), tail))

    terms = projected_loss(trimmed(hidden, weight, labels), Outside(), objective)
    gradients = torch.autograd.grad(terms.loss, [hidden, weight])
    assert torch.isfinite(terms.loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if not isinstance(objective, GreedyAcceptance):
        # Inside there is one outcome only, the tail: nothing tells its tokens apart.
        assert all(gradient.abs().max() < 1e-9 for gradient in gradients)
