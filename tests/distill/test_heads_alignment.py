"""What heads are trained on is what they will read and draft while decoding."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decode.models import Blockwise, Hydra, Medusa
from distill.alignment.heads import HeadsAlignment, ahead
from distill.alignment.lm import LiveTarget
from distill.batches import Example, collate

PACKS = [
    [Example([3, 4], [5, 6, 7, 8]), Example([9], [10, 11]), Example([12, 13], [14])],
    [Example([15, 16, 17], [18, 19, 20, 21, 22], learn_prompt=True)],
    [],
]
LENGTH = 13
PLUS = Hydra(num_layers=2, prefix_attention=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    config = LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=24, **sizes)
    return LlamaForCausalLM(config).eval()


def learnt(example: Example) -> list[int]:
    """Places of the example's learnt tokens."""
    return [place for place, is_learnt in enumerate(example.loss_mask) if is_learnt]


def test_a_label_is_the_token_so_many_places_on_in_the_same_example():
    batch = collate(PACKS, LENGTH)
    for distance in range(5):
        tokens, rows, valid = ahead(batch, distance)
        expected, number = [], 0
        for example in (example for pack in PACKS for example in pack):
            places = learnt(example)
            for index, place in enumerate(places):
                there = place + distance
                is_there = there < len(example.ids)
                row = number + index + distance
                expected.append((example.ids[there], row, True) if is_there else (0, 0, False))
            number += len(places)
        found = list(zip(tokens.tolist(), rows.tolist(), valid.tolist(), strict=True))
        assert found == expected


@pytest.mark.parametrize(
    "settings", [Medusa(), Medusa(share_head=True), Hydra(num_layers=2), Blockwise(), PLUS], ids=str
)
def test_each_depth_reads_the_state_before_the_root_and_the_tokens_since(model, settings):
    """In packs as alone, by the very function that drafts."""
    torch.manual_seed(1)
    heads = settings.build(model)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = collate(PACKS, LENGTH)
    target = LiveTarget(model, (2,))
    aligned = HeadsAlignment(target, 2).align(heads, batch)
    assert len(aligned.depths) == 4
    row = 0
    for example in (example for pack in PACKS for example in pack):
        with torch.no_grad():
            output = model(torch.tensor([example.ids]), output_hidden_states=True)
        hidden, logits = output.hidden_states[2], output.logits[0]
        if heads.prefix is not None:
            size = len(example.ids)
            sees = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
            hidden = heads.prefix(hidden, sees, torch.arange(size)[None])
        hidden = hidden[0]
        for root in learnt(example):
            for number, depth in enumerate(aligned.depths, start=1):
                there = root + number
                assert bool(depth.valid[row]) == (there < len(example.ids))
                if not depth.valid[row]:
                    continue
                assert int(depth.labels[row]) == example.ids[there]
                tokens = torch.tensor(example.ids[root:there])
                drafting = heads.logits(number, heads.prepare(hidden[root - 1]), tokens)
                head = depth.states.head
                training = head.cap(head.project(depth.states.hidden[row]))
                torch.testing.assert_close(training, drafting, atol=1e-4, rtol=1e-3)
                law = target.signal(batch).law(depth.rows[row : row + 1]).logits[0]
                torch.testing.assert_close(law, logits[there - 1], atol=1e-4, rtol=1e-3)
            row += 1
    assert row == len(aligned.depths[0].labels)


def test_the_targets_own_weights_get_no_gradient(model):
    for settings in (Medusa(share_head=True), Blockwise(), Hydra()):
        heads = settings.build(model)
        aligned = HeadsAlignment(LiveTarget(model, (2,)), 2).align(heads, collate(PACKS, LENGTH))
        own = {id(parameter) for parameter in heads.parameters()}
        for depth in aligned.depths:
            weight = depth.states.head.weight
            assert id(weight) in own or not weight.requires_grad
            assert depth.states.hidden.requires_grad


def test_one_head_at_a_time_is_drawn_anew_and_again_the_same(model):
    heads = Blockwise(one_at_a_time=True).build(model)
    alignment = HeadsAlignment(LiveTarget(model, (2,)), 2)
    batch = collate(PACKS, LENGTH)

    def drawn(seed: int) -> list[int]:
        torch.manual_seed(seed)
        (depth,) = alignment.align(heads, batch).depths
        return depth.labels.tolist()

    assert drawn(3) == drawn(3)
    assert len({tuple(drawn(seed)) for seed in range(40)}) == 4
