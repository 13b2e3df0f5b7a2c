"""The trainable models of drafters."""

from decode.models.blockwise import Blockwise
from decode.models.heads import (
    Heads,
    TargetEnds,
    last_layer,
    measured_scale,
    on_a_few_tokens,
)
from decode.models.heads_folder import HeadsCheckpoint, load_heads, save_heads
from decode.models.hydra import Hydra
from decode.models.lm import CheckpointLM, ScratchLM, TargetLayersLM
from decode.models.medusa import Medusa
from decode.models.pruned import Pruned, PrunedLM
from decode.models.trimmed import TrimmedHead, load_lm, trim, trimmed_head

__all__ = [
    "Blockwise",
    "CheckpointLM",
    "Heads",
    "HeadsCheckpoint",
    "Hydra",
    "Medusa",
    "Pruned",
    "PrunedLM",
    "ScratchLM",
    "TargetEnds",
    "TargetLayersLM",
    "TrimmedHead",
    "last_layer",
    "load_heads",
    "load_lm",
    "measured_scale",
    "on_a_few_tokens",
    "save_heads",
    "trim",
    "trimmed_head",
]
