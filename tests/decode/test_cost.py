"""What a draft length is worth, against Leviathan et al.'s formulas and by hand."""

import math

import pytest
import torch

from decode import CachedModel
from decode.cost import (
    StepCosts,
    best_length,
    break_even,
    expected_tokens,
    explain,
    measure_by_batch,
)

FREE = StepCosts(draft=0.0, verify=(1.0,) * 9)
CHEAP = StepCosts(draft=0.05, verify=(1.0,) * 9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("length", [0, 1, 5])
def test_expected_tokens_are_leviathans_at_one_acceptance_rate(alpha, length):
    closed = length + 1 if alpha == 1 else (1 - alpha ** (length + 1)) / (1 - alpha)
    assert expected_tokens([alpha], length) == pytest.approx(closed)


def test_acceptance_may_differ_by_position():
    assert expected_tokens([0.5, 0.2], 3) == pytest.approx(1 + 0.5 + 0.5 * 0.2 + 0.5 * 0.2 * 0.2)


def test_drafting_pays_from_alpha_above_c():
    """Leviathan et al. 2023, corollary 3.9, where verification costs the same for any length."""
    assert break_even(CHEAP, 1) == pytest.approx(0.05)
    assert best_length(CHEAP, [0.04]) == 0
    assert best_length(CHEAP, [0.06]) == 1
    assert break_even(StepCosts(draft=1.5, verify=(1.0, 1.0)), 1) == math.inf


def test_what_is_free_is_drafted_to_the_end_and_what_is_dear_is_not():
    assert best_length(FREE, [0.5]) == 8
    assert best_length(CHEAP, [0.95]) == 8
    assert best_length(StepCosts(0.05, tuple(1 + 0.5 * k for k in range(9))), [0.6]) == 1
    assert best_length(StepCosts(0.6, (1.0,) * 9), [0.5]) == 0


def test_c_and_v_are_ratios_to_the_target_on_one_token():
    costs = StepCosts(draft=0.4, verify=(2.0, 2.5, 3.0), other=0.1)
    assert (costs.c, costs.v(2), costs.longest) == (0.2, 1.5, 2)
    assert costs.seconds(2) == pytest.approx(2 * 0.4 + 3.0 + 0.1)


def test_the_choice_explains_itself():
    lines = explain(CHEAP, [0.7, 0.5]).splitlines()
    assert len(lines) == 2 + 9
    (chosen,) = [line for line in lines if "<- chosen" in line]
    assert int(chosen.split("|")[0]) == best_length(CHEAP, [0.7, 0.5])
    assert "c = 0.050" in lines[0]


def test_measuring_leaves_nothing_behind(tiny):
    target, drafter = (CachedModel(tiny("llama"), num_slots=2) for _ in range(2))
    by_batch = measure_by_batch(target, drafter, 4)
    assert list(by_batch) == [1, 2]
    for costs in by_batch.values():
        assert costs.longest == 4
        assert min(costs.draft, *costs.verify) > 0
    for model in (target, drafter):
        assert model.cache.lengths == [0, 0]
    text = torch.arange(5)[None]
    fresh = CachedModel(tiny("llama"), num_slots=2)
    with torch.inference_mode():
        torch.testing.assert_close(
            target.forward([0], text).logits, fresh.forward([0], text).logits
        )
