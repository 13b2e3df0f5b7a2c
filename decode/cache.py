"""Our own key/value cache: preallocated, one slot per sequence, any transformers model takes it.

The cache is ours because ragged batches, trees and rollback are what the runtime is about: each
sequence writes at its own length, and only the accepted path is kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

NO_ROWS = slice(0, 0)


class Window(NamedTuple):
    """Which part of the cache one forward writes and reads.

    Attributes:
        starts: first place written in each slot: the tokens before it are committed, or were read
            by the forwards just before.
        slot: the slot of a single sequence, which is read and written by slices (several times
            faster), or None.
        rows: the slots read otherwise: a slice where they are neighbours (no copy), else [B]
            indices.
        slots: [B, 1] slots written otherwise, on the cache's device.
        positions: [B, N] positions written otherwise; what lies behind the end of the cache is
            padding and goes to the scratch place.
        num_keys: how many positions are read.
    """

    starts: list[int]
    slot: int | None
    rows: slice | Tensor
    slots: Tensor | None
    positions: Tensor | None
    num_keys: int


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [slots, heads, capacity, head_dim].

    The last position is scratch for padding.
    """

    is_sliding = False

    def __init__(self, owner: "SlotCache"):
        """A layer of `owner`; the tensors are allocated at the first forward."""
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros: masked places must hold numbers, since 0 x NaN is NaN."""
        shape = (self.owner.num_slots, key_states.shape[1], self.owner.capacity)
        self._keep(
            key_states.new_zeros(*shape, key_states.shape[-1]),
            value_states.new_zeros(*shape, value_states.shape[-1]),
        )

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions."""
        more = capacity - self.keys.shape[2]
        self._keep(pad(self.keys, (0, 0, 0, more)), pad(self.values, (0, 0, 0, more)))

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        # One view per slot, so that a single sequence costs two narrow() calls and no indexing.
        self.slots = [
            (self.keys[slot : slot + 1], self.values[slot : slot + 1])
            for slot in range(self.owner.num_slots)
        ]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the window's states [B, H, N, D] and return all that its sequences may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.owner.window
        if window.slot is not None:
            keys, values = self.slots[window.slot]
            start, width = window.starts[0], key_states.shape[2]
            keys.narrow(2, start, width).copy_(key_states)
            values.narrow(2, start, width).copy_(value_states)
            return keys.narrow(2, 0, window.num_keys), values.narrow(2, 0, window.num_keys)
        self.keys[window.slots, :, window.positions] = key_states.transpose(1, 2)
        self.values[window.slots, :, window.positions] = value_states.transpose(1, 2)
        return self._read(self.keys, window), self._read(self.values, window)

    def _read(self, store: Tensor, window: Window) -> Tensor:
        """[B, H, L, D] what the window's sequences may see; a copy where they are no neighbours."""
        visible = store.narrow(2, 0, window.num_keys)
        if isinstance(window.rows, slice):
            return visible[window.rows]
        return visible.index_select(0, window.rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys read and their offset; only asked for where no 4-D mask was handed in."""
        return self.owner.window.num_keys, 0

    def get_seq_length(self) -> int:
        """Keys before this forward; only asked for where no position ids were handed in."""
        return self.owner.max_length

    def get_max_length(self) -> int:
        """Positions per slot."""
        return self.owner.max_length


class SlotCache(Cache):
    """Keys and values of up to `num_slots` sequences of up to `max_length` tokens.

    Attributes:
        lengths: committed tokens of each slot whose keys are cached.
        capacity: places per slot; the last is scratch.
    """

    def __init__(self, *, num_layers: int, num_slots: int, max_length: int):
        """An empty cache; memory is taken at the first forward."""
        self.num_slots = num_slots
        self.max_length = max_length
        self.capacity = max_length + 1
        self.lengths = [0] * num_slots
        self.window = Window([], None, NO_ROWS, None, None, 0)
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    def open(
        self,
        slots: Sequence[int],
        width: int,
        device: torch.device,
        *,
        is_tree: bool = False,
        num_read: int = 0,
    ) -> Window:
        """Prepare a forward of `width` tokens behind the committed ones of `slots`.

        Or behind those and `num_read` more, which the forwards just before have read.

        A tree is wider than it is deep: near the end of the context its nodes need more places than
        any path of it has positions, and the cache grows by them.
        """
        starts = [self.lengths[slot] + num_read for slot in slots]
        end = max(starts) + width
        if is_tree and end >= self.capacity:
            self.capacity = end + 1
            for layer in self.layers:
                if layer.is_initialized:
                    layer.grow(self.capacity)
        if len(slots) == 1 and end <= self.capacity:
            self.window = Window(starts, slots[0], NO_ROWS, None, None, end)
        else:
            positions = torch.tensor(starts)[:, None] + torch.arange(width)
            self.window = Window(
                starts,
                None,
                as_slice(slots, device),
                torch.tensor(slots, device=device)[:, None],
                positions.clamp(max=self.capacity - 1).to(device),
                min(end, self.capacity),
            )
        return self.window

    def commit(self, slots: Sequence[int], num_kept: Sequence[int]) -> None:
        """Keep the first `num_kept` of the last forward's tokens in each slot, drop the rest."""
        for row, slot in enumerate(slots):
            self.lengths[slot] += num_kept[row]

    def commit_paths(
        self, slots: Sequence[int], paths: Sequence[Sequence[int]], *, in_order: bool = False
    ) -> None:
        """Keep the tokens of the last forward that are on the paths, and drop the rest.

        Args:
            slots: the slots of that forward.
            paths: places of the kept tokens, root first.
            in_order: every path is 0, 1, 2, ...: the tokens lie where they are to be.
        """
        if not in_order:
            self._gather(slots, paths)
        for row, slot in enumerate(slots):
            self.lengths[slot] += len(paths[row])

    def _gather(self, slots: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Move the keys and values of accepted paths together, behind the committed ones."""
        for slot, path in zip(slots, paths, strict=True):
            kept = len(path)
            if list(path) == list(range(kept)):
                continue  # they lie where they are to be
            start = self.lengths[slot]
            source = torch.tensor(path, device=self.layers[0].keys.device) + start
            for layer in self.layers:
                for store in (layer.keys, layer.values):
                    store[slot, :, start : start + kept] = store[slot][:, source]

    def copy(self, source: int, slot: int, length: int) -> None:
        """Let `slot` begin with the first `length` tokens of `source`."""
        for layer in self.layers:
            for store in (layer.keys, layer.values):
                store[slot, :, :length] = store[source, :, :length]
        self.lengths[slot] = length

    def truncate(self, slot: int, length: int) -> None:
        """Roll back: forget all but the first `length` tokens of a slot."""
        if self.lengths[slot] > length:
            self.lengths[slot] = length

    def release(self, slot: int) -> None:
        """Give a slot back; the next sequence overwrites it."""
        self.lengths[slot] = 0

    def check_integrity(self) -> None:
        """Raise AssertionError where the bookkeeping or the stored numbers cannot be right."""
        assert min(self.lengths) >= 0, "a slot has a negative length"
        assert max(self.lengths) <= self.max_length, "a slot is longer than the cache"
        for layer in self.layers:
            if layer.is_initialized:
                assert layer.keys.isfinite().all(), "a cached key is not a number"
                assert layer.values.isfinite().all(), "a cached value is not a number"


def as_slice(slots: Sequence[int], device: torch.device) -> slice | Tensor:
    """How to read these slots: a slice where they are neighbours (no copy), else their indices."""
    first = slots[0]
    if list(slots) == list(range(first, first + len(slots))):
        return slice(first, first + len(slots))
    return torch.tensor(slots, device=device)
