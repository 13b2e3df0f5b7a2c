"""The chunked loss against the plain one: same sums, same gradients, in less memory."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from distill import chunked
from distill.alignment import Aligned, Depth
from distill.chunked import prediction_losses, projected_loss
from distill.depth_weights import Decay, Survival
from distill.objectives import (
    AdaSPEC,
    CrossEntropy,
    EndToEndTV,
    ForwardKL,
    LKLambda,
    TotalVariation,
)
from distill.states import Head, States
from tests.distill.differences import check_gradients
from tests.distill.plain import POINTWISE
from tests.distill.stored import Stored, check_bounds

TOKENS, HIDDEN, VOCAB = 7, 4, 9


def one(states, labels):
    return Aligned((Depth(states, labels),))


def plain_loss(objective, logits, labels, target_logits):
    """The objective by torch's own functions, differentiable."""
    temperature = objective.temperature
    if isinstance(objective, CrossEntropy):
        return functional.cross_entropy(logits / temperature, labels, reduction="sum")
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


def test_autocast_is_the_targets_too():
    """In every chunk its products take the precision that the drafter's take."""
    hidden, weight, _, labels, target = inputs(torch.float32)
    precisions = []

    class Watched:
        def law(self, rows):
            precisions.append(torch.is_autocast_enabled("cpu"))
            return target.law(rows)

    with torch.autocast("cpu", torch.bfloat16):
        projected_loss(
            one(States(hidden, Head(weight)), labels), Watched(), ForwardKL(), chunk_size=3
        )
    assert precisions == [True] * 3


@pytest.mark.parametrize("chunk_size", [1, 100])
def test_a_token_weighs_what_it_is_given_at_every_depth(chunk_size):
    """The second depth predicts the token behind, where there is one."""
    hidden, weight, bias, labels, target = inputs()
    states = States(hidden, Head(weight, bias))
    rows, valid = torch.arange(1, TOKENS + 1), torch.ones(TOKENS, dtype=torch.bool)
    rows[-1], valid[-1] = 0, False
    aligned = Aligned((Depth(states, labels), Depth(states, labels[rows], rows, valid)))
    weights = torch.linspace(0, 2, TOKENS)
    terms = projected_loss(
        aligned, target, ForwardKL(), token_weights=weights, chunk_size=chunk_size
    )
    whole = projected_loss(aligned, target, ForwardKL())
    first, second = prediction_losses(aligned, target, ForwardKL())
    expected = (first * weights).sum() + (second * weights[rows] * valid).sum()
    torch.testing.assert_close(terms.loss.detach(), expected)
    assert terms.num_tokens == whole.num_tokens  # only the loss is weighted
    torch.testing.assert_close(terms.metrics["alpha_2"], whole.metrics["alpha_2"])

    logits = hidden @ weight.T + bias
    goal = target.law(slice(None)).logits
    laws = [
        functional.kl_div(
            logits.log_softmax(-1), law.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        for law in (goal, goal[rows])
    ]
    plain = (laws[0] * weights).sum() + (laws[1] * weights[rows] * valid).sum()
    ours, theirs = (torch.autograd.grad(loss, [hidden, weight]) for loss in (terms.loss, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "objective", [kind(temperature=t) for kind in (CrossEntropy, ForwardKL) for t in (1.0, 2.0)]
)
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


@pytest.mark.parametrize(
    "objective",
    [
        CrossEntropy(),
        ForwardKL(temperature=1.5),
        LKLambda(temperature=1.5, eta=1.0),
        *POINTWISE,
        EndToEndTV(),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_gradients_against_finite_differences(objective):
    hidden, weight, bias, labels, target = inputs()

    def aligned(hidden, weight, bias):
        return one(States(hidden, Head(weight, bias, 4.0)), labels)

    check_gradients(objective, aligned, target, (hidden, weight, bias), chunk_size=3)


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


@pytest.mark.parametrize(
    ("objective", "told"),
    [(ForwardKL(), {"alpha", "greedy_alpha", "top1_agreement"}), (CrossEntropy(), {"accuracy"})],
)
def test_no_tokens_give_zero_and_zero_gradients(objective, told):
    hidden, weight, _, labels, target = inputs()
    states = one(States(hidden[:0], Head(weight)), labels[:0])
    terms = projected_loss(states, target, objective)
    assert terms.loss == 0
    assert terms.num_tokens == 0
    assert terms.metrics.keys() == told
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 2, 4, 100])
def test_half_precision_products_stay_close(dtype, chunk_size, monkeypatch):
    """Of one row, two or four at a time, where three rows wait for one product, or of all."""
    if chunk_size < 100:
        monkeypatch.setattr(chunked, "PRODUCT_ELEMENTS", 3 * VOCAB)
    hidden, weight, bias, labels, target = inputs(torch.float32)
    exact = projected_loss(one(States(hidden, Head(weight, bias)), labels), target, ForwardKL())
    expected = torch.autograd.grad(exact.loss, [hidden, weight, bias])
    narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    aligned = one(States(narrow[0], Head(*narrow[1:])), labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        half = projected_loss(aligned, target, ForwardKL(), chunk_size=chunk_size)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, exact.loss, rtol=3e-2, atol=0)
    for ours, theirs in zip(torch.autograd.grad(half.loss, narrow), expected, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_the_target_is_asked_once_for_what_several_depths_predict():
    tensors, labels, target = three_depths_of_inputs()
    asked = []

    class Watched:
        def law(self, rows):
            asked.append(rows.tolist())
            return target.law(rows)

    projected_loss(three_depths(tensors, labels), Watched(), ForwardKL(), chunk_size=4)
    assert asked == [[0, 1, 2, 3, 4, 5], [0, 4, 5, 6]]  # 0 for places that predict nothing


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


def three_depths(tensors, labels):
    """Depth d predicts the token d places on; the last places have none."""
    hidden, weight, bias, second = tensors
    depths = []
    for depth, head in enumerate((Head(weight, bias), Head(second), Head(weight, bias))):
        rows = torch.arange(TOKENS) + depth
        valid = rows < TOKENS
        rows = rows.where(valid, 0)
        depths.append(Depth(States(hidden, head), labels[rows].where(valid, 0), rows, valid))
    return Aligned(tuple(depths))


def alphas_of(tensors, target):
    """Σ min(p, q) by hand, [3, TOKENS], 0 where there is no token."""
    hidden, weight, bias, second = tensors
    target_probs = target.law(slice(None)).logits.softmax(-1)
    draft_logits = [hidden @ weight.T + bias, hidden @ second.T, hidden @ weight.T + bias]
    rows = []
    for depth, logits in enumerate(draft_logits):
        both = torch.minimum(target_probs[depth:], logits.softmax(-1)[: TOKENS - depth]).sum(-1)
        rows.append(torch.cat([both, both.new_zeros(depth)]))
    return torch.stack(rows)


def three_depths_of_inputs():
    hidden, weight, bias, labels, target = inputs()
    generator = torch.Generator().manual_seed(1)
    second = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=hidden.dtype).requires_grad_()
    return (hidden, weight, bias, second), labels, target


def test_end_to_end_total_variation_counts_the_tokens_of_whole_drafts():
    tensors, labels, target = three_depths_of_inputs()
    aligned = three_depths(tensors, labels)
    terms = projected_loss(aligned, target, EndToEndTV(), chunk_size=2)
    alphas = alphas_of(tensors, target)
    num_tokens = 3 * TOKENS - 3
    plain = num_tokens - alphas.cumprod(0).sum()
    torch.testing.assert_close(terms.loss, plain)
    assert terms.num_tokens == num_tokens
    torch.testing.assert_close(
        terms.metrics["accepted_length"][0], alphas.cumprod(0).sum().detach()
    )
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, tensors), torch.autograd.grad(plain, tensors)
    )


@pytest.mark.parametrize("weights", [Decay(factor=0.5), Survival()])
def test_depth_weights(weights):
    tensors, labels, target = three_depths_of_inputs()
    aligned = three_depths(tensors, labels)
    terms = projected_loss(aligned, target, TotalVariation(), depth_weights=weights, chunk_size=3)
    alphas = alphas_of(tensors, target)
    exists = alphas > 0
    if isinstance(weights, Decay):
        scale = torch.tensor([1, 0.5, 0.25], dtype=alphas.dtype)[:, None]
    else:
        scale = torch.stack([torch.ones_like(alphas[0]), alphas[0], alphas[0] * alphas[1]])
    plain = (scale.detach() * exists * (1 - alphas)).sum()
    torch.testing.assert_close(terms.loss, plain)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, tensors), torch.autograd.grad(plain, tensors)
    )


@pytest.mark.parametrize("objective", POINTWISE, ids=lambda objective: type(objective).__name__)
def test_a_stored_top_against_finite_differences(objective):
    hidden, weight, bias, labels, target = inputs()

    def aligned(hidden, weight, bias):
        return one(States(hidden, Head(weight, bias, 4.0)), labels)

    tensors = (hidden, weight, bias)
    check_gradients(objective, aligned, Stored(target, 3), tensors, chunk_size=3)


@pytest.mark.parametrize("k", [None, 3])
def test_a_draft_of_several_depths_against_finite_differences(k):
    tensors, labels, target = three_depths_of_inputs()
    signal = target if k is None else Stored(target, k)
    check_gradients(EndToEndTV(), lambda *t: three_depths(t, labels), signal, tensors)


@pytest.mark.parametrize("k", [None, 3])
def test_only_kept_predictions_have_a_gradient(k):
    tensors, labels, target = three_depths_of_inputs()
    signal = target if k is None else Stored(target, k)
    kept = torch.zeros(3, TOKENS, dtype=torch.bool)
    kept[0, [0, 2]] = kept[1, [2, 3]] = kept[2, 4] = True

    def aligned(*tensors):
        depths = three_depths(tensors, labels).depths
        pairs = zip(depths, kept, strict=True)
        return Aligned(tuple(replace(depth, kept=each) for depth, each in pairs))

    objective = AdaSPEC(reference="")
    check_gradients(objective, aligned, signal, tensors)
    gradients = torch.autograd.grad(
        projected_loss(aligned(*tensors), signal, objective, chunk_size=3).loss, tensors
    )
    assert (gradients[0] != 0).any(-1).tolist() == kept.any(0).tolist()
    if k is None:
        hidden, weight, bias, second = tensors
        law = target.law(slice(None)).logits
        logits = (hidden @ weight.T + bias, hidden @ second.T, hidden @ weight.T + bias)
        plain = sum(
            plain_loss(objective, drafted[learnt], None, law.roll(-depth, 0)[learnt])
            for depth, (drafted, learnt) in enumerate(zip(logits, kept, strict=True))
        )
        torch.testing.assert_close(gradients, torch.autograd.grad(plain, tensors))


def test_a_stored_top_bounds_the_acceptance_of_one_depth_and_of_several():
    tensors, labels, target = three_depths_of_inputs()
    drafts = three_depths(tensors, labels)
    for aligned in (Aligned(drafts.depths[:1]), drafts):
        check_bounds(aligned, target)
    terms = projected_loss(drafts, Stored(target, 3), EndToEndTV())
    accepted = terms.metrics["accepted_length_upper"][0]  # by this bound it counts
    torch.testing.assert_close(terms.loss.detach(), terms.num_tokens - accepted)


@pytest.mark.parametrize("objective", [*POINTWISE, EndToEndTV()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("is_half", [False, True])
def test_every_objective_is_learnt(objective, is_half):
    """Free hidden states and weights come nearer to the target by plain descent."""
    hidden, weight, bias, labels, target = inputs(torch.float32)
    optimizer = torch.optim.Adam([hidden, weight, bias], lr=0.1)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            aligned = one(States(hidden, Head(weight, bias)), labels)
            terms = projected_loss(aligned, target, objective)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        losses.append(terms)
    assert losses[-1].loss < 0.75 * losses[0].loss
    rate = "greedy_alpha" if type(objective).__name__ == "GreedyAcceptance" else "alpha"
    assert losses[-1].metrics[rate][0] > losses[0].metrics[rate][0]


def test_the_greedy_rate_is_what_the_target_gives_to_the_likeliest_token():
    hidden, weight, _, labels, target = inputs()
    terms = projected_loss(one(States(hidden, Head(weight)), labels), target, POINTWISE[-1])
    at_likeliest = target.law(slice(None)).logits.softmax(-1)[
        torch.arange(TOKENS), (hidden @ weight.T).argmax(-1)
    ]
    assert terms.metrics["greedy_alpha"][0].item() == pytest.approx(at_likeliest.sum().item())


MEMORY = """
import os, resource, sys, torch
sys.path[:0] = [{root!r}]
from distill.alignment import Aligned, Depth
from distill.chunked import prediction_losses, projected_loss
from distill.objectives import {name}
from distill.states import Head, States
torch.set_num_threads(1)
tokens, hidden, vocab = {tokens}, {hidden}, 128_000
weight = torch.randn(vocab, hidden).requires_grad_()
states = States(torch.randn(tokens, hidden).requires_grad_(), Head(weight))
target = States(torch.randn(tokens, hidden), Head(torch.randn(vocab, hidden)))
labels = torch.zeros(tokens, dtype=torch.long)
few = Aligned((Depth(States(states.hidden[:1], states.head), labels[:1]),))
projected_loss(few, target, {name}()).loss.backward()  # so that its code is loaded
weight.grad = states.hidden.grad = None
pages = int(open("/proc/self/statm").read().split()[1])
before = pages * os.sysconf("SC_PAGESIZE")
projected_loss(Aligned((Depth(states, labels),) * {depths}), target, {name}()).loss.backward()
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
gradients = 4 * (weight.grad.numel() + states.hidden.grad.numel())
print(most - before - gradients)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens", "hidden", "depths"),
    [
        ("ForwardKL", 8192, 16, 1),
        ("JensenShannon", 8192, 16, 1),
        ("LKAlpha", 8192, 16, 1),
        ("GreedyAcceptance", 8192, 16, 1),
        ("ForwardKL", 512, 16, 4),
        ("ForwardKL", 32, 512, 1),
    ],
)
def test_a_large_vocabulary_adds_less_than_200_mb(name, tokens, hidden, depths):
    """To the gradients, which are as large as the head and the states are."""
    root = str(Path(__file__).parents[2])
    code = MEMORY.format(root=root, name=name, tokens=tokens, hidden=hidden, depths=depths)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 2**20 < 200


def test_a_graph_that_stays_gives_its_gradients_again():
    hidden, weight, bias, labels, target = inputs()
    terms = projected_loss(one(States(hidden, Head(weight, bias)), labels), target, ForwardKL())
    (kept,) = torch.autograd.grad(terms.loss, weight, retain_graph=True)
    (halved,) = torch.autograd.grad(0.5 * terms.loss, weight, retain_graph=True)
    (last,) = torch.autograd.grad(terms.loss, weight)
    torch.testing.assert_close(kept, last)
    torch.testing.assert_close(2 * halved, last)
    with pytest.raises(RuntimeError, match="went backward before"):
        torch.autograd.grad(terms.loss, weight)
