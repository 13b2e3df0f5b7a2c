"""What language models that draft have in common: a cache of their own, the target's vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decode.cached_model import CachedModel
from decode.models.trimmed import trimmed_head
from decode.protocols import Context
from decode.target import Target


class Reader:
    """A model with the target's tokenizer that reads what is committed and what it drafts.

    Beside an encoder-decoder target it may be such a model too: it reads the same sources.

    Attributes:
        cached: the model and its keys and values.
        num_choices: how many ids both the model's head and the target have.
    """

    def __init__(self, model: PreTrainedModel, *, target: Target):
        """Read for `target`.

        A vocabulary padded to another size than the target's is fine: ids that the target does not
        have are never drafted. Sequences longer than the model's own context are not read.

        Raises:
            ValueError: the model cannot draft with this runtime, or is on another device.
        """
        if model.device != target.device:
            raise ValueError(f"the drafter is on {model.device}, the target on {target.device}")
        if model.config.is_encoder_decoder and not target.is_encoder_decoder:
            raise ValueError(
                f"the drafter is an encoder-decoder model, {type(model).__name__}, and needs "
                f"sources, which {type(target.model).__name__} has none of; choose a causal LM"
            )
        self._target = target
        self.cached = CachedModel(
            model.eval(),
            num_slots=target.max_batch_size,
            max_length=target.max_length,
            num_ids=target.vocab_size,
            compiles=target.compiles,
        )
        self.cache = self.cached.cache
        self.device = target.device
        self.is_on_cpu = target.device.type == "cpu"  # nothing has to be moved there
        head = trimmed_head(model)
        num_ids = self.cached.vocab_size if head is None else head.out_features
        self.num_choices = min(target.vocab_size, num_ids)

    def begin(self, slot: int, prompt: Tensor) -> None:
        """Read the prompt [T] but for its last token, which the first draft begins with.

        An encoder reads the source before, as much of it as it takes.
        """
        self.cache.release(slot)
        num_read = len(prompt) - 1 if len(prompt) <= self.cached.max_length else 0
        width, encoded = num_read, None
        if self.cached.encoder_decoder is not None:
            source = self._target.sources[slot][: self.cached.encoder_decoder.max_source_length]
            last = self.cached.model.config.vocab_size - 1  # the decoder's may be another one
            encoded = self.cached.encode([source.clamp(max=last)])
            width = max(num_read, 1)  # the source comes to the slot with a first forward
        if width > 0:
            tokens = prompt[None, :width].to(self.device)
            self.cached.forward([slot], tokens, keep=[], commit=[num_read], encoded=encoded)

    def depths(self, context: Context, wanted: Sequence[int]) -> list[int]:
        """How deep the draft of each sequence may be, where it is `wanted` so deep.

        The model reads one token less than it drafts; its own context may be the shorter one.
        """
        longest, found = self.cached.max_length + 1, []
        for row, depth in enumerate(wanted):
            found.append(max(0, min(depth, context.room[row], longest - context.lengths[row])))
        return found

    def catch_up(
        self, context: Context, roots: Tensor, depths: list[int], *, commit_roots: bool
    ) -> Tensor:
        """Read the committed tokens that are not cached yet, for sequences with a draft to come.

        That is the root, and before it what was accepted without having been read.

        Args:
            context: of this step.
            roots: [B, 1] the context's, on the model's device.
            depths: as `depths` gives them.
            commit_roots: False where the root is the first of the nodes that the step reads.

        Returns:
            [B, 1, V] logits behind the root.
        """
        slots, lengths = context.slots, context.lengths
        cached, missing = self.cache.lengths, []
        for row, slot in enumerate(slots):
            missing.append(lengths[row] - cached[slot] if depths[row] else 0)
        width = max(missing)
        if width == 1:
            tokens = roots
        elif len(slots) == 1:
            tokens = context.tokens.narrow(1, cached[slots[0]], width)
        else:
            starts = torch.tensor([cached[slot] for slot in slots])
            columns = starts[:, None] + torch.arange(width)
            tokens = context.tokens.gather(1, columns.clamp(max=context.tokens.shape[1] - 1))
        committed = missing if commit_roots else [max(0, count - 1) for count in missing]
        if not self.is_on_cpu:
            tokens = tokens.to(self.device)
        logits = self.cached.forward(slots, tokens, commit=committed).logits
        if min(missing) == width:
            return logits if width == 1 else logits[:, -1:]
        last = torch.tensor(missing, device=logits.device).clamp(min=1) - 1
        return logits[torch.arange(len(slots), device=logits.device), last][:, None]
