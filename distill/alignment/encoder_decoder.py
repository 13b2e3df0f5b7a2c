"""The decoder of an encoder-decoder model on packs of examples, each beside its own source.

The packs are taken apart, the model reads every example in a row of its own, and its states go back
to the examples' places: so cross-attention and positions are the model's own, of whatever family.

Shape legend: B packs, L places of a pack, E examples, T decoder tokens of the longest, D hidden.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.batches import Batch


class DecoderOutput(NamedTuple):
    """What a causal LM's backbone returns, of the decoder.

    Attributes:
        last_hidden_state: [B, L, D]; zeros at padding.
        hidden_states: the same of each layer that was asked for.
    """

    last_hidden_state: Tensor
    hidden_states: dict[int, Tensor]


class Rows(NamedTuple):
    """The examples of packs, one per row.

    Attributes:
        is_token: [B, L] bool; what follows names these places in row-major order.
        row: the example of each.
        place: where in the example it stands.
        input_ids: [E, T] with zeros behind.
    """

    is_token: Tensor
    row: Tensor
    place: Tensor
    input_ids: Tensor

    @classmethod
    def of(cls, batch: Batch) -> "Rows":
        """The examples of `batch`, pack by pack."""
        is_token = batch.segment_ids > 0
        begins = is_token & (batch.position_ids == 0)
        row = (begins.flatten().cumsum(0) - 1).view_as(is_token)[is_token]
        place = batch.position_ids[is_token]
        longest = int(place.max()) + 1 if len(place) else 0
        input_ids = batch.input_ids.new_zeros(int(begins.sum()), longest)
        input_ids[row, place] = batch.input_ids[is_token]
        return cls(is_token, row, place, input_ids)

    def packed(self, states: Tensor) -> Tensor:
        """[E, T, D] to [B, L, D]."""
        packs = states.new_zeros(*self.is_token.shape, states.shape[-1])
        packs[self.is_token] = states[self.row, self.place]
        return packs


def decoder_forward(model: Any, batch: Batch, layers: tuple[int, ...] = ()) -> DecoderOutput:
    """The decoder's states on the batch, under cross-attention to the examples' sources.

    What stands behind a row is padding that no token of it sees.
    """
    assert isinstance(model, PreTrainedModel)
    rows = Rows.of(batch)
    if batch.encoder_ids is None or batch.encoder_mask is None:  # packs that only fill a batch up
        shape = (*rows.is_token.shape, model.config.hidden_size)
        nothing = torch.zeros(shape, dtype=model.dtype, device=rows.is_token.device)
        return DecoderOutput(nothing, dict.fromkeys(layers, nothing))
    mask = batch.encoder_mask.long()
    sources = model.get_encoder()(input_ids=batch.encoder_ids, attention_mask=mask)
    output = model.get_decoder()(
        input_ids=rows.input_ids,
        encoder_hidden_states=sources.last_hidden_state,
        encoder_attention_mask=mask,
        use_cache=False,
        output_hidden_states=bool(layers),
    )
    hidden = {layer: rows.packed(output.hidden_states[layer]) for layer in layers}
    return DecoderOutput(rows.packed(output.last_hidden_state), hidden)
