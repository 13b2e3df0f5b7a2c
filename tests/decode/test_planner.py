"""Planned trees against brute force: every tree of a budget, enumerated."""

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator

import pytest

from decode.planner import TreePlan, expected_accepted, plan_best_first, plan_without_gaps

Path = tuple[int, ...]


def every_tree(size: int, depth: int, width: int) -> Iterator[frozenset[Path]]:
    """All sets of `size` nodes, each a tuple of ranks, that hang together below the root."""
    trees = {frozenset[Path]()}
    for _ in range(size):
        trees = {
            tree | {(*above, rank)}
            for tree in trees
            for above in [(), *tree]
            for rank in range(width)
            if len(above) < depth and (*above, rank) not in tree
        }
    yield from trees


def has_gaps(tree: frozenset[Path]) -> bool:
    return any(path[-1] > 0 and (*path[:-1], path[-1] - 1) not in tree for path in tree)


def value(tree: frozenset[Path], matrix: list[list[float]]) -> float:
    total = 0.0
    for path in tree:
        product = 1.0
        for depth, rank in enumerate(path):
            product *= matrix[depth][rank]
        total += product
    return total


def paths(plan: TreePlan) -> frozenset[Path]:
    found: list[Path] = [()]
    for parent, rank in zip(plan.parents, plan.ranks, strict=True):
        found.append((*found[parent], rank))
    return frozenset(found[1:])


LIMITS = [(size, depth, width) for size in range(6) for depth in (1, 2, 4) for width in (1, 2, 3)]


@pytest.mark.parametrize("seed", range(4))
def test_no_tree_without_gaps_is_better_than_the_dynamic_programmes(seed):
    draws = random.Random(seed)
    for size, depth, width in LIMITS:
        vector = [draws.random() for _ in range(width)]
        if seed % 2:  # as it mostly is; else a later rank may be the better one
            vector.sort(reverse=True)
        plan = plan_without_gaps(vector, budget=size, depth=depth)
        candidates = [
            tree
            for count in range(size + 1)
            for tree in every_tree(count, depth, width)
            if not has_gaps(tree)
        ]
        best = max(value(tree, [vector] * depth) for tree in candidates)
        assert expected_accepted(plan, vector) == pytest.approx(best)
        assert paths(plan) in candidates
        assert not plan.has_gaps


@pytest.mark.parametrize("seed", range(4))
def test_no_tree_at_all_is_better_than_the_best_first(seed):
    draws = random.Random(seed)
    for size, depth, width in LIMITS:
        matrix = [[draws.random() for _ in range(width)] for _ in range(depth)]
        plan = plan_best_first(matrix, budget=size, depth=depth)
        candidates = [t for count in range(size + 1) for t in every_tree(count, depth, width)]
        best = max(value(tree, matrix) for tree in candidates)
        assert expected_accepted(plan, matrix) == pytest.approx(best)
        assert value(paths(plan), matrix) == pytest.approx(best)
        assert paths(plan) in candidates


@pytest.mark.parametrize("budget", [0, 1, 7, 40, 100])
@pytest.mark.parametrize("depth", [0, 1, 3, 9])
def test_where_acceptance_falls_with_the_rank_both_find_the_best(budget, depth):
    vector = [0.62, 0.17, 0.06, 0.03, 0.01]
    sequoia = plan_without_gaps(vector, budget=budget, depth=depth)
    medusa = plan_best_first(vector, budget=budget, depth=depth)
    assert expected_accepted(sequoia, vector) == pytest.approx(expected_accepted(medusa, vector))
    assert sequoia.num_drafted == min(budget, sum(5**level for level in range(1, depth + 1)))
    assert max(sequoia.depth, medusa.depth) <= depth


def test_a_worthless_child_is_drafted_only_on_the_way_to_a_worthy_one():
    assert plan_best_first([0.0, 0.5], budget=9, depth=2) == TreePlan((0, 1), (1, 1))
    drawn = plan_without_gaps([0.0, 0.5], budget=9, depth=2)
    assert paths(drawn) == {(0,), (1,), (1, 0), (1, 1)}
    assert plan_without_gaps([0.5, 0.0], budget=9, depth=3) == TreePlan.expansion([1, 1, 1])
    assert plan_without_gaps([], budget=9, depth=3) == TreePlan((), ())


def test_an_expansion_by_hand():
    #        0
    #    1       2
    #  3 4 5   6 7 8
    plan = TreePlan.expansion([2, 3, 1])
    assert plan.parents == (0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8)
    assert plan.ranks == (0, 1, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0)
    assert plan.depths == (1,) * 2 + (2,) * 6 + (3,) * 6
    assert (plan.depth, plan.num_drafted, plan.is_chain, plan.has_gaps) == (3, 14, False, False)
    # By hand: level 1 is worth .6 + .3; level 2 each of that times (.6 + .3 + .1); level 3 x .6.
    assert expected_accepted(plan, [0.6, 0.3, 0.1]) == pytest.approx(0.9 + 0.9 + 0.9 * 0.6)


def test_a_chain_and_nothing():
    assert TreePlan.expansion([1, 1, 1]).is_chain
    assert TreePlan.expansion([]) == TreePlan((), ())
    assert TreePlan((), ()).depth == 0
    assert expected_accepted(TreePlan((), ()), [0.5]) == 0
    # 0.8 + 0.8² + 0.8³, of which a matrix of two rows knows two.
    chain = TreePlan.expansion([1, 1, 1])
    assert expected_accepted(chain, [0.8]) == pytest.approx(0.8 + 0.64 + 0.512)
    assert expected_accepted(chain, [[0.8], [0.8]]) == pytest.approx(0.8 + 0.64)


def test_the_value_is_what_a_simulation_accepts():
    """Child r is the right one with its own probability; walk down, count what is in the tree."""
    vector, draws = [0.5, 0.2, 0.1], random.Random(0)
    plan = plan_without_gaps(vector, budget=12, depth=4)
    nodes, walks, total = paths(plan), 40_000, 0
    for _ in range(walks):
        path: Path = ()
        while True:
            rank = draws.choices([0, 1, 2, 3], [*vector, 1 - sum(vector)])[0]
            path = (*path, rank)
            if path not in nodes:
                break
            total += 1
    assert total / walks == pytest.approx(expected_accepted(plan, vector), abs=0.03)


def test_a_plan_survives_json():
    plan = plan_best_first([[0.7, 0.2], [0.5, 0.3]], budget=5, depth=2)
    assert TreePlan(**json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


@pytest.mark.parametrize(
    ("parents", "ranks", "message"),
    [
        ((0, 0), (0,), "2 parents and 1 ranks"),
        ((1,), (0,), "parent of node 1 must lie before it, got 1"),
        ((-1,), (0,), "parent of node 1 must lie before it, got -1"),
        ((0,), (-1,), "ranks count from 0, got -1"),
        ((0, 1, 0), (0, 0, 1), "level by level"),
        ((0, 0), (1, 1), "the same rank"),
    ],
)
def test_what_is_no_plan_is_refused(parents, ranks, message):
    with pytest.raises(ValueError, match=message):
        TreePlan(parents, ranks)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"at least one child per node, got \[2, 0\]"):
        TreePlan.expansion([2, 0])
    for plan_of, limits in itertools.product(
        [plan_without_gaps, plan_best_first], [(-1, 2), (2, -1)]
    ):
        with pytest.raises(ValueError, match="budget and depth must be >= 0"):
            plan_of([0.5], budget=limits[0], depth=limits[1])
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1.5"):
            plan_of([1.5], budget=2, depth=2)
    with pytest.raises(ValueError, match="a vector or a matrix"):
        plan_best_first([0.5, [0.5]], budget=2, depth=2)
