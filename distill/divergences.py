"""Divergences between the target's distribution p and the drafter's q, token by token.

Pure functions ``(target, draft) -> (value [T], slope [T, O])`` over O outcomes: every token, or a
stored top-k and its tail. The slope is the derivative by the drafter's log-probabilities, formed
by hand: automatic differentiation keeps and passes over [T, O] several times more. What a slope
means for logits, and that slopes which differ by a multiple of q mean the same there, is
`Compared.logit_gradient`.
"""

from torch import Tensor

from distill.laws import Outcomes


def forward_kl(target: Outcomes, draft: Outcomes) -> tuple[Tensor, Tensor]:
    """KL(p || q) = Σ p (log p - log q) in nats; slope -p, so ∂/∂z = q - p."""
    value = _dot(target.probs, target.logprobs - draft.logprobs)
    return value, target.probs.neg()


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Σ over outcomes, [T]."""
    return (first * second).sum(-1)
