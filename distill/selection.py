"""Which tokens are worth learning: AdaSPEC's selection (2510.19779, section 3)."""

import math
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.alignment import Aligned, Depth, TeacherSignal
from distill.alignment.lm import LMAlignment
from distill.batches import Batch
from distill.chunked import prediction_losses
from distill.objectives import AdaSPEC


class TokenSelection:
    """Keeps a share of each depth's predictions: those furthest behind the reference drafter."""

    def __init__(self, objective: AdaSPEC, reference: PreTrainedModel):
        """Compare with `reference`, an independent drafter."""
        self._objective = objective
        self._reference = reference.eval().requires_grad_(False)
        self._alignment = LMAlignment(reference)

    @torch.no_grad()
    def select(self, aligned: Aligned, batch: Batch, signal: TeacherSignal) -> Aligned:
        """The same predictions, with those that are learnt as `kept`.

        The reference reads the data's own tokens up to the one that is predicted, also where a
        head does not see the last of them.
        """
        beside = self._alignment.align(self._reference, batch)
        (reference,) = prediction_losses(beside, signal, self._objective)
        losses = prediction_losses(aligned, signal, self._objective)
        return Aligned(
            tuple(
                self._kept(depth, loss, reference if depth.rows is None else reference[depth.rows])
                for depth, loss in zip(aligned.depths, losses, strict=True)
            )
        )

    def _kept(self, depth: Depth, loss: Tensor, reference: Tensor) -> Depth:
        excess = loss - reference
        count = torch.tensor(len(excess))
        if depth.valid is not None:
            excess = excess.masked_fill(~depth.valid, -math.inf)
            count = depth.valid.sum()
        kept = torch.zeros_like(excess, dtype=torch.bool)
        kept[excess.topk(math.ceil(self._objective.fraction * int(count))).indices] = True
        return replace(depth, kept=kept)
