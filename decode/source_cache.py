"""What the encoder made of each sequence's source: keys and values for cross-attention, per slot.

Shape legend: B sequences, S source tokens of the longest, H heads, E size of a head, D hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from decode.cache import as_slice


class Encoded(NamedTuple):
    """Sources that the encoder has read.

    Attributes:
        states: [B, S, D].
        lengths: tokens of each source; what lies behind them is padding.
    """

    states: Tensor
    lengths: list[int]


class SourceLayer(CacheLayerMixin):
    """Keys and values of one layer; `keys` and `values` [B, H, S, E] are those of open slots.

    Models read these two attributes themselves; in the forward that first sees a source they call
    `update` with what is to be kept.
    """

    is_sliding = False

    def __init__(self, owner: "SourceCache"):
        """A layer of `owner`; the tensors are allocated with the first source."""
        super().__init__()
        self.owner = owner
        self.stores: list[Tensor] = []  # keys and values of all slots, [slots, H, capacity, E]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros, or make room for a longer source than all before."""
        if not self.stores:
            self.stores = [
                states.new_zeros(self.owner.num_slots, states.shape[1], 0, states.shape[3])
                for states in (key_states, value_states)
            ]
        more = self.owner.capacity - self.stores[0].shape[2]
        if more:
            self.stores = [pad(store, (0, 0, 0, more)) for store in self.stores]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keep the states [B, H, S, E] of the open slots' sources."""
        self.lazy_initialization(key_states, value_states)
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[self.owner.slots, :, : states.shape[2]] = states
        return key_states, value_states

    def select(self, rows: slice | Tensor, longest: int) -> None:
        """Let `keys` and `values` be those of these slots; a copy where they are no neighbours."""
        self.keys, self.values = (store[rows, :, :longest] for store in self.stores)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys read and their offset; only asked for where no 4-D mask was handed in."""
        return self.owner.capacity, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest source so far."""
        return self.owner.capacity

    def get_max_length(self) -> int:
        """The same: it grows with the sources."""
        return self.owner.capacity


class SourceCache(Cache):
    """Cross-attention keys and values of up to `num_slots` sources.

    Attributes:
        capacity: tokens of the longest source so far.
        slots: the sequences of the forward to come.
        mask: [B, 1, 1, S] additive: which source tokens each of them has.
    """

    def __init__(self, *, num_layers: int, num_slots: int, dtype: torch.dtype):
        """An empty cache; memory is taken with the first source."""
        self.num_slots = num_slots
        self.dtype = dtype
        self.capacity = 0
        self.lengths = [0] * num_slots
        self.slots: list[int] = []
        self.mask: Tensor | None = None
        self._is_selected = False
        super().__init__(layers=[SourceLayer(self) for _ in range(num_layers)])

    def open(self, slots: Sequence[int], encoded: Encoded | None, device: torch.device) -> None:
        """Prepare a forward of `slots`; with `encoded`, their sources, it is their first one.

        Raises:
            ValueError: a slot has no source.
        """
        slots = list(slots)
        if encoded is not None:
            for slot, length in zip(slots, encoded.lengths, strict=True):
                self.lengths[slot] = length
            self.capacity = max(self.capacity, *encoded.lengths)
            self.slots, self.mask = slots, self._mask(encoded.lengths, device)
            self._is_selected = False
            return
        if self._is_selected and slots == self.slots:  # as in most steps
            return
        lengths = [self.lengths[slot] for slot in slots]
        if 0 in lengths:
            raise ValueError(f"slot {slots[lengths.index(0)]} has no source to attend to")
        self.slots, self.mask = slots, self._mask(lengths, device)
        rows = as_slice(slots, device)
        for layer in self.layers:
            layer.select(rows, max(lengths))
        self._is_selected = True

    def _mask(self, lengths: Sequence[int], device: torch.device) -> Tensor:
        places = torch.arange(max(lengths), device=device)
        is_padding = places >= torch.tensor(lengths, device=device)[:, None]
        mask = torch.zeros(is_padding.shape, dtype=self.dtype, device=device)
        return mask.masked_fill_(is_padding, torch.finfo(self.dtype).min)[:, None, None]

    def release(self, slot: int) -> None:
        """Give a slot back; the next source overwrites it."""
        self.lengths[slot] = 0
