"""Packing, masks from ids, and a stream that hangs on the step alone."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from distill.batches import Batch, BatchStream, Example, Pool, SeqKD, Text, collate, mixed, pack
from distill.errors import UserError
from distill.prompts import Prompt
from distill.store import Row, RowStore

A, B = Example([11], [12, 13]), Example([14, 15], [16])


def test_a_pack_by_hand() -> None:
    batch = collate([[A, B]], 7)
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 15, 16, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 0, 1, 0]]


def test_prompts_are_learnt_but_for_the_first_token_where_that_is_wanted() -> None:
    assert Example([1, 2, 3], [4], learn_prompt=True).loss_mask == [False, True, True, True]
    assert Example([], [4, 5]).loss_mask == [False, True]


def test_weights_are_of_the_learnt_tokens_in_their_order() -> None:
    assert collate([[A, B]], 7).weights is None
    weighted = Example([14, 15], [16, 17], learn_prompt=True, weights=[0.5, 3.0])
    batch = collate([[A, weighted], [B]], 7)
    assert batch.input_ids[batch.loss_mask].tolist() == [12, 13, 15, 16, 17, 16]
    assert batch.weights is not None
    assert batch.weights.tolist() == [1, 1, 1, 0.5, 3, 1]
    ((cut,),) = pack([weighted], 3)
    assert cut.learnt_weights == [1, 0.5]


def test_a_query_sees_its_own_example_up_to_itself() -> None:
    mask = collate([[Example([1], [2]), Example([3], [4])]], 5).attention_mask()
    assert mask.int().tolist() == [
        [
            [
                [1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [0, 0, 1, 0, 0],
                [0, 0, 1, 1, 0],
                [0, 0, 0, 0, 1],
            ]
        ]
    ]


def test_a_pack_through_a_model_is_its_examples_one_by_one() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()
    batch = collate([[A, B]], 8)
    with torch.inference_mode():
        mask = torch.where(batch.attention_mask(), 0.0, torch.finfo(torch.float32).min)
        packed = model(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids
        ).logits[0]
        alone = [model(input_ids=torch.tensor([example.ids])).logits[0] for example in (A, B)]
    torch.testing.assert_close(packed[:6], torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_examples_fill_packs_and_long_ones_are_cut() -> None:
    packs = pack([A, B, Example([1] * 3, [2] * 9)], 6)
    assert [sum(len(example.ids) for example in group) for group in packs] == [6, 6]
    assert packs[1][0].output_ids == [2, 2, 2]


def examples(count: int) -> list[Example]:
    return [Example([number], [number, number]) for number in range(1, count + 1)]


def learnt(batches: list[Batch]) -> Counter[int]:
    return Counter(
        token for batch in batches for token in batch.input_ids[batch.loss_mask].tolist()
    )


@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_and_micro_batches_share_the_same_global_batch(world: int, micro: int) -> None:
    stream = BatchStream([Pool(examples(23))], sequence_length=6, batch_size=5, seed=3)
    whole = learnt(stream.for_process(1, 0, 1, 5))
    parts = [stream.for_process(1, rank, world, micro) for rank in range(world)]
    assert sum((learnt(part) for part in parts), Counter()) == whole
    assert len({len(part) for part in parts}) == 1  # or a process would wait for ever
    assert {tuple(b.input_ids.shape) for part in parts for b in part} == {(micro, 6)}


def test_an_epoch_has_each_example_once_and_the_next_has_another_order() -> None:
    stream = BatchStream([Pool(examples(8))], sequence_length=3, batch_size=4, seed=0)
    epochs = [[p[0].prompt_ids[0] for s in steps for p in stream[s]] for steps in ((0, 1), (2, 3))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, 9))
    assert epochs[0] != epochs[1]
    again = BatchStream([Pool(examples(8))], sequence_length=3, batch_size=4, seed=0)
    assert again[3] == stream[3]
    assert again[0] == stream[0]  # also after a look at a later epoch


def test_pools_have_their_shares_of_every_beginning_and_each_pool_is_used_up_first() -> None:
    pools = [
        Pool([Example([1], [n]) for n in range(40)], 0.5),
        Pool([Example([2], [n]) for n in range(6)], 0.3),
        Pool([Example([3], [n]) for n in range(4)], 0.2),
    ]
    order = mixed(pools, random.Random(0))
    assert len(order) == 50
    for count in range(1, 51):
        found = Counter(example.prompt_ids[0] for example in order[:count])
        for number, pool in enumerate(pools, start=1):
            assert abs(found[number] - pool.share * count) < 1
    seen = [example.output_ids[0] for example in order if example.prompt_ids == [3]]
    assert sorted(seen[:4]) == sorted(seen[4:8]) == [0, 1, 2, 3]
    assert mixed(pools, random.Random(0)) == order


def test_nothing_to_learn_is_said() -> None:
    with pytest.raises(UserError, match="no example has an output"):
        BatchStream([Pool([Example([1, 2, 3], [4])])], sequence_length=3, batch_size=1, seed=0)


def test_rows_become_examples(tmp_path: Path) -> None:
    RowStore(tmp_path).append([Row("k", "p", "s", [1, 2], [3], "eos")])
    tokenizer = None
    assert SeqKD(rows=tmp_path).examples(tokenizer) == [Example([1, 2], [3])]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="there are no rows"):
        SeqKD(rows=tmp_path / "none").examples(tokenizer)  # type: ignore[arg-type]


def test_the_mask_of_the_pack_by_hand() -> None:
    mask = collate([[A, B]], 7).attention_mask()
    assert mask.shape == (1, 1, 7, 7)
    assert ["".join(map(str, line)) for line in mask[0, 0].int().tolist()] == [
        "1000000",
        "1100000",
        "1110000",
        "0001000",
        "0001100",
        "0001110",
        "0000001",
    ]


def test_every_query_of_an_empty_pack_sees_something() -> None:
    batch = collate([[A], []], 4)
    assert not batch.loss_mask[1].any()
    assert batch.attention_mask().any(-1).all()  # or the softmax would be undefined


def test_packs_lose_nothing_and_never_overflow() -> None:
    sizes = [(7 * i) % 11 + 1 for i in range(300)]
    rows = [Example([i], [i] * size) for i, size in enumerate(sizes)]
    packs = pack(rows, 12)
    assert sorted(e.ids for group in packs for e in group) == sorted(e.ids for e in rows)
    filled = [sum(len(example.ids) for example in group) for group in packs]
    assert max(filled) <= 12
    assert sum(filled) > 0.9 * 12 * len(packs)


def test_a_prompt_longer_than_a_pack_leaves_nothing_to_learn() -> None:
    ((cut,),) = pack([Example([1] * 9, [2] * 3)], 6)
    assert (cut.prompt_ids, cut.output_ids) == ([1] * 6, [])
    assert not any(cut.loss_mask)
    ((kept,),) = pack([Example([1] * 9, [2] * 3, learn_prompt=True)], 6)
    assert kept.loss_mask == [False] + [True] * 5


@pytest.mark.parametrize("world", [1, 2, 4])
def test_epochs_that_end_unevenly_still_have_each_example_once(world: int) -> None:
    stream = BatchStream([Pool(examples(10))], sequence_length=3, batch_size=4, seed=1)
    for epoch in range(3):
        steps = range(3 * epoch, 3 * epoch + 3)  # 4, 4 and 2 packs
        batches = [
            batch
            for step in steps
            for rank in range(world)
            for batch in stream.for_process(step, rank, world, 1)
        ]
        assert learnt(batches) == Counter(dict.fromkeys(range(1, 11), 2))


class Written:
    """Prompts as given."""

    def __init__(self, *prompts: Prompt):
        self.prompts = list(prompts)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        return self.prompts


def test_references_become_examples() -> None:
    inner = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    short = Prompt("1", [2], "b", "a b", "s")
    long = Prompt("2", [1], "a", "a b a b", "s")
    none = Prompt("3", [1, 1], "a a", None, "s")
    data = Text(prompts=Written(short, none, long), max_new_tokens=3, learn_prompt=True)
    assert data.examples(tokenizer) == [
        Example([2], [1, 2, 0], learn_prompt=True),
        Example([1], [1, 2, 1], learn_prompt=True),  # cut, so no end
    ]
    with pytest.raises(UserError, match="none of the prompts has a reference"):
        Text(prompts=Written(none)).examples(tokenizer)
