"""Rules that are lossy by design: what each takes, worked out by hand, and that they say so."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from decode import Acceptance, Draft, Exactness, SamplingBatch, SamplingParams
from decode.acceptance import (
    BlockVerification,
    Greedy,
    KSequence,
    Lenient,
    NearTokens,
    RecursiveRejection,
    Rollback,
    SpeculativeSampling,
    TopTokens,
    TraversalVerification,
    Typical,
)
from decode.sampling import generator_for

B, N, V = 300, 7, 9
APPROXIMATE = [Lenient(), NearTokens(), Rollback(), TopTokens(), Typical()]


def sampling(count: int, temperature: float = 0.0) -> SamplingBatch:
    params = SamplingParams(temperature=temperature)
    return SamplingBatch.of([params] * count, [generator_for(0, str(n)) for n in range(count)])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_trees() -> Draft:
    parents = [torch.full((B,), -1)]
    parents += [torch.randint(0, n, (B,), generator=generator(n)) for n in range(1, N)]
    tokens = torch.randint(0, V, (B, N), generator=generator(20))
    num_nodes = torch.randint(1, N + 1, (B,), generator=generator(21))
    return Draft(tokens, torch.stack(parents, dim=1), num_nodes)


def random_logits() -> Tensor:
    return 2 * torch.randn(B, N, V, generator=generator(22))


def logits_of(*rows: list[float]) -> Tensor:
    """[1, N, V] logits whose softmax is `rows`."""
    return torch.tensor([rows]).log()


def outcome(acceptance: Acceptance) -> tuple[list[list[int]], list[int]]:
    """Accepted paths and next tokens."""
    return acceptance.paths, acceptance.next_tokens


@pytest.mark.parametrize("rule", APPROXIMATE, ids=lambda rule: type(rule).__name__)
def test_lossy_rules_say_so(rule):
    assert rule.exactness is Exactness.APPROXIMATE


def test_the_others_say_what_they_are():
    for rule in (
        SpeculativeSampling(),
        BlockVerification(),
        KSequence(),
        RecursiveRejection(),
        TraversalVerification(),
    ):
        assert rule.exactness is Exactness.LOSSLESS
    assert Greedy().exactness is Exactness.GREEDY


@pytest.mark.parametrize(
    "rule",
    [
        TopTokens(top=1),
        TopTokens(top=V, max_gap=0.0),
        NearTokens(distance=0),
        Typical(),
        Lenient(lenience=1.0),
    ],
    ids=str,
)
def test_at_its_strictest_a_rule_is_greedy(rule):
    draft, logits = random_trees(), random_logits()
    # Siblings with one token are one path to greedy acceptance and two to the others.
    tokens = torch.stack([torch.randperm(V, generator=generator(n))[:N] for n in range(B)])
    draft = Draft(tokens, draft.parents, draft.num_nodes)
    ours, greedy = (r.accept(draft, logits, sampling(B)) for r in (rule, Greedy()))
    assert outcome(ours) == outcome(greedy)
    assert len(set(ours.num_accepted)) >= 3


def test_top_tokens_by_rank_and_by_gap():
    logits = logits_of([0.5, 0.3, 0.15, 0.05], [0.4, 0.35, 0.2, 0.05], [0.1, 0.2, 0.3, 0.4])
    draft = Draft.chain(torch.tensor([[0, 1, 2]]))
    assert outcome(TopTokens(top=1).accept(draft, logits, sampling(1))) == ([[0]], [0])
    assert outcome(TopTokens(top=2).accept(draft, logits, sampling(1))) == ([[0, 1]], [0])
    assert outcome(TopTokens(top=3).accept(draft, logits, sampling(1))) == ([[0, 1, 2]], [3])
    narrow = TopTokens(top=3, max_gap=math.log(0.4 / 0.2) - 0.01)
    assert outcome(narrow.accept(draft, logits, sampling(1))) == ([[0, 1]], [0])
    wide = TopTokens(top=3, max_gap=math.log(0.4 / 0.2) + 0.01)
    assert outcome(wide.accept(draft, logits, sampling(1))) == ([[0, 1, 2]], [3])


def test_a_block_may_have_a_least_length():
    logits = logits_of(*[[0.7, 0.1, 0.1, 0.1]] * 4)
    draft = Draft.chain(torch.tensor([[0, 3, 3, 3]]))
    for rule in (TopTokens(top=1, min_block=3), NearTokens(distance=0, min_block=3)):
        assert outcome(rule.accept(draft, logits, sampling(1))) == ([[0, 1, 2]], [0])


def test_near_tokens_by_their_numbers():
    logits = logits_of([0.1, 0.1, 0.7, 0.1], [0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1])
    draft = Draft.chain(torch.tensor([[0, 3, 2]]))
    assert outcome(NearTokens(distance=1).accept(draft, logits, sampling(1))) == ([[0, 1]], [0])
    assert outcome(NearTokens(distance=2).accept(draft, logits, sampling(1))) == ([[0, 1, 2]], [1])


def test_typical_takes_more_where_the_target_is_unsure():
    flat, sharp = [0.25] * 4, [0.97, 0.01, 0.01, 0.01]
    assert Typical().epsilon == 0.09
    logits = logits_of(flat, sharp, flat)
    # Behind a flat row the threshold is 0.3 / 4 < 0.25; behind the sharp one 0.09 > 0.01.
    rule, warm = Typical(), sampling(1, 1.0)
    unlikely = Draft.chain(torch.tensor([[0, 3, 3]]))
    assert outcome(rule.accept(unlikely, logits, warm)) == ([[0, 1]], [0])
    likely = Draft.chain(torch.tensor([[0, 3, 0]]))
    assert outcome(rule.accept(likely, logits, warm))[0] == [[0, 1, 2]]
    # δ exp(-H) is what refuses 0.25 where ε would take it.
    strict = Typical(epsilon=0.9, delta=1.1)
    assert outcome(strict.accept(likely, logits, warm))[0] == [[0]]


def test_rollback_is_by_cross_entropy():
    logits = logits_of([0.5, 0.3, 0.2], [0.1, 0.2, 0.7])
    draft = Draft.chain(torch.tensor([[0, 1]]))
    assert outcome(Rollback(threshold=-math.log(0.29)).accept(draft, logits, sampling(1))) == (
        [[0, 1]],
        [2],
    )
    assert outcome(Rollback(threshold=-math.log(0.31)).accept(draft, logits, sampling(1))) == (
        [[0]],
        [0],
    )


def test_of_several_paths_the_longest_is_kept_and_of_these_the_likeliest():
    #        root
    #     a    b    c       b is likeliest, but leads nowhere; below a and c hangs one token each
    #     d         e
    row = [0.2, 0.5, 0.3]
    logits = logits_of(row, [0.4, 0.3, 0.3], row, [0.4, 0.3, 0.3], row, row)
    draft = Draft(
        torch.tensor([[0, 0, 1, 2, 0, 0]]), torch.tensor([[-1, 0, 0, 0, 1, 3]]), torch.tensor([6])
    )
    found = TopTokens(top=3).accept(draft, logits, sampling(1))
    assert outcome(found) == ([[0, 3, 5]], [1])
    assert found.num_tried == [5]


@pytest.mark.parametrize("form", ["linear", "square", "exponential"])
def test_full_lenience_of_one_is_speculative_sampling(form):
    logits = random_logits()
    laws = (logits + torch.randn(B, N, V, generator=generator(30))).softmax(-1)
    tokens = torch.multinomial(laws.flatten(0, 1), 1, generator=generator(31)).view(B, N)
    draft = Draft.chain(torch.cat([tokens[:, :1], tokens[:, :-1]], dim=1), probs=laws)
    ours = Lenient(lenience=1.0, form=form).accept(draft, logits, sampling(B, 1.0))
    theirs = SpeculativeSampling().accept(draft, logits, sampling(B, 1.0))
    assert outcome(ours) == outcome(theirs)


def test_lenience_raises_no_token_above_its_bound():
    """Leviathan et al. 2023, A.5: no token comes more often than p / l. And some come more often
    than p: it is lossy."""
    count, lenience = 200_000, 0.6
    target, drafter = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    tokens = torch.multinomial(drafter, count, replacement=True, generator=generator(40))
    draft = Draft.chain(
        torch.stack([torch.zeros_like(tokens), tokens], dim=1),
        probs=drafter.expand(count, 2, 4),
    )
    rule = Lenient(lenience=lenience)
    found = rule.accept(draft, target.log().expand(count, 2, 4), sampling(count, 1.0))
    is_accepted = torch.tensor(found.num_accepted) == 1
    first = torch.where(is_accepted, tokens, torch.tensor(found.next_tokens))
    shares = Counter(first.tolist())
    frequencies = torch.tensor([shares[token] / count for token in range(4)])
    assert (frequencies <= target / lenience + 0.005).all()
    assert float((frequencies - target).max()) > 0.02


def test_greedy_lenience_is_by_the_share_of_the_likeliest():
    logits = logits_of([0.5, 0.3, 0.2], [0.1, 0.2, 0.7])
    draft = Draft.chain(torch.tensor([[0, 1]]))
    assert outcome(Lenient(lenience=0.59).accept(draft, logits, sampling(1))) == ([[0, 1]], [2])
    assert outcome(Lenient(lenience=0.61).accept(draft, logits, sampling(1))) == ([[0]], [0])


@pytest.mark.parametrize("rule", APPROXIMATE, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_of_the_root_alone_are_accepted(rule, temperature):
    draft = Draft.chain(torch.tensor([[3], [4]]))
    found = rule.accept(draft, random_logits()[:2, :1], sampling(2, temperature))
    assert found.num_accepted == [0, 0]
    assert found.num_tried == [0, 0]


def test_drafts_that_a_rule_cannot_judge_are_refused():
    tree = Draft(
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[-1, 0, 0]]),
        torch.tensor([3]),
        torch.full((1, 3, V), 1 / V),
    )
    distinct = Draft(tree.tokens, tree.parents, tree.num_nodes, tree.probs, False, True)
    logits, warm = random_logits()[:1, :3], sampling(1, 1.0)
    for rule in (SpeculativeSampling(), KSequence()):
        with pytest.raises(ValueError, match="RecursiveRejection is the rule for them"):
            rule.accept(distinct, logits, warm)
    with pytest.raises(ValueError, match="SpeculativeSampling is a rule for them"):
        RecursiveRejection().accept(tree, logits, warm)
    with pytest.raises(ValueError, match="judges chains"):
        BlockVerification().accept(tree, logits, warm)
    with pytest.raises(ValueError, match="not ones without replacement"):
        Lenient().accept(distinct, logits, warm)


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (Lenient, {"lenience": 0.0}, "lenience must lie in"),
        (Lenient, {"form": "cubic"}, "form must be one of linear, square, exponential"),
        (NearTokens, {"distance": -1}, "distance must be >= 0"),
        (Rollback, {"threshold": 0.0}, "threshold must be > 0"),
        (TopTokens, {"top": 0}, "top and min_block must be >= 1"),
        (Typical, {"epsilon": 1.5}, "epsilon must lie in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(rule, settings, message):
    with pytest.raises(ValueError, match=message):
        rule(**settings)
