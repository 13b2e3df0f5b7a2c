"""A suffix tree on disk: mapped into memory, shared by processes, never changed.

The file: 8 bytes of magic, the length and the checksum of a JSON header (two 32-bit integers), that
header, and the arrays it lists, each with its place, its size and its checksum. A new file replaces
an old one whole; the old one is kept beside it until the next time, as NAME.previous.
"""

import json
import mmap
import os
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decode.suffix.arena import Arena
from decode.suffix.freezing import copy_text, freeze
from decode.suffix.layout import (
    BY_TOKEN,
    COUNTS,
    DEPTH,
    EDGES,
    END,
    FIRST_CHILD,
    FIRST_LEAF,
    FROZEN,
    FROZEN_TEXT,
    LARGE_COUNTS,
    LEAVES,
    LENGTHS,
    MANY,
    MARKS,
    NUM_LARGE,
    NUM_NODES,
    NUM_PAGES,
    PAGE,
    TOKEN_BYTES,
    TOKENS,
    VOCABULARY,
)

MAGIC, VERSION = b"DRAFTSUF", 1
HEAD = struct.Struct("<8sII")
SECTIONS = {
    "text": FROZEN_TEXT,
    "first_child": FIRST_CHILD,
    "first_leaf": FIRST_LEAF,
    "edges": EDGES,
    "counts": COUNTS,
    "lengths": LENGTHS,
    "marks": MARKS,
    "leaves": LEAVES,
    "by_token": BY_TOKEN,
    "large_counts": LARGE_COUNTS,
}


class FrozenTree:
    """An index that was written by `write`, mapped into memory.

    Attributes:
        depth: tokens of the longest string.
        num_tokens: in all documents.
        num_bytes: of the file.
        address: of the header that compiled code reads.
    """

    def __init__(self, path: Path, *, tokenizer: str | None = None, verify: bool = True):
        """Map the index at `path`.

        Args:
            path: of the file.
            tokenizer: hash of the tokenizer whose ids are asked for; None does not look.
            verify: compare the checksums, which reads the whole file.

        Raises:
            ValueError: the file is no index, cut off, damaged, or of another version or tokenizer.
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            self.num_bytes = os.fstat(file.fileno()).st_size
            if self.num_bytes < HEAD.size:
                raise ValueError(f"{path} is no suffix index: it has {self.num_bytes} bytes")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        about = self._read_about(path)
        if tokenizer is not None and about["tokenizer"] not in ("", tokenizer):
            raise ValueError(
                f"{path} holds ids of another tokenizer ({about['tokenizer']}, asked for "
                f"{tokenizer}); build an index with this one"
            )
        self.depth, self.num_tokens = int(about["depth"]), int(about["tokens"])
        self.header = np.zeros(FROZEN + 1, dtype=np.int64)
        self.address = self.header.ctypes.data
        self.header[[FROZEN, DEPTH, TOKEN_BYTES]] = 1, self.depth, about["token_bytes"]
        start = np.frombuffer(self._map, dtype=np.uint8).ctypes.data
        for name, (offset, size, checksum) in about["sections"].items():
            if offset + size > self.num_bytes:
                raise ValueError(
                    f"{path} is cut off: {self.num_bytes} bytes, the array {name!r} ends at "
                    f"{offset + size}"
                )
            if verify and zlib.crc32(memoryview(self._map)[offset : offset + size]) != checksum:
                raise ValueError(f"{path} is damaged: the array {name!r} has another checksum")
            self.header[SECTIONS[name]] = start + offset
        self._sections = about["sections"]
        self.header[VOCABULARY] = self._sections["by_token"][1] // 4
        self.header[NUM_LARGE] = self._sections["large_counts"][1] // 16

    def _read_about(self, path: Path) -> dict[str, Any]:
        magic, size, checksum = HEAD.unpack_from(self._map)
        if magic != MAGIC:
            raise ValueError(f"{path} is no suffix index")
        text = self._map[HEAD.size : HEAD.size + size]
        if len(text) < size or zlib.crc32(text) != checksum:
            raise ValueError(f"{path} is damaged: its header is cut off or has another checksum")
        about: dict[str, Any] = json.loads(text)
        if about["version"] != VERSION:
            raise ValueError(
                f"{path} has version {about['version']}, this is version {VERSION}; build it again"
            )
        return about

    def documents(self) -> Iterator[NDArray[np.int32]]:
        """What it was built of."""
        offset, size, _ = self._sections["text"]
        width = int(self.header[TOKEN_BYTES])
        stored = np.frombuffer(self._map, np.uint8, size, offset).reshape(-1, width)
        whole = np.zeros((len(stored), 4), dtype=np.uint8)
        whole[:, :width] = stored
        text = whole.view(np.int32)[:, 0]
        start = 0
        for stop in np.flatnonzero(text == (MANY if width == 2 else END)):
            yield text[start:stop]
            start = int(stop) + 1


def open_latest(path: Path, *, tokenizer: str | None = None, verify: bool = True) -> FrozenTree:
    """The index at `path`, or the one before it where this one cannot be used.

    Raises:
        ValueError: neither can be used; the message is about the first.
        OSError: neither can be read.
    """
    try:
        return FrozenTree(path, tokenizer=tokenizer, verify=verify)
    except (ValueError, OSError) as error:
        with suppress(ValueError, OSError):
            earlier = FrozenTree(previous(path), tokenizer=tokenizer, verify=verify)
            print(f"{error}; {previous(path)} is taken instead", file=sys.stderr)
            return earlier
        raise


def previous(path: Path) -> Path:
    """Where the file is kept that `path` replaced."""
    return path.with_name(path.name + ".previous")


def write(path: Path, arena: Arena, first_pages: Iterable[int], *, tokenizer: str = "") -> None:
    """Write a growing tree down; the file appears whole or not at all.

    Args:
        path: of the file.
        arena: of the tree.
        first_pages: of every text that a node may refer to.
        tokenizer: hash of the tokenizer of the ids, "" for unknown.

    Raises:
        OSError: the disk is full or the folder cannot be written to; an earlier file is intact.
        ValueError: token ids above 2**24 - 2.
    """
    sections = _sections(arena, [page for page in first_pages if page >= 0])
    about: dict[str, Any] = {
        "version": VERSION,
        "depth": arena.depth,
        "tokens": int(arena.header[TOKENS]),
        "token_bytes": sections["text"].shape[1],
        "tokenizer": tokenizer,
        "sections": dict.fromkeys(sections, (2**40, 2**40, 2**32)),
    }
    offset = -(-(HEAD.size + len(json.dumps(about))) // 64) * 64  # no less than it will take
    for name, array in sections.items():
        about["sections"][name] = (offset, array.nbytes, zlib.crc32(array.data))
        offset = -(-(offset + array.nbytes) // 64) * 64
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            text = json.dumps(about).encode()
            file.write(HEAD.pack(MAGIC, len(text), zlib.crc32(text)) + text)
            for name, array in sections.items():
                file.seek(about["sections"][name][0])
                file.write(array.data)
            file.truncate(offset)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            path.replace(previous(path))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _sections(arena: Arena, first_pages: list[int]) -> Mapping[str, NDArray[Any]]:
    num_pages, num_nodes = int(arena.header[NUM_PAGES]), int(arena.header[NUM_NODES])
    text = np.full(num_pages * PAGE + len(first_pages) + 1, -1, dtype=np.int32)
    starts = np.zeros(num_pages, dtype=np.int64)
    size = 0
    for page in first_pages:
        size = copy_text(arena.address, page, text, size, starts) + 1
    text = text[:size]
    vocabulary = int(text.max(initial=-1)) + 1
    if vocabulary > END:
        raise ValueError(
            f"an index cannot hold the token id {vocabulary - 1}; {END - 1} is the last"
        )
    by_token = np.zeros(vocabulary, dtype=np.int32)
    order, first_child, first_leaf, edges = np.zeros((4, num_nodes + 1), dtype=np.int32)
    counts = np.zeros(num_nodes + 1, dtype=np.int64)
    lengths = np.zeros(num_nodes + 1, dtype=np.uint8)
    leaves = np.zeros(size, dtype=np.int32)
    nodes, num_leaves = freeze(
        arena.address, text, starts, order, first_child, first_leaf, edges, counts, lengths,
        leaves, by_token,
    )  # fmt: skip
    large = np.flatnonzero(counts[:nodes] >= MANY)
    edges, counts = edges[:nodes], counts[:nodes]
    marks = (text[edges] & 0xFFFF).astype(np.uint16) if size else edges.astype(np.uint16)
    return {
        "text": _packed(text, 2 if vocabulary < MANY else 3),
        "first_child": first_child[: nodes + 1],
        "first_leaf": first_leaf[: nodes + 1],
        "edges": edges,
        "counts": np.minimum(counts, MANY).astype(np.uint16),
        "lengths": lengths[:nodes],
        "marks": marks,
        "leaves": leaves[:num_leaves],
        "by_token": by_token,
        "large_counts": np.stack([large, counts[large]], axis=1).astype(np.int64),
    }


def _packed(text: NDArray[np.int32], width: int) -> NDArray[np.uint8]:
    """[n, width] the lower bytes of each token; those of -1 are all ones."""
    return np.ascontiguousarray(text.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width])
