"""What every drafter must do, and then what each does in its own way.

A new drafter gets the contract by being listed in `DRAFTERS`.
"""

import json
from collections.abc import Callable, Sequence

import pytest
import torch

from decode import (
    Acceptance,
    Context,
    Draft,
    Drafter,
    SamplingBatch,
    SamplingParams,
    Target,
    TreePlan,
)
from decode.drafters import (
    DistinctChildren,
    IndependentChildren,
    LikeliestChildren,
    LikeliestPaths,
    LMDrafter,
    LMTreeDrafter,
    NoDrafter,
    load_drafter,
)
from decode.models import trim
from decode.sampling import generator_for, warp

GREEDY = SamplingParams()
WARM = SamplingParams(temperature=0.8, top_k=40)
DRAFT_LENGTH = 4

Make = Callable[[Target], Drafter]


def context_of(
    texts: Sequence[list[int]],
    *,
    slots: Sequence[int] | None = None,
    room: int | Sequence[int] = 50,
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    names: Sequence[str] = "abcdefgh",
) -> Context:
    """The context of a step for these committed tokens."""
    size = len(texts)
    params = [params] * size if isinstance(params, SamplingParams) else params
    width = max(map(len, texts))
    return Context(
        slots=list(range(size) if slots is None else slots),
        tokens=torch.tensor([text + [0] * (width - len(text)) for text in texts]),
        roots=[text[-1] for text in texts],
        lengths=[len(text) for text in texts],
        room=[room] * size if isinstance(room, int) else list(room),
        hidden={},
        sampling=SamplingBatch.of(params, [generator_for(0, name) for name in names[:size]]),
    )


def begin(drafter: Drafter, texts: Sequence[list[int]], slots: Sequence[int] | None = None) -> None:
    for slot, text in zip(range(len(texts)) if slots is None else slots, texts, strict=True):
        drafter.begin(slot, torch.tensor(text), {})


def accept(draft: Draft, counts: Sequence[int], next_token: int) -> Acceptance:
    """The first `counts[b]` nodes on the way to the last of the deepest nodes of tree b."""
    paths, tried = [], []
    depths = draft.depths() * draft.valid
    for row, count in enumerate(counts):
        node = int((depths[row] == depths[row].max()).nonzero()[-1])
        path = [node]
        while path[0]:
            path.insert(0, int(draft.parents[row, path[0]]))
        paths.append(path[: count + 1])
        tried.append(min(len(paths[-1]), int(draft.num_nodes[row]) - 1))
    return Acceptance(paths, [next_token] * len(paths), tried)


def accepted_tokens(draft: Draft, acceptance: Acceptance) -> list[list[int]]:
    return [draft.tokens[row, path[1:]].tolist() for row, path in enumerate(acceptance.paths)]


def drafted(draft: Draft) -> list[list[int]]:
    return [row[1:count] for row, count in zip(draft.tokens.tolist(), draft.num_nodes, strict=True)]


def depth_of(draft: Draft) -> torch.Tensor:
    return (draft.depths() * draft.valid).amax(1)


def same(ours: Draft, theirs: Draft) -> None:
    assert drafted(ours) == drafted(theirs)
    assert torch.equal(ours.parents, theirs.parents)
    assert (ours.probs is None) == (theirs.probs is None)
    if ours.probs is not None:
        for row, count in enumerate(ours.num_nodes.tolist()):
            torch.testing.assert_close(
                ours.probs[row, : count - 1], theirs.probs[row, : count - 1], atol=1e-5, rtol=1e-3
            )


@pytest.fixture(scope="session")
def makers(tiny, perturbed) -> dict[str, Make]:
    model = tiny("llama")

    def lm(drafter_model) -> Make:
        return lambda target: LMDrafter(drafter_model, target=target, draft_length=DRAFT_LENGTH)

    def tree(drafter_model, shape) -> Make:
        return lambda target: LMTreeDrafter(drafter_model, target=target, shape=shape)

    near, paths = perturbed(model), LikeliestPaths(width=3, depth=4, size=9)
    half = trim(near, range(0, 97, 2))
    sparse = TreePlan((0, 0, 1, 1, 2, 4), (0, 1, 0, 2, 0, 0))
    return {
        "none": lambda target: NoDrafter(),
        "lm": lm(perturbed(model)),
        "lm, sliding window": lm(tiny("mistral", seed=2)),
        "lm, learnt positions": lm(tiny("gpt2", seed=2)),
        "lm, fewer tokens": lm(tiny("llama", seed=3, vocab_size=80)),
        "lm, more tokens": lm(tiny("llama", seed=3, vocab_size=120)),
        "lm, shorter context": lm(tiny("llama", seed=3, max_position_embeddings=12)),
        "lm, trimmed": lm(half),
        "likeliest paths, trimmed": tree(half, paths),
        "distinct children, trimmed": tree(half, DistinctChildren(TreePlan.expansion([3, 2, 2]))),
        "likeliest children": tree(near, LikeliestChildren(TreePlan.expansion([3, 2, 1]))),
        "likeliest children, sparse": tree(near, LikeliestChildren(sparse)),
        "likeliest children, chains": tree(near, LikeliestChildren(TreePlan.expansion([1] * 4))),
        "independent children": tree(near, IndependentChildren(TreePlan.expansion([2, 3, 1, 1]))),
        "independent children, sparse": tree(near, IndependentChildren(sparse)),
        "independent children, chains": tree(
            near, IndependentChildren(TreePlan.expansion([1, 1, 1]))
        ),
        "distinct children": tree(near, DistinctChildren(TreePlan.expansion([3, 2, 2]))),
        "likeliest paths": tree(near, paths),
        "likeliest paths, sliding window": tree(tiny("mistral", seed=2), paths),
        "likeliest paths, learnt positions": tree(tiny("gpt2", seed=2), paths),
        "likeliest paths, fewer tokens": tree(tiny("llama", seed=3, vocab_size=80), paths),
        "likeliest paths, shorter context": tree(
            tiny("llama", seed=3, max_position_embeddings=12), paths
        ),
        "independent children, sliding window": tree(
            tiny("mistral", seed=2), IndependentChildren(TreePlan.expansion([2, 2, 2]))
        ),
        "independent children, more tokens": tree(
            tiny("llama", seed=3, vocab_size=120), IndependentChildren(sparse)
        ),
        "distinct children, shorter context": tree(
            tiny("llama", seed=3, max_position_embeddings=12),
            DistinctChildren(TreePlan.expansion([3, 2, 2])),
        ),
    }


DRAFTERS = [
    "none",
    "lm",
    "lm, sliding window",
    "lm, learnt positions",
    "lm, fewer tokens",
    "lm, more tokens",
    "lm, shorter context",
    "lm, trimmed",
    "likeliest children",
    "likeliest children, sparse",
    "likeliest children, chains",
    "independent children",
    "independent children, sparse",
    "independent children, chains",
    "independent children, sliding window",
    "independent children, more tokens",
    "distinct children",
    "distinct children, shorter context",
    "likeliest paths",
    "likeliest paths, sliding window",
    "likeliest paths, learnt positions",
    "likeliest paths, fewer tokens",
    "likeliest paths, shorter context",
    "likeliest paths, trimmed",
    "distinct children, trimmed",
]


@pytest.fixture(params=DRAFTERS)
def make(request, makers, tiny) -> Callable[[], Drafter]:
    """A fresh drafter for a target of four slots, as often as asked."""
    return lambda: makers[request.param](Target(tiny("llama"), max_batch_size=4))


@pytest.fixture(params=[GREEDY, WARM], ids=["greedy", "warm"])
def params(request) -> SamplingParams:
    return request.param


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_it_says_which_states_it_reads(make):
    layers = make().hidden_layers
    assert isinstance(layers, tuple)
    assert all(isinstance(layer, int) for layer in layers)


def test_it_proposes_trees_below_the_roots(make, prompt, params):
    texts = [prompt(n) for n in (9, 1, 14)]
    drafter = make()
    begin(drafter, texts)
    draft = drafter.propose(context_of(texts, params=params))
    draft.validate()
    assert draft.tokens[:, 0].tolist() == [text[-1] for text in texts]
    assert draft.tokens.min() >= 0
    assert draft.tokens.max() < 97


def test_its_laws_are_laws(make, prompt):
    """Every row that children hang from sums to one over the target's vocabulary, and each child is
    possible under it. Greedy sequences draft with certainty, and claim no probabilities."""
    texts = [prompt(n) for n in (9, 1, 14)]
    drafter = make()
    begin(drafter, texts)
    draft = drafter.propose(context_of(texts, params=WARM))
    if draft.probs is not None:
        assert draft.probs.shape == (*draft.tokens.shape, 97)
        assert draft.probs.dtype == torch.float32
        for row, count in enumerate(draft.num_nodes.tolist()):
            for node in range(1, count):
                law = draft.probs[row, int(draft.parents[row, node])]
                assert float(law.sum()) == pytest.approx(1, abs=1e-5)
                assert law.min() >= 0
                assert law[draft.tokens[row, node]] > 0


def test_greedy_drafts_claim_no_probabilities(make, prompt):
    texts = [prompt(9)]
    drafter = make()
    begin(drafter, texts)
    assert drafter.propose(context_of(texts)).probs is None


@pytest.mark.parametrize("room", [0, 1, 2, [0, 3, 1], [2, 0, 50]])
def test_it_keeps_to_its_room(make, prompt, params, room):
    texts = [prompt(n) for n in (9, 1, 7)]
    drafter = make()
    begin(drafter, texts)
    draft = drafter.propose(context_of(texts, room=room, params=params))
    assert (depth_of(draft) <= torch.tensor(room)).all()


def test_a_draft_does_not_depend_on_the_neighbours(make, prompt, params):
    texts = [prompt(n) for n in (9, 1, 14, 5)]
    rooms = [50, 3, 1, 50]
    together = make()
    begin(together, texts)
    joint = together.propose(context_of(texts, room=rooms, params=params))
    for row, text in enumerate(texts):
        alone = make()
        begin(alone, [text])
        own = alone.propose(context_of([text], room=[rooms[row]], params=params, names="abcd"[row]))
        assert drafted(own)[0] == drafted(joint)[row]


@pytest.mark.parametrize("accepted", [[0, 0, 0], [1, 4, 2], [4, 0, 3], [4, 4, 4]])
def test_what_is_rejected_leaves_no_trace(make, prompt, params, accepted):
    """After each outcome the next draft is that of a drafter which has just read the text."""
    texts = [prompt(n) for n in (6, 1, 4)]
    drafter = make()
    begin(drafter, texts)
    for step in range(3):
        context = context_of(texts, params=params)
        draft = drafter.propose(context)
        counts = [
            min(n, deepest) for n, deepest in zip(accepted, depth_of(draft).tolist(), strict=True)
        ]
        acceptance = accept(draft, counts, 33 + step)
        drafter.observe(context, draft, acceptance, torch.zeros(0))
        texts = [
            [*text, *new, 33 + step]
            for text, new in zip(texts, accepted_tokens(draft, acceptance), strict=True)
        ]
    fresh = make()
    begin(fresh, texts)
    same(
        drafter.propose(context_of(texts, params=params)),
        fresh.propose(context_of(texts, params=params)),
    )


def test_sequences_come_and_go(make, prompt, params):
    first = [prompt(n) for n in (6, 11, 4)]
    drafter = make()
    begin(drafter, first)
    context = context_of(first, params=params)
    draft = drafter.propose(context)
    drafter.observe(context, draft, accept(draft, [0, 0, 0], 33), torch.zeros(0))
    drafter.end(1, [])
    second = [[*first[0], 33], prompt(3), [*first[2], 33]]
    drafter.begin(1, torch.tensor(second[1]), {})
    fresh = make()
    begin(fresh, second)
    same(
        drafter.propose(context_of(second, params=params)),
        fresh.propose(context_of(second, params=params)),
    )


def test_slots_need_not_be_neighbours(make, prompt, params):
    texts, slots = [prompt(6), prompt(2)], [0, 3]
    drafter, fresh = make(), make()
    begin(drafter, texts, slots)
    begin(fresh, texts)
    same(
        drafter.propose(context_of(texts, slots=slots, params=params)),
        fresh.propose(context_of(texts, params=params)),
    )


def test_a_sequence_may_rest_for_a_step(make, prompt, params):
    """The batch of a step need not hold every sequence that has begun."""
    texts = [prompt(6), prompt(2)]
    drafter, fresh = make(), make()
    begin(drafter, texts)
    drafter.propose(context_of(texts[:1], params=params))
    begin(fresh, texts)
    drafter.observe(
        context_of(texts[:1], params=params), Draft.chain(torch.tensor([[texts[0][-1]]])),
        accept(Draft.chain(torch.tensor([[texts[0][-1]]])), [0], 7), torch.zeros(0),
    )  # fmt: skip
    rested = drafter.propose(context_of(texts[1:], slots=[1], params=params, names="b"))
    same(rested, fresh.propose(context_of(texts[1:], slots=[1], params=params, names="b")))


def test_the_end_of_the_context_is_respected(make, prompt, params):
    texts = [prompt(95), prompt(90), prompt(3)]
    drafter = make()
    begin(drafter, texts)
    draft = drafter.propose(context_of(texts, room=[0, 5, 50], params=params))
    assert (depth_of(draft) <= torch.tensor([0, 5, 50])).all()


# The language model


@pytest.fixture
def lm(tiny, perturbed) -> LMDrafter:
    target = Target(tiny("llama"), max_batch_size=4)
    return LMDrafter(perturbed(tiny("llama")), target=target, draft_length=DRAFT_LENGTH)


def test_it_drafts_what_it_would_write(lm, tiny, perturbed, prompt, greedy):
    texts = [prompt(n) for n in (9, 1, 14)]
    begin(lm, texts)
    expected = [greedy(perturbed(tiny("llama")), text, DRAFT_LENGTH) for text in texts]
    assert drafted(lm.propose(context_of(texts))) == expected


def test_its_laws_are_the_models_own_warped_as_the_sequence_asks(lm, tiny, perturbed, prompt):
    texts = [prompt(n) for n in (9, 1, 14)]
    own = [SamplingParams(temperature=0.5, top_p=0.9), GREEDY, WARM]
    begin(lm, texts)
    draft = lm.propose(context_of(texts, params=own))
    for row, text in enumerate(texts):
        tokens = drafted(draft)[row]
        logits = perturbed(tiny("llama"))(torch.tensor([text + tokens])).logits[0]
        laws = warp(logits[len(text) - 1 : -1], own[row])
        torch.testing.assert_close(draft.probs[row, :-1], laws, atol=1e-5, rtol=1e-3)


def test_its_draws_follow_its_laws(tiny, perturbed, g_test):
    model = perturbed(tiny("llama"))
    target = Target(tiny("llama"), max_batch_size=500)
    drafter = LMDrafter(model, target=target, draft_length=1)
    texts = [[5]] * 500
    counts = torch.zeros(97)
    generators = [generator_for(0, str(row)) for row in range(500)]
    sampling = SamplingBatch.of([WARM] * 500, generators)
    for _ in range(8):
        begin(drafter, texts)
        context = context_of(texts, params=WARM, names=["x"] * 500)
        context = context._replace(sampling=sampling)
        draft = drafter.propose(context)
        counts += torch.bincount(draft.tokens[:, 1], minlength=97)
    law = draft.probs[0, 0].double()
    exact = {token: float(law[token] / law.sum()) for token in range(97)}
    assert g_test({t: int(n) for t, n in enumerate(counts) if n}, exact) > 1e-3


def test_ids_that_only_one_side_has_are_never_drafted(tiny, prompt):
    for vocab_size in (80, 120):
        target = Target(tiny("llama"), max_batch_size=4)
        model = tiny("llama", seed=3, vocab_size=vocab_size)
        drafter = LMDrafter(model, target=target, draft_length=DRAFT_LENGTH)
        texts = [prompt(n, 80) for n in (9, 1, 14)]
        begin(drafter, texts)
        draft = drafter.propose(context_of(texts, params=SamplingParams(temperature=2.0)))
        assert draft.tokens.max() < min(vocab_size, 97)
        assert not draft.probs[:, :-1, min(vocab_size, 97) :].any()


def test_settings_that_make_no_sense_are_refused(tiny, perturbed):
    model = tiny("llama")
    target = Target(model)
    with pytest.raises(ValueError, match=r"draft_length must be >= 1, got 0; or use NoDrafter"):
        LMDrafter(model, target=target, draft_length=0)
    elsewhere = type(model)(model.config).to("meta")
    with pytest.raises(ValueError, match="the drafter is on meta, the target on cpu"):
        LMDrafter(elsewhere, target=target)


# From a folder


@pytest.fixture
def folder(tmp_path, tiny, perturbed, tokenizer):
    perturbed(tiny("llama")).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("card", [None, {"family": "lm", "other": 1}])
def test_a_folder_becomes_its_drafter(folder, tiny, tokenizer, lm, prompt, card):
    if card:
        (folder / "draftsmith.json").write_text(json.dumps(card))
    target = Target(tiny("llama"), max_batch_size=4)
    loaded = load_drafter(folder, target=target, draft=DRAFT_LENGTH, tokenizer=tokenizer)
    texts = [prompt(9), prompt(3)]
    begin(loaded, texts)
    begin(lm, texts)
    assert drafted(loaded.propose(context_of(texts))) == drafted(lm.propose(context_of(texts)))


def test_another_tokenizer_is_refused_by_name(folder, tiny, tokenizer):
    theirs = json.loads((folder / "tokenizer.json").read_text())
    vocab = theirs["model"]["vocab"]
    vocab["da"], vocab["de"] = vocab["de"], vocab["da"]
    (folder / "tokenizer.json").write_text(json.dumps(theirs))
    target = Target(tiny("llama"))
    with pytest.raises(ValueError, match=r"2 tokens differ, for example 'da'") as error:
        load_drafter(folder, target=target, draft=4, tokenizer=tokenizer)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ('{"family": "eagle"}', "family 'eagle'; this version knows blockwise, hydra, lm, medusa"),
        ('{"famil', "is not a drafter's description"),
        ("{}", "is not a drafter's description"),
        ("[]", "is not a drafter's description"),
    ],
)
def test_a_card_that_says_nothing_is_refused(folder, tiny, card, message):
    (folder / "draftsmith.json").write_text(card)
    with pytest.raises(ValueError, match=message) as error:
        load_drafter(folder, target=Target(tiny("llama")), draft=4)
    assert str(folder) in str(error.value)


def test_a_folder_without_a_model_is_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match=f"cannot load a drafter from {tmp_path}"):
        load_drafter(tmp_path, target=Target(tiny("llama")), draft=4)


def test_a_half_written_model_is_refused(folder, tiny):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"cannot load a drafter from {folder}"):
        load_drafter(folder, target=Target(tiny("llama")), draft=4)
