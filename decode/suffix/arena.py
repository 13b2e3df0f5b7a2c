"""The memory of one suffix tree: anonymous maps that grow without a copy."""

import mmap

import numpy as np

from decode.suffix.children import root_place
from decode.suffix.layout import (
    BLOCK_SIZES,
    CAPACITY,
    DEPTH,
    ENTRIES,
    FREE_BLOCKS,
    FREE_NODE,
    FREE_PAGE,
    NODE_WORDS,
    NODES,
    NUM_ENTRIES,
    NUM_NODES,
    NUM_PAGES,
    NUM_ROOTS,
    PAGE,
    PAGE_WORDS,
    PAGES,
    ROOT_MASK,
    ROOTS,
    SLOT_WORDS,
    SLOTS,
    TEXT,
    TOKENS,
    WIDEST,
)

LARGEST = (1 << 31) - 1  # words in an array
HUGE = 1 << 24  # bytes from which an array is worth pages of 2 MiB


class Arena:
    """Memory for one suffix tree.

    Args:
        depth: tokens of the longest string in the tree.
        slots: sequences that grow at once.
    """

    def __init__(self, depth: int, slots: int = 1):
        self.depth, self.num_slots = depth, slots
        self._maps: dict[int, mmap.mmap] = {}
        self.header = np.zeros(FREE_BLOCKS + len(BLOCK_SIZES), dtype=np.int64)
        self.address = self.header.ctypes.data
        self.header[DEPTH] = depth
        self.header[ROOT_MASK] = 1023
        words = {
            TEXT: 1 << 12,
            PAGES: 1 << 8,
            NODES: 1 << 13,
            ENTRIES: 1 << 15,
            SLOTS: slots * (SLOT_WORDS + depth + 1),
            ROOTS: 2 << 10,
        }
        for array, size in words.items():
            self._resize(array, size)
        self.clear()

    def clear(self) -> None:
        """Forget everything; the memory stays."""
        header = self.header
        header[TOKENS:] = 0
        header[[FREE_PAGE, FREE_NODE]] = -1
        header[NUM_NODES] = 1  # the root
        header[WIDEST] = 8
        header[FREE_BLOCKS:] = -1
        self.words(ROOTS)[:] = 0
        self.words(NODES)[:NODE_WORDS] = 0

    def words(self, array: int) -> np.ndarray:
        """An array as numpy sees it; it must be gone before the arena grows."""
        return np.frombuffer(self._maps[array], dtype=np.int32)

    @property
    def num_bytes(self) -> int:
        """Memory that is in use: what was written to."""
        header = self.header
        words = (
            header[NUM_PAGES] * (PAGE + PAGE_WORDS)
            + header[NUM_NODES] * NODE_WORDS
            + header[NUM_ENTRIES]
            + header[CAPACITY + SLOTS]
            + header[CAPACITY + ROOTS]
        )
        return int(words) * 4

    def grow(self) -> None:
        """Make room for more tokens: half as much again of what is full."""
        header = self.header
        suffixes = self.depth + 1
        needed = {
            TEXT: (header[NUM_PAGES] + 1) * PAGE,
            PAGES: (header[NUM_PAGES] + 1) * PAGE_WORDS,
            NODES: (header[NUM_NODES] + suffixes) * NODE_WORDS,
            ENTRIES: header[NUM_ENTRIES] + suffixes * 6 * header[WIDEST],
        }
        for array, words in needed.items():
            if words > header[CAPACITY + array]:
                self._resize(array, max(int(words), min(int(words) * 3 // 2, LARGEST)))
        if 2 * header[NUM_ROOTS] >= header[ROOT_MASK]:
            self._rehash()

    def _resize(self, array: int, words: int) -> None:
        if words > LARGEST:
            raise OverflowError(
                f"the suffix index is full with {self.header[TOKENS]} tokens, for its places have "
                "32 bits; give max_cached_tokens, or split the past"
            )
        size = -(-words * 4 // mmap.PAGESIZE) * mmap.PAGESIZE
        old = self._maps.get(array)
        if old is None:
            self._maps[array] = _reserve(size)
        else:
            try:
                old.resize(size)
            except (SystemError, OSError):  # a system that cannot remap
                new = _reserve(size)
                new[: len(old)] = old[:]
                self._maps[array] = new
        if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):  # a look-up is a few far reads
            self._maps[array].madvise(mmap.MADV_HUGEPAGE)
        view = self.words(array)
        self.header[array] = view.ctypes.data
        self.header[CAPACITY + array] = size // 4

    def add_slots(self, slots: int) -> None:
        """Room for so many growing sequences."""
        self._resize(SLOTS, slots * (SLOT_WORDS + self.depth + 1))
        self.num_slots = slots

    def _rehash(self) -> None:
        old = self.words(ROOTS).reshape(-1, 2).copy()
        kept = old[old[:, 1] != 0]
        places = 1 << int(4 * len(kept) + 256).bit_length()
        self._resize(ROOTS, 2 * places)
        self.header[ROOT_MASK] = places - 1
        self.words(ROOTS)[:] = 0
        self.header[NUM_ROOTS] = 0
        for key, child in kept:
            place = root_place(self.address, key - 1)
            self.words(ROOTS)[[2 * place, 2 * place + 1]] = key, child
            self.header[NUM_ROOTS] += 1


def _reserve(size: int) -> mmap.mmap:
    """Memory that is taken when it is written to."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
