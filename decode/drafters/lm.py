"""An independent causal LM drafts chains, token by token.

Leviathan et al. 2023 and Chen et al. 2023: greedy sequences draft greedily, sampled ones sample
from the drafter under the same temperature, top-k and top-p.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decode.draft import Draft
from decode.draft_length import Constant, DraftLength
from decode.drafters.chain import Chain, Chains
from decode.drafters.reading import Reader
from decode.penalty import apply_penalty, tokens_seen
from decode.protocols import Acceptance, Context, Drafter
from decode.sampling import draw
from decode.target import Target


class LMDrafter(Drafter):
    """A small model with the target's tokenizer and a cache of its own."""

    hidden_layers: tuple[int, ...] = ()

    def __init__(
        self, model: PreTrainedModel, *, target: Target, draft_length: int | DraftLength = 5
    ):
        """Draft up to `draft_length` tokens a step for `target`, or as many as it decides.

        A vocabulary padded to another size than the target's is fine: ids that the target does not
        have are never drafted. Sequences longer than the drafter's own context are decoded without
        a draft from there on.

        Raises:
            ValueError: the model cannot draft with this runtime, or is on another device.
        """
        self.length = Constant(draft_length) if isinstance(draft_length, int) else draft_length
        self.reader = Reader(model, target=target)
        self._chains = Chains(self.reader.device)
        # slot -> how sure of each token of the last draft, where that is looked at
        self._confidences: dict[int, list[float]] = {}

    def begin(self, slot: int, prompt: Tensor, hidden: Mapping[int, Tensor]) -> None:
        """Read the prompt but for its last token, which the first draft begins with."""
        self.length.begin(slot)
        self.reader.begin(slot, prompt)

    def propose(self, context: Context) -> Draft:
        """Chains as long as `draft_length` says, shorter where `context.room` is."""
        reader = self.reader
        slots = context.slots
        counts = reader.depths(context, self.length.choose(slots))
        longest = max(counts)
        chain = self._chains.begin(context.roots, longest + 1)
        if longest == 0:
            return chain.draft
        logits = reader.catch_up(context, chain.columns[0], counts, commit_roots=True)
        sampling, threshold = context.sampling, self.length.min_confidence
        self._confidences = {slot: [] for slot in slots} if threshold > 0 else {}
        is_greedy = sampling.is_greedy
        if is_greedy and threshold == 0 and not sampling.has_penalty:
            return self._likeliest(chain, slots, counts, logits)
        if not is_greedy:
            uniforms = sampling.uniforms(counts, reader.device)
        laws = []
        seen = None
        if sampling.has_penalty:
            seen = tokens_seen(context, logits.shape[-1]).to(reader.device)
        for step in range(longest):
            if seen is not None:
                seen.scatter_(1, chain.columns[step], True)
                logits = apply_penalty(logits, seen[:, None], context)
            if threshold > 0:
                self._stop_where_unsure(logits, slots, counts, step)
                longest = max(counts)
                if step >= longest:
                    break
            if is_greedy:
                chain.put_likeliest(step + 1, logits)
            else:
                laws.append(sampling.probs(logits[:, 0]))
                chain.columns[step + 1].copy_(draw(laws[-1], uniforms[:, step])[:, None])
            if step + 1 < longest:
                read = [int(step + 1 < count) for count in counts]
                logits = reader.cached.forward(slots, chain.columns[step + 1], commit=read).logits
        # Row n is the law of node n's children; the last node has none.
        probs = None
        if laws:
            probs = torch.stack([*laws, torch.zeros_like(laws[0])], dim=1)
        num_nodes = torch.tensor(counts, device=reader.device) + 1
        tokens = chain.draft.tokens[:, : longest + 1]
        return Draft.chain(tokens, num_nodes=num_nodes, probs=probs)

    def observe(
        self, context: Context, draft: Draft, acceptance: Acceptance, target_logits: Tensor
    ) -> None:
        """Forget what was rejected: committed tokens and the accepted path stay."""
        slots, paths = context.slots, acceptance.paths
        for row, slot in enumerate(slots):
            self.reader.cache.truncate(slot, context.lengths[row] + len(paths[row]) - 1)
        if isinstance(self.length, Constant):
            return  # it learns nothing
        accepted = acceptance.num_accepted
        drafted = [count - 1 for count in draft.num_nodes.tolist()]
        confidences = [self._confidences.get(slot, []) for slot in slots]
        self.length.observe(slots, drafted, accepted, confidences)

    def end(self, slot: int, output: Sequence[int]) -> None:
        """Give the slot back."""
        self.reader.cache.release(slot)

    def _likeliest(
        self, chain: Chain, slots: list[int], counts: list[int], logits: Tensor
    ) -> Draft:
        """Chains of the likeliest tokens, `logits` those behind the roots.

        What is done for every token is written out: each call would meet cold caches.
        """
        longest, forward = max(counts), self.reader.cached.forward
        are_even, one_each = min(counts) == longest, [1] * len(slots)
        arrays = chain.arrays if logits.dtype is torch.float32 else None
        for place in range(1, longest + 1):
            if arrays is not None:
                logits.numpy().argmax(-1, arrays[place])  # ten times as fast as torch's
            else:
                torch.argmax(logits, -1, out=chain.columns[place])
            if place < longest:
                read = one_each if are_even else [int(place < count) for count in counts]
                logits = forward(slots, chain.columns[place], commit=read).logits
        if are_even:
            return chain.draft
        num_nodes = torch.tensor(counts, device=self.reader.device) + 1
        return Draft.chain(chain.draft.tokens, num_nodes=num_nodes)

    def _stop_where_unsure(
        self, logits: Tensor, slots: list[int], counts: list[int], step: int
    ) -> None:
        """Cut the counts to `step` where the law of the next token has no likely one.

        That is the drafter's law at temperature 1, whatever the sequences ask for: what is looked
        at must not be the token drawn.
        """
        confidences = logits[:, 0].float().softmax(-1).amax(-1).tolist()
        for row, (slot, confidence) in enumerate(zip(slots, confidences, strict=True)):
            if step < counts[row] and confidence < self.length.min_confidence:
                counts[row] = step
            elif step < counts[row]:
                self._confidences[slot].append(confidence)
