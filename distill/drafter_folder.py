"""A trained drafter on disk: writing and finding it, and whether it belongs to a target."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decode import tokenizer_hash
from distill.checkpoint import fsync
from distill.errors import UserError
from distill.families import FAMILIES, family_of
from distill.run_folder import write_json
from distill.target import LoadedTarget, fingerprint

DESCRIPTION = "draftsmith.json"


def find_drafter(path: Path | str) -> str:
    """The model folder (or hub id) that `path` means: a run of `draftsmith train` holds it inside.

    Raises:
        UserError: the folder is an unfinished run, or no model.
    """
    folder = Path(path)
    if not folder.exists():
        if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") != 1:
            raise UserError("there is no drafter here", folder, "check the path")
        return str(path)
    if (folder / "drafter" / "config.json").is_file():
        folder = folder / "drafter"
    elif (folder / "checkpoints").is_dir():
        raise UserError(
            "this training run is not finished", folder, "run the same train command again"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            "the folder holds no config.json: the checkpoint is half-written or not a model",
            folder,
            "export or train it again",
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            "the folder holds no safetensors weights: the checkpoint is half-written",
            folder,
            "export or train it again",
        )
    return str(folder)


def read_description(folder: str | Path) -> dict[str, Any]:
    """The drafter's `draftsmith.json`; empty for models that were not made here.

    Raises:
        UserError: the file is not JSON.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        description: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{DESCRIPTION} is broken: {error}", folder, "export or train the drafter again"
        ) from error
    return description


def check_target(description: dict[str, Any], folder: str | Path, target: LoadedTarget) -> None:
    """Refuse a drafter that was aligned to another target or uses another tokenizer.

    Raises:
        UserError: naming both targets.
    """
    trained_for = description.get("target_fingerprint", target.fingerprint)
    if trained_for != target.fingerprint:
        raise UserError(
            f"the drafter was aligned to the target {description.get('target')} "
            f"({trained_for}), not to {target.path} ({target.fingerprint})",
            folder,
            "evaluate it against its own target, or train one for this target",
        )
    expected = description.get("tokenizer_hash")
    if expected is not None and expected != tokenizer_hash(target.tokenizer):
        raise UserError(
            "the drafter was trained with another tokenizer than the target's",
            folder,
            "train a drafter with this target's tokenizer",
        )


def weights_hash(folder: Path) -> str | None:
    """Hash of a drafter's weights, so that others in the same folder are noticed; None on a hub."""
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16] if files else None


def write_drafter(
    folder: Path,
    drafter: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    description: dict[str, Any],
    target: PreTrainedModel | None = None,
) -> None:
    """Write the drafter with tokenizer and draftsmith.json: the folder appears whole or not at all.

    A `target` that was trained with it is written into the folder too: it is the one it belongs to.

    Raises:
        UserError: it cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        FAMILIES[family_of(drafter)].save(drafter, partial)
        if target is not None:
            target.save_pretrained(partial / "target")
            tokenizer.save_pretrained(partial / "target")
            description = description | {
                "trained_from": description["target"],
                "target": str(folder / "target"),
                "target_fingerprint": fingerprint(target),
            }
        tokenizer.save_pretrained(partial)
        write_json(partial / DESCRIPTION, description)
        for path in partial.rglob("*"):
            fsync(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        fsync(folder.parent)
    except OSError as error:
        raise UserError(
            f"cannot write the drafter: {error}",
            folder,
            "make room and run the same command again; the training itself is kept",
        ) from error
