"""What heads of an encoder-decoder target are trained on is what they will read while decoding."""

import pytest
import torch

from decode.models import Blockwise, Hydra, Medusa
from distill.alignment.encoder_decoder import Rows
from distill.alignment.heads import HeadsAlignment
from distill.alignment.lm import LiveTarget
from distill.batches import Example, collate
from tests.distill.tiny import bart, t5

PACKS = [
    [
        Example([2, 1], [5, 6, 7, 8], encoder_ids=[3]),
        Example([2, 1], [10, 11], encoder_ids=[4, 5, 6, 7, 8]),
        Example([2], [14], encoder_ids=[9, 10]),
    ],
    [],
    [Example([2, 1], [18, 19, 20, 21, 22], encoder_ids=[12, 13, 14])],
]
LENGTH = 13
EXAMPLES = [example for pack in PACKS for example in pack]


def test_packs_come_apart_and_back_together():
    batch = collate(PACKS, LENGTH)
    assert batch.encoder_ids.tolist() == [
        [3, 0, 0, 0, 0],
        [4, 5, 6, 7, 8],
        [9, 10, 0, 0, 0],
        [12, 13, 14, 0, 0],
    ]
    assert batch.encoder_mask.sum(1).tolist() == [1, 5, 2, 3]
    rows = Rows.of(batch)
    for row, example in zip(rows.input_ids.tolist(), EXAMPLES, strict=True):
        assert row == example.ids + [0] * (7 - len(example.ids))
    packed = rows.packed(rows.input_ids[..., None])[..., 0]
    assert packed.tolist() == batch.input_ids.tolist()


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize(
    "settings",
    [Blockwise(), Medusa(), Hydra(num_layers=2), Hydra(prefix_attention=True)],
    ids=str,
)
def test_each_depth_reads_the_state_before_the_root_beside_its_source(make, settings):
    """In packs as alone, by the very function that drafts."""
    model = make()
    heads = settings.build(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = collate(PACKS, LENGTH)
    target = LiveTarget(model, (heads.ends.layer,))
    aligned = HeadsAlignment(target, heads.ends.layer).align(heads, batch)
    signal, number = target.signal(batch), 0
    for example in EXAMPLES:
        size = len(example.ids)
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor([example.encoder_ids]),
                decoder_input_ids=torch.tensor([example.ids]),
                output_hidden_states=True,
            )
            hidden = output.decoder_hidden_states[-1]
            if heads.prefix is not None:
                sees = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
                hidden = heads.prefix(hidden, sees, torch.arange(size)[None])
        for root in range(len(example.prompt_ids), size):
            law = signal.law(torch.tensor([number])).logits[0]
            torch.testing.assert_close(law, output.logits[0, root - 1], atol=1e-4, rtol=1e-3)
            for distance, depth in enumerate(aligned.depths, start=1):
                there = root + distance
                assert bool(depth.valid[number]) == (there < size)
                if there >= size:
                    continue
                assert int(depth.labels[number]) == example.ids[there]
                tokens = torch.tensor(example.ids[root:there])
                drafting = heads.logits(distance, heads.prepare(hidden[0, root - 1]), tokens)
                head = depth.states.head
                training = head.cap(head.project(depth.states.hidden[number]))
                torch.testing.assert_close(training, drafting, atol=1e-4, rtol=1e-3)
            number += 1
    assert number == len(aligned.depths[0].labels) == 12


def test_packs_that_only_fill_a_batch_up_have_nothing_to_learn():
    model = t5()
    heads = Blockwise().build(model)
    target = LiveTarget(model, (heads.ends.layer,))
    aligned = HeadsAlignment(target, heads.ends.layer).align(heads, collate([[], []], LENGTH))
    assert [len(depth.labels) for depth in aligned.depths] == [0] * 4
    assert target.signal(collate([[]], LENGTH)).hidden.shape == (0, 32)


def test_the_target_gets_no_gradient():
    for make in (t5, bart):
        model = make()
        for settings in (Medusa(), Blockwise(), Hydra()):
            heads = settings.build(model)
            layer = heads.ends.layer
            aligned = HeadsAlignment(LiveTarget(model, (layer,)), layer).align(
                heads, collate(PACKS, LENGTH)
            )
            own = {id(parameter) for parameter in heads.parameters()}
            for depth in aligned.depths:
                head = depth.states.head
                for tensor in (head.weight, head.bias):
                    assert tensor is None or id(tensor) in own or not tensor.requires_grad
                assert depth.states.hidden.requires_grad
