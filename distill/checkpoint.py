"""Checkpoints of a training run: written whole or not at all, read back exactly.

A checkpoint is a folder ``step-00000100``: ``model.safetensors`` (what training changes),
``optimizer.safetensors``, and ``state.json`` with the step, the run's figures and the hashes of the
other two. It is written under another name and renamed when everything is on the disk.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.errors import UserError

PARTIAL = ".partial"
STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: its folder.
        step: optimizer steps done.
    """

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """What was given to `save` as the state.

        Raises:
            UserError: a file is missing or not what was written.
        """
        try:
            stored = json.loads((self.path / STATE).read_text())
            hashes: dict[str, str] = stored["sha256"]
            for name, written in hashes.items():
                with (self.path / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != written:
                        raise ValueError(f"{name} is not what was written")
            return dict(stored["state"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the checkpoint is damaged: {error}",
                self.path,
                "remove this folder; the run then goes on from the checkpoint before it",
            ) from error

    def restore_model(self, model: nn.Module) -> None:
        """Put the stored weights into `model`, in place."""
        stored = load_file(self.path / "model.safetensors")
        parameters = trainable(model)
        if stored.keys() != parameters.keys():
            odd = sorted(stored.keys() ^ parameters.keys())[0]
            raise UserError(
                f"the checkpoint is of another drafter ({odd!r} is in one of the two only)",
                self.path,
                "choose another output folder",
            )
        for name, parameter in parameters.items():
            parameter.data.copy_(stored[name])

    def restore_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Put the stored moments into `optimizer`."""
        names = {parameter: name for name, parameter in trainable(model).items()}
        state = optimizer.state_dict()  # its parameters are numbered
        numbered = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = {names[parameter]: number for number, parameter in enumerate(numbered)}
        state["state"] = {}
        for key, tensor in load_file(self.path / "optimizer.safetensors").items():
            name, _, field = key.rpartition("/")
            state["state"].setdefault(numbers[name], {})[field] = tensor
        optimizer.load_state_dict(state)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name; shared weights once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]
) -> Checkpoint:
    """Write the checkpoint of `step` into `folder`.

    Args:
        folder: of all checkpoints of the run.
        step: optimizer steps done.
        model: its trainable parameters are stored.
        optimizer: over these.
        state: plain data.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints stand.
    """
    final = folder / f"step-{step:08}"
    partial = folder / f"{final.name}{PARTIAL}"
    parameters = trainable(model)
    moments = {
        f"{name}/{field}": value
        for name, parameter in parameters.items()
        for field, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        hashes = {
            "model.safetensors": _write(partial / "model.safetensors", weights),
            "optimizer.safetensors": _write(partial / "optimizer.safetensors", moments),
        }
        with (partial / STATE).open("w") as file:
            json.dump({"state": state, "sha256": hashes}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot write a checkpoint: {error}",
            final,
            "make room or choose another output folder, and run the same command again to go on",
        ) from error
    return Checkpoint(final, step)


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in `folder`, by step; half-written ones bear another name."""
    found = [
        Checkpoint(path, int(path.name.removeprefix("step-")))
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest(folder: Path) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one."""
    found = checkpoints(folder)
    return found[-1] if found else None


def prune(folder: Path, *, keep: int, best: int | None) -> None:
    """Remove all but the last `keep` checkpoints and the one of step `best`."""
    found = checkpoints(folder)
    for checkpoint in found[: max(len(found) - keep, 0)]:
        if checkpoint.step != best:
            shutil.rmtree(checkpoint.path)
    for partial in folder.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file through to the disk; returns its sha256."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    fsync(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
