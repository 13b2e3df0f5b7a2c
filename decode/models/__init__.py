"""The trainable models of drafters."""

from decode.models.lm import CheckpointLM, ScratchLM, TargetLayersLM

__all__ = ["CheckpointLM", "ScratchLM", "TargetLayersLM"]
