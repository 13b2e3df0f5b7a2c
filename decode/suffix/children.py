"""Compiled functions on the children of a node: blocks of (token, count, node or leaf).

Children stand by falling count. Within one count the order is that of the reference
implementation (arctic-inference), which decides between continuations that are equally frequent.
"""

from decode.suffix.compiled import longs_at, njit, words_at
from decode.suffix.layout import (
    BLOCK,
    BLOCK_SIZES,
    FREE_BLOCKS,
    NODE_WORDS,
    NUM_ENTRIES,
    NUM_ROOTS,
    ROOT_MASK,
    ROOTS,
    SHAPE,
    WIDEST,
)


@njit
def shape(size, block_class, length):
    """The word of the number of children, the class of their block and the length of the edge."""
    return size << 13 | block_class << 8 | length


@njit
def size_of(nodes, node):
    """Children of a node."""
    return nodes[node * NODE_WORDS + SHAPE] >> 13


@njit
def class_of(nodes, node):
    """Class of the block of a node."""
    return nodes[node * NODE_WORDS + SHAPE] >> 8 & 31


@njit
def length_of(nodes, node):
    """Tokens on the edge to a node."""
    return nodes[node * NODE_WORDS + SHAPE] & 255


@njit
def new_block(header, entries, block_class):
    """A block of this class."""
    block = header[FREE_BLOCKS + block_class]
    if block >= 0:
        header[FREE_BLOCKS + block_class] = entries[block]
        return block
    block = header[NUM_ENTRIES]
    header[NUM_ENTRIES] += 3 * BLOCK_SIZES[block_class]
    header[WIDEST] = max(header[WIDEST], BLOCK_SIZES[block_class])
    return block


@njit
def free_block(header, entries, block, block_class):
    """Give a block back."""
    if block_class > 0:
        entries[block] = header[FREE_BLOCKS + block_class]
        header[FREE_BLOCKS + block_class] = block


@njit
def find(entries, block, size, token):
    """Which child begins with `token`, -1 if none does."""
    index = 0
    while index + 16 <= size:
        hits = 0
        for offset in range(16):  # without a way out: compared sixteen at a time
            hits |= entries[block + index + offset] == token
        if hits:
            break
        index += 16
    while index < size:
        if entries[block + index] == token:
            return index
        index += 1
    return -1


@njit
def add_child(header, nodes, entries, node, token, count, child):
    """Append a child; none has a lower count."""
    at = node * NODE_WORDS
    size, block_class = size_of(nodes, node), class_of(nodes, node)
    old, room = nodes[at + BLOCK], BLOCK_SIZES[block_class]
    block = old
    if size == room:
        bigger = max(block_class + 1, 2)
        block = new_block(header, entries, bigger)
        new_room = BLOCK_SIZES[bigger]
        for index in range(size):
            entries[block + index] = entries[old + index]
            entries[block + new_room + index] = entries[old + room + index]
            entries[block + 2 * new_room + index] = entries[old + 2 * room + index]
        free_block(header, entries, old, block_class)
        nodes[at + BLOCK] = block
        block_class, room = bigger, new_room
    entries[block + size] = token
    entries[block + room + size] = count
    entries[block + 2 * room + size] = child
    nodes[at + SHAPE] = shape(size + 1, block_class, length_of(nodes, node))


@njit
def remove_child(nodes, entries, node, index):
    """Close the gap that a child leaves."""
    at = node * NODE_WORDS
    size, block_class = size_of(nodes, node), class_of(nodes, node)
    block, room = nodes[at + BLOCK], BLOCK_SIZES[block_class]
    for field in range(3):
        for place in range(block + field * room + index, block + field * room + size - 1):
            entries[place] = entries[place + 1]
    nodes[at + SHAPE] = shape(size - 1, block_class, length_of(nodes, node))


@njit
def first_of(entries, counts, index, count):
    """The first of the children up to `index` that have this count."""
    low, high = 0, index
    while low < high:
        middle = (low + high) // 2
        if entries[counts + middle] > count:
            low = middle + 1
        else:
            high = middle
    return low


@njit
def last_of(entries, counts, index, size, count):
    """The last of the children from `index` on that have this count."""
    low, high = index, size - 1
    while low < high:
        middle = (low + high + 1) // 2
        if entries[counts + middle] < count:
            high = middle - 1
        else:
            low = middle
    return low


@njit
def move(entries, block, room, source, goal):
    """Take a child from one place to another; those between move by one."""
    for field in range(3):
        base = block + field * room
        moved = entries[base + source]
        if goal < source:
            for place in range(base + source, base + goal, -1):
                entries[place] = entries[place - 1]
        else:
            for place in range(base + source, base + goal):
                entries[place] = entries[place + 1]
        entries[base + goal] = moved


@njit
def count_up(entries, block, room, index):
    """One occurrence more of a child.

    It goes before all that had as few; if it was their first, also before those with as many.
    """
    counts = block + room
    count = entries[counts + index]
    entries[counts + index] = count + 1
    if index == 0 or entries[counts + index - 1] > count + 1:
        return
    goal = first_of(entries, counts, index - 1, entries[counts + index - 1])
    move(entries, block, room, index, goal)


@njit
def count_down(entries, block, room, size, index):
    """One occurrence less of a child: it goes behind those with as many as it had."""
    counts = block + room
    count = entries[counts + index]
    goal = last_of(entries, counts, index, size, count)
    move(entries, block, room, index, goal)
    entries[counts + goal] = count - 1


@njit
def find_root(header, token):
    """Where the child of the root that begins with `token` stands, or would."""
    roots = words_at(header[ROOTS])
    mask = header[ROOT_MASK]
    place = (token * 2654435761 >> 7) & mask
    while roots[2 * place] != 0 and roots[2 * place] != token + 1:
        place = (place + 1) & mask
    return place


@njit
def claim_root(header, roots, token):
    """`find_root`, and the place is the token's from now on."""
    place = find_root(header, token)
    if roots[2 * place] == 0:
        roots[2 * place] = token + 1
        header[NUM_ROOTS] += 1
    return place


@njit
def root_place(address, token):
    """`find_root` for who has no header at hand."""
    return find_root(longs_at(address), token)
