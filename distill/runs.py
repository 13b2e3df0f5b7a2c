"""Runs of `draftsmith train`, and how they share the rows of a table."""

import json
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill.checkpoint import latest
from distill.drafter_folder import read_description, weights_hash
from distill.errors import UserError
from distill.run_folder import SETTINGS, SUMMARY

WEIGHTS = "model.safetensors"
PLAIN = "plain"  # our loop without a drafter, on the target that is given
# Settings that follow from others, or by which seeds differ.
DERIVED = {
    "seed",
    "drafter.seed",
    "drafter.path",
    "objective.reference",
    "joint.type",
    "drafter_fingerprint",
    "reference_fingerprint",
    "target_fingerprint",
    "held_out_hash",
    "data_hash",
}


@dataclass(frozen=True)
class Run:
    """A run of `draftsmith train`."""

    folder: Path

    @property
    def name(self) -> str:
        """Of the run in the journal."""
        return str(self.folder.resolve())

    @property
    def drafter(self) -> Path:
        """The drafter's folder."""
        return self.folder / "drafter"

    @property
    def own_target(self) -> Path | None:
        """The target that was trained with it."""
        path = self.drafter / "target"
        return path if path.is_dir() else None

    @property
    def plain(self) -> str:
        """Name of the plain loop on its target."""
        return PLAIN if self.own_target is None else f"{PLAIN} {self.own_target.resolve()}"

    def weights(self) -> str:
        """Hash of the drafter, and of the target that was trained with it."""
        hashes = [weights_hash(self.drafter)]
        if self.own_target is not None:
            hashes.append(weights_hash(self.own_target))
        return "+".join(str(one) for one in hashes)

    def settings(self) -> dict[str, Any]:
        """Flat: dotted names to values."""
        return dict(flat(json.loads((self.folder / SETTINGS).read_text())["settings"]))

    def seed(self) -> int:
        """Of the training."""
        return int(self.settings()["seed"])

    def is_finished(self) -> bool:
        """Whether it is, and has left a drafter."""
        return (self.folder / SUMMARY).is_file()

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl; of one that is being written, none."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def parameters(self) -> int:
        """Numbers in the drafter's file; 0 where there is none yet."""
        total = 0
        for path in self.drafter.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    total += int(np.prod(file.get_slice(key).get_shape()))
        return total

    def training(self) -> tuple[float, float]:
        """Tokens, and the seconds they took, from the lines of metrics.jsonl."""
        tokens = seconds = before = 0.0
        for line in self.metrics():
            if "tokens_per_second" in line:
                new = line["tokens"] - before
                before = line["tokens"]
                tokens += new
                seconds += new / line["tokens_per_second"]
        return tokens, seconds


@dataclass(frozen=True)
class LastStep(Run):
    """A run with the weights after its last step, where the best τ came before.

    Attributes:
        copy: the drafter's folder, with these weights.
    """

    copy: Path

    @property
    def drafter(self) -> Path:
        """The drafter's folder."""
        return self.copy


def at_last_step(run: Run, into: Path) -> Run:
    """The run as it is if its drafter is that of the last step, else with a copy that is.

    Args:
        run: finished.
        into: folder that gets the copy.

    Raises:
        UserError: there is no checkpoint of the last step, or its weights are not the drafter's
            alone (adapters, a target trained too).
    """
    steps = run.settings()["trainer.steps"]
    if json.loads((run.folder / SUMMARY).read_text())["best_step"] == steps:
        return run
    last = latest(run.folder / "checkpoints")
    if last is None or last.step != steps:
        raise UserError(f"there is no checkpoint of step {steps:,}", run.folder)
    weights, own = (load_file(path / WEIGHTS) for path in (last.path, run.drafter))
    if weights.keys() != own.keys():
        raise UserError("the checkpoint has other weights than the drafter alone", last.path)
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(run.drafter, into)
    save_file(weights, into / WEIGHTS, metadata={"format": "pt"})
    return LastStep(run.folder, into)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of what lies in nested mappings."""
    if not isinstance(value, dict):
        yield prefix.rstrip("."), value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{prefix}{key}.")


def rows_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Finished runs, grouped, for a comparison seed by seed.

    Raises:
        UserError: rows have other seeds than each other, or one twice.
    """
    found = grouped(runs)
    check_seeds({name: [run.seed() for run in of_row] for name, of_row in found.items()})
    return {name + how_far_moved(of_row): of_row for name, of_row in found.items()}


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by the settings in which they differ, the seed left out; in a row they go by seed."""
    settings = [run.settings() for run in runs]
    names = sorted({name for one in settings for name in one} - DERIVED)
    varied = [n for n in names if len({json.dumps(one.get(n)) for one in settings}) > 1]
    rows = short_paths(str(one["data.rows"]) for one in settings if one.get("data.rows"))
    # A class tells more than what it is made of: that counts only among runs of the same class.
    groups: dict[str, list[Run]] = defaultdict(list)
    for run, one in zip(runs, settings, strict=True):
        parts = []
        for name in varied:
            field, kind = name.rpartition(".")[2], class_around(name, one)
            alike = [other for other in settings if other.get(kind) == one.get(kind)]
            if len({json.dumps(other.get(name)) for other in alike}) == 1:
                continue
            value = one.get(name)
            if value is not None:
                shown = rows[str(value)] if name == "data.rows" else value
                parts.append(str(shown) if field == "type" else f"{field} {shown}")
        if run.own_target is not None:
            parts.append("own target")
        groups[", ".join(parts) or "drafter"].append(run)
    return {name: sorted(of_row, key=Run.seed) for name, of_row in groups.items()}


def class_around(name: str, settings: Mapping[str, Any]) -> str:
    """The name of the class that a setting, or a class, is a part of; one that no run has if none.

    "data.type" for "data.share", for "data.source.type" and for "data.parts.mine.type".
    """
    *groups, field = name.split(".")
    for end in range(len(groups) - (field == "type"), 0, -1):
        around = ".".join([*groups[:end], "type"])
        if around in settings:
            return around
    return ""


def short_paths(paths: Iterable[str]) -> dict[str, str]:
    """Each path by the name of the folder it lies in, where that tells them apart."""
    full = set(paths)
    short = {path: Path(path).parent.name for path in full}
    is_unique = len(set(short.values())) == len(full) and all(short.values())
    return short if is_unique else {path: path for path in full}


def check_seeds(seeds: Mapping[str, Sequence[int]]) -> None:
    """Rows are compared seed by seed.

    Raises:
        UserError: naming the seeds of every row.
    """
    listed = list(seeds.values())
    if any(len(set(one)) < len(one) or one != listed[0] for one in listed):
        told = "; ".join(f"{name}: {', '.join(map(str, one))}" for name, one in seeds.items())
        raise UserError(
            f"every row needs the same seeds, each once ({told})",
            hint="train what is missing, or name fewer folders",
        )


def how_far_moved(runs: Sequence[Run]) -> str:
    """What is added to the name of a row whose targets were trained too: the mean over seeds."""
    if runs[0].own_target is None:
        return ""
    measured = [read_description(run.drafter).get("measured", {}) for run in runs]
    if not all({"target_kl", "target_agreement"} <= one.keys() for one in measured):
        return ""
    kl, agreement = (
        statistics.mean(one[name] for one in measured) for name in ("target_kl", "target_agreement")
    )
    return f" (KL {kl:.3f}, agreement {agreement:.3f})"
