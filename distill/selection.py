"""Which tokens are worth learning: AdaSPEC's selection (2510.19779, section 3)."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from decode import check_tokenizers
from decode.models import CheckpointLM, Heads, HeadsCheckpoint, trimmed_head
from distill.alignment import Aligned, Alignment, Depth, TeacherSignal
from distill.batches import Batch
from distill.chunked import prediction_losses
from distill.drafter_folder import check_target, find_drafter, read_description
from distill.errors import UserError
from distill.families import FAMILIES
from distill.objectives import AdaSPEC
from distill.target import LoadedTarget, first_line


class TokenSelection:
    """Keeps a share of each depth's predictions: those furthest behind the reference drafter."""

    def __init__(self, objective: AdaSPEC, reference: nn.Module, alignment: Alignment):
        """Compare with `reference`, a language model or heads, aligned by `alignment`."""
        self._objective = objective
        self._reference = reference.eval().requires_grad_(False)
        self._alignment = alignment

    @torch.no_grad()
    def select(self, aligned: Aligned, batch: Batch, signal: TeacherSignal) -> Aligned:
        """The same predictions, with those that are learnt as `kept`.

        Heads are compared with the reference's of the same depth. A reference that is a language
        model reads the data's own tokens up to the one that is predicted, also where a head does
        not see the last of them.
        """
        beside = prediction_losses(
            self._alignment.align(self._reference, batch), signal, self._objective
        )
        losses = prediction_losses(aligned, signal, self._objective)
        if not isinstance(self._reference, Heads):
            (of_all,) = beside
            beside = [of_all if d.rows is None else of_all[d.rows] for d in aligned.depths]
        return Aligned(tuple(map(self._kept, aligned.depths, losses, beside)))

    def _kept(self, depth: Depth, loss: Tensor, reference: Tensor) -> Depth:
        excess = loss - reference
        count = torch.tensor(len(excess))
        if depth.valid is not None:
            excess = excess.masked_fill(~depth.valid, -math.inf)
            count = depth.valid.sum()
        kept = torch.zeros_like(excess, dtype=torch.bool)
        kept[excess.topk(math.ceil(self._objective.fraction * int(count))).indices] = True
        return replace(depth, kept=kept)


def load_reference(path: str, drafter: nn.Module, target: LoadedTarget) -> nn.Module:
    """The reference drafter at `path`: a folder, a run with one inside, or a hub id.

    Raises:
        UserError: there is none, it is of another target, or `drafter` has nothing in it to be
            compared with.
    """
    path = find_drafter(path)
    description = read_description(path)
    check_target(description, path, target)
    is_lm = FAMILIES[description.get("family", "lm")].is_lm
    if is_lm and target.is_encoder_decoder:
        raise UserError(
            "adaspec's reference is a language model, which would not see the sources of an "
            "encoder-decoder target",
            path,
            "name trained heads: objective.reference=runs/.../drafter",
        )
    try:
        if is_lm:
            check_tokenizers(target.tokenizer, AutoTokenizer.from_pretrained(path))
            return _covering_the_same(CheckpointLM(path=path).build(target.model), drafter, path)
        reference = HeadsCheckpoint(path=path).build(target.model)
    except (ValueError, OSError) as error:
        hint = "name a trained drafter: objective.reference=runs/.../drafter"
        raise UserError(first_line(error), path, hint) from error
    reference.one_at_a_time = False  # that is how it was trained
    if not isinstance(drafter, Heads):
        raise UserError(
            "adaspec compares a language model with another, and these are heads",
            path,
            "name a trained language model: objective.reference=runs/.../drafter",
        )
    if drafter.one_at_a_time:
        raise UserError(
            "adaspec compares all heads with those of its reference, but only one is trained at a "
            "time",
            path,
            "drafter.one_at_a_time=false, or name a trained language model as objective.reference",
        )
    if drafter.num_heads > reference.num_heads:
        raise UserError(
            f"the drafter has {drafter.num_heads} heads, adaspec's reference {reference.num_heads}",
            path,
            f"name one with as many, or set drafter.num_heads={reference.num_heads}",
        )
    return reference


def _covering_the_same(reference: nn.Module, drafter: nn.Module, path: str) -> nn.Module:
    """A reference whose divergences are over the ids that the drafter's are over."""
    theirs, ours = (
        trimmed_head(model) if isinstance(model, PreTrainedModel) else None
        for model in (reference, drafter)
    )
    if theirs is None and ours is None:
        return reference
    if theirs is None or ours is None or theirs.ids.tolist() != ours.ids.tolist():
        raise UserError(
            "adaspec compares losses over one vocabulary, but the heads of the drafter and of its "
            "reference cover different ids",
            path,
            "name a reference that was trained from the same drafter with the same vocabulary=...",
        )
    return reference
