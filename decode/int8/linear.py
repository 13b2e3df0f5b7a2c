"""Linear layers in eight bits: weights per output, activations per row, integer sums.

Both are symmetric: a unit is a 127th of the largest magnitude of an output's weights, or of a row.
A row's unit is its own and integer sums are exact, so what a layer gives for a token is the same,
bit for bit, whoever shares its forward. A model quantised once is one model, whether it reads one
token or verifies six.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decode.int8 import kernels, tiles
from decode.layout import groups, side_by_side
from decode.lean import is_known
from decode.models.trimmed import trimmed_head


class Matrix:
    """Weights [O, I] as the kernels read them.

    Attributes:
        blocks: int8 [blocks, I / 4, 16, 4], padded with zeros.
        scales: float32 [16 * blocks], a unit of each output's weights.
        corrections: int32 likewise, what the offset of the activations adds to its sums.
        biases: float32 likewise.
        num_outputs: O.
        width: I.
        address: of the description that the kernels take.
    """

    def __init__(
        self, blocks: Tensor, scales: Tensor, corrections: Tensor, biases: Tensor, num_outputs: int
    ):
        """Describe tensors that lie as above."""
        self.blocks, self.scales, self.corrections = blocks, scales, corrections
        self.biases, self.num_outputs = biases, num_outputs
        self.width: int = blocks.shape[1] * tiles.STEP
        self.description = [
            *(tensor.data_ptr() for tensor in (blocks, scales, corrections, biases)),
            len(blocks),
            self.width,
        ]
        self._described = torch.tensor(self.description)
        self.address: int = self._described.data_ptr()

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "Matrix":
        """Quantise float weights [O, I] and keep the biases [O]."""
        num_outputs, width = weight.shape
        num_blocks = -(-num_outputs // tiles.BLOCK)
        scales = torch.zeros(num_blocks * tiles.BLOCK)
        scales[:num_outputs] = weight.abs().amax(1) / 127
        units = torch.zeros(num_blocks * tiles.BLOCK, width, dtype=torch.int8)
        # A row of zeros is no multiple of a unit of zero.
        units[:num_outputs] = (weight / scales[:num_outputs, None]).nan_to_num_().round_()
        corrections = units.sum(1, dtype=torch.int32) * tiles.OFFSET
        biases = torch.zeros(num_blocks * tiles.BLOCK)
        if bias is not None:
            biases[:num_outputs] = bias
        blocks = units.view(num_blocks, tiles.BLOCK, width // tiles.STEP, tiles.STEP)
        return cls(blocks.transpose(1, 2).contiguous(), scales, corrections, biases, num_outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies have addresses of their own."""
        tensors = (self.blocks, self.scales, self.corrections, self.biases)
        return Matrix, (*tensors, self.num_outputs)

    def split(self, sizes: Sequence[int]) -> list["Matrix"]:
        """Views of the rows of each part; all sizes but the last are multiples of a block."""
        if len(sizes) == 1:
            return [self]
        parts, begin = [], 0
        for size in sizes:
            rows, blocks = slice(begin, begin + size), slice(begin // 16, (begin + size) // 16)
            parts.append(
                Matrix(
                    self.blocks[blocks],
                    self.scales[rows],
                    self.corrections[rows],
                    self.biases[rows],
                    size,
                )
            )
            begin += size
        return parts

    @classmethod
    def joined(cls, parts: Sequence["Matrix"]) -> "Matrix":
        """The matrix that `parts` were split from."""
        if len(parts) == 1:
            return parts[0]
        together = [
            side_by_side([getattr(part, name) for part in parts])
            for name in ("blocks", "scales", "corrections", "biases")
        ]
        blocks, scales, corrections, biases = (part for part in together if part is not None)
        return cls(blocks, scales, corrections, biases, sum(part.num_outputs for part in parts))

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] in float32 to [..., O]."""
        rows = x.contiguous()
        num_rows = rows.numel() // self.width
        out = torch.empty(num_rows, len(self.scales))
        room = torch.empty(kernels.CHUNK * (self.width + 4), dtype=torch.uint8)
        kernels.product(self.address, rows.data_ptr(), num_rows, room.data_ptr(), out.data_ptr())
        if self.num_outputs != len(self.scales):
            out = out[:, : self.num_outputs].contiguous()
        return out.view(*x.shape[:-1], self.num_outputs)


class Int8Linear(nn.Module):
    """In the place of a `torch.nn.Linear`, for decoding on the CPU in float32.

    It has no parameters: it cannot be trained, nor saved with the model.
    """

    def __init__(self, matrix: Matrix):
        """Multiply by `matrix`."""
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.width, matrix.num_outputs

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return self.matrix(x)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise RuntimeError("a model in int8 is not for saving; save it before it is quantised")


def quantize_int8(model: PreTrainedModel) -> None:
    """Store the weights of every linear layer of `model` in eight bits, in place.

    A quarter of the memory, and a fraction of the time of a forward of a few tokens. The model is
    another one afterwards: its outputs are near those in float32, and speculative decoding keeps to
    them as it keeps to any target's. Embeddings and norms stay as they are; embeddings that are the
    head's weights too are kept beside it. Products run on one thread. Such a model is for decoding,
    not for training or saving.

    Raises:
        ValueError: the model, its dtype, its device or this CPU is none that this is built for; the
            message says which.
    """
    _refuse_others(model)
    parents = {
        child: (module, name)
        for module in model.modules()
        for name, child in module.named_children()
    }
    done: set[nn.Module] = set()
    for linears in list(groups(model)):
        if not done.isdisjoint(linears):
            continue
        done.update(linears)
        biases = [linear.bias for linear in linears]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        matrix = Matrix.of(weight, bias)
        parts = matrix.split([linear.out_features for linear in linears])
        for linear, part in zip(linears, parts, strict=True):
            parent, name = parents[linear]
            setattr(parent, name, Int8Linear(part))


def is_int8(model: PreTrainedModel) -> bool:
    """Whether `quantize_int8` has been here."""
    return isinstance(model.get_output_embeddings(), Int8Linear)


def _refuse_others(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if is_int8(model):
        raise ValueError(f"{name} is in int8 already")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(
            f"int8 is for models in float32 on the CPU; {name} is in "
            f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
        )
    if not tiles.is_available():
        raise ValueError("int8 needs a CPU with AVX512-VNNI, which this one has not; use float32")
    if not is_known(model):
        raise ValueError(
            f"int8 is for unchanged Llama, Mistral, Qwen2 and Qwen3 models; {name} is none of them"
        )
    if trimmed_head(model) is not None:
        raise ValueError(f"int8 is for whole heads; that of this {name} covers some ids only")
    for path, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            is_head = linear is model.get_output_embeddings()
            outputs = 0 if is_head else linear.out_features
            if linear.in_features % tiles.BLOCK or outputs % tiles.BLOCK:
                raise ValueError(
                    f"int8 takes layers whose sizes are multiples of {tiles.BLOCK}; {path} is "
                    f"{linear.in_features} to {linear.out_features}"
                )
