"""Acceptance by rank, against a count by hand and the laws themselves."""

import pytest
import torch

from decode import SamplingParams
from decode.calibration import acceptance_by_depth, acceptance_profile
from decode.models import Hydra
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


def test_heads_are_counted_at_each_depth(tiny, texts):
    model = tiny("llama")
    heads = Hydra(num_heads=3, prefix_attention=True).build(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    found = acceptance_by_depth(model, heads.eval(), texts, num_ranks=97, sampling=SamplingParams())
    for depth, row in enumerate(found, start=1):
        counts, places = [0] * 97, 0
        for prompt, output in texts:
            ids = torch.tensor([*prompt, *output])
            size = len(ids)
            with torch.no_grad():
                states = model(ids[None], output_hidden_states=True).hidden_states[-1]
                sees = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
                states = heads.prefix(states, sees, torch.arange(size)[None])[0]
                for root in range(len(prompt), size - depth):
                    logits = heads.logits(depth, states[root - 1], ids[root : root + depth])
                    order = logits.argsort(descending=True).tolist()
                    counts[order.index(int(ids[root + depth]))] += 1
                    places += 1
        assert row == pytest.approx([count / places for count in counts])
        assert sum(row) == pytest.approx(1)
