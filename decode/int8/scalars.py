"""Single numbers: the parts of loops that the compiler makes vectors of."""

from functools import partial
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from decode.suffix.compiled import njit

ONE, ZERO = np.float32(1), np.float32(0)
ROUNDING = np.float32(1.5 * 2**23)  # added and taken away again, it rounds to nearest even


@intrinsic  # type: ignore[untyped-decorator]
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 whose bits those of an int32 are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C0, _C1, _C2 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
)
_C3, _C4 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1)
_C5, _FARTHEST = np.float32(5.0000001201e-1), np.float32(87)


@partial(njit, error_model="numpy")
def exp(x: Any) -> Any:
    """The exponential function by the polynomial of Cephes, within two units in the last place."""
    x = _FARTHEST if x > _FARTHEST else x
    x = -_FARTHEST if x < -_FARTHEST else x
    power = (x * _LOG2_E + ROUNDING) - ROUNDING
    r = x - power * _LN2_HIGH - power * _LN2_LOW
    series = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
    whole = float_of_bits(np.int32(np.int32(power) + np.int32(127)) << np.int32(23))
    return (series * r * r + r + ONE) * whole
