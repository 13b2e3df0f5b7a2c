"""Cross-entropy on the text against torch's own, by both ways of computing it."""

from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch.nn import functional

from distill.alignment import Aligned, Depth
from distill.chunked import projected_loss
from distill.labels import IGNORED, Labelled, has_liger, judged_by_liger, judged_by_torch
from distill.laws import FLOOR, Kept
from distill.objectives import CrossEntropy
from distill.states import Head, States

PLACES, VOCAB = 6, 11


def inputs(dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(PLACES, VOCAB, generator=generator, dtype=dtype) * scale
    labels = torch.randint(VOCAB, (PLACES,), generator=generator)
    labels[:2] = logits[:2].argmax(-1)  # some are hit
    weights = torch.rand(PLACES, generator=generator, dtype=dtype)
    return logits, labels, weights


def expected(logits, labels, weights):
    """Losses, hits and the weighted gradient, by automatic differentiation."""
    logits = logits.clone().requires_grad_()
    losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    (gradient,) = torch.autograd.grad(losses, logits, weights)
    return losses.detach(), (logits.argmax(-1) == labels).to(logits.dtype), gradient


def assert_as_expected(labelled, wanted, weights):
    losses, hits, gradient = wanted
    torch.testing.assert_close(labelled.losses, losses)
    assert labelled.hits.tolist() == hits.tolist()
    torch.testing.assert_close(labelled.logit_gradient(weights), gradient)


@pytest.mark.parametrize("is_ignored", [False, True])
def test_losses_hits_and_gradient_are_those_of_cross_entropy(is_ignored):
    logits, labels, weights = inputs()
    if is_ignored:
        labels[[0, 3]] = IGNORED
    wanted = expected(logits, labels, weights)
    assert_as_expected(judged_by_torch(labels, logits), wanted, weights)


def test_a_label_that_is_ruled_out_costs_as_much_as_any_can():
    logits = torch.tensor([[0.0, -torch.inf]])
    labelled = judged_by_torch(torch.tensor([1]), logits)
    assert labelled.losses.tolist() == [-FLOOR]
    assert labelled.logit_gradient(torch.ones(1)).tolist() == [[1, -1]]


def test_labels_that_are_not_kept_have_neither_loss_nor_gradient():
    kept = Kept.of(torch.tensor([1, 4, 9]), VOCAB)
    logits, labels = torch.randn(3, 3, dtype=torch.float64), torch.tensor([4, 5, 9])
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    wanted = expected(logits, torch.tensor([1, IGNORED, 2]), weights)
    assert_as_expected(Labelled.at(labels, logits, kept), wanted, weights)


@pytest.mark.parametrize(
    ("installed", "is_new_enough"),
    [("0.8.5", True), ("1.0.0", True), ("0.7.9", False), (None, False)],
)
def test_liger_is_used_where_it_is_new_enough(monkeypatch, installed, is_new_enough):
    def version(name):
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr("distill.labels.version", version)
    assert has_liger.__wrapped__() is is_new_enough


@pytest.fixture
def device() -> str:
    """Where Liger's kernels run: TRITON_INTERPRET=1 makes that the CPU."""
    pytest.importorskip("liger_kernel")
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton's kernels need a GPU, or its interpreter (TRITON_INTERPRET=1)")
    return "cpu"


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_ligers_kernel_tells_the_same(device, is_contiguous):
    logits, labels, weights = (each.to(device) for each in inputs(torch.float32))
    labels[3] = IGNORED
    wanted = expected(logits, labels, weights)
    if not is_contiguous:
        logits = logits.T.contiguous().T
    assert_as_expected(judged_by_liger(labels, logits), wanted, weights)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_whole_loss_by_ligers_kernel(device, monkeypatch, softcap):
    """In chunks and at two depths, of which one is a trimmed head's."""
    kept = Kept.of(torch.tensor([0, 2, 3, 7, 8], device=device), VOCAB)
    _, labels, _ = (each.to(device) for each in inputs())
    found = []
    for judge in (judged_by_torch, judged_by_liger):
        monkeypatch.setattr("distill.labels.judged_by_torch", judge)
        monkeypatch.setattr("distill.labels.has_liger", lambda: False)
        torch.manual_seed(0)
        hidden, whole, trimmed = (
            torch.randn(size, 4, device=device).requires_grad_() for size in (PLACES, VOCAB, 5)
        )
        heads = Head(whole, softcap=softcap), Head(trimmed, softcap=softcap, kept=kept)
        depths = tuple(Depth(States(hidden, head), labels) for head in heads)
        terms = projected_loss(Aligned(depths), None, CrossEntropy(), chunk_size=4)
        terms.loss.backward()
        rates = [total.item() for total, _ in terms.metrics.values()]
        found.append(
            [terms.loss.detach(), torch.tensor(rates), hidden.grad, whole.grad, trimmed.grad]
        )
    torch.testing.assert_close(found[1], found[0])
