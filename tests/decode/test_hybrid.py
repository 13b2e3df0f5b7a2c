"""Whose draft the hybrid takes: it learns from what was accepted, and a gate may tell it first."""

import itertools
import json
import re

import numpy as np
import pytest
import torch

from decode import (
    Acceptance,
    Context,
    Draft,
    Request,
    SamplingBatch,
    SamplingParams,
    SpeculativeDecoder,
    Target,
)
from decode.cost import StepCosts
from decode.drafters import (
    Chains,
    DynamicTrees,
    Gate,
    HybridChains,
    HybridDrafter,
    SuffixDrafter,
    load_gate,
    save_gate,
)
from decode.drafters.gate import CONFIG, FEATURES, WEIGHTS, features
from decode.protocols import Drafter
from decode.sampling import generator_for
from decode.suffix import SuffixDecodingCache, SuffixDraft

COSTS = StepCosts(draft=0.1, verify=tuple(1 + 0.1 * k for k in range(17)))


class Counting(SuffixDrafter):
    """Promises what it is told."""

    def __init__(self, score: float):
        super().__init__(sources="own", min_prob=0.0)
        self.score = score

    def propose(self, context: Context) -> Draft:
        draft = super().propose(context)
        self.drafts = [type(d)(d.token_ids, d.parents, d.probs, self.score) for d in self.drafts]
        return draft


@pytest.mark.parametrize(
    ("score", "noise", "c", "turns_of_trained"),
    [
        (0.05, 0.02, 0.1, (0.9, 1.0)),  # a good drafter, and suffixes that promise little
        (3.0, 0.02, 0.1, (0.5, 1.0)),  # suffixes that do not keep what they promise
        (0.05, 9.0, 0.5, (0.0, 0.4)),  # neither pays
    ],
)
def test_the_hybrid_learns_whom_to_trust(tiny, perturbed, score, noise, c, turns_of_trained):
    model = tiny("llama", vocab_size=97)
    target = Target(model, max_batch_size=1)
    other = Chains(length=3).build(perturbed(model, noise), target)
    costs = StepCosts(draft=c, verify=COSTS.verify)
    drafter = HybridDrafter(Counting(score), other, costs=costs, length=3)
    turns = []
    propose = other.propose

    def noted(context):
        turns.append(1)
        return propose(context)

    other.propose = noted
    params = SamplingParams(temperature=1.5, max_new_tokens=80)
    text = [5, 6, 7, 5, 6, 7, 5, 6]
    request = Request(id="a", prompt=text, sampling=params)
    (result,) = SpeculativeDecoder(target, drafter).generate([request])
    low, high = turns_of_trained
    assert low <= len(turns) / result.stats.num_steps <= high
    if high < 0.5:
        assert result.stats.num_drafts < result.stats.num_steps / 2


class Told(SuffixDrafter):
    """Drafts zeros, as many as it is told, with the score that it is told."""

    told = (0, 0.0)

    def propose(self, context: Context) -> Draft:
        size, score = self.told
        parents, probs = list(range(-1, size - 1)), [0.5] * size
        self.drafts = [SuffixDraft([0] * size, parents, probs, score)]
        return Draft.from_lists(context.roots, [[0] * size])


class Ones(Drafter):
    """Drafts three ones."""

    hidden_layers = ()

    def propose(self, context: Context) -> Draft:
        return Draft.from_lists(context.roots, [[1, 1, 1]])


def played(drafter: HybridDrafter, length: int, accepted: int) -> list[int]:
    """What it drafts behind so many tokens, of which `accepted` are accepted."""
    context = Context(
        [0],
        torch.tensor([[9] * length]),
        [9],
        [length],
        [20],
        {},
        SamplingBatch.of([SamplingParams()], [generator_for(0, "a")]),
    )
    draft = drafter.propose(context)
    count = min(accepted, draft.tokens.shape[1] - 1)
    outcome = Acceptance([list(range(count + 1))], [9], [count])
    drafter.observe(context, draft, outcome, torch.zeros(*draft.tokens.shape, 2))
    return draft.tokens[0, 1:].tolist()


def test_the_hybrid_judges_scores_by_drafts_of_like_scores():
    suffix = Told()
    costs = StepCosts(draft=0.5, verify=COSTS.verify)
    drafter = HybridDrafter(suffix, Ones(), costs=costs, length=3)
    drafter.begin(0, torch.tensor([9, 9]), {})
    drafts = []
    for _ in range(300):
        suffix.told = (3, 2.0)  # and keeps it
        assert played(drafter, 2, accepted=3) == [0, 0, 0]
        suffix.told = (1, 0.55)  # and never does
        drafts.append(played(drafter, 2, accepted=0))
    # Until it is known, and then as often as 1 % of the time allows, a tenth of a step each.
    assert drafts[:10] == [[0]] * 10
    assert 5 < drafts[100:].count([0]) < 25
    assert drafts.count([1, 1, 1]) == 1  # this may lose 1.8 steps
    drafter.forget()
    assert played(drafter, 2, accepted=0) == [0]


def test_the_trained_drafter_reads_a_text_when_that_has_paid():
    costs = StepCosts(draft=0.1, verify=COSTS.verify, read=0.05)
    drafter = HybridDrafter(Told(), Ones(), costs=costs, length=3)
    drafter.begin(0, torch.tensor([9] * 105), {})
    # One token accepted of a draft saves 2 - 1.6 steps, and to read 100 tokens takes 5.
    drafts = [played(drafter, 105, accepted=1) for _ in range(12)]
    assert drafts == [[]] * 12
    drafts = [played(drafter, 105 + 2 * step, accepted=1) for step in range(10)]
    assert drafts == [[1, 1, 1]] * 10
    drafter.end(0, [])
    drafter.begin(0, torch.tensor([9] * 105), {})
    assert played(drafter, 105, accepted=1) == []


def test_suffix_trees_beside_sampled_drafts_are_refused(tiny, perturbed):
    model = tiny("llama", vocab_size=11)
    target = Target(model, max_batch_size=2)
    suffix = SuffixDrafter(as_tree=True, min_prob=0.0, factor=4.0)
    other = Chains(length=2).build(perturbed(model, 0.3), target)
    drafter = HybridDrafter(suffix, other, costs=COSTS, length=2, threshold=0.5)
    params = SamplingParams(temperature=1.0, max_new_tokens=30)
    texts = [[1, 2, 1, 3, 1, 2, 1, 3, 1], [5, 6]]
    with pytest.raises(ValueError, match="suffix trees cannot be judged"):
        SpeculativeDecoder(target, drafter).generate(
            Request(id=str(index), prompt=text, sampling=params) for index, text in enumerate(texts)
        )
    likeliest = DynamicTrees(width=2, depth=2, size=4).build(perturbed(model, 0.3), target)
    drafter = HybridDrafter(
        SuffixDrafter(as_tree=True), likeliest, costs=COSTS, length=2, threshold=0.5
    )
    results = SpeculativeDecoder(target, drafter).generate(
        Request(id=str(index), prompt=text, sampling=params) for index, text in enumerate(texts)
    )
    assert [len(result.tokens) for result in results] == [30, 30]


DRAFT = SuffixDraft([7, 8, 9], [-1, 0, 1], [0.8, 0.5, 0.2], 1.5, 4, own=True)


def gate_of(*weights: float, bias: float = 0.0, last: float = 1.0) -> Gate:
    """One hidden unit, which weighs the features, and `last` times what is positive of it."""
    rows = np.array([weights], dtype=np.float32)
    ones, zeros = np.ones(len(FEATURES), np.float32), np.zeros(len(FEATURES), np.float32)
    hidden = rows, np.array([bias], np.float32)
    return Gate(zeros, ones, (hidden, (np.array([[last]], np.float32), np.zeros(1, np.float32))))


def saying(tokens: float) -> Gate:
    return gate_of(*[0.0] * len(FEATURES), bias=tokens)


def test_a_forecast_is_a_network_on_the_features_within_what_can_be_accepted() -> None:
    seen = features(DRAFT, 99)
    assert seen == pytest.approx(
        [np.log(4), np.log(2.5), 0.5, np.log(5), 0.8, 0.2, 1.0, np.log(100)]
    )
    weights = 0.1 * np.arange(8)
    wanted = float(weights @ seen) - 0.5
    assert gate_of(*weights, bias=-0.5, last=0.5).expected(DRAFT, 99) == pytest.approx(wanted / 2)
    assert gate_of(*weights, bias=-9.0).expected(DRAFT, 99) == 0.0  # the ReLU
    assert saying(50.0).expected(DRAFT, 99) == 3.0
    assert saying(50.0).expected(SuffixDraft(), 99) == 0.0
    shifted = Gate(np.full(8, 0.5, np.float32), np.full(8, 2.0, np.float32), saying(0.0).layers)
    assert shifted.expected(DRAFT, 99) == 0.0


def test_a_draft_knows_whether_its_own_request_gave_it() -> None:
    cache = SuffixDecodingCache(16)
    cache.add_output([1, 2, 3, 4, 5, 1, 2, 3])
    cache.start_request("a", [7, 8, 9, 7, 8])
    assert cache.speculate("a", [7, 8]).own
    assert not cache.speculate("a", [9, 1, 2]).own
    assert not cache.speculate("a", [55]).own
    cache = SuffixDecodingCache(8)
    cache.add_output([1, 2, 3, 1, 2])
    cache.start_request("b", [1, 2, 7, 1, 2])
    assert cache.speculate("b", [1, 2]).own  # among equals
    assert not cache.speculate("b", [1, 2], sources="past").own


def test_a_gate_on_disk(tmp_path) -> None:
    rng = np.random.default_rng(0)
    sizes = (8, 5, 5, 1)
    layers = tuple(
        (rng.normal(size=(b, a)).astype(np.float32), rng.normal(size=b).astype(np.float32))
        for a, b in itertools.pairwise(sizes)
    )
    gate = Gate(rng.random(8, np.float32), rng.random(8, np.float32) + 1, layers)
    save_gate(gate, tmp_path / "gate")
    opened = load_gate(tmp_path / "gate")
    for length in (10, 1000):
        assert opened.expected(DRAFT, length) == gate.expected(DRAFT, length)
    with pytest.raises(ValueError, match=r"nowhere holds no gate .*train_gate"):
        load_gate(tmp_path / "nowhere")
    config = json.loads((tmp_path / "gate" / CONFIG).read_text())
    (tmp_path / "gate" / CONFIG).write_text(json.dumps(config | {"features": ["log tokens"]}))
    with pytest.raises(ValueError, match=r"other features \(log tokens\)"):
        load_gate(tmp_path / "gate")
    save_gate(gate, tmp_path / "gate")
    weights = tmp_path / "gate" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ValueError, match="holds no gate"):
        load_gate(tmp_path / "gate")


def test_the_settings_name_a_folder(tiny, tmp_path) -> None:
    model = tiny("llama", vocab_size=11)
    target = Target(model, max_batch_size=1)
    save_gate(saying(2.5), tmp_path)
    drafter = HybridChains(gate=str(tmp_path)).build(model, target)
    assert drafter.gate.expected(DRAFT, 5) == 2.5
    missing = str(tmp_path / "none")
    with pytest.raises(ValueError, match=re.escape(missing)):
        HybridChains(gate=missing).build(model, target)


@pytest.mark.parametrize(("tokens", "drafts"), [(2.5, [0, 0, 0]), (1.5, [1, 1, 1])])
def test_a_threshold_is_on_what_the_gate_says(tokens: float, drafts: list[int]) -> None:
    suffix = Told()
    suffix.told = (3, 9.0 if tokens < 2 else 0.1)  # the score says the opposite
    drafter = HybridDrafter(
        suffix, Ones(), costs=COSTS, length=3, threshold=2.0, gate=saying(tokens)
    )
    drafter.begin(0, torch.tensor([9, 9]), {})
    assert played(drafter, 2, accepted=0) == drafts


def test_what_drafts_like_the_forecast_had_accepted_corrects_it() -> None:
    suffix = Told()
    suffix.told = (3, 2.9)
    drafter = HybridDrafter(suffix, Ones(), costs=COSTS, length=3, gate=saying(0.2))
    drafter.begin(0, torch.tensor([9, 9]), {})
    assert played(drafter, 2, accepted=3) == [
        1,
        1,
        1,
    ]  # a forecast of 0.2 is less than the model's first credit
    drafter = HybridDrafter(suffix, Ones(), costs=COSTS, length=3, gate=saying(2.9))
    drafter.begin(0, torch.tensor([9, 9]), {})
    drafts = [played(drafter, 2, accepted=0) for _ in range(200)]
    assert drafts[0] == [0, 0, 0]
    assert drafts[150:].count([0, 0, 0]) < 10
