"""A short way through Llama-like models: the same products in the same order, without the modules.

At a few tokens a step the modules of transformers spend as long in Python as in arithmetic. Here a
layer is a dozen calls; the weights stay the model's own. Whatever is not known to fit is left to
the modules, and so is a model whose logits come out differently when both are tried
(`CachedModel`).

Shape legend: B sequences, N tokens, L keys, H query heads, G key heads, E size of a head, D hidden.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Cache,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from decode.layout import ROWS_HINT, is_transposed, multiply_packed, packed, side_by_side
from decode.models.trimmed import TrimmedHead, trimmed_head

FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
STATIC_ROTARY = {"default", "linear", "llama3", "yarn"}  # the angle hangs on the place alone
PACKED_PAYS = 500_000  # multiplications from which oneDNN's call is worth what it costs

Masks = Tensor | dict[str, Tensor]


class Projection(NamedTuple):
    """Linear layers that read the same input: one product where their weights lie side by side.

    Attributes:
        weights: of the layers, or the one matrix that they are.
        biases: likewise.
        packed: the same matrix again, in oneDNN's own blocks, where the weights are laid out for
            decoding: from a few rows on the product takes half to a quarter of the time.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    packed: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] to [..., sum of their outputs]."""
        weight, bias = self.weights[0], self.biases[0]
        if self.packed is not None:
            num_rows = x.numel() // x.shape[-1]
            # Compiled once, it is for any number of rows but one.
            expected = ROWS_HINT if torch.compiler.is_compiling() else num_rows
            if num_rows > 1 and expected * weight.numel() >= PACKED_PAYS:
                return multiply_packed(x, self.packed, bias)
        if len(self.weights) == 1:
            return F.linear(x, weight, bias)
        parts = zip(self.weights, self.biases, strict=True)
        return torch.cat([F.linear(x, weight, bias) for weight, bias in parts], dim=-1)

    @classmethod
    def of(cls, *linears: nn.Linear) -> "Projection":
        """The projection of these layers."""
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears]
        weight, bias = side_by_side(weights), side_by_side(biases)
        if weight is None or (bias is None and biases[0] is not None):
            return cls(weights, biases, None)
        return cls([weight], [bias], packed(weight) if is_transposed(weight) else None)


class Layer(NamedTuple):
    """The weights of one decoder layer."""

    kind: str | None  # whose mask it takes, where there are several
    attention_norm: Tensor
    qkv: Projection
    head_norms: tuple[Tensor, Tensor] | None  # of queries and keys, Qwen3's
    attention_out: Projection
    mlp_norm: Tensor
    gate_up: Projection
    mlp_out: Projection


class LeanForward:
    """The forward of a Llama-like model over a `SlotCache`."""

    def __init__(self, model: PreTrainedModel, positions: Tensor):
        """Read the weights of `model` where they are, for `positions` [1, P]; see `of`."""
        config = model.config
        backbone: Any = model.base_model
        attention = backbone.layers[0].self_attn
        self.embeddings = backbone.embed_tokens.weight
        self.norm = backbone.norm.weight
        self.eps: float = backbone.norm.variance_epsilon
        self.scaling: float = attention.scaling
        self.head_size: int = attention.head_dim
        self.num_heads: int = config.num_attention_heads
        self.num_key_heads: int = config.num_key_value_heads
        cos, sin = backbone.rotary_emb(self.embeddings[:1], positions)
        half = self.head_size // 2
        # (-b, a) * sin is (b, a) * (-sin, sin): the sign is put on once, here.
        self.cos = cos[0, :, None]  # [P, 1, E]
        self.sin = torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1)
        self._read_weights(model)

    @classmethod
    def of(cls, model: PreTrainedModel, positions: Tensor) -> "LeanForward | None":
        """The short way through `model`, where one is known.

        Args:
            model: any causal LM.
            positions: [1, P], the position of each place of the cache.
        """
        return cls(model, positions) if is_known(model) else None

    def __call__(
        self,
        tokens: Tensor,
        masks: Masks,
        cache: Cache,
        *,
        start: int | None = None,
        positions: Tensor | None = None,
        layers: tuple[int, ...] = (),
        keep: Sequence[int] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits [B, N, V] (or of the places in `keep`), and the hidden states asked for.

        Args:
            tokens: [B, N].
            masks: additive, [B, 1, N, L]; one, or one per kind of layer.
            cache: keys and values, a `SlotCache` opened for these tokens or what stands for it.
            start: first place of a single chain.
            positions: [B, N] of anything else.
            layers: hidden states to return, numbered as transformers does: the last one is normed.
            keep: places whose logits are wanted.
        """
        if start is not None:
            cos = self.cos.narrow(0, start, tokens.shape[1])
            sin = self.sin.narrow(0, start, tokens.shape[1])
        else:
            cos, sin = self.cos[positions], self.sin[positions]
        states = F.embedding(tokens, self.embeddings)
        hidden = {0: states} if layers else {}
        for index, layer in enumerate(self.layers):
            mask = masks if isinstance(masks, Tensor) else masks[layer.kind or ""]
            rotated, values = self._heads_of(layer, states, cos, sin)
            attended = self._attended(rotated, values, index, mask, cache)
            states = self._rest_of(layer, states, attended)
            if layers:
                hidden[index + 1] = states
        states = self._normed(states)
        if layers:
            hidden[len(self.layers)] = states
        logits = self._logits_of(states if keep is None else states[:, list(keep)])
        return logits, {layer: hidden[layer] for layer in layers}

    def _read_weights(self, model: PreTrainedModel) -> None:
        """Head and layers."""
        backbone: Any = model.base_model
        self.head = Projection.of(model.lm_head)
        self.trimmed = trimmed_head(model)
        self.layers: Sequence[Any] = [_layer_of(layer) for layer in backbone.layers]

    def _heads_of(
        self, layer: Any, states: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, turned to their places, [B, N, H + G, E]; values [B, N, G, E]."""
        batch, width, _ = states.shape
        num_rotated = self.num_heads + self.num_key_heads
        projected = layer.qkv(self._rms_norm(states, layer.attention_norm))
        heads = projected.view(batch, width, -1, self.head_size)
        rotated = heads.narrow(2, 0, num_rotated)  # queries and keys turn alike
        if layer.head_norms is not None:
            queries, keys = torch.split(rotated, [self.num_heads, self.num_key_heads], dim=2)
            normed = zip((queries, keys), layer.head_norms, strict=True)
            rotated = torch.cat([self._rms_norm(part, weight) for part, weight in normed], dim=2)
        half = self.head_size // 2
        swapped = torch.cat((rotated.narrow(3, half, half), rotated.narrow(3, 0, half)), dim=-1)
        values = heads.narrow(2, num_rotated, self.num_key_heads)
        return rotated * cos + swapped * sin, values

    def _attended(
        self, rotated: Tensor, values: Tensor, index: int, mask: Tensor, cache: Cache
    ) -> Tensor:
        """What attention gives for the heads of layer `index`: [B, N, H * E]."""
        batch, width, _, _ = rotated.shape
        keys, all_values = cache.layers[index].update(
            rotated.narrow(2, self.num_heads, self.num_key_heads).transpose(1, 2),
            values.transpose(1, 2),
        )
        output = F.scaled_dot_product_attention(
            rotated.narrow(2, 0, self.num_heads).transpose(1, 2),
            keys,
            all_values,
            attn_mask=mask,
            scale=self.scaling,
            enable_gqa=self.num_heads != self.num_key_heads,
        )
        return output.transpose(1, 2).reshape(batch, width, -1)

    def _rest_of(self, layer: Any, states: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP, each with its residual: [B, N, D]."""
        states = states + layer.attention_out(attended)
        gate, up = layer.gate_up(self._rms_norm(states, layer.mlp_norm)).chunk(2, -1)
        rest: Tensor = layer.mlp_out(F.silu(gate) * up)
        return states + rest

    def _normed(self, states: Tensor) -> Tensor:
        """The norm behind the last layer."""
        return self._rms_norm(states, self.norm)

    def _logits_of(self, states: Tensor) -> Tensor:
        logits = self.head(states)
        return logits if self.trimmed is None else self.trimmed.spread(logits)

    def _rms_norm(self, states: Tensor, weight: Tensor) -> Tensor:
        """Over the last dimension; in half precision rounded where transformers rounds."""
        if states.dtype == torch.float32:
            return F.rms_norm(states, weight.shape, weight, self.eps)
        normed = F.rms_norm(states.float(), weight.shape, eps=self.eps)
        return weight * normed.to(states.dtype)


def is_known(model: PreTrainedModel) -> bool:
    """Whether `model` is, in every part, what this file (or `decode/int8`) computes."""
    if type(model) not in FAMILIES:
        return False
    config = model.config
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    parameters = list(model.parameters())
    return (
        config.hidden_act == "silu"
        and config._attn_implementation == "sdpa"
        and rotary in STATIC_ROTARY
        and len({(parameter.device, parameter.dtype) for parameter in parameters}) == 1
        and parameters[0].is_floating_point()
        and not any(_is_changed(module) for module in model.modules())
    )


def _is_changed(module: nn.Module) -> bool:
    """Whether a module is not as shipped: an adapter, quantised, hooked or patched."""
    home = type(module).__module__
    is_shipped = type(module) is TrimmedHead or home.startswith(
        ("transformers.models.", "torch.nn.modules.", "transformers.activations", "decode.int8.")
    )
    return (
        not is_shipped
        or bool(module._forward_hooks or module._forward_pre_hooks)
        or "forward" in vars(module)
    )


def _layer_of(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    has_head_norms = getattr(attention, "q_norm", None) is not None
    return Layer(
        kind=getattr(attention, "layer_type", None),
        attention_norm=layer.input_layernorm.weight,
        qkv=Projection.of(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=(attention.q_norm.weight, attention.k_norm.weight) if has_head_norms else None,
        attention_out=Projection.of(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=Projection.of(mlp.gate_proj, mlp.up_proj),
        mlp_out=Projection.of(mlp.down_proj),
    )
