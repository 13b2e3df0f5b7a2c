"""A chunk judged: the objective's sums, and the acceptance that target and drafter imply.

Shape legend: K depths of a draft, T places, O outcomes (all tokens, or a stored top-k and a tail).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.depth_weights import DepthWeights
from distill.labels import Labelled
from distill.laws import Compared, likeliest
from distill.objectives import LossTerms, Objective


def judged(
    objective: Objective,
    depth_weights: DepthWeights,
    depths: Sequence[Compared] | Sequence[Labelled],
    labels: Sequence[Tensor],
    valid: Sequence[Tensor | None],
    *,
    kept: Sequence[Tensor | None],
    token_weights: Tensor | None = None,
) -> tuple[LossTerms, list[Tensor]]:
    """The objective of a chunk: its sums, and the derivatives by each depth's logits, [T, V].

    `token_weights` [K, T] are of the labels, and multiply those of the depths. Only the loss is
    weighted: rates count every token once, and so does the number of tokens by which the loop
    divides. Weights are 1 on average over the data, so that this is a weighted mean. Places that
    are not `kept` are left out of the loss and of its number of tokens, and count in the rates.

    Told besides, per depth where there are several: `alpha`, the expected acceptance rate of a
    drafter that samples at the objective's temperature, Σ min(p, q) (Leviathan et al. 2023,
    theorem 3.5), or its bounds `alpha_lower` and `alpha_upper` where the target's tail is lumped;
    `greedy_alpha`, p(argmax q), that of one that drafts greedily; `top1_agreement`, that at
    temperature 0; and `accepted_length` of drafts of all depths. Without a target, `accuracy`.
    """
    all_told = [_told(depth) for depth in depths]
    dtype = next(iter(all_told[0].values())).dtype
    is_real, is_kept = _stacked(valid, labels).to(dtype), _stacked(kept, labels).to(dtype)  # [K, T]
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    rates: dict[str, list[Tensor]] = {}
    for number, told in enumerate(all_told):
        suffix = f"_{number + 1}" if len(depths) > 1 else ""
        for name, rate in told.items():
            rate = rate * is_real[number]
            metrics[_numbered(name, suffix)] = (rate.sum(), is_real[number].sum())
            rates.setdefault(name, []).append(rate)
    if len(depths) > 1:
        for name in ("alpha", "alpha_lower", "alpha_upper", "accuracy"):
            if name in rates:  # a draft is accepted up to its first rejected token
                length = torch.stack(rates[name]).cumprod(0).sum()
                told_as = name.replace("accuracy", "alpha").replace("alpha", "accepted_length")
                metrics[told_as] = (length, is_real[0].sum())
    main = next(name for name in ("alpha", "alpha_upper", "accuracy") if name in rates)
    is_learnt = is_real * is_kept
    weights = depth_weights.weights(torch.stack(rates[main])) * is_learnt
    if token_weights is not None:
        weights = weights * token_weights
    loss, gradients = objective.judge(depths, weights)
    return LossTerms(loss, is_learnt.sum(), metrics), gradients


def _stacked(masks: Sequence[Tensor | None], labels: Sequence[Tensor]) -> Tensor:
    """[K, T]; None is true everywhere."""
    return torch.stack(
        [
            torch.ones_like(truth, dtype=torch.bool) if mask is None else mask
            for truth, mask in zip(labels, masks, strict=True)
        ]
    )


def _numbered(name: str, suffix: str) -> str:
    """greedy_alpha_lower of depth 1 is greedy_alpha_1_lower."""
    head, _, tail = name.rpartition("_")
    return f"{head}{suffix}_{tail}" if tail in ("lower", "upper") else f"{name}{suffix}"


def _told(depth: Compared | Labelled) -> dict[str, Tensor]:
    """Rates [T] by their names."""
    return {"accuracy": depth.hits} if isinstance(depth, Labelled) else _rates(depth)


def _rates(compared: Compared) -> dict[str, Tensor]:
    """Acceptance rates [T] that the two distributions imply."""
    target, draft, lumped = compared.target.probs, compared.draft.probs, compared.goal.lumped
    drafted = likeliest(compared.token_probs)
    both = torch.minimum(target, draft)
    if lumped is None:
        greedy = target.gather(-1, drafted)[:, 0]
        rates = {"alpha": both.sum(-1), "greedy_alpha": greedy}
    else:
        greedy = (target[:, :-1] * (lumped.ids == drafted)).sum(-1)
        rates = {
            "alpha_lower": both[:, :-1].sum(-1),
            "alpha_upper": both.sum(-1),
            "greedy_alpha_lower": greedy,
        }
    return rates | {"top1_agreement": (greedy == compared.goal.peak).to(greedy.dtype)}
