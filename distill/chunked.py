"""Projection and objective in chunks of tokens, forward and backward at once.

Logits are the largest tensor of a training step: 8,192 tokens x 128,000 tokens of vocabulary are
4 GB in float32, and a divergence makes several of them. Here they live one chunk at a time: the
forward projects a chunk at all depths, judges it, forms the gradients of its logits and folds them
into the gradients of the hidden states and of the weights; the backward only scales these.

Shape legend: T places, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.alignment import Aligned, Depth, TeacherSignal
from distill.depth_weights import DepthWeights, Uniform
from distill.judging import judged
from distill.labels import Labelled
from distill.laws import Compared, Goal
from distill.objectives import LossTerms, Objective, Pointwise
from distill.states import Head, at_least_float32, compute_dtype

CHUNK_ELEMENTS = {"cpu": 2**20}  # logits per chunk: what a core's cache holds
CHUNK_ELEMENTS_ACCELERATOR = 2**27  # 512 MB in float32
PRODUCT_ELEMENTS = 2**22  # gradients of logits that enter a weight's gradient at once
MIN_PREDICTIONS = 16  # of all depths together: fewer and each reads the head for little
EVERYWHERE = Uniform()


def projected_loss(
    aligned: Aligned,
    signal: TeacherSignal | None,
    objective: Objective,
    *,
    depth_weights: DepthWeights = EVERYWHERE,
    token_weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> LossTerms:
    """The objective's sums over all T places; `loss` carries the gradient, the rest does not.

    Args:
        aligned: what the drafter predicts from which states.
        signal: what the target says; None where the objective does not ask.
        objective: what is minimised.
        depth_weights: how much each depth counts.
        token_weights: how much each of the batch's learnt tokens counts, at whatever depth it is
            predicted; None is 1 each.
        chunk_size: places per chunk; by default what suits the device.
    """
    if signal is None and objective.needs_target:
        raise ValueError(f"{type(objective).__name__} needs the target's logits; give it a teacher")
    chunks = _Chunks(aligned)
    signal = signal if objective.needs_target else None
    chunk_size = chunk_size or _chunk_size(aligned)
    terms = chunks.run(signal, objective, depth_weights, token_weights, chunk_size)
    if not chunks.gradients:
        return terms
    tensors, gradients = zip(*chunks.gradients.values(), strict=True)
    chunks.gradients.clear()  # none but the graph holds them: `backward` gives them away
    loss = cast(Any, _WithGradients).apply(terms.loss, list(gradients), *tensors)
    return LossTerms(loss, terms.num_tokens, terms.metrics)


@torch.no_grad()
def prediction_losses(
    aligned: Aligned,
    signal: TeacherSignal,
    objective: Pointwise,
    *,
    chunk_size: int | None = None,
) -> list[Tensor]:
    """What each of the T predictions of each depth costs, [T], without gradient."""
    hidden = aligned.depths[0].states.hidden
    values = [
        torch.empty(
            len(depth.labels), dtype=at_least_float32(hidden[:0]).dtype, device=hidden.device
        )
        for depth in aligned.depths
    ]
    size = chunk_size or _chunk_size(aligned)
    for chunk, _, depths in _Chunks(aligned).compared(signal, objective.temperature, size):
        for value, compared in zip(values, depths, strict=True):
            value[chunk] = objective.divergence(compared)[0]
    return values


class _Chunks:
    """One pass over a batch, and the gradients that it leaves."""

    def __init__(self, aligned: Aligned):
        """Nothing is judged yet."""
        self.depths = aligned.depths
        self.device = self.depths[0].states.hidden.device.type
        self.gradients: dict[int, tuple[Tensor, Tensor]] = {}  # id -> tensor, its gradient
        self._products: dict[int, _Products] = {}  # id of a weight -> what its gradient lacks yet
        self._cast: dict[tuple[int, torch.dtype], Tensor] = {}
        self._plain = [self._without_gradient(depth) for depth in self.depths]
        for depth in self.depths:
            head = depth.states.head
            for tensor in (depth.states.hidden, head.weight, head.bias):
                if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
                    # Depths may share a tensor: then they share its gradient too.
                    self.gradients.setdefault(id(tensor), (tensor, torch.zeros_like(tensor)))

    @torch.no_grad()
    def run(
        self,
        signal: TeacherSignal | None,
        objective: Objective,
        depth_weights: DepthWeights,
        token_weights: Tensor | None,
        chunk_size: int,
    ) -> LossTerms:
        """The summed terms; the gradients are there afterwards."""
        total: LossTerms | None = None
        for chunk, logits, depths in (
            self.labelled(objective.temperature, chunk_size)
            if signal is None
            else self.compared(signal, objective.temperature, chunk_size)
        ):
            terms, gradients = judged(
                objective,
                depth_weights,
                depths,
                [depth.labels[chunk] for depth in self.depths],
                [None if depth.valid is None else depth.valid[chunk] for depth in self.depths],
                kept=[None if depth.kept is None else depth.kept[chunk] for depth in self.depths],
                token_weights=None
                if token_weights is None
                else torch.stack([token_weights[_rows(depth, chunk)] for depth in self.depths]),
            )
            total = terms if total is None else _add(total, terms)
            if self.gradients:
                for number, gradient in enumerate(gradients):
                    self._fold(gradient, logits[number], number, chunk)
        for products in self._products.values():
            products.form()
        self._products.clear()
        assert total is not None
        return total

    def compared(
        self, signal: TeacherSignal, temperature: float, chunk_size: int
    ) -> Iterator[tuple[slice, list[Tensor], list[Compared]]]:
        """Chunk by chunk: its places, and at every depth the logits and what the target says."""
        for chunk in self._slices(chunk_size):
            rows, places = self._asked(chunk)
            law = signal.law(rows)  # under autocast
            with torch.autocast(self.device, enabled=False):
                logits = self._logits(chunk)
                goal = Goal.of(law, temperature, logits[0], self._plain[0][1].kept)
                goals = [goal] if places is None else [goal[place] for place in places]
                del law, goal  # each as large as a depth's logits
                yield chunk, logits, list(map(Compared.at, goals, logits))

    def _asked(self, chunk: slice) -> tuple[slice | Tensor, Tensor | None]:
        """Which learnt tokens the target is asked for, and where in these stand a depth's, [K, t].

        Depths predict the same tokens from different places; each is asked for once.
        """
        rows = [_rows(depth, chunk) for depth in self.depths]
        if len(rows) == 1:
            return rows[0], None
        numbers = [
            torch.arange(row.start, row.stop, device=depth.labels.device)
            if isinstance(row, slice)
            else row
            for row, depth in zip(rows, self.depths, strict=True)
        ]
        asked, places = cast(Any, torch.stack(numbers)).unique(return_inverse=True)
        return asked, places

    def labelled(
        self, temperature: float, chunk_size: int
    ) -> Iterator[tuple[slice, list[Tensor], list[Labelled]]]:
        """Chunk by chunk: its places, and at every depth the logits and what the text says."""
        for chunk in self._slices(chunk_size):
            with torch.autocast(self.device, enabled=False):
                logits, found = self._logits(chunk), []
                for depth, drafted, (_, head) in zip(self.depths, logits, self._plain, strict=True):
                    # They may be overwritten: not where they are the states, or a cap's slope is
                    # told by them.
                    is_wanted = head.weight is None or head.softcap is not None
                    if temperature != 1:
                        cooled = drafted / temperature
                    else:
                        cooled = drafted.clone() if is_wanted else drafted
                    found.append(Labelled.at(depth.labels[chunk], cooled, head.kept))
                yield chunk, logits, found

    def _slices(self, chunk_size: int) -> list[slice]:
        """The chunks' places.

        No places at all make one empty chunk: the terms are zeros then, under their usual names.
        """
        places = len(self.depths[0].labels)
        begins = range(0, max(places, 1), chunk_size)
        return [slice(begin, min(begin + chunk_size, places)) for begin in begins]

    def _logits(self, chunk: slice) -> list[Tensor]:
        """Of every depth at these places, [t, V]."""
        return [
            head.cap(at_least_float32(head.project(hidden[chunk]))) for hidden, head in self._plain
        ]

    def _without_gradient(self, depth: Depth) -> tuple[Tensor, Head]:
        """States and head without gradient, in the dtype of the products."""
        states = depth.states
        dtype = compute_dtype(states.hidden)
        head = states.head
        weight, bias = self._in(head.weight, dtype), self._in(head.bias, dtype)
        hidden = self._in(states.hidden, dtype)
        assert hidden is not None
        return hidden, Head(weight, bias, head.softcap, head.kept)

    def _in(self, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Cast once, however many depths share it."""
        if tensor is None:
            return None
        key = (id(tensor), dtype)
        if key not in self._cast:
            self._cast[key] = tensor.detach().to(dtype)
        return self._cast[key]

    def _fold(self, gradient: Tensor, logits: Tensor, number: int, chunk: slice) -> None:
        """Add what the gradient [t, v] of a chunk's logits [t, V] means for what they came from.

        The first v ids of the vocabulary have one; the rest stand for no token of the target.
        """
        width, states = gradient.shape[-1], self.depths[number].states
        hidden, head = self._plain[number]
        gradient, hidden = head.uncap(gradient, logits[:, :width]), hidden[chunk]
        if (found := self.gradients.get(key := id(states.head.weight))) is not None:
            if key not in self._products:
                self._products[key] = _Products(found[1][:width], hidden.dtype)
            gradient = self._products[key].add(gradient, hidden)
        gradient = gradient.to(hidden.dtype)
        if (found := self.gradients.get(id(states.hidden))) is not None:
            if head.weight is None:
                found[1][chunk, :width] += gradient
            else:
                found[1][chunk] += gradient @ head.weight[:width]
        if (found := self.gradients.get(id(states.head.bias))) is not None:
            found[1][:width] += gradient.sum(0)


class _Products:
    """Sums leftᵀ @ right of chunks, [t, V]ᵀ @ [t, D] each, in the precision of the sum.

    In half precision they are formed of many chunks' rows at once: a product is as large as the
    sum, is written, widened and added, and of few rows that costs more than the multiplication.
    """

    def __init__(self, total: Tensor, dtype: torch.dtype):
        """Add to `total` [V, D] what is to be multiplied in `dtype`."""
        self._total = total
        self._dtype = dtype
        self._rows = PRODUCT_ELEMENTS // len(total)
        self._left, self._right = (  # memory that is not written is not taken
            torch.empty(self._rows, size, dtype=dtype, device=total.device) for size in total.shape
        )
        self._filled = 0

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        """Let these rows be in the sum; `left` comes back in the products' dtype."""
        if self._dtype.itemsize >= 4:
            self._total.addmm_(left.T, right)
            return left
        if len(left) > self._rows:
            left = left.to(self._dtype)
            self._total += left.T @ right
            return left
        if self._filled + len(left) > self._rows:
            self.form()
        rows = slice(self._filled, self._filled + len(left))
        self._filled = rows.stop
        self._right[rows] = right
        return self._left[rows].copy_(left)

    def form(self) -> None:
        """Add the products of the rows that wait."""
        if self._filled > 0:
            self._total += self._left[: self._filled].T @ self._right[: self._filled]
        self._filled = 0


def _rows(depth: Depth, chunk: slice) -> slice | Tensor:
    """Which of the batch's learnt tokens a chunk's labels are."""
    return chunk if depth.rows is None else depth.rows[chunk]


def _add(total: LossTerms, terms: LossTerms) -> LossTerms:
    """The sum, in the place of `total`.

    A list of the chunks' small results would hold on to the heap between the chunks' large
    tensors, and the C library then finds no room for the next ones: gigabytes at 500 chunks.
    """
    total.loss.add_(terms.loss)
    total.num_tokens.add_(terms.num_tokens)
    for name, pair in terms.metrics.items():
        for kept, new in zip(total.metrics[name], pair, strict=True):
            kept.add_(new)
    return total


def _chunk_size(aligned: Aligned) -> int:
    """Places whose logits of all depths fit the chunk."""
    elements = CHUNK_ELEMENTS.get(
        aligned.depths[0].states.hidden.device.type, CHUNK_ELEMENTS_ACCELERATOR
    )
    per_place = 0
    for depth in aligned.depths:
        head = depth.states.head
        if head.kept is not None:  # the target's logits are as many as ever
            per_place += len(head.kept.places)
        else:
            per_place += depth.states.hidden.shape[1] if head.weight is None else len(head.weight)
    return max(elements // per_place, math.ceil(MIN_PREDICTIONS / len(aligned.depths)))


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients by n tensors are known already.

    The graph's last backward gives them away, scaled where they lie: a head's gradient is as large
    as the head, and would otherwise be there twice.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, known: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.known = known
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.known
        if known is None:
            raise RuntimeError("this loss went backward before; then it takes retain_graph=True")
        if _stays():
            return (None, None, *(gradient * scale for gradient in known))
        ctx.known = None
        return (None, None, *(gradient.mul_(scale) for gradient in known))


def _stays() -> bool:
    """Whether the graph that goes backward may do so again (`retain_graph`)."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())
