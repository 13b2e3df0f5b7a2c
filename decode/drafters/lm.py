"""An independent causal LM drafts chains, token by token.

Leviathan et al. 2023 and Chen et al. 2023: greedy sequences draft greedily, sampled ones sample
from the drafter under the same temperature, top-k and top-p.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decode.draft import Draft
from decode.drafters.reading import Reader
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
        if draft_length < 1:
            raise ValueError(f"draft_length must be >= 1, got {draft_length}; or use NoDrafter")
        self.reader = Reader(model, target=target)
        self.draft_length = draft_length

    def begin(self, slot: int, prompt: Tensor, hidden: Mapping[int, Tensor]) -> None:
        """Read the prompt but for its last token, which the first draft begins with."""
        self.reader.begin(slot, prompt)

    def propose(self, context: Context) -> Draft:
        """Chains of up to `draft_length` tokens, shorter where `context.room` is."""
        reader = self.reader
        slots = context.slots.tolist()
        counts = reader.depths(context, self.draft_length)
        roots = context.roots.to(reader.device)
        longest = max(counts)
        if longest == 0:
            return Draft.chain(roots)
        sampling = context.sampling
        is_greedy = sampling.is_greedy
        if not is_greedy:
            uniforms = sampling.uniforms(counts, reader.device)
        logits = reader.catch_up(context, slots, counts, commit_roots=True)
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
                logits = reader.read(slots, token, commit=read)
        # Row n is the law of node n's children; the last node has none.
        probs = None if is_greedy else torch.stack([*laws, torch.zeros_like(laws[0])], dim=1)
        num_nodes = None  # all are as deep as the deepest
        if not are_even:
            num_nodes = torch.tensor(counts, device=reader.device) + 1
        return Draft.chain(torch.cat(tokens, dim=1), num_nodes=num_nodes, probs=probs)

    def observe(self, context: Context, draft: Draft, acceptance: Acceptance) -> None:
        """Forget what was rejected: committed tokens and the accepted path stay."""
        lengths, accepted = context.lengths.tolist(), acceptance.num_accepted.tolist()
        kept = [length + count for length, count in zip(lengths, accepted, strict=True)]
        self.reader.cache.truncate(context.slots.tolist(), kept)

    def end(self, slot: int) -> None:
        """Give the slot back."""
        self.reader.cache.release(slot)
