"""An independent language model: the state before a token predicts the token, as in the target.

Only places that count are projected to logits, in chunks (`distill.chunked`). Models whose head is
more than a linear layer, a scale and Gemma's soft cap give whole logits instead.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decode.models import TargetEnds, TrimmedHead, measured_scale, on_a_few_tokens
from distill.alignment import Aligned, Depth
from distill.alignment.encoder_decoder import decoder_forward
from distill.batches import Batch
from distill.laws import Kept
from distill.states import Head, States, compute_dtype


class LMAlignment:
    """Aligns a causal LM."""

    def __init__(self, drafter: PreTrainedModel, block: int = 1):
        """Find out how this model makes logits.

        Args:
            drafter: the model.
            block: how many consecutive tokens are judged together, each after the data's own.
        """
        self._head = PlainHead.of(drafter)
        self._block = block

    def align(self, drafter: nn.Module, batch: Batch) -> Aligned:
        """The drafter's states at the places before those that `batch.loss_mask` names."""
        hidden, head = predictions(drafter, self._head, batch)
        labels = batch.input_ids[:, 1:][batch.loss_mask[:, 1:]]
        if self._block == 1:
            return Aligned((Depth(States(hidden, head), labels),))
        return Aligned(
            tuple(
                Depth(States(hidden[rows], head), labels[rows].where(valid, 0), rows, valid)
                for rows, valid in blocks(batch, self._block)
            )
        )


def blocks(batch: Batch, length: int) -> list[tuple[Tensor, Tensor]]:
    """The learnt tokens in blocks of `length`: per depth the rows [T] and which are valid [T].

    Blocks follow one another from the first token of each run of learnt ones within an example;
    the last of a run may be shorter.
    """
    row, place = batch.loss_mask.nonzero(as_tuple=True)
    segment = batch.segment_ids[row, place]
    number = torch.arange(len(row), device=row.device)
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = (row.diff() != 0) | (place.diff() != 1) | (segment.diff() != 0)
    run = begins.cumsum(0)
    first = number.where(begins, 0).cummax(0).values
    starts = number[(number - first) % length == 0]
    depths = []
    for depth in range(length):
        rows = (starts + depth).clamp(max=max(len(number) - 1, 0))
        valid = (rows == starts + depth) & (run[rows] == run[starts])
        depths.append((rows.where(valid, 0), valid))
    return depths


class LiveTarget:
    """The target itself, run beside the drafter without gradient, once per batch."""

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...] = ()):
        """Teach with `model`.

        Args:
            model: the target.
            layers: whose hidden states a drafter reads; layer k is the output of k layers, as in
                the runtime, and the last one's is normed.
        """
        self._model = model.eval()
        self._head = PlainHead.of(model)
        self.layers = layers
        self._last: tuple[Batch, Tensor, dict[int, Tensor]] | None = None

    @torch.no_grad()
    def signal(self, batch: Batch) -> States:
        """The target's states at the places that predict the batch's tokens."""
        everywhere, _ = self._run(batch)
        hidden, head = at_predicting_places(everywhere, self._head, batch)
        dtype = compute_dtype(hidden)
        return States(hidden.to(dtype), head.detach(dtype))

    @torch.no_grad()
    def states(self, batch: Batch) -> dict[int, Tensor]:
        """Layer -> hidden states [B, L, D] everywhere in the batch, of the layers asked for."""
        return self._run(batch)[1]

    def _run(self, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
        """The forward of this very batch, remembered until the next one comes."""
        if self._last is None or self._last[0] is not batch:
            self._last = None  # the old states go before the new ones come
            output = forward(self._model, self._head, batch, self.layers)
            hidden = {layer: output.hidden_states[layer] for layer in self.layers}
            self._last = (batch, _everywhere(output, self._head), hidden)
        return self._last[1:]


class PlainHead:
    """A language-model head that is a linear layer, perhaps scaled, soft-capped, or trimmed.

    Attributes:
        scale: what states are multiplied by before it.
    """

    def __init__(
        self,
        linear: nn.Linear,
        softcap: float | None,
        *,
        scale: float = 1.0,
        bias: Tensor | None = None,
    ):
        """See `of`; `bias` stands for the layer's own."""
        self.linear = linear
        self.softcap = softcap
        self.scale = scale
        self._bias = bias

    def head(self) -> Head:
        """The projection with the weights of now."""
        kept = None
        if isinstance(self.linear, TrimmedHead):
            kept = Kept.of(self.linear.ids, self.linear.vocab_size)
        bias = self.linear.bias if self._bias is None else self._bias
        return Head(self.linear.weight, bias, self.softcap, kept)

    @staticmethod
    def of(model: PreTrainedModel) -> "PlainHead | None":
        """The head of `model`, tried on a few tokens; None where it is something else.

        That of an encoder-decoder model is as its family has it.
        """
        if model.config.is_encoder_decoder:
            ends = TargetEnds.of(model)
            return PlainHead(ends.output, ends.softcap, scale=ends.scale, bias=ends.bias)
        linear = model.get_output_embeddings()
        if type(linear) not in (nn.Linear, TrimmedHead) or model.base_model is model:
            return None
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        logits = on_a_few_tokens(model).logits[0]
        if isinstance(linear, TrimmedHead):
            logits = logits[:, linear.ids]
        hidden = on_a_few_tokens(model.base_model).last_hidden_state[0]
        scale = measured_scale(linear, softcap, hidden, logits)
        return None if scale is None else PlainHead(linear, softcap, scale=scale)


def predictions(model: nn.Module, plain: PlainHead | None, batch: Batch) -> tuple[Tensor, Head]:
    """States that predict the T tokens of the batch, [T, D], and their head.

    Without a plain head the states are the logits [T, V] themselves.
    """
    return at_predicting_places(_everywhere(forward(model, plain, batch), plain), plain, batch)


def at_predicting_places(
    everywhere: Tensor, plain: PlainHead | None, batch: Batch
) -> tuple[Tensor, Head]:
    """Of states [B, L, D] those before the batch's T learnt tokens, [T, D], and their head."""
    head = Head(None) if plain is None else plain.head()
    return everywhere[:, :-1][batch.loss_mask[:, 1:]], head


def forward(
    model: nn.Module, plain: PlainHead | None, batch: Batch, layers: tuple[int, ...] = ()
) -> Any:
    """The model's output on the batch, its states of these layers with it.

    Without its logits where a plain head can make them.
    """
    assert isinstance(model, PreTrainedModel)
    if model.config.is_encoder_decoder:
        return decoder_forward(model, batch, layers)
    backbone = model if plain is None else model.base_model
    assert isinstance(backbone, nn.Module)
    return backbone(
        input_ids=batch.input_ids,
        attention_mask=attention_masks(model, batch),
        position_ids=batch.position_ids,
        use_cache=False,
        output_hidden_states=bool(layers),
    )


def _everywhere(output: Any, plain: PlainHead | None) -> Tensor:
    """The states [B, L, D] that the head projects, or the logits [B, L, V]."""
    found = output.logits if plain is None else output.last_hidden_state
    assert isinstance(found, Tensor)
    return found if plain is None or plain.scale == 1.0 else found * plain.scale


def attention_masks(model: nn.Module, batch: Batch) -> Tensor | dict[str, Tensor]:
    """The batch's [B, 1, L, L] mask as the model takes it: additive, one per kind of layer.

    It is additive also for sdpa, which would convert a boolean one anew in every layer.
    """
    assert isinstance(model, PreTrainedModel)
    config = model.config.get_text_config()
    sees = batch.attention_mask()
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    device = sees.device.type
    is_half = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_half else model.dtype
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return _additive(_within(sees, window), dtype)
    masks = {
        kind: _additive(_within(sees, window if kind == "sliding_attention" else None), dtype)
        for kind in kinds
    }
    return masks if len(masks) > 1 else masks[kinds[0]]


def _within(sees: Tensor, window: int | None) -> Tensor:
    """Queries see `window` places, their own included; within a segment places are positions."""
    if window is None or window >= sees.shape[-1]:
        return sees
    return sees & torch.ones_like(sees[0, 0]).triu(1 - window)


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)
