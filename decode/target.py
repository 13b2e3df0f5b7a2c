"""The target: the model whose output must be preserved, and its cache."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from decode.cached_model import CachedModel, ModelOutput, refuse_unsupported
from decode.draft import Draft
from decode.protocols import Acceptance

PREFILL_CHUNK = 512
NEUTRAL_PROCESSORS = {
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
}


class Target:
    """A transformers causal LM that prefills, verifies and commits; weights stay as they are."""

    def __init__(
        self, model: PreTrainedModel, *, max_batch_size: int = 8, max_length: int | None = None
    ):
        """Wrap `model` for up to `max_batch_size` sequences at a time.

        Args:
            model: any transformers causal LM whose layers are attention.
            max_batch_size: slots of the cache.
            max_length: tokens per sequence, prompt included; the model's context by default.

        Raises:
            ValueError: the model cannot be decoded by this runtime, or its generation config asks
                for what this runtime does not apply.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be >= 1, got {max_batch_size}")
        check_supported(model)
        self.model = model.eval()
        self.cached = CachedModel(model, num_slots=max_batch_size, max_length=max_length)
        self.max_batch_size = max_batch_size
        self.max_length = self.cached.max_length
        self.vocab_size = self.cached.vocab_size
        self.device = self.cached.device
        self.eos_token_ids = _eos_token_ids(model)
        self.repetition_penalty = _repetition_penalty(model)

    def prefill(
        self, slots: Sequence[int], prompts: Sequence[Tensor], layers: tuple[int, ...] = ()
    ) -> tuple[ModelOutput, list[dict[int, Tensor]]]:
        """Read the prompts. Their last tokens are roots: read too, but not committed.

        Of a prompt whose slot holds its beginning already (`share`), the rest is read.

        Returns:
            the output at the roots, as `verify` would give it for drafts of the root alone; and for
            each prompt the states of all other tokens read, layer -> [T - 1, D].
        """
        lengths = self.cached.cache.lengths
        prompts = [prompt[lengths[slot] :] for slot, prompt in zip(slots, prompts, strict=True)]
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
            output = self.cached.forward(slots, chunk, layers=layers, keep=places, commit=kept)
            for row, count in enumerate(fed):
                for layer in layers:
                    states[row][layer].append(output.hidden[layer][row, :count])
            for row in ending:
                rows[row] = output.logits[row, places.index(fed[row] - 1)]
        read = [{layer: torch.cat(parts) for layer, parts in row.items()} for row in states]
        at_root = {layer: torch.stack([row[layer][-1:] for row in read]) for layer in layers}
        logits = torch.stack([rows[row] for row in range(len(prompts))])[:, None]
        before = [{layer: tokens[:-1] for layer, tokens in row.items()} for row in read]
        return ModelOutput(logits, at_root), before

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
            return self.cached.forward(slots, draft.tokens, tree=draft, layers=layers)
        except IndexError as error:
            unknown = draft.tokens[(draft.tokens < 0) | (draft.tokens >= self.vocab_size)]
            if len(unknown) == 0:
                raise
            raise ValueError(
                f"the drafter proposed token {int(unknown[0])}; the target has the tokens 0 to "
                f"{self.vocab_size - 1}"
            ) from error

    def commit(self, slots: Sequence[int], draft: Draft, acceptance: Acceptance) -> None:
        """Keep the keys and values of the accepted paths, drop the rest."""
        kept = [count + 1 for count in acceptance.num_accepted.tolist()]
        self.cached.cache.commit(slots, kept, None if draft.is_chain else acceptance.path)

    def release(self, slot: int) -> None:
        """The sequence in `slot` is finished."""
        self.cached.cache.release(slot)


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    eos = model.generation_config.eos_token_id if model.generation_config else None
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, Sequence) else frozenset([eos])


def check_supported(model: PreTrainedModel) -> None:
    """Raise ValueError, in one sentence, for a model that this runtime cannot decode exactly."""
    refuse_unsupported(model)
    _refuse_processors(model)


def _repetition_penalty(model: PreTrainedModel) -> float:
    config = model.generation_config
    penalty = getattr(config, "repetition_penalty", None) if config else None
    return 1.0 if penalty is None else float(penalty)


def _refuse_processors(model: PreTrainedModel) -> None:
    """Raise ValueError for logits processors that would be left out: that changes the output."""
    settings: Mapping[str, object] = (
        model.generation_config.to_dict() if model.generation_config else {}
    )
    active = [
        name
        for name, neutral in NEUTRAL_PROCESSORS.items()
        if settings.get(name) not in (None, neutral)
    ]
    if active:
        raise ValueError(
            f"the generation config of {model.config._name_or_path or type(model).__name__} asks "
            f"for {', '.join(f'{name}={settings[name]!r}' for name in active)}, which this runtime "
            f"does not apply; to decode without, take it out of generation_config.json, or set "
            f"model.generation_config.{active[0]} = None"
        )
