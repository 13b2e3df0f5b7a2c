"""The chunked loss against the plain one: same sums, same gradients, in less memory."""

import pytest
import torch

from distill.chunked import Head, States, projected_loss
from distill.objectives import CrossEntropy, ForwardKL

TOKENS, HIDDEN, VOCAB = 7, 4, 9


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
    plain = objective(logits, labels, target.logits(0, TOKENS))
    expected = torch.autograd.grad(plain.loss * 0.3, [hidden, weight, bias])

    states = States(hidden, Head(weight, bias, softcap))
    terms = projected_loss(states, labels, target.logits, objective, chunk_size=chunk_size)
    torch.testing.assert_close(terms.loss, plain.loss)
    assert terms.num_tokens == plain.num_tokens
    for name, values in plain.metrics.items():
        for ours, theirs in zip(terms.metrics[name], values, strict=True):
            torch.testing.assert_close(ours, theirs)
    gradients = torch.autograd.grad(terms.loss * 0.3, [hidden, weight, bias])
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("objective", [CrossEntropy(), ForwardKL(temperature=1.5)])
def test_gradients_against_finite_differences(objective):
    hidden, weight, bias, labels, target = inputs()

    def loss(hidden, weight, bias):
        states = States(hidden, Head(weight, bias, 4.0))
        return projected_loss(states, labels, target.logits, objective, chunk_size=3).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_tied_embeddings_get_both_gradients():
    _, weight, _, labels, _ = inputs()
    ids = torch.arange(TOKENS)
    torch.nn.functional.cross_entropy(weight[ids] @ weight.T, labels, reduction="sum").backward()
    expected = weight.grad.clone()
    weight.grad = None
    states = States(weight[ids], Head(weight))
    projected_loss(states, labels, None, CrossEntropy(), chunk_size=2).loss.backward()
    torch.testing.assert_close(weight.grad, expected)


def test_states_that_are_logits_already():
    hidden, weight, _, labels, _ = inputs()
    logits = hidden @ weight.T
    expected = torch.autograd.grad(
        CrossEntropy()(logits, labels, None).loss, hidden, retain_graph=True
    )
    loss = projected_loss(States(logits, Head(None)), labels, None, CrossEntropy()).loss
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), expected)


@pytest.mark.parametrize("vocab", [VOCAB - 2, VOCAB + 3])
def test_padded_vocabularies_are_compared_where_both_have_ids(vocab):
    hidden, weight, bias, labels, target = inputs(vocab=vocab)
    labels = labels % (VOCAB - 2)
    width = min(vocab, VOCAB)
    plain = ForwardKL()(
        (hidden @ weight.T + bias)[:, :width], labels, target.logits(0, TOKENS)[:, :width]
    )
    states = States(hidden, Head(weight, bias))
    terms = projected_loss(states, labels, target.logits, ForwardKL(), chunk_size=4)
    torch.testing.assert_close(terms.loss, plain.loss)


def test_no_tokens_give_zero_and_zero_gradients():
    hidden, weight, _, labels, target = inputs()
    states = States(hidden[:0], Head(weight))
    terms = projected_loss(states, labels[:0], target.logits, ForwardKL())
    assert terms.loss == 0
    assert terms.num_tokens == 0
    assert terms.metrics.keys() == {"alpha", "top1_agreement"}
    terms.loss.backward()
    assert hidden.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0


def test_frozen_weights_get_no_gradient_and_no_grad_mode_forms_none():
    hidden, weight, _, labels, _ = inputs()
    frozen = weight.detach()
    loss = projected_loss(States(hidden, Head(frozen)), labels, None, CrossEntropy()).loss
    loss.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        terms = projected_loss(States(hidden, Head(weight)), labels, None, CrossEntropy())
    assert not terms.loss.requires_grad


def test_half_precision_products_stay_close():
    hidden, weight, bias, labels, target = inputs(torch.float32)
    states = States(hidden, Head(weight, bias))
    exact = projected_loss(states, labels, target.logits, ForwardKL())
    with torch.autocast("cpu", torch.bfloat16):
        half = projected_loss(states, labels, target.logits, ForwardKL())
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, exact.loss, rtol=3e-2, atol=0)
    gradients = [torch.autograd.grad(terms.loss, [hidden, weight]) for terms in (exact, half)]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(theirs, ours, rtol=0.1, atol=0.1)
