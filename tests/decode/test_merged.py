"""Several drafters' trees as one: the union, the output, and what each drafter is told."""

import pytest
import torch

from decode import (
    Draft,
    Drafter,
    GenerationStats,
    Request,
    SamplingParams,
    SpeculativeDecoder,
    Target,
)
from decode.drafters import (
    DynamicTrees,
    ExpansionTrees,
    LMDrafter,
    MergedDrafter,
    NoDrafter,
)


class Fixed(Drafter):
    """The same tree at every step; notes what was accepted of it."""

    hidden_layers = ()

    def __init__(self, tokens: list[int], parents: list[int]):
        self.tokens, self.parents, self.told = tokens, parents, []

    def propose(self, context):
        roots = context.roots
        return Draft.from_lists(roots, [self.tokens for _ in roots], [self.parents for _ in roots])

    def observe(self, context, draft, acceptance, target_logits):
        paths = acceptance.paths
        self.told += [draft.tokens[row, path[1:]].tolist() for row, path in enumerate(paths)]


def test_equal_paths_become_one_and_each_is_told_its_own(tiny, prompt, greedy):
    model = tiny("llama")
    text = prompt(5)
    # The first token comes with the prompt; the drafts hold what follows it.
    _, a, b, c, d = greedy(model, text, 5)
    wrong = next(token for token in range(97) if token not in (a, b, c))
    first = Fixed([a, wrong, b], [0, 0, 1])
    second = Fixed([a, b, c, wrong], [0, 1, 2, 0])
    merged = MergedDrafter([first, second])
    target = Target(model, max_batch_size=1)
    drafts = []
    propose = merged.propose

    def noted(context):
        drafts.append(propose(context))
        return drafts[-1]

    merged.propose = noted
    sampling = SamplingParams(max_new_tokens=5)
    (result,) = SpeculativeDecoder(target, merged).generate(
        [Request(id="r", prompt=text, sampling=sampling)]
    )
    assert result.tokens[1:] == [a, b, c, d]
    (draft,) = drafts
    assert draft.tokens[0, 1:].tolist() == [a, wrong, b, c]
    assert draft.parents[0].tolist() == [-1, 0, 0, 1, 3]
    assert first.told == [[], [a, b]]  # the prompt's own forward drafts nothing
    assert second.told == [[], [a, b, c]]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_output_is_the_targets_and_more_is_accepted(
    tiny, perturbed, prompt, greedy, batch, temperature
):
    model = tiny("llama")
    prompts = [prompt(n) for n in (1, 7, 19, 40)]
    sampling = SamplingParams(max_new_tokens=24, temperature=temperature)
    requests = [Request(id=str(n), prompt=p, sampling=sampling) for n, p in enumerate(prompts)]

    def drafters(target):
        return [
            ExpansionTrees(counts=(2, 1, 1)).build(perturbed(model), target),
            DynamicTrees(width=2, depth=3, size=5).build(perturbed(model, 0.1), target),
        ]

    taus = []
    for kind in ("first", "second", "merged"):
        target = Target(model, max_batch_size=batch)
        one, other = drafters(target)
        drafter = {"first": one, "second": other, "merged": MergedDrafter([one, other])}[kind]
        results = SpeculativeDecoder(target, drafter).generate(requests)
        if temperature == 0:
            assert [r.tokens for r in results] == [greedy(model, p, 24) for p in prompts]
        taus.append(sum((r.stats for r in results), GenerationStats()).block_efficiency)
        target.cached.cache.check_integrity()
        for part in (one, other):
            part.reader.cache.check_integrity()
    if temperature == 0:
        assert taus[2] >= max(taus[:2])


def test_chains_and_idle_drafters_merge_too(tiny, perturbed, prompt, greedy):
    model = tiny("llama")
    target = Target(model, max_batch_size=2)
    chain = LMDrafter(perturbed(model), target=target, draft_length=3)
    decoder = SpeculativeDecoder(target, MergedDrafter([chain, NoDrafter()]))
    prompts = [prompt(3), prompt(11), prompt(2)]
    sampling = SamplingParams(max_new_tokens=20)
    results = decoder.generate(
        [Request(id=str(n), prompt=p, sampling=sampling) for n, p in enumerate(prompts)]
    )
    assert [r.tokens for r in results] == [greedy(model, p, 20) for p in prompts]


def test_drawn_drafts_are_refused(tiny, perturbed, prompt):
    model = tiny("llama")
    target = Target(model)
    merged = MergedDrafter([LMDrafter(perturbed(model), target=target)])
    warm = SamplingParams(temperature=1.0, max_new_tokens=8)
    with pytest.raises(ValueError, match="LMDrafter draws its drafts at this temperature"):
        SpeculativeDecoder(target, merged).generate(
            [Request(id="r", prompt=prompt(3), sampling=warm)]
        )
    with pytest.raises(ValueError, match="no drafter to merge"):
        MergedDrafter([])
    assert torch.is_inference_mode_enabled() is False
