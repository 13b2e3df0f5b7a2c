"""The arithmetic of an int8 layer, compiled: products, and what lies between them.

At a few rows a product in eight bits takes a few microseconds, no more than a call of torch; so a
layer is two calls of its own, one on each side of the attention. Every function goes row by row and
treats a row alike whoever is beside it.

All arguments are addresses (int64) and counts. How a matrix is described, `tiles` says; a layer is
by four matrices and what follows them, in the order of the constants below. Rows are float32.
"""

from functools import partial
from typing import Any

import numpy as np

from decode.int8.scalars import ONE, ROUNDING, ZERO, exp, float_of_bits
from decode.int8.tiles import BLOCKS, MATRIX, OFFSET, WIDTH, make_tile
from decode.suffix.compiled import bytes_at, floats_at, longs_at, njit, words_at

CHUNK = 48  # rows that go through a layer's products together

# A layer: its matrices, weights of its norms (0 where there is none), numbers of heads, room.
QKV, ATTENTION_OUT, GATE_UP, MLP_OUT = range(0, 4 * MATRIX, MATRIX)
ATTENTION_NORM, MLP_NORM, QUERY_NORM, KEY_NORM = range(4 * MATRIX, 4 * MATRIX + 4)
HEADS, KEY_HEADS, HEAD_SIZE = range(4 * MATRIX + 4, 4 * MATRIX + 7)
# Room for a chunk of rows, of the widest kind: bytes, their units, one row, two products.
ROOM_BYTES, ROOM_UNITS, ROOM_ROW, ROOM_WIDE, ROOM_NARROW = range(4 * MATRIX + 7, 4 * MATRIX + 12)

_TOP, _PER_TOP = np.float32(127), np.float32(1 / 127)
_NO_SIGN = np.int32(0x7FFFFFFF)
_OFFSET = np.int32(OFFSET)
_LEAST = np.float32(1e-30)  # of a row that is more than zeros: its inverse is finite

_row_8, _row_1 = make_tile(1, 8), make_tile(1, 1)
_rows_2, _rows_3, _rows_4, _rows_5, _rows_6 = (make_tile(number, 2) for number in range(2, 7))

_compiled = partial(njit, error_model="numpy")
# Sums in another order than written, which depends on their length alone.
_reordered = partial(njit, error_model="numpy", fastmath={"reassoc"})


@_compiled
def _quantise(values: int, width: int, out: int) -> Any:
    """A row's bytes; returns its unit, a 127th of its largest magnitude."""
    bits, floats, units = words_at(values), floats_at(values), bytes_at(out)
    # Magnitudes in the order of their bits: integers, whose maximum takes no care of NaN.
    largest = np.int32(0)
    for i in range(width):
        largest = max(largest, np.int32(bits[i] & _NO_SIGN))
    magnitude = float_of_bits(largest)
    per_unit = _TOP / magnitude if magnitude > _LEAST else ZERO
    for i in range(width):
        rounded = (floats[i] * per_unit + ROUNDING) - ROUNDING
        units[i] = np.uint8(np.int32(rounded) + _OFFSET)
    return magnitude * _PER_TOP


@_compiled
def _multiply(matrix: int, rows: int, units: int, num_rows: int, out: int, stride: int) -> None:
    """Quantised rows times a matrix: float32 with `stride` bytes between rows."""
    about = longs_at(matrix)
    num_blocks, width = about[BLOCKS], about[WIDTH]
    block = 0
    if num_rows == 1:
        while block + 8 <= num_blocks:
            _row_8(matrix, block, rows, units, out + (block << 6), stride)
            block += 8
    while block < num_blocks:
        pair = block + 2 <= num_blocks
        row = 0
        while row < num_rows:
            left = num_rows - row
            x, unit, to = rows + row * width, units + 4 * row, out + (block << 6) + row * stride
            if pair and left >= 6:
                _rows_6(matrix, block, x, unit, to, stride)
                row += 6
            elif pair and left == 5:
                _rows_5(matrix, block, x, unit, to, stride)
                row += 5
            elif pair and left == 4:
                _rows_4(matrix, block, x, unit, to, stride)
                row += 4
            elif pair and left == 3:
                _rows_3(matrix, block, x, unit, to, stride)
                row += 3
            elif pair and left == 2:
                _rows_2(matrix, block, x, unit, to, stride)
                row += 2
            else:
                _row_1(matrix, block, x, unit, to, stride)
                if pair:
                    _row_1(matrix, block + 1, x, unit, to + 64, stride)
                row += 1
        block += 2 if pair else 1


@_reordered
def _sum_of_squares(values: int, width: int) -> Any:
    floats = floats_at(values)
    total = ZERO
    for i in range(width):
        total += floats[i] * floats[i]
    return total


@_compiled
def _norm(values: int, weight: int, eps: float, width: int, out: int) -> None:
    """RMS norm of a row."""
    scale = ONE / np.sqrt(_sum_of_squares(values, width) / np.float32(width) + np.float32(eps))
    given, weights, normed = floats_at(values), floats_at(weight), floats_at(out)
    for i in range(width):
        normed[i] = given[i] * scale * weights[i]


@_compiled
def _add(left: int, right: int, count: int, out: int) -> None:
    a, b, total = floats_at(left), floats_at(right), floats_at(out)
    for i in range(count):
        total[i] = a[i] + b[i]


@_compiled
def _gated(gate_up: int, width: int, out: int) -> None:
    """silu(gate) * up of a row that holds both."""
    gate, up, gated = floats_at(gate_up), floats_at(gate_up + 4 * width), floats_at(out)
    for i in range(width):
        gated[i] = gate[i] / (ONE + exp(-gate[i])) * up[i]


@_compiled
def _turn(head: int, cos: int, sin: int, size: int, room: int) -> None:
    """Rotary positions of one head, in place."""
    values, turned = floats_at(head), floats_at(room)
    cosines, sines = floats_at(cos), floats_at(sin)
    half = size >> 1
    for i in range(half):
        turned[i] = values[i] * cosines[i] + values[i + half] * sines[i]
    for i in range(half):
        turned[i + half] = values[i + half] * cosines[i + half] + values[i] * sines[i + half]
    for i in range(size):
        values[i] = turned[i]


@_compiled
def product(matrix: int, rows: int, num_rows: int, room: int, out: int) -> None:
    """[rows, I] times a matrix: [rows, 16 * blocks], padding included.

    `room` holds a chunk of rows of bytes, and a float for each behind them.
    """
    about = longs_at(matrix)
    width, stride = about[WIDTH], about[BLOCKS] << 6
    units = room + CHUNK * width
    done = 0
    while done < num_rows:
        count = min(CHUNK, num_rows - done)
        for row in range(count):
            floats_at(units)[row] = _quantise(
                rows + 4 * width * (done + row), width, room + row * width
            )
        _multiply(matrix, room, units, count, out + done * stride, stride)
        done += count


@_compiled
def norm(states: int, weight: int, eps: float, width: int, num_rows: int, out: int) -> None:
    """RMS norm of every row."""
    for row in range(num_rows):
        _norm(states + 4 * width * row, weight, eps, width, out + 4 * width * row)


@_compiled
def before_attention(
    layer: int, states: int, eps: float, num_rows: int, cos: int, sin: int, out: int
) -> None:
    """Norm, projections and rotary positions: [rows, H + 2 G, E], queries, keys and values."""
    about = longs_at(layer)
    room, units, spare = about[ROOM_BYTES], about[ROOM_UNITS], about[ROOM_ROW]
    width, size = about[QKV + WIDTH], about[HEAD_SIZE]
    num_heads, num_rotated = about[HEADS], about[HEADS] + about[KEY_HEADS]
    stride = 4 * size * (num_rotated + about[KEY_HEADS])
    done = 0
    while done < num_rows:
        count = min(CHUNK, num_rows - done)
        for row in range(count):
            at = states + 4 * width * (done + row)
            _norm(at, about[ATTENTION_NORM], eps, width, spare)
            floats_at(units)[row] = _quantise(spare, width, room + row * width)
        _multiply(layer + 8 * QKV, room, units, count, out + done * stride, stride)
        for row in range(done, done + count):
            place = 4 * size * row
            for head in range(num_rotated):
                at = out + row * stride + 4 * size * head
                weight = about[QUERY_NORM] if head < num_heads else about[KEY_NORM]
                if weight != 0:
                    _norm(at, weight, eps, size, at)
                _turn(at, cos + place, sin + place, size, spare)
        done += count


@_compiled
def behind_attention(
    layer: int, states: int, attended: int, eps: float, num_rows: int, out: int
) -> None:
    """Output projection and MLP, each with its residual: [rows, D]."""
    about = longs_at(layer)
    room, units, spare = about[ROOM_BYTES], about[ROOM_UNITS], about[ROOM_ROW]
    wide, narrow = about[ROOM_WIDE], about[ROOM_NARROW]
    width, heads = about[GATE_UP + WIDTH], about[ATTENTION_OUT + WIDTH]
    inner, wide_stride = about[MLP_OUT + WIDTH], about[GATE_UP + BLOCKS] << 6
    stride = 4 * width
    done = 0
    while done < num_rows:
        count = min(CHUNK, num_rows - done)
        here = out + stride * done
        for row in range(count):
            at = attended + 4 * heads * (done + row)
            floats_at(units)[row] = _quantise(at, heads, room + row * heads)
        _multiply(layer + 8 * ATTENTION_OUT, room, units, count, narrow, stride)
        _add(narrow, states + stride * done, count * width, here)
        for row in range(count):
            _norm(here + stride * row, about[MLP_NORM], eps, width, spare)
            floats_at(units)[row] = _quantise(spare, width, room + row * width)
        _multiply(layer + 8 * GATE_UP, room, units, count, wide, wide_stride)
        for row in range(count):
            _gated(wide + wide_stride * row, inner, spare)
            floats_at(units)[row] = _quantise(spare, inner, room + row * inner)
        _multiply(layer + 8 * MLP_OUT, room, units, count, narrow, stride)
        _add(here, narrow, count * width, here)
        done += count
