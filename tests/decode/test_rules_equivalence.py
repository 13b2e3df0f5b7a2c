"""Different roads to one acceptance: fast and general, cold and greedy, certain and one-hot."""

import pytest
import torch
from torch import Tensor

from decode import Acceptance, Draft, SamplingBatch, SamplingParams
from decode.acceptance import Greedy, SpeculativeSampling
from decode.acceptance.judged import Judged
from decode.acceptance.sampling import accept_chain, accept_tree
from decode.sampling import generator_for, warp

B, N, V = 400, 6, 11
WARM = SamplingParams(temperature=1.0)
COLD = SamplingParams(temperature=1e-3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampling(*params: SamplingParams) -> SamplingBatch:
    return SamplingBatch.of(params, [generator_for(0, str(row)) for row in range(len(params))])


def random_chains(target_logits: Tensor, *, certain: bool = False) -> Draft:
    """Chains of 0 to N - 1 tokens, drawn from laws near the target's."""
    noise = torch.randn(target_logits.shape, generator=generator(1))
    probs = (target_logits + noise).softmax(-1)
    tokens = torch.multinomial(probs.flatten(0, 1), 1, generator=generator(2)).view(B, N)
    roots = torch.zeros(B, 1, dtype=torch.long)
    num_nodes = torch.randint(1, N + 1, (B,), generator=generator(3))
    return Draft.chain(
        torch.cat([roots, tokens[:, :-1]], dim=1),
        num_nodes=num_nodes,
        probs=None if certain else probs,
    )


def random_trees(*, certain: bool = True, laws: Tensor | None = None) -> Draft:
    """Trees of N nodes, each below any earlier one."""
    parents = torch.stack(
        [torch.full((B,), -1)]
        + [torch.randint(0, n, (B,), generator=generator(n)) for n in range(1, N)],
        dim=1,
    )
    tokens = torch.randint(0, 3, (B, N), generator=generator(7))  # few tokens: many are accepted
    num_nodes = torch.randint(1, N + 1, (B,), generator=generator(8))
    return Draft(tokens, parents, num_nodes, None if certain else laws)


def same(
    ours: Acceptance | Judged, theirs: Acceptance | Judged, *, but: tuple[str, ...] = ()
) -> None:
    for name in ours._fields:
        if name not in but:
            one, other = getattr(ours, name), getattr(theirs, name)
            torch.testing.assert_close(one, other, msg=lambda text, name=name: name + text)


def is_varied(judged: Judged) -> bool:
    return len(judged.num_accepted.unique()) >= N - 2


@pytest.fixture
def target_logits() -> Tensor:
    return 2 * torch.randn(B, N, V, generator=generator())


@pytest.mark.parametrize("certain", [False, True])
def test_the_chain_rule_is_the_tree_rule_on_chains(target_logits, certain):
    draft = random_chains(target_logits, certain=certain)
    uniforms = torch.rand(B, N, generator=generator(9))
    target_probs = target_logits.softmax(-1)
    fast = accept_chain(draft, target_probs, uniforms)
    same(fast, accept_tree(draft, target_probs, uniforms))
    assert is_varied(fast)


def test_the_rule_takes_the_fast_path_and_the_general_one_alike(target_logits):
    chain = random_chains(target_logits)
    as_tree = Draft(chain.tokens, chain.parents, chain.num_nodes, chain.probs)
    assert chain.is_chain
    assert not as_tree.is_chain
    for params in (WARM, SamplingParams(temperature=0.7, top_k=4, top_p=0.9)):
        rule = SpeculativeSampling()
        same(
            rule.accept(chain, target_logits, sampling(*[params] * B)),
            rule.accept(as_tree, target_logits, sampling(*[params] * B)),
        )


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_certain_draft_is_a_one_hot_law(target_logits, shape):
    if shape == "chain":
        draft = random_chains(target_logits, certain=True)
    else:  # siblings that were drawn from a one-hot row are all the same token
        draft = random_trees()
        tokens = (draft.parents + draft.tokens[:, :1] + 1).remainder(3)
        draft = Draft(tokens, draft.parents, draft.num_nodes)
    rows = torch.zeros(B, N, V)
    for node in range(1, N):
        rows[torch.arange(B), draft.parents[:, node], draft.tokens[:, node]] = 1.0
    one_hot = Draft(draft.tokens, draft.parents, draft.num_nodes, rows, is_chain=draft.is_chain)
    rule, params = SpeculativeSampling(), [WARM] * B
    same(
        rule.accept(draft, target_logits, sampling(*params)),
        rule.accept(one_hot, target_logits, sampling(*params)),
    )


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
@pytest.mark.parametrize("shape", ["chain", "tree", "certain chain", "certain tree"])
def test_a_cold_target_is_greedy(target_logits, shape, temperature):
    """At T = 0 and, in the limit, just above it: whatever the drafter's laws were."""
    target_logits = (8 * target_logits).round() / 8 + 0.01 * torch.arange(V)  # gaps of 0.01 or more
    laws = target_logits.softmax(-1)
    draft = {
        "chain": lambda: random_chains(target_logits),
        "certain chain": lambda: random_chains(target_logits, certain=True),
        "tree": lambda: random_trees(certain=False, laws=laws),
        "certain tree": random_trees,
    }[shape]()
    params = sampling(*[SamplingParams(temperature=temperature)] * B)
    expected = Greedy().accept(draft, target_logits, params)
    found = SpeculativeSampling().accept(draft, target_logits, params)
    same(found, expected, but=("expected_accepted",))
    assert len(set(expected.num_accepted)) > 2


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_greedy_and_sampled_sequences_share_a_batch(target_logits, shape):
    draft = random_chains(target_logits) if shape == "chain" else random_trees()
    params = [SamplingParams() if row % 2 else WARM for row in range(B)]
    mixed = SpeculativeSampling().accept(draft, target_logits, sampling(*params))
    greedy = Greedy().accept(draft, target_logits, sampling(*params))
    warm = SpeculativeSampling().accept(draft, target_logits, sampling(*[WARM] * B))
    for row in range(B):
        expected = greedy if row % 2 else warm
        assert mixed.paths[row] == expected.paths[row]
        assert mixed.next_tokens[row] == expected.next_tokens[row]
        assert mixed.num_tried[row] == expected.num_tried[row]


@pytest.mark.parametrize("certain", [False, True])
def test_an_acceptance_does_not_depend_on_padding(target_logits, certain):
    draft = random_chains(target_logits, certain=certain)
    garbage = torch.randint(0, V, (B, N), generator=generator(11))
    tokens = torch.where(draft.valid, draft.tokens, garbage)
    noisy = Draft.chain(tokens, num_nodes=draft.num_nodes, probs=draft.probs)
    logits = torch.where(draft.valid[..., None], target_logits, 100 * torch.rand(B, N, V))
    rule, params = SpeculativeSampling(), [WARM] * B
    same(
        rule.accept(noisy, logits, sampling(*params)),
        rule.accept(draft, target_logits, sampling(*params)),
    )


def test_greedy_walks_down_the_tree():
    # root - 1 - 2 - 3        the target wants 4, then 5, then 6
    #      \ 4 - 5
    tokens, parents = [[1, 4, 2, 5, 3]], [[0, 0, 1, 2, 3]]
    draft = Draft.from_lists([0], tokens, parents)
    wants = {0: 4, 1: 2, 2: 5, 3: 3, 4: 6, 5: 0}  # node -> token
    logits = torch.zeros(1, 6, 8)
    for node, token in wants.items():
        logits[0, node, token] = 1.0
    found = Greedy().accept(draft, logits, sampling(SamplingParams()))
    assert found.paths == [[0, 2, 4]]
    assert found.num_accepted == [2]
    assert found.next_tokens == [6]
    assert found.num_tried == [3]  # 1, then 4, then 5; what hangs below 1 was not tried


@pytest.mark.parametrize("rule", [Greedy(), SpeculativeSampling()])
def test_without_a_draft_the_target_speaks_alone(target_logits, rule):
    draft = Draft.chain(torch.zeros(B, 1, dtype=torch.long))
    params = SamplingParams() if isinstance(rule, Greedy) else WARM
    found = rule.accept(draft, target_logits[:, :1], sampling(*[params] * B))
    assert found.paths == [[0]] * B
    assert not any(found.num_tried)
    law = warp(target_logits[:, 0], params)
    assert (law.gather(1, torch.tensor(found.next_tokens)[:, None]) > 0).all()


def test_a_drafter_with_the_targets_law_is_always_right(target_logits):
    chain = random_chains(target_logits)
    logits = chain.probs.log()
    found = SpeculativeSampling().accept(chain, logits, sampling(*[WARM] * B))
    assert found.num_accepted == (chain.num_nodes - 1).tolist()
    expected = found.expected_accepted.reshape(B, -1).sum(1)
    torch.testing.assert_close(expected, torch.tensor(found.num_tried).float())
