"""Heads on disk: safetensors, and a config.json that says what they are."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from decode.models.blockwise import Blockwise
from decode.models.heads import Heads
from decode.models.hydra import Hydra
from decode.models.medusa import Medusa

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SETTINGS: dict[str, type[Any]] = {kind.family: kind for kind in (Blockwise, Hydra, Medusa)}


def save_heads(heads: Heads, folder: str | Path) -> None:
    """Write `heads` into `folder`; the weights come first, the config makes it whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in heads.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "family": heads.settings.family,
        "settings": asdict(heads.settings),
        "target": {"hidden_size": heads.ends.hidden_size, "vocab_size": heads.ends.vocab_size},
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_heads(
    folder: str | Path, target: PreTrainedModel, *, dtype: torch.dtype | None = None
) -> Heads:
    """The heads stored in `folder`, on `target`, by default in its dtype.

    Raises:
        ValueError: the folder is half-written or damaged, or the heads are of a target of other
            sizes; the message says which.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        settings = SETTINGS[config["family"]](**config["settings"])
        expected = config["target"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is half-written: it has no {CONFIG}") from error
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe heads: {error!r}") from error
    heads: Heads = settings.build(target)
    sizes = {"hidden_size": heads.ends.hidden_size, "vocab_size": heads.ends.vocab_size}
    if expected != sizes:
        raise ValueError(
            f"the heads in {folder} are of a target with {_named(expected)}, this one has "
            f"{_named(sizes)}"
        )
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} is missing or half-written: {error}") from error
    try:
        heads.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not hold these heads: {error}") from error
    return heads.to(dtype or target.dtype).eval()


@dataclass(frozen=True, kw_only=True)
class HeadsCheckpoint:
    """Heads that were trained before, to be trained on.

    Attributes:
        path: their folder; `draftsmith train` takes that of their run too.
    """

    path: str

    def build(self, target: PreTrainedModel) -> Heads:
        """Load them in float32.

        Raises:
            ValueError: see `load_heads`.
        """
        return load_heads(self.path, target, dtype=torch.float32)


def _named(sizes: dict[str, int]) -> str:
    return " and ".join(f"{name}={size}" for name, size in sizes.items())
