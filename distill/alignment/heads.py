"""Heads: the target's state before a token predicts the tokens behind that one, one head each.

While drafting, the target's own head has drawn the root from the state that the heads read, and
head k predicts the token k places behind it. So a place here is one that predicts a learnt token,
which stands for the root, as for an independent model; depth k's label is k tokens further on.

Shape legend: B packs, L places of a pack, T learnt tokens, K heads, D hidden size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from decode.models import Heads
from distill.alignment import Aligned, Depth
from distill.alignment.lm import LiveTarget
from distill.batches import Batch
from distill.states import Head, States


class HeadsAlignment:
    """Aligns heads to a target that is run once per batch, for their input and for its own law."""

    def __init__(self, target: LiveTarget, layer: int):
        """Read the states of `layer`."""
        self._target = target
        self._layer = layer

    def align(self, drafter: nn.Module, batch: Batch) -> Aligned:
        """One depth per head, at the T places that predict learnt tokens.

        Or, where heads are trained one at a time (Stern et al. 2018, section 6), that of one head.
        It is drawn from torch's generator, which the loop seeds anew by the step: a resumed run
        with micro-batches of the same size draws the same.
        """
        assert isinstance(drafter, Heads)
        hidden = self._target.states(batch)[self._layer]
        if drafter.prefix is not None:
            hidden = drafter.prefix(hidden, batch.attention_mask(), batch.position_ids)
        prepared = drafter.prepare(hidden[:, :-1][batch.loss_mask[:, 1:]])  # [T, P]
        depths = list(range(1, drafter.num_heads + 1))
        if drafter.one_at_a_time:
            depths = [1 + int(torch.randint(drafter.num_heads, ()))]
        following = [ahead(batch, distance) for distance in range(depths[-1] + 1)]
        tokens = torch.stack([tokens for tokens, _, _ in following], dim=-1)  # the root first
        shared = None if drafter.outputs is not None else drafter.projection(1)
        aligned = []
        for depth in depths:
            weight, bias = shared or drafter.projection(depth)
            state = drafter.state(depth, prepared, tokens[:, :depth])
            labels, rows, valid = following[depth]
            states = States(state, Head(weight, bias, drafter.ends.softcap))
            aligned.append(Depth(states, labels, rows, valid))
        return Aligned(tuple(aligned))


def ahead(batch: Batch, distance: int) -> tuple[Tensor, Tensor, Tensor]:
    """What stands `distance` places behind each of the batch's T learnt tokens.

    Returns:
        tokens [T], which learnt tokens they are [T], and whether they are learnt tokens of the same
        example [T]; where they are not, both are 0.
    """
    learnt = batch.loss_mask
    number = (learnt.flatten().cumsum(0) - 1).view_as(learnt)

    def shifted(values: Tensor) -> Tensor:
        return functional.pad(values[:, distance:], (0, min(distance, values.shape[1])))[learnt]

    valid = shifted(learnt) & (shifted(batch.segment_ids) == batch.segment_ids[learnt])
    return shifted(batch.input_ids) * valid, shifted(number) * valid, valid
