"""The short way through a Llama-like model whose linear layers are in eight bits."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decode.cache import SlotCache
from decode.int8 import kernels
from decode.int8.attention import attend
from decode.int8.linear import Int8Linear, Matrix, is_int8
from decode.lean import LeanForward
from decode.suffix.compiled import compiling


class Int8Forward(LeanForward):
    """Two compiled calls a layer, on either side of the attention."""

    def _read_weights(self, model: PreTrainedModel) -> None:
        backbone: Any = model.base_model
        self.head_matrix = _matrix_of(model.lm_head)
        self.layers = [_LayerMatrices(layer) for layer in backbone.layers]
        inner = max(len(layer.gate_up.scales) for layer in self.layers)
        widest = max(matrix.width for layer in self.layers for matrix in layer.matrices)
        width = self.embeddings.shape[1]
        sizes = (kernels.CHUNK * widest // 4, kernels.CHUNK, widest, kernels.CHUNK * inner,
                 kernels.CHUNK * width)  # fmt: skip
        self._room = [torch.empty(size) for size in sizes]
        self._scores = torch.empty(2 * len(self.cos))
        for layer in self.layers:
            layer.describe(
                [self.num_heads, self.num_key_heads, self.head_size],
                [room.data_ptr() for room in self._room],
            )
        with compiling("the int8 kernels"):
            states, angles = torch.zeros(1, 1, width), torch.zeros(1, self.head_size)
            self._heads_of(self.layers[0], states, angles, angles)
            attended = torch.zeros(1, 1, self.num_heads * self.head_size)
            self._logits_of(self._normed(self._rest_of(self.layers[0], states, attended)))

    def _heads_of(
        self, layer: Any, states: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, width, _ = states.shape
        num_rotated = self.num_heads + self.num_key_heads
        heads = torch.empty(batch, width, num_rotated + self.num_key_heads, self.head_size)
        kernels.before_attention(
            layer.address,
            states.data_ptr(),
            self.eps,
            batch * width,
            cos.data_ptr(),
            sin.data_ptr(),
            heads.data_ptr(),
        )
        values = heads.narrow(2, num_rotated, self.num_key_heads)
        return heads.narrow(2, 0, num_rotated), values

    def _attended(
        self, rotated: Tensor, values: Tensor, index: int, mask: Tensor, cache: SlotCache
    ) -> Tensor:
        batch, width, _, size = rotated.shape
        keys, all_values = cache.layers[index].update(
            rotated.narrow(2, self.num_heads, self.num_key_heads).transpose(1, 2),
            values.transpose(1, 2),
        )
        num_keys = keys.shape[2]
        if len(self._scores) < 2 * num_keys:  # a tree may lie behind the context
            self._scores = torch.empty(2 * num_keys)
        out = torch.empty(batch, width, self.num_heads * size)
        attend(
            rotated.data_ptr(),
            4 * rotated.stride(1),
            self.num_heads,
            keys.data_ptr(),
            all_values.data_ptr(),
            4 * keys.stride(0),
            4 * keys.stride(1),
            self.num_key_heads,
            size,
            mask.data_ptr(),
            4 * mask.stride(0),
            4 * mask.stride(2),
            batch,
            width,
            num_keys,
            self.scaling,
            self._scores.data_ptr(),
            out.data_ptr(),
        )
        return out

    def _rest_of(self, layer: Any, states: Tensor, attended: Tensor) -> Tensor:
        batch, width, _ = states.shape
        out = torch.empty_like(states)
        kernels.behind_attention(
            layer.address,
            states.data_ptr(),
            attended.data_ptr(),
            self.eps,
            batch * width,
            out.data_ptr(),
        )
        return out

    def _normed(self, states: Tensor) -> Tensor:
        out = torch.empty_like(states)
        kernels.norm(
            states.data_ptr(),
            self.norm.data_ptr(),
            self.eps,
            states.shape[-1],
            states.numel() // states.shape[-1],
            out.data_ptr(),
        )
        return out

    def _logits_of(self, states: Tensor) -> Tensor:
        return self.head_matrix(states)


class _LayerMatrices:
    """The weights of one layer, and their description for the kernels."""

    def __init__(self, layer: Any):
        attention, mlp = layer.self_attn, layer.mlp
        self.kind: str | None = getattr(attention, "layer_type", None)
        self.qkv = _matrix_of(attention.q_proj, attention.k_proj, attention.v_proj)
        self.attention_out = _matrix_of(attention.o_proj)
        self.gate_up = _matrix_of(mlp.gate_proj, mlp.up_proj)
        self.mlp_out = _matrix_of(mlp.down_proj)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        self.norms += [None if norm is None else norm.weight for norm in norms]

    @property
    def matrices(self) -> list[Matrix]:
        return [self.qkv, self.attention_out, self.gate_up, self.mlp_out]

    def describe(self, heads: list[int], room: list[int]) -> None:
        """Write the description; `heads` and `room` in the order of the kernels' constants."""
        matrices = [entry for matrix in self.matrices for entry in matrix.description]
        norms = [0 if weight is None else weight.data_ptr() for weight in self.norms]
        self._described = torch.tensor([*matrices, *norms, *heads, *room])
        self.address: int = self._described.data_ptr()


def forward_of(model: PreTrainedModel, positions: Tensor) -> LeanForward | None:
    """The short way through `model`, in eight bits where its weights are; None without one.

    Args:
        model: any causal LM.
        positions: [1, P], the position of each place of the cache.
    """
    return (Int8Forward if is_int8(model) else LeanForward).of(model, positions)


def _matrix_of(*linears: Int8Linear) -> Matrix:
    return Matrix.joined([linear.matrix for linear in linears])
