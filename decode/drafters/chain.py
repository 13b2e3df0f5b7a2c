"""Where chains are written as they are drafted."""

import torch
from torch import Tensor

from decode.draft import Draft


class Chain:
    """Chains in memory that is kept: to make and to free small tensors takes its time.

    Attributes:
        draft: of all tokens; the next chains are written to the same one.
        columns: N views [B, 1], one of each place.
        arrays: the same for numpy, or None where they are not on the CPU.
    """

    def __init__(self, batch: int, width: int, device: torch.device):
        """Room for `batch` chains of `width` tokens, roots included."""
        with torch.inference_mode(False):  # or they could be written to in that mode only
            tokens = torch.zeros(batch, width, dtype=torch.long, device=device)
            self.columns = [tokens[:, place : place + 1] for place in range(width)]
        self.draft = Draft.chain(tokens)
        is_on_cpu = device.type == "cpu"
        self.arrays = [column.numpy() for column in self.columns] if is_on_cpu else None

    def put_likeliest(self, place: int, logits: Tensor) -> None:
        """The first of the likeliest tokens of `logits` [B, 1, V] comes to `place`.

        On the CPU numpy's argmax is ten times as fast as torch's.
        """
        if self.arrays is not None and logits.dtype is torch.float32:
            logits.numpy().argmax(-1, self.arrays[place])
        else:
            torch.argmax(logits, -1, out=self.columns[place])


class Chains:
    """Chains of every size that was asked for."""

    def __init__(self, device: torch.device | None = None):
        """On `device`; None is the CPU."""
        self._device = device or torch.device("cpu")
        self._known: dict[tuple[int, int], Chain] = {}

    def begin(self, roots: list[int], width: int) -> Chain:
        """Chains of `width` tokens, the roots in their place."""
        size = len(roots), width
        chain = self._known.get(size)
        if chain is None:
            chain = self._known[size] = Chain(*size, self._device)
        if chain.arrays is None:
            chain.columns[0].copy_(torch.tensor(roots)[:, None])
            return chain
        column = chain.arrays[0]
        for row, root in enumerate(roots):  # written one by one, they need no tensor
            column[row, 0] = root
        return chain
