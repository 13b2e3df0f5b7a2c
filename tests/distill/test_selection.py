"""Blocks of tokens, the tokens AdaSPEC keeps, and a teacher that is read from the rows."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decode.models import Medusa
from distill.alignment import Aligned
from distill.alignment.heads import HeadsAlignment
from distill.alignment.lm import LiveTarget, LMAlignment, blocks
from distill.batches import BatchStream, Example, Pool, collate
from distill.chunked import prediction_losses, projected_loss
from distill.depth_weights import Survival
from distill.errors import UserError
from distill.laws import TopLaw
from distill.objectives import AdaSPEC, CrossEntropy, EndToEndTV, ForwardKL
from distill.selection import TokenSelection
from distill.teachers.stored import LiveTeacher, StoredTeacher, StoredTop

VOCAB = 24


def model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def target():
    return model(0)


def examples(target=None, k=VOCAB):
    """Random ones; with what a target says about their outputs where one is given."""
    draw = random.Random(0)
    made = []
    for _ in range(6):
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randrange(0, 4))]
        output = [draw.randrange(VOCAB) for _ in range(draw.randrange(2, 9))]
        top = None
        if target is not None:
            with torch.no_grad():
                said = target(torch.tensor([[0, *prompt, *output]])).logits[0].log_softmax(-1)
            logprobs, ids = said[len(prompt) : -1].topk(k)
            top = TopLaw(ids.int(), logprobs, (1 - logprobs.exp().sum(-1)).round(decimals=5))
        made.append(Example([0, *prompt], output, top=top))
    return made


def batch_of(made, length=16):
    return BatchStream([Pool(made)], sequence_length=length, batch_size=8, seed=0).for_process(
        0, 0, 1, 4
    )[0]


def test_blocks_by_hand():
    batch = collate([[Example([1], [2, 3, 4]), Example([5], [6])], [Example([7], [8, 9])]], 8)
    depths = blocks(batch, 2)  # learnt: 2 3 4 | 6 | 8 9
    assert [rows.tolist() for rows, _ in depths] == [[0, 2, 3, 4], [1, 0, 0, 5]]
    assert [valid.tolist() for _, valid in depths] == [[True] * 4, [True, False, False, True]]


def test_blocks_hold_every_learnt_token_once(target):
    batch = batch_of(examples())
    for length in (1, 3, 20):
        found = torch.cat([rows[valid] for rows, valid in blocks(batch, length)])
        assert sorted(found.tolist()) == list(range(int(batch.loss_mask.sum())))


def test_blocks_of_one_and_of_more_have_the_same_forward_kl(target):
    batch, drafter = batch_of(examples()), model(1)
    signal = LiveTarget(target).signal(batch)
    plain, blocked = (
        projected_loss(LMAlignment(drafter, block).align(drafter, batch), signal, ForwardKL())
        for block in (1, 3)
    )
    torch.testing.assert_close(blocked.loss, plain.loss)
    assert blocked.num_tokens == plain.num_tokens
    told = sum(blocked.metrics[f"alpha_{depth}"][0] for depth in (1, 2, 3))
    torch.testing.assert_close(told, plain.metrics["alpha"][0])
    plain.loss.backward()
    expected = [parameter.grad.clone() for parameter in drafter.parameters()]
    drafter.zero_grad()
    blocked.loss.backward()
    for parameter, gradient in zip(drafter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_adaspec_keeps_what_is_furthest_behind_the_reference(target):
    batch, drafter, reference = batch_of(examples()), model(1), model(2)
    objective = AdaSPEC(reference="", fraction=0.4)
    signal = LiveTarget(target).signal(batch)
    drafted, beside = (LMAlignment(one).align(one, batch) for one in (drafter, reference))
    (loss,), (theirs,) = (
        prediction_losses(aligned, signal, objective, chunk_size=5) for aligned in (drafted, beside)
    )
    plain = torch.nn.functional.kl_div(
        drafted.depths[0].states.law(slice(None)).logits.log_softmax(-1),
        signal.law(slice(None)).logits.log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    torch.testing.assert_close(loss, plain)
    selection = TokenSelection(objective, reference, LMAlignment(reference))
    selected = selection.select(drafted, batch, signal)
    kept = selected.depths[0].kept
    count = -(-len(loss) * 4 // 10)
    assert kept.sum() == count
    excess = loss - theirs
    assert excess[kept].min() >= excess[~kept].max()
    terms = projected_loss(selected, signal, objective)
    assert terms.num_tokens == count
    torch.testing.assert_close(terms.loss.detach(), loss[kept].sum())
    assert terms.metrics == projected_loss(drafted, signal, objective).metrics  # of all tokens
    # In blocks it is chosen per depth, and places that have no token are never kept.
    blocked = LMAlignment(drafter, 3).align(drafter, batch)
    selected = selection.select(blocked, batch, signal)
    for depth, before in zip(selected.depths, blocked.depths, strict=True):
        assert depth.valid is before.valid
        assert not (depth.kept & ~before.valid).any()


def test_adaspec_compares_heads_with_heads_of_the_same_depth(target):
    torch.manual_seed(3)
    batch, live = batch_of(examples()), LiveTarget(target, (1,))
    alignment, signal = HeadsAlignment(live, 1), live.signal(batch)
    drafter, larger = (Medusa(num_heads=count).build(target) for count in (2, 3))
    with torch.no_grad():
        for parameter in (*drafter.parameters(), *larger.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    objective = AdaSPEC(reference="", fraction=0.4)
    for reference, align in ((larger, alignment), (model(2), None)):
        align = align or LMAlignment(reference)
        drafted = alignment.align(drafter, batch)
        selected = TokenSelection(objective, reference, align).select(drafted, batch, signal)
        mine = prediction_losses(drafted, signal, objective)
        theirs = prediction_losses(align.align(reference, batch), signal, objective)
        for number, depth in enumerate(selected.depths):
            valid, kept = depth.valid, depth.kept
            assert kept.sum() == -(-int(valid.sum()) * 4 // 10)
            assert not (kept & ~valid).any()
            beside = theirs[number] if align is alignment else theirs[0][depth.rows]
            excess = mine[number] - beside
            assert excess[kept].min() >= excess[valid & ~kept].max()


def test_what_is_not_kept_weighs_on_no_other_depth(target):
    """A first token that is not learnt keeps its α, and so deeper tokens keep their weights."""
    batch, drafter = batch_of(examples()), model(1)
    signal = LiveTarget(target).signal(batch)
    aligned = LMAlignment(drafter, 2).align(drafter, batch)
    first, second = aligned.depths
    selected = Aligned(
        (replace(first, kept=torch.zeros_like(first.valid)), replace(second, kept=second.valid))
    )
    terms, whole = (
        projected_loss(each, signal, ForwardKL(), depth_weights=Survival())
        for each in (selected, aligned)
    )
    alone = projected_loss(Aligned((first,)), signal, ForwardKL())
    torch.testing.assert_close(terms.loss, whole.loss - alone.loss)
    assert terms.num_tokens == second.valid.sum()
    assert terms.metrics == whole.metrics


@pytest.mark.parametrize("objective", [ForwardKL(), EndToEndTV(block=3)])
def test_all_of_the_vocabulary_stored_teaches_as_the_target_does(target, objective):
    batch, drafter = batch_of(examples(target)), model(1)
    aligned = LMAlignment(drafter, objective.block).align(drafter, batch)
    live = projected_loss(aligned, LiveTarget(target).signal(batch), objective)
    stored = projected_loss(aligned, StoredTop().signal(batch), objective)
    torch.testing.assert_close(stored.loss, live.loss, rtol=1e-4, atol=1e-4)
    gradients = [
        torch.autograd.grad(terms.loss, drafter.lm_head.weight, retain_graph=True)[0]
        for terms in (live, stored)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_stored_law_is_cut_with_its_example_and_skips_a_first_token(target):
    whole = examples(target, k=2)[0]
    law = whole.top
    cut = collate([[Example([], whole.output_ids[:2], top=law)]], 4)
    assert cut.loss_mask.sum() == 1
    assert cut.top.ids.tolist() == law.ids[1:2].tolist()
    assert collate([[whole, Example([1], [2])]], 32).top is None


def test_what_cannot_be_taught_from_rows_is_refused(target):
    made, live = examples(target, k=3), LiveTarget(target)
    teacher = StoredTeacher()
    assert isinstance(teacher.build(live, made, ForwardKL(), VOCAB), StoredTop)
    assert LiveTeacher().build(live, made, ForwardKL(), VOCAB) is live
    for wrong, objective, vocab_size, message in (
        (examples(), ForwardKL(), VOCAB, "hold no top-k"),
        ([Example([1, 2], [3], True, made[0].top)], ForwardKL(), VOCAB, "not about prompts"),
        (made, ForwardKL(temperature=0.7), VOCAB, "at temperature 1, not 0.7"),
        (made, ForwardKL(), 4, "the drafter has 4 ids"),
    ):
        with pytest.raises(UserError, match=message):
            teacher.build(live, wrong, objective, vocab_size)
    with pytest.raises(ValueError, match="have nothing stored"):
        StoredTop().signal(batch_of(examples()))
    empty = collate([[]], 4)
    assert StoredTop().signal(empty).law(slice(0, 0)).ids.shape == (0, 1)
    assert CrossEntropy().block == 1
