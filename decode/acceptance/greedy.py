"""Greedy acceptance: a draft token is kept where it is the target's own argmax."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
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
        choice, tokens = _choice_of(target_logits), draft.tokens.tolist()
        parents = None if draft.is_chain else draft.parents.tolist()
        width = draft.tokens.shape[1]
        outcomes, next_tokens = [], []
        for row, num_nodes in enumerate(draft.num_nodes.tolist()):
            path, num_tried, wanted = [0], 0, choice(row, 0)
            for node in range(1, num_nodes):  # parents come first: a child is met after its parent
                parent = node - 1 if parents is None else parents[row][node]
                if parent == path[-1]:
                    num_tried += 1
                    if tokens[row][node] == wanted:
                        path.append(node)
                        wanted = choice(row, node)
            outcomes.append((len(path) - 1, num_tried, *path, *[-1] * (width - len(path))))
            next_tokens.append(wanted)
        device = target_logits.device
        if len(outcomes) == 1:  # the same few outcomes again and again: their tensors are kept
            count, tried, paths = _columns_of_one(outcomes[0], device)
            return Acceptance(paths, count, _token(next_tokens[0], device), tried)
        count, tried, paths = _columns(outcomes, device)
        return Acceptance(paths, count, torch.tensor(next_tokens, device=device), tried)


def _choice_of(logits: Tensor) -> Callable[[int, int], int]:
    """(row, node) -> the first of the tokens that `logits` [B, N, V] make likeliest there.

    On the CPU it is looked for when it is asked for: most of a draft is never reached.
    """
    if logits.is_cpu and logits.dtype is torch.float32:
        rows = logits.numpy()
        return lambda row, node: int(rows[row, node].argmax())
    choices = logits.argmax(-1).tolist()
    return lambda row, node: int(choices[row][node])


def _columns(outcomes: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, ...]:
    """Numbers of accepted [B] and of tried tokens [B], and the paths [B, N]."""
    # By way of numpy: small tensors are made from lists at several times the cost.
    columns = np.array(outcomes)
    parts = (columns[:, 0], columns[:, 1], columns[:, 2:])
    return tuple(torch.from_numpy(part).to(device) for part in parts)


@lru_cache(maxsize=1024)
def _columns_of_one(outcome: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    return _columns([outcome], device)


@lru_cache(maxsize=8192)
def _token(token: int, device: torch.device) -> Tensor:
    return torch.tensor([token], device=device)
