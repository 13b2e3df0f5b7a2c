"""Functions compiled at first use, and memory that they reach by address."""

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any

import numba
from llvmlite import ir
from numba.core import config, types
from numba.extending import intrinsic

FOLDERS = ("suffix", "int8")  # of `decode`, whose functions are compiled


@cache
def cache_folder() -> str:
    """Where compiled code is kept: a folder per state of these sources.

    numba looks at the file of a function only, not at those of the functions that it calls.
    """
    paths = [path for name in FOLDERS for path in Path(__file__).parents[1].glob(f"{name}/*.py")]
    sources = b"".join(path.read_bytes() for path in sorted(paths))
    state = hashlib.sha256(sources + numba.__version__.encode()).hexdigest()[:16]
    return kept_folder(f"compiled-{state}", config.CACHE_DIR)


def kept_folder(name: str, parent: str | None = None) -> str:
    """A folder for compiled code, in `parent` or the user's cache, or elsewhere if not there."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(parent or os.path.join(home, "draftsmith")) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError:  # of this process alone: what is found in it is loaded and run
        own = tempfile.mkdtemp(prefix="draftsmith-")
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        return own


def njit(function: Callable[..., Any], **options: Any) -> Any:
    """Compile without the interpreter, release the lock on it, and keep the result on disk.

    `options` are further ones of numba's.
    """
    users, config.CACHE_DIR = config.CACHE_DIR, cache_folder()
    try:
        return numba.njit(cache=True, nogil=True, **options)(function)
    finally:
        config.CACHE_DIR = users


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
shorts_at = _pointer(types.uint16, ir.IntType(16))
bytes_at = _pointer(types.uint8, ir.IntType(8))
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
