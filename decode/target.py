"""The target: the model whose output must be preserved, and its cache."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decode.cached_model import CachedModel, ModelOutput
from decode.draft import Draft
from decode.protocols import Acceptance

PREFILL_CHUNK = 512
NEUTRAL_PROCESSORS = {
    "repetition_penalty": 1.0,
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
            ValueError: the model cannot be decoded by this runtime.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be >= 1, got {max_batch_size}")
        self.model = model.eval()
        self.cached = CachedModel(model, num_slots=max_batch_size, max_length=max_length)
        self.max_batch_size = max_batch_size
        self.max_length = self.cached.max_length
        self.vocab_size = self.cached.vocab_size
        self.device = self.cached.device
        self.eos_token_ids = _eos_token_ids(model)
        _warn_about_processors(model)

    def prefill(
        self, slots: Sequence[int], prompts: Sequence[Tensor], layers: tuple[int, ...] = ()
    ) -> list[dict[int, Tensor]]:
        """Cache the prompts but for their last token, which is the root of the first draft.

        Returns:
            for each prompt: layer -> [T - 1, D].
        """
        counts = [len(prompt) - 1 for prompt in prompts]
        longest = max(counts, default=0)
        padded = torch.zeros(len(prompts), max(longest, 1), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            padded[row, : counts[row]] = prompt[:-1]
        padded = padded.to(self.device)
        states: list[dict[int, list[Tensor]]] = [{layer: [] for layer in layers} for _ in prompts]
        for begin in range(0, longest, PREFILL_CHUNK):
            chunk = padded[:, begin : begin + PREFILL_CHUNK]
            fed = [min(max(count - begin, 0), chunk.shape[1]) for count in counts]
            output = self.cached.forward(slots, chunk, layers=layers, last_only=True)
            self.cached.cache.commit(slots, fed)
            for row, count in enumerate(fed):
                for layer in layers:
                    states[row][layer].append(output.hidden[layer][row, :count])
        return [
            {layer: torch.cat(parts) for layer, parts in row.items() if parts} for row in states
        ]

    def verify(
        self, slots: Sequence[int], draft: Draft, layers: tuple[int, ...] = ()
    ) -> ModelOutput:
        """One forward over every node of the drafts: logits [B, N, V]."""
        return self.cached.forward(slots, draft.tokens, tree=draft, layers=layers)

    def commit(self, slots: Sequence[int], draft: Draft, acceptance: Acceptance) -> None:
        """Keep the keys and values of the accepted paths, drop the rest."""
        kept = (acceptance.num_accepted + 1).tolist()
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


def _warn_about_processors(model: PreTrainedModel) -> None:
    settings: Mapping[str, object] = (
        model.generation_config.to_dict() if model.generation_config else {}
    )
    active = [
        f"{name}={settings[name]!r}"
        for name, neutral in NEUTRAL_PROCESSORS.items()
        if settings.get(name) not in (None, neutral)
    ]
    if active:
        warnings.warn(
            f"the generation config of {model.config._name_or_path or type(model).__name__} asks "
            f"for {', '.join(active)}, which this runtime does not apply: outputs are those of the "
            "plain model",
            stacklevel=3,
        )
