"""How long drafts are: each policy by hand, the cost-aware one against hindsight, the output."""

import random

import pytest

from decode import GenerationStats, Request, SamplingParams, SpeculativeDecoder, Target
from decode.cost import StepCosts, best_length, expected_tokens
from decode.draft_length import Confidence, Constant, CostAware, DraftLength, Heuristic
from decode.drafters import (
    ConfidentChains,
    CostAwareChains,
    DynamicTrees,
    ExpansionTrees,
    HeuristicChains,
    PlannedTrees,
)


def test_the_heuristic_grows_by_two_and_shrinks_by_one():
    policy = Heuristic(longest=8, first=4)
    policy.begin(0)
    policy.begin(3)
    assert policy.choose([0, 3]) == [4, 4]
    policy.observe([0, 3], [4, 4], [4, 1], [[], []])
    assert policy.choose([3, 0]) == [3, 6]
    for _ in range(5):
        policy.observe([0, 3], [6, 3], [6, 0], [[], []])
    assert policy.choose([0, 3]) == [8, 1]
    policy.observe([0], [0], [0], [[]])  # nothing was drafted: nothing is learnt
    assert policy.choose([0]) == [8]
    policy.begin(0)
    assert policy.choose([0]) == [4]


def confident(policy: Confidence, chance_of: dict[float, float], steps: int = 600) -> None:
    """Let it see drafts whose tokens are accepted with the chance that their confidence has."""
    generator = random.Random(0)
    for _ in range(steps):
        row = [generator.choice(list(chance_of)) for _ in range(policy.longest)]
        row = [c for c in row if c >= policy.min_confidence] or [max(chance_of)]
        accepted = 0
        while accepted < len(row) and generator.random() < chance_of[row[accepted]]:
            accepted += 1
        policy.observe([0], [len(row)], [accepted], [row])


def test_the_threshold_is_learnt():
    sure = Confidence(longest=6, min_acceptance=0.5)
    confident(sure, {0.32: 0.8, 0.62: 0.9, 0.92: 0.98})  # better than it thinks
    assert sure.min_confidence <= 0.3
    unsure = Confidence(longest=6, min_acceptance=0.5)
    confident(unsure, {0.32: 0.05, 0.62: 0.2, 0.92: 0.9})  # worse
    assert 0.62 < unsure.min_confidence <= 0.92


def test_a_drafter_that_is_never_right_is_tried_all_the_same():
    policy = Confidence(longest=3, min_acceptance=0.5)
    confident(policy, {0.97: 0.0})
    assert policy.min_confidence <= 0.95


# Streams of acceptance, on a clock that counts what the costs say


def simulated(policy: DraftLength, costs: StepCosts, stream: list[float], steps: int) -> float:
    """Tokens a second; `stream` holds the acceptance rate of each part of the text."""
    generator = random.Random(1)
    policy.begin(0)
    tokens, seconds = 0, 0.0
    total = steps * len(stream)
    while tokens < total:
        alpha = stream[min(tokens // steps, len(stream) - 1)]
        (length,) = policy.choose([0])
        accepted = 0
        while accepted < length and generator.random() < alpha:
            accepted += 1
        policy.observe([0], [length], [accepted], [[]])
        tokens += accepted + 1
        seconds += costs.seconds(length)
    return tokens / seconds


LONGEST = 8
COSTS = {
    "memory-bound": StepCosts(0.1, tuple(1 + 0.01 * k for k in range(LONGEST + 1))),
    "small model": StepCosts(0.07, tuple(1 + 0.12 * k for k in range(LONGEST + 1))),
    "dear drafter": StepCosts(0.5, tuple(1 + 0.05 * k for k in range(LONGEST + 1))),
    "never pays": StepCosts(1.2, tuple(1 + 0.3 * k for k in range(LONGEST + 1))),
}
STREAMS = {
    "good": [0.85] * 8,
    "middling": [0.5] * 8,
    "bad": [0.1] * 8,
    "hopeless": [0.0] * 8,
    "getting worse": [0.9] * 4 + [0.2] * 4,
    "getting better": [0.1] * 4 + [0.9] * 4,
    "switching": [0.9, 0.3] * 4,
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
def test_the_cost_aware_length_keeps_up_with_the_best_in_hindsight(costs, stream):
    """At most 3 % behind the best constant length, no drafting among them."""
    fixed = [simulated(_Never(), costs, stream, 1500)] + [
        simulated(Constant(length), costs, stream, 1500) for length in range(1, LONGEST + 1)
    ]
    assert simulated(CostAware(costs), costs, stream, 1500) >= 0.97 * max(fixed)


class _Never(Constant):
    def choose(self, slots):
        return [0] * len(slots)


def test_where_nothing_pays_it_drafts_ever_more_seldom():
    costs, policy = COSTS["dear drafter"], CostAware(COSTS["dear drafter"])
    policy.begin(0)
    lengths = []
    for _ in range(1500):
        (length,) = policy.choose([0])
        lengths.append(length)
        policy.observe([0], [length], [0], [[]])
    assert sum(map(bool, lengths[500:])) <= 5
    assert sum(map(bool, lengths[100:])) >= 3
    # And begins again when drafts are good: each probe that is accepted leads to the next.
    for _ in range(1500):
        (length,) = policy.choose([0])
        policy.observe([0], [length], [length], [[]])
    assert policy.choose([0]) == [LONGEST]
    assert expected_tokens(policy.acceptance(0), LONGEST) / costs.seconds(LONGEST) > 1.0


def test_sequences_that_share_a_step_share_the_length_that_is_best_for_all():
    """Those whose drafts are bad wait for the longest draft anyway."""
    policy = CostAware(StepCosts(0.07, tuple(1 + 0.4 * k for k in range(9))))
    for slot in range(8):
        policy.begin(slot)
    for _ in range(60):
        for slot in range(8):
            policy.observe([slot], [8], [8 if slot == 0 else 0], [[]])
    good, bad = policy.choose([0])[0], policy.choose([1])[0]
    assert good > 4 > 1 >= bad
    pair, everyone = policy.choose([0, 1]), policy.choose(list(range(8)))
    assert (
        pair[0] == pair[1] == best_length(policy.costs, policy.acceptance(0), policy.acceptance(1))
    )
    assert max(everyone) <= pair[0] < good


def test_a_batch_has_costs_of_its_own():
    """Where many sequences share a step, a token more to verify costs more."""
    alone, crowded = StepCosts(0.05, (1.0,) * 9), StepCosts(0.05, tuple(range(1, 10)))
    policy = CostAware(alone, shared={2: alone, 8: crowded})
    for slot in range(8):
        policy.begin(slot)
    assert [policy.costs_of(size) for size in (1, 2)] == [alone, alone]
    assert [policy.costs_of(size) for size in (3, 8, 9)] == [crowded] * 3
    assert policy.choose([0])[0] > 4
    assert policy.choose([0, 1])[0] > 4
    assert policy.choose([0, 1, 2]) == [0, 0, 0]


# In the decoder

DRAFTINGS = [
    HeuristicChains(first=2, longest=6),
    ConfidentChains(longest=5),
    CostAwareChains(longest=4),
    ExpansionTrees(counts=(2, 2)),
    ExpansionTrees(counts=(2, 1), children="independent"),
    PlannedTrees(parents=(0, 0, 1), ranks=(0, 1, 0)),
    DynamicTrees(width=2, depth=3, size=5),
]
GREEDY = SamplingParams(max_new_tokens=24)


@pytest.mark.parametrize("drafting", DRAFTINGS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_output_is_that_of_generate(tiny, perturbed, prompt, greedy, drafting, batch):
    model = tiny("llama")
    prompts = [prompt(length) for length in (5, 1, 17, 30)]
    target = Target(model, max_batch_size=batch)
    drafter = drafting.build(perturbed(model), target)
    requests = [Request(id=str(n), prompt=p, sampling=GREEDY) for n, p in enumerate(prompts)]
    results = SpeculativeDecoder(target, drafter).generate(requests)
    assert [r.tokens for r in results] == [greedy(model, text, 24) for text in prompts]
    stats = sum((r.stats for r in results), GenerationStats())
    assert stats.num_accepted_tokens > 0
    target.cached.cache.check_integrity()
    drafter.reader.cache.check_integrity()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(0), "draft_length must be >= 1"),
        (lambda: Constant(2, 1.5), "min_confidence must lie in"),
        (lambda: Heuristic(longest=3, first=5), "first must lie in 1..3"),
        (lambda: Confidence(longest=0), "longest must be >= 1"),
        (lambda: Confidence(min_acceptance=2.0), "must lie in"),
        (lambda: CostAware(COSTS["small model"], prior=2.0), "prior must lie in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_children_of_no_known_kind_are_refused(tiny):
    target = Target(tiny("llama"))
    with pytest.raises(ValueError, match="likeliest, independent, distinct, got 'best'"):
        ExpansionTrees(children="best").build(tiny("llama"), target)
