"""Families of drafters: what training must know of each. Files name a family, never a class."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from decode.models import (
    Blockwise,
    Heads,
    HeadsCheckpoint,
    Hydra,
    Medusa,
    last_layer,
    save_heads,
)
from distill.alignment import Alignment
from distill.alignment.heads import HeadsAlignment
from distill.alignment.lm import LiveTarget, LMAlignment


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        is_lm: its drafters are causal LMs on their own, with a vocabulary and a context.
        layers: of the target whose states they read.
        vocab_size: how many ids they have.
        alignment: what they feed the objective, given the live target, and how many tokens of a
            language model are judged together.
        save: write a trained one.
    """

    is_lm: bool
    layers: Callable[[PreTrainedModel], tuple[int, ...]]
    vocab_size: Callable[[nn.Module], int]
    alignment: Callable[[nn.Module, LiveTarget, int], Alignment]
    save: Callable[[nn.Module, Path], None]


def makes_heads(settings: object) -> bool:
    """Whether what these settings build stands on the target's states."""
    return isinstance(settings, Blockwise | HeadsCheckpoint | Hydra | Medusa)


def family_of(drafter: nn.Module) -> str:
    """The name of the drafter's family."""
    return str(drafter.settings.family) if isinstance(drafter, Heads) else "lm"


def _last_layer(target: PreTrainedModel) -> tuple[int, ...]:
    return (last_layer(target),)


def _heads_vocab_size(drafter: nn.Module) -> int:
    assert isinstance(drafter, Heads)
    return drafter.ends.vocab_size


def _lm_vocab_size(drafter: nn.Module) -> int:
    assert isinstance(drafter, PreTrainedModel)
    return int(drafter.config.get_text_config().vocab_size)


def _align_heads(drafter: nn.Module, live: LiveTarget, block: int) -> Alignment:
    (layer,) = live.layers
    return HeadsAlignment(live, layer)


def _align_lm(drafter: nn.Module, live: LiveTarget, block: int) -> Alignment:
    assert isinstance(drafter, PreTrainedModel)
    return LMAlignment(drafter, block)


def _save_heads(drafter: nn.Module, folder: Path) -> None:
    assert isinstance(drafter, Heads)
    save_heads(drafter, folder)


def _save_lm(drafter: nn.Module, folder: Path) -> None:
    assert isinstance(drafter, PreTrainedModel)
    drafter.save_pretrained(folder)


LM = Family(
    is_lm=True,
    layers=lambda target: (),
    vocab_size=_lm_vocab_size,
    alignment=_align_lm,
    save=_save_lm,
)
HEADS = Family(
    is_lm=False,
    layers=_last_layer,
    vocab_size=_heads_vocab_size,
    alignment=_align_heads,
    save=_save_heads,
)
FAMILIES = {"lm": LM, "medusa": HEADS, "hydra": HEADS, "blockwise": HEADS}
