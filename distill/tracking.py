"""Where the figures of a run go: always to metrics.jsonl, and to a tracker if one is chosen."""

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distill.errors import UserError
from distill.run_folder import write_text


class TrackerRun(Protocol):
    """A tracker at work."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the figures of a step."""
        ...

    def finish(self) -> None:
        """Everything is logged."""
        ...


class Tracker(Protocol):
    """The choice of a tracker."""

    def start(self, run_folder: Path, config: Mapping[str, Any]) -> TrackerRun:
        """Begin a run, or go on with the one of this folder."""
        ...


class MetricsFile:
    """metrics.jsonl: one JSON object per line, each with its step."""

    def __init__(self, path: Path, *, resumed_step: int | None = None):
        """Append to `path`; what lies beyond the step that the run goes on from is cut off."""
        kept = []
        if resumed_step is not None and path.is_file():
            for line in path.read_text().splitlines():
                try:
                    step = json.loads(line)["step"]
                except (json.JSONDecodeError, KeyError):
                    break  # the run was killed while it wrote this line
                if step <= resumed_step:
                    kept.append(f"{line}\n")
        write_text(path, "".join(kept))
        self._path = path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line; it is in the file when this returns."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def finish(self) -> None:
        """Nothing is left to write."""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True, kw_only=True)
class NoTracker:
    """metrics.jsonl alone."""

    def start(self, run_folder: Path, config: Mapping[str, Any]) -> TrackerRun:
        """A tracker that does nothing."""
        return _Nowhere()


class WandbMode(enum.Enum):
    """Where wandb keeps the run: offline needs no account (`wandb sync` sends it later)."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass(frozen=True, kw_only=True)
class WandbTracker:
    """Weights & Biases.

    Attributes:
        project: its name there.
        name: of the run; by default wandb makes one up.
        mode: offline, online or disabled.
    """

    project: str = "draftsmith"
    name: str | None = None
    mode: WandbMode = WandbMode.offline

    def start(self, run_folder: Path, config: Mapping[str, Any]) -> TrackerRun:
        """Begin the run; its files lie in `run_folder`/wandb.

        Raises:
            UserError: wandb is not installed, or refuses (no login, no network).
        """
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        try:
            run = wandb.init(
                project=self.project,
                name=self.name,
                mode=self.mode.value,
                dir=str(run_folder),
                config=dict(config),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"wandb does not start: {error}", None, "log in, or set tracker.mode=offline"
            ) from error
        return _Wandb(run)


@dataclass(frozen=True, kw_only=True)
class TensorBoardTracker:
    """TensorBoard event files in the run folder's tensorboard/."""

    def start(self, run_folder: Path, config: Mapping[str, Any]) -> TrackerRun:
        """Open the event file.

        Raises:
            UserError: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        writer = SummaryWriter(str(run_folder / "tensorboard"))
        writer.add_text("config", json.dumps(config, indent=1, default=str))
        return _TensorBoard(writer)


class _Nowhere:
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass


class _Wandb:
    def __init__(self, run: Any):
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, writer: Any):
        self._writer = writer

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def _missing(package: str) -> UserError:
    return UserError(
        f"the tracker needs {package}, which is not installed",
        None,
        f"pip install {package}, or set tracker=none",
    )
