"""The chunked loss against the plain one: same sums, same gradients, in less memory."""

import pytest
import torch
from torch.nn import functional

from distill.alignment import Aligned, Depth
from distill.chunked import projected_loss
from distill.objectives import CrossEntropy, ForwardKL
from distill.states import Head, States

TOKENS, HIDDEN, VOCAB = 7, 4, 9


def one(states, labels):
    return Aligned((Depth(states, labels),))


def plain_loss(objective, logits, labels, target_logits):
    """The objective by torch's own functions, differentiable."""
    if isinstance(objective, CrossEntropy):
        return functional.cross_entropy(logits, labels, reduction="sum")
    temperature = objective.temperature
    target, draft = (target_logits / temperature).detach(), logits / temperature
    return functional.kl_div(
        draft.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True
    )


def inputs(dtype=torch.float64, vocab=VOCAB):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    target = States(random(TOKENS, 3), Head(random(vocab, 3)))
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return random(TOKENS, HIDDEN), random(VOCAB, HIDDEN), random(VOCAB), labels, target


@pytest.mark.parametrize("objective", [CrossEntropy(), ForwardKL(), ForwardKL(temperature=2.0)])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_equals_the_plain_computation(objective, softcap, chunk_size):
    hidden, weight, bias, labels, target = inputs()
    logits = hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = plain_loss(objective, logits, labels, target.law(slice(None)).logits)
    expected = torch.autograd.grad(plain * 0.3, [hidden, weight, bias])

    states = States(hidden, Head(weight, bias, softcap))
    terms = projected_loss(one(states, labels), target, objective, chunk_size=chunk_size)
    torch.testing.assert_close(terms.loss, plain)
    assert terms.num_tokens == TOKENS
    assert {int(count) for _, count in terms.metrics.values()} == {TOKENS}
    gradients = torch.autograd.grad(terms.loss * 0.3, [hidden, weight, bias])
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("objective", [CrossEntropy(), ForwardKL(temperature=1.5)])
def test_gradients_against_finite_differences(objective):
    hidden, weight, bias, labels, target = inputs()

    def loss(hidden, weight, bias):
        states = States(hidden, Head(weight, bias, 4.0))
        return projected_loss(one(states, labels), target, objective, chunk_size=3).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_tied_embeddings_get_both_gradients():
    _, weight, _, labels, _ = inputs()
    ids = torch.arange(TOKENS)
    torch.nn.functional.cross_entropy(weight[ids] @ weight.T, labels, reduction="sum").backward()
    expected = weight.grad.clone()
    weight.grad = None
    states = States(weight[ids], Head(weight))
    projected_loss(one(states, labels), None, CrossEntropy(), chunk_size=2).loss.backward()
    torch.testing.assert_close(weight.grad, expected)


def test_states_that_are_logits_already():
    hidden, weight, _, labels, _ = inputs()
    logits = hidden @ weight.T
    plain = functional.cross_entropy(logits, labels, reduction="sum")
    expected = torch.autograd.grad(plain, hidden, retain_graph=True)
    loss = projected_loss(one(States(logits, Head(None)), labels), None, CrossEntropy()).loss
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), expected)


@pytest.mark.parametrize("vocab", [VOCAB - 2, VOCAB + 3])
def test_padded_vocabularies_are_compared_where_both_have_ids(vocab):
    hidden, weight, bias, labels, target = inputs(vocab=vocab)
    labels = labels % (VOCAB - 2)
    width = min(vocab, VOCAB)
    logits = (hidden @ weight.T + bias)[:, :width]
    plain = plain_loss(ForwardKL(), logits, labels, target.law(slice(None)).logits[:, :width])
    expected = torch.autograd.grad(plain, [hidden, weight, bias])
    states = one(States(hidden, Head(weight, bias)), labels)
    terms = projected_loss(states, target, ForwardKL(), chunk_size=4)
    torch.testing.assert_close(terms.loss, plain)
    gradients = torch.autograd.grad(terms.loss, [hidden, weight, bias])
    torch.testing.assert_close(gradients, expected)


def test_no_tokens_give_zero_and_zero_gradients():
    hidden, weight, _, labels, target = inputs()
    states = one(States(hidden[:0], Head(weight)), labels[:0])
    terms = projected_loss(states, target, ForwardKL())
    assert terms.loss == 0
    assert terms.num_tokens == 0
    assert terms.metrics.keys() == {"alpha", "greedy_alpha", "top1_agreement"}
    terms.loss.backward()
    assert hidden.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0


def test_frozen_weights_get_no_gradient_and_no_grad_mode_forms_none():
    hidden, weight, _, labels, _ = inputs()
    frozen = weight.detach()
    loss = projected_loss(one(States(hidden, Head(frozen)), labels), None, CrossEntropy()).loss
    loss.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        aligned = one(States(hidden, Head(weight)), labels)
        terms = projected_loss(aligned, None, CrossEntropy())
    assert not terms.loss.requires_grad


def test_half_precision_products_stay_close():
    hidden, weight, bias, labels, target = inputs(torch.float32)
    aligned = one(States(hidden, Head(weight, bias)), labels)
    exact = projected_loss(aligned, target, ForwardKL())
    with torch.autocast("cpu", torch.bfloat16):
        half = projected_loss(aligned, target, ForwardKL())
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, exact.loss, rtol=3e-2, atol=0)
    gradients = [torch.autograd.grad(terms.loss, [hidden, weight]) for terms in (exact, half)]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(theirs, ours, rtol=0.1, atol=0.1)


def test_depths_share_or_own_their_heads_and_states():
    hidden, weight, bias, labels, target = inputs()
    own, tensors = bias.detach().clone().requires_grad_(), [hidden, weight, bias]
    rows = torch.tensor([1, 2, 3, 4, 5, 6, 0])
    valid = rows > 0
    aligned = Aligned(
        (
            Depth(States(hidden, Head(weight, bias)), labels),
            Depth(States(hidden, Head(weight, own)), labels[rows], rows, valid),
        )
    )
    terms = projected_loss(aligned, target, ForwardKL(), chunk_size=3)
    law = target.law(slice(None)).logits
    logits = [hidden @ weight.T + bias, hidden[:-1] @ weight.T + own]
    plain = plain_loss(ForwardKL(), logits[0], labels, law)
    plain = plain + plain_loss(ForwardKL(), logits[1], labels[1:], law[1:])
    torch.testing.assert_close(terms.loss, plain)
    assert terms.num_tokens == 2 * TOKENS - 1
    assert terms.metrics["alpha_1"][1] == TOKENS
    assert terms.metrics["alpha_2"][1] == TOKENS - 1
    expected = torch.autograd.grad(plain, [*tensors, own])
    torch.testing.assert_close(torch.autograd.grad(terms.loss, [*tensors, own]), expected)
