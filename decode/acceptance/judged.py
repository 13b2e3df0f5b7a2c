"""What rules find that judge all sequences at once."""

from typing import NamedTuple

import torch
from torch import Tensor

from decode.protocols import Acceptance


class Judged(NamedTuple):
    """An `Acceptance` in tensors, on the target's device.

    Attributes:
        path: [B, N] accepted node ids, root first, then -1.
        num_accepted: [B] accepted draft tokens.
        next_token: [B] the target's own token.
        num_tried: [B] draft tokens that were tried.
        expected_accepted: [B, N] as an `Acceptance` has it.
    """

    path: Tensor
    num_accepted: Tensor
    next_token: Tensor
    num_tried: Tensor
    expected_accepted: Tensor | None = None

    def on_host(self) -> Acceptance:
        """The same in lists, by one transfer."""
        columns = (self.num_accepted, self.next_token, self.num_tried)
        rows = torch.cat([torch.stack(columns, dim=1), self.path], dim=1).tolist()
        paths = [row[3 : row[0] + 4] for row in rows]
        return Acceptance(
            paths, [row[1] for row in rows], [row[2] for row in rows], self.expected_accepted
        )
