"""Greedy acceptance: a draft token is kept where it is the target's own argmax."""

from dataclasses import dataclass
from typing import ClassVar

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
        device = target_logits.device
        # The decoder needs the outcome on the host anyway, and there a walk down the tree is both
        # the shortest and the fastest way to write this.
        choices = argmax(target_logits).tolist()
        tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
        paths, tried, next_tokens = [], [], []
        for row, num_nodes in enumerate(draft.num_nodes.tolist()):
            path = [0]
            num_tried = 0
            for node in range(1, num_nodes):  # parents come first: a child is met after its parent
                if parents[row][node] == path[-1]:
                    num_tried += 1
                    if tokens[row][node] == choices[row][path[-1]]:
                        path.append(node)
            next_tokens.append(choices[row][path[-1]])
            tried.append(num_tried)
            paths.append(path)
        width = draft.tokens.shape[1]
        accepted = [len(path) - 1 for path in paths]
        outcome = torch.tensor([accepted, next_tokens, tried], device=device)
        padded = [path + [-1] * (width - len(path)) for path in paths]
        return Acceptance(torch.tensor(padded, device=device), *outcome)
