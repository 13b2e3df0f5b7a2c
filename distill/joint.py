"""Heads and their target trained together: Medusa-2, and blockwise heads on a fine-tuned backbone.

The target learns through low-rank adapters, and is held to what it was by the KL divergence from
itself without them (Cai et al. 2024, section 2.2.2 and self-distillation, section 2.3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decode.models import Heads
from distill.alignment import Aligned, Alignment, Depth
from distill.alignment.lm import LiveTarget, at_predicting_places
from distill.batches import Batch
from distill.chunked import projected_loss
from distill.objectives import ForwardKL, LossTerms
from distill.states import States


@dataclass(frozen=True, kw_only=True)
class JointSettings:
    """How heads and target share a training.

    Attributes:
        heads_weight: of the heads' loss beside the divergence that holds the target (λ_0).
        warmup_steps: over which that weight rises linearly from none: heads that know nothing yet
            would pull the target out of shape (Cai et al. 2024, section 2.2.2).
        target_rate: the adapters' learning rate as a share of the heads'.
    """

    heads_weight: float = 0.2
    warmup_steps: int = 0
    target_rate: float = 0.25

    def __post_init__(self) -> None:
        """Refuse what trains nothing."""
        if not (self.heads_weight > 0 and self.target_rate > 0):
            raise ValueError(
                "heads_weight and target_rate must be > 0, got "
                f"{self.heads_weight} and {self.target_rate}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {self.warmup_steps}")

    def heads_weight_at(self, step: int) -> float:
        """λ_0 in the step that follows `step` finished ones."""
        return self.heads_weight * min((step + 1) / max(self.warmup_steps, 1), 1.0)


class Joint(nn.Module):
    """What is trained: the heads, and the adapters in the target."""

    def __init__(self, heads: Heads, target: Any):
        """`target` is a peft model."""
        super().__init__()
        self.heads = heads
        self.target = target

    def train(self, mode: bool = True) -> "Joint":
        """The target is always run as it serves, without dropout."""
        super().train(mode)
        self.target.eval()
        return self


def drafter_in(trained: nn.Module) -> nn.Module:
    """What drafts: the heads, where they are trained with their target."""
    return trained.heads if isinstance(trained, Joint) else trained


class FrozenTarget(LiveTarget):
    """A target with adapters as it was without them."""

    def __init__(self, adapted: Any, model: PreTrainedModel, layers: tuple[int, ...]):
        """`adapted` is the peft model over `model`."""
        super().__init__(model, layers)
        self._adapted = adapted

    def _run(self, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
        with self._adapted.disable_adapter():
            return super()._run(batch)


class AdaptedTarget(LiveTarget):
    """A target with adapters: its states come with them, what it teaches comes without.

    Attributes:
        before: the target as it was.
    """

    def __init__(self, adapted: Any, model: PreTrainedModel, layers: tuple[int, ...]):
        """`adapted` is the peft model over `model`."""
        super().__init__(model, layers)
        self.before = FrozenTarget(adapted, model, layers)

    def signal(self, batch: Batch) -> States:
        """What the target said before it was trained."""
        return self.before.signal(batch)

    def states(self, batch: Batch) -> dict[int, Tensor]:
        """Layer -> hidden states [B, L, D], through which the adapters learn."""
        return self._run(batch)[1]

    def own(self, batch: Batch) -> Depth:
        """Its own predictions of the learnt tokens."""
        everywhere = self._run(batch)[0]
        states = States(*at_predicting_places(everywhere, self._head, batch))
        return Depth(states, batch.input_ids[:, 1:][batch.loss_mask[:, 1:]])


class JointAlignment:
    """The heads' alignment, inside `Joint`."""

    def __init__(self, heads: Alignment):
        """Align the heads as `heads` does."""
        self._heads = heads

    def align(self, drafter: nn.Module, batch: Batch) -> Aligned:
        """One depth per head."""
        assert isinstance(drafter, Joint)
        return self._heads.align(drafter.heads, batch)


class Anchor:
    """Holds the target while its heads are trained with it."""

    def __init__(self, target: AdaptedTarget, settings: JointSettings):
        """KL from `target` as it was, beside the heads' loss as weighted by `settings`."""
        self._target = target
        self._settings = settings

    def added(self, terms: LossTerms, batch: Batch, step: int) -> LossTerms:
        """The heads' terms with the target's own, in the step that follows `step` finished ones.

        Told besides: `heads_loss` per prediction of a head, `heads_weight`, and of the target per
        learnt token `target_kl` and `target_agreement`. The loss is that of a learnt token.
        """
        weight = self._settings.heads_weight_at(step)
        held = projected_loss(
            Aligned((self._target.own(batch),)), self._target.signal(batch), ForwardKL()
        )
        moved = {
            "heads_loss": (terms.loss.detach(), terms.num_tokens),
            "heads_weight": (weight * held.num_tokens, held.num_tokens),
            "target_kl": (held.loss.detach(), held.num_tokens),
            "target_agreement": held.metrics["top1_agreement"],
        }
        loss = held.loss + weight * terms.loss
        return LossTerms(loss, held.num_tokens, {**terms.metrics, **moved})


@torch.inference_mode()
def moved(
    joint: Joint, texts: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] = ()
) -> dict[str, float]:
    """How far the target has moved from itself, per token of `texts`.

    Args:
        joint: the target, among others.
        texts: what it reads; of an encoder-decoder model its decoder.
        sources: what the encoder reads, one beside each text.

    Returns:
        `target_kl`, from what it was to what it is, and `target_agreement`, how often both have the
        same likeliest token.
    """
    kl, agreed, count = 0.0, 0, 0
    for number, text in enumerate(texts):
        inputs = {"input_ids": torch.tensor([list(text)], device=joint.target.device)}
        if sources:
            source = torch.tensor([list(sources[number])], device=joint.target.device)
            inputs = {"input_ids": source, "decoder_input_ids": inputs["input_ids"]}
        now = joint.target(**inputs).logits[0].float().log_softmax(-1)
        with joint.target.disable_adapter():
            before = joint.target(**inputs).logits[0].float().log_softmax(-1)
        kl += float((before.exp() * (before - now)).sum())
        agreed += int((before.argmax(-1) == now.argmax(-1)).sum())
        count += len(text)
    return {"target_kl": kl / count, "target_agreement": agreed / count}
