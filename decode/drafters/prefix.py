"""The prefix layer of heads while decoding: it reads each committed token's state once.

Shape legend: B sequences, K states of each, D hidden size.
"""

import torch
from torch import Tensor

from decode.cache import SlotCache
from decode.masks import MaskMaker
from decode.models.prefix import PrefixLayer
from decode.target import PREFILL_CHUNK, Target


class PrefixReader:
    """The layer and a cache of its own. Only committed states are read: nothing is rolled back."""

    def __init__(self, layer: PrefixLayer, target: Target):
        """Read for the sequences of `target`."""
        self.layer = layer
        self.cache = SlotCache(
            num_layers=1, num_slots=target.max_batch_size, max_length=target.max_length
        )
        dtype = next(layer.parameters()).dtype
        self._masks = MaskMaker(
            max_length=target.max_length, window=None, dtype=dtype, device=target.device
        )

    def begin(self, slot: int, hidden: Tensor) -> None:
        """Read the states [T - 1, D] of a prompt but for its last token's."""
        self.cache.release(slot)
        for first in range(0, len(hidden), PREFILL_CHUNK):
            chunk = hidden[first : first + PREFILL_CHUNK]
            self._read([slot], chunk[None], [len(chunk)])

    def catch_up(self, slots: list[int], lengths: list[int], hidden: Tensor) -> Tensor:
        """Read what was committed in the last step, and return the last of it, [B, 1, D].

        Args:
            slots: of the sequences.
            lengths: [B] committed tokens, the root included, whose state is not known yet.
            hidden: [B, K, D] right-aligned, as the context holds them.
        """
        counts = [
            length - 1 - self.cache.lengths[slot]
            for slot, length in zip(slots, lengths, strict=True)
        ]
        width = max(counts)
        new = torch.tensor(counts, device=hidden.device)[:, None]
        columns = hidden.shape[1] - new + torch.arange(width, device=hidden.device)
        columns = columns.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[2])
        output = self._read(slots, hidden.gather(1, columns), counts)
        last = (new - 1)[..., None].expand(-1, -1, output.shape[2])
        return output.gather(1, last)

    def _read(self, slots: list[int], hidden: Tensor, counts: list[int]) -> Tensor:
        """[B, N, D] the layer's output, of which `counts` are committed."""
        width = hidden.shape[1]
        window = self.cache.open(slots, width, hidden.device)
        mask = self._masks.chain(window.starts, width, window.num_keys)
        positions = torch.tensor(window.starts)[:, None] + torch.arange(width)
        output: Tensor = self.layer(hidden, mask, positions.to(hidden.device), self.cache)
        self.cache.commit(slots, counts)
        return output
