"""`draftsmith export`: a trained drafter becomes a plain transformers directory.

Heads, which are nothing without their target, become a directory of their own form.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from decode.models import load_heads, load_lm, save_heads, trimmed_head
from distill.config import command
from distill.drafter_folder import DESCRIPTION, check_target, find_drafter, read_description
from distill.errors import UserError
from distill.exporters.gate import check_heads, check_reload, padded_mass
from distill.exporters.model_card import model_card
from distill.exporters.vocabulary import match_vocabulary
from distill.families import FAMILIES
from distill.prompts import PromptSettings, StandardLibraryPrompts
from distill.run_folder import write_json, write_text
from distill.target import Dtype, LoadedTarget, TargetSettings, first_line


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a drafter as `assistant_model=` of transformers, vLLM and SGLang load it.

    One whose head is trimmed is for `decode.models.load_lm`, and heads are for `load_drafter`.

    Attributes:
        checkpoint: a run of `draftsmith train`, or a model folder.
        target: what it drafts for.
        prompts: real prompts for the comparison of logits.
        output: the directory to write; it appears whole or not at all.
        dtype: of the stored weights; auto keeps that of training.
        draft_length: tokens per draft that the card recommends.
    """

    checkpoint: Path
    target: TargetSettings = field(default_factory=TargetSettings)
    prompts: PromptSettings = field(
        default_factory=lambda: StandardLibraryPrompts(split="distill", limit=8)
    )
    output: Path
    dtype: Dtype = Dtype.auto
    draft_length: int = 5

    def run(self) -> Path:
        """Convert, write, read back, compare, and only then put in place.

        Raises:
            UserError: the checkpoint is unfinished or of another target, the output exists, or the
                written model is not the trained one.
        """
        source = find_drafter(self.checkpoint)
        if (self.output / "config.json").exists():
            raise UserError("there is a model already", self.output, "choose another output folder")
        description = read_description(source)
        family = description.get("family", "lm")
        if family not in FAMILIES:
            raise UserError(f"drafters of the family {family!r} are not known here", source)
        target = self.target.load(may_have_encoder=not FAMILIES[family].is_lm)
        check_target(description, source, target)
        export = self._language_model if FAMILIES[family].is_lm else self._heads
        checked = export(source, target, description)
        print(f"exported to {self.output}: {checked}")
        return self.output

    def _language_model(
        self, source: str, target: LoadedTarget, description: dict[str, Any]
    ) -> str:
        model = _load(source, self.dtype).to(target.model.device)
        target_size = target.model.config.get_text_config().vocab_size
        prompts = [prompt.ids for prompt in self.prompts.load(target.tokenizer)]
        head = trimmed_head(model)
        if head is None:  # serving engines do not load the other kind anyway
            match_vocabulary(model, target_size)
            mass, wins = padded_mass(model, target.tokenizer, prompts)
            if wins or mass > 0.01:
                raise UserError(
                    f"ids that the tokenizer does not have take up to {mass:.1%} of the drafter's "
                    "probability",
                    source,
                    "train it on more of the target's output first",
                )
        self._write(
            target,
            description
            | {"family": "lm"}
            | self._facts(target, model.parameters(), None if head is None else head.out_features),
            save=model.save_pretrained,
            check=lambda folder: check_reload(model, folder, prompts),
        )
        return f"logits equal after reload on {len(prompts)} prompts"

    def _heads(self, source: str, target: LoadedTarget, description: dict[str, Any]) -> str:
        dtype = torch.float32 if self.dtype is Dtype.auto else getattr(torch, self.dtype.value)
        try:
            heads = load_heads(source, target.model, dtype=dtype)
        except ValueError as error:
            raise UserError(first_line(error), source) from error
        self._write(
            target,
            description | self._facts(target, heads.parameters()),
            save=lambda folder: save_heads(heads, folder),
            check=lambda folder: check_heads(heads, folder, target.model),
        )
        return "weights equal after reload"

    def _facts(
        self,
        target: LoadedTarget,
        parameters: Iterable[torch.nn.Parameter],
        num_kept_ids: int | None = None,
    ) -> dict[str, Any]:
        """What the description says of an exported drafter."""
        parameters = list(parameters)
        return {
            "target": target.path,
            "target_fingerprint": target.fingerprint,
            "export": {
                "name": self.output.name,
                "vocab_size": target.vocab_size,
                "parameters": sum(parameter.numel() for parameter in parameters),
                "dtype": str(parameters[0].dtype).removeprefix("torch."),
                "draft_length": self.draft_length,
                **({} if num_kept_ids is None else {"num_kept_ids": num_kept_ids}),
            },
        }

    def _write(
        self,
        target: LoadedTarget,
        description: dict[str, Any],
        *,
        save: Callable[[Path], Any],
        check: Callable[[Path], Any],
    ) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        partial = self.output.with_name(f".{self.output.name}.{os.getpid()}.partial")
        try:
            save(partial)
            target.tokenizer.save_pretrained(partial)
            write_json(partial / DESCRIPTION, description)
            write_card(partial, measured_in_training(description))
            check(partial)
            # hydra has put its record of the run into the output folder before us
            self.output.mkdir(exist_ok=True)
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(self.output / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_card(folder: Path, measured: str) -> None:
    """Write (again) the model card of an exported drafter, with the given figures."""
    write_text(folder / "README.md", model_card(read_description(folder), measured))


def measured_in_training(description: Mapping[str, Any]) -> str:
    """The figures that training left in the drafter's description, as a Markdown passage."""
    measured = description.get("measured") or {}
    if "tau" not in measured:
        return "Nothing was measured yet: `draftsmith evaluate` does."
    return (
        f"On {measured['num_prompts']} held-out prompts, at the end of training, with drafts of "
        f"{measured['draft_length']} tokens: τ = {measured['tau']:.3f} tokens per target pass, "
        f"α = {measured['alpha']:.3f} of the tried draft tokens accepted."
    )


def _load(folder: str, dtype: Dtype) -> PreTrainedModel:
    try:
        name = dtype.value
        model = load_lm(folder, dtype=name if name == "auto" else getattr(torch, name))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"cannot load the drafter: {first_line(error)}", folder) from error
    with torch.no_grad():
        return model.eval()


main = command("export", Export)

if __name__ == "__main__":
    main()
