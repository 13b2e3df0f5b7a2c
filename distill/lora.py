"""Low-rank adapters: of a drafter, or of the target that heads stand on."""

import warnings
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from distill.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters instead of all weights (Hu et al. 2021), merged when training is done.

    Attributes:
        rank: of the adapters.
        alpha: their scale is alpha / rank.
        dropout: on their input.
        target_modules: names of layers, or "all-linear".
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"

    def wrap(self, model: PreTrainedModel) -> Any:
        """A peft model over `model`, whose layers are replaced in place."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise UserError(
                "LoRA needs peft, which is not installed", None, "pip install peft, or lora=null"
            ) from error
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
        )
        with warnings.catch_warnings():  # peft uses a name that transformers deprecates
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, config)
