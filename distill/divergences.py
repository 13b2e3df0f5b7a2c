"""Divergences between the target's and the drafter's distributions, token by token.

Pure functions ``(target_logits [T, V], draft_logits [T, V]) -> [T]``. In the formulas p is the
target's distribution and q the drafter's.
"""

from torch import Tensor


def forward_kl(target_logits: Tensor, draft_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = Σ p (log p - log q) at a temperature, in nats.

    Hinton et al. 2015 (section 2): the gradient shrinks with temperature²; the factor that makes
    up for it is part of the value.

    Args:
        target_logits: [T, V]; no gradient flows into them.
        draft_logits: [T, V].
        temperature: both distributions are softened by it.

    Returns:
        [T].
    """
    target_logits = target_logits.detach()
    if temperature != 1:  # a pass over [T, V] each, so only where it changes something
        target_logits, draft_logits = target_logits / temperature, draft_logits / temperature
    target_logprobs, draft_logprobs = target_logits.log_softmax(-1), draft_logits.log_softmax(-1)
    divergence = (target_logprobs.exp() * (target_logprobs - draft_logprobs)).sum(-1)
    return divergence * temperature**2
