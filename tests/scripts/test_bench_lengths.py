"""The walk through noted drafts, held to the decoder's own steps and to sums by hand."""

import sys
from pathlib import Path

import pytest

from decode import Request, SamplingParams, SpeculativeDecoder, Target
from decode.cost import StepCosts
from decode.draft_length import Constant
from decode.drafters import LMDrafter, NoDrafter
from decode.drafters.reading import Reader

sys.path.append(str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours

from bench_lengths import Place, against_hindsight, places_of, walk

COSTS = StepCosts(0.5, (1.0, 1.25, 1.5, 1.75))


def test_a_walk_adds_up_tokens_and_costs():
    outputs = [[Place(2, (0.9,) * 3), *[Place(0, (0.2,) * 3)] * 4]]
    # Two accepted and one, then two places where one token is drafted in vain, then none fits.
    assert walk(outputs, Constant(2), COSTS) == pytest.approx(5 / (2.5 + 1.75 + 1.0))
    assert walk(outputs, Constant(2, 0.5), COSTS) == pytest.approx(5 / (2.5 + 1.0 + 1.0))


def test_steps_are_the_decoders_own(tiny, perturbed, prompt):
    model = tiny("llama")
    target, longest, length, ids = Target(model, max_batch_size=64), 4, 40, prompt(9)
    small = perturbed(model)
    sampling = SamplingParams(max_new_tokens=length + longest, ignore_eos=True)
    (result,) = SpeculativeDecoder(target, NoDrafter()).generate(
        [Request(id="0", prompt=ids, sampling=sampling)]
    )
    places = places_of(Reader(small, target=target), [*ids, *result.tokens], len(ids) + 1, longest)
    assert len(places) == length
    assert 0 < sum(place.accepted for place in places) < longest * length
    for size in (1, longest):
        drafter = LMDrafter(small, target=target, draft_length=size)
        sampling = SamplingParams(max_new_tokens=length + 1, ignore_eos=True)
        (drafted,) = SpeculativeDecoder(target, drafter).generate(
            [Request(id="0", prompt=ids, sampling=sampling)]
        )
        one_each = StepCosts(0.0, (1.0,) * (longest + 1))
        tokens_per_step = walk([places], Constant(size), one_each)
        assert tokens_per_step == pytest.approx(drafted.stats.block_efficiency)


def test_the_best_fixed_length_is_found_and_may_be_none():
    good = [[Place(3, (0.9,) * 3)] * 200]
    best, speedup, speeds = against_hindsight(good, COSTS)
    assert best == 3
    assert speedup == pytest.approx(4 / 3.25, rel=0.02)
    assert speeds["cost-aware"] > 0.97
    bad = [[Place(0, (0.9,) * 3)] * 200]
    best, speedup, speeds = against_hindsight(bad, COSTS)
    assert (best, speedup) == (0, 1)
    assert 0.9 < speeds["cost-aware"] <= 1
