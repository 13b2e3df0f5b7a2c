"""How weights lie in memory: for forwards of a few tokens another order is faster."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decode.models.trimmed import TrimmedHead

ROWS_HINT = 8  # rows that packing expects; other numbers work as well
SIDE_BY_SIDE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def lay_out_for_decoding(model: nn.Module) -> None:
    """Store the weights of `model` for forwards of a few tokens, in place.

    Linear layers that read the same input come to lie side by side, so that one product does for
    all of them (`decode/lean.py`). In float32 on the CPU matrices are stored transposed besides, so
    that a product with one token reads them in the order of the inputs (at 8 layers x 256 a step
    takes 15 % less time); and `decode/lean.py` keeps a packed copy of each for products with more
    tokens, which takes their memory once more. Shapes, values and modules stay as they are, and
    tied embeddings tied. Such a model is for decoding, not for training or saving: weights share
    storages, and packed copies do not follow a change.
    """
    done: set[Tensor] = set()
    for linears in groups(model):
        weights = [linear.weight for linear in linears]
        if done.isdisjoint(weights):
            done.update(weights)
            _store_together(weights)
            biases = [linear.bias for linear in linears if linear.bias is not None]
            if len(biases) == len(linears):
                _store_together(biases)


def side_by_side(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The one tensor whose rows `tensors` are, where they lie in memory like that."""
    first = tensors[0]
    if first is None or len(tensors) == 1:
        return first
    num_rows = 0
    for tensor in tensors:
        if (
            tensor is None
            or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or tensor.stride() != first.stride()
            or tensor.storage_offset() != first.storage_offset() + num_rows * first.stride(0)
        ):
            return None
        num_rows += len(tensor)
    size = (num_rows, *first.shape[1:])
    return first.detach().as_strided(size, first.stride(), first.storage_offset())


def is_transposed(weight: Tensor) -> bool:
    """Whether a matrix is stored the way `lay_out_for_decoding` stores it on the CPU."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.stride(0) == 1
        and weight.stride(1) > 1
    )


def packed(weight: Tensor) -> Tensor | None:
    """A float32 matrix [O, I] in oneDNN's blocks for `multiply_packed`; None without oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.detach().contiguous(), ROWS_HINT
    )
    return blocks


def multiply_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` with a packed weight: [..., I] to [..., O].

    torch's compiler uses this operator when it freezes weights; its eager functions pack anew in
    every call.
    """
    if torch.compiler.is_compiling():
        product: Tensor = torch.ops.draftsmith.multiply_packed(x, weight, bias)
        return product
    return _multiply_packed(x, weight, bias)


def _multiply_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _shape_of_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _operators() -> Any:
    """The same as an operator of ours: torch's compiler takes its own with frozen weights only."""
    library: Any = torch.library.Library("draftsmith", "DEF")  # type: ignore[no-untyped-call]
    library.define("multiply_packed(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    library.impl("multiply_packed", _multiply_packed, "MkldnnCPU")
    torch.library.register_fake("draftsmith::multiply_packed", _shape_of_product, lib=library)
    return library


_OPERATORS = _operators()  # they last as long as this object


def groups(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """Linear layers that read the same input, then every single one."""
    for module in model.modules():
        for names in SIDE_BY_SIDE:
            linears = [getattr(module, name, None) for name in names]
            group = [linear for linear in linears if type(linear) is nn.Linear]
            if len(group) == len(names):
                yield group
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) in (nn.Linear, TrimmedHead):
            yield [module]


def _store_together(tensors: Sequence[Tensor]) -> None:
    if len({(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors}) > 1:
        return
    together = torch.cat([tensor.data for tensor in tensors])
    if together.ndim == 2 and together.dtype == torch.float32 and together.device.type == "cpu":
        together = together.t().contiguous().t()
    sizes = [len(tensor) for tensor in tensors]
    for tensor, part in zip(tensors, torch.split(together, sizes), strict=True):
        tensor.data = part
