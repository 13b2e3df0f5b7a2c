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
    generator = torch.Generator().manual_seed(seed)
    accepted = torch.zeros(num_ranks, dtype=torch.long)
    places = 0
    vocab = min(target.config.get_text_config().vocab_size, drafter.config.vocab_size)
    for prompt, output in texts:
        ids = torch.tensor([[*prompt, *output]], device=target.device)
        first, last = len(prompt) - 1, ids.shape[1] - 1
        wanted, offered = (model(ids).logits[0, first:last, :vocab] for model in (target, drafter))
        for begin in range(0, len(wanted), CHUNK):
            part = slice(begin, begin + CHUNK)
            chosen = _judged(
                wanted[part].float(),
                offered[part].float(),
                children,
                num_ranks,
                sampling,
                generator,
            )
            accepted += torch.bincount(chosen[chosen >= 0].cpu(), minlength=num_ranks)
            places += len(chosen)
    return [count / max(places, 1) for count in accepted.tolist()]


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
