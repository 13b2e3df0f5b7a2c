"""Divergences against their definition, and their slopes against automatic differentiation."""

import math

import pytest
import torch

from distill import divergences
from distill.laws import Compared, FullLaw, Goal, Outcomes, TopLaw
from distill.objectives import GreedyAcceptance
from tests.distill.plain import POINTWISE, VALUES, greedy_acceptance, kl

PLACES, VOCAB = 4, 7
HAVE_AN_EDGE = {"TotalVariation", "LKAlpha", "LKLambda"}


def logits(seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, PLACES, VOCAB, generator=generator, dtype=dtype) * scale


def top(target_logits, k=3, temperature=1.0):
    logprobs, ids = (target_logits / temperature).log_softmax(-1).topk(k)
    return TopLaw(ids, logprobs, 1 - logprobs.exp().sum(-1), temperature)


def judged(objective, law, draft, temperature=1.0):
    """The value and the gradient of the logits."""
    compared = Compared.at(Goal.of(law, temperature, draft), draft)
    value, _ = objective.divergence(compared)
    _, (gradient,) = objective.judge([compared], torch.ones(1, len(value), dtype=value.dtype))
    return value, gradient


def gradient_of(value, draft):
    return torch.autograd.grad(value.sum(), draft)[0]


def test_forward_kl_of_two_coins():
    coins = [torch.tensor([[p, 1 - p]]).log() for p in (0.5, 0.25)]
    value, _ = divergences.forward_kl(*map(Outcomes.of, coins))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("objective", POINTWISE, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_value_and_gradient_are_those_of_the_formula(objective, temperature):
    target, draft = logits()
    draft.requires_grad_()
    p, q = (target / temperature).softmax(-1), (draft / temperature).softmax(-1)
    plain = VALUES[objective](p, q)
    value, gradient = judged(objective, FullLaw(target), draft.detach(), temperature)
    torch.testing.assert_close(value, plain.detach())
    torch.testing.assert_close(gradient, gradient_of(plain, draft))


@pytest.mark.parametrize("objective", POINTWISE, ids=lambda o: type(o).__name__)
def test_over_a_stored_top_the_tail_is_one_outcome(objective):
    target, draft = logits()
    draft.requires_grad_()
    law = top(target)
    q = draft.softmax(-1)
    kept = q.gather(-1, law.ids)
    q = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)
    p = torch.cat([law.logprobs.exp(), law.tail_mass[:, None]], -1)
    if isinstance(objective, GreedyAcceptance):  # no single token is known to have the tail
        tokens = draft.softmax(-1)
        known = torch.zeros_like(tokens).scatter(-1, law.ids, law.logprobs.exp())
        plain = greedy_acceptance(known, tokens, objective.sharpness, kl(p, q))
    else:
        plain = VALUES[objective](p, q)
    value, gradient = judged(objective, law, draft.detach())
    torch.testing.assert_close(value, plain.detach())
    torch.testing.assert_close(gradient, gradient_of(plain, draft))


def test_greedy_acceptance_is_that_of_the_likeliest_token_as_q_is_sharpened():
    target, draft = map(Outcomes.of, logits(5))
    of_likeliest = target.probs.gather(-1, draft.probs.argmax(-1, keepdim=True))[:, 0]
    value, _, overrated = divergences.greedy_acceptance(target, draft, sharpness=300.0)
    torch.testing.assert_close(value, -of_likeliest.log(), atol=1e-9, rtol=0)
    believed = draft.probs.amax(-1)
    torch.testing.assert_close(overrated, (1 - of_likeliest / believed).clamp(min=0))
    assert 0 < overrated.count_nonzero() < PLACES  # or one of the sides is not seen


@pytest.mark.parametrize("sharpness", [1.0, 2.0, 5.0])
def test_greedy_acceptance_needs_no_more_than_a_top_without_a_tail(sharpness):
    """Where the target has no mass on any other token, in value and gradient."""
    target, draft = logits(5)
    target = target.masked_fill(target < target.topk(3).values[:, -1:], -math.inf)
    objective = GreedyAcceptance(sharpness=sharpness)
    full, stored = (judged(objective, law, draft) for law in (FullLaw(target), top(target)))
    torch.testing.assert_close(stored, full)


@pytest.mark.parametrize("objective", POINTWISE, ids=lambda o: type(o).__name__)
def test_a_stored_top_bounds_the_divergence_from_below_and_all_of_it_is_exact(objective):
    target, draft = logits(1)
    full, _ = judged(objective, FullLaw(target), draft)
    everything, gradient = judged(objective, top(target, VOCAB), draft)
    torch.testing.assert_close(everything, full)
    torch.testing.assert_close(gradient, judged(objective, FullLaw(target), draft)[1])
    if not isinstance(objective, GreedyAcceptance):  # there the tail's mass is not counted
        lumped = [judged(objective, top(target, k), draft)[0] for k in (1, 3, 5)]
        if type(objective).__name__ != "LKLambda":  # its mixture is no divergence
            assert (lumped[0] <= lumped[1] + 1e-12).all()
            assert (lumped[2] <= full + 1e-12).all()


@pytest.mark.parametrize("objective", POINTWISE, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("law", [FullLaw, top])
def test_the_target_itself_has_nothing_to_learn(objective, law):
    target, _ = logits(2)
    value, gradient = judged(objective, law(target), target)
    if isinstance(objective, GreedyAcceptance):
        assert (gradient.gather(-1, target.argmax(-1, keepdim=True)) < 0).all()  # it wants the mode
        return
    assert value.abs().max() < 1e-9
    # Total variation has an edge at p = q, where rounding of a stored top may choose a side.
    if law is FullLaw or type(objective).__name__ not in HAVE_AN_EDGE:
        assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("objective", POINTWISE, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_stored", [False, True])
def test_impossible_tokens_make_no_nan(objective, dtype, is_stored):
    target, draft = logits(3, dtype, scale=30.0)
    target[0], target[0, 0] = -math.inf, 0.0  # a point mass
    target[1, 3:], draft[2, :4], draft[3, 0] = -math.inf, -math.inf, -200.0
    draft[0, 0] = -400.0  # its probability is 0 in float32
    value, gradient = judged(objective, top(target) if is_stored else FullLaw(target), draft)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert (value >= -1e-5).all()


@pytest.mark.parametrize("objective", POINTWISE, ids=lambda o: type(o).__name__)
def test_one_token_is_certain(objective):
    value, gradient = judged(objective, FullLaw(torch.zeros(2, 1)), torch.ones(2, 1))
    assert value.tolist() == [0, 0]
    assert gradient.tolist() == [[0], [0]]


def test_what_trains_from_scratch():
    """At a drafter that knows nothing TV's gradient is lost in the vocabulary, the others' not."""
    target = torch.zeros(1, 10_000)
    target[0, 0] = 20.0  # p = 0.99998
    sizes = {
        type(objective).__name__: judged(objective, FullLaw(target), torch.zeros(1, 10_000))[1]
        .abs()
        .max()
        .item()
        for objective in POINTWISE
    }
    assert sizes["TotalVariation"] < 1e-3
    assert all(sizes[name] > 0.3 for name in ("ForwardKL", "LKAlpha", "GreedyAcceptance"))
    assert sizes["LKLambda"] == pytest.approx(sizes["ForwardKL"], rel=0.01)


def test_a_stored_top_serves_its_own_temperature_only():
    with pytest.raises(ValueError, match=r"at temperature 1, not 0.5"):
        Goal.of(top(logits()[0]), 0.5, logits()[1])


@pytest.mark.parametrize("objective", POINTWISE, ids=lambda o: type(o).__name__)
def test_all_of_the_vocabulary_stored_at_a_temperature_is_the_target_at_it(objective):
    target, draft = logits()
    live = judged(objective, FullLaw(target), draft, 0.7)
    stored = judged(objective, top(target, VOCAB, 0.7), draft, 0.7)
    torch.testing.assert_close(stored, live)
