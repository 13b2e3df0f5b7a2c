"""An independent causal LM drafts chains, token by token.

Leviathan et al. 2023 and Chen et al. 2023: greedy sequences draft greedily, sampled ones sample
from the drafter under the same temperature, top-k and top-p.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decode.cached_model import CachedModel
from decode.draft import Draft
from decode.protocols import Acceptance, Context, Drafter
from decode.sampling import argmax, draw
from decode.target import Target


class LMDrafter(Drafter):
    """A small model with the target's tokenizer and a cache of its own."""

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, model: PreTrainedModel, *, target: Target, draft_length: int = 5):
        """Draft up to `draft_length` tokens a step for `target`.

        A vocabulary padded to another size than the target's is fine: ids that the target does not
        have are never drafted. Sequences longer than the drafter's own context are decoded without
        a draft from there on.

        Raises:
            ValueError: the model cannot draft with this runtime, or is on another device.
        """
        if model.device != target.device:
            raise ValueError(f"the drafter is on {model.device}, the target on {target.device}")
        if draft_length < 1:
            raise ValueError(f"draft_length must be >= 1, got {draft_length}; or use NoDrafter")
        self.cached = CachedModel(
            model.eval(), num_slots=target.max_batch_size, max_length=target.max_length
        )
        self.draft_length = draft_length
        self.surplus = target.vocab_size - self.cached.vocab_size
        self.device = target.device

    def begin(self, slot: int, prompt: Tensor, hidden: Mapping[int, Tensor]) -> None:
        """Read the prompt but for its last token, which the first draft begins with."""
        self.cached.cache.release(slot)
        if 1 < len(prompt) <= self.cached.max_length:
            tokens = self._readable(prompt[None, :-1].to(self.device))
            self.cached.forward([slot], tokens, keep=[], commit=[len(prompt) - 1])

    def propose(self, context: Context) -> Draft:
        """Chains of up to `draft_length` tokens, shorter where `context.room` is."""
        slots = context.slots.tolist()
        lengths = context.lengths.tolist()
        # The drafter reads one token less than it drafts; its own context may be the shorter one.
        counts = [
            max(0, min(self.draft_length, room, self.cached.max_length - length + 1))
            for room, length in zip(context.room.tolist(), lengths, strict=True)
        ]
        roots = context.roots.to(self.device)
        longest = max(counts)
        if longest == 0:
            return Draft.chain(roots)
        sampling = context.sampling
        is_greedy = sampling.is_greedy
        if not is_greedy:
            uniforms = sampling.uniforms(counts, self.device)
        logits = self._catch_up(context, slots, lengths, counts)
        tokens, laws = [roots], []
        are_even = min(counts) == longest
        one_each = [1] * len(slots)
        for step in range(longest):
            if is_greedy:
                token = argmax(logits)
            else:
                laws.append(sampling.probs(logits[:, 0]))
                token = draw(laws[-1], uniforms[:, step])[:, None]
            tokens.append(token)
            if step + 1 < longest:
                read = one_each if are_even else [int(step + 1 < count) for count in counts]
                logits = self._logits(slots, token, read)
        # Row n is the law of node n's children; the last node has none.
        probs = None if is_greedy else torch.stack([*laws, torch.zeros_like(laws[0])], dim=1)
        num_nodes = None  # all are as deep as the deepest
        if not are_even:
            num_nodes = torch.tensor(counts, device=self.device) + 1
        return Draft.chain(torch.cat(tokens, dim=1), num_nodes=num_nodes, probs=probs)

    def observe(self, context: Context, draft: Draft, acceptance: Acceptance) -> None:
        """Forget what was rejected: committed tokens and the accepted path stay."""
        lengths, accepted = context.lengths.tolist(), acceptance.num_accepted.tolist()
        kept = [length + count for length, count in zip(lengths, accepted, strict=True)]
        self.cached.cache.truncate(context.slots.tolist(), kept)

    def end(self, slot: int) -> None:
        """Give the slot back."""
        self.cached.cache.release(slot)

    def _catch_up(
        self, context: Context, slots: list[int], lengths: list[int], counts: list[int]
    ) -> Tensor:
        """Read the committed tokens that are not cached yet: [B, 1, V] logits behind the root.

        That is the root alone, or, where the whole last draft was accepted, its last token too.
        """
        cached = [self.cached.cache.lengths[slot] for slot in slots]
        missing = [
            length - done if count else 0
            for length, done, count in zip(lengths, cached, counts, strict=True)
        ]
        width = max(missing)
        if len(slots) == 1:
            tokens = context.tokens.narrow(1, cached[0], width)
        else:
            columns = torch.tensor(cached)[:, None] + torch.arange(width)
            tokens = context.tokens.gather(1, columns.clamp(max=context.tokens.shape[1] - 1))
        logits = self._logits(slots, tokens.to(self.device), missing)
        if min(missing) == width:
            return logits[:, -1:]
        last = torch.tensor(missing, device=logits.device).clamp(min=1) - 1
        return logits[torch.arange(len(slots), device=logits.device), last][:, None]

    def _logits(self, slots: list[int], tokens: Tensor, commit: list[int]) -> Tensor:
        """[B, N, V] over the target's vocabulary; `commit` of each sequence's tokens are kept."""
        if self.surplus == 0:
            return self.cached.forward(slots, tokens, commit=commit).logits
        logits = self.cached.forward(slots, self._readable(tokens), commit=commit).logits
        # Ids that only the drafter has are cut off, ids that only the target has are impossible.
        return torch.nn.functional.pad(logits, (0, self.surplus), value=-torch.inf)

    def _readable(self, tokens: Tensor) -> Tensor:
        """Ids that only the target has are read as the drafter's last one."""
        return tokens.clamp(max=self.cached.vocab_size - 1) if self.surplus > 0 else tokens
