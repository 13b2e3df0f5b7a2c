"""Attention whose result for a query hangs on the keys that it sees, and on nothing else.

In eight bits that matters more than elsewhere: a difference in the last place, which other batch
shapes make in library kernels, moves a value across a rounding here and there, and layers of
roundings make it as large as the quantisation itself. So keys are taken one after the other, in the
order of their places, and those that a mask hides are not looked at.
"""

from functools import partial
from typing import Any

import numpy as np

from decode.int8.scalars import ZERO, exp
from decode.suffix.compiled import floats_at, njit, words_at

_HIDDEN = np.float32(-1e30)  # masks are zero, or the lowest number there is

_compiled = partial(njit, error_model="numpy")


# Sums in another order than written, which depends on the size of a head alone.
@partial(njit, error_model="numpy", fastmath={"reassoc", "contract"})
def _dot(left: int, right: int, size: int) -> Any:
    a, b = floats_at(left), floats_at(right)
    total = ZERO
    for i in range(size):
        total += a[i] * b[i]
    return total


@_compiled
def _attend_one(
    query: int,
    keys: int,
    values: int,
    size: int,
    places: int,
    count: int,
    scale: float,
    scores: int,
    out: int,
) -> None:
    """One query of one head, over the keys at `places`; `scores` is room for a number each."""
    place, share, total = words_at(places), floats_at(scores), floats_at(out)
    unit, largest = np.float32(scale), np.float32(-np.inf)
    for i in range(count):
        score = _dot(query, keys + 4 * size * place[i], size) * unit
        share[i] = score
        largest = score if score > largest else largest
    for i in range(count):
        share[i] = exp(share[i] - largest)
    for e in range(size):
        total[e] = ZERO
    weight = ZERO
    for i in range(count):
        weight += share[i]
        value = floats_at(values + 4 * size * place[i])
        for e in range(size):
            total[e] += share[i] * value[e]
    for e in range(size):
        total[e] /= weight


@_compiled
def attend(
    queries: int,
    query_stride: int,
    num_heads: int,
    keys: int,
    values: int,
    sequence_stride: int,
    head_stride: int,
    num_key_heads: int,
    size: int,
    mask: int,
    mask_stride: int,
    mask_row: int,
    batch: int,
    width: int,
    num_keys: int,
    scale: float,
    room: int,
    out: int,
) -> None:
    """Scaled dot-product attention of B x N queries.

    Arguments are addresses, counts, and strides in bytes: queries [B, N, H, E], of each token
    `query_stride` apart; keys and values [B, G, L, E], alike in their strides; mask [B, N, L];
    `room` for two numbers a key; out [B, N, H, E].
    """
    per_key_head = num_heads // num_key_heads
    scores = room + 4 * num_keys
    places = words_at(room)
    for row in range(batch * width):
        sequence = row // width
        hides = floats_at(mask + sequence * mask_stride + (row % width) * mask_row)
        count = 0
        for place in range(num_keys):
            if hides[place] > _HIDDEN:
                places[count] = place
                count += 1
        for head in range(num_heads):
            at = sequence * sequence_stride + (head // per_key_head) * head_stride
            asked = queries + row * query_stride + 4 * size * head
            answer = out + 4 * size * (row * num_heads + head)
            _attend_one(asked, keys + at, values + at, size, room, count, scale, scores, answer)
