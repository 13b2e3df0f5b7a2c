"""A transformers model, unchanged, over our slot cache: the forward that everything shares."""

import inspect
import warnings
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from decode.cache import SlotCache, Window
from decode.compiled_forward import CompiledForward, difference, rounding
from decode.draft import Draft
from decode.encoder_decoder import EncoderDecoder, num_layers, refuse_family
from decode.int8.forward import forward_of
from decode.int8.linear import is_int8
from decode.lean import LeanForward
from decode.masks import MaskMaker
from decode.source_cache import Encoded

# These bias attention by distance or count keys themselves, and ignore masks that are handed in.
OWN_MASKS = {"bloom", "falcon", "mpt", "gpt_neo"}
FIRST_READ = 14  # tokens that compiled forwards are tried on
ROLLBACK_LAYERS = {"full_attention", "sliding_attention"}


class ModelOutput(NamedTuple):
    """What one forward gave.

    Attributes:
        logits: [B, N, V], or as many of the N as were asked for.
        hidden: layer -> [B, N, D]; layer k is the output of k layers, 0 the embeddings.
    """

    logits: Tensor
    hidden: dict[int, Tensor]


class CachedModel:
    """A language model and the keys and values of the sequences it is decoding.

    Masks are 4-D and positions explicit, so that ragged batches, trees and rollback work on the
    model as transformers ships it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int,
        max_length: int | None = None,
        num_ids: int | None = None,
        compiles: bool = False,
    ):
        """Wrap `model` for `num_slots` sequences of up to `max_length` tokens.

        `max_length` defaults to the model's context and is never more. `num_ids` is how many ids
        those who call have, where that is not the model's own number: ids that only they have are
        read as the model's last one and are impossible, ids that only the model has are cut off.
        With `compiles`, forwards of single sequences are compiled by torch, where that works
        (`decode/compiled_forward.py`).

        Raises:
            ValueError: the model keeps state that cannot be rolled back, or its attention takes no
                4-D masks, or it is none to compile; the message says which and what to do.
        """
        config = model.config.get_text_config()
        refuse_unsupported(model)
        if compiles:
            refuse_compiling(model)
        context = getattr(config, "max_position_embeddings", None) or max_length
        if context is None:
            raise ValueError(
                f"{type(model).__name__} names no max_position_embeddings; give max_length"
            )
        self.model = model
        self.device = model.device
        # The decoder of a translation model may have a vocabulary of its own.
        self.vocab_size: int = getattr(config, "decoder_vocab_size", None) or config.vocab_size
        self._surplus = 0 if num_ids is None else num_ids - self.vocab_size
        self.max_length: int = min(context, max_length or context)
        refuse_switching_rotary(config, self.max_length)
        self.cache = SlotCache(
            num_layers=num_layers(config), num_slots=num_slots, max_length=self.max_length
        )
        self.encoder_decoder: EncoderDecoder | None = None
        if model.config.is_encoder_decoder:
            self.encoder_decoder = EncoderDecoder(model, self.cache)
        self._call = self.encoder_decoder or model
        windows = _windows(config)
        self._kinds = list(windows)
        self._makers = [
            MaskMaker(
                max_length=self.max_length, window=window, dtype=model.dtype, device=self.device
            )
            for window in windows.values()
        ]
        # Padding may lie behind the context, where learnt position embeddings have no row.
        self._last_position = self.max_length - 1
        positions = torch.arange(self.max_length + 1, device=self.device)
        self._positions = positions.clamp(max=self._last_position)[None]
        # A drafter feeds single tokens several times a step: their views are made once.
        self._single_token: dict[int, tuple[Tensor | dict[str, Tensor], Tensor]] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._compiled: CompiledForward | None = None
        self._lean: LeanForward | None = None
        self._lean = self._tried(forward_of(model, self._positions))
        if compiles:
            self._compile()

    def forward(
        self,
        slots: Sequence[int],
        tokens: Tensor,
        *,
        tree: Draft | None = None,
        num_read: int = 0,
        layers: tuple[int, ...] = (),
        keep: Sequence[int] | None = None,
        commit: Sequence[int] | None = None,
        encoded: Encoded | None = None,
    ) -> ModelOutput:
        """Run `tokens` behind what is committed.

        Args:
            slots: [B] slots of the sequences.
            tokens: [B, N]; chains, unless `tree` says how they hang together.
            tree: the draft whose nodes the tokens are.
            num_read: how many nodes of `tree` the forwards just before have read, from the root on;
                the tokens are the nodes behind them, and see their keys.
            layers: hidden states to return.
            keep: the places whose logits are wanted, ascending; None is all of them.
            commit: how many tokens of each sequence are committed at once; None is none of them.
            encoded: of an encoder-decoder model, in the first forward of these sequences: their
                sources, as `encode` gives them.
        """
        width = tokens.shape[1]
        if self._surplus > 0:
            tokens = tokens.clamp(max=self.vocab_size - 1)
        is_tree = tree is not None and not tree.is_chain
        window = self.cache.open(slots, width, self.device, is_tree=is_tree, num_read=num_read)
        if tree is not None and is_tree:
            mask, positions = self._tree_inputs(window, tree, num_read)
        elif width == 1 and window.slot is not None:
            known = self._single_token.get(window.starts[0])
            if known is None:
                known = self._chain_inputs(window, width)
                self._single_token[window.starts[0]] = known
            mask, positions = known
        else:
            mask, positions = self._chain_inputs(window, width)
        if self.encoder_decoder is not None:
            starts = [start - num_read for start in window.starts]
            nodes = tree if is_tree else None
            self.encoder_decoder.open(slots, starts, window.num_keys, tree=nodes, encoded=encoded)
        start = None if is_tree or window.slot is None else window.starts[0]
        inputs = (tokens, mask, positions, self.cache, layers)
        if self._compiled is None or keep is not None:
            logits, hidden = self._run(*inputs, start=start, keep=keep)
        else:
            uncompiled = partial(self._run, *inputs, start=start)
            logits, hidden = self._compiled(tokens, mask, positions, window, layers, uncompiled)
        if commit is not None:
            self.cache.commit(slots, commit)
        if self._surplus != 0:
            logits = pad(logits, (0, self._surplus), value=-torch.inf)
        return ModelOutput(logits, hidden)

    def encode(self, sources: Sequence[Tensor]) -> Encoded | None:
        """What an encoder makes of the sources [S]; None of a model without one."""
        return None if self.encoder_decoder is None else self.encoder_decoder.encode(sources)

    def release(self, slot: int) -> None:
        """The sequence in `slot` is finished."""
        self.cache.release(slot)
        if self.encoder_decoder is not None:
            self.encoder_decoder.release(slot)

    def _run(
        self,
        tokens: Tensor,
        mask: Tensor | dict[str, Tensor],
        positions: Tensor,
        cache: Cache,
        layers: tuple[int, ...],
        *,
        start: int | None = None,
        keep: Sequence[int] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The short way where there is one: logits, and the hidden states asked for.

        Else the model's own forward. `start` is the first place of a single chain.
        """
        if self._lean is not None:
            return self._lean(
                tokens, mask, cache, start=start, positions=positions, layers=layers, keep=keep
            )
        extra: dict[str, object] = {"output_hidden_states": True} if layers else {}
        if keep is not None and self._keeps_logits:
            extra["logits_to_keep"] = torch.tensor(keep, dtype=torch.long, device=self.device)
        output = self._call(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        logits = output.logits
        if keep is not None and not self._keeps_logits:
            logits = logits[:, list(keep)]
        states = output.hidden_states or ()
        return logits, {layer: states[layer] for layer in layers}

    @torch.no_grad()
    def _compile(self) -> None:
        """Compile the forwards of one token and of several, and try them on a few tokens."""
        length = min(FIRST_READ, self.max_length - 1)
        tokens = self._some_tokens(length)
        read = length // 2
        self.forward([0], tokens[:, :read], commit=[read])
        self._compiled = CompiledForward(
            self._run, self.cache, vocab_size=self.vocab_size, name=type(self.model).__name__
        )
        for width in (1, length - read):
            self.forward([0], tokens[:, read : read + width])
        self.cache.release(0)

    @torch.no_grad()
    def _tried(self, lean: LeanForward | None) -> LeanForward | None:
        """`lean` where it gives the model's own logits, up to rounding, on a few tokens."""
        if lean is None:
            return None
        tokens = self._some_tokens(min(8, self.max_length))
        self._lean = None
        expected = self.forward([0], tokens).logits
        self._lean = lean
        found = difference(self.forward([0], tokens).logits, expected)
        # In int8 a value that is rounded another way moves others, layer by layer.
        if found <= (0.2 if is_int8(self.model) else rounding(self.model.dtype)):
            return lean
        warnings.warn(
            f"the lean forward of {type(self.model).__name__} gives other logits than the model's "
            f"own (by {found:.1e} of the largest), which is used instead, at some cost in speed",
            stacklevel=3,
        )
        return None

    def _some_tokens(self, count: int) -> Tensor:
        """[1, count] ids from all over the vocabulary."""
        return torch.arange(count, device=self.device)[None] * 7 % self.vocab_size

    def _tree_inputs(
        self, window: Window, tree: Draft, num_read: int
    ) -> tuple[Tensor | dict[str, Tensor], Tensor]:
        """Attention mask and positions [B, N] of draft trees, without the nodes read before."""
        ancestors = tree.ancestors()
        depths = ancestors.sum(-1) - 1
        starts = [start - num_read for start in window.starts]
        positions = torch.tensor(starts, device=self.device)[:, None] + depths
        masks = [maker.tree(starts, ancestors, window.num_keys) for maker in self._makers]
        if num_read:
            masks = [mask[:, :, num_read:].contiguous() for mask in masks]
            positions = positions[:, num_read:]
        return self._by_kind(masks), positions.clamp(max=self._last_position)

    def _chain_inputs(
        self, window: Window, width: int
    ) -> tuple[Tensor | dict[str, Tensor], Tensor]:
        """Attention mask and positions [B, N] of chains."""
        masks = [maker.chain(window.starts, width, window.num_keys) for maker in self._makers]
        if window.positions is None:
            positions = self._positions.narrow(1, window.starts[0], width)
        else:
            positions = window.positions.clamp(max=self._last_position)
        return self._by_kind(masks), positions

    def _by_kind(self, masks: list[Tensor]) -> Tensor | dict[str, Tensor]:
        """One mask as it is; several, by the kind of layer, as transformers expects them."""
        return masks[0] if len(masks) == 1 else dict(zip(self._kinds, masks, strict=True))


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise ValueError, in one sentence, for models that this runtime cannot decode exactly."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        refuse_family(model)
    if not model.can_generate():
        kind = "sequence-to-sequence" if model.config.is_encoder_decoder else "causal"
        raise ValueError(f"{name} has no language-model head; load it as a {kind} LM")
    kinds = set(getattr(config, "layer_types", None) or ()) - ROLLBACK_LAYERS
    if kinds or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{name} keeps state that cannot be rolled back after a rejected draft "
            f"({', '.join(sorted(kinds)) or 'recurrent layers'}); "
            "speculative decoding needs attention layers only"
        )
    if config.model_type in OWN_MASKS:
        raise ValueError(f"{name} makes its own attention masks and takes no 4-D masks")
    attention = config._attn_implementation
    if attention not in {"eager", "sdpa"}:
        raise ValueError(
            f"{name} was loaded with attn_implementation={attention!r}, which takes no 4-D masks; "
            'load it with attn_implementation="sdpa" or "eager"'
        )


def refuse_compiling(model: PreTrainedModel) -> None:
    """Raise ValueError, in one sentence, for models whose forwards are not compiled by torch."""
    name = type(model).__name__
    if is_int8(model):
        raise ValueError(
            "a model in int8 has kernels of its own, which torch does not compile; "
            "choose one of quantization and compile"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"the forward of an encoder-decoder model, {name}, is not compiled")


def refuse_switching_rotary(config: object, max_length: int) -> None:
    """Raise ValueError where rotary positions change their scale within `max_length` tokens.

    Keys that are cached already would have been turned by the other scale.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if kind == "longrope" and original is not None and max_length > original:
        raise ValueError(
            f"rotary positions of type longrope change their scale behind {original} tokens, and "
            f"cached keys with them; decode within that: max_length={original}"
        )


def _windows(config: object) -> dict[str, int | None]:
    """Sliding window of each kind of layer, None where it sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        uses_window = getattr(config, "use_sliding_window", True) and window is not None
        return {"sliding_attention" if uses_window else "full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}
