"""Greedy acceptance: a draft token is kept where it is the target's own argmax."""

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
        choices = argmax(target_logits).tolist()
        tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
        width = draft.tokens.shape[1]
        outcomes = []
        for row, num_nodes in enumerate(draft.num_nodes.tolist()):
            path = [0]
            num_tried = 0
            for node in range(1, num_nodes):  # parents come first: a child is met after its parent
                if parents[row][node] == path[-1]:
                    num_tried += 1
                    if tokens[row][node] == choices[row][path[-1]]:
                        path.append(node)
            padding = [-1] * (width - len(path))
            outcomes.append([len(path) - 1, choices[row][path[-1]], num_tried, *path, *padding])
        # By way of numpy: small tensors are made from lists at several times the cost.
        columns = torch.from_numpy(np.array(outcomes).T).to(target_logits.device)
        return Acceptance(columns[3:].T, columns[0], columns[1], columns[2])
