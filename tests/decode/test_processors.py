"""What a generation config forces and forbids, of a causal LM; encoder-decoder models have more."""

import copy

import pytest

from decode import GenerationStats, Request, SamplingParams, SpeculativeDecoder, Target
from decode.certificate import greedy_output
from decode.drafters import ExpansionTrees, LMDrafter


@pytest.mark.parametrize("drafts", ["chains", "trees"])
@pytest.mark.parametrize("batch", [1, 3])
def test_bad_words_are_never_written_and_eos_is_forced(tiny, perturbed, prompt, drafts, batch):
    model = copy.deepcopy(tiny("llama"))
    prompts = [prompt(length) for length in (4, 9, 17, 2)]
    free = {token for ids in prompts for token in greedy_output(model, ids, 12)}
    banned = sorted(free)[::3]
    model.generation_config.bad_words_ids = [[token] for token in banned]
    model.generation_config.forced_eos_token_id = [7]
    target = Target(model, max_batch_size=batch)
    near = perturbed(tiny("llama"))  # drafts what is banned
    drafter = LMDrafter(near, target=target, draft_length=4)
    if drafts == "trees":
        drafter = ExpansionTrees(counts=(2, 2, 1)).build(near, target)
    sampling = SamplingParams(max_new_tokens=12)
    requests = [Request(id=str(n), prompt=ids, sampling=sampling) for n, ids in enumerate(prompts)]
    results = SpeculativeDecoder(target, drafter).generate(requests)
    assert [r.tokens for r in results] == [greedy_output(model, ids, 12) for ids in prompts]
    assert {token for r in results for token in r.tokens[:-1]}.isdisjoint(banned)
    assert [(r.tokens[-1], r.finish_reason) for r in results] == [(7, "length")] * len(prompts)
    tau = sum((result.stats for result in results), GenerationStats()).block_efficiency
    assert tau > 1.1


def test_what_is_sampled_is_no_bad_word(tiny, prompt):
    model = copy.deepcopy(tiny("llama"))
    model.generation_config.bad_words_ids = [[token] for token in range(3, 97)]
    sampling = SamplingParams(max_new_tokens=30, temperature=2.0, top_k=0)
    target = Target(model)
    drafter = LMDrafter(tiny("llama"), target=target, draft_length=3)
    request = Request(id="r", prompt=prompt(5), sampling=sampling)
    assert set(SpeculativeDecoder(target, drafter).generate([request])[0].tokens) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bad_words_ids", [[3], [4, 5]]),
        ("forced_eos_token_id", [3, 4]),
        ("forced_bos_token_id", 3),  # of a decoder's beginning; a causal LM goes on with a prompt
        ("encoder_no_repeat_ngram_size", 2),
        ("encoder_repetition_penalty", 1.5),
    ],
)
def test_what_is_not_applied_is_refused(tiny, name, value):
    model = copy.deepcopy(tiny("llama"))
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=rf"{name}=.* which this runtime does not apply"):
        Target(model)
