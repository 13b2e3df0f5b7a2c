"""How many tokens of a suffix draft will be accepted, by a small network trained by replay.

Hybrid Verified Decoding (2026): what a draft looks like before it is verified tells more of its
fate than its score alone.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from decode.suffix import SuffixDraft

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FEATURES = (
    "log tokens",
    "log score",
    "score per token",
    "log match length",
    "first probability",
    "last probability",
    "of this request",
    "log context length",
)
Array = NDArray[np.float32]


def features(draft: SuffixDraft, length: int) -> list[float]:
    """What the gate sees of a draft with tokens, behind a context of `length`: `FEATURES`."""
    size = len(draft.token_ids)
    return [
        math.log1p(size),
        math.log1p(draft.score),
        draft.score / size,
        math.log1p(draft.match_len),
        draft.probs[0],
        draft.probs[-1],
        float(draft.own),
        math.log1p(length),
    ]


@dataclass(frozen=True)
class Gate:
    """Layers of weights [out, in] and biases [out], with ReLUs between them.

    The first takes the features less `mean`, over `scale` ([features] each); the last gives one
    number, tokens.
    """

    mean: Array
    scale: Array
    layers: tuple[tuple[Array, Array], ...]

    def expected(self, draft: SuffixDraft, length: int) -> float:
        """Accepted tokens to expect of a draft behind a context of `length` tokens."""
        if not draft.token_ids:
            return 0.0
        state = (np.array(features(draft, length), dtype=np.float32) - self.mean) / self.scale
        for index, (weight, bias) in enumerate(self.layers):
            state = weight @ (np.maximum(state, 0) if index else state) + bias
        return min(max(float(state[0]), 0.0), float(len(draft.token_ids)))


def save_gate(gate: Gate, folder: str | Path) -> None:
    """Write a gate into `folder`; the weights come first, the config makes it whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"mean": gate.mean, "scale": gate.scale}
    for index, (weight, bias) in enumerate(gate.layers):
        arrays |= {f"{index}.weight": weight, f"{index}.bias": bias}
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / WEIGHTS
    )
    config = {"features": FEATURES, "layers": len(gate.layers)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_gate(folder: str | Path) -> Gate:
    """The gate stored in `folder`.

    Raises:
        ValueError: there is none, it is damaged, or it was trained on other features.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        seen, count = tuple(config["features"]), int(config["layers"])
        arrays = load_file(folder / WEIGHTS)
        layers = tuple((arrays[f"{i}.weight"], arrays[f"{i}.bias"]) for i in range(count))
        gate = Gate(arrays["mean"], arrays["scale"], layers)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no gate ({error}); scripts/train_gate.py trains one"
        ) from error
    if seen != FEATURES:
        raise ValueError(
            f"the gate in {folder} was trained on other features ({', '.join(seen)}); "
            "train it again with scripts/train_gate.py"
        )
    return gate
