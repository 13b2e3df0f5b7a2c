"""Nothing is exported before it was read back and found to be the same model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from decode.models import Heads, load_heads, load_lm, trimmed_head
from distill.errors import UserError


@torch.inference_mode()
def check_reload(model: PreTrainedModel, folder: Path, prompts: Sequence[Sequence[int]]) -> float:
    """Load `folder` as a user would and compare its logits with `model`'s on real prompts.

    Returns:
        the largest absolute difference, which is zero for the same weights in the same dtype.

    Raises:
        UserError: tensors are missing or surplus, or the logits differ.
    """
    if trimmed_head(model) is not None:
        reloaded = load_lm(folder, dtype=model.dtype)  # refuses missing and surplus tensors
    else:
        reloaded, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.dtype, output_loading_info=True
        )
        wrong = {name: keys for name, keys in info.items() if keys}
        if wrong:
            raise UserError(
                f"the exported checkpoint does not load cleanly: {wrong}", folder, "this is a bug"
            )
    reloaded = reloaded.to(model.device).eval()
    worst = 0.0
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        ours, theirs = model(input_ids=ids).logits, reloaded(input_ids=ids).logits
        difference = (ours - theirs).masked_fill(ours == theirs, 0)  # -inf is equal to itself
        worst = max(worst, float(difference.abs().max()))
    if worst > 0:
        raise UserError(
            f"the exported checkpoint's logits differ by {worst:.2e}", folder, "this is a bug"
        )
    return worst


def check_heads(heads: Heads, folder: Path, target: PreTrainedModel) -> None:
    """Load `folder` as a user would: the weights must be the same to the bit.

    Raises:
        UserError: they are not.
    """
    reloaded = load_heads(folder, target, dtype=next(heads.parameters()).dtype).state_dict()
    for name, tensor in heads.state_dict().items():
        if not torch.equal(reloaded[name], tensor):
            raise UserError(f"the exported heads differ in {name}", folder, "this is a bug")


@torch.inference_mode()
def padded_mass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
) -> tuple[float, bool]:
    """Probability of ids that the tokenizer does not have: the largest seen, and whether any is
    ever the argmax."""
    known = len(tokenizer)
    worst, wins = 0.0, False
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        logits = model(input_ids=ids).logits[0].float()
        if logits.shape[-1] > known:
            worst = max(worst, float(logits.softmax(-1)[:, known:].sum(-1).max()))
            wins = wins or bool((logits.argmax(-1) >= known).any())
    return worst, wins
