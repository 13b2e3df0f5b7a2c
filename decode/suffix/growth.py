"""Compiled functions that add sequences to a suffix tree and take them out again.

The tree holds every string of up to `depth` tokens that occurs, with the number of times it does
(the suffix tree of SuffixDecoding, Oliaro et al. 2024, section 3). A string that occurs once is a
leaf: a position in the text, which needs no memory of its own and no work when its sequence grows.
Only the suffixes of a sequence that occur elsewhere too move on with a new token: the slot of the
sequence holds the nodes where they end. Nodes refer to their most recent occurrence, so the text of
a sequence may go once all that were there when it ended are gone.
"""

from decode.suffix.children import (
    add_child,
    claim_root,
    class_of,
    count_down,
    count_up,
    find,
    find_root,
    free_block,
    length_of,
    remove_child,
    shape,
    size_of,
)
from decode.suffix.compiled import longs_at, njit, words_at
from decode.suffix.layout import (
    BLOCK,
    BLOCK_SIZES,
    CAPACITY,
    COUNT,
    DEPTH,
    ENTRIES,
    FIRST,
    FREE_NODE,
    GROWS,
    LAST,
    LENGTH,
    MATCHED,
    NODE_WORDS,
    NODES,
    NUM_ENTRIES,
    NUM_NODES,
    NUM_PAGES,
    NUM_ROOTS,
    PAGE,
    PAGE_WORDS,
    PAGES,
    PARENT,
    REF,
    ROOT_MASK,
    ROOTS,
    SHAPE,
    SLOT_WORDS,
    SLOTS,
    TEXT,
    TOKENS,
    WIDEST,
)
from decode.suffix.text import back, forward, push_token, step


@njit
def new_node(header, nodes, ref, length, count, parent):
    """A node without children; its number."""
    node = header[FREE_NODE]
    if node >= 0:
        header[FREE_NODE] = nodes[node * NODE_WORDS + BLOCK]
    else:
        node = header[NUM_NODES]
        header[NUM_NODES] += 1
    at = node * NODE_WORDS
    nodes[at + BLOCK] = 0
    nodes[at + SHAPE] = shape(0, 0, length)
    nodes[at + REF] = ref
    nodes[at + COUNT] = count
    nodes[at + PARENT] = parent
    return node


@njit
def free_node(header, nodes, entries, node):
    """Give a node and its block back."""
    at = node * NODE_WORDS
    free_block(header, entries, nodes[at + BLOCK], class_of(nodes, node))
    nodes[at + BLOCK] = header[FREE_NODE]
    header[FREE_NODE] = node


@njit
def free_chain(header, nodes, entries, node):
    """Give back a node where nothing ends any more, and those below it."""
    while node > 0:
        at = node * NODE_WORDS
        block, room = nodes[at + BLOCK], BLOCK_SIZES[class_of(nodes, node)]
        child = entries[block + 2 * room] if size_of(nodes, node) > 0 else 0
        free_node(header, nodes, entries, node)
        node = child


@njit
def replace_child(header, nodes, entries, roots, parent, token, child):
    """The child of `parent` that begins with `token` is `child` from now on."""
    if parent == 0:
        roots[2 * find_root(header, token) + 1] = child
    else:
        block = nodes[parent * NODE_WORDS + BLOCK]
        index = find(entries, block, size_of(nodes, parent), token)
        entries[block + 2 * BLOCK_SIZES[class_of(nodes, parent)] + index] = child


@njit
def meet(header, pages, slots, end, length, node):
    """Somebody came to the end of a leaf: a suffix that ends there at present is no leaf any more.

    A leaf that is as deep as the tree ends although its sequence goes on.
    """
    slot = pages[end // PAGE * PAGE_WORDS + GROWS]
    if slot >= 0 and step(pages, end) < 0:
        at = slot * (SLOT_WORDS + header[DEPTH] + 1)
        slots[at + SLOT_WORDS + length] = node
        slots[at + MATCHED] = max(slots[at + MATCHED], length)


@njit
def split_leaf(header, text, pages, nodes, entries, slots, parent, leaf, depth, position):
    """A second occurrence of the first token of a leaf: a node, with the rest of the leaf below."""
    node = new_node(header, nodes, position, 1, 2, parent)
    rest = step(pages, leaf) if depth + 1 < header[DEPTH] else -1
    if rest >= 0:
        add_child(header, nodes, entries, node, text[rest], 1, ~rest)
    else:
        meet(header, pages, slots, leaf, depth + 1, node)
    return node


@njit
def enter(header, text, pages, nodes, entries, parent, child, position):
    """One occurrence more of the first token of the edge to `child`: the node where it ends."""
    at = child * NODE_WORDS
    length = length_of(nodes, child)
    if length == 1:
        nodes[at + COUNT] += 1
        nodes[at + REF] = position
        return child
    count = nodes[at + COUNT]
    node = new_node(header, nodes, position, 1, count + 1, parent)
    rest = step(pages, nodes[at + REF])
    nodes[at + REF] = rest
    nodes[at + SHAPE] -= 1
    nodes[at + PARENT] = node
    add_child(header, nodes, entries, node, text[rest], count, child)
    return node


@njit
def follow(header, text, pages, nodes, entries, slots, roots, node, depth, position):
    """The only occurrence that ends at `node` goes on like all the others: the node goes with it.

    Without this a node would stay behind at every token of a repeated text.
    """
    at = node * NODE_WORDS
    block = nodes[at + BLOCK]
    room = BLOCK_SIZES[class_of(nodes, node)]
    child = entries[block + 2 * room]
    length = length_of(nodes, node)
    if child < 0:
        rest = step(pages, ~child) if depth + 1 < header[DEPTH] else -1
        if rest >= 0:
            entries[block] = text[rest]
            entries[block + 2 * room] = ~rest
            nodes[at + SHAPE] += 1
        else:
            nodes[at + SHAPE] = shape(0, class_of(nodes, node), length + 1)
            meet(header, pages, slots, ~child, depth + 1, node)
        nodes[at + REF] = back(pages, position, length)
        return node
    below = child * NODE_WORDS
    if length_of(nodes, child) == 1:
        nodes[below + COUNT] += 1
        nodes[below + SHAPE] += length
        nodes[below + REF] = back(pages, position, length)
        parent = nodes[at + PARENT]
        nodes[below + PARENT] = parent
        token = text[nodes[below + REF]]
        replace_child(header, nodes, entries, roots, parent, token, child)
        free_node(header, nodes, entries, node)
        return child
    rest = step(pages, nodes[below + REF])
    nodes[below + REF] = rest
    nodes[below + SHAPE] -= 1
    entries[block] = text[rest]
    nodes[at + SHAPE] += 1
    nodes[at + REF] = back(pages, position, length)
    return node


@njit
def advance(header, text, pages, nodes, entries, slots, roots, node, depth, position):
    """A suffix of `depth` tokens that ends at `node` takes the token at `position`.

    Returns:
        The node where it ends then, or 0 if it occurs nowhere else any more.
    """
    token = text[position]
    if node == 0:
        place = claim_root(header, roots, token)
        child = roots[2 * place + 1]
        if child == 0:
            roots[2 * place + 1] = ~position
            return 0
        if child < 0:
            child = split_leaf(header, text, pages, nodes, entries, slots, 0, ~child, 0, position)
        else:
            child = enter(header, text, pages, nodes, entries, 0, child, position)
        roots[2 * place + 1] = child
        return child
    at = node * NODE_WORDS
    block, size = nodes[at + BLOCK], size_of(nodes, node)
    index = find(entries, block, size, token)
    if index < 0:
        add_child(header, nodes, entries, node, token, 1, ~position)
        return 0
    room = BLOCK_SIZES[class_of(nodes, node)]
    if nodes[at + COUNT] == entries[block + room + index] + 1:
        return follow(header, text, pages, nodes, entries, slots, roots, node, depth, position)
    child = entries[block + 2 * room + index]
    if child < 0:
        child = split_leaf(
            header, text, pages, nodes, entries, slots, node, ~child, depth, position
        )
    else:
        child = enter(header, text, pages, nodes, entries, node, child, position)
    entries[block + 2 * room + index] = child
    count_up(entries, block, room, index)
    return child


@njit
def has_room(header):
    """Whether the arena has room for one token more, however the tree grows by it."""
    suffixes = header[DEPTH] + 1
    return (
        header[NUM_PAGES] * PAGE < header[CAPACITY + TEXT]
        and header[NUM_PAGES] * PAGE_WORDS < header[CAPACITY + PAGES]
        and (header[NUM_NODES] + suffixes) * NODE_WORDS <= header[CAPACITY + NODES]
        and header[NUM_ENTRIES] + suffixes * 6 * header[WIDEST] <= header[CAPACITY + ENTRIES]
        and 2 * header[NUM_ROOTS] < header[ROOT_MASK]
    )


@njit
def extend(address, slot, tokens, start):
    """The sequence of `slot` grows by `tokens` [n] (int32) from `start` on.

    `address` is that of the tree's header, here and in all that is called from Python.

    Returns:
        How many of them it has taken; fewer than n where the arena must grow first.
    """
    header = longs_at(address)
    text = words_at(header[TEXT])
    pages = words_at(header[PAGES])
    nodes = words_at(header[NODES])
    entries = words_at(header[ENTRIES])
    slots = words_at(header[SLOTS])
    roots = words_at(header[ROOTS])
    depth = header[DEPTH]
    at = slot * (SLOT_WORDS + depth + 1)
    for index in range(start, len(tokens)):
        if not has_room(header):
            return index
        position = push_token(header, text, pages, slots[at + LAST], slot, tokens[index])
        slots[at + LAST] = position // PAGE
        if slots[at + FIRST] < 0:
            slots[at + FIRST] = position // PAGE
        slots[at + LENGTH] += 1
        matched = 0
        for length in range(min(slots[at + MATCHED], depth - 1), -1, -1):
            node = slots[at + SLOT_WORDS + length]
            node = advance(
                header, text, pages, nodes, entries, slots, roots, node, length, position
            )
            if node != 0:
                slots[at + SLOT_WORDS + length + 1] = node
                matched = max(matched, length + 1)
        slots[at + MATCHED] = matched
    return len(tokens)


@njit
def extend_both(local, shared, slot, tokens):
    """The output of a request grows, in its own tree and in the shared one (slot -1: not there)."""
    taken = extend(local, 0, tokens, 0)
    return taken, extend(shared, slot, tokens, 0) if slot >= 0 else len(tokens)


@njit
def open_slot(address, slot):
    """A new sequence grows in `slot`."""
    header = longs_at(address)
    slots = words_at(header[SLOTS])
    at = slot * (SLOT_WORDS + header[DEPTH] + 1)
    slots[at + MATCHED] = 0
    slots[at + LAST] = -1
    slots[at + FIRST] = -1
    slots[at + LENGTH] = 0
    slots[at + SLOT_WORDS] = 0  # the empty suffix ends at the root


@njit
def close_slot(address, slot):
    """The sequence in `slot` grows no more; its first page and its length."""
    header = longs_at(address)
    slots = words_at(header[SLOTS])
    pages = words_at(header[PAGES])
    at = slot * (SLOT_WORDS + header[DEPTH] + 1)
    if slots[at + LAST] >= 0:
        pages[slots[at + LAST] * PAGE_WORDS + GROWS] = -1
    return slots[at + FIRST], slots[at + LENGTH]


@njit
def tidy(header, text, pages, nodes, entries, roots, node):
    """Join a node with its only child, where nothing ends between them."""
    at = node * NODE_WORDS
    if node == 0 or size_of(nodes, node) != 1:
        return
    block, room = nodes[at + BLOCK], BLOCK_SIZES[class_of(nodes, node)]
    if nodes[at + COUNT] != entries[block + room]:
        return
    child, length, parent = entries[block + 2 * room], length_of(nodes, node), nodes[at + PARENT]
    token = text[nodes[at + REF]]
    if child < 0:
        child = ~back(pages, ~child, length)
    else:
        below = child * NODE_WORDS
        nodes[below + SHAPE] += length
        nodes[below + REF] = back(pages, nodes[below + REF], length)
        nodes[below + PARENT] = parent
    replace_child(header, nodes, entries, roots, parent, token, child)
    free_node(header, nodes, entries, node)


@njit
def remove(address, position, count):
    """Take the strings that start at `count` positions from `position` on out of the tree.

    Returns:
        The position behind them, -1 at the end of the sequence; its text stays.
    """
    header = longs_at(address)
    text = words_at(header[TEXT])
    pages = words_at(header[PAGES])
    nodes = words_at(header[NODES])
    entries = words_at(header[ENTRIES])
    roots = words_at(header[ROOTS])
    for _ in range(count):
        node, depth, at = 0, 0, position
        while at >= 0 and depth < header[DEPTH]:
            token = text[at]
            place, block, room, index = 0, 0, 0, 0
            if node == 0:
                place = 2 * find_root(header, token) + 1
                child = roots[place]
            else:
                block = nodes[node * NODE_WORDS + BLOCK]
                room = BLOCK_SIZES[class_of(nodes, node)]
                index = find(entries, block, size_of(nodes, node), token)
                child = entries[block + 2 * room + index]
            gone = child < 0
            if not gone:
                nodes[child * NODE_WORDS + COUNT] -= 1
                if nodes[child * NODE_WORDS + COUNT] == 0:
                    free_chain(header, nodes, entries, child)
                    gone = True
            if gone:
                if node == 0:
                    roots[place] = 0
                else:
                    remove_child(nodes, entries, node, index)
                break
            if node != 0:
                count_down(entries, block, room, size_of(nodes, node), index)
            length = length_of(nodes, child)
            at = forward(pages, at, length)
            depth += length
            node = child
        tidy(header, text, pages, nodes, entries, roots, node)
        header[TOKENS] -= 1
        position = step(pages, position)
        if position < 0:
            break
    return position
