"""Greedy acceptance: a draft token is kept where it is the target's own argmax."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from decode.draft import Draft
from decode.protocols import Acceptance, Exactness
from decode.sampling import SamplingBatch


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
        # On the CPU a choice is looked for when it is asked for, by numpy, whose argmax is the
        # faster one: most of a draft is never reached.
        logits, choices = None, []
        if target_logits.is_cpu and target_logits.dtype is torch.float32:
            logits = target_logits.numpy()
        else:
            choices = target_logits.argmax(-1).tolist()
        tokens = draft.tokens.tolist()
        parents = None if draft.is_chain else draft.parents.tolist()
        paths, next_tokens, tries = [], [], []
        for row, num_nodes in enumerate(draft.num_nodes.tolist()):
            path, num_tried, drafted = [0], 0, tokens[row]
            wanted = choices[row][0] if logits is None else int(logits[row, 0].argmax())
            for node in range(1, num_nodes):  # parents come first: a child is met after its parent
                parent = node - 1 if parents is None else parents[row][node]
                if parent == path[-1]:
                    num_tried += 1
                    if drafted[node] == wanted:
                        path.append(node)
                        wanted = (
                            choices[row][node]
                            if logits is None
                            else int(logits[row, node].argmax())
                        )
                    elif parents is None:
                        break  # nothing else hangs there
            paths.append(path)
            next_tokens.append(wanted)
            tries.append(num_tried)
        return Acceptance(paths, next_tokens, tries)
