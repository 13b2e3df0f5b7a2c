"""What heads on the target's last hidden state have in common.

Head k drafts k tokens behind the root. The state it reads is that of the token before the root:
from it the target's own head has drawn the root already.

Shape legend: B sequences, W nodes of one depth, D hidden size of the target, V its vocabulary, P
numbers that all heads of a sequence read.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from decode.encoder_decoder import num_layers
from decode.models.prefix import PrefixLayer


@dataclass(frozen=True, slots=True)
class TargetEnds:
    """The two ends of the target that heads share with it; its weights, never the heads' own.

    Of an encoder-decoder model these are the decoder's.

    Attributes:
        embedding: tokens to [.., D].
        output: the language-model head.
        layer: whose states it reads: the last.
        softcap: of its logits; None for none.
        scale: what states are multiplied by before the head (T5), or logits behind it (Granite).
        bias: [V] added behind it, or None.
    """

    embedding: nn.Module
    output: nn.Linear
    layer: int
    softcap: float | None = None
    scale: float = 1.0
    bias: Tensor | None = None

    @classmethod
    def of(cls, target: PreTrainedModel) -> "TargetEnds":
        """The ends of `target`.

        Raises:
            ValueError: its head is no linear layer, or does more than that, a scale and a soft cap.
        """
        output = target.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise ValueError(
                f"{type(target).__name__} has no linear language-model head, which heads begin "
                "from; use a drafter from scratch"
            )
        config = target.config.get_text_config()
        decoder = target.get_decoder() if config.is_encoder_decoder else target
        bias = getattr(target, "final_logits_bias", None)  # [1, V] of BART and its kin
        layer = last_layer(target)
        softcap = getattr(config, "final_logit_softcapping", None)
        scale: float | None = 1.0
        if config.is_encoder_decoder:
            if getattr(config, "scale_decoder_outputs", False):
                scale = config.d_model**-0.5
        else:
            tried = on_a_few_tokens(target, output_hidden_states=True)
            scale = measured_scale(output, softcap, tried.hidden_states[layer][0], tried.logits[0])
        if scale is None:
            raise ValueError(
                f"{type(target).__name__} does more to its logits than a linear head, a scale and "
                "a soft cap, which is all that heads share with it; use a drafter from scratch"
            )
        bias = output.bias if bias is None else bias[0]
        return cls(decoder.get_input_embeddings(), output, layer, softcap, scale, bias)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.output.in_features

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.output.out_features


def last_layer(target: PreTrainedModel) -> int:
    """Whose states heads read: layer k is the output of k layers."""
    return num_layers(target.config.get_text_config())


@torch.no_grad()
def on_a_few_tokens(model: PreTrainedModel, **asked: Any) -> Any:
    """The model's output for one sequence of 8 tokens, without dropout."""
    was_training = model.training
    model.eval()
    tokens = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    output = model(input_ids=tokens, use_cache=False, **asked)
    model.train(was_training)
    return output


@torch.no_grad()
def measured_scale(
    head: nn.Linear, softcap: float | None, states: Tensor, logits: Tensor
) -> float | None:
    """What `states` [N, D] are multiplied by for the head to make the model's `logits` [N, V].

    Measured, because architectures have many names for it, and by one name some multiply and
    others divide. None where no number makes them.
    """
    projected = functional.linear(states, head.weight)
    if projected.shape != logits.shape:
        return None
    tolerance = 2e-2 if projected.dtype.itemsize < 4 else 1e-4
    projected, logits = projected.cpu().double(), logits.cpu().double()
    bias = torch.zeros(()) if head.bias is None else head.bias.cpu().double()
    uncapped = logits if softcap is None else softcap * torch.atanh(logits / softcap)
    fitted = ((uncapped - bias) * projected).sum() / projected.square().sum()
    for scale in (1.0, float(fitted)):  # 1 stays exactly 1
        ours = projected * scale + bias
        if softcap is not None:
            ours = softcap * torch.tanh(ours / softcap)
        if (ours - logits).abs().max() <= tolerance * logits.abs().max():
            return scale
    return None


class Heads(nn.Module):
    """One head per depth of a draft; a family says what lies between the state and the vocabulary.

    Attributes:
        settings: what the heads were built from.
        num_heads: depths.
        ends: of the target.
        outputs: vocabulary heads of their own, or None where the target's is used.
        prefix: a layer over the target's states that comes before all heads, or None.
        one_at_a_time: a micro-batch trains one head, drawn at random, not all of them.
        reads_tokens: whether a head's prediction depends on the tokens drafted before it.
    """

    reads_tokens: ClassVar[bool] = False
    one_at_a_time = False

    def __init__(self, settings: Any, num_heads: int, ends: TargetEnds):
        """Heads without weights yet."""
        super().__init__()
        self.settings = settings
        self.num_heads = num_heads
        self.ends = ends
        self.outputs: nn.ModuleList | None = None
        self.prefix: PrefixLayer | None = None

    def prepare(self, hidden: Tensor) -> Tensor:
        """[.., D] states of the target to the [.., P] that every head reads."""
        return hidden.to(next(self.parameters()).dtype)

    def state(self, depth: int, prepared: Tensor, tokens: Tensor) -> Tensor:
        """[.., D] what the vocabulary head for `depth` reads, the first depth being 1.

        Args:
            depth: below the root.
            prepared: [.., P].
            tokens: [.., depth] the root and the drafted tokens below it.
        """
        state = self.unscaled(depth, prepared, tokens)
        return state if self.ends.scale == 1.0 else state * self.ends.scale

    def unscaled(self, depth: int, prepared: Tensor, tokens: Tensor) -> Tensor:
        """[.., D] the same, as large as the target's states; the arguments are those of `state`."""
        raise NotImplementedError

    def projection(self, depth: int) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] that make logits of the state, before the target's cap."""
        if self.outputs is not None:
            own = cast(nn.Linear, self.outputs[depth - 1])
            return own.weight, own.bias
        bias = self.ends.bias
        return self.ends.output.weight.detach(), None if bias is None else bias.detach()

    def logits(self, depth: int, prepared: Tensor, tokens: Tensor) -> Tensor:
        """[.., V] of the head for `depth`; arguments as for `state`."""
        weight, bias = self.projection(depth)
        state = self.state(depth, prepared, tokens).to(weight.dtype)
        logits = functional.linear(state, weight, bias)
        if self.ends.softcap is None:
            return logits
        return self.ends.softcap * torch.tanh(logits / self.ends.softcap)


class ResidualBlock(nn.Module):
    """``x + SiLU(W x + b)``; W and b begin at zero, so that it begins as the identity.

    Medusa's (Cai et al. 2024, section 2.1.1). More may be read than is passed on: the residual is
    the first D numbers of the input.
    """

    def __init__(self, hidden_size: int, input_size: int | None = None):
        """[.., `input_size`] to [.., `hidden_size`], by default the same."""
        super().__init__()
        self.hidden_size = hidden_size
        self.linear = nn.Linear(input_size or hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        return x[..., : self.hidden_size] + functional.silu(self.linear(x))


def vocabulary_heads(num_heads: int, ends: TargetEnds) -> nn.ModuleList:
    """Heads [V, D] of their own, which begin as copies of the target's."""
    copies = []
    for _ in range(num_heads):
        copy = nn.Linear(
            ends.hidden_size,
            ends.vocab_size,
            bias=ends.bias is not None,
            device=ends.output.weight.device,
        )
        with torch.no_grad():
            copy.weight.copy_(ends.output.weight)
            if ends.bias is not None:
                copy.bias.copy_(ends.bias)
        copies.append(copy)
    return nn.ModuleList(copies)


def check_counts(**counts: int) -> None:
    """Refuse, by name, counts below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")
