"""Acceptance by rank, against a count by hand and the laws themselves."""

import pytest
import torch

from decode import SamplingParams
from decode.calibration import acceptance_profile
from decode.sampling import warp

WARM = SamplingParams(temperature=1.0)


@pytest.fixture
def texts(tiny, prompt, greedy):
    return [(prompt(n), greedy(tiny("llama"), prompt(n), 60)) for n in (1, 4, 9)]


def laws(tiny, perturbed, texts):
    """[T, V] of target and drafter at every place of the outputs."""
    models = tiny("llama"), perturbed(tiny("llama"))
    rows = [[], []]
    with torch.no_grad():
        for prompt, output in texts:
            for side, model in zip(rows, models, strict=True):
                side.append(
                    model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
                )
    return [warp(torch.cat(side), WARM) for side in rows]


def test_the_likeliest_are_counted_by_their_rank(tiny, perturbed, texts):
    found = acceptance_profile(
        tiny("llama"),
        perturbed(tiny("llama")),
        texts,
        children="likeliest",
        num_ranks=4,
        sampling=SamplingParams(),
    )
    _, drafter = laws(tiny, perturbed, texts)
    wanted = torch.cat([torch.tensor(output) for _, output in texts])
    ranks = (drafter.argsort(dim=-1, descending=True) == wanted[:, None]).int().argmax(-1)
    assert found == [int((ranks == rank).sum()) / len(ranks) for rank in range(4)]
    assert found[0] > 0.3


@pytest.mark.parametrize("children", ["independent", "distinct"])
def test_the_first_drawn_child_has_the_overlap_of_the_laws(tiny, perturbed, texts, children):
    found = [
        acceptance_profile(
            tiny("llama"),
            perturbed(tiny("llama")),
            texts,
            children=children,
            num_ranks=3,
            sampling=WARM,
            seed=seed,
        )
        for seed in range(20)
    ]
    target, drafter = laws(tiny, perturbed, texts)
    overlap = float(torch.minimum(target, drafter).sum(-1).mean())
    first = sum(profile[0] for profile in found) / len(found)
    assert abs(first - overlap) < 4 * (0.25 / (20 * len(target))) ** 0.5
    assert all(sum(profile) <= 1 for profile in found)


def test_a_model_that_drafts_for_itself_is_always_right(tiny, texts):
    found = acceptance_profile(
        tiny("llama"), tiny("llama"), texts, children="distinct", num_ranks=2, sampling=WARM
    )
    assert found == [1.0, 0.0]


def test_children_of_no_known_kind_are_refused(tiny, texts):
    with pytest.raises(ValueError, match="got 'best'"):
        acceptance_profile(
            tiny("llama"), tiny("llama"), texts, children="best", num_ranks=2, sampling=WARM
        )
