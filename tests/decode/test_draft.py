"""Drafts: a root, and below it a chain or a tree."""

import pytest
import torch

from decode import Draft

A, B, C, D = 10, 11, 12, 13


def tree() -> Draft:
    """Root a; b and c below a; d below b. Beside it root c with the one child d."""
    return Draft.from_lists([A, C], [[B, C, D], [D]], [[0, 0, 1], [0]])


def test_a_chain_hangs_each_token_below_the_one_before():
    draft = Draft.chain(torch.tensor([[A, B, C], [D, C, B]]))
    assert draft.parents.tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert draft.num_nodes.tolist() == [3, 3]
    assert draft.is_chain
    assert draft.probs is None


def test_a_draft_may_be_the_root_alone():
    draft = Draft.from_lists([A, B], [[], []])
    assert draft.tokens.tolist() == [[A], [B]]
    assert draft.num_nodes.tolist() == [1, 1]
    assert draft.ancestors().tolist() == [[[True]], [[True]]]


def test_ragged_chains_are_padded():
    draft = Draft.from_lists([A, B], [[B, C, D], [C]])
    assert draft.num_nodes.tolist() == [4, 2]
    assert draft.tokens[:, :2].tolist() == [[A, B], [B, C]]
    assert draft.valid.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert draft.is_chain


def test_a_tree_keeps_tokens_and_parents():
    draft = tree()
    assert draft.tokens[0].tolist() == [A, B, C, D]
    assert draft.parents[0].tolist() == [-1, 0, 0, 1]
    assert draft.num_nodes.tolist() == [4, 2]
    assert not draft.is_chain


def test_a_node_sees_itself_and_what_is_above_it():
    assert tree().ancestors()[0].int().tolist() == [
        # a  b  c  d
        [1, 0, 0, 0],  # a
        [1, 1, 0, 0],  # b
        [1, 0, 1, 0],  # c
        [1, 1, 0, 1],  # d
    ]
    assert tree().ancestors()[1, :2, :2].int().tolist() == [[1, 0], [1, 1]]


def test_depth_counts_the_edges_to_the_root():
    assert tree().depths()[0].tolist() == [0, 1, 1, 2]
    assert Draft.chain(torch.tensor([[A, B, C]])).depths().tolist() == [[0, 1, 2]]


def test_a_chain_is_the_tree_with_its_parents():
    chain = Draft.chain(torch.tensor([[A, B, C, D]]))
    as_tree = Draft.from_lists([A], [[B, C, D]], [[0, 1, 2]])
    assert not as_tree.is_chain
    assert torch.equal(chain.ancestors(), as_tree.ancestors())
    assert torch.equal(chain.depths(), as_tree.depths())


@pytest.mark.parametrize(
    ("parents", "num_nodes", "message"),
    [
        ([[-1, 0, 2]], [3], "come before its child"),  # node 2 below itself
        ([[0, 0, 1]], [3], "come before its child"),  # the root below itself
        ([[-1, -1, 0]], [3], "only node 0 may be a root"),
        ([[-1, 0]], [2], r"must both be \[B, N\]"),
        ([[-1, 0, 1]], [0], "must lie in 1..3"),
        ([[-1, 0, 1]], [4], "must lie in 1..3"),
    ],
)
def test_what_is_no_tree_is_refused(parents, num_nodes, message):
    draft = Draft(torch.tensor([[A, B, C]]), torch.tensor(parents), torch.tensor(num_nodes))
    with pytest.raises(ValueError, match=message):
        draft.validate()
