"""Losslessness end to end: a real model, its cache and masks, a drafter, the loop with its slots.

Joint output counts against exact enumeration by plain forwards. The first of four tokens comes with
the prompt, the others from a draft of two and a token of the target's. The rules themselves are in
test_losslessness.py.
"""

from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from decode import (
    Context,
    Draft,
    Drafter,
    Request,
    SamplingParams,
    SpeculativeDecoder,
    Target,
)
from decode.acceptance import RecursiveRejection
from decode.draft_length import Confidence, Heuristic
from decode.drafters import Chains, DynamicTrees, ExpansionTrees, LMDrafter
from decode.models import Blockwise, Hydra, Medusa, trim
from decode.sampling import warp

V, EOS, LENGTH = 5, 4, 4
PASSES, FAILS = 1e-3, 1e-9
DRAFTER = 1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(1))
TINY = {
    "vocab_size": V,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
    "initializer_range": 0.35,
    "eos_token_id": EOS,
}


def enumerated(model, params: SamplingParams, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Every output of up to four tokens, EOS ending it early, by plain forwards."""
    law, growing = {}, {(): 1.0}
    for _ in range(LENGTH):
        texts = torch.tensor([[*prompt, *output] for output in growing])
        with torch.no_grad():
            logits = model(texts).logits[:, -1]
            penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty or 1.0)
            probs = warp(penalty(texts, logits), params).double()
        longer = {
            (*output, token): chance * float(probs[row, token])
            for row, (output, chance) in enumerate(growing.items())
            for token in range(V)
            if probs[row, token] > 0
        }
        is_over = {output: output[-1] == EOS or len(output) == LENGTH for output in longer}
        law |= {output: chance for output, chance in longer.items() if is_over[output]}
        growing = {output: chance for output, chance in longer.items() if not is_over[output]}
    return law


def tree(root: int, depth: int, probs: Tensor, generator: torch.Generator) -> Draft:
    """Two independent children per node, `depth` levels."""
    tokens, parents, level = [root], [-1], [0]
    for _ in range(depth):
        below = []
        for node in level:
            for token in torch.multinomial(probs[tokens[node]], 2, True, generator=generator):
                below.append(len(tokens))
                tokens.append(int(token))
                parents.append(node)
        level = below
    laws = probs[torch.tensor([tokens])]
    size = torch.tensor([len(tokens)])
    return Draft(torch.tensor([tokens]), torch.tensor([parents]), size, laws)


class TreeDrafter(Drafter):
    """Trees of 2 x 2 independent children from a table, each sequence with its own generator."""

    hidden_layers = ()

    def propose(self, context: Context) -> Draft:
        drafts = []
        probs = warp(DRAFTER, context.sampling.params[0])
        for root, room, generator in zip(
            context.roots, context.room, context.sampling.generators, strict=True
        ):
            drafts.append(tree(root, min(2, room), probs, generator))
        width = max(draft.tokens.shape[1] for draft in drafts)
        tokens = torch.zeros(len(drafts), width, dtype=torch.long)
        parents = torch.arange(-1, width - 1).repeat(len(drafts), 1)
        for row, draft in enumerate(drafts):
            size = draft.tokens.shape[1]
            tokens[row, :size], parents[row, :size] = draft.tokens[0], draft.parents[0]
        num_nodes = torch.tensor([draft.tokens.shape[1] for draft in drafts])
        return Draft(tokens, parents, num_nodes, probs[tokens])


def decoded(
    model, drafter_of, params: SamplingParams, prompt: list[int], count: int, rule=None
) -> Counter[tuple[int, ...]]:
    target = Target(model, max_batch_size=512)
    decoder = SpeculativeDecoder(target, drafter_of(target), rule)
    requests = (
        Request(id=str(index), prompt=prompt, sampling=params, seed=11) for index in range(count)
    )
    return Counter(tuple(result.tokens) for result in decoder.stream(requests))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "prompt", "count"),
    [
        (1.0, 0, 1.0, [1], 100_000),
        (0.7, 0, 1.0, [1, 3], 8_000),
        (1.4, 3, 1.0, [2, 0, 3], 8_000),
        (1.0, 0, 0.8, [1, 3], 8_000),
    ],
)
def test_the_decoder_is_lossless_on_chains(
    g_test, tiny, perturbed, temperature, top_k, top_p, prompt, count
):
    model = tiny("llama", **TINY)
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=LENGTH
    )

    def drafter(target: Target) -> Drafter:
        return LMDrafter(perturbed(model, 0.5), target=target, draft_length=2)

    counts = decoded(model, drafter, params, prompt, count)
    assert g_test(counts, enumerated(model, params, prompt)) > PASSES
    # These are not the counts of a slightly warmer target: the test can tell.
    warmer = SamplingParams(temperature=1.3 * temperature)
    assert g_test(counts, enumerated(model, warmer, prompt)) < FAILS


def test_the_decoder_is_lossless_under_a_repetition_penalty(g_test, tiny, perturbed):
    model = tiny("llama", **TINY)
    params = SamplingParams(
        temperature=1.0, min_p=0.1, repetition_penalty=1.5, max_new_tokens=LENGTH
    )

    def drafter(target: Target) -> Drafter:
        return LMDrafter(perturbed(model, 0.5), target=target, draft_length=2)

    counts = decoded(model, drafter, params, [1, 3], 20_000)
    assert g_test(counts, enumerated(model, params, [1, 3])) > PASSES
    plain = SamplingParams(temperature=1.0, min_p=0.1)
    assert g_test(counts, enumerated(model, plain, [1, 3])) < FAILS


def test_the_decoder_is_lossless_on_trees(g_test, tiny):
    model = tiny("llama", **(TINY | {"max_position_embeddings": 32}))
    params = SamplingParams(temperature=1.0, max_new_tokens=LENGTH)
    counts = decoded(model, lambda _: TreeDrafter(), params, [1, 3], 20_000)
    assert g_test(counts, enumerated(model, params, [1, 3])) > PASSES


@pytest.mark.parametrize(
    "length", [Confidence(longest=2, min_acceptance=0.7), Heuristic(longest=2, first=1)], ids=str
)
def test_the_decoder_is_lossless_where_drafts_differ_in_length(g_test, tiny, perturbed, length):
    """The length hangs on laws and on the past, never on the token drawn."""
    model = tiny("llama", **TINY)
    params = SamplingParams(temperature=1.0, max_new_tokens=LENGTH)

    def drafter(target: Target) -> Drafter:
        return LMDrafter(perturbed(model, 0.5), target=target, draft_length=length)

    counts = decoded(model, drafter, params, [1, 3], 20_000)
    assert g_test(counts, enumerated(model, params, [1, 3])) > PASSES


@pytest.mark.parametrize(
    ("drafting", "rule"),
    [
        (Chains(length=2), None),
        (ExpansionTrees(counts=(2, 2), children="independent"), None),
        (ExpansionTrees(counts=(2, 1), children="distinct"), RecursiveRejection()),
    ],
    ids=["chain", "independent", "distinct"],
)
def test_the_decoder_is_lossless_with_a_trimmed_head(g_test, tiny, perturbed, drafting, rule):
    """The drafter never drafts tokens 1 and 3, which the target writes."""
    model = tiny("llama", **(TINY | {"max_position_embeddings": 32}))
    drafter = trim(perturbed(model, 0.5), [0, 2, EOS])
    params = SamplingParams(temperature=1.0, max_new_tokens=LENGTH)
    counts = decoded(model, lambda t: drafting.build(drafter, t), params, [1, 3], 6_000, rule)
    law = enumerated(model, params, [1, 3])
    assert sum(chance for output, chance in law.items() if {1, 3} & set(output)) > 0.2
    assert g_test(counts, law) > PASSES / 3  # as many cases


def test_a_law_that_is_not_zero_outside_a_trimmed_head_is_found(g_test, tiny, perturbed):
    """What the test before would say of a drafter that claims the law of its whole head."""

    class Claiming(LMDrafter):
        def propose(self, context: Context) -> Draft:
            draft = super().propose(context)
            if draft.probs is None:  # no room for a draft
                return draft
            return draft._replace(probs=0.6 * draft.probs + 0.4 / V)

    model = tiny("llama", **TINY)
    drafter = trim(perturbed(model, 0.5), [0, 2, EOS])
    params = SamplingParams(temperature=1.0, max_new_tokens=LENGTH)

    def claiming(target: Target) -> Drafter:
        return Claiming(drafter, target=target, draft_length=2)

    counts = decoded(model, claiming, params, [1, 3], 6_000)
    assert g_test(counts, enumerated(model, params, [1, 3])) < FAILS


@pytest.mark.parametrize("settings", [Medusa(num_heads=2), Hydra(num_heads=2), Blockwise()])
@pytest.mark.parametrize(
    ("drafting", "rule"),
    [
        (Chains(length=2), None),
        (ExpansionTrees(counts=(2, 2), children="independent"), None),
        (ExpansionTrees(counts=(2, 1), children="distinct"), RecursiveRejection()),
        (DynamicTrees(width=2, depth=2, size=4), None),
    ],
    ids=["chain", "independent", "distinct", "dynamic"],
)
def test_the_decoder_is_lossless_with_heads(g_test, tiny, settings, drafting, rule):
    model = tiny("llama", **(TINY | {"max_position_embeddings": 32}))
    heads = settings.build(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    params = SamplingParams(temperature=1.0, max_new_tokens=LENGTH)
    counts = decoded(model, lambda t: drafting.build(heads, t), params, [1, 3], 6_000, rule)
    assert g_test(counts, enumerated(model, params, [1, 3])) > PASSES / 12  # as many cases
