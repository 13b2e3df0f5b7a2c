"""Losslessness of every rule that claims it: joint output counts against exact enumeration.

Target and drafter are Markov chains over a few tokens, so that a forward is a look-up in a table,
the law of an output is a product, and hundreds of thousands of outputs are decoded side by side.
Each case is a G-test; all cases together are wrong with probability `FAMILY` at most (Bonferroni,
over the whole slow suite). `test_what_the_suite_can_see` prints the smallest deviation, in total
variation, that a case finds with 99 % power, and the mutations at the end are planted bugs, one per
way of being wrong, that the same test must find.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from scipy.stats import chi2, ncx2
from torch import Tensor

from decode import Acceptance, Draft, SamplingParams
from decode.acceptance.block import accept_block
from decode.acceptance.k_sequence import accept_k_sequence, acceptance_level
from decode.acceptance.sampling import accept_chain, accept_tree
from decode.acceptance.traversal import accept_traversal
from decode.acceptance.tree import Selection, Siblings, descend, one_by_one
from decode.acceptance.without_replacement import accept_distinct, without
from decode.sampling import draw, warp

STEPS, FIRST = 2, 0
NUM_SAMPLES = 250_000
FAMILY = 0.01  # chance that a right implementation fails anywhere in the suite
FOUND = 1e-9  # what a planted bug must fall below

Rule = Callable[[Draft, Tensor, Tensor], Acceptance]
Laws = tuple[Tensor, Tensor]  # target's and drafter's tables [V, V]: row a is what follows token a


def noise(seed: int, size: int = 5) -> Tensor:
    return 1.5 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def rows(*weights: float) -> Tensor:
    """Logits of a table whose rows are all proportional to `weights`."""
    return torch.tensor(weights).log().expand(len(weights), -1)


PAIRS: dict[str, Laws] = {
    "random": (noise(0), noise(1)),
    "near": (noise(0), noise(0) + 0.3 * noise(1)),
    "equal": (noise(0), noise(0)),
    "disjoint": (rows(2, 1, 0, 0, 0), rows(0, 0, 1, 1, 2)),
    "half disjoint": (rows(3, 2, 1, 0, 0), rows(0, 0, 4, 1, 1)),
    "ties": (rows(1, 1, 1, 1, 1), rows(1, 1, 2, 2, 2)),
    "sure drafter": (noise(0), 8 * noise(1)),
    "sure target": (8 * noise(0), noise(1)),
    "impossible tokens drafted": (rows(1, 2, 3, 0, 0), rows(1, 1, 1, 1, 1)),
    "possible tokens never drafted": (rows(1, 1, 1, 1, 1), rows(1, 2, 3, 0, 0)),
    "one token": (rows(1.0), rows(1.0)),
}
PLAIN = SamplingParams(temperature=1.0)
SAMPLING = {
    "plain": PLAIN,
    "cool": SamplingParams(temperature=0.6),
    "hot": SamplingParams(temperature=1.7),
    "top-k": SamplingParams(temperature=1.0, top_k=3),
    "top-p": SamplingParams(temperature=1.3, top_p=0.8),
    "both": SamplingParams(temperature=0.8, top_k=4, top_p=0.9),
}


@dataclass(frozen=True)
class Shape:
    """A draft tree, and its children: drawn "independent", "distinct", or chosen, "certain"."""

    counts: tuple[int, ...]
    drawn: str = "independent"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.counts))} {self.drawn}"


CHAINS = [Shape((1,)), Shape((1, 1, 1)), Shape((1, 1), "certain")]
INDEPENDENT = [Shape((2,)), Shape((4,)), Shape((2, 2)), Shape((3, 1)), Shape((1, 3))]
DISTINCT = [replace(shape, drawn="distinct") for shape in INDEPENDENT]
CERTAIN = [Shape((2, 2), "certain")]
RULES: dict[str, tuple[Rule, list[Shape]]] = {
    "chain": (accept_chain, CHAINS),
    "block": (accept_block, [*CHAINS, Shape((1, 1)), Shape((1, 1, 1, 1))]),
    "tree": (accept_tree, [*CHAINS, *INDEPENDENT, *CERTAIN]),
    "k-sequence": (accept_k_sequence, [Shape((1, 1)), *INDEPENDENT]),
    "traversal": (
        accept_traversal,
        [Shape((1, 1, 1)), Shape((3, 1)), Shape((2, 2)), *CERTAIN, *DISTINCT],
    ),
    "without replacement": (accept_distinct, [*DISTINCT, Shape((1, 1), "distinct"), *CERTAIN]),
}


def draft_of(roots: Tensor, probs: Tensor, shape: Shape, generator: torch.Generator) -> Draft:
    """A tree of this shape below each root, its nodes level by level."""
    tokens, parents, valid, level = [roots], [-1], [torch.ones_like(roots, dtype=torch.bool)], [0]
    for count in shape.counts:
        below = []
        for node in level:
            law = probs[tokens[node]]
            for _ in range(count):
                left = law.sum(-1) > 0
                filled = torch.where(left[:, None], law, 1.0)
                token = torch.multinomial(filled, 1, generator=generator)[:, 0]
                if shape.drawn == "certain":  # the likeliest, whatever it is worth
                    token = law.argmax(-1)
                if shape.drawn != "independent":
                    law = law.scatter(1, token[:, None], 0.0)
                below.append(len(tokens))
                tokens.append(token)
                parents.append(node)
                valid.append(left & valid[node])
        level = below
    tokens_BN = torch.stack(tokens, dim=1)
    laws = None if shape.drawn == "certain" else probs[tokens_BN]
    if max(shape.counts) == 1:
        return Draft.chain(tokens_BN, probs=laws)
    parents_BN = torch.tensor(parents).expand(len(roots), -1)
    draft = Draft(tokens_BN, parents_BN, torch.full((len(roots),), len(tokens)), laws)
    if shape.drawn == "distinct":
        return compacted(draft._replace(without_replacement=True), torch.stack(valid, dim=1))
    return draft


def compacted(draft: Draft, valid: Tensor) -> Draft:
    """Without the nodes for which the law had no token left."""
    if valid.all():
        return draft
    order = valid.byte().argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1)
    above = draft.parents.clamp(min=0).gather(1, order)
    parents = torch.where(draft.parents.gather(1, order) < 0, -1, place.gather(1, above))
    width = order.shape[1]
    nodes = torch.arange(width).expand_as(order)
    num_nodes = valid.sum(1)
    parents = torch.where(nodes < num_nodes[:, None], parents, nodes - 1)
    assert draft.probs is not None
    size = draft.probs.shape[-1]
    return draft._replace(
        tokens=draft.tokens.gather(1, order),
        parents=parents,
        num_nodes=num_nodes,
        probs=draft.probs.gather(1, order[..., None].expand(-1, -1, size)),
    )


def sampled(
    rule: Rule,
    shape: Shape,
    pair: Laws = PAIRS["random"],
    *,
    target_params: SamplingParams = PLAIN,
    drafter_params: SamplingParams | None = None,
    num_samples: int = NUM_SAMPLES,
    seed: int = 7,
) -> Counter[tuple[int, ...]]:
    """Counts of the first `STEPS` tokens of `num_samples` outputs."""
    generator = torch.Generator().manual_seed(seed)
    target, drafter = warp(pair[0], target_params), warp(pair[1], drafter_params or target_params)
    depth = len(shape.counts)
    output = torch.full((num_samples, STEPS + depth + 1), FIRST)
    batch = torch.arange(num_samples)
    length = torch.zeros(num_samples, dtype=torch.long)
    last = torch.full((num_samples,), FIRST)
    while int(length.min()) < STEPS:
        draft = draft_of(last, drafter, shape, generator)
        uniforms = torch.rand(draft.tokens.shape, generator=generator)
        found = rule(draft, target[draft.tokens], uniforms)
        on_path = draft.tokens.gather(1, found.path.clamp(min=0))
        for place in range(1, depth + 1):
            here = (place <= found.num_accepted) & (length < STEPS)
            output[batch[here], length[here]] = on_path[here, place]
            length += here
        here = length < STEPS
        output[batch[here], length[here]] = found.next_token[here]
        length += here
        last = found.next_token
    codes = (output[:, :STEPS] * torch.tensor([len(target) ** i for i in range(STEPS)])).sum(1)
    unique, counts = codes.unique(return_counts=True)
    size = len(target)
    return Counter(
        {
            tuple(code // size**i % size for i in range(STEPS)): count
            for code, count in zip(unique.tolist(), counts.tolist(), strict=True)
        }
    )


def exact(
    pair: Laws = PAIRS["random"], params: SamplingParams = PLAIN
) -> dict[tuple[int, ...], float]:
    """Every output and its probability."""
    probs = warp(pair[0], params).double()
    law = {
        output: math.prod(float(probs[a, b]) for a, b in itertools.pairwise((FIRST, *output)))
        for output in itertools.product(range(len(probs)), repeat=STEPS)
    }
    return {output: probability for output, probability in law.items() if probability > 0}


# The suite: rule x shape x laws, and rule x shape x sampling. A part of it runs every time.

CASES = [
    (name, shape, pair, "plain", "plain")
    for name, (_, shapes) in RULES.items()
    for shape in shapes
    for pair in PAIRS
] + [
    (name, shape, "random", sampling, other)
    for name, (_, shapes) in RULES.items()
    for shape in shapes
    for sampling, other in [*((s, s) for s in SAMPLING if s != "plain"), ("top-k", "hot")]
]
ALPHA = FAMILY / len(CASES)
QUICK = {
    case
    for number, case in enumerate(CASES)
    if number % 7 == 0 or (case[2] in ("half disjoint", "one token") and case[1].counts == (2, 2))
}


@pytest.mark.parametrize(
    ("rule", "shape", "pair", "sampling", "drafter_sampling"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
    ids=lambda value: str(value),
)
def test_the_output_has_the_targets_distribution(
    g_test, rule, shape, pair, sampling, drafter_sampling
):
    counts = sampled(
        RULES[rule][0],
        shape,
        PAIRS[pair],
        target_params=SAMPLING[sampling],
        drafter_params=SAMPLING[drafter_sampling],
    )
    assert g_test(counts, exact(PAIRS[pair], SAMPLING[sampling])) > ALPHA


def power(deviation: float, num_outcomes: int) -> float:
    """Chance that a case finds a deviation of this total variation, at the least.

    The noncentrality of the G-test is about N Σ (difference)² / p, which is at least
    4 N (total variation)², by Cauchy-Schwarz: no deviation of this size is harder to see.
    """
    freedom = num_outcomes - 1
    threshold = chi2.isf(ALPHA, freedom)
    return float(ncx2.sf(threshold, freedom, 4 * NUM_SAMPLES * deviation**2))


def test_what_the_suite_can_see(capsys):
    """A total variation of 0.01 is found with 99 % power, by any case."""
    num_outcomes = 5**STEPS
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, num_outcomes) >= 0.99 else (middle, high)
    with capsys.disabled():
        print(
            f"\nlosslessness: {len(CASES)} cases of {NUM_SAMPLES:,} outputs; a case fails below "
            f"p = {ALPHA:.1e} and finds a total variation of {high:.4f} with 99 % power"
        )
    assert high <= 0.01


def test_the_power_is_what_it_is_said_to_be(g_test):
    """A drafter's law mixed into the target's, just so much that it is off by 0.01."""
    target, drafter = (warp(logits, PLAIN)[FIRST] for logits in PAIRS["random"])
    share = 0.01 / float(0.5 * (target - drafter).abs().sum())
    wrong = (1 - share) * target + share * drafter
    law = {(token,): float(p) for token, p in enumerate(target.double() / target.double().sum())}
    found = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.multinomial(wrong, NUM_SAMPLES, replacement=True, generator=generator)
        found += g_test(Counter((t,) for t in tokens.tolist()), law) < ALPHA
    assert found >= 38


# Mutations: bugs planted in rules that are otherwise right, one per way of being wrong.


def at_leaf(found: Acceptance, rows_BNV: Tensor) -> Tensor:
    batch = torch.arange(len(found.path))
    return rows_BNV[batch, found.path[batch, found.num_accepted]]


def fresh(like: Tensor) -> Tensor:
    return torch.rand(len(like), generator=torch.Generator().manual_seed(int(like.sum())))


def residual_forgotten(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """After a rejection the target's own row, as if nothing had been tried."""
    found = accept_chain(draft, target_probs, uniforms)
    return found._replace(next_token=draw(at_leaf(found, target_probs), fresh(draft.tokens)))


def residual_not_normalised(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """Inversion over (p - q)+ as it stands: what is missing from one goes to the last token."""
    found = accept_chain(draft, target_probs, uniforms)
    residual = (at_leaf(found, target_probs) - at_leaf(found, draft.probs)).clamp_min(0)
    crossed = residual.cumsum(-1) > fresh(draft.tokens)[:, None]
    token = torch.where(crossed.any(-1), crossed.int().argmax(-1), residual.shape[-1] - 1)
    rejected = found.num_accepted < draft.num_nodes - 1
    return found._replace(next_token=torch.where(rejected, token, found.next_token))


def siblings_residual_not_normalised(
    draft: Draft, target_probs: Tensor, uniforms: Tensor
) -> Acceptance:
    """The second child is judged by a residual that sums to less than one."""

    def select(p: Tensor, siblings: Siblings) -> Selection:
        return one_by_one(p, siblings, relax=lambda rest: torch.where(rest == p, rest, 0.7 * rest))

    return descend(draft, target_probs, uniforms, select)


def bonus_from_the_drafter(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    found = accept_chain(draft, target_probs, uniforms)
    bonus = draw(at_leaf(found, draft.probs), fresh(draft.tokens))
    complete = found.num_accepted == draft.num_nodes - 1
    return found._replace(next_token=torch.where(complete, bonus, found.next_token))


def ratio_upside_down(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    assert draft.probs is not None
    return accept_chain(Draft.chain(draft.tokens, probs=target_probs), draft.probs, uniforms)


def everything_accepted(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    return accept_chain(draft, target_probs, torch.cat([0 * uniforms[:, :-1], uniforms[:, -1:]], 1))


def one_uniform_for_all(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """The next token is chosen by the draw that judged the first drafted one."""
    return accept_chain(draft, target_probs, uniforms[:, :1].expand_as(uniforms))


def laws_of_something_else(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    flat = torch.full_like(draft.probs, 1 / draft.probs.shape[-1])
    return accept_chain(Draft.chain(draft.tokens, probs=flat), target_probs, uniforms)


def laws_at_another_temperature(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """The drafter's temperature is applied when drawing and forgotten when judging."""
    assert draft.probs is not None
    other = draft.probs**0.7
    other = other / other.sum(-1, keepdim=True)
    return accept_chain(Draft.chain(draft.tokens, probs=other), target_probs, uniforms)


def judged_by_its_own_row(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """Off by one: a token's probability is read behind it instead of before it."""
    return accept_chain(draft, target_probs.roll(-1, dims=1), uniforms)


def next_token_behind_the_root(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    found = accept_tree(draft, target_probs, uniforms)
    return found._replace(next_token=draw(target_probs[:, 0], fresh(draft.tokens)))


def distinct_as_independent(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    return accept_tree(draft, target_probs, uniforms)


def independent_as_distinct(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    return accept_distinct(draft, target_probs, uniforms)


def law_not_renormalised(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """Without replacement, the refused token leaves the law, the rest of it stays as it was."""

    def select(p: Tensor, siblings: Siblings) -> Selection:
        return one_by_one(p, siblings, next_law=lambda law, token: law.scatter(1, token, 0.0))

    return descend(draft, target_probs, uniforms, select)


def likeliest_as_drawn(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """Tokens chosen with certainty, handed over with the laws they were not drawn from."""
    laws = warp(PAIRS["random"][1], PLAIN)[draft.tokens]
    return accept_tree(draft._replace(probs=laws), target_probs, uniforms)


def all_siblings_by_the_same_p(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """A second child has the first one's chance, though the first has taken some of it."""

    def select(p: Tensor, siblings: Siblings) -> Selection:
        found = one_by_one(p, siblings)
        second = siblings.tokens[:, 1:2]
        law = siblings.law
        assert law is not None
        takes = siblings.uniforms[:, 1:2] * law.gather(1, second) < p.gather(1, second)
        chosen = torch.where((found.chosen < 0) & takes[:, 0], 1, found.chosen)
        return found._replace(chosen=chosen)

    return descend(draft, target_probs, uniforms, select)


def block_without_the_cap(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """Each prefix by the product of all ratios: a surplus is carried beyond one."""
    drafted = draft.tokens[:, 1:, None]
    p = target_probs[:, :-1].gather(2, drafted)[..., 0]
    assert draft.probs is not None
    weight = (p / draft.probs[:, :-1].gather(2, drafted)[..., 0]).cumprod(1)
    count = (uniforms[:, :-1] < weight).long() * torch.arange(1, weight.shape[1] + 1)
    found = accept_block(draft, target_probs, uniforms)
    return found._replace(
        num_accepted=count.amax(1),
        path=torch.arange(drafted.shape[1] + 1).expand_as(draft.tokens),
    )


def block_with_the_chains_residual(
    draft: Draft, target_probs: Tensor, uniforms: Tensor
) -> Acceptance:
    """The block decides how much is accepted, (p - q)+ what follows: two rules mixed up."""
    found = accept_block(draft, target_probs, uniforms)
    assert draft.probs is not None
    rest = (at_leaf(found, target_probs) - at_leaf(found, draft.probs)).clamp_min(0)
    rejected = found.num_accepted < draft.num_nodes - 1
    token = draw(rest + 1e-12, fresh(draft.tokens))
    return found._replace(next_token=torch.where(rejected, token, found.next_token))


def level_of_one(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
    """K siblings, each accepted as if it were the only one, the rest drawn as k-sequence does."""

    def select(p: Tensor, siblings: Siblings) -> Selection:
        law = siblings.law
        assert law is not None
        would = siblings.uniforms * law.gather(1, siblings.tokens) < p.gather(1, siblings.tokens)
        would &= siblings.valid
        chosen = torch.where(would.any(1), would.byte().argmax(1), -1)
        rest = (p - law).clamp_min(0) + 1e-12
        return Selection(chosen, siblings.valid, siblings.uniforms, rest)

    return descend(draft, target_probs, uniforms, select)


MUTATIONS: dict[Rule, Shape] = {
    residual_forgotten: Shape((1, 1)),
    residual_not_normalised: Shape((1, 1)),
    siblings_residual_not_normalised: Shape((2, 1)),
    bonus_from_the_drafter: Shape((1,)),
    ratio_upside_down: Shape((1, 1)),
    everything_accepted: Shape((1, 1)),
    one_uniform_for_all: Shape((1, 1)),
    laws_of_something_else: Shape((1, 1)),
    laws_at_another_temperature: Shape((1, 1)),
    judged_by_its_own_row: Shape((1, 1)),
    next_token_behind_the_root: Shape((2,)),
    distinct_as_independent: Shape((3,), "distinct"),
    independent_as_distinct: Shape((3,)),
    law_not_renormalised: Shape((3,), "distinct"),
    likeliest_as_drawn: Shape((2,), "certain"),
    all_siblings_by_the_same_p: Shape((2,)),
    block_without_the_cap: Shape((1, 1)),
    block_with_the_chains_residual: Shape((1, 1)),
    level_of_one: Shape((3,)),
}


@pytest.mark.parametrize(
    ("mutation", "shape"), MUTATIONS.items(), ids=[rule.__name__ for rule in MUTATIONS]
)
def test_planted_bugs_are_found(g_test, mutation, shape):
    assert g_test(sampled(mutation, shape, num_samples=120_000), exact()) < FOUND


# What the rules say besides


def test_the_expected_acceptance_is_the_measured_one():
    """Of every rule that names one, on chains and trees."""
    generator = torch.Generator().manual_seed(3)
    target, drafter = (warp(logits, PLAIN) for logits in PAIRS["random"])
    roots = torch.randint(0, 5, (NUM_SAMPLES,), generator=generator)
    for rule, shape in [
        (accept_chain, Shape((1, 1, 1))),
        (accept_tree, Shape((3, 2))),
        (accept_distinct, Shape((3, 2), "distinct")),
        (accept_k_sequence, Shape((3, 2))),
    ]:
        draft = draft_of(roots, drafter, shape, generator)
        uniforms = torch.rand(draft.tokens.shape, generator=generator)
        found = rule(draft, target[draft.tokens], uniforms)
        accepted, tried = int(found.num_accepted.sum()), int(found.num_tried.sum())
        assert abs(accepted - float(found.expected_accepted.sum())) < 4 * math.sqrt(tried / 4)
    # One step from a known root: the overlap of the two laws, summed by hand.
    by_hand = torch.minimum(target, drafter).sum(-1)
    one = draft_of(torch.arange(5), drafter, Shape((1,)), generator)
    single = accept_chain(one, target[one.tokens], torch.rand(5, 2, generator=generator))
    torch.testing.assert_close(single.expected_accepted.sum(1), by_hand)


def mean_accepted(rule: Rule, shape: Shape, pair: str = "random") -> float:
    generator = torch.Generator().manual_seed(5)
    target, drafter = (warp(logits, PLAIN) for logits in PAIRS[pair])
    roots = torch.randint(0, 5, (NUM_SAMPLES,), generator=generator)
    draft = draft_of(roots, drafter, shape, generator)
    uniforms = torch.rand(draft.tokens.shape, generator=generator)
    return float(rule(draft, target[draft.tokens], uniforms).num_accepted.float().mean())


def test_a_block_accepts_more_than_its_tokens_do_one_by_one():
    by_block = mean_accepted(accept_block, Shape((1, 1, 1)))
    assert by_block > mean_accepted(accept_chain, Shape((1, 1, 1))) + 0.01


def test_a_tree_from_its_leaves_up_accepts_more_than_from_its_root_down():
    for shape in (Shape((2, 2)), Shape((2, 2), "distinct")):
        down = accept_tree if shape.drawn == "independent" else accept_distinct
        assert mean_accepted(accept_traversal, shape) > mean_accepted(down, shape) + 0.01


def test_on_a_chain_traversal_is_block_verification():
    target, drafter = (warp(logits, PLAIN) for logits in PAIRS["random"])
    generator = torch.Generator().manual_seed(2)
    roots = torch.randint(0, 5, (5_000,), generator=generator)
    draft = draft_of(roots, drafter, Shape((1, 1, 1, 1)), generator)
    uniforms = torch.rand(draft.tokens.shape, generator=generator)
    ours, theirs = (
        rule(draft, target[draft.tokens], uniforms) for rule in (accept_traversal, accept_block)
    )
    assert torch.equal(ours.path, theirs.path)
    assert torch.equal(ours.num_tried, theirs.num_tried)
    assert float((ours.next_token == theirs.next_token).float().mean()) > 0.999  # but for rounding


def test_siblings_that_differ_accept_more_than_ones_that_may_repeat():
    distinct = mean_accepted(accept_distinct, Shape((3,), "distinct"))
    assert distinct > mean_accepted(accept_tree, Shape((3,))) + 0.01


def test_the_acceptance_level_solves_its_equation():
    target, drafter = (warp(logits, PLAIN) for logits in PAIRS["random"])
    count = torch.tensor([[1], [2], [3], [5], [8]])
    level = acceptance_level(target, drafter, count)
    chance = torch.minimum(drafter, target / level).sum(-1, keepdim=True)
    torch.testing.assert_close(1 - (1 - chance) ** count, level * chance, atol=1e-4, rtol=1e-4)
    assert (level >= 1).all()
    assert (level <= count).all()
    torch.testing.assert_close(
        without(drafter, torch.tensor([[0], [1], [2], [3], [4]])).sum(-1), torch.ones(5)
    )
