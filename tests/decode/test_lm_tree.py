"""Trees drafted by a language model: against recomputation without a cache, against transformers'
own output, and as a distribution. What every drafter must do is in test_drafters.py."""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from decode import (
    Acceptance,
    AcceptanceRule,
    CachedModel,
    Context,
    Draft,
    GenerationStats,
    Request,
    SamplingBatch,
    SamplingParams,
    SpeculativeDecoder,
    Target,
    TreePlan,
)
from decode.acceptance import Greedy, RecursiveRejection, SpeculativeSampling
from decode.drafters import (
    DistinctChildren,
    IndependentChildren,
    LikeliestChildren,
    LikeliestPaths,
    LMTreeDrafter,
)
from decode.drafters.growing import TreeShape
from decode.drafters.planned_trees import distinct
from decode.sampling import generator_for, warp

GREEDY = SamplingParams()
WARM = SamplingParams(temperature=0.8, top_k=40)
NARROW = SamplingParams(temperature=1.5, top_k=2)
PASSES, FAILS = 1e-3, 1e-9

SPARSE = TreePlan((0, 0, 1, 1, 2, 4), (0, 1, 0, 2, 0, 0))  # leaves on every level, and a gap
BUSHY = TreePlan((0, 0, 0, 1, 1, 2, 4, 4, 7), (0, 1, 2, 0, 1, 0, 0, 1, 0))
PLANS = {
    "expansion": TreePlan.expansion([3, 2, 1]),
    "sparse": SPARSE,
    "bushy": BUSHY,
    "chain": TreePlan.expansion([1, 1, 1]),
    "wide": TreePlan.expansion([8]),
}
SHAPES: dict[str, TreeShape] = {
    "likeliest children": LikeliestChildren(TreePlan.expansion([3, 2, 1])),
    "likeliest children, sparse": LikeliestChildren(SPARSE),
    "likeliest children, one level": LikeliestChildren(TreePlan.expansion([4])),
    "independent children": IndependentChildren(BUSHY),
    "distinct children": DistinctChildren(TreePlan.expansion([2, 2, 1])),
    "likeliest paths": LikeliestPaths(width=3, depth=4, size=10),
    "likeliest paths, one wide": LikeliestPaths(width=1, depth=3, size=2),
}


def context_of(
    texts: Sequence[list[int]],
    params: Sequence[SamplingParams] | SamplingParams = GREEDY,
    room: Sequence[int] | int = 50,
) -> Context:
    size, width = len(texts), max(map(len, texts))
    params = [params] * size if isinstance(params, SamplingParams) else params
    return Context(
        slots=list(range(size)),
        tokens=torch.tensor([text + [0] * (width - len(text)) for text in texts]),
        roots=[text[-1] for text in texts],
        lengths=[len(text) for text in texts],
        room=[room] * size if isinstance(room, int) else list(room),
        hidden={},
        sampling=SamplingBatch.of(params, [generator_for(0, str(row)) for row in range(size)]),
    )


def proposed(
    drafter: LMTreeDrafter, texts: Sequence[list[int]], context: Context | None = None
) -> Draft:
    for slot, text in enumerate(texts):
        drafter.begin(slot, torch.tensor(text), {})
    return drafter.propose(context or context_of(texts))


def nodes_of(draft: Draft, row: int) -> list[tuple[int, ...]]:
    """Each drafted node as the tokens on the way to it."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, int(draft.num_nodes[row])):
        paths.append((*paths[int(draft.parents[row, node])], int(draft.tokens[row, node])))
    return paths[1:]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


# Against recomputation: every law by a plain forward over the whole text


class FromScratch:
    """The same trees, node by node, without a cache and without batches."""

    def __init__(self, model: PreTrainedModel, text: list[int], num_tokens: int):
        self.model, self.text, self.num_tokens = model, text, num_tokens

    def logits(self, path: tuple[int, ...]) -> Tensor:
        """[V] behind `path`, over the target's vocabulary."""
        size = self.model.config.vocab_size
        readable = [min(token, size - 1) for token in (*self.text, *path)]
        own = self.model(torch.tensor([readable])).logits[0, -1]
        logits = torch.full((self.num_tokens,), -torch.inf)
        shared = min(size, self.num_tokens)
        logits[:shared] = own[:shared]
        return logits

    def likeliest(self, plan: TreePlan, depth: int) -> list[tuple[int, ...]]:
        paths: list[tuple[int, ...]] = [()]
        for parent, rank, at in zip(plan.parents, plan.ranks, plan.depths, strict=True):
            if at <= depth:
                ranking = self.logits(paths[parent]).argsort(descending=True)
                paths.append((*paths[parent], int(ranking[rank])))
        return paths[1:]

    def drawn(
        self, plan: TreePlan, depth: int, params: SamplingParams, name: str, *, again: bool
    ) -> list[tuple[int, ...]]:
        """Children in the order of their ranks; with `again` a token may be drawn again."""
        count = sum(at <= depth for at in plan.depths)
        uniforms = torch.rand(count, generator=generator_for(0, name)).tolist()
        paths: dict[int, tuple[int, ...]] = {0: ()}
        siblings: dict[int, list[int]] = {}
        for node, (parent, uniform) in enumerate(
            zip(plan.parents[:count], uniforms, strict=True), 1
        ):
            if parent not in paths:
                continue
            law = warp(self.logits(paths[parent]), params).double()
            if not again:
                law[siblings.get(parent, [])] = 0
            if law.sum() == 0:
                continue
            token = int((law.cumsum(0) <= uniform * law.sum()).sum())
            siblings.setdefault(parent, []).append(token)
            paths[node] = (*paths[parent], token)
        return [path for node, path in paths.items() if node]

    def paths(
        self, shape: LikeliestPaths, depth: int, params: SamplingParams
    ) -> set[tuple[int, ...]]:
        value: dict[tuple[int, ...], float] = {}
        level: dict[tuple[int, ...], float] = {(): 0.0}
        for _ in range(depth):
            best = sorted(level, key=lambda path: -level[path])[: shape.width]
            below: dict[tuple[int, ...], float] = {}
            for path in best:
                own = params if params.temperature else SamplingParams(temperature=1.0)
                chances = warp(self.logits(path), own).log()
                for token in chances.argsort(descending=True)[: shape.width].tolist():
                    if chances[token] > -torch.inf:
                        below[(*path, token)] = level[path] + float(chances[token])
            value |= below
            level = below
        return set(sorted(value, key=lambda path: -value[path])[: shape.size])


@pytest.fixture(scope="session")
def models(tiny, perturbed) -> dict[str, PreTrainedModel]:
    return {
        "llama": perturbed(tiny("llama")),
        "gpt2": perturbed(tiny("gpt2")),
        "mistral": perturbed(tiny("mistral")),
        "fewer tokens": tiny("llama", seed=3, vocab_size=80),
        "more tokens": tiny("llama", seed=3, vocab_size=120),
    }


MODELS = ["llama", "gpt2", "mistral", "fewer tokens", "more tokens"]
DEPTHS = [50, 2, 0, 1]  # room of each sequence


@pytest.fixture
def setting(tiny, prompt, models) -> Callable[..., tuple[LMTreeDrafter, list[list[int]]]]:
    """A drafter of this model and shape, and four texts."""

    def make(name: str, shape: TreeShape) -> tuple[LMTreeDrafter, list[list[int]]]:
        target = Target(tiny("llama"), max_batch_size=4)
        drafter = LMTreeDrafter(models[name], target=target, shape=shape)
        return drafter, [prompt(length) for length in (9, 1, 14, 30)]

    return make


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "warm"])
def test_the_likeliest_children_are_those_of_a_recomputation(setting, models, name, plan, params):
    drafter, texts = setting(name, LikeliestChildren(plan))
    draft = proposed(drafter, texts, context_of(texts, params, DEPTHS))
    assert draft.probs is None
    assert draft.is_chain == plan.is_chain
    for row, text in enumerate(texts):
        scratch = FromScratch(models[name], text, 97)
        assert nodes_of(draft, row) == scratch.likeliest(plan, DEPTHS[row])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [IndependentChildren, DistinctChildren])
@pytest.mark.parametrize("plan", ["expansion", "bushy", "chain", "wide"])
@pytest.mark.parametrize("params", [WARM, NARROW], ids=["warm", "narrow"])
def test_drawn_children_and_their_laws_are_those_of_a_recomputation(
    setting, models, name, plan, kind, params
):
    drafter, texts = setting(name, kind(PLANS[plan]))
    draft = proposed(drafter, texts, context_of(texts, params, DEPTHS))
    draft.validate()
    for row, text in enumerate(texts):
        scratch = FromScratch(models[name], text, 97)
        again = kind is IndependentChildren
        paths = scratch.drawn(PLANS[plan], DEPTHS[row], params, str(row), again=again)
        assert nodes_of(draft, row) == paths
        for node, path in enumerate([(), *paths]):
            if node in draft.parents[row, 1 : len(paths) + 1]:
                law = warp(scratch.logits(path), params)
                torch.testing.assert_close(draft.probs[row, node], law, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "shape",
    [
        LikeliestPaths(width=4, depth=3, size=12),
        LikeliestPaths(width=2, depth=5, size=7),
        LikeliestPaths(width=3, depth=2, size=50),
        LikeliestPaths(width=5, depth=1, size=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("params", [GREEDY, WARM, NARROW], ids=["greedy", "warm", "narrow"])
def test_the_likeliest_paths_are_those_of_a_recomputation(setting, models, name, shape, params):
    drafter, texts = setting(name, shape)
    draft = proposed(drafter, texts, context_of(texts, params, DEPTHS))
    draft.validate()
    assert draft.probs is None
    for row, text in enumerate(texts):
        found = nodes_of(draft, row)
        assert len(set(found)) == len(found)
        depth = min(shape.depth, DEPTHS[row])
        assert set(found) == FromScratch(models[name], text, 97).paths(shape, depth, params)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_sequences_among_sampled_ones_draft_as_they_do_alone(setting, shape):
    drafter, texts = setting("llama", shape)
    mixed = [GREEDY, WARM, WARM, GREEDY]
    together = proposed(drafter, texts, context_of(texts, mixed))
    greedy = proposed(drafter, texts, context_of(texts))
    warm = proposed(drafter, texts, context_of(texts, WARM))
    for row, params in enumerate(mixed):
        assert nodes_of(together, row) == nodes_of(warm if params is WARM else greedy, row)


# What is read, and what is kept of it


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_tree_read_in_parts_is_read_as_a_whole(tiny, prompt, architecture, batch):
    model = tiny(architecture)
    texts = [prompt(length) for length in (21, 4, 13)][:batch]
    cached = CachedModel(model, num_slots=4)
    slots = [0, 2, 3][:batch]
    for slot, text in zip(slots, texts, strict=True):
        cached.forward([slot], torch.tensor([text]))
        cached.cache.commit([slot], [len(text)])
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11]]) + torch.arange(batch)[:, None]
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 5]]).expand(batch, -1)
    whole = Draft(tokens, parents, torch.full((batch,), 7))
    expected = cached.forward(slots, tokens, tree=whole).logits
    for cuts in ([1, 3, 6], [2], [1, 2, 3, 4, 5, 6]):
        parts = []
        for begin, end in itertools.pairwise([0, *cuts, 7]):
            tree = Draft(tokens[:, :end], parents[:, :end], torch.full((batch,), end))
            part = cached.forward(slots, tokens[:, begin:end], tree=tree, num_read=begin)
            parts.append(part.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)
    cached.cache.check_integrity()


def test_no_token_is_read_twice_and_read_ones_are_kept(setting):
    """Three levels, of which two are read; then a path to a leaf is accepted."""
    drafter, texts = setting("llama", LikeliestChildren(TreePlan.expansion([2, 2, 2])))
    texts = texts[:2]
    widths: list[int] = []
    forward = drafter.reader.cached.forward

    def noted(slots, tokens, **rest):
        if "keep" not in rest:  # of a prompt no logits are kept
            widths.append(tokens.shape[1])
        return forward(slots, tokens, **rest)

    drafter.reader.cached.forward = noted
    draft = proposed(drafter, texts)
    assert widths == [1, 2, 4]  # the root, and the nodes that have children
    assert draft.tokens.shape[1] == 15
    to_leaf = [0, 2, 5, 11]
    acceptance = Acceptance([to_leaf, [0, 1]], [9, 9], [3, 1])
    drafter.observe(context_of(texts), draft, acceptance, torch.zeros(0))
    # Text, root included, and the nodes read: all but the leaf.
    assert drafter.reader.cache.lengths[:2] == [len(texts[0]) + 2, len(texts[1]) + 1]
    longer = [
        [*texts[0], *draft.tokens[0, [2, 5, 11]].tolist(), 9],
        [*texts[1], int(draft.tokens[1, 1]), 9],
    ]
    widths.clear()
    again = drafter.propose(context_of(longer))
    assert widths == [2, 2, 4]  # the leaf and the new root
    fresh, _ = setting("llama", drafter.shape)
    assert [nodes_of(again, row) for row in (0, 1)] == [
        nodes_of(proposed(fresh, longer), row) for row in (0, 1)
    ]
    drafter.reader.cache.check_integrity()


# Through the decoder


def rule_for(shape: TreeShape) -> AcceptanceRule:
    return RecursiveRejection() if isinstance(shape, DistinctChildren) else SpeculativeSampling()


def requests(prompts: Sequence[list[int]], counts: Sequence[int], **params: object):
    return [
        Request(id=f"r{row}", prompt=prompt, sampling=SamplingParams(max_new_tokens=n, **params))
        for row, (prompt, n) in enumerate(zip(prompts, counts, strict=True))
    ]


LENGTHS = [1, 5, 17, 2, 30, 9, 11]
NEW_TOKENS = [24, 9, 24, 17, 24, 1, 12]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", [Greedy(), SpeculativeSampling()], ids=["greedy", "sampling"])
def test_the_output_is_that_of_generate(
    tiny, perturbed, prompt, greedy, architecture, batch, shape, rule
):
    model = tiny(architecture)
    prompts = [prompt(length) for length in LENGTHS]
    target = Target(model, max_batch_size=batch)
    drafter = LMTreeDrafter(perturbed(model), target=target, shape=shape)
    results = SpeculativeDecoder(target, drafter, rule).generate(requests(prompts, NEW_TOKENS))
    for text, count, result in zip(prompts, NEW_TOKENS, results, strict=True):
        assert result.tokens == greedy(model, text, count)
    tau = sum((r.stats for r in results), GenerationStats()).block_efficiency
    assert 1.2 < tau < shape.depth + 0.98
    target.cached.cache.check_integrity()
    drafter.reader.cache.check_integrity()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_output_is_the_requests_own(tiny, perturbed, prompt, shape, temperature):
    """It depends neither on the batch size nor on who shares the batch, greedy and sampled."""
    model = tiny("llama")
    prompts = [prompt(length) for length in (4, 19, 1, 8)]
    mine = requests(prompts, [24, 11, 24, 17], temperature=temperature)
    others = requests(prompts, [9, 30, 12, 20], temperature=0.8 - temperature)
    others = [
        Request(id=f"other {r.id}", prompt=r.prompt, sampling=r.sampling, seed=5) for r in others
    ]
    outputs = []
    for batch, batched in [(1, mine), (3, mine), (5, [*mine, *others]), (4, [*others, *mine])]:
        target = Target(model, max_batch_size=batch)
        drafter = LMTreeDrafter(perturbed(model), target=target, shape=shape)
        results = SpeculativeDecoder(target, drafter, rule_for(shape)).generate(batched)
        own = {r.request_id: (r.tokens, r.steps) for r in results}
        outputs.append([own[request.id] for request in mine])
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("batch", [1, 4])
def test_the_end_of_the_context_is_reached(tiny, perturbed, prompt, greedy, shape, batch):
    """Near it a tree has more nodes than there are positions left."""
    model = tiny("llama")
    prompts = [prompt(length) for length in (90, 93, 95, 84)]
    target = Target(model, max_batch_size=batch)
    drafter = LMTreeDrafter(perturbed(model), target=target, shape=shape)
    results = SpeculativeDecoder(target, drafter).generate(requests(prompts, [50] * 4))
    for text, result in zip(prompts, results, strict=True):
        assert result.tokens == greedy(model, text, 96 - len(text))
    target.cached.cache.check_integrity()
    drafter.reader.cache.check_integrity()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "changes",
    [{"max_position_embeddings": 12}, {"vocab_size": 80}, {"vocab_size": 120}],
    ids=["shorter context", "fewer tokens", "more tokens"],
)
def test_another_drafter_keeps_the_output(tiny, prompt, greedy, shape, changes):
    model = tiny("llama")
    prompts = [prompt(length) for length in (3, 9, 20)]
    target = Target(model, max_batch_size=2)
    drafter = LMTreeDrafter(tiny("llama", seed=3, **changes), target=target, shape=shape)
    results = SpeculativeDecoder(target, drafter).generate(requests(prompts, [20, 20, 20]))
    for text, result in zip(prompts, results, strict=True):
        assert result.tokens == greedy(model, text, 20)
    drafter.reader.cache.check_integrity()
    if "max_position_embeddings" in changes:  # what is behind its context is decoded without it
        assert not any(step.num_drafted for step in results[2].steps)
        assert any(step.num_drafted for step in results[0].steps)


# As a distribution

V, EOS, LENGTH = 5, 4, 4
TINY = {
    "vocab_size": V,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
    "initializer_range": 0.35,
    "eos_token_id": EOS,
}


def enumerated(model, params: SamplingParams, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Every output of up to four tokens, EOS ending it early, by plain forwards."""
    law: dict[tuple[int, ...], float] = {}
    growing: dict[tuple[int, ...], float] = {(): 1.0}
    while growing:
        output, chance = growing.popitem()
        probs = warp(model(torch.tensor([[*prompt, *output]])).logits[0, -1], params).tolist()
        for token, probability in enumerate(probs):
            longer = (*output, token)
            is_over = token == EOS or len(longer) == LENGTH
            if probability > 0:
                (law if is_over else growing)[longer] = chance * probability
    return law


def decoded(
    model, drafter_model, shape: TreeShape, params: SamplingParams, prompt: list[int], count: int
) -> Counter[tuple[int, ...]]:
    target = Target(model, max_batch_size=512)
    drafter = LMTreeDrafter(drafter_model, target=target, shape=shape)
    decoder = SpeculativeDecoder(target, drafter, rule_for(shape))
    several = (Request(id=str(n), prompt=prompt, sampling=params, seed=11) for n in range(count))
    return Counter(tuple(result.tokens) for result in decoder.stream(several))


LOSSLESS: dict[str, TreeShape] = {
    "independent children": IndependentChildren(TreePlan.expansion([2, 2])),
    "independent children, sparse": IndependentChildren(TreePlan((0, 0, 0, 2), (0, 1, 3, 0))),
    "likeliest children": LikeliestChildren(TreePlan.expansion([2, 2])),
    "likeliest paths": LikeliestPaths(width=2, depth=2, size=4),
    "distinct children": DistinctChildren(TreePlan.expansion([3, 2])),
}


def check_losslessness(g_test, tiny, perturbed, shape, count, **sampling) -> None:
    model = tiny("llama", **TINY)
    params = SamplingParams(**({"temperature": 1.0} | sampling), max_new_tokens=LENGTH)
    counts = decoded(model, perturbed(model, 0.5), shape, params, [1, 3], count)
    assert g_test(counts, enumerated(model, params, [1, 3])) > PASSES
    # These are not the counts of a slightly warmer target: the test can tell.
    warmer = SamplingParams(temperature=1.3 * params.temperature)
    assert g_test(counts, enumerated(model, warmer, [1, 3])) < FAILS


@pytest.mark.parametrize("shape", LOSSLESS.values(), ids=LOSSLESS)
def test_the_decoder_is_lossless(g_test, tiny, perturbed, shape):
    check_losslessness(g_test, tiny, perturbed, shape, 6_000)


@pytest.mark.parametrize("sampling", [{"temperature": 1.3, "top_k": 3}, {"top_p": 0.8}], ids=str)
def test_the_decoder_is_lossless_where_tokens_are_ruled_out(g_test, tiny, perturbed, sampling):
    shape = LOSSLESS["independent children"]
    check_losslessness(g_test, tiny, perturbed, shape, 6_000, **sampling)


@pytest.mark.slow
@pytest.mark.parametrize("shape", LOSSLESS.values(), ids=LOSSLESS)
def test_the_decoder_is_lossless_at_length(g_test, tiny, perturbed, shape):
    check_losslessness(g_test, tiny, perturbed, shape, 100_000)


def test_distinct_children_follow_the_law_of_drawing_without_replacement(g_test):
    law = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    exact = {
        (a, b, c): float(law[a] * law[b] / (1 - law[a]) * law[c] / (1 - law[a] - law[b]))
        for a, b, c in itertools.permutations(range(4), 3)
    }
    uniforms = torch.rand(1, 100_000, 3, generator=torch.Generator().manual_seed(0))
    tokens, is_possible = distinct(law.expand(1, 100_000, 5), uniforms)
    assert is_possible.all()
    assert g_test(Counter(map(tuple, tokens[0].tolist())), exact) > PASSES
    _, is_possible = distinct(law.expand(1, 1, 5), torch.rand(1, 1, 5))
    assert is_possible[0, 0].tolist() == [True] * 4 + [False]


# Settings


def test_settings_that_make_no_sense_are_refused(tiny):
    target = Target(tiny("llama"))
    model = tiny("llama", seed=3, vocab_size=80)
    for shape in (LikeliestChildren(TreePlan.expansion([81])), LikeliestPaths(width=81)):
        with pytest.raises(ValueError, match=r"cannot have 81 children: .* share 80 tokens"):
            LMTreeDrafter(model, target=target, shape=shape)
    with pytest.raises(ValueError, match="no node below its root; or use NoDrafter"):
        IndependentChildren(TreePlan((), ()))
    with pytest.raises(ValueError, match=r"need ranks 0, 1, .. without gaps"):
        DistinctChildren(SPARSE)
    with pytest.raises(ValueError, match="width, depth and size must be >= 1, got 3, 0, 5"):
        LikeliestPaths(width=3, depth=0, size=5)
    elsewhere = copy.deepcopy(tiny("llama")).to("meta")
    with pytest.raises(ValueError, match="the drafter is on meta, the target on cpu"):
        LMTreeDrafter(elsewhere, target=target, shape=LikeliestPaths())
