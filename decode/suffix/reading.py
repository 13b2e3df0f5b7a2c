"""Compiled functions that read a tree, a growing or a frozen one; see `layout`.

A child is the number of a node, or ~p for a leaf: the text from position p on. 0 is no child.
"""

from decode.suffix.children import class_of, find, find_root, length_of, size_of
from decode.suffix.compiled import bytes_at, longs_at, njit, shorts_at, words_at
from decode.suffix.layout import (
    BLOCK,
    BLOCK_SIZES,
    BY_TOKEN,
    COUNT,
    COUNTS,
    EDGES,
    END,
    ENTRIES,
    FIRST_CHILD,
    FIRST_LEAF,
    FROZEN,
    FROZEN_TEXT,
    LARGE_COUNTS,
    LEAVES,
    LENGTHS,
    MANY,
    MARKS,
    NODE_WORDS,
    NODES,
    NUM_LARGE,
    PAGES,
    REF,
    ROOTS,
    SORTED_FROM,
    TEXT,
    TOKEN_BYTES,
    VOCABULARY,
)
from decode.suffix.text import step


@njit
def frozen_token(header, position):
    """The token at a position of a frozen text; at the end of a document one that nobody has."""
    if header[TOKEN_BYTES] == 2:
        token = int(shorts_at(header[FROZEN_TEXT])[position])
        return -1 if token == MANY else token
    text = bytes_at(header[FROZEN_TEXT])
    low, middle, high = text[3 * position], text[3 * position + 1], text[3 * position + 2]
    token = int(low) | int(middle) << 8 | int(high) << 16
    return -1 if token == END else token


@njit
def token_at(header, position):
    """The token at a position."""
    if header[FROZEN]:
        return frozen_token(header, position)
    return int(words_at(header[TEXT])[position])


@njit
def following(header, position):
    """The position behind, -1 at the end of the document."""
    if header[FROZEN]:
        return position + 1 if frozen_token(header, position + 1) >= 0 else -1
    return step(words_at(header[PAGES]), position)


@njit
def edge_of(header, node):
    """Position and length of the edge to a node."""
    if header[FROZEN]:
        return int(words_at(header[EDGES])[node]), int(bytes_at(header[LENGTHS])[node])
    nodes = words_at(header[NODES])
    return int(nodes[node * NODE_WORDS + REF]), int(length_of(nodes, node))


@njit
def frozen_count(header, node):
    """Occurrences of a node of a frozen tree."""
    count = int(shorts_at(header[COUNTS])[node])
    if count < MANY:
        return count
    pairs = longs_at(header[LARGE_COUNTS])
    low, high = 0, header[NUM_LARGE] - 1
    while low < high:
        middle = (low + high) // 2
        if pairs[2 * middle] < node:
            low = middle + 1
        else:
            high = middle
    return int(pairs[2 * low + 1])


@njit
def count_of(header, node):
    """Occurrences of a node."""
    if header[FROZEN]:
        return frozen_count(header, node)
    return int(words_at(header[NODES])[node * NODE_WORDS + COUNT])


@njit
def num_children(header, node):
    """Children of a node, leaves included."""
    if header[FROZEN]:
        children, leaves = words_at(header[FIRST_CHILD]), words_at(header[FIRST_LEAF])
        return int(children[node + 1] - children[node] + leaves[node + 1] - leaves[node])
    return int(size_of(words_at(header[NODES]), node))


@njit
def child_at(header, node, index):
    """A child by its place, the most frequent first, and its occurrences."""
    if header[FROZEN]:
        children = words_at(header[FIRST_CHILD])
        child = int(children[node]) + index
        if child < children[node + 1]:
            return child, frozen_count(header, child)
        leaf = words_at(header[FIRST_LEAF])[node] + child - children[node + 1]
        return ~int(words_at(header[LEAVES])[leaf]), 1
    nodes, entries = words_at(header[NODES]), words_at(header[ENTRIES])
    block, room = nodes[node * NODE_WORDS + BLOCK], BLOCK_SIZES[class_of(nodes, node)]
    return int(entries[block + 2 * room + index]), int(entries[block + room + index])


@njit
def frozen_child(header, node, token):
    """The child of a node of a frozen tree that begins with `token`."""
    children, leaves_of = words_at(header[FIRST_CHILD]), words_at(header[FIRST_LEAF])
    marks, edges = shorts_at(header[MARKS]), words_at(header[EDGES])
    mark = token & 0xFFFF
    child, end = int(children[node]), int(children[node + 1])
    while child < end:
        if child + 16 <= end:
            hits = 0
            for offset in range(16):  # without a way out: compared sixteen at a time
                hits |= marks[child + offset] == mark
            if not hits:
                child += 16
                continue
        if marks[child] == mark and frozen_token(header, edges[child]) == token:
            return child
        child += 1
    leaves = words_at(header[LEAVES])
    low, high = int(leaves_of[node]), int(leaves_of[node + 1])
    if high - low < SORTED_FROM:
        for leaf in range(low, high):
            if frozen_token(header, leaves[leaf]) == token:
                return ~int(leaves[leaf])
        return 0
    while low < high:
        middle = (low + high) // 2
        there = frozen_token(header, leaves[middle])
        if there == token:
            return ~int(leaves[middle])
        if there < token:
            low = middle + 1
        else:
            high = middle
    return 0


@njit
def child_by(header, node, token):
    """The child that begins with `token`."""
    if header[FROZEN]:
        if node == 0:
            if not 0 <= token < header[VOCABULARY]:
                return 0
            return int(words_at(header[BY_TOKEN])[token])
        return frozen_child(header, node, token)
    if node == 0:
        return int(words_at(header[ROOTS])[2 * find_root(header, token) + 1])
    nodes, entries = words_at(header[NODES]), words_at(header[ENTRIES])
    block = nodes[node * NODE_WORDS + BLOCK]
    index = find(entries, block, size_of(nodes, node), token)
    if index < 0:
        return 0
    return int(entries[block + 2 * BLOCK_SIZES[class_of(nodes, node)] + index])
