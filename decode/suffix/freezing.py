"""Compiled functions that write a growing tree down as a frozen one; see `layout`."""

import numpy as np

from decode.suffix.children import class_of, length_of, size_of
from decode.suffix.compiled import longs_at, njit, words_at
from decode.suffix.layout import (
    BLOCK,
    BLOCK_SIZES,
    COUNT,
    ENTRIES,
    FILL,
    NEXT,
    NODE_WORDS,
    NODES,
    PAGE,
    PAGE_WORDS,
    PAGES,
    REF,
    ROOT_MASK,
    ROOTS,
    SORTED_FROM,
    TEXT,
)


@njit
def copy_text(address, first_page, text, start, starts):
    """Copy a document to `text` [n] from `start` on, and note in `starts` where its pages went.

    Returns:
        The position behind its end.
    """
    header = longs_at(address)
    tokens, pages = words_at(header[TEXT]), words_at(header[PAGES])
    page = first_page
    while page >= 0:
        starts[page] = start
        for offset in range(pages[page * PAGE_WORDS + FILL]):
            text[start] = tokens[page * PAGE + offset]
            start += 1
        page = pages[page * PAGE_WORDS + NEXT]
    return start


@njit
def freeze(
    address, text, starts, order, first_child, first_leaf, edges, counts, lengths, leaves, by_token
):
    """Write the nodes of a tree by level.

    Args:
        address: of the tree's header.
        text: [n] all documents.
        starts: where each page of the growing tree's text is in it.
        order: [N + 1] working memory.
        first_child: [N + 1] of each node; likewise the others up to `lengths`.
        first_leaf: see `first_child`.
        edges: see `first_child`.
        counts: see `first_child`.
        lengths: see `first_child`.
        leaves: [L] positions in the text.
        by_token: [V] zeros; the children of the root.

    Returns:
        How many nodes and leaves there are.
    """
    header = longs_at(address)
    nodes, entries = words_at(header[NODES]), words_at(header[ENTRIES])
    roots = words_at(header[ROOTS])
    num_nodes, num_leaves = 1, 0
    first_child[0] = 1
    first_leaf[0] = 0
    for place in range(header[ROOT_MASK] + 1):
        token, child = roots[2 * place] - 1, roots[2 * place + 1]
        if child > 0:
            order[num_nodes] = child
            by_token[token] = num_nodes
            num_nodes += 1
        elif child < 0:
            by_token[token] = ~(starts[~child // PAGE] + ~child % PAGE)
    number = 1
    while number < num_nodes:
        node = order[number]
        at = node * NODE_WORDS
        block, room = nodes[at + BLOCK], BLOCK_SIZES[class_of(nodes, node)]
        ref = nodes[at + REF]
        first_child[number] = num_nodes
        first_leaf[number] = num_leaves
        edges[number] = starts[ref // PAGE] + ref % PAGE
        counts[number] = nodes[at + COUNT]
        lengths[number] = length_of(nodes, node)
        for index in range(size_of(nodes, node)):
            child = entries[block + 2 * room + index]
            if child < 0:
                leaves[num_leaves] = starts[~child // PAGE] + ~child % PAGE
                num_leaves += 1
            else:
                order[num_nodes] = child
                num_nodes += 1
        if num_leaves - first_leaf[number] >= SORTED_FROM:
            unsorted = leaves[first_leaf[number] : num_leaves].copy()
            leaves[first_leaf[number] : num_leaves] = unsorted[np.argsort(text[unsorted])]
        number += 1
    first_child[num_nodes] = num_nodes
    first_leaf[num_nodes] = num_leaves
    return num_nodes, num_leaves
