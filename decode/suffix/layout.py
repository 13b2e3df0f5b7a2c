"""Where things stand in the memory of a suffix tree; `arena.Arena` owns it.

One tree is six arrays of 32-bit integers and a header of 64-bit ones with their addresses, their
capacities and the counters, so that a compiled function takes one argument for a whole tree.

- text: the tokens, in pages of 64; position p is token p % 64 of page p // 64.
- pages: per page the next and the previous one of its sequence (-1: none), the tokens in it, and
  the slot of the sequence that is still growing at its end (-1: none).
- nodes: per node its children's block, size and class of that block with the length of its edge,
  the position of its edge in the text, its count, and its parent. Node 0 is the root.
- entries: blocks of children: their tokens, then their counts, then what they are: a node, or a
  leaf, ~p for the text from position p on. Children stand by falling count.
- slots: per growing sequence how many of its last suffixes occur elsewhere too, its last and first
  page, its length, and for each of these suffixes, by length, the node where it ends.
- roots: the children of the root, as a hash table from token to what they are (0: none).
"""

import numpy as np

PAGE = 64  # tokens
PAGE_WORDS, NODE_WORDS, SLOT_WORDS = 4, 5, 4  # slots have the tree's depth besides

NEXT, PREV, FILL, GROWS = range(4)  # words of a page
BLOCK, SHAPE, REF, COUNT, PARENT = range(5)  # words of a node
MATCHED, LAST, FIRST, LENGTH = range(4)  # words of a slot; then the nodes of its suffixes

TEXT, PAGES, NODES, ENTRIES, SLOTS, ROOTS = range(6)  # header: addresses
CAPACITY = 6  # header: of each of them, in words
DEPTH, ROOT_MASK, TOKENS = range(12, 15)  # header: settings, then counters
NUM_PAGES, FREE_PAGE, NUM_NODES, FREE_NODE, NUM_ENTRIES, WIDEST, NUM_ROOTS = range(15, 22)
FROZEN = 22  # header: whether the tree is a frozen one
FREE_BLOCKS = 24  # header: first free block of each class

# A frozen tree never grows, and every byte counts: its nodes stand in the order of a walk by level,
# so that children of a node are neighbours and what is first of the next node is the end of this
# one. Header of such a tree: addresses of
#   the text, a document behind the other, each closed by a token that nobody has;
#   per node the first of its children and of its leaves, the position of its edge, its count (MANY:
#   it stands in a list of pairs), the length of its edge, the low 16 bits of its first token;
#   the leaves, as positions in the text;
#   the children of the root by token.
(
    FROZEN_TEXT, FIRST_CHILD, FIRST_LEAF, EDGES, COUNTS, LENGTHS, MARKS, LEAVES, BY_TOKEN,
    VOCABULARY, LARGE_COUNTS, NUM_LARGE,
) = range(12)  # fmt: skip
TOKEN_BYTES = 13  # 2 or 3; DEPTH stands where it always does
MANY, END = 0xFFFF, 0xFFFFFF  # END with 3 bytes, MANY with 2
SORTED_FROM = 17  # leaves of one node from which they stand by token, to be found by halving

# How many children a block holds, by class.
BLOCK_SIZES = np.array(
    [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    + [1 << power for power in range(11, 19)],
    dtype=np.int64,
)
MAX_DEPTH = 255  # the length of an edge has 8 bits
