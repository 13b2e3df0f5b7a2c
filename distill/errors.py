"""The one error for what a user can mend: what happened, where, and the way out."""

from pathlib import Path


class UserError(Exception):
    """A mistake in the input, worded for the one who can correct it; commands exit with 2.

    Attributes:
        what: what is wrong.
        where: the file, folder, key or row it is about.
        hint: what to do.
    """

    def __init__(self, what: str, where: str | Path | None = None, hint: str | None = None):
        """`str()` gives all of it in one line."""
        self.what = what
        self.where = where
        self.hint = hint
        place = f" ({where})" if where is not None else ""
        advice = f"; {hint}" if hint else ""
        super().__init__(f"{what}{place}{advice}")
