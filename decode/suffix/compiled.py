"""Functions compiled at first use, and memory that they reach by address."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any


def _can_write(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)


if "NUMBA_CACHE_DIR" not in os.environ and not (
    _can_write(Path(__file__).parent) or _can_write(Path(os.path.expanduser("~")))
):
    # numba keeps what it compiled beside the module or in the home, and refuses to compile where it
    # can write to neither. A folder of this process alone: what is in it is loaded and run.
    os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="draftsmith-numba-")

import numba  # noqa: E402
from llvmlite import ir  # noqa: E402
from numba.core import types  # noqa: E402
from numba.extending import intrinsic  # noqa: E402


def njit(function: Callable[..., Any]) -> Any:
    """Compile without the interpreter, release the lock on it, and keep the result on disk."""
    return numba.njit(cache=True, nogil=True, fastmath=False, boundscheck=False)(function)


def _pointer(kind: Any, bits: Any) -> Any:
    """A compiled function from an address (int64) to a pointer, which is indexed like an array.

    Arrays would be counted, with a locked increment and decrement at every call they are handed to:
    nearly half of the time of a tree's growth.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def at(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], bits.as_pointer())

        return types.CPointer(kind)(types.int64), generate  # type: ignore[attr-defined]

    return at


longs_at = _pointer(types.int64, ir.IntType(64))
words_at = _pointer(types.int32, ir.IntType(32))
floats_at = _pointer(types.float32, ir.FloatType())


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Tell who waits what for, where compilation is not cached yet."""
    timer = Timer(
        2.0, print, [f"Compiling {what}; this is kept for the next time."], {"file": sys.stderr}
    )
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
