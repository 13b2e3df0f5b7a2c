"""The running interpreter's standard library as text: the default data, split once by module name.

Every module belongs to exactly one of three splits, by a hash of its dotted name, so that the
embedded target, the distillation prompts and the evaluation prompts never share a module, on any
machine and any Python version. Nor do they share a text that several modules have.
"""

import ast
import hashlib
import io
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SPLITS = {"target": range(76), "distill": range(76, 92), "evaluate": range(92, 100)}
MIN_PIECE_CHARS = 1200
LONG_CLASS_CHARS = 4000
MAX_MODULE_BYTES = 400_000


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive whole statements of one module: a document of the default data."""

    module: str
    index: int
    text: str


def split_of(module: str) -> str:
    """The split a module belongs to: 76 % target, 16 % distill, 8 % evaluate."""
    bucket = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8]) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def modules(root: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Dotted names and paths of the standard library's modules, sorted by name.

    Generated tables (`encodings`, `pydoc_data`) and files over 400 kB are left out: they are not
    source that anybody wrote.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in {"site-packages", "dist-packages", "encodings", "pydoc_data"}:
            continue
        if path.stat().st_size > MAX_MODULE_BYTES:
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((name, path))
    yield from sorted(found)


def pieces(split: str, root: Path | None = None) -> Iterator[Piece]:
    """Documents of a split, in module order.

    A text that occurs twice is given once, and one that also stands in a module of an earlier split
    (target, then distill, then evaluate) not at all: some modules are copied from others.
    """
    found: dict[str, Piece] = {}
    for name, source in _sources([split], root):
        try:
            texts = split_source(source)
        except (SyntaxError, ValueError):
            continue  # test data that is broken on purpose
        for index, text in enumerate(texts):
            found.setdefault(text, Piece(name, index, text))
    earlier = list(SPLITS)[: list(SPLITS).index(split)]
    known = _texts_within(found, (source for _, source in _sources(earlier, root)))
    yield from (piece for text, piece in found.items() if text not in known)


def _sources(splits: Sequence[str], root: Path | None) -> Iterator[tuple[str, str]]:
    """Name and text of every readable module of some splits, in module order."""
    for name, path in modules(root):
        if split_of(name) in splits:
            try:
                with tokenize.open(path) as file:
                    yield name, file.read()
            except (SyntaxError, ValueError, OSError):
                continue  # test data that is broken on purpose


def _texts_within(texts: Iterable[str], sources: Iterable[str]) -> set[str]:
    """Those of `texts` that occur somewhere in one of `sources`."""
    # A source is searched for the few texts only whose longest line it has.
    by_line = defaultdict(list)
    for text in texts:
        by_line[max(text.splitlines(), key=len)].append(text)
    return {
        text
        for source in sources
        for line in by_line.keys() & set(source.splitlines())
        for text in by_line[line]
        if text in f"{source}\n"
    }


def split_source(source: str) -> list[str]:
    """Cut a module between statements into pieces of at least 1,200 characters.

    Cuts fall behind top-level statements and, in classes over 4,000 characters, behind their
    members; comments stay with the statement they precede.

    Raises:
        SyntaxError: the text is not Python of the running version.
    """
    lines = io.StringIO(source).readlines()  # as ast counts: a form feed ends no line
    cuts = []
    for node in ast.parse(source).body:
        first, last = node.lineno, node.end_lineno or node.lineno
        if isinstance(node, ast.ClassDef) and sum(map(len, lines[first:last])) > LONG_CLASS_CHARS:
            cuts += [member.end_lineno or member.lineno for member in node.body]
        cuts.append(last)
    texts, start, size, previous = [], 0, 0, 0
    for cut in [*cuts, len(lines)]:
        size += sum(map(len, lines[previous:cut]))
        previous = max(previous, cut)
        if size >= MIN_PIECE_CHARS:
            texts.append("".join(lines[start:cut]))
            start, size = cut, 0
    rest = "".join(lines[start:])
    if rest.strip():
        texts.append(rest)
    return [text.strip("\n") + "\n" for text in texts]
