"""The gate's training: it learns from a replay what the score does not say."""

import random
import sys
from pathlib import Path

from decode.drafters import SuffixDrafts
from decode.suffix import SuffixDraft

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import train_gate


def test_what_is_accepted_of_chains_and_trees() -> None:
    tree = SuffixDraft([1, 2, 3, 4], [-1, 0, 0, 2], [1.0] * 4, 4.0, 1)
    assert train_gate.num_accepted(tree, [1, 3, 4, 5]) == 3
    assert train_gate.num_accepted(tree, [1, 2, 4]) == 2
    assert train_gate.num_accepted(tree, [2]) == 0
    assert train_gate.num_accepted(tree, [1, 3]) == 2
    assert train_gate.num_accepted(SuffixDraft(), [1, 3]) == 0


def test_the_replay_tells_what_was_accepted_of_each_draft() -> None:
    text = list(range(1, 41))
    first, second = train_gate.replay([([90], text), ([91], [*text[:30], 99])], SuffixDrafts())
    assert first == []  # nothing comes again
    assert [one.length for one in second] == sorted({one.length for one in second})
    for one in second:
        left = 31 - one.length  # tokens of the text that comes again
        assert one.draft.token_ids == text[one.length - 1 :][: len(one.draft.token_ids)]
        assert one.accepted == min(len(one.draft.token_ids), left)
    assert 2 < len(second) < 29  # some were taken


def test_the_gate_learns_what_the_score_does_not_say() -> None:
    rng = random.Random(0)

    def seen(size: int, own: bool) -> train_gate.Seen:
        draft = SuffixDraft([1] * size, list(range(-1, size - 1)), [1.0] * size, size, 3, own)
        return train_gate.Seen(draft, rng.randrange(100), 0 if own else size)

    drafts = [seen(rng.randrange(1, 8), rng.random() < 0.5) for _ in range(600)]
    gate = train_gate.fit(drafts[:500], epochs=60)
    errors = [
        train_gate.error(drafts[500:], expected)
        for expected in (
            lambda one: gate.expected(one.draft, one.length),
            lambda one: one.draft.score,
        )
    ]
    assert errors[0] < 0.1 * errors[1]
