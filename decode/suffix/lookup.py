"""Compiled functions that draft from suffix trees (SuffixDecoding, Oliaro et al. 2024).

For every suffix of the context that occurs in a tree, what followed it there is expanded by its
estimated chance of acceptance D: 1 at the match, and at a child its parent's times the share of the
occurrences that went on to it. The draft with the greatest sum of D wins, and among equals the one
behind the longer match, and the tree of the request itself. Long matches are tried first; a shorter
one is expanded only while its bound, as many tokens as it may draft, can still win.

A place in a tree is a node, the position of the next token on an edge, and the tokens left there.
All arithmetic is in 32-bit floats.
"""

import numpy as np

from decode.suffix.compiled import floats_at, longs_at, njit, words_at
from decode.suffix.layout import DEPTH, LAST, LENGTH, MATCHED, SLOT_WORDS, SLOTS
from decode.suffix.reading import (
    child_at,
    child_by,
    count_of,
    edge_of,
    following,
    num_children,
    token_at,
)
from decode.suffix.text import ends_with

ITEM_WORDS = 6  # of a place that waits in the heap: itself, its parent in the draft, its depth
LEAF = -1  # the node of a place on the way to a leaf

BREADTH = 16  # children looked at, where fewer could be drafted: they decide among equals


@njit
def draft_chain(header, node, position, left, depth, most, least, tokens, parents, probs):
    """Always the most frequent child.

    Args:
        header: of the tree.
        node: the place to start from, with `position` and `left`.
        position: of the next token on the edge.
        left: tokens left on it.
        depth: tokens above the place.
        most: tokens at most.
        least: where D falls under it the draft ends.
        tokens: where the drafted tokens go.
        parents: where the number of the token before each goes, -1 for the context.
        probs: where D of each goes.

    Returns:
        Its length and its score.
    """
    size = 0
    prob, score = np.float32(1.0), np.float32(0.0)
    while size < most and prob >= least:
        if left > 0:
            tokens[size] = token_at(header, position)
            parents[size] = size - 1
            probs[size] = prob
            score += prob
            size += 1
            left -= 1
            if left > 0:
                position = following(header, position)
                if position < 0:
                    left = 0
            continue
        if node == LEAF or num_children(header, node) == 0:
            break
        child, count = child_at(header, node, 0)
        prob = np.float32(prob * np.float32(np.float32(count) / np.float32(count_of(header, node))))
        node, position, left = child_place(header, child, depth + size)
    return size, score


@njit
def child_place(header, child, depth):
    """The place where the edge to a child begins, `depth` tokens below the root."""
    if child < 0:
        return LEAF, ~child, header[DEPTH] - depth
    position, length = edge_of(header, child)
    return child, position, length


@njit
def sift_up(heap, chances, place):
    """Restore the order of a heap whose item at `place` may be too large."""
    item = heap[ITEM_WORDS * place]
    while place > 0:
        above = (place - 1) // 2
        if not chances[heap[ITEM_WORDS * above]] < chances[item]:
            break
        heap[ITEM_WORDS * place] = heap[ITEM_WORDS * above]
        place = above
    heap[ITEM_WORDS * place] = item


@njit
def pop(heap, chances, size):
    """Take the first item off a heap of `size`: the hole sinks to the bottom and is filled."""
    first, last = heap[0], heap[ITEM_WORDS * (size - 1)]
    size -= 1
    hole = 0
    while 2 * hole + 2 < size:
        below = 2 * hole + 2
        if chances[heap[ITEM_WORDS * below]] < chances[heap[ITEM_WORDS * (below - 1)]]:
            below -= 1
        heap[ITEM_WORDS * hole] = heap[ITEM_WORDS * below]
        hole = below
    if 2 * hole + 2 == size:
        heap[ITEM_WORDS * hole] = heap[ITEM_WORDS * (2 * hole + 1)]
        hole = 2 * hole + 1
    heap[ITEM_WORDS * hole] = last
    sift_up(heap, chances, hole)
    return first


@njit
def put(items, item, node, position, left, parent, depth):
    """Write down a place that waits."""
    at = ITEM_WORDS * item
    items[at + 1] = node
    items[at + 2] = position
    items[at + 3] = left
    items[at + 4] = parent
    items[at + 5] = depth


@njit
def draft_tree(
    header,
    node,
    position,
    left,
    depth,
    deepest,
    most,
    least,
    tokens,
    parents,
    probs,
    items,
    chances,
):
    """Again and again the child with the greatest D; arguments as of `draft_chain`.

    Nothing is drafted that is more than `deepest` tokens below the root.

    `items` and `chances` are working memory. The first word of each row of `items` is the heap's:
    the numbers of the items that wait.
    """
    size, score = 0, np.float32(0.0)
    put(items, 0, node, position, left, -1, depth)
    chances[0] = 1.0
    items[0] = 0
    waiting, used = 1, 1
    while size < most and waiting > 0:
        item = pop(items, chances, waiting)
        waiting -= 1
        prob = chances[item]
        at = ITEM_WORDS * item
        node, position, left = items[at + 1], items[at + 2], items[at + 3]
        parent, depth = items[at + 4], items[at + 5]
        if depth >= deepest:
            continue
        if left > 0:
            tokens[size] = token_at(header, position)
            parents[size] = parent
            probs[size] = prob
            score += prob
            left -= 1
            if left > 0:
                position = following(header, position)
                if position < 0:
                    left = 0
            put(items, item, node, position, left, size, depth + 1)
            size += 1
            items[ITEM_WORDS * waiting] = item
            sift_up(items, chances, waiting)
            waiting += 1
            continue
        if node == LEAF:
            continue
        total = np.float32(count_of(header, node))
        for index in range(min(num_children(header, node), max(most - size, BREADTH))):
            child, count = child_at(header, node, index)
            below = np.float32(np.float32(prob * np.float32(count)) / total)
            if below < least:
                break
            place, start, length = child_place(header, child, depth)
            put(items, used, place, start, length, parent, depth)
            chances[used] = below
            items[ITEM_WORDS * waiting] = used
            sift_up(items, chances, waiting)
            waiting += 1
            used += 1
    return size, score


@njit
def match(header, context, length):
    """The place behind the last `length` tokens of `context`: (found, node, position, left)."""
    node, position, left = 0, -1, 0
    for depth in range(length):
        token = context[len(context) - length + depth]
        if left == 0:
            child = 0 if node == LEAF else child_by(header, node, token)
            if child == 0:
                return False, node, position, left
            node, position, left = child_place(header, child, depth)
        if token_at(header, position) != token:
            return False, node, position, left
        left -= 1
        if left > 0:
            position = following(header, position)
            if position < 0:
                left = 0
    return True, node, position, left


@njit
def longest_match(header, context, known, longest):
    """How many of the last tokens of `context` the tree has, at least `known`, at most `longest`.

    Who has a text has all that it ends with: the length is found by doubling and halving.
    """
    stride, low = 1, known
    while low < longest and match(header, context, min(low + stride, longest))[0]:
        low = min(low + stride, longest)
        stride *= 2
    high = min(low + stride, longest + 1)  # this many do not match
    while low + 1 < high:
        middle = (low + high) // 2
        if match(header, context, middle)[0]:
            low = middle
        else:
            high = middle
    return low


@njit
def speculate(
    header,
    slot,
    context,
    follows,
    most,
    factor,
    offset,
    least,
    as_tree,
    size,
    best,
    found,
    capacity,
    drafts,
    probs,
    items,
    chances,
):
    """The best draft of one tree, or the best so far where that is no worse.

    Args:
        header: of the tree.
        slot: of the sequence that grows in it, -1 for none.
        context: [n] int32 the last tokens.
        follows: how many of them this sequence has seen (the local tree: all; the global one: none
            of the prompt).
        most: tokens per draft at most.
        factor: tokens per matched token, and `offset` besides.
        offset: see `factor`.
        least: least D of a drafted token.
        as_tree: or a chain.
        size: tokens of the best draft so far, which is where drafts begin.
        best: its score.
        found: the length of its match.
        capacity: tokens that a draft has room for in what follows.
        drafts: [2, 2, capacity] tokens and parents; the result is in the first half.
        probs: [2, capacity] their probabilities, likewise.
        items: working memory, with `chances`.
        chances: see `items`.

    Returns:
        `size`, `best` and `found` of the better one.
    """
    slots = words_at(header[SLOTS])
    tokens, parents = words_at(drafts + 8 * capacity), words_at(drafts + 12 * capacity)
    best_tokens, best_parents = words_at(drafts), words_at(drafts + 4 * capacity)
    best_probs, new_probs = floats_at(probs), floats_at(probs + 4 * capacity)
    waiting, likely = longs_at(items), floats_at(chances)
    longest = min(len(context), header[DEPTH] + 1) - 1
    suffixes = slot * (SLOT_WORDS + header[DEPTH] + 1) + SLOT_WORDS
    matched = 0
    if slot >= 0:
        matched = min(slots[suffixes - SLOT_WORDS + MATCHED], follows)
    known = min(matched, longest)
    if matched == follows:  # else a longer suffix occurs once, at the end of itself
        known = longest_match(header, context, known, longest)
    for length in range(known, 0, -1):
        allowed = max(min(most, int(length * factor + offset + 1e-6)), 0)
        if allowed <= best:
            break
        if length <= matched:
            node, position, left = int(slots[suffixes + length]), -1, 0
        else:
            _, node, position, left = match(header, context, length)
        if left == 0:
            if node == LEAF or num_children(header, node) == 0:
                continue
            first, total = child_at(header, node, 0)[1], count_of(header, node)
            if first < total and 1.0001 * allowed * first / total <= best:
                continue
        if as_tree:
            drafted, score = draft_tree(
                header, node, position, left, length, header[DEPTH], allowed, least,
                tokens, parents, new_probs, waiting, likely,
            )  # fmt: skip
        else:
            drafted, score = draft_chain(
                header, node, position, left, length, allowed, least, tokens, parents, new_probs
            )
        if score > best:
            size, best, found = drafted, score, length
            for index in range(size):
                best_tokens[index] = tokens[index]
                best_parents[index] = parents[index]
                best_probs[index] = new_probs[index]
    return size, best, found


@njit
def speculate_both(
    own_address,
    shared_address,
    frozen_address,
    slot,
    context,
    most,
    factor,
    offset,
    least,
    as_tree,
    in_own,
    in_shared,
    capacity,
    drafts,
    probs,
    items,
    chances,
):
    """The best of the request's own tree, the shared one, and a frozen one.

    As `speculate`, and whether the draft is of the request's own tree.

    Args:
        own_address: of the header of the request's tree: slot 0 holds its prompt and output.
        shared_address: of the header of the global tree.
        frozen_address: of the header of a frozen one, 0 for none.
        slot: of the request's output in it, -1 where it is not kept.
        context: see `speculate` for this and what follows.
        most: tokens per draft at most.
        factor: tokens per matched token, and `offset` besides.
        offset: see `factor`.
        least: least D of a drafted token.
        as_tree: or a chain.
        in_own: whether to look there.
        in_shared: whether to look there.
        capacity: tokens that a draft has room for.
        drafts: address of room for the draft; likewise the others.
        probs: see `drafts`.
        items: see `drafts`.
        chances: see `drafts`.
    """
    own, shared = longs_at(own_address), longs_at(shared_address)
    size, score, found = 0, np.float32(0.0), 0
    own_slot, own_seen, seen = 0, len(context), 0
    if not ends_with(own, words_at(own[SLOTS])[LAST], context):
        own_slot, own_seen, slot = -1, 0, -1  # asked about another text than the request's own end
    if slot >= 0:
        rows = words_at(shared[SLOTS])
        seen = min(len(context), rows[slot * (SLOT_WORDS + shared[DEPTH] + 1) + LENGTH])
    if in_own:
        size, score, found = speculate(
            own, own_slot, context, own_seen, most, factor, offset, least, as_tree,
            size, score, found, capacity, drafts, probs, items, chances,
        )  # fmt: skip
    of_own = score
    if in_shared:
        size, score, found = speculate(
            shared, slot, context, seen, most, factor, offset, least, as_tree,
            size, score, found, capacity, drafts, probs, items, chances,
        )  # fmt: skip
        if frozen_address != 0:
            size, score, found = speculate(
                longs_at(frozen_address), -1, context, 0, most, factor, offset, least, as_tree,
                size, score, found, capacity, drafts, probs, items, chances,
            )  # fmt: skip
    return size, score, found, score == of_own
