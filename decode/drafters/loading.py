"""A checkpoint folder becomes a drafter."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from decode.drafters.drafting import Chains, Drafting
from decode.int8.linear import is_int8, quantize_int8
from decode.models.heads_folder import SETTINGS as HEADS
from decode.models.heads_folder import load_heads
from decode.models.trimmed import load_lm
from decode.protocols import Drafter
from decode.target import Target
from decode.tokenizers import check_tokenizers


def load_drafter(
    folder: str | Path,
    *,
    target: Target,
    draft: int | Drafting,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Drafter:
    """The drafter stored in `folder`, by the family that its `draftsmith.json` names.

    A folder (or hub id) without that file is a plain transformers causal LM; beside an
    encoder-decoder target it may be an encoder-decoder model.

    Args:
        folder: what `draftsmith train` or `draftsmith export` wrote, or any causal LM.
        target: what it drafts for; the drafter takes its dtype and device, and a causal LM int8
            too, where it can.
        draft: tokens per draft, or how to draft.
        tokenizer: the target's; the drafter's own must agree with it.

    Raises:
        ValueError: unknown family, unreadable checkpoint, or another tokenizer; the message names
            the folder and the difference.
    """
    card = Path(folder) / "draftsmith.json"
    family = "lm"
    if card.is_file():
        try:
            family = json.loads(card.read_text())["family"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{card} is not a drafter's description: {error}") from error
    if family not in FAMILIES:
        raise ValueError(
            f"{card} names the family {family!r}; this version knows {', '.join(sorted(FAMILIES))}"
        )
    drafting = Chains(length=draft) if isinstance(draft, int) else draft
    return FAMILIES[family](str(folder), target, drafting, tokenizer)


def _load_lm(
    folder: str, target: Target, drafting: Drafting, tokenizer: PreTrainedTokenizerBase | None
) -> Drafter:
    try:
        if tokenizer is not None:
            check_tokenizers(tokenizer, AutoTokenizer.from_pretrained(folder))
        is_encoder_decoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
        load = AutoModelForSeq2SeqLM.from_pretrained if is_encoder_decoder else load_lm
        model = load(folder, dtype=target.model.dtype)
    except Exception as error:
        # transformers and safetensors raise many kinds here; the folder is what the user can mend.
        raise ValueError(f"cannot load a drafter from {folder}: {error}") from error
    if is_int8(target.model):
        with suppress(ValueError):  # an architecture that int8 is not for drafts in float32
            quantize_int8(model)
    return drafting.build(model.to(target.device), target)


def _load_heads(
    folder: str, target: Target, drafting: Drafting, tokenizer: PreTrainedTokenizerBase | None
) -> Drafter:
    if is_int8(target.model):
        raise ValueError("heads take the target's own weights, which are in int8 here")
    # A tokenizer of their own they have none: their ids are the target's.
    return drafting.build(load_heads(folder, target.model), target)


Loader = Callable[[str, Target, Drafting, PreTrainedTokenizerBase | None], Drafter]
FAMILIES: dict[str, Loader] = {"lm": _load_lm, **dict.fromkeys(HEADS, _load_heads)}
