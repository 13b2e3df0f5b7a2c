"""Heads on the decoder of an encoder-decoder model: they read it right, and nothing is lost."""

import copy
from collections import Counter
from functools import cache

import pytest
import torch

from decode import Request, SamplingParams, SpeculativeDecoder, Target
from decode.acceptance import RecursiveRejection
from decode.certificate import greedy_output
from decode.drafters import Chains, ExpansionTrees, PlannedTrees
from decode.encoder_decoder import FAMILIES
from decode.models import Blockwise, Heads, Hydra, Medusa
from tests.decode.test_encoder_decoder import target_of

SETTINGS = {
    "blockwise": Blockwise(num_heads=3, hidden_size=24),
    "medusa": Medusa(num_heads=3),
    "hydra": Hydra(num_heads=3, share_head=True),
    "hydra++": Hydra(num_heads=3, num_layers=2, prefix_attention=True),
}
EACH = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
DRAFTINGS = {
    "chains": Chains(length=3),
    "trees": PlannedTrees(parents=(0, 0, 1, 1, 2, 4), ranks=(0, 1, 0, 2, 0, 0)),
}
SMALL = 11  # tokens: random heads are right now and then
LENGTHS = (3, 17, 5, 29, 8, 2)
PLAIN = {"t5": {}, "bart": {}, "marian": {}, "t5 without a scale": {"tie_word_embeddings": False}}


def source(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, SMALL, (length,), generator=generator).tolist()


def requests(**params: object) -> list[Request]:
    sampling = SamplingParams(**({"max_new_tokens": 16} | params))
    return [Request(id=str(n), source=source(n), sampling=sampling) for n in LENGTHS]


@pytest.fixture(scope="module")
def small(tiny_seq2seq):
    """`small(name)`: encoder and decoder of different depths, and a bias on the logits if any."""

    def build(name: str):
        family = name.split()[0]
        layers = {"num_layers": 3, "num_decoder_layers": 2} if family.endswith("t5") else {}
        changes = layers | PLAIN.get(name, {})
        model = copy.deepcopy(tiny_seq2seq(family, vocab_size=SMALL, **changes))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias += torch.linspace(-1, 1, SMALL)
        return model

    return cache(build)


def random_heads(settings, model, scale: float = 0.5) -> Heads:
    """Heads away from their first weights, which would draft what the target has just said."""
    heads = settings.build(model).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in heads.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * scale / max(parameter.shape[-1], 1) ** 0.5)
    return heads


@EACH
@pytest.mark.parametrize("name", [*FAMILIES, "t5 without a scale"])
def test_untrained_heads_say_what_the_target_says_where_they_stand(small, settings, name):
    model = small(name)
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([source(9)]),
            decoder_input_ids=torch.tensor([[0, 4, 5]]),
            output_hidden_states=True,
        )
    heads = settings.build(model)
    hidden = output.decoder_hidden_states[heads.ends.layer]
    assert len(output.decoder_hidden_states) == heads.ends.layer + 1
    for depth in (1, 2, 3):
        tokens = torch.zeros(1, 3, depth, dtype=torch.long)
        ours = heads.logits(depth, heads.prepare(hidden), tokens)
        torch.testing.assert_close(ours, output.logits, atol=1e-4, rtol=1e-4)


@EACH
@pytest.mark.parametrize("name", PLAIN)
def test_chains_are_made_of_the_state_before_the_root(small, settings, name):
    """Every draft of a run against plain forwards over source and text."""
    model = small(name)
    heads = random_heads(settings, model)
    target = target_of(model, max_batch_size=3)
    steps = []
    drafter = Chains(length=3).build(heads, target)
    results = SpeculativeDecoder(target, drafter, on_step=steps.append).generate(requests()[:3])
    outputs = {result.request_id: result.tokens for result in results}
    assert sum(len(step.tokens) for step in steps) > 3 * len(steps), "hardly a draft"
    for step in steps:
        text = torch.tensor([[0, *outputs[step.request_id]][: step.length]])
        with torch.no_grad():
            ids = torch.tensor([source(int(step.request_id))])
            output = model(input_ids=ids, decoder_input_ids=text, output_hidden_states=True)
            states = output.decoder_hidden_states[-1]
            if heads.prefix is not None:
                sees = torch.ones(step.length, step.length, dtype=torch.bool).tril()[None, None]
                states = heads.prefix(states, sees, torch.arange(step.length)[None])
            prepared = heads.prepare(states[0, -2])
            for depth in range(1, len(step.tokens)):
                logits = heads.logits(depth, prepared, torch.tensor(step.tokens[:depth]))
                assert step.tokens[depth] == int(logits.argmax())


@pytest.fixture(scope="module")
def expected(small):
    """`expected(name)`: transformers' own outputs."""
    return cache(lambda name: [greedy_output(small(name), source(n), 16) for n in LENGTHS])


@EACH
@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("drafting", DRAFTINGS.values(), ids=DRAFTINGS)
def test_the_output_is_that_of_generate(small, expected, settings, name, batch, drafting):
    model = small(name)
    target = target_of(model, max_batch_size=batch)
    drafter = drafting.build(random_heads(settings, model), target)
    results = SpeculativeDecoder(target, drafter).generate(requests())
    assert [result.tokens for result in results] == expected(name)
    assert any(result.stats.num_accepted_tokens for result in results)
    target.cached.cache.check_integrity()


def test_one_forward_of_the_decoder_per_step_and_none_to_draft(small):
    """Combined scoring and proposal (Stern et al. 2018, section 4): m/k + 1 calls."""
    model = copy.deepcopy(small("t5"))
    target = target_of(model, max_batch_size=1)
    drafter = Chains(length=3).build(random_heads(SETTINGS["blockwise"], model), target)
    decoder_calls, encoder_calls = [], []
    model.get_decoder().register_forward_hook(lambda *_: decoder_calls.append(1))
    model.get_encoder().register_forward_hook(lambda *_: encoder_calls.append(1))
    (result,) = SpeculativeDecoder(target, drafter).generate(requests()[:1])
    assert len(decoder_calls) == len(result.steps)
    assert len(encoder_calls) == 1
    assert result.stats.block_efficiency > 1


@pytest.mark.parametrize(("name", "drafts"), [("blockwise", "chains"), ("hydra", "trees")])
def test_sampled_outputs_follow_the_targets_distribution(small, g_test, name, drafts):
    model = small("t5")
    params = SamplingParams(temperature=1.0, top_k=2, max_new_tokens=4, ignore_eos=True)
    exact: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(params.max_new_tokens):
        longer = {}
        for output, chance in exact.items():
            with torch.no_grad():
                text = torch.tensor([[0, *output]])
                logits = model(torch.tensor([source(5)]), decoder_input_ids=text).logits[0, -1]
            top = logits.double().topk(2)
            for token, share in zip(top.indices.tolist(), top.values.softmax(-1), strict=True):
                longer[*output, token] = chance * float(share)
        exact = longer
    target: Target = target_of(model, max_batch_size=16)
    drafting, rule = Chains(length=3), None
    if drafts == "trees":
        drafting, rule = ExpansionTrees(counts=(2, 2), children="distinct"), RecursiveRejection()
    decoder = SpeculativeDecoder(
        target, drafting.build(random_heads(SETTINGS[name], model), target), rule
    )
    many = [Request(id=str(n), source=source(5), sampling=params) for n in range(500)]
    results = decoder.generate(many)
    assert min(exact.values()) < 0.9  # there is something to draw
    assert sum(result.stats.num_accepted_tokens for result in results) > 25
    assert g_test(Counter(tuple(result.tokens) for result in results), exact) > 1e-3
