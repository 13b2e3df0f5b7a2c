"""Counts by hand, and counts that add up."""

import math
from functools import reduce
from operator import add

import pytest

from decode import (
    GenerationStats,
    Request,
    SamplingParams,
    SpeculativeDecoder,
    StepTrace,
    Target,
)
from decode.drafters import LMDrafter, NoDrafter

PROMPT = StepTrace(0, reached_leaf=True, num_tried=0, num_accepted=0, num_emitted=1)


def chain(drafted: int, accepted: int, *, is_cut: bool = False) -> StepTrace:
    """A chain of which `accepted` were kept; a cut one ends with an accepted token (EOS)."""
    tried = accepted if is_cut else min(accepted + 1, drafted)
    return StepTrace(drafted, accepted == drafted, tried, accepted, accepted + (not is_cut))


# drafted 3: all accepted, a bonus | 3: the first one | 3: none | 1: accepted | nothing drafted
STEPS = [PROMPT, chain(3, 3), chain(3, 1), chain(3, 0), chain(1, 1), chain(0, 0)]


def test_a_run_by_hand():
    stats = GenerationStats.of(STEPS)
    assert stats.num_steps == 5
    assert stats.num_prefill_tokens == 1
    assert stats.num_drafts == 4
    assert stats.num_draft_tokens == 3 + 3 + 3 + 1
    assert stats.num_tried_tokens == 3 + 2 + 1 + 1
    assert stats.num_accepted_tokens == 3 + 1 + 0 + 1
    assert stats.num_emitted_tokens == 4 + 2 + 1 + 2 + 1
    # position:                                0  1  2
    assert stats.num_tried_per_pos == [4, 2, 1]  # ... and were not refused before
    assert stats.num_accepted_tokens_per_pos == [3, 1, 1]


def test_rates_by_hand():
    stats = GenerationStats.of(STEPS)
    assert stats.block_efficiency == 10 / 5  # τ: the prompt's own token is left out
    assert stats.alpha == 5 / 7  # of tried tokens
    assert stats.draft_acceptance_rate == 5 / 10  # of drafted ones
    stats.seconds = {"prefill": 1.0, "draft": 1.0, "verify": 3.0, "other": 0.5}
    assert stats.total_seconds == 5.5
    assert stats.tokens_per_second == 11 / 5.5


def test_acceptance_by_position_both_ways():
    stats = GenerationStats.of(STEPS)
    accepted, tried = stats.num_accepted_tokens_per_pos, stats.num_tried_per_pos
    unconditional = [a / stats.num_drafts for a in accepted]
    conditional = [a / t for a, t in zip(accepted, tried, strict=True)]
    assert unconditional == [3 / 4, 1 / 4, 1 / 4]
    assert conditional == [3 / 4, 1 / 2, 1 / 1]


def test_tokens_behind_a_rejection_were_never_tried():
    stats = GenerationStats.of([PROMPT, chain(7, 0), chain(7, 0)])
    assert (stats.alpha, stats.draft_acceptance_rate) == (0, 0)
    assert (stats.num_tried_tokens, stats.num_draft_tokens) == (2, 14)
    assert stats.num_tried_per_pos == [2]


def test_tokens_behind_an_eos_were_never_tried():
    """EOS is the second of five drafted tokens: two were tried, and both were right."""
    stats = GenerationStats.of([PROMPT, chain(5, 2, is_cut=True)])
    assert stats.num_emitted_tokens == 2
    assert stats.num_tried_tokens == 2
    assert stats.num_tried_per_pos == [1, 1]
    assert stats.num_accepted_tokens_per_pos == [1, 1]
    assert stats.alpha == 1


def test_a_trees_positions_are_depths():
    # Two children, the second accepted; below it two more, none accepted.
    step = StepTrace(6, reached_leaf=False, num_tried=4, num_accepted=1, num_emitted=2)
    stats = GenerationStats.of([PROMPT, step])
    assert stats.num_tried_per_pos == [1, 1]
    assert stats.num_accepted_tokens_per_pos == [1]
    assert stats.alpha == 1 / 4
    # The same, but below the accepted one hangs nothing: no second position was tried.
    leaf = GenerationStats.of([PROMPT, StepTrace(6, True, 2, 1, 2)])
    assert leaf.num_tried_per_pos == [1]


def test_nothing_gives_no_rate():
    empty = GenerationStats()
    assert empty == GenerationStats.of([])
    rates = (empty.block_efficiency, empty.alpha, empty.draft_acceptance_rate)
    assert all(map(math.isnan, (*rates, empty.tokens_per_second)))
    assert math.isnan(GenerationStats.of([PROMPT]).block_efficiency)


def test_stats_add_and_rates_are_pooled():
    first = GenerationStats.of([PROMPT, chain(3, 3)])
    second = GenerationStats.of([PROMPT, chain(1, 0), chain(5, 1)])
    first.seconds, second.seconds = {"draft": 1.0}, {"draft": 0.5, "verify": 2.0}
    first.expected_accepted, second.expected_accepted = 2.5, 0.75
    both = first + second
    assert both.num_steps == 3
    assert both.num_prefill_tokens == 2
    assert both.num_tried_per_pos == [3, 2, 1]
    assert both.num_accepted_tokens_per_pos == [2, 1, 1]
    assert both.seconds == {"draft": 1.5, "verify": 2.0}
    assert both.expected_accepted == 3.25
    assert both.block_efficiency == (4 + 1 + 2) / 3  # not the mean of 4 and 1.5
    assert second + first == both
    assert first + GenerationStats() == first


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("slots", [1, 4])
def test_the_figures_of_a_run_are_those_of_its_steps(
    tiny, perturbed, prompt, greedy, temperature, slots
):
    model = tiny("llama", eos_token_id=greedy(tiny("llama"), prompt(3), 24)[10])
    target = Target(model, max_batch_size=slots)
    drafter = LMDrafter(perturbed(model), target=target, draft_length=4)
    params = SamplingParams(temperature=temperature, max_new_tokens=24)
    requests = [Request(id=str(n), prompt=prompt(n), sampling=params) for n in range(1, 13)]
    results = SpeculativeDecoder(target, drafter).generate(requests)
    assert {result.finish_reason for result in results} == {"eos", "length"}
    for result in results:
        stats, steps = result.stats, result.steps
        assert sum(step.num_emitted for step in steps) == len(result.tokens)
        assert steps[0] == PROMPT
        assert stats.num_prefill_tokens + stats.num_emitted_tokens == len(result.tokens)
        for step in steps:
            assert step.num_accepted <= step.num_tried <= step.num_drafted
            assert step.num_emitted - step.num_accepted in (0, 1)
            # Cut, or all of it, or one more was tried and refused.
            refused = step.num_tried - step.num_accepted
            assert refused == (step.num_emitted > step.num_accepted < step.num_drafted)
    total = reduce(add, (result.stats for result in results))
    assert sum(total.num_tried_per_pos) == total.num_tried_tokens
    assert sum(total.num_accepted_tokens_per_pos) == total.num_accepted_tokens
    assert set(total.seconds) == {"prefill", "draft", "verify", "other"}
    assert all(seconds > 0 for seconds in total.seconds.values())
    assert 0 < total.alpha < 1


def test_the_expected_acceptance_covers_the_tried_tokens_only(tiny, prompt):
    """The target as its own drafter is certain of every token: Σ min(p, q) is their number, also
    where EOS cuts the draft."""
    model = tiny("llama", eos_token_id=31)
    target = Target(model, max_batch_size=4)
    drafter = LMDrafter(model, target=target, draft_length=5)
    params = SamplingParams(temperature=1.0, max_new_tokens=24)
    requests = [Request(id=str(n), prompt=prompt(n), sampling=params) for n in range(1, 40)]
    results = SpeculativeDecoder(target, drafter).generate(requests)
    cut = [result for result in results if result.steps[-1].num_emitted < 6]
    assert any(result.finish_reason == "eos" for result in cut)
    for result in results:
        assert result.stats.expected_accepted == pytest.approx(
            result.stats.num_tried_tokens, rel=1e-4
        )


def test_without_drafts_there_is_nothing_to_accept(tiny, prompt):
    decoder = SpeculativeDecoder(Target(tiny("llama")), NoDrafter())
    result = decoder.generate([Request(id="a", prompt=prompt(4))])[0]
    assert result.stats.block_efficiency == 1
    assert (result.stats.num_drafts, result.stats.num_draft_tokens) == (0, 0)
    assert result.stats.expected_accepted == 0
