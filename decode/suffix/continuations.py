"""A compiled function that drafts from a suffix tree as REST does (He et al. 2023).

REST looks its datastore up for the longest match and counts every beginning of what followed. A
suffix tree holds these counts: they are its nodes below the match.
"""

import numpy as np

from decode.suffix.compiled import floats_at, longs_at, njit, words_at
from decode.suffix.layout import DEPTH
from decode.suffix.lookup import draft_tree, longest_match, match


@njit
def most_frequent(
    address,
    context,
    longest,
    shortest,
    length,
    most,
    best,
    capacity,
    drafts,
    probs,
    items,
    chances,
):
    """What followed the longest match of `context` in one tree: its most frequent beginnings.

    Args:
        address: of the header of the tree.
        context: [n] int32 the last tokens.
        longest: of them are matched at most, and `shortest` at least.
        shortest: see `longest`.
        length: tokens of a continuation.
        most: tokens of the draft.
        best: size, score and match of the draft so far: of one behind a longer match, or as long.
        capacity: see `speculate` for this and what follows.
        drafts: see `capacity`.
        probs: see `capacity`.
        items: see `capacity`.
        chances: see `capacity`.

    Returns:
        `best`, or that of this draft.
    """
    header = longs_at(address)
    tokens, parents = words_at(drafts), words_at(drafts + 4 * capacity)
    longest = min(longest, len(context), header[DEPTH] - 1)
    for matched in range(longest_match(header, context, 0, longest), 0, -1):
        if matched < shortest or matched <= best[2]:
            break
        _, node, position, left = match(header, context, matched)
        size, score = draft_tree(
            header, node, position, left, matched, min(matched + length, header[DEPTH]), most,
            np.float32(0.0), tokens, parents, floats_at(probs), longs_at(items), floats_at(chances),
        )  # fmt: skip
        if size > 0:
            return size, np.float64(score), matched
    return best
