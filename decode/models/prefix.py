"""A decoder layer over the target's states: Hydra++'s prefix attention."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

HEAD_SIZE = 64


class PrefixLayer(nn.Module):
    """What heads read then holds more of the text before it (Ankner et al. 2024).

    One Llama layer, which begins as the identity: what it adds is zero at first.
    """

    def __init__(self, hidden_size: int, seed: int):
        """A layer for states of `hidden_size`, its weights drawn from `seed`."""
        super().__init__()
        self.hidden_size = hidden_size
        num_heads = hidden_size // HEAD_SIZE if hidden_size % HEAD_SIZE == 0 else 1
        config = LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_attention_heads=num_heads,
            attn_implementation="sdpa",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = LlamaDecoderLayer(config, layer_idx=0)
        nn.init.zeros_(self.layer.self_attn.o_proj.weight)
        nn.init.zeros_(self.layer.mlp.down_proj.weight)
        self.rotary = LlamaRotaryEmbedding(config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PrefixLayer":
        """Move and cast all but the rotary frequencies, which stay float32 and only move.

        Rounded to half precision they would turn far positions by angles of their own.
        """
        exact = self.rotary.inv_freq
        cast(Any, super())._apply(fn, recurse)
        self.rotary.inv_freq = exact.to(self.rotary.inv_freq.device)
        return self

    def forward(
        self, hidden: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """[B, N, D] states to as many, each having seen those before it.

        Args:
            hidden: [B, N, D].
            mask: [B, 1, N, L], boolean or additive.
            positions: [B, N].
            cache: keys and values of the states before.
        """
        hidden = hidden.to(self.layer.self_attn.q_proj.weight.dtype)
        output: Tensor = self.layer(
            hidden,
            attention_mask=mask,
            past_key_values=cache,
            position_embeddings=self.rotary(hidden, positions),
        )
        return output
