"""The texts of many requests as drafts for the next ones: SuffixDecoding's two trees."""

import heapq
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, KeysView, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from decode.suffix.arena import Arena
from decode.suffix.compiled import compiling
from decode.suffix.continuations import most_frequent
from decode.suffix.drafts import SuffixDraft, WorkingMemory
from decode.suffix.freezing import copy_text
from decode.suffix.frozen import FrozenTree, open_latest, write
from decode.suffix.growth import close_slot, extend, extend_both, open_slot, remove
from decode.suffix.layout import FIRST, MAX_DEPTH, NUM_PAGES, PAGE, SLOT_WORDS, SLOTS, TOKENS
from decode.suffix.lookup import speculate_both
from decode.suffix.text import release_pages

Tokens = np.ndarray | Sequence[int]
SOURCES = ("both", "own", "past")


@dataclass(slots=True)
class _Document:
    """The output of one request in the shared tree: `slot` while it grows, -1 afterwards."""

    started: int
    slot: int
    ended: int = -1
    first_page: int = -1
    length: int = 0
    position: int = -1  # of the strings that are to be taken out next


class _Unnamed:
    """The name of a request that has none."""


class SuffixDecodingCache:
    """Prompt and output of active requests, and the outputs of past ones.

    Every request has its own tree of prompt and output; the outputs of all are in one shared tree.
    The calls are those of arctic-inference's class of this name, whose parameters give the same
    drafts here, and may come from any thread.

    Args:
        max_tree_depth: tokens of context and draft together, at most 255.
        max_cached_requests: outputs kept, the oldest go first; -1 for all, 0 for none.
        max_cached_tokens: tokens of outputs kept, likewise; -1 for all. The surplus goes a few
            tokens at a time as new ones come, so that no call waits for it.

    Raises:
        ValueError: limits out of range.
    """

    def __init__(
        self,
        max_tree_depth: int = 64,
        max_cached_requests: int = -1,
        max_cached_tokens: int = -1,
    ):
        if not 1 <= max_tree_depth <= MAX_DEPTH:
            raise ValueError(f"max_tree_depth must lie in 1..{MAX_DEPTH}, got {max_tree_depth}")
        compile_all()
        self._depth = max_tree_depth
        self._max_requests, self._max_tokens = max_cached_requests, max_cached_tokens
        self._lock = RLock()
        self._frozen: FrozenTree | None = None
        self._shared = Arena(max_tree_depth, slots=8)
        self._free_slots = list(range(7, -1, -1))
        self._local: dict[Hashable, Arena] = {}
        self._spare: list[Arena] = []
        # Ordered dictionaries: their first key is at hand however many went before it.
        self._cached: OrderedDict[Hashable, _Document] = OrderedDict()
        self._started = 0
        self._leaving: deque[_Document] = deque()  # taken out bit by bit
        # By start, whose strings are not all taken out.
        self._present: OrderedDict[int, _Document] = OrderedDict()
        self._released: list[tuple[int, int]] = []  # (ended, first page), a heap
        self._room = WorkingMemory(64)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        tokenizer: str | None = None,
        verify: bool = True,
        max_cached_requests: int = -1,
        max_cached_tokens: int = -1,
    ) -> "SuffixDecodingCache":
        """A cache over what `save` wrote, which is mapped into memory and shared by processes.

        Drafts come from the best of the request, the outputs from now on, and the file. If a crash
        left a broken file, the one before it is taken, and that is said.

        Args:
            path: of the file.
            tokenizer: hash of the tokenizer whose ids are asked for; None does not look.
            verify: compare the checksums, which reads the whole file.
            max_cached_requests: new outputs kept.
            max_cached_tokens: of new outputs.

        Raises:
            ValueError: the file is no index, damaged, or of another version or tokenizer.
            OSError: it cannot be read.
        """
        frozen = open_latest(Path(path), tokenizer=tokenizer, verify=verify)
        cache = cls(frozen.depth, max_cached_requests, max_cached_tokens)
        cache._frozen = frozen
        return cache

    def save(self, path: str | Path, *, tokenizer: str = "") -> None:
        """Write all outputs, those of an opened file included, to a file for `open`.

        The file appears whole or not at all; one that it replaces is kept as NAME.previous.

        Args:
            path: of the file.
            tokenizer: hash of the tokenizer of the ids.

        Raises:
            OSError: the disk is full or the folder cannot be written to.
        """
        with self._lock:
            if self._frozen is None:
                pages = [self._first_page(document) for document in self._present.values()]
                pages += [page for _, page in self._released]
                write(Path(path), self._shared, pages, tokenizer=tokenizer)
                return
            whole = SuffixDecodingCache(self._depth)
            for document in [*self._frozen.documents(), *self._documents()]:
                whole.add_output(document)
            whole.save(path, tokenizer=tokenizer)

    def add_output(self, token_ids: Tokens) -> None:
        """Keep an output without a request: to fill a cache with what is there already."""
        with self._lock:
            tokens = as_text(token_ids)
            document = self._open(_Unnamed())
            try:
                self._extend(self._shared, document.slot, tokens, 0)
            finally:
                self._close(document)
            if self._leaving or self._max_tokens >= 0:
                self._make_way(64 + 4 * len(tokens))

    @property
    def max_tree_depth(self) -> int:
        """Tokens of context and draft together."""
        return self._depth

    @property
    def max_cached_requests(self) -> int:
        """Outputs kept; -1 for all."""
        return self._max_requests

    @property
    def active_requests(self) -> KeysView[Hashable]:
        """Started and not yet stopped."""
        return self._local.keys()

    @property
    def cached_requests(self) -> KeysView[Hashable]:
        """Those whose output is in the shared tree, the oldest first."""
        return self._cached.keys()

    @property
    def num_tokens(self) -> int:
        """Tokens in the shared tree."""
        return int(self._shared.header[TOKENS])

    @property
    def num_bytes(self) -> int:
        """Memory of the shared tree."""
        return self._shared.num_bytes

    def start_request(self, req_id: Hashable, prompt_token_ids: Tokens) -> None:
        """A request begins; its output takes the place of one of the same name.

        Raises:
            ValueError: it is active already.
        """
        with self._lock:
            if req_id in self._local:
                raise ValueError(f"request {req_id!r} is active already; stop it first")
            tokens = as_text(prompt_token_ids)
            arena = self._spare.pop() if self._spare else Arena(self._depth)
            arena.clear()
            open_slot(arena.address, 0)
            self._local[req_id] = arena
            self._extend(arena, 0, tokens, 0)
            if self._max_requests == 0:
                return
            if req_id in self._cached:
                self.evict_cached_response(req_id)
            self._open(req_id)

    def add_active_response(self, req_id: Hashable, token_ids: Tokens) -> None:
        """The output of a request grows.

        Raises:
            ValueError: it is not active.
        """
        with self._lock:
            arena = self._local.get(req_id)
            if arena is None:
                raise ValueError(f"request {req_id!r} is not active; start it first")
            tokens = as_text(token_ids)
            document = self._cached.get(req_id)
            slot = -1 if document is None else document.slot
            taken, shared = extend_both(arena.address, self._shared.address, slot, tokens)
            if taken < len(tokens):
                self._extend(arena, 0, tokens, taken)
            if shared < len(tokens):
                self._extend(self._shared, slot, tokens, shared)
            if self._leaving or self._max_tokens >= 0:
                self._make_way(64 + 4 * len(tokens))

    def stop_request(self, req_id: Hashable) -> None:
        """A request is finished: its prompt is forgotten, its output stays until evicted.

        Raises:
            ValueError: it is not active.
        """
        with self._lock:
            if req_id not in self._local:
                raise ValueError(f"request {req_id!r} is not active")
            self._spare.append(self._local.pop(req_id))
            document = self._cached.get(req_id)
            if document is not None:
                self._close(document)

    def evict_cached_response(self, req_id: Hashable) -> None:
        """Take the output of a request out of the shared tree, now.

        Raises:
            ValueError: there is none.
        """
        with self._lock:
            if req_id not in self._cached:
                raise ValueError(f"request {req_id!r} is not cached")
            self._take_out(self._leave(req_id), None)

    def speculate(
        self,
        req_id: Hashable,
        context: Tokens,
        max_spec_tokens: int | None = None,
        max_spec_factor: float = 1.0,
        max_spec_offset: float = 0.0,
        min_token_prob: float = 0.1,
        use_tree_spec: bool = False,
        sources: str = "both",
    ) -> SuffixDraft:
        """The draft of the greatest score behind `context`.

        Args:
            req_id: an active request.
            context: the last tokens of its prompt and output; a text of n tokens is matched by at
                most n - 1 of them.
            max_spec_tokens: tokens per draft; None for as many as the trees are deep.
            max_spec_factor: tokens per matched token.
            max_spec_offset: tokens besides.
            min_token_prob: least estimated chance of acceptance of a drafted token.
            use_tree_spec: draft a tree instead of a chain.
            sources: "own" looks in the request's prompt and output only, "past" in the outputs of
                all requests only.

        Raises:
            ValueError: the request is not active, or there is no such source.
        """
        if sources not in SOURCES:
            raise ValueError(f"sources must be one of {', '.join(SOURCES)}, got {sources!r}")
        with self._lock:
            arena = self._local.get(req_id)
            if arena is None:
                raise ValueError(f"request {req_id!r} is not active; start it first")
            tokens = as_tokens(context)[-self._depth :]
            most = self._depth if max_spec_tokens is None else max_spec_tokens
            self._reserve(most)
            document = self._cached.get(req_id)
            found = speculate_both(
                arena.address,
                self._shared.address,
                0 if self._frozen is None else self._frozen.address,
                -1 if document is None else document.slot,
                tokens,
                most,
                max_spec_factor,
                max_spec_offset,
                np.float32(min_token_prob),
                use_tree_spec,
                sources != "past",
                sources != "own",
                *self._room.all,
            )
            return self._room.draft(*found)

    def continuations(
        self,
        context: Tokens,
        *,
        longest: int,
        shortest: int = 1,
        length: int,
        max_tokens: int,
    ) -> SuffixDraft:
        """What followed the longest match in past outputs, most frequent first: a tree.

        REST (He et al. 2023), section 3.2: every beginning of every continuation is counted, and
        the most frequent ones are drafted.

        Args:
            context: the last tokens of a text, of any request or of none.
            longest: tokens of it that are matched, at most; with `length` no more than the trees'
                depth.
            shortest: at least.
            length: tokens of a continuation.
            max_tokens: of the tree.
        """
        with self._lock:
            tokens = as_tokens(context)
            self._reserve(max_tokens)
            best = 0, 0.0, 0
            for address in (self._shared.address, self._frozen.address if self._frozen else 0):
                if address:
                    best = most_frequent(
                        address,
                        tokens,
                        longest,
                        shortest,
                        length,
                        max_tokens,
                        best,
                        *self._room.all,
                    )
            return self._room.draft(*best)

    def speculate_batch(
        self, requests: Sequence[tuple[Hashable, Tokens]], **limits: Any
    ) -> list[SuffixDraft]:
        """`speculate` for many (request, context) at once; `limits` are its other arguments.

        Raises:
            ValueError: a request is not active.
        """
        with self._lock:
            return [self.speculate(req_id, context, **limits) for req_id, context in requests]

    def _reserve(self, most: int) -> None:
        """Room to draft so many tokens."""
        if most > self._room.most:
            self._room = WorkingMemory(most)

    def _extend(self, arena: Arena, slot: int, tokens: np.ndarray, start: int) -> None:
        while (start := extend(arena.address, slot, tokens, start)) < len(tokens):
            arena.grow()

    def _open(self, req_id: Hashable) -> _Document:
        """A place for the output of a request, perhaps that of the oldest."""
        if not self._free_slots:
            count = self._shared.num_slots
            self._free_slots = list(range(2 * count - 1, count - 1, -1))
            self._shared.add_slots(2 * count)
        document = _Document(self._started, self._free_slots.pop())
        open_slot(self._shared.address, document.slot)
        self._started += 1
        self._cached[req_id] = self._present[document.started] = document
        while 0 < self._max_requests < len(self._cached):
            self._leave(next(iter(self._cached)))
        return document

    def _first_page(self, document: _Document) -> int:
        """Where the text of a document begins, -1 for an empty one."""
        if document.slot < 0:
            return document.first_page
        row = document.slot * (SLOT_WORDS + self._depth + 1)
        return int(self._shared.words(SLOTS)[row + FIRST])

    def _documents(self) -> Iterator[np.ndarray]:
        """The outputs that are cached."""
        room = np.zeros(self._shared.header[NUM_PAGES] * PAGE, dtype=np.int32)
        pages = np.zeros(self._shared.header[NUM_PAGES], dtype=np.int64)
        for document in self._cached.values():
            first = self._first_page(document)
            yield room[: copy_text(self._shared.address, first, room, 0, pages)].copy()

    def _close(self, document: _Document) -> None:
        if document.slot >= 0:
            document.first_page, document.length = close_slot(self._shared.address, document.slot)
            document.position = document.first_page * PAGE
            document.ended = self._started
            self._free_slots.append(document.slot)
            document.slot = -1

    def _leave(self, req_id: Hashable) -> _Document:
        """The output of a request is no longer cached; what is in the tree goes later."""
        document = self._cached.pop(req_id)
        self._close(document)
        self._leaving.append(document)
        return document

    def _make_way(self, num_tokens: int) -> None:
        """Take up to so many tokens out of the tree, of those that are too many."""
        while num_tokens > 0:
            if not self._leaving:
                stopped = next((key for key in self._cached if key not in self._local), None)
                if not 0 <= self._max_tokens < self.num_tokens or stopped is None:
                    return
                self._leave(stopped)
            num_tokens -= self._take_out(self._leaving[0], num_tokens)

    def _take_out(self, document: _Document, num_tokens: int | None) -> int:
        """Take tokens of a document out of the tree: all, or so many at most; how many."""
        before = self.num_tokens
        if document.position >= 0 and document.length > 0:
            count = document.length if num_tokens is None else num_tokens
            document.position = remove(self._shared.address, document.position, count)
        if document.position < 0 or document.length == 0:
            self._leaving.remove(document)
            del self._present[document.started]
            heapq.heappush(self._released, (document.ended, document.first_page))
            # A node may refer to a text as long as an output that began before its end is there.
            oldest = next(iter(self._present), self._started)
            while self._released and self._released[0][0] <= oldest:
                release_pages(self._shared.address, heapq.heappop(self._released)[1])
        return before - self.num_tokens


@cache
def compile_all() -> None:
    """Compile, or load from disk, all that a cache calls."""
    with compiling("the suffix index"):
        own, shared = Arena(4), Arena(4)
        tokens = as_tokens([1, 2, 1])
        for arena in (own, shared):
            open_slot(arena.address, 0)
        extend_both(own.address, shared.address, 0, tokens)
        extend(own.address, 0, tokens, 2)
        room = WorkingMemory(4)
        limits = (4, 1.0, 0.0, np.float32(0.1))
        speculate_both(
            own.address, shared.address, 0, 0, tokens, *limits, True, True, True, *room.all
        )
        most_frequent(shared.address, tokens, 2, 1, 2, 4, (0, 0.0, 0), *room.all)
        first, count = close_slot(shared.address, 0)
        remove(shared.address, first * PAGE, count)
        release_pages(shared.address, first)


def as_tokens(tokens: Tokens) -> np.ndarray:
    """Token ids as a row of 32-bit integers.

    Raises:
        ValueError: not one row.
    """
    array = np.ascontiguousarray(tokens, dtype=np.int32)
    if array.ndim != 1:
        raise ValueError(f"token ids must be one row, got an array of shape {array.shape}")
    return array


def as_text(tokens: Tokens) -> np.ndarray:
    """Token ids that are to be kept.

    Raises:
        ValueError: not one row, or negative ids.
    """
    array = as_tokens(tokens)
    if len(array) and array.min() < 0:
        raise ValueError(f"token ids must not be negative, got {array.min()}")
    return array
