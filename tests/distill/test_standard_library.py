"""The default data: every module in one split, cut between statements, nothing lost."""

import ast
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from distill.standard_library import (
    LONG_CLASS_CHARS,
    MAX_MODULE_BYTES,
    MIN_PIECE_CHARS,
    SPLITS,
    modules,
    pieces,
    split_of,
    split_source,
)


def function(name: str, indent: str = "") -> str:
    """Some 400 characters with a comment, a decorator and blank lines."""
    return textwrap.indent(
        f"# what {name} is for\n@wrap\ndef {name}(x):\n    y = '{'v' * 320}'\n\n    return y\n\n",
        indent,
    )


def module(count: int) -> str:
    return '"""A module."""\n\nimport os\n\n' + "".join(function(f"f{i}") for i in range(count))


def name_in(split: str, prefix: str = "m") -> str:
    """A module name that belongs to `split`."""
    return next(f"{prefix}{i}" for i in range(1000) if split_of(f"{prefix}{i}") == split)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A library with a package, and with all that is left out."""
    files = {
        "alone.py": module(9),
        "package/__init__.py": module(4),
        "package/inner.py": module(5),
        "encodings/table.py": module(4),
        "pydoc_data/topics.py": module(4),
        "site-packages/third.py": module(4),
        "dist-packages/third.py": module(4),
        "huge.py": "x = 1\n" * (MAX_MODULE_BYTES // 6 + 1),
        "notes.txt": "no module",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_modules_are_named_sorted_and_chosen(root: Path) -> None:
    assert [name for name, _ in modules(root)] == ["alone", "package", "package.inner"]
    assert dict(modules(root))["package"] == root / "package" / "__init__.py"


def test_splits_are_a_partition_of_the_hundred_buckets() -> None:
    buckets = [bucket for split in SPLITS.values() for bucket in split]
    assert sorted(buckets) == list(range(100))


def test_the_split_of_a_name_is_the_same_for_ever() -> None:
    # Pinned: the embedded target was trained on one split, and is measured on another.
    pinned = {
        "json.decoder": "target",
        "argparse": "target",
        "ast": "distill",
        "bisect": "evaluate",
    }
    assert {name: split_of(name) for name in pinned} == pinned


def test_splits_have_their_shares() -> None:
    counts = Counter(split_of(f"package.module{i}") for i in range(5000))
    for name, buckets in SPLITS.items():
        assert counts[name] / 5000 == pytest.approx(len(buckets) / 100, abs=0.025)


def test_each_module_of_this_interpreter_is_in_one_split() -> None:
    by_split = {split: {n for n, _ in modules() if split_of(n) == split} for split in SPLITS}
    assert all(by_split.values())
    assert sum(map(len, by_split.values())) == len({name for name, _ in modules()})


def test_pieces_of_all_splits_are_all_modules_and_are_the_same_again(root: Path) -> None:
    found = {split: list(pieces(split, root)) for split in SPLITS}
    assert found == {split: list(pieces(split, root)) for split in SPLITS}
    owners = [{piece.module for piece in of_split} for of_split in found.values()]
    assert sum(map(len, owners)) == len(set().union(*owners))
    assert set().union(*owners) <= {"alone", "package", "package.inner"}
    for split, of_split in found.items():
        assert {split_of(piece.module) for piece in of_split} <= {split}


def test_pieces_are_numbered_within_their_module(tmp_path: Path) -> None:
    name = name_in("evaluate")
    (tmp_path / f"{name}.py").write_text(module(12))
    found = list(pieces("evaluate", tmp_path))
    assert [(piece.module, piece.index) for piece in found] == [
        (name, i) for i in range(len(found))
    ]
    assert [piece.text for piece in found] == split_source(module(12))


def test_a_text_that_occurs_twice_in_a_split_is_given_once(tmp_path: Path) -> None:
    one, two = name_in("distill", "a"), name_in("distill", "b")
    for name in (one, two):
        (tmp_path / f"{name}.py").write_text(module(8))
    found = list(pieces("distill", tmp_path))
    assert {piece.module for piece in found} == {one}
    assert len({piece.text for piece in found}) == len(found)


@pytest.mark.parametrize(("earlier", "later"), [("target", "evaluate"), ("distill", "evaluate")])
def test_a_text_that_an_earlier_split_has_is_left_out(
    earlier: str, later: str, tmp_path: Path
) -> None:
    copied = module(8)
    own = 'def only_here():\n    return "only here"\n'
    # Behind another beginning its pieces are cut elsewhere: the text counts, not the piece.
    (tmp_path / f"{name_in(earlier)}.py").write_text(f"first = 1\n{copied}")
    (tmp_path / f"{name_in(later)}.py").write_text(f"{copied}\n\n{own}")
    assert "".join(piece.text for piece in pieces(later, tmp_path)).strip() == own.strip()
    assert any("first" in piece.text for piece in pieces(earlier, tmp_path))


def test_no_text_of_this_interpreter_is_in_two_splits() -> None:
    texts = {split: {piece.text for piece in pieces(split)} for split in SPLITS}
    assert len(set().union(*texts.values())) == sum(map(len, texts.values()))


def test_files_that_are_not_python_are_passed_over(tmp_path: Path) -> None:
    good, *broken = (name_in("distill", prefix) for prefix in "abcd")
    (tmp_path / f"{good}.py").write_text("x = 1\n")
    (tmp_path / f"{broken[0]}.py").write_text("def broken(:\n")
    (tmp_path / f"{broken[1]}.py").write_bytes(b"# coding: utf-8\nx = '\xff'\n")
    (tmp_path / f"{broken[2]}.py").write_bytes(b"x = '\0'\n")
    assert [piece.text for piece in pieces("distill", tmp_path)] == ["x = 1\n"]


def test_a_declared_encoding_is_read(tmp_path: Path) -> None:
    name = name_in("distill")
    (tmp_path / f"{name}.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    (piece,) = pieces("distill", tmp_path)
    assert piece.text.endswith("x = 'é'\n")


def squeezed(text: str) -> str:
    """Without blank lines, which may go between pieces."""
    return "\n".join(line for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("count", [0, 1, 3, 4, 17])
def test_pieces_are_whole_statements_and_together_the_module(count: int) -> None:
    source = module(count)
    texts = split_source(source)
    assert squeezed("".join(texts)) == squeezed(source)
    assert all(len(text) >= MIN_PIECE_CHARS - 2 for text in texts[:-1])  # but for blank lines
    for text in texts:
        ast.parse(text)
        assert text == text.strip("\n") + "\n"


def test_a_comment_and_a_decorator_stay_with_what_they_precede() -> None:
    for text in split_source(module(20))[1:]:
        assert text.startswith("# what f")


def test_a_long_class_is_cut_between_its_members() -> None:
    body = "".join(function(f"m{i}", "    ") for i in range(20))
    source = f"class Long:\n{body}\n\nafter = 1\n"
    assert len(source) > LONG_CLASS_CHARS
    texts = split_source(source)
    assert len(texts) > 3
    assert squeezed("".join(texts)) == squeezed(source)
    for text in texts[1:-1]:
        ast.parse("class Part:\n" + text)


def test_a_short_class_is_one_piece() -> None:
    source = "class Short:\n" + "".join(function(f"m{i}", "    ") for i in range(6))
    assert MIN_PIECE_CHARS < len(source) < LONG_CLASS_CHARS
    assert len(split_source(source)) == 1


def test_an_empty_module_has_no_piece_and_a_broken_one_is_an_error() -> None:
    assert split_source("") == []
    assert split_source("\n\n") == []
    with pytest.raises(SyntaxError):
        split_source("def f(:\n")


@pytest.mark.parametrize("mark", ["\x0c", "\x0b", "\x1c", "\u2028"])
def test_only_newlines_end_lines(mark: str) -> None:
    source = f"# {mark} {mark} {mark}\n" + module(12)
    for text in split_source(source):
        ast.parse(text)
