"""Repetition penalty: what a text holds already becomes less likely (Keskar et al. 2019, CTRL).

It hangs on the text before each token, and so on the node of a draft. As in transformers it comes
before temperature, counts the prompt in, and applies to greedy sequences too.

Shape legend: B sequences, N nodes, V vocabulary.
"""

import torch
from torch import Tensor

from decode.draft import Draft
from decode.protocols import Context


def penalised(logits: Tensor, context: Context, draft: Draft) -> Tensor:
    """The target's logits [B, N, V] behind each node of `draft`, as the sequences ask."""
    if not context.sampling.has_penalty:
        return logits
    seen = tokens_seen(context, logits.shape[-1]).to(logits.device)[:, None]
    seen = seen.expand(-1, logits.shape[1], -1).clone()
    rows = torch.arange(len(seen), device=logits.device)
    for node in range(1, logits.shape[1]):  # parents come first
        seen[:, node] |= seen[rows, draft.parents[:, node].clamp(min=0)]
        seen[rows, node, draft.tokens[:, node]] = True
    return apply_penalty(logits, seen, context)


def tokens_seen(context: Context, vocab_size: int) -> Tensor:
    """[B, V] bool: the tokens of each committed text, on the CPU."""
    texts = context.tokens[:, : max(context.lengths)]
    places = torch.arange(texts.shape[1])
    lengths = torch.tensor(context.lengths)[:, None]
    # What lies behind a text counts as its first token.
    tokens = torch.where(places < lengths, texts, texts[:, :1])
    seen = torch.zeros(len(tokens), vocab_size, dtype=torch.bool)
    return seen.scatter_(1, tokens, True)


def apply_penalty(logits: Tensor, seen: Tensor, context: Context) -> Tensor:
    """`logits` [B, N, V], lower where `seen` [B, N or 1, V]."""
    strength = [params.repetition_penalty or 1.0 for params in context.sampling.params]
    penalty = torch.tensor(strength, dtype=logits.dtype, device=logits.device)[:, None, None]
    lower = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, lower, logits)
