"""What a command's output folder knows about itself: with which settings it was begun, and whether
it is finished."""

import dataclasses
import enum
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import UserError

SETTINGS = "settings.json"
SUMMARY = "summary.json"
PACKAGES = ("draftsmith", "torch", "transformers", "accelerate", "datasets", "peft")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The output folder of one command.

    `settings.json` is written at the start and `summary.json` at the end, both whole: a folder with
    a summary is finished, one without is gone on with.

    Attributes:
        path: the folder.
        settings: everything that decides the outcome, hashes of the inputs included.
    """

    path: Path
    settings: Mapping[str, Any]

    def begin(self) -> dict[str, Any] | None:
        """Open the folder.

        Returns:
            the summary where the same work is finished already, else None.

        Raises:
            UserError: the folder holds work with other settings.
        """
        stored = self.path / SETTINGS
        if stored.is_file():
            before = json.loads(stored.read_text())["settings"]
            changed = differing_keys(before, json.loads(canonical(self.settings)))
            if changed:
                raise UserError(
                    f"the folder holds a run with other settings ({', '.join(changed)} differ)",
                    self.path,
                    "choose another output folder, or remove this one",
                )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(stored, {"settings": self.settings, "environment": environment()})
        summary = self.path / SUMMARY
        return json.loads(summary.read_text()) if summary.is_file() else None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the folder as finished."""
        write_json(self.path / SUMMARY, summary)

    def is_of(self) -> bool:
        """Whether the folder is new or holds work with these settings."""
        stored = self.path / SETTINGS
        if not stored.is_file():
            return True
        before = json.loads(stored.read_text())["settings"]
        return not differing_keys(before, json.loads(canonical(self.settings)))


def describe(value: Any) -> Any:
    """A settings object as plain data: dataclasses by name and fields, enums and paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(describe(entry) for entry in value)
    if isinstance(value, list | tuple):
        return [describe(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def canonical(value: Any) -> str:
    """JSON text that is the same for the same settings."""
    return json.dumps(describe(value), sort_keys=True, ensure_ascii=False)


def content_hash(value: Any) -> str:
    """Hash of settings."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def differing_keys(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two descriptions differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            name
            for key in sorted(before.keys() | now.keys())
            for name in differing_keys(before.get(key), now.get(key), f"{prefix}{key}.")
        ]
    return [] if before == now else [prefix.rstrip(".")]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(describe(value), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Versions, machine and source revision, for the record."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "versions": versions,
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """Revision of the source tree this package runs from, where it is a git checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
