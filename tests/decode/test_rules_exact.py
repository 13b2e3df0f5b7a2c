"""Losslessness as a distribution: joint output counts against exact enumeration, by G-test.

The target and the drafter are Markov chains over five tokens, so that a forward is a look-up in a
table and the law of three tokens is a product. What passes must pass with p > 1e-3 under fixed
seeds; the same test must reject rules with a fault planted in them.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decode import (
    Acceptance,
    Context,
    Draft,
    Drafter,
    Request,
    SamplingParams,
    SpeculativeDecoder,
    Target,
)
from decode.acceptance.sampling import accept_chain, accept_tree
from decode.drafters import LMDrafter
from decode.sampling import draw, warp

V, STEPS, FIRST = 5, 3, 0
NUM_SAMPLES = 120_000
PASSES, FAILS = 1e-3, 1e-9

Rule = Callable[[Draft, Tensor, Tensor], Acceptance]
PLAIN = SamplingParams(temperature=1.0)
WARPED = [
    PLAIN,
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7),
    SamplingParams(temperature=1.0, top_k=3),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=0.8, top_k=4, top_p=0.9),
]


def table(seed: int) -> Tensor:
    """[V, V] logits: row a is what follows token a."""
    return 1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))


TARGET, DRAFTER = table(0), table(1)


def exact(probs: Tensor) -> dict[tuple[int, ...], float]:
    """Every output of three tokens and its probability."""
    law = {}
    for output in itertools.product(range(V), repeat=STEPS):
        pairs = itertools.pairwise((FIRST, *output))
        law[output] = math.prod(float(probs[a, b]) for a, b in pairs)
    return {output: probability for output, probability in law.items() if probability > 0}


def tree(
    roots: Tensor,
    probs: Tensor,
    *,
    depth: int,
    width: int,
    certain: bool,
    generator: torch.Generator,
) -> Draft:
    """A complete tree below each root: `width` i.i.d. children per node, `depth` levels."""
    tokens, parents, level = [roots], [-1], [0]
    for _ in range(depth):
        below = []
        for node in level:
            law = probs[tokens[node]]
            for _ in range(width):
                drawn = torch.multinomial(law, 1, generator=generator)[:, 0]
                below.append(len(tokens))
                tokens.append(law.argmax(-1) if certain else drawn)
                parents.append(node)
        level = below
    tokens_BN = torch.stack(tokens, dim=1)
    laws = None if certain else probs[tokens_BN]
    if width == 1:
        return Draft.chain(tokens_BN, probs=laws)
    num_nodes = torch.full((len(roots),), len(tokens))
    return Draft(tokens_BN, torch.tensor(parents).expand(len(roots), -1), num_nodes, laws)


def sampled(
    rule: Rule,
    *,
    params: SamplingParams = PLAIN,
    drafter_params: SamplingParams | None = None,
    depth: int = 3,
    width: int = 1,
    certain: bool = False,
    num_samples: int = NUM_SAMPLES,
    seed: int = 7,
) -> Counter[tuple[int, ...]]:
    """Counts of the first three tokens of `num_samples` outputs, all decoded side by side."""
    generator = torch.Generator().manual_seed(seed)
    target, drafter = warp(TARGET, params), warp(DRAFTER, drafter_params or params)
    output = torch.full((num_samples, STEPS + depth + 1), FIRST)
    rows = torch.arange(num_samples)
    length, last = torch.zeros(num_samples, dtype=torch.long), torch.full((num_samples,), FIRST)
    while int(length.min()) < STEPS:
        draft = tree(last, drafter, depth=depth, width=width, certain=certain, generator=generator)
        uniforms = torch.rand(draft.tokens.shape, generator=generator)
        found = rule(draft, target[draft.tokens], uniforms)
        on_path = draft.tokens.gather(1, found.path.clamp(min=0))
        for place in range(1, depth + 1):
            here = (place <= found.num_accepted) & (length < STEPS)
            output[rows[here], length[here]] = on_path[here, place]
            length += here
        here = length < STEPS
        output[rows[here], length[here]] = found.next_token[here]
        length += here
        last = found.next_token
    return Counter(map(tuple, output[:, :STEPS].tolist()))


@pytest.mark.parametrize("rule", [accept_chain, accept_tree])
@pytest.mark.parametrize("depth", [1, 3])
def test_chains_are_lossless(g_test, rule, depth):
    counts = sampled(rule, depth=depth)
    assert g_test(counts, exact(warp(TARGET, PLAIN))) > PASSES


@pytest.mark.parametrize(("width", "depth"), [(2, 2), (3, 2), (2, 1), (4, 1)])
def test_trees_of_independent_children_are_lossless(g_test, width, depth):
    counts = sampled(accept_tree, width=width, depth=depth)
    assert g_test(counts, exact(warp(TARGET, PLAIN))) > PASSES


@pytest.mark.parametrize(("rule", "width"), [(accept_chain, 1), (accept_tree, 1), (accept_tree, 2)])
def test_drafts_chosen_with_certainty_are_lossless(g_test, rule, width):
    counts = sampled(rule, width=width, depth=2, certain=True)
    assert g_test(counts, exact(warp(TARGET, PLAIN))) > PASSES


@pytest.mark.parametrize("params", WARPED[1:], ids=str)
@pytest.mark.parametrize(("rule", "width"), [(accept_chain, 1), (accept_tree, 2)])
def test_warping_both_sides_is_lossless(g_test, rule, width, params):
    counts = sampled(rule, params=params, width=width, depth=2)
    assert g_test(counts, exact(warp(TARGET, params))) > PASSES


@pytest.mark.parametrize(("rule", "width"), [(accept_chain, 1), (accept_tree, 2)])
def test_the_drafter_may_be_warped_otherwise(g_test, rule, width):
    target, drafter = SamplingParams(temperature=1.0, top_k=3), SamplingParams(temperature=2.0)
    counts = sampled(rule, params=target, drafter_params=drafter, width=width, depth=2)
    assert g_test(counts, exact(warp(TARGET, target))) > PASSES


# Faults, each planted in a rule that is otherwise right. `leaf` is where the path ends.


def at_leaf(found: Acceptance, rows_BNV: Tensor) -> Tensor:
    batch = torch.arange(len(found.path))
    return rows_BNV[batch, found.path[batch, found.num_accepted]]


def with_next_token(found: Acceptance, next_token: Tensor) -> Acceptance:
    return Acceptance(found.path, found.num_accepted, next_token, found.num_tried)


def fresh(like: Tensor) -> Tensor:
    return torch.rand(len(like), generator=torch.Generator().manual_seed(int(like.sum())))


def without_residual(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """After a rejection the target's own row, as if nothing had been tried."""
    found = accept_chain(draft, target_probs, uniforms)
    return with_next_token(found, draw(at_leaf(found, target_probs), fresh(draft.tokens)))


def residual_not_normalised(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """Inversion over (p - q)+ as it stands: what is missing from one goes to the last token."""
    found = accept_chain(draft, target_probs, uniforms)
    residual = (at_leaf(found, target_probs) - at_leaf(found, draft.probs)).clamp_min(0)
    crossed = residual.cumsum(-1) > fresh(draft.tokens)[:, None]
    token = torch.where(crossed.any(-1), crossed.int().argmax(-1), V - 1)
    rejected = found.num_accepted < draft.num_nodes - 1
    return with_next_token(found, torch.where(rejected, token, found.next_token))


def sibling_residual_not_normalised(
    draft: Draft, target_probs: Tensor, uniforms: Tensor
) -> Acceptance:
    """Two children below the root: the second is judged by a residual that sums to less than 1."""
    rows = torch.arange(len(draft.tokens))
    first, second = draft.tokens[:, 1], draft.tokens[:, 2]
    p, q = target_probs[:, 0], draft.probs[:, 0]
    residual = (p - q).clamp_min(0)
    takes_first = uniforms[:, 0] * q[rows, first] < p[rows, first]
    takes_second = ~takes_first & (uniforms[:, 1] * q[rows, second] < residual[rows, second])
    rest = (residual / residual.sum(-1, keepdim=True) - q).clamp_min(0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, residual)
    child = torch.where(takes_first, 1, 2)
    accepted = takes_first | takes_second
    law = torch.where(accepted[:, None], target_probs[rows, child], rest)
    path = torch.stack([torch.zeros_like(child), torch.where(accepted, child, -1)], dim=1)
    path = torch.nn.functional.pad(path, (0, draft.tokens.shape[1] - 2), value=-1)
    return Acceptance(path, accepted.long(), draw(law, uniforms[:, 2]), accepted.long())


def bonus_from_the_drafter(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    found = accept_chain(draft, target_probs, uniforms)
    bonus = draw(at_leaf(found, draft.probs), fresh(draft.tokens))
    complete = found.num_accepted == draft.num_nodes - 1
    return with_next_token(found, torch.where(complete, bonus, found.next_token))


def swapped(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """The ratio upside down: q over p."""
    assert draft.probs is not None
    other = Draft.chain(draft.tokens, probs=target_probs)
    return accept_chain(other, draft.probs, uniforms)


def without_the_ratio(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """Every drafted token is accepted."""
    return accept_chain(draft, target_probs, torch.cat([0 * uniforms[:, :-1], uniforms[:, -1:]], 1))


def one_uniform_for_all(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """The next token is chosen by the draw that judged the first drafted one."""
    return accept_chain(draft, target_probs, uniforms[:, :1].expand_as(uniforms))


@pytest.mark.parametrize(
    "rule",
    [
        without_residual,
        residual_not_normalised,
        bonus_from_the_drafter,
        swapped,
        without_the_ratio,
        one_uniform_for_all,
    ],
)
def test_broken_rules_are_found_out(g_test, rule):
    assert g_test(sampled(rule, depth=2), exact(warp(TARGET, PLAIN))) < FAILS


def test_a_broken_tree_rule_is_found_out(g_test):
    law = exact(warp(TARGET, PLAIN))
    counts = sampled(sibling_residual_not_normalised, width=2, depth=1)
    assert g_test(counts, law) < FAILS
    # The same words with the normalisation in place are the real rule, and pass above.


def test_children_without_their_laws_are_found_out(g_test):
    """Sampled children handed over as if chosen with certainty: the losslessness of a rule hangs
    on how the draft was drawn. Here it holds; with laws that are not theirs it does not."""

    def wrong_laws(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
        flat = torch.full_like(draft.probs, 1 / V)
        return accept_chain(Draft.chain(draft.tokens, probs=flat), target_probs, uniforms)

    assert g_test(sampled(wrong_laws, depth=2), exact(warp(TARGET, PLAIN))) < FAILS


def test_the_expected_acceptance_is_the_measured_one():
    generator = torch.Generator().manual_seed(3)
    target, drafter = warp(TARGET, PLAIN), warp(DRAFTER, PLAIN)
    roots = torch.randint(0, V, (NUM_SAMPLES,), generator=generator)
    draft = tree(roots, drafter, depth=3, width=1, certain=False, generator=generator)
    uniforms = torch.rand(draft.tokens.shape, generator=generator)
    found = accept_chain(draft, target[draft.tokens], uniforms)
    accepted, tried = int(found.num_accepted.sum()), int(found.num_tried.sum())
    expected = float(found.expected_accepted.sum())
    assert abs(accepted - expected) < 4 * math.sqrt(tried / 4)
    # One step from a known root: the overlap of the two laws, summed by hand.
    by_hand = torch.minimum(target, drafter).sum(-1)
    one = tree(torch.arange(V), drafter, depth=1, width=1, certain=False, generator=generator)
    single = accept_chain(one, target[one.tokens], torch.rand(V, 2, generator=generator))
    torch.testing.assert_close(single.expected_accepted.reshape(V, -1).sum(1), by_hand)


# End to end: a real model, its cache and masks, a drafter, the loop with its slots. The first of
# four tokens comes with the prompt, the others from a draft of two and a token of the target's.

EOS, LENGTH = 4, 4
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
            probs = warp(model(texts).logits[:, -1], params).double()
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


class TreeDrafter(Drafter):
    """Trees of 2 x 2 independent children from a table, each sequence with its own generator."""

    hidden_layers = ()

    def propose(self, context: Context) -> Draft:
        drafts = []
        probs = warp(DRAFTER, context.sampling.params[0])
        for root, room, generator in zip(
            context.roots[:, 0], context.room.tolist(), context.sampling.generators, strict=True
        ):
            depth = min(2, room)
            one = tree(root[None], probs, depth=depth, width=2, certain=False, generator=generator)
            drafts.append(one)
        width = max(draft.tokens.shape[1] for draft in drafts)
        tokens = torch.zeros(len(drafts), width, dtype=torch.long)
        parents = torch.arange(-1, width - 1).repeat(len(drafts), 1)
        for row, draft in enumerate(drafts):
            size = draft.tokens.shape[1]
            tokens[row, :size], parents[row, :size] = draft.tokens[0], draft.parents[0]
        num_nodes = torch.tensor([draft.tokens.shape[1] for draft in drafts])
        return Draft(tokens, parents, num_nodes, probs[tokens])


def decoded(
    model, drafter_of, params: SamplingParams, prompt: list[int], count: int
) -> Counter[tuple[int, ...]]:
    target = Target(model, max_batch_size=512)
    decoder = SpeculativeDecoder(target, drafter_of(target))
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


def test_the_decoder_is_lossless_on_trees(g_test, tiny):
    model = tiny("llama", **(TINY | {"max_position_embeddings": 32}))
    params = SamplingParams(temperature=1.0, max_new_tokens=LENGTH)
    counts = decoded(model, lambda _: TreeDrafter(), params, [1, 3], 20_000)
    assert g_test(counts, enumerated(model, params, [1, 3])) > PASSES
