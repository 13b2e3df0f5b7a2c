"""The target: the model whose output must be preserved, and its cache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from decode.cached_model import CachedModel, ModelOutput, refuse_unsupported
from decode.draft import Draft
from decode.processors import (
    banned_tokens,
    decoder_prompt,
    eos_token_ids,
    forced_eos,
    refuse_processors,
    repetition_penalty,
)
from decode.protocols import Acceptance
from decode.requests import Request

PREFILL_CHUNK = 512


class Target:
    """A transformers model that prefills, verifies and commits; its weights stay as they are.

    Attributes:
        compiles: forwards are compiled where that works.
        is_encoder_decoder: it reads a source besides the text it continues.
        sources: slot -> the source of the sequence there.
        forced_eos: the last token of an output that reaches its limit, where the generation config
            names one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_batch_size: int = 8,
        max_length: int | None = None,
        compiles: bool = False,
    ):
        """Wrap `model` for up to `max_batch_size` sequences at a time.

        Args:
            model: any transformers causal LM whose layers are attention, or an encoder-decoder
                model of a known family.
            max_batch_size: slots of the cache.
            max_length: tokens per sequence, prompt included; the model's context by default. Of an
                encoder-decoder model these are the decoder's.
            compiles: let torch compile the forwards of single sequences, the target's and those of
                small models that draft for it. That takes a while at the first time; what cannot be
                compiled, or gives other numbers then, runs as it would without, with a warning.

        Raises:
            ValueError: the model cannot be decoded by this runtime, or compiled as asked, or its
                generation config asks for what this runtime does not apply.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be >= 1, got {max_batch_size}")
        check_supported(model)
        self.model = model.eval()
        self.compiles = compiles
        self.cached = CachedModel(
            model, num_slots=max_batch_size, max_length=max_length, compiles=compiles
        )
        self.max_batch_size = max_batch_size
        self.max_length = self.cached.max_length
        self.vocab_size = self.cached.vocab_size
        self.device = self.cached.device
        self.eos_token_ids = eos_token_ids(model)
        self.repetition_penalty = repetition_penalty(model)
        self.forced_eos = forced_eos(model)
        banned = banned_tokens(model)
        self._banned = None if banned is None else torch.tensor(banned, device=self.device)
        self.is_encoder_decoder: bool = model.config.is_encoder_decoder
        self.sources: dict[int, Tensor] = {}

    def request(self, text: Sequence[int], **others: Any) -> Request:
        """A request to continue `text`, or of an encoder-decoder model to make an output of it."""
        if self.is_encoder_decoder:
            return Request(source=text, **others)
        return Request(prompt=text, **others)

    def decoder_prompt(self, given: Sequence[int] = ()) -> list[int]:
        """What an encoder-decoder model's output is written behind; nothing of other models."""
        return decoder_prompt(self.model, given)

    def complete(self, request: Request) -> Request:
        """The request with what it leaves to an encoder-decoder model.

        That is the decoder's prompt: the start token, and behind a prompt of one token the BOS that
        is forced. And the material of drafters: the source, where source and output share a
        vocabulary.

        Raises:
            ValueError: the request has no prompt, or a source where none is read, or none where it
                must be.
        """
        name = type(self.model).__name__
        if not self.is_encoder_decoder:
            if len(request.source):
                raise ValueError(
                    f"request {request.id!r} has a source, but {name} has no encoder; "
                    "put the text into its prompt"
                )
            if len(request.prompt) == 0:
                raise ValueError(f"request {request.id!r} has an empty prompt; it needs a token")
            return request
        if len(request.source) == 0:
            raise ValueError(
                f"request {request.id!r} has no source, which the encoder of {name} reads: "
                "Request(source=...)"
            )
        prompt = self.decoder_prompt(request.prompt)
        is_shared = getattr(self.model.config, "share_encoder_decoder_embeddings", True)
        material = request.material
        if len(material) == 0 and is_shared:
            material = request.source
        return replace(request, prompt=prompt, material=material)

    def room(self, request: Request) -> int:
        """How many tokens the output of a complete request may have; 0 if its texts do not fit."""
        reader = self.cached.encoder_decoder
        longest = None if reader is None else reader.max_source_length
        if longest is not None and len(request.source) > longest:
            return 0
        return max(0, self.max_length - len(request.prompt))

    def prefill(
        self,
        slots: Sequence[int],
        prompts: Sequence[Tensor],
        layers: tuple[int, ...] = (),
        *,
        sources: Sequence[Sequence[int]] = (),
    ) -> tuple[ModelOutput, list[dict[int, Tensor]]]:
        """Read the prompts. Their last tokens are roots: read too, but not committed.

        Of a prompt whose slot holds its beginning already (`share`), the rest is read. An encoder
        reads the sources before.

        Returns:
            the output at the roots, as `verify` would give it for drafts of the root alone; and for
            each prompt the states of all other tokens read, layer -> [T - 1, D].
        """
        lengths = self.cached.cache.lengths
        prompts = [prompt[lengths[slot] :] for slot, prompt in zip(slots, prompts, strict=True)]
        encoded = None
        if self.is_encoder_decoder:
            texts = [torch.tensor(list(source), dtype=torch.long) for source in sources]
            self.sources.update(zip(slots, texts, strict=True))
            encoded = self.cached.encode(texts)
        counts = [len(prompt) for prompt in prompts]
        padded = pad_sequence(list(prompts), batch_first=True).to(self.device)
        states: list[dict[int, list[Tensor]]] = [{layer: [] for layer in layers} for _ in prompts]
        rows: dict[int, Tensor] = {}
        for begin in range(0, max(counts), PREFILL_CHUNK):
            chunk = padded[:, begin : begin + PREFILL_CHUNK]
            fed = [min(max(count - begin, 0), chunk.shape[1]) for count in counts]
            ending = [row for row, count in enumerate(counts) if 0 < count - begin <= fed[row]]
            places = sorted({fed[row] - 1 for row in ending})
            kept = [count - (row in ending) for row, count in enumerate(fed)]
            output = self.cached.forward(
                slots, chunk, layers=layers, keep=places, commit=kept, encoded=encoded
            )
            encoded = None  # its keys and values are in the slots
            for row, count in enumerate(fed):
                for layer in layers:
                    states[row][layer].append(output.hidden[layer][row, :count])
            for row in ending:
                rows[row] = output.logits[row, places.index(fed[row] - 1)]
        read = [{layer: torch.cat(parts) for layer, parts in row.items()} for row in states]
        at_root = {layer: torch.stack([row[layer][-1:] for row in read]) for layer in layers}
        logits = torch.stack([rows[row] for row in range(len(prompts))])[:, None]
        before = [{layer: tokens[:-1] for layer, tokens in row.items()} for row in read]
        return self._allowed(ModelOutput(logits, at_root)), before

    def share(self, source: int, slot: int, length: int) -> None:
        """Let the free `slot` begin with the first `length` tokens that `source` has read."""
        self.cached.cache.copy(source, slot, length)

    def verify(
        self, slots: Sequence[int], draft: Draft, layers: tuple[int, ...] = ()
    ) -> ModelOutput:
        """One forward over every node of the drafts: logits [B, N, V].

        Raises:
            ValueError: a node's token is none of the target's (on a GPU the driver stops instead).
        """
        try:
            output = self.cached.forward(slots, draft.tokens, tree=draft, layers=layers)
        except IndexError as error:
            unknown = draft.tokens[(draft.tokens < 0) | (draft.tokens >= self.vocab_size)]
            if len(unknown) == 0:
                raise
            raise ValueError(
                f"the drafter proposed token {int(unknown[0])}; the target has the tokens 0 to "
                f"{self.vocab_size - 1}"
            ) from error
        return output if self._banned is None else self._allowed(output)

    def commit(self, slots: Sequence[int], draft: Draft, acceptance: Acceptance) -> None:
        """Keep the keys and values of the accepted paths, drop the rest."""
        self.cached.cache.commit_paths(slots, acceptance.paths, in_order=draft.is_chain)

    def release(self, slot: int) -> None:
        """The sequence in `slot` is finished."""
        self.cached.release(slot)
        self.sources.pop(slot, None)

    def _allowed(self, output: ModelOutput) -> ModelOutput:
        """The output, without the tokens that are never written."""
        if self._banned is None:
            return output
        return output._replace(logits=output.logits.index_fill(-1, self._banned, -torch.inf))


def check_supported(model: PreTrainedModel) -> None:
    """Raise ValueError, in one sentence, for a model that this runtime cannot decode exactly."""
    refuse_unsupported(model)
    refuse_processors(model)
