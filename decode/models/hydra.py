"""Hydra heads (Ankner et al. 2024): each also reads the tokens drafted before it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decode.models.heads import Heads, ResidualBlock, TargetEnds, check_counts, vocabulary_heads
from decode.models.prefix import PrefixLayer


@dataclass(frozen=True, kw_only=True)
class Hydra:
    """Head k reads ``[h; e_1; ..; e_k]``: the state, and the embeddings of the root and of the
    tokens drafted before its own.

    Its first layer is ``SiLU(W [h; e_1; ..; e_k]) + h``, further ones are Medusa's blocks (Hydra++:
    four layers), and the vocabulary head is its own, begun as the target's. The embeddings are the
    target's.

    Attributes:
        num_heads: tokens that can be drafted.
        num_layers: of each head.
        prefix_attention: one more decoder layer over the target's states, which all heads read
            (Hydra++).
        share_head: all heads use the target's language-model head as it is.
        seed: of the prefix layer's initial weights; all else begins at zero or as the target's.
    """

    family: ClassVar[str] = "hydra"

    num_heads: int = 4
    num_layers: int = 1
    prefix_attention: bool = False
    share_head: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse no heads, or heads of no layers."""
        check_counts(num_heads=self.num_heads, num_layers=self.num_layers)

    def build(self, target: PreTrainedModel) -> "HydraHeads":
        """The untrained heads, in float32, on the target's device.

        Raises:
            ValueError: the target's head is none that heads can share.
        """
        return HydraHeads(self, TargetEnds.of(target)).to(target.device)


class HydraHeads(Heads):
    """The modules."""

    reads_tokens: ClassVar[bool] = True

    def __init__(self, settings: Hydra, ends: TargetEnds):
        """Layers, and vocabulary heads where they are not shared."""
        super().__init__(settings, settings.num_heads, ends)
        size = ends.hidden_size
        if settings.prefix_attention:
            self.prefix = PrefixLayer(size, settings.seed)
        self.layers = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(size, size * (depth + 1)),
                *(ResidualBlock(size) for _ in range(settings.num_layers - 1)),
            )
            for depth in range(1, settings.num_heads + 1)
        )
        if not settings.share_head:
            self.outputs = vocabulary_heads(settings.num_heads, ends)

    def unscaled(self, depth: int, prepared: Tensor, tokens: Tensor) -> Tensor:
        """[.., D] from the state and the embeddings of `tokens` [.., depth]."""
        with torch.no_grad():  # the embeddings are the target's
            embedded = self.ends.embedding(tokens).to(prepared.dtype).flatten(-2)
        state: Tensor = self.layers[depth - 1](torch.cat([prepared, embedded], dim=-1))
        return state
