"""Greedy acceptance: a draft token is kept where it is the target's own argmax."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch, argmax


@dataclass(frozen=True)
class Greedy:
    """Keep the longest path on which every token is the target's argmax.

    Stern et al. 2018 (blockwise parallel decoding), section 3; on trees SpecInfer's VerifyGreedy
    (Miao et al. 2023, section 4.2). The output is the target's own greedy output, whatever the
    drafter proposes and however it was drawn. Sampling parameters are not looked at.
    """

    exactness: ClassVar[Exactness] = Exactness.GREEDY

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the argmax of the target's logits [B, N, V]."""
        # The decoder needs the outcome on the host anyway, and there a walk down the tree is both
        # the shortest and the fastest way to write this.
        choice = _choices(target_logits)
        tokens = draft.tokens.tolist()
        parents = None if draft.is_chain else draft.parents.tolist()
        width = draft.tokens.shape[1]
        outcomes = []
        for row, num_nodes in enumerate(draft.num_nodes.tolist()):
            path = [0]
            num_tried = 0
            wanted = choice(row, 0)
            for node in range(1, num_nodes):  # parents come first: a child is met after its parent
                parent = node - 1 if parents is None else parents[row][node]
                if parent == path[-1]:
                    num_tried += 1
                    if tokens[row][node] == wanted:
                        path.append(node)
                        wanted = choice(row, node)
            outcomes.append([len(path) - 1, wanted, num_tried, *path, *[-1] * (width - len(path))])
        # By way of numpy: small tensors are made from lists at several times the cost.
        columns = np.array(outcomes)
        parts = (columns[:, 3:], columns[:, 0], columns[:, 1], columns[:, 2])
        outcome = [torch.from_numpy(part) for part in parts]
        if target_logits.device.type != "cpu":
            outcome = [part.to(target_logits.device) for part in outcome]
        return Acceptance(*outcome)


def _choices(logits: Tensor) -> Callable[[int, int], int]:
    """The likeliest token of each [row, node] of `logits`."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        rows = logits.numpy()  # where no path gets to, nothing is looked for
        return lambda row, node: int(rows[row, node].argmax())
    choices = argmax(logits).tolist()
    return lambda row, node: int(choices[row][node])
