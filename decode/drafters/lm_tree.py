"""An independent causal LM drafts trees, level by level."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decode.draft import Draft
from decode.drafters.growing import TreeInCache, TreeShape, harvest
from decode.drafters.reading import Reader
from decode.protocols import Acceptance, Context, Drafter
from decode.target import Target


class LMTreeDrafter(Drafter):
    """A small model with the target's tokenizer and a cache of its own, whose drafts are trees.

    Of an accepted path it keeps the keys of the nodes that it has read; the others, leaves mostly,
    it reads at the next step.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, model: PreTrainedModel, *, target: Target, shape: TreeShape):
        """Draft trees of this `shape` for `target`; contexts and vocabularies as with `LMDrafter`.

        Raises:
            ValueError: the model cannot draft with this runtime, is on another device, or has fewer
                tokens than a node is to have children.
        """
        self.reader = Reader(model, target=target)
        if shape.num_children > self.reader.num_choices:
            raise ValueError(
                f"a node cannot have {shape.num_children} children: target and drafter share "
                f"{self.reader.num_choices} tokens"
            )
        self.shape = shape
        # slot -> place of each drafted node among those read
        self._places: dict[int, list[int]] = {}

    def begin(self, slot: int, prompt: Tensor, hidden: Mapping[int, Tensor]) -> None:
        """Read the prompt but for its last token, which the first draft begins with."""
        self._places.pop(slot, None)
        self.reader.begin(slot, prompt)

    def propose(self, context: Context) -> Draft:
        """Trees of this shape, cut off where `context.room` ends."""
        slots = context.slots
        roots = torch.tensor(context.roots, device=self.reader.device)[:, None]
        depths = self.reader.depths(context, [self.shape.depth] * len(slots))
        self._places = {slot: places for slot, places in self._places.items() if slot not in slots}
        if max(depths) == 0:
            return Draft.chain(roots)
        # The root is the first node of what is read now, and not committed before the step is over.
        logits = self.reader.catch_up(context, roots, depths, commit_roots=False)
        tree = TreeInCache(self.reader, slots, roots, logits)
        draft, places = harvest(roots, self.shape.grow(tree, depths, context.sampling))
        for slot, depth, row in zip(slots, depths, places.tolist(), strict=True):
            if depth > 0:
                self._places[slot] = row
        return draft

    def observe(
        self, context: Context, draft: Draft, acceptance: Acceptance, target_logits: Tensor
    ) -> None:
        """Keep the keys of the accepted path, as far down as it was read."""
        slots = context.slots
        kept = []
        for slot, path in zip(slots, acceptance.paths, strict=True):
            places = self._places.pop(slot, [])
            on_path = [places[node] for node in path] if places else []
            kept.append([place for place in on_path if place >= 0])
        self.reader.cache.commit_paths(slots, kept)

    def end(self, slot: int, output: Sequence[int]) -> None:
        """Give the slot back."""
        self._places.pop(slot, None)
        self.reader.cache.release(slot)
