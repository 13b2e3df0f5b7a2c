"""An encoder-decoder model, called as if it were a causal LM.

Its encoder reads each source once; what the decoder's cross-attention makes of it stays in the
sequence's slot. The decoder's own text goes through masks, positions and `SlotCache` as that of any
other model. The modules stay the model's own, but for one thing: they count positions themselves,
from the length of a cache whose rows are equally long. Here rows are ragged and drafts are trees,
so while our forward runs, and only then, hooks hand them the positions that are meant.

Shape legend: B sequences, N tokens, L keys, S source tokens, H heads, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import EncoderDecoderCache, PreTrainedModel

from decode.cache import SlotCache
from decode.draft import Draft
from decode.source_cache import Encoded, SourceCache


class Places(NamedTuple):
    """Where the tokens of a forward and the keys they see stand in their texts.

    Attributes:
        queries: [B, N].
        keys: [B or 1, L].
    """

    queries: Tensor
    keys: Tensor


@contextmanager
def _embedded_positions(decoder: Any, places: Places) -> Iterator[None]:
    """BART and its kin add an embedding, learnt or sinusoidal, of each token's position."""
    module = decoder.embed_positions

    def look_up(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "position_ids": places.queries.reshape(-1)}

    def in_rows(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.view(*places.queries.shape, -1)

    hooks = [
        module.register_forward_pre_hook(look_up, with_kwargs=True),
        module.register_forward_hook(in_rows),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _relative_bias(decoder: Any, places: Places) -> Iterator[None]:
    """T5 adds a bias by the distance between query and key; its first layer makes it for all."""
    attention = decoder.block[0].layer[0].SelfAttention

    def hand_in(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        distance = places.keys[:, None] - places.queries[:, :, None]  # [B, N, L]
        bucket = module._relative_position_bucket(
            distance,
            bidirectional=False,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
        bias = module.relative_attention_bias(bucket).permute(0, 3, 1, 2)  # [B, H, N, L]
        return args, {**kwargs, "position_bias": bias}

    hook = attention.register_forward_pre_hook(hand_in, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


# Families whose decoders are known to take positions in one of these ways, trees included.
FAMILIES: dict[str, Callable[[Any, Places], Any]] = {
    "bart": _embedded_positions,
    "blenderbot": _embedded_positions,
    "blenderbot-small": _embedded_positions,
    "marian": _embedded_positions,
    "mbart": _embedded_positions,
    "mt5": _relative_bias,
    "pegasus": _embedded_positions,
    "plbart": _embedded_positions,
    "t5": _relative_bias,
}


def refuse_family(model: PreTrainedModel) -> None:
    """Raise ValueError for an encoder-decoder model whose positions this runtime cannot set."""
    if model.config.model_type not in FAMILIES:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model of the family "
            f"{model.config.model_type!r}, whose positions this runtime cannot set; "
            f"it decodes {', '.join(FAMILIES)}"
        )


def num_layers(config: Any) -> int:
    """Layers of the decoder; `num_hidden_layers` of an encoder-decoder model are its encoder's."""
    names = ("num_decoder_layers", "decoder_layers") if config.is_encoder_decoder else ()
    found = (getattr(config, name, None) for name in names)
    return int(next((number for number in found if number is not None), config.num_hidden_layers))


class Seq2SeqOutput(NamedTuple):
    """What a causal LM's forward returns, of the decoder."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None


class EncoderDecoder:
    """Encodes sources, and runs the decoder over a `SlotCache` with the arguments of a causal LM.

    Attributes:
        max_source_length: tokens that the encoder can read; None where there is no limit.
    """

    def __init__(self, model: PreTrainedModel, cache: SlotCache):
        """Call `model`, whose decoder's own keys and values are in `cache`."""
        self.model = model
        self.max_source_length: int | None = getattr(model.config, "max_position_embeddings", None)
        self._places = FAMILIES[model.config.model_type]
        self._sources = SourceCache(
            num_layers=len(cache.layers), num_slots=cache.num_slots, dtype=model.dtype
        )
        self._caches = EncoderDecoderCache(cache, self._sources)
        self._no_states = torch.zeros(1, 1, 1, dtype=model.dtype, device=model.device)
        self._encoded: Encoded | None = None
        self._keys = self._no_states

    def encode(self, sources: Sequence[Tensor]) -> Encoded:
        """Read the sources [S], all at once.

        Raises:
            ValueError: one is empty.
        """
        lengths = [len(source) for source in sources]
        if 0 in lengths:
            raise ValueError("an encoder-decoder model needs a source, of a token at least")
        padded = pad_sequence(list(sources), batch_first=True).to(self.model.device)
        places = torch.arange(padded.shape[1], device=padded.device)
        is_token = places < torch.tensor(lengths, device=padded.device)[:, None]
        encoder = self.model.get_encoder()
        output = encoder(input_ids=padded, attention_mask=is_token.long(), return_dict=True)
        return Encoded(output.last_hidden_state, lengths)

    def open(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        num_keys: int,
        *,
        tree: Draft | None = None,
        encoded: Encoded | None = None,
    ) -> None:
        """Prepare a forward.

        Args:
            slots: the sequences.
            starts: committed tokens of each.
            num_keys: L.
            tree: the drafts whose nodes stand behind the committed tokens, unless they are chains.
            encoded: the sequences' sources, in their first forward.
        """
        device = self.model.device
        self._sources.open(slots, encoded, device)
        self._encoded = encoded
        keys = torch.arange(num_keys, device=device)[None]
        if tree is not None:
            first = torch.tensor(starts, device=device)[:, None]
            depths = tree.depths()
            places = first + torch.arange(depths.shape[1], device=device)
            # Of longer trees than the sequence has room for the rest is padding.
            keys = torch.cat([keys.expand(len(starts), -1), keys.new_zeros(len(starts), 1)], dim=1)
            keys = keys.scatter(1, places.clamp(max=num_keys), first + depths)[:, :num_keys]
        self._keys = keys

    def release(self, slot: int) -> None:
        """The sequence in `slot` is finished."""
        self._sources.release(slot)

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Any, position_ids: Tensor, **options: Any
    ) -> Seq2SeqOutput:
        """Run the decoder on `input_ids` [B, N]; the other arguments are a causal LM's."""
        encoded, caches = self._encoded, self._caches
        is_first = encoded is not None
        caches.is_updated = dict.fromkeys(range(len(caches)), not is_first)
        states = self._no_states if encoded is None else encoded.states
        options["past_key_values"] = caches
        with self._places(self.model.get_decoder(), Places(position_ids, self._keys)):
            output = self.model(
                encoder_outputs=(states,),
                attention_mask=self._sources.mask,
                decoder_input_ids=input_ids,
                decoder_attention_mask=attention_mask,
                **options,
            )
        return Seq2SeqOutput(output.logits, output.decoder_hidden_states)
