"""A run folder knows its work: the same goes on or is finished, other work is refused."""

import enum
import errno
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.run_folder import (
    PACKAGES,
    RunFolder,
    canonical,
    content_hash,
    describe,
    differing_keys,
    environment,
    git_revision,
    write_json,
    write_text,
)


class Kind(enum.Enum):
    fast = "quick"


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Other:
    rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Settings:
    inner: Inner | Other = Inner()
    kind: Kind = Kind.fast
    path: Path = Path("a/b")
    sizes: tuple[int, ...] = (1, 2)
    extra: Mapping[str, Any] | None = None


def test_settings_become_plain_data() -> None:
    found = describe(Settings(extra={"x": Path("y"), 3: [Kind.fast]}))
    assert found == {
        "type": "Settings",
        "inner": {"type": "Inner", "rate": 0.1},
        "kind": "quick",
        "path": "a/b",
        "sizes": [1, 2],
        "extra": {"x": "y", "3": ["quick"]},
    }
    assert json.loads(json.dumps(found)) == found


def test_the_hash_hangs_on_every_setting_and_on_no_order() -> None:
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert canonical({"b": "τ", "a": (1,)}) == '{"a": [1], "b": "τ"}'
    variants = [
        Settings(),
        Settings(inner=Inner(rate=0.2)),
        Settings(inner=Other()),  # the same fields, another kind of thing
        Settings(path=Path("a/c")),
        Settings(sizes=(2, 1)),
        Settings(extra={}),
    ]
    assert len({content_hash(settings) for settings in variants}) == len(variants)


def test_differences_are_named_by_their_dotted_keys() -> None:
    before = describe(Settings())
    now = describe(Settings(inner=Inner(rate=0.2), sizes=(1,)))
    assert differing_keys(before, now) == ["inner.rate", "sizes"]
    assert differing_keys(before, before) == []
    assert differing_keys({"a": 1}, {"a": 1, "b": {"c": 2}}) == ["b"]
    assert differing_keys({"a": 1, "old": 0}, {"a": 1}) == ["old"]


def test_a_folder_is_begun_gone_on_with_and_finished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run", {"lr": 0.1, "path": Path("x")})
    assert folder.is_of()
    assert folder.begin() is None
    stored = json.loads((folder.path / "settings.json").read_text())
    assert stored["settings"] == {"lr": 0.1, "path": "x"}
    assert stored["environment"].keys() == {"python", "machine", "versions", "git"}
    assert folder.begin() is None  # cut short: once more
    folder.finish({"rows": 3})
    assert folder.begin() == {"rows": 3}
    assert RunFolder(folder.path, {"path": Path("x"), "lr": 0.1}).begin() == {"rows": 3}


def test_a_folder_with_other_work_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"trainer": {"lr": 0.1, "steps": 5}, "seed": 0}).begin()
    before = (tmp_path / "settings.json").read_bytes()
    other = RunFolder(tmp_path, {"trainer": {"lr": 0.2, "steps": 5}, "seed": 1})
    assert not other.is_of()
    with pytest.raises(UserError, match=r"seed, trainer\.lr differ") as raised:
        other.begin()
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "settings.json").read_bytes() == before


def test_the_settings_stay_those_of_the_first_start(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"a": 1}).begin()
    before = (tmp_path / "settings.json").stat().st_mtime_ns
    RunFolder(tmp_path, {"a": 1}).begin()
    assert (tmp_path / "settings.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"text": "τ", "path": Path("x")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "τ", "path": "x"}
    before = path.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_text(path, "new")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_json_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_environment_is_on_record() -> None:
    found = environment()
    assert found["versions"].keys() == set(PACKAGES)
    assert found["versions"]["torch"][0].isdigit()
    json.dumps(found)


def test_no_git_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert git_revision() is None
