"""Repeats of a model's own outputs: found, counted, unlearnt."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours

from repeats import distance_from_unrepeated, ends_in_loop, greedy_outputs, repeated


def test_a_token_repeats_where_the_run_that_it_ends_stood_before() -> None:
    assert repeated([1, 2, 3, 1, 2, 3, 1], run=2) == [False] * 4 + [True] * 3
    assert repeated([1, 2, 3, 1, 2, 4], run=3) == [False] * 6
    assert repeated([5, 5, 5, 5], run=2) == [False, False, True, True]


@pytest.mark.parametrize(
    ("ids", "is_loop"),
    [
        ([1, 2, 3, 4, 4, 4], True),
        ([9, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 1, 2, 1, 2, 9], False),  # it has found the way out
        ([1, 2, 1, 2], False),
        ([], False),
    ],
)
def test_a_loop_is_one_stretch_three_times_at_the_end(ids: list[int], is_loop: bool) -> None:
    assert ends_in_loop(ids) is is_loop


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=12, num_hidden_layers=1, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config).eval()


def test_the_distance_is_that_of_each_written_token_by_hand() -> None:
    model, teacher = tiny_model(0), tiny_model(1)
    prompts = [[1, 2], [3, 4, 5, 6, 7, 3, 4, 5]]
    outputs = [[6, 7, 8, 9, 10, 11, 1, 2, 3, 6, 7, 8, 9, 10, 11, 1, 2, 4], [6, 7, 3, 4, 5]]
    total, num_repeats = 0.0, 0
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = prompt + output
        q = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        p = teacher(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        for at in range(len(prompt), len(ids)):
            wanted = p[at - 1].clone()
            if ids[at - 7 : at + 1] in [ids[end - 8 : end] for end in range(8, at + 1)]:
                wanted[ids[at]] = 0
                wanted /= wanted.sum()
                num_repeats += 1
            total += sum(
                x * (x / y).log() for x, y in zip(wanted, q[at - 1], strict=True) if x > 0
            ).item()
    assert num_repeats > 0
    found = distance_from_unrepeated(model, teacher, prompts, outputs).item()
    assert found == pytest.approx(total / sum(map(len, outputs)), rel=1e-5)


def test_a_model_that_loops_learns_not_to() -> None:
    model = tiny_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def learn(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    text, prompts = torch.tensor([[1, 2, 3, 4, 5] * 10]), [[1, 2], [3, 4, 5]]
    for _ in range(30):
        learn(model(input_ids=text, labels=text).loss)
    assert all(map(ends_in_loop, greedy_outputs(model, prompts, 40)))
    teacher, distances, num_loops = copy.deepcopy(model), [], []
    for _ in range(60):
        outputs = greedy_outputs(model, prompts, 40)
        num_loops.append(sum(map(ends_in_loop, outputs)))
        loss = distance_from_unrepeated(model, teacher, prompts, outputs)
        distances.append(loss.item())
        learn(loss)
    # It swings: what is unlearnt in one place comes back in another. Not for long.
    assert sum(distances[-10:]) / 10 < distances[0] / 2
    assert min(num_loops[-20:]) == 0
