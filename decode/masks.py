"""Additive 4-D attention masks for ragged batches, trees and sliding windows.

A mask holds 0 where the query may see the key and the dtype's lowest number elsewhere. It is
additive also for sdpa, which would convert a boolean one anew in every layer.

Shape legend: B sequences, N query tokens, L keys of the longest sequence.
"""

import torch
from torch import Tensor

TEMPLATE_WIDTH = 16  # wider chains are prompts, which come seldom


class MaskMaker:
    """Makes the masks of one model."""

    def __init__(
        self, *, max_length: int, window: int | None, dtype: torch.dtype, device: torch.device
    ):
        """Masks over up to `max_length` + 1 keys.

        Args:
            max_length: positions of the cache.
            window: how many positions a query sees, its own included; None is all of them.
            dtype: of the attention's queries.
            device: where the model is.
        """
        self.max_length = max_length
        self.window = window
        self.dtype = dtype
        self.device = device
        self._templates: dict[int, Tensor] = {}

    def chain(self, starts: list[int], width: int, num_keys: int) -> Tensor:
        """[B, 1, N, L]: query n of sequence b stands at position starts[b] + n."""
        if len(starts) == 1 and width <= TEMPLATE_WIDTH:
            return self._from_template(starts[0], width, num_keys)
        keys = torch.arange(num_keys, device=self.device)
        queries = torch.tensor(starts, device=self.device)[:, None]
        queries = (queries + torch.arange(width, device=self.device))[:, :, None]
        return self._additive(self._sees(queries, keys))

    def tree(self, starts: list[int], ancestors: Tensor, num_keys: int) -> Tensor:
        """[B, 1, N, L] for draft trees.

        The keys of sequence b are its `starts[b]` committed tokens, then its N draft nodes; what
        lies behind them belongs to longer sequences. A node sees every committed token and its own
        ancestors, within the window where there is one.

        Example: 2 committed tokens, then root, "b" and "c" both below the root, "d" below "b"::

                     committed | root b c d
            root        T T    |  T  F F F
            b           T T    |  T  T F F
            c           T T    |  T  F T F
            d           T T    |  T  T F T

        Args:
            starts: committed tokens of each sequence whose keys are cached.
            ancestors: [B, N, N] bool, as `Draft.ancestors` gives them.
            num_keys: L.
        """
        batch, width, _ = ancestors.shape
        first = torch.tensor(starts, device=self.device)[:, None]
        keys = torch.arange(num_keys, device=self.device).expand(batch, num_keys)
        committed = keys < first
        node = keys - first  # the draft node whose key this is, where it is one
        is_node = (node >= 0) & (node < width)
        node = node.clamp(0, width - 1)
        visible = ancestors.gather(2, node[:, None].expand(batch, width, num_keys))
        sees = committed[:, None] | (visible & is_node[:, None])
        if self.window is not None:
            depths = ancestors.sum(-1) - 1
            key_position = torch.where(committed, keys, first + depths.gather(1, node))
            sees &= (first + depths)[:, :, None] - key_position[:, None] < self.window
        return self._additive(sees)

    def _from_template(self, start: int, width: int, num_keys: int) -> Tensor:
        """A part of one matrix in which every chain of this width stands ready.

        Column j of a mask that starts at `start` is column j + max_length - start of the template.
        """
        template = self._templates.get(width)
        if template is None:
            keys = torch.arange(self.max_length + 1 + width, device=self.device)
            queries = self.max_length + torch.arange(width, device=self.device)[None, :, None]
            template = self._templates[width] = self._additive(self._sees(queries, keys))
        shift = self.max_length - start
        # Copied once here, or sdpa would do so in every layer.
        return template.narrow(3, shift, num_keys).contiguous()

    def _sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        sees = keys <= queries
        return sees if self.window is None else sees & (keys > queries - self.window)

    def _additive(self, sees: Tensor) -> Tensor:
        mask = torch.zeros(sees.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~sees, torch.finfo(self.dtype).min)[:, None]
