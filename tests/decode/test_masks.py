"""Attention masks, drawn by hand: a row per query, a column per key, 1 where it may look."""

import pytest
import torch
from torch import Tensor

from decode import Draft
from decode.masks import TEMPLATE_WIDTH, MaskMaker


def maker(window: int | None = None, dtype: torch.dtype = torch.float32) -> MaskMaker:
    return MaskMaker(max_length=24, window=window, dtype=dtype, device=torch.device("cpu"))


def drawn(mask: Tensor) -> list[list[str]]:
    """[B, 1, N, L] -> a drawing per sequence."""
    assert mask.shape[1] == 1
    return [["".join("01"[seen] for seen in row) for row in rows[0] == 0] for rows in mask]


def test_a_chain_sees_what_is_before_it():
    assert drawn(maker().chain([2], 3, 5)) == [
        [
            "11100",  # two committed tokens, then the root
            "11110",
            "11111",
        ]
    ]


def test_a_ragged_batch_starts_at_different_places():
    assert drawn(maker().chain([0, 3], 2, 5)) == [
        [
            "10000",  # nothing is committed: the rest belongs to the longer sequence
            "11000",
        ],
        [
            "11110",
            "11111",
        ],
    ]


def test_a_window_hides_what_is_far_behind():
    assert drawn(maker(window=3).chain([3], 3, 6)) == [
        [
            "011100",
            "001110",
            "000111",
        ]
    ]
    assert drawn(maker(window=2).chain([0, 3], 2, 5)) == [["10000", "11000"], ["00110", "00011"]]


def test_a_tree_sees_the_committed_tokens_and_its_own_branch():
    # root a; b and c below a; d below b                (two committed)  a b c d
    ancestors = Draft.from_lists([0], [[1, 2, 3]], [[0, 0, 1]]).ancestors()
    assert drawn(maker().tree([2], ancestors, 6)) == [
        [
            "111000",
            "111100",
            "111010",
            "111101",
        ]
    ]


def test_trees_of_a_ragged_batch():
    ancestors = Draft.from_lists([0, 0], [[1, 2], [1, 2]], [[0, 0], [0, 1]]).ancestors()
    assert drawn(maker().tree([1, 3], ancestors, 6)) == [
        [
            "110000",
            "111000",
            "110100",  # b's sibling does not see b
        ],
        [
            "111100",
            "111110",
            "111111",
        ],
    ]


def test_a_window_over_a_tree_counts_depth_and_not_columns():
    # a - b          c stands where b stands, though its column is one later: e, two below it,
    #   \ c - d - e  does not see it.                                    (two committed)  a b c d e
    ancestors = Draft.from_lists([0], [[1, 2, 3, 4]], [[0, 0, 2, 3]]).ancestors()
    assert drawn(maker(window=2).tree([2], ancestors, 7)) == [
        [
            "0110000",
            "0011000",
            "0010100",
            "0000110",
            "0000011",
        ]
    ]


@pytest.mark.parametrize("window", [None, 3])
def test_a_chain_is_a_tree_of_width_one(window):
    starts, width, keys = [0, 4, 7], 5, 12
    ancestors = Draft.chain(torch.zeros(3, width, dtype=torch.long)).ancestors()
    chain, tree = (
        maker(window).chain(starts, width, keys),
        maker(window).tree(starts, ancestors, keys),
    )
    assert torch.equal(chain, tree)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("width", [1, 4, TEMPLATE_WIDTH, TEMPLATE_WIDTH + 1])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_one_sequence_alone_gets_the_mask_it_gets_in_a_batch(window, width, start):
    made = maker(window)
    alone = made.chain([start], width, start + width)
    assert torch.equal(alone, made.chain([start, start], width, start + width)[:1])
    assert alone.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_places_hold_the_lowest_finite_number(dtype):
    mask = maker(dtype=dtype).chain([0], 2, 2)
    assert mask.dtype == dtype
    assert mask[0, 0, 0, 1] == torch.finfo(dtype).min
