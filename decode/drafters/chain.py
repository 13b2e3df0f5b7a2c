"""Where chains are written as they are drafted."""

import torch
from torch import Tensor


class Chain:
    """Tokens of chains, in memory that is kept: to make and to free small tensors takes its time.

    Attributes:
        tokens: [B, N].
        columns: N views [B, 1], one of each place.
    """

    def __init__(self, batch: int, width: int, device: torch.device):
        """Room for `batch` chains of `width` tokens, roots included."""
        with torch.inference_mode(False):  # or they could be written to in that mode only
            self.tokens = torch.zeros(batch, width, dtype=torch.long, device=device)
            self.columns = [self.tokens[:, place : place + 1] for place in range(width)]
        is_on_cpu = device.type == "cpu"
        self._arrays = [column.numpy() for column in self.columns] if is_on_cpu else []

    def put_likeliest(self, place: int, logits: Tensor) -> None:
        """The first of the likeliest tokens of `logits` [B, 1, V] comes to `place`.

        On the CPU numpy's argmax is ten times as fast as torch's.
        """
        if self._arrays and logits.dtype is torch.float32:
            logits.numpy().argmax(-1, self._arrays[place])
        else:
            torch.argmax(logits, -1, out=self.columns[place])
