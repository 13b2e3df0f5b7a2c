"""A progress line: how far, how fast, how long still."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

TERMINAL_SECONDS = 0.2
LOG_SECONDS = 15.0


class Progress:
    """One line that renews itself on a terminal; elsewhere a new line now and then.

    Example:
        >>> with Progress(100, unit="steps", label="train") as progress:
        ...     progress.advance(1, tokens=4096, loss=2.31)
        train 1/100 steps  1.3 steps/s  left 1:16  5,325 tokens/s  loss 2.31
    """

    def __init__(self, total: int, unit: str, label: str, stream: TextIO | None = None):
        """Count to `total` of `unit`; `stream` is stderr by default."""
        self.total = total
        self.unit = unit
        self.label = label
        self.stream = stream or sys.stderr
        self.done = 0
        self._skipped = 0
        self._counts: dict[str, int] = {}
        self._figures: dict[str, float | str] = {}
        self._is_terminal = self.stream.isatty()
        self._started = self._shown = time.monotonic()
        self._width = 0
        self._is_stale = False

    def __enter__(self) -> Self:
        """Start the clock."""
        self._started = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state on a line of its own."""
        if self._is_stale or self._is_terminal:
            self._show(last=True)

    def skip(self, count: int) -> None:
        """`count` were done before; they do not count for the rate."""
        self._skipped += count
        self.done += count

    def advance(self, count: int = 1, **figures: float | str) -> None:
        """`count` more are done.

        Whole numbers in `figures` are counts: they add up and are shown per second. Other figures
        are shown as they are until given anew.
        """
        self.done += count
        for name, value in figures.items():
            if isinstance(value, int):
                self._counts[name] = self._counts.get(name, 0) + value
            else:
                self._figures[name] = value
        self._is_stale = True
        pause = TERMINAL_SECONDS if self._is_terminal else LOG_SECONDS
        if time.monotonic() - self._shown >= pause:
            self._show()

    def line(self) -> str:
        """The text."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self.done - self._skipped) / seconds
        parts = [f"{self.label} {self.done:,}/{self.total:,} {self.unit}"]
        if rate > 0:
            parts.append(f"{_number(rate)} {self.unit}/s")
            parts.append(f"left {clock((self.total - self.done) / rate)}")
        parts += [f"{_number(n / seconds)} {name}/s" for name, n in self._counts.items()]
        parts += [f"{name} {_number(value)}" for name, value in self._figures.items()]
        return "  ".join(parts)

    def _show(self, *, last: bool = False) -> None:
        self._shown = time.monotonic()
        self._is_stale = False
        text = self.line()
        if self._is_terminal:
            self.stream.write("\r" + text.ljust(self._width) + ("\n" if last else ""))
            self._width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()


def clock(seconds: float) -> str:
    """A duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
