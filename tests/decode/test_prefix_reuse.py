"""What several prompts begin with alike is read once."""

import pytest
import torch

from decode import Draft, Drafter, Request, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import LMDrafter, NoDrafter


def counted(target: Target) -> list[int]:
    """Tokens of each forward of the target, as they come."""
    forward, widths = target.cached.forward, []

    def noted(slots, tokens, **rest):
        widths.append(tokens.numel())
        return forward(slots, tokens, **rest)

    target.cached.forward = noted
    return widths


def requests(prompts: list[list[int]], **params: object) -> list[Request]:
    sampling = SamplingParams(**({"max_new_tokens": 12} | params))
    return [Request(id=str(n), prompt=ids, sampling=sampling) for n, ids in enumerate(prompts)]


def test_many_samples_of_one_prompt_read_it_once(tiny, prompt):
    target = Target(tiny("llama"), max_batch_size=4)
    widths = counted(target)
    decoder = SpeculativeDecoder(target, NoDrafter())
    results = decoder.generate(requests([prompt(40)] * 4, temperature=1.0))
    assert widths[:2] == [40, 3]  # the prompt, then the three others' last tokens
    assert len({tuple(result.tokens) for result in results}) > 1
    alone = SpeculativeDecoder(Target(tiny("llama"), max_batch_size=1), NoDrafter())
    assert [r.tokens for r in alone.generate(requests([prompt(40)] * 4, temperature=1.0))] == [
        result.tokens for result in results
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("slots", [2, 3, 6])
def test_the_output_is_that_of_generate(tiny, perturbed, prompt, greedy, architecture, slots):
    """Prompts that share a part with others, with texts already under way, or with nothing."""
    model = tiny(architecture)
    base = prompt(40)
    prompts = [base, [*base[:30], 1, 2, 3], base, base[:16], base[:15], prompt(5), [*base, 4]]
    prompts += [base + greedy(model, base, 8), base[:31] + [9] * 20]
    target = Target(model, max_batch_size=slots)
    drafter = LMDrafter(perturbed(model), target=target, draft_length=3)
    results = SpeculativeDecoder(target, drafter).generate(requests(prompts))
    for text, result in zip(prompts, results, strict=True):
        assert result.tokens == greedy(model, text, 12)
    target.cached.cache.check_integrity()
    drafter.reader.cache.check_integrity()


def test_a_text_under_way_lends_what_it_has_written_too(tiny, prompt, greedy):
    model = tiny("llama")
    base = prompt(20)
    longer = base + greedy(model, base, 10)
    target = Target(model, max_batch_size=2)
    widths = counted(target)
    short, long, third = requests([base, prompt(3), longer])
    short = Request(id="s", prompt=base, sampling=SamplingParams(max_new_tokens=30))
    long = Request(id="l", prompt=long.prompt, sampling=SamplingParams(max_new_tokens=14))
    results = SpeculativeDecoder(target, NoDrafter()).generate([short, long, third])
    assert results[2].tokens == greedy(model, longer, 12)
    # Two prompts at once, steps of two, then the one token that the third has to read itself.
    assert widths[0] == 2 * 20
    assert set(widths[1:]) == {1, 2}


def test_drafters_that_want_every_state_get_them(tiny, prompt):
    class Wants(Drafter):
        hidden_layers = (1,)

        def begin(self, slot, prompt, hidden):
            assert hidden[1].shape[0] == len(prompt) - 1

        def propose(self, context):
            return Draft.chain(torch.tensor(context.roots)[:, None])

    target = Target(tiny("llama"), max_batch_size=2)
    with torch.inference_mode():
        SpeculativeDecoder(target, Wants()).generate(requests([prompt(30)] * 2))
