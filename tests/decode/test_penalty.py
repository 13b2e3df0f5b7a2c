"""Repetition penalty: transformers' own at every node of a draft, greedy and as a distribution."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from decode import (
    Context,
    Draft,
    GenerationStats,
    Request,
    SamplingBatch,
    SamplingParams,
    SpeculativeDecoder,
    Target,
)
from decode.drafters import DynamicTrees, ExpansionTrees, LMDrafter, NoDrafter
from decode.penalty import penalised
from decode.sampling import generator_for

PENALTY = 1.4
DRAFTINGS = {
    "none": lambda model, target: NoDrafter(),
    "chain": lambda model, target: LMDrafter(model, target=target, draft_length=4),
    "tree": lambda model, target: ExpansionTrees(counts=(3, 2)).build(model, target),
    "dynamic": lambda model, target: DynamicTrees(width=3, depth=3, size=8).build(model, target),
}


def test_every_node_is_judged_by_the_text_before_it():
    texts = [[3, 5, 5], [7]]
    params = [SamplingParams(repetition_penalty=PENALTY), SamplingParams(repetition_penalty=0.8)]
    context = Context(
        slots=[0, 1],
        tokens=torch.tensor([[3, 5, 5], [7, 0, 0]]),
        roots=[5, 7],
        lengths=[3, 1],
        room=[9, 9],
        hidden={},
        sampling=SamplingBatch.of(params, [generator_for(0, name) for name in "ab"]),
    )
    draft = Draft(
        torch.tensor([[5, 1, 2, 9], [7, 7, 4, 4]]),
        torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]]),
        torch.tensor([4, 4]),
    )
    paths = [[[], [1], [2], [1, 9]], [[], [7], [7, 4], [7, 4, 4]]]
    logits = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    found = penalised(logits, context, draft)
    for row, text in enumerate(texts):
        process = RepetitionPenaltyLogitsProcessor(params[row].repetition_penalty)
        for node, path in enumerate(paths[row]):
            theirs = process(torch.tensor([text + path]), logits[row, node][None])
            torch.testing.assert_close(found[row, node], theirs[0])


@pytest.mark.parametrize("drafting", DRAFTINGS.values(), ids=DRAFTINGS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("where", ["request", "generation config"])
def test_greedy_output_is_that_of_generate(tiny, perturbed, prompt, drafting, batch, where):
    model = tiny("llama")
    prompts = [prompt(n) for n in (1, 9, 20)]
    expected = []
    for ids in prompts:
        row = torch.tensor([ids])
        output = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=PENALTY,
            pad_token_id=0,
        )
        expected.append(output[0, len(ids) :].tolist())
    penalty = PENALTY if where == "request" else None
    params = SamplingParams(max_new_tokens=24, repetition_penalty=penalty)
    if where == "generation config":
        model.generation_config.repetition_penalty = PENALTY
    try:
        target = Target(model, max_batch_size=batch)
    finally:
        model.generation_config.repetition_penalty = None
    decoder = SpeculativeDecoder(target, drafting(perturbed(model), target))
    requests = [Request(id=str(n), prompt=ids, sampling=params) for n, ids in enumerate(prompts)]
    results = decoder.generate(requests)
    assert [result.tokens for result in results] == expected
    without = SamplingParams(max_new_tokens=24, repetition_penalty=1.0)
    plain = decoder.generate(
        [Request(id=r.id, prompt=r.prompt, sampling=without) for r in requests]
    )
    assert [result.tokens for result in plain] != expected  # it matters here


def test_the_drafter_is_penalised_too(tiny, perturbed, prompt):
    """Or it would go on proposing what the target no longer wants."""
    model = tiny("llama")
    target = Target(model)
    params = SamplingParams(max_new_tokens=40, repetition_penalty=3.0)
    decoder = SpeculativeDecoder(target, LMDrafter(model, target=target, draft_length=4))
    results = decoder.generate([Request(id="r", prompt=prompt(5), sampling=params)])
    assert sum((r.stats for r in results), GenerationStats()).alpha == 1.0
