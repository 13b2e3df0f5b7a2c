"""Heads on the target's last hidden state draft trees, level by level; chains are trees of width 1.

Blockwise decoding (Stern et al. 2018), Medusa (Cai et al. 2024), Hydra (Ankner et al. 2024). The
forward that verifies a draft gives the state that the next draft is made of: there is one forward
of the target per step, and none of another model.

Shape legend: B sequences, W nodes of one level, D hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from decode.draft import Draft
from decode.drafters.growing import GrowingTree, TreeShape, harvest
from decode.drafters.prefix import PrefixReader
from decode.models.heads import Heads
from decode.protocols import Context, Drafter
from decode.target import Target


class HeadsDrafter(Drafter):
    """Keeps nothing between steps but what a prefix layer has read: the rest is in the context."""

    def __init__(self, heads: Heads, *, target: Target, shape: TreeShape):
        """Draft trees of this `shape`, no deeper than there are heads.

        Raises:
            ValueError: a node is to have more children than there are tokens, or the heads are of
                another target.
        """
        config = target.model.config.get_text_config()
        if heads.ends.hidden_size != config.hidden_size:
            raise ValueError(
                f"the heads read states of {heads.ends.hidden_size} numbers, the target's have "
                f"{config.hidden_size}"
            )
        if shape.num_children > target.vocab_size:
            raise ValueError(
                f"a node cannot have {shape.num_children} children: the target has "
                f"{target.vocab_size} tokens"
            )
        self.heads = heads.eval()
        self.shape = shape
        self.depth = min(shape.depth, heads.num_heads)
        self.layer = heads.ends.layer
        self.hidden_layers = (self.layer,)
        self._reader = None if heads.prefix is None else PrefixReader(heads.prefix, target)

    def begin(self, slot: int, prompt: Tensor, hidden: Mapping[int, Tensor]) -> None:
        """Let the prefix layer read the prompt's states but the last, which comes with the step."""
        if self._reader is not None:
            self._reader.begin(slot, hidden[self.layer])

    def propose(self, context: Context) -> Draft:
        """Trees of this shape, cut off where `context.room` ends."""
        hidden = context.hidden[self.layer]
        roots = torch.tensor(context.roots, device=hidden.device)[:, None]
        depths = [min(self.depth, max(room, 0)) for room in context.room]
        if max(depths) == 0:
            return Draft.chain(roots)
        if self._reader is None:
            hidden = hidden[:, -1:]  # [B, 1, D] of the token before the root
        else:
            slots, lengths = context.slots, context.lengths
            hidden = self._reader.catch_up(slots, lengths, hidden)
        tree = TreeOfHeads(self.heads, self.heads.prepare(hidden), roots)
        draft, _ = harvest(roots, self.shape.grow(tree, depths, context.sampling))
        return draft

    def end(self, slot: int, output: Sequence[int]) -> None:
        """Forget what the prefix layer has read."""
        if self._reader is not None:
            self._reader.cache.release(slot)


class TreeOfHeads(GrowingTree):
    """The tree that heads read: one head for all nodes of a level."""

    def __init__(self, heads: Heads, prepared: Tensor, roots: Tensor):
        """Begin with `roots` [B, 1]; `prepared` [B, 1, P] is what all heads read."""
        self._heads = heads
        self._prepared = prepared
        self._paths = roots[..., None]  # [B, W, depth] the tokens down to each node read last
        self._first = 0  # place of the first of them
        self._num_read = 1
        self.logits = heads.logits(1, prepared, self._paths)

    @property
    def num_read(self) -> int:
        """How many nodes of each tree were read, the root included."""
        return self._num_read

    def read(self, tokens: Tensor, parents: Tensor) -> None:
        """Read the `tokens` [B, W] of the next level, whose `parents` [B, W] are in this one."""
        columns = (parents - self._first)[..., None].expand(-1, -1, self._paths.shape[-1])
        self._paths = torch.cat([self._paths.gather(1, columns), tokens[..., None]], dim=-1)
        self._first = self._num_read
        self._num_read += tokens.shape[1]
        depth = self._paths.shape[-1]
        if self._heads.reads_tokens:
            prepared = self._prepared.expand(-1, tokens.shape[1], -1)
            self.logits = self._heads.logits(depth, prepared, self._paths)
        else:  # one law for all nodes of the level
            law = self._heads.logits(depth, self._prepared, self._paths[:, :1])
            self.logits = law.expand(-1, tokens.shape[1], -1)
