"""Drafters that need no model, and the hybrid: exact, and they find what is there."""

from collections import Counter

import pytest
import torch

from decode import (
    Acceptance,
    Context,
    Draft,
    GenerationStats,
    Request,
    SamplingBatch,
    SamplingParams,
    SpeculativeDecoder,
    Target,
)
from decode.cost import StepCosts
from decode.drafters import (
    Chains,
    HybridChains,
    HybridDrafter,
    InputGuided,
    InputGuidedDrafter,
    MergedTrees,
    NGram,
    NGramDrafter,
    PromptLookup,
    PromptLookupDrafter,
    Rest,
    RestDrafter,
    SuffixDrafter,
    SuffixDrafts,
    TokenRecycling,
    TokenRecyclingDrafter,
)
from decode.planner import TreePlan
from decode.sampling import generator_for

COSTS = StepCosts(draft=0.1, verify=tuple(1 + 0.1 * k for k in range(17)))
SETTINGS = {
    "suffix": SuffixDrafts(min_prob=0.0, factor=2.0, offset=1.0),
    "suffix tree": SuffixDrafts(as_tree=True, min_prob=0.01, factor=4.0, max_tokens=12),
    "own": SuffixDrafts(sources="own", min_prob=0.0),
    "past": SuffixDrafts(sources="past", min_prob=0.0),
    "prompt lookup": PromptLookup(longest=2, length=4),
    "input guided": InputGuided(length=6),
    "ngram": NGram(length=3),
    "rest": Rest(longest=4, shortest=1, length=4, size=8),
    "token recycling": TokenRecycling(size=6, depth=3, width=3),
}


def context_of(texts: list[list[int]], room: int = 20) -> Context:
    width = max(map(len, texts))
    sampling = SamplingParams()
    return Context(
        slots=list(range(len(texts))),
        tokens=torch.tensor([text + [0] * (width - len(text)) for text in texts]),
        roots=[text[-1] for text in texts],
        lengths=[len(text) for text in texts],
        room=[room] * len(texts),
        hidden={},
        sampling=SamplingBatch.of(
            [sampling] * len(texts), [generator_for(0, str(row)) for row in range(len(texts))]
        ),
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_output_is_the_targets_own(tiny, greedy, name, batch):
    model = tiny("llama", vocab_size=11)
    target = Target(model, max_batch_size=batch)
    decoder = SpeculativeDecoder(target, SETTINGS[name].build(target))
    params = SamplingParams(max_new_tokens=40)
    texts = [[3, 1, 4, 1, 5], [3, 1], [2, 7, 1, 8], [3, 1, 4, 1, 5], [9], [3, 1]]
    written = [greedy(model, text, 40) for text in texts]
    corrected = [[*tokens[:7], 10 - tokens[7], *tokens[9:]] for tokens in written]
    requests = [
        Request(id=str(index), prompt=text, sampling=params, material=material)
        for index, (text, material) in enumerate(
            zip(texts, [*corrected[:3], [], [], []], strict=True)
        )
    ]
    results = decoder.generate(requests)
    assert [result.tokens for result in results] == written
    total = sum((result.stats for result in results), GenerationStats())
    assert total.num_accepted_tokens > 0


@pytest.mark.parametrize("batch", [1, 3])
def test_suffixes_and_a_model_in_one_tree(tiny, perturbed, greedy, batch):
    model = tiny("llama", vocab_size=11)
    target = Target(model, max_batch_size=batch)
    drafter = MergedTrees(budget=8).build(perturbed(model, 0.3), target)
    widest = []
    propose = drafter.propose

    def noted(context):
        draft = propose(context)
        widest.append(draft.tokens.shape[1] - 1)
        return draft

    drafter.propose = noted
    drafter.learn([3, 1, 4, 1, 5, 9])
    texts = [[3, 1, 4, 1, 5], [3, 1], [2, 7, 1, 8], [3, 1, 4, 1, 5]]
    params = SamplingParams(max_new_tokens=40)
    results = SpeculativeDecoder(target, drafter).generate(
        Request(id=str(index), prompt=text, sampling=params) for index, text in enumerate(texts)
    )
    for text, result in zip(texts, results, strict=True):
        assert result.tokens == greedy(model, text, 40)
    assert 4 < max(widest) <= 8
    suffix = drafter.drafters[0]
    assert suffix.cache.num_tokens == 6 + 4 * 40
    drafter.forget()
    assert suffix.cache.num_tokens == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threshold", [None, 0.5, 99.0])
def test_the_hybrids_greedy_output_is_the_targets_own(
    tiny, perturbed, greedy, kind, batch, threshold
):
    model = tiny(kind, vocab_size=11)
    target = Target(model, max_batch_size=batch)
    drafting = HybridChains(length=3, threshold=threshold, suffix=SuffixDrafts(as_tree=True))
    drafter = drafting.build(perturbed(model, 0.3), target)
    texts = [[3, 1, 4, 1, 5], [3, 1], [2, 7, 1, 8], [3, 1, 4, 1, 5], [9]]
    params = SamplingParams(max_new_tokens=40)
    results = SpeculativeDecoder(target, drafter).generate(
        Request(id=str(index), prompt=text, sampling=params) for index, text in enumerate(texts)
    )
    for text, result in zip(texts, results, strict=True):
        assert result.tokens == greedy(model, text, 40)


TINY = {
    "vocab_size": 4,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 24,
    "initializer_range": 0.35,
}


def law_of(model, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    """Every output by plain forwards."""
    law = {(): 1.0}
    for _ in range(length):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *output] for output in law])).logits[:, -1]
        probs = logits.double().softmax(-1).tolist()
        law = {
            (*output, token): chance * probs[row][token]
            for row, (output, chance) in enumerate(law.items())
            for token in range(4)
        }
    return law


@pytest.mark.parametrize(
    "name",
    [
        "suffix",
        "suffix tree",
        "prompt lookup",
        "input guided",
        "ngram",
        "rest",
        "token recycling",
        "hybrid",
    ],
)
def test_sampled_outputs_have_the_targets_law(g_test, tiny, perturbed, name):
    model = tiny("llama", **TINY)
    target = Target(model, max_batch_size=64)
    if name == "hybrid":
        other = Chains(length=2).build(perturbed(model, 0.5), target)
        suffix = SuffixDrafter(min_prob=0.0)
        drafter = HybridDrafter(suffix, other, costs=COSTS, length=2, threshold=0.6)
    else:
        drafter = SETTINGS[name].build(target)
    prompt = [0, 1, 2, 3, 0, 1, 2, 2, 0, 1]
    params = SamplingParams(temperature=1.0, max_new_tokens=3)
    decoder = SpeculativeDecoder(target, drafter)
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for result in decoder.stream(
        Request(id=str(index), prompt=prompt, sampling=params, seed=5) for index in range(8_000)
    ):
        counts[tuple(result.tokens)] += 1
        accepted += result.stats.num_accepted_tokens
    assert accepted > 1_000
    law = law_of(model, prompt, 3)
    assert g_test(counts, law) > 1e-3
    colder = {output: chance**1.15 for output, chance in law.items()}
    colder = {output: chance / sum(colder.values()) for output, chance in colder.items()}
    assert g_test(counts, colder) < 1e-6


def test_prompt_lookup_copies_behind_the_longest_and_latest_match():
    drafter = PromptLookupDrafter(longest=3, length=4)
    texts = [
        [1, 2, 3, 7, 8, 9, 5, 2, 3, 4, 1, 2, 3],  # three tokens before two, two before one
        [5, 1, 6, 1, 7, 1],  # the latest
        [4, 4, 4],
        [1, 2, 3],
        [9],
    ]
    draft = drafter.propose(context_of(texts))
    found = [
        row[1:count] for row, count in zip(draft.tokens.tolist(), draft.num_nodes, strict=True)
    ]
    assert found == [[7, 8, 9, 5], [7, 1], [4], [], []]
    assert drafter.propose(context_of(texts[:1], room=2)).tokens.tolist() == [[3, 7, 8]]
    with pytest.raises(ValueError, match="matches of 3 to 2"):
        PromptLookupDrafter(longest=2, shortest=3)


def test_token_recycling_drafts_what_was_likely_behind_each_token():
    plan = TreePlan(parents=(0, 0, 1, 1, 3), ranks=(0, 1, 0, 1, 0))
    drafter = TokenRecyclingDrafter(plan, vocab_size=6)
    context = context_of([[1]])
    assert drafter.propose(context).tokens.tolist() == [[1]]  # it has seen nothing
    logits = torch.zeros(1, 4, 6)
    logits[0, 0, [2, 3]] = torch.tensor([2.0, 1.0])  # behind 1
    logits[0, 1, [4, 5]] = torch.tensor([1.0, 2.0])  # behind 2
    logits[0, 2, [0, 1]] = torch.tensor([2.0, 1.0])  # behind 5, which was rejected
    logits[0, 3, 2] = 9.0  # padding
    seen = Draft(torch.tensor([[1, 2, 5, 3]]), torch.tensor([[-1, 0, 1, 2]]), torch.tensor([3]))
    outcome = Acceptance([[0, 1]], [0], [1])
    drafter.observe(context, seen, outcome, logits)
    draft = drafter.propose(context)
    assert draft.tokens.tolist() == [[1, 2, 3, 5, 4, 0]]
    assert draft.parents.tolist() == [[-1, 0, 0, 1, 1, 3]]
    assert drafter.propose(context_of([[1]], room=1)).tokens.tolist() == [[1, 2, 3]]
    assert drafter.propose(context_of([[3]])).tokens.tolist() == [[3]]
    drafter.forget()
    assert drafter.propose(context).tokens.tolist() == [[1]]


@pytest.mark.parametrize("name", ["prompt lookup", "input guided", "suffix", "hybrid", "merged"])
def test_outputs_are_copied_from_a_text_beside_the_prompt(tiny, perturbed, greedy, name):
    model = tiny("llama", vocab_size=97)
    target = Target(model, max_batch_size=2)
    settings = {
        "prompt lookup": PromptLookup(shortest=2),
        "input guided": InputGuided(),
        "suffix": SuffixDrafts(sources="own"),
        "hybrid": HybridChains(threshold=0.9, suffix=SuffixDrafts(sources="own")),
        "merged": MergedTrees(suffix=SuffixDrafts(sources="own")),
    }[name]
    is_alone = isinstance(settings, PromptLookup | InputGuided | SuffixDrafts)
    drafter = settings.build(*([target] if is_alone else [perturbed(model, 9.0), target]))
    texts = [[3, 1, 4], [2, 7, 1, 8]]
    written = [greedy(model, text, 24) for text in texts]
    params = SamplingParams(max_new_tokens=24)

    def steps(*materials: list[int]) -> list[int]:
        results = SpeculativeDecoder(target, drafter).generate(
            Request(id=str(index), prompt=text, sampling=params, material=material)
            for index, (text, material) in enumerate(zip(texts, materials, strict=True))
        )
        assert [result.tokens for result in results] == written
        return [result.stats.num_steps for result in results]

    without, one, both = steps([], []), steps([5, *written[0]], []), steps(*written)
    assert one[0] < without[0] - 5
    assert one[1] == without[1]
    assert both[1] < without[1] - 5
    assert steps([], []) == without  # nobody else's material is left


def drafted(drafter, text: list[int], room: int = 20) -> list[int]:
    return drafter.propose(context_of([text], room)).tokens[0, 1:].tolist()


def test_the_rest_of_the_input_is_drafted_where_the_output_has_one_place_in_it():
    drafter = InputGuidedDrafter(length=4)
    drafter.consult(0, [1, 2, 3, 4, 5, 2, 3, 6, 7])
    drafter.begin(0, torch.tensor([8, 9]), {})
    output = [8, 9]
    assert drafted(drafter, output) == [1, 2, 3, 4]
    assert drafted(drafter, output, room=2) == [1, 2]
    assert drafted(drafter, output := [*output, 1, 2, 3]) == [4, 5, 2, 3]  # 2 3 occurs twice
    assert drafted(drafter, output := [*output, 0]) == []  # written instead of 4
    assert drafted(drafter, output := [*output, 2, 3]) == []  # at two places of the input
    assert drafted(drafter, output := [*output, 6]) == [7]
    assert drafted(drafter, [*output, 4]) == [5, 2, 3, 6]
    drafter.end(0, [])
    drafter.begin(0, torch.tensor([8, 1, 2, 3, 1, 2, 4]), {})  # no material: the prompt
    assert drafted(drafter, [8, 1, 2, 3, 1, 2, 4]) == []
    assert drafted(drafter, [8, 1, 2, 3, 1, 2, 4, 1, 2]) == []
    assert drafted(drafter, [8, 1, 2, 3, 1, 2, 4, 1, 2, 3]) == [1, 2, 4]
    with pytest.raises(ValueError, match="-1 tokens"):
        InputGuidedDrafter(length=-1)


def test_the_commonest_next_token_is_drafted_behind_as_many_as_were_seen():
    drafter = NGramDrafter(order=3, length=4)
    drafter.learn([1, 2, 3, 4])
    drafter.learn([5, 2, 7, 4, 2, 7])
    assert drafted(drafter, [1, 2]) == [3, 4, 2, 7]
    assert drafted(drafter, [6, 2], room=2) == [7, 4]  # 6 2 was never seen, 2 7 more than 2 3
    assert drafted(drafter, [6]) == []
    bigrams = NGramDrafter(order=2)
    bigrams.end(0, [1, 2, 3, 2, 4, 2, 4])
    assert drafted(bigrams, [9, 1]) == [2, 4, 2, 4]
    bigrams.forget()
    assert drafted(bigrams, [9, 1]) == []
    with pytest.raises(ValueError, match="an order of 1"):
        NGramDrafter(order=1)


def test_rest_drafts_the_most_frequent_beginnings_behind_the_longest_match():
    drafter = RestDrafter(longest=3, shortest=2, length=3, size=4)
    for text in ([1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 8], [2, 3, 9], [2, 3, 9], [1, 2, 3]):
        drafter.learn(text)
    draft = drafter.propose(context_of([[7, 1, 2, 3], [7, 2, 3], [5, 3]]))
    # Behind 1 2 3 there is 4 twice, then 5 6 or 8, each once, and no fourth token.
    rows = [
        list(zip(tokens[1:count], parents[1:count], strict=True))
        for tokens, parents, count in zip(
            draft.tokens.tolist(), draft.parents.tolist(), draft.num_nodes.tolist(), strict=True
        )
    ]
    assert rows[0][0] == (4, 0)
    assert {token for token, _ in rows[0]} == {4, 5, 6, 8}
    assert sorted(rows[1])[-1] == (9, 0)
    assert rows[2] == []  # 5 3 is nowhere, and one token is no match
    assert drafter.propose(context_of([[7, 1, 2, 3]], room=1)).tokens.tolist() == [[3, 4]]
    drafter.end(0, [5, 3, 2])
    assert drafter.propose(context_of([[5, 3]])).tokens.tolist() == [[3, 2]]
    drafter.forget()
    assert drafter.propose(context_of([[5, 3]])).tokens.tolist() == [[3]]
    with pytest.raises(ValueError, match="matches of 3 to 2"):
        RestDrafter(longest=2, shortest=3)


def test_suffixes_are_learnt_from_outputs_and_forgotten():
    drafter = SuffixDrafter()
    drafter.learn([1, 2, 3, 4, 5, 6])
    drafter.begin(0, torch.tensor([9, 2, 3]), {})
    draft = drafter.propose(context_of([[9, 2, 3, 4]]))
    assert draft.tokens.tolist() == [[4, 5, 6]]
    drafter.end(0, [4])
    drafter.forget()
    drafter.begin(0, torch.tensor([9, 2, 3]), {})
    assert drafter.propose(context_of([[9, 2, 3, 4]])).tokens.tolist() == [[4]]


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_finished_output_is_kept_whole(tiny, greedy, ignore_eos):
    model = tiny(
        "llama", vocab_size=11, eos_token_id=greedy(tiny("llama", vocab_size=11), [3, 1], 9)[8]
    )
    drafter = SuffixDrafter(min_prob=0.0)
    decoder = SpeculativeDecoder(Target(model, max_batch_size=1), drafter)
    params = SamplingParams(max_new_tokens=30, ignore_eos=ignore_eos)
    (result,) = decoder.generate([Request(id="a", prompt=[3, 1], sampling=params)])
    assert drafter.cache.num_tokens == len(result.tokens)
    drafter.begin(0, torch.tensor(result.tokens[:5]), {})
    (found,) = drafter.propose(context_of([result.tokens[:6]])).tokens.tolist()
    assert found == result.tokens[5 : 5 + len(found)]
