"""A tile of an int8 product: some rows times some blocks of 16 outputs, its sums in registers.

The instruction is `vpdpbusd` of AVX512-VNNI: 16 sums of four products of an unsigned and a signed
byte each. No library that torch ships reaches it for a few rows without packing or quantising anew
in every call; numba, which is here for the suffix index, compiles it at first use.
"""

from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

BLOCK = 16  # outputs of a block: the 32-bit sums of a register
STEP = 4  # inputs that one instruction takes of each row
OFFSET = 128  # makes signed bytes unsigned; `correction` takes it out again

# A matrix [O, I] is described by so many int64: addresses of
#   its weights, int8 [blocks, I / 4, 16, 4],
#   what a unit of each output's weights is, float32,
#   `OFFSET` times the sum of each output's weights, int32,
#   its biases, float32;
# then its number of blocks, and I.
MATRIX = 6
WEIGHTS, SCALES, CORRECTIONS, BIASES, BLOCKS, WIDTH = range(MATRIX)

_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, BLOCK), ir.VectorType(_FLOAT, BLOCK)
_BLOCK_BYTES = _LONG(64)  # of one step's weights, and of 16 floats or sums


@cache
def is_available() -> bool:
    """Whether this CPU has the instruction."""
    return bool(binding.get_host_cpu_features().get("avx512vnni", False))


def make_tile(num_rows: int, num_blocks: int) -> Any:
    """A compiled function for that many rows and blocks.

    Its arguments are addresses and counts, all int64:

    matrix: its description.
    block: the first of the blocks.
    rows: unsigned bytes [num_rows, I], quantised values + `OFFSET`.
    units: float32 [num_rows], what a unit of each row is.
    out: of the first block, float32, its rows `stride` bytes apart.

    The integer sums are exact, and what becomes of one is the same in a tile of any size: the
    outputs of a row do not depend on the rows beside it.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing_context: Any, matrix: Any, block: Any, rows: Any, units: Any, out: Any, stride: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _Writer(builder, num_rows, num_blocks).write(*arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return tile


class _Writer:
    """Writes the instructions of a tile."""

    def __init__(self, builder: Any, num_rows: int, num_blocks: int):
        self.builder = builder
        self.num_rows = num_rows
        self.num_blocks = num_blocks
        self.dot = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_INTS, [_INTS, _INTS, _INTS]),
            "llvm.x86.avx512.vpdpbusd.512",
        )

    def write(self, matrix: Any, block: Any, rows: Any, units: Any, out: Any, stride: Any) -> None:
        builder = self.builder
        about = [self._load(matrix, _LONG(8 * field), _LONG) for field in range(MATRIX)]
        width, before = about[WIDTH], builder.mul(block, _BLOCK_BYTES)
        # A block's weights are 16 times the width in bytes.
        first = builder.add(about[WEIGHTS], builder.mul(builder.mul(block, width), _LONG(BLOCK)))
        scales, corrections, biases = (
            builder.add(about[field], before) for field in (SCALES, CORRECTIONS, BIASES)
        )
        sums = self._sums(first, width, rows)
        for row in range(self.num_rows):
            unit = self._splat(self._load(units, _LONG(4 * row), _FLOAT), _FLOATS)
            row_out = builder.add(out, builder.mul(stride, _LONG(row)))
            for number in range(self.num_blocks):
                at = _LONG(64 * number)
                total = builder.sub(sums[row][number], self._load(corrections, at, _INTS))
                scaled = builder.fmul(
                    builder.sitofp(total, _FLOATS), self._load(scales, at, _FLOATS)
                )
                value = builder.fadd(builder.fmul(scaled, unit), self._load(biases, at, _FLOATS))
                address = builder.inttoptr(builder.add(row_out, at), _FLOATS.as_pointer())
                builder.store(value, address, align=4)

    def _sums(self, weights: Any, width: Any, rows: Any) -> list[list[Any]]:
        """The loop over the inputs: the integer sums of each row and block."""
        builder = self.builder
        num_steps, block_bytes = builder.udiv(width, _LONG(STEP)), builder.mul(width, _LONG(BLOCK))
        blocks = [
            builder.add(weights, builder.mul(block_bytes, _LONG(n))) for n in range(self.num_blocks)
        ]
        starts = [builder.add(rows, builder.mul(width, _LONG(n))) for n in range(self.num_rows)]
        before = builder.block
        loop, behind = builder.append_basic_block("steps"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_LONG)
        step.add_incoming(_LONG(0), before)
        sums = [[builder.phi(_INTS) for _ in blocks] for _ in starts]
        at = builder.mul(step, _BLOCK_BYTES)
        read = [self._load(block, at, _INTS) for block in blocks]
        results = []
        for start, of_row in zip(starts, sums, strict=True):
            four = self._load(start, builder.mul(step, _LONG(STEP)), _INT)
            values = self._splat(four, _INTS)
            new = [
                builder.call(self.dot, [old, values, weight])
                for old, weight in zip(of_row, read, strict=True)
            ]
            for old, result in zip(of_row, new, strict=True):
                old.add_incoming(ir.Constant(_INTS, [0] * BLOCK), before)
                old.add_incoming(result, loop)
            results.append(new)
        following = builder.add(step, _LONG(1))
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, num_steps), loop, behind)
        builder.position_at_end(behind)
        return results

    def _load(self, address: Any, offset: Any, kind: Any) -> Any:
        at = self.builder.add(address, offset)
        return self.builder.load(self.builder.inttoptr(at, kind.as_pointer()), align=1)

    def _splat(self, value: Any, kind: Any) -> Any:
        """A vector of 16 times `value`."""
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(nothing, value, _INT(0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(_INTS, [0] * BLOCK))
