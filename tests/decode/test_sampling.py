"""Logits to probabilities to tokens, one generator per sequence."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decode import SamplingBatch, SamplingParams
from decode.sampling import draw, generator_for, warp

CPU = torch.device("cpu")


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(*params: SamplingParams, names: str = "abcdefgh") -> SamplingBatch:
    generators = [generator_for(0, name) for name in names[: len(params)]]
    return SamplingBatch.of(params, generators)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
def test_warping_is_that_of_transformers(temperature, top_k, top_p):
    logits = random_logits(200, 60)
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    ours = warp(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(ours, theirs.softmax(-1))


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_min_p_is_that_of_transformers(min_p, top_p):
    logits = random_logits(200, 60)
    theirs = TemperatureLogitsWarper(0.7)(None, logits)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    theirs = MinPLogitsWarper(min_p)(None, theirs)
    ours = warp(logits, SamplingParams(temperature=0.7, top_p=top_p, min_p=min_p))
    torch.testing.assert_close(ours, theirs.softmax(-1))


def test_tokens_as_likely_as_the_kth_stay():
    probs = warp(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), SamplingParams(temperature=1.0, top_k=2))
    assert (probs > 0).tolist() == [[True, True, True, False]]


def test_greedy_puts_everything_on_the_first_of_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    assert warp(logits, SamplingParams()).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_probabilities_are_float32_whatever_the_model_computes_in():
    logits = random_logits(4, 50).bfloat16()
    for params in (SamplingParams(), SamplingParams(temperature=0.7, top_k=9, top_p=0.9)):
        probs = warp(logits, params)
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.sum(-1), torch.ones(4))


def test_each_sequence_of_a_batch_gets_its_own_law():
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.6),
    ]
    logits = random_logits(4, 6, 20)
    together = batch(*params).probs(logits)
    for row, own in enumerate(params):
        assert torch.equal(together[row], warp(logits[row], own))
    assert torch.equal(batch(*[params[1]] * 4).probs(logits), warp(logits, params[1]))


def test_draws_follow_the_probabilities():
    # An even grid of uniforms hits every token as often as its probability says, to one draw.
    count = 10_000
    probs = warp(random_logits(1, 12), SamplingParams(temperature=1.0))
    uniforms = (torch.arange(count) + 0.5) / count
    tokens = draw(probs.expand(count, 12), uniforms)
    counts = torch.bincount(tokens, minlength=12)
    assert (counts - count * probs[0]).abs().max() <= 1.01


def test_weights_need_not_sum_to_one():
    uniforms = torch.rand(500, generator=torch.Generator().manual_seed(0))
    probs = random_logits(500, 30).softmax(-1)
    assert torch.equal(draw(probs, uniforms), draw(0.01 * probs, uniforms))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 0.5])
def test_the_impossible_is_never_drawn(uniform):
    weights = torch.tensor(
        [[0.0, 0.0, 1.0, 0.0], [0.0, 0.3, 0.7, 0.0], [1e-30, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.2]]
    )
    tokens = draw(weights, torch.full((4,), uniform))
    assert (weights.gather(1, tokens[:, None]) > 0).all()


def test_the_tail_of_a_large_vocabulary_is_reached():
    # One token takes nearly all; in float32 the running sum would not see the others.
    size = 200_000
    weights = torch.full((1, size), 1e-9)
    weights[0, 0] = 1.0
    total = weights.double().sum()
    just_before_the_end = 1 - 0.5 * 1e-9 / total
    assert int(draw(weights.double(), just_before_the_end[None])) == size - 1
    assert int(draw(weights, torch.tensor([1 - 2**-17]))) > 0


def test_a_generator_belongs_to_seed_and_request():
    draws = {
        name: torch.rand(4, generator=generator_for(*name)).tolist()
        for name in [(0, "a"), (0, "b"), (1, "a"), (-1, "a"), (2**70, "a")]
    }
    assert draws[0, "a"] == torch.rand(4, generator=generator_for(0, "a")).tolist()
    assert len({tuple(values) for values in draws.values()}) == len(draws)


def test_draws_do_not_depend_on_the_neighbours():
    sampled = SamplingParams(temperature=1.0)
    counts = [3, 1, 4]
    together = batch(sampled, sampled, sampled).uniforms(counts, CPU)
    for row, count in enumerate(counts):
        alone = batch(sampled, names="abc"[row]).uniforms([count], CPU)
        assert torch.equal(together[row, :count], alone[0])
        assert (together[row, count:] == 0).all()
    assert together.min() >= 0
    assert together.max() < 1


def test_a_sequence_goes_on_drawing_where_it_stopped():
    sampled = SamplingParams(temperature=1.0)
    in_two = batch(sampled)
    first, second = in_two.uniforms([2], CPU), in_two.uniforms([3], CPU)
    at_once = batch(sampled).uniforms([5], CPU)
    assert torch.equal(torch.cat([first, second], dim=1), at_once)


def test_greedy_sequences_draw_nothing():
    mixed = batch(SamplingParams(), SamplingParams(temperature=1.0))
    assert mixed.uniforms([3, 3], CPU)[0].tolist() == [0, 0, 0]
    fresh = torch.rand(3, generator=generator_for(0, "a"))
    assert torch.equal(torch.rand(3, generator=mixed.generators[0]), fresh)
    assert not mixed.is_greedy
    assert batch(SamplingParams(), SamplingParams()).is_greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("max_new_tokens", 0),
        ("top_logprobs", -1),
        ("temperature", float("nan")),
    ],
)
def test_what_no_sampler_can_honour_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})
