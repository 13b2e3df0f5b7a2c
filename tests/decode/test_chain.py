"""Chains in memory that is kept from step to step."""

import pytest
import torch

from decode.drafters.chain import Chains


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_first_of_the_likeliest_tokens_is_put(batch, dtype):
    chain = Chains().begin(list(range(batch)), 4)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (3, batch, 1, 16), generator=generator).to(dtype)  # many equal
    for place in range(1, 4):
        chain.put_likeliest(place, logits[place - 1])
    expected = [[0, *(int(row.argmax()) for row in logits[:, 0, 0])]]
    assert chain.draft.tokens[:1].tolist() == expected
    assert [column[:, 0].tolist() for column in chain.columns] == chain.draft.tokens.T.tolist()


def test_chains_of_one_size_are_written_to_the_same_draft_and_others_are_not():
    chains = Chains()
    first = chains.begin([5], 3)
    other = chains.begin([6, 7], 3)
    again = chains.begin([8], 3)
    assert again is first
    assert first.draft.tokens[0, 0] == 8
    assert other.draft.tokens[:, 0].tolist() == [6, 7]
    assert Chains().begin([9], 3).draft.tokens is not first.draft.tokens


def test_memory_that_was_taken_in_inference_mode_is_written_to_outside():
    chains = Chains()
    with torch.inference_mode():
        chains.begin([1], 2)
    chain = chains.begin([2], 2)
    chain.columns[1].copy_(torch.tensor([[3]]))
    assert chain.draft.tokens.tolist() == [[2, 3]]
