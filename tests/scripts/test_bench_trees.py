"""Dense trees that planned ones are compared with, and τ over prompts and seeds."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from decode import TreePlan, expected_accepted

sys.path.append(str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours

from bench_trees import best_dense, dense_plans, shapes, widths
from tau import Samples

PROFILE = [[0.6, 0.2, 0.1], [0.5, 0.1, 0.05], [0.3, 0.1, 0.0]]


def test_every_dense_tree_within_the_budget_is_looked_at() -> None:
    found = sorted(dense_plans(6, 3))
    wanted = sorted(
        list(counts)
        for depth in (1, 2, 3)
        for counts in itertools.product(range(1, 7), repeat=depth)
        if TreePlan.expansion(counts).num_drafted <= 6
    )
    assert found == wanted


@pytest.mark.parametrize("budget", [3, 8, 20])
def test_the_planned_tree_has_the_nodes_of_the_best_dense_one_and_promises_no_less(
    budget: int,
) -> None:
    plans = shapes(PROFILE, [budget])
    dense, planned = plans["dense", budget], plans["planned", budget]
    assert planned.num_drafted == dense.num_drafted <= budget
    others = (TreePlan.expansion(counts) for counts in dense_plans(budget, 3))
    best = expected_accepted(dense, PROFILE)
    assert best == max(expected_accepted(plan, PROFILE) for plan in others)
    assert expected_accepted(planned, PROFILE) >= best
    assert plans["chain", 0].is_chain


def test_a_dense_tree_is_told_by_its_children_per_level() -> None:
    assert widths(TreePlan.expansion(best_dense(PROFILE, 3))) == "1 x 1 x 1"
    assert widths(TreePlan.expansion([3, 1, 2])) == "3 x 1 x 2"


def test_tau_is_a_ratio_of_sums_over_prompts_and_seeds() -> None:
    """Two seeds and two prompts: all 16 draws are known."""
    emitted = np.array([[10.0, 30.0], [20.0, 60.0]])  # [S, P]
    steps = np.array([[10.0, 10.0], [10.0, 20.0]])
    tau = Samples(2, 2).tau(np.stack([emitted, steps], axis=1))
    of_draws = {
        round(emitted[np.ix_(seeds, prompts)].sum() / steps[np.ix_(seeds, prompts)].sum(), 6)
        for seeds in itertools.product((0, 1), repeat=2)
        for prompts in itertools.product((0, 1), repeat=2)
    }
    assert tau[0] == 120 / 50
    assert set(tau[1:].round(6)) == of_draws
