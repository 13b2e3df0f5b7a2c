"""How often each child would be accepted, measured on texts that the target wrote.

The acceptance profile that `decode.planner` plans trees by: Sequoia (Chen et al. 2024, section 3.1)
takes it to be the same at every depth, which one forward of both models over the texts measures.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decode.acceptance.tree import Siblings, one_by_one
from decode.acceptance.without_replacement import select_distinct
from decode.drafters.planned_trees import distinct, independent
from decode.models import Heads
from decode.sampling import SamplingParams, warp

CHUNK = 64  # places judged at a time: each holds several rows of the vocabulary


@torch.inference_mode()
def acceptance_profile(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    children: str,
    num_ranks: int,
    sampling: SamplingParams,
    seed: int = 0,
) -> list[float]:
    """The chance that a node's child of each rank is the accepted one: [num_ranks].

    Args:
        target: the model.
        drafter: with the target's tokenizer.
        texts: prompts and what the target wrote behind them, under `sampling`.
        children: "likeliest", "independent" or "distinct", as the drafter will draft.
        num_ranks: how many children of a node are looked at.
        sampling: of the target; at temperature 0 children are the likeliest.
        seed: of the draws.
    """
    counter = _Counter(children, num_ranks, sampling, seed)
    vocab = min(target.config.get_text_config().vocab_size, drafter.config.vocab_size)
    for prompt, output in texts:
        ids = torch.tensor([[*prompt, *output]], device=target.device)
        first, last = len(prompt) - 1, ids.shape[1] - 1
        wanted, offered = (model(ids).logits[0, first:last, :vocab] for model in (target, drafter))
        counter.add(wanted, offered)
    return counter.chances()


@torch.inference_mode()
def acceptance_by_depth(
    target: PreTrainedModel,
    heads: Heads,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    num_ranks: int,
    sampling: SamplingParams,
    seed: int = 0,
) -> list[list[float]]:
    """The same for the likeliest children of heads, whose every depth is another: [D][num_ranks].

    A head is asked with the target's own tokens before it. The value of a node, the product of the
    chances on the way to it, is then Medusa's (Cai et al. 2024, section 2.3.3).
    """
    depths = range(1, heads.num_heads + 1)
    counters = [_Counter("likeliest", num_ranks, sampling, seed) for _ in depths]
    for prompt, output in texts:
        ids = torch.tensor([[*prompt, *output]], device=target.device)
        result = target(ids, output_hidden_states=True)
        hidden = result.hidden_states[-1]
        if heads.prefix is not None:
            size = ids.shape[1]
            sees = torch.ones(1, 1, size, size, dtype=torch.bool, device=ids.device).tril()
            hidden = heads.prefix(hidden, sees, torch.arange(size, device=ids.device)[None])
        # A draft's root is a token of the output; its heads read the state before it.
        prepared = heads.prepare(hidden[0, len(prompt) - 1 : -1])
        roots = ids[0, len(prompt) :]
        for depth, counter in zip(depths, counters, strict=True):
            count = len(roots) - depth  # places with so many tokens behind the root
            if count > 0:
                tokens = roots.unfold(0, depth, 1)[:count]
                offered = heads.logits(depth, prepared[:count], tokens)
                wanted = result.logits[0, len(prompt) + depth - 1 : -1]
                counter.add(wanted, offered)
    return [counter.chances() for counter in counters]


class _Counter:
    """How often the child of each rank is accepted."""

    def __init__(self, children: str, num_ranks: int, sampling: SamplingParams, seed: int):
        self._how = children, num_ranks, sampling, torch.Generator().manual_seed(seed)
        self._accepted = torch.zeros(num_ranks, dtype=torch.long)
        self._places = 0

    def add(self, wanted: Tensor, offered: Tensor) -> None:
        """Judge the children that `offered` [T, V] makes by the target's `wanted` [T, V]."""
        for begin in range(0, len(wanted), CHUNK):
            part = slice(begin, begin + CHUNK)
            chosen = _judged(wanted[part].float(), offered[part].float(), *self._how)
            counts = torch.bincount(chosen[chosen >= 0].cpu(), minlength=len(self._accepted))
            self._accepted += counts
            self._places += len(chosen)

    def chances(self) -> list[float]:
        """[R] shares of the places."""
        return [count / max(self._places, 1) for count in self._accepted.tolist()]


def _judged(
    target_logits: Tensor,
    draft_logits: Tensor,
    children: str,
    num_ranks: int,
    sampling: SamplingParams,
    generator: torch.Generator,
) -> Tensor:
    """[T] the accepted child of each place, -1 where there is none."""
    target_probs, law = warp(target_logits, sampling), warp(draft_logits, sampling)
    uniforms = torch.rand(2, len(law), num_ranks, generator=generator).to(law.device)
    if children == "likeliest" or sampling.temperature == 0:
        tokens = draft_logits.topk(num_ranks, dim=-1).indices
        valid = torch.ones_like(tokens, dtype=torch.bool)
        return one_by_one(target_probs, Siblings(tokens, valid, uniforms[1], None)).chosen
    if children not in ("independent", "distinct"):
        raise ValueError(f"children are likeliest, independent or distinct, got {children!r}")
    draw_children = independent if children == "independent" else distinct
    drawn, is_possible = draw_children(law[None], uniforms[:1])
    siblings = Siblings(drawn[0], is_possible[0], uniforms[1], law)
    select = one_by_one if children == "independent" else select_distinct
    return select(target_probs, siblings).chosen
