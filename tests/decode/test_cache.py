"""The slot cache: whatever is kept, dropped or handed on, the next forward gives the logits that a
plain forward over the whole sequence gives."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from decode import Acceptance, CachedModel, Draft, Target
from decode import target as target_module

ARCHITECTURES = ["llama", "gpt2", "gemma2", "mistral"]
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
PROMPTS = [[5, 17, 3, 44, 60, 2, 9, 31, 77, 12, 50], [8], [23, 90, 41, 1, 66]]
SLOTS = [0, 1, 2]


@torch.no_grad()
def plain(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """[T, V] logits of one sequence, without any cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def prefilled(model: PreTrainedModel, slots=SLOTS, prompts=PROMPTS, num_slots=4) -> Target:
    target = Target(model, max_batch_size=num_slots)
    with torch.no_grad():
        target.prefill(slots, [torch.tensor(prompt) for prompt in prompts])
    return target


@torch.no_grad()
def verified(target: Target, slots: list[int], draft: Draft) -> Tensor:
    return target.verify(slots, draft).logits


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)


def chain_below(prompts, tails) -> Draft:
    return Draft.from_lists([prompt[-1] for prompt in prompts], tails)


def keep(*paths: list[int]) -> Acceptance:
    """The rule's word: these nodes, root first."""
    return Acceptance(list(paths), [0] * len(paths), [len(path) - 1 for path in paths])


# Every sequence gets the same tree:  root - 40 - 42 - 43
#                                         \ 41 - 44
NODES, PARENTS = [40, 41, 42, 43, 44], [0, 0, 1, 3, 2]
BRANCHES = {0: [], 1: [40], 2: [41], 3: [40, 42], 4: [40, 42, 43], 5: [41, 44]}


def trees_below(prompts) -> Draft:
    roots = [prompt[-1] for prompt in prompts]
    return Draft.from_lists(roots, [NODES] * len(prompts), [PARENTS] * len(prompts))


@EVERY
def test_the_prompts_forward_gives_the_logits_behind_each_root(tiny, architecture):
    model = tiny(architecture)
    target = Target(model, max_batch_size=3)
    with torch.no_grad():
        output, _ = target.prefill(SLOTS, [torch.tensor(prompt) for prompt in PROMPTS])
    for row, prompt in enumerate(PROMPTS):
        close(output.logits[row, 0], plain(model, prompt)[-1])
    assert target.cached.cache.lengths == [len(prompt) - 1 for prompt in PROMPTS]


@EVERY
@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_a_prompt_read_in_chunks_is_the_prompt(tiny, architecture, chunk, monkeypatch):
    # 11, 1 and 5 tokens: chunks of 5 end at a prompt's end, chunks of 4 one token before it.
    monkeypatch.setattr(target_module, "PREFILL_CHUNK", chunk)
    model = tiny(architecture)
    target = Target(model, max_batch_size=3)
    with torch.no_grad():
        prompts = [torch.tensor(prompt) for prompt in PROMPTS]
        output, hidden = target.prefill(SLOTS, prompts, (1,))
        states = [model(p[None], output_hidden_states=True).hidden_states[1][0] for p in prompts]
    for row, prompt in enumerate(PROMPTS):
        close(output.logits[row, 0], plain(model, prompt)[-1])
        close(hidden[row][1], states[row][:-1])
        close(output.hidden[1][row], states[row][-1:])
    logits = verified(target, SLOTS, chain_below(PROMPTS, [[40, 41]] * 3))
    for row, prompt in enumerate(PROMPTS):
        close(logits[row], plain(model, [*prompt, 40, 41])[-3:])


@EVERY
def test_ragged_chains_see_their_own_sequence(tiny, architecture):
    model = tiny(architecture)
    tails = [[40, 41], [42, 43, 44, 45], []]
    logits = verified(prefilled(model), SLOTS, chain_below(PROMPTS, tails))
    for row, (prompt, tail) in enumerate(zip(PROMPTS, tails, strict=True)):
        close(logits[row, : len(tail) + 1], plain(model, prompt + tail)[len(prompt) - 1 :])


@EVERY
def test_every_branch_of_a_tree_is_a_sequence_of_its_own(tiny, architecture):
    model = tiny(architecture)
    logits = verified(prefilled(model), SLOTS, trees_below(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        for node, branch in BRANCHES.items():
            close(logits[row, node], plain(model, prompt + branch)[-1])


@EVERY
def test_what_a_chain_commits_is_as_if_it_had_been_read(tiny, architecture):
    model = tiny(architecture)
    target = prefilled(model)
    drafted = [[40, 41, 42]] * 3
    draft = chain_below(PROMPTS, drafted)
    verified(target, SLOTS, draft)
    target.commit(SLOTS, draft, keep([0, 1, 2, 3], [0], [0, 1]))
    texts = [[*PROMPTS[0], 40, 41, 42, 7], [*PROMPTS[1], 7], [*PROMPTS[2], 40, 7]]
    logits = verified(target, SLOTS, chain_below(texts, [[50, 51]] * 3))
    for row, text in enumerate(texts):
        close(logits[row], plain(model, [*text, 50, 51])[-3:])


@EVERY
def test_what_a_tree_commits_is_as_if_it_had_been_read(tiny, architecture):
    model = tiny(architecture)
    target = prefilled(model)
    draft = trees_below(PROMPTS)
    verified(target, SLOTS, draft)
    target.commit(SLOTS, draft, keep([0, 1, 3, 4], [0, 2, 5], [0]))
    texts = [
        [*PROMPTS[0], 40, 42, 43, 7],
        [*PROMPTS[1], 41, 44, 7],
        [*PROMPTS[2], 7],
    ]
    assert target.cached.cache.lengths[:3] == [len(text) - 1 for text in texts]
    logits = verified(target, SLOTS, trees_below(texts))
    for row, text in enumerate(texts):
        for node, branch in BRANCHES.items():
            close(logits[row, node], plain(model, text + branch)[-1])


@EVERY
def test_slots_need_not_be_neighbours(tiny, architecture):
    model = tiny(architecture)
    target = prefilled(model, slots=[3, 0, 2])
    active = [0, 3]  # PROMPTS[1] and PROMPTS[0]; slot 2 rests
    for slots, prompts in [(active, [PROMPTS[1], PROMPTS[0]]), ([2], [PROMPTS[2]])]:
        logits = verified(target, slots, trees_below(prompts))
        for row, prompt in enumerate(prompts):
            for node, branch in BRANCHES.items():
                close(logits[row, node], plain(model, prompt + branch)[-1])


@EVERY
def test_one_sequence_alone_gives_what_it_gives_in_a_batch(tiny, architecture):
    model = tiny(architecture)
    target = prefilled(model)
    together = verified(target, SLOTS, trees_below(PROMPTS))
    for slot in SLOTS:
        close(verified(target, [slot], trees_below([PROMPTS[slot]]))[0], together[slot])


@EVERY
def test_truncated_tokens_never_were(tiny, architecture):
    model = tiny(architecture)
    target = prefilled(model)
    draft = chain_below(PROMPTS, [[40, 41, 42]] * 3)
    verified(target, SLOTS, draft)
    target.commit(SLOTS, draft, keep([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]))
    cache = target.cached.cache
    cache.truncate(0, len(PROMPTS[0]) + 1)
    cache.truncate(2, len(PROMPTS[2]))
    texts = [[*PROMPTS[0], 40, 7], [*PROMPTS[1], 40, 41, 42, 7], [*PROMPTS[2], 7]]
    logits = verified(target, SLOTS, chain_below(texts, [[50]] * 3))
    for row, text in enumerate(texts):
        close(logits[row], plain(model, [*text, 50])[-2:])


def test_truncation_never_lengthens(tiny):
    cache = prefilled(tiny("llama")).cached.cache
    cache.truncate(0, 50)
    assert cache.lengths[0] == len(PROMPTS[0]) - 1


@EVERY
def test_a_released_slot_serves_the_next_sequence(tiny, architecture):
    model = tiny(architecture)
    target = prefilled(model)
    target.release(0)
    with torch.no_grad():
        target.prefill([0], [torch.tensor(PROMPTS[2])])
    prompts = [PROMPTS[2], PROMPTS[1], PROMPTS[2]]
    logits = verified(target, SLOTS, chain_below(prompts, [[40]] * 3))
    for row, prompt in enumerate(prompts):
        close(logits[row], plain(model, [*prompt, 40])[-2:])


@EVERY
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_drafts_end_with_the_context(tiny, architecture, shape, prompt):
    """A sequence with no place left beside one with a wide draft: the padding of its row must
    neither leave the model's positions nor fall on anyone's keys."""
    model = tiny(architecture)
    full, short = prompt(96), prompt(7)  # the root is the context's last token
    target = prefilled(model, slots=[0, 1], prompts=[full, short])
    tails, parents = [[], NODES], [[], PARENTS]
    draft = Draft.from_lists([full[-1], short[-1]], tails, parents if shape == "tree" else None)
    logits = verified(target, [0, 1], draft)
    close(logits[0, 0], plain(model, full)[-1])
    if shape == "chain":
        close(logits[1], plain(model, short + NODES)[-6:])
    else:
        for node, branch in BRANCHES.items():
            close(logits[1, node], plain(model, short + branch)[-1])
    target.cached.cache.check_integrity()


@EVERY
@pytest.mark.parametrize("neighbours", [1, 2])
def test_a_wide_tree_fits_where_its_depth_fits(tiny, architecture, neighbours, prompt):
    """Three places left and a tree of six nodes, two of them deep: siblings share a position, so
    the draft fits the context."""
    model = tiny(architecture)
    prompts = [prompt(94), prompt(93)][:neighbours]
    slots = list(range(neighbours))
    target = prefilled(model, slots=slots, prompts=prompts)
    roots = [prompt[-1] for prompt in prompts]
    nodes, parents = [40, 41, 42, 43, 44], [0, 0, 0, 1, 3]
    draft = Draft.from_lists(roots, [nodes] * neighbours, [parents] * neighbours)
    branches = {1: [40], 2: [41], 3: [42], 4: [40, 43], 5: [42, 44]}
    logits = verified(target, slots, draft)
    for row, text in enumerate(prompts):
        for node, branch in branches.items():
            close(logits[row, node], plain(model, text + branch)[-1])


def test_hidden_states_are_those_of_a_plain_forward(tiny):
    model = tiny("llama")
    target = prefilled(model)
    with torch.no_grad():
        hidden = target.verify(SLOTS, chain_below(PROMPTS, [[40, 41]] * 3), layers=(0, 2)).hidden
        for row, text in enumerate(PROMPTS):
            ids = torch.tensor([[*text, 40, 41]])
            states = model(ids, output_hidden_states=True).hidden_states
            for layer in (0, 2):
                close(hidden[layer][row], states[layer][0, -3:])


def test_integrity_is_checked(tiny):
    target = prefilled(tiny("llama"))
    cache = target.cached.cache
    cache.check_integrity()
    cache.lengths[1] = cache.max_length + 1
    with pytest.raises(AssertionError, match="longer than the cache"):
        cache.check_integrity()
    cache.lengths[1] = -1
    with pytest.raises(AssertionError, match="negative length"):
        cache.check_integrity()
    cache.lengths[1] = 0
    cache.layers[1].values[2, 0, 5, 3] = float("nan")
    with pytest.raises(AssertionError, match="value is not a number"):
        cache.check_integrity()


def test_max_length_is_the_models_context_or_less(tiny):
    model = tiny("llama")
    assert CachedModel(model, num_slots=1).max_length == 96
    assert CachedModel(model, num_slots=1, max_length=30).max_length == 30
    assert CachedModel(model, num_slots=1, max_length=500).max_length == 96


def test_the_cache_takes_little_more_than_its_places(tiny):
    """Keys and values of slots x length, and one scratch place per slot."""
    model = tiny("llama", max_position_embeddings=256)
    target = prefilled(model, num_slots=4)
    config = model.config
    per_place = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in target.cached.cache.layers)
    assert 1.0 <= taken / (4 * target.max_length * per_place) <= 1.05


@pytest.mark.parametrize("token", [-1, 97, 10**6])
def test_a_drafted_token_that_the_target_does_not_have_is_named(tiny, token):
    target = prefilled(tiny("llama"), SLOTS[:1], PROMPTS[:1])
    draft = Draft.from_lists([50], [[3, token]])
    with pytest.raises(ValueError, match=f"proposed token {token}; the target has the tokens 0 to"):
        verified(target, [0], draft)
