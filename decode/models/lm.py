"""Small causal language models with the target's vocabulary: where an independent drafter begins.

Settings with ``build(target_model) -> PreTrainedModel``; what comes out is float32, has the
target's ids for the special tokens, and is a plain transformers model.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from decode.models.trimmed import load_lm

HEAD_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class ScratchLM:
    """A Llama from scratch.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width.
        num_heads: attention heads; by default one per 64 of width.
        intermediate_size: of the MLP; by default three times the width.
        seed: of the initial weights.
    """

    num_layers: int = 2
    hidden_size: int = 128
    num_heads: int | None = None
    intermediate_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse shapes that no model has."""
        if min(self.num_layers, self.hidden_size, self._num_heads) < 1:
            raise ValueError("num_layers, hidden_size and num_heads must be >= 1")
        if self.hidden_size % (2 * self._num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} does not split into num_heads={self._num_heads} "
                "heads of even size"
            )

    @property
    def _num_heads(self) -> int:
        return self.num_heads or max(self.hidden_size // HEAD_SIZE, 1)

    def build(self, target: PreTrainedModel) -> PreTrainedModel:
        """The model, with embeddings tied and the target's vocabulary and context."""
        theirs = target.config.get_text_config()
        config = LlamaConfig(
            vocab_size=theirs.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size or 3 * self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self._num_heads,
            max_position_embeddings=getattr(theirs, "max_position_embeddings", None) or 2048,
            bos_token_id=theirs.bos_token_id,
            eos_token_id=theirs.eos_token_id,
            pad_token_id=theirs.pad_token_id,
            tie_word_embeddings=True,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return LlamaForCausalLM(config).float()


@dataclass(frozen=True, kw_only=True)
class TargetLayersLM:
    """The target with fewer layers: evenly chosen ones, first and last among them, are copied.

    Works for decoders that keep their layers in one list (Llama, Qwen, Gemma, Mistral, GPT-2, ...).

    Attributes:
        num_layers: how many layers are kept.
    """

    num_layers: int = 2

    def __post_init__(self) -> None:
        """Refuse a model without layers."""
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be >= 1, got {self.num_layers}")

    def build(self, target: PreTrainedModel) -> PreTrainedModel:
        """The shortened copy.

        Raises:
            ValueError: the target has fewer layers, or keeps them elsewhere than in one list.
        """
        total = target.config.get_text_config().num_hidden_layers
        if self.num_layers > total:
            raise ValueError(f"the target has {total} layers, num_layers={self.num_layers} of them")
        prefix = _layer_list(target, total)
        chosen = evenly_chosen(total, self.num_layers)

        config = copy.deepcopy(target.config)
        text = config.get_text_config()
        for name, value in text.to_dict().items():
            if isinstance(value, list) and len(value) == total:  # layer_types and its like
                setattr(text, name, [value[layer] for layer in chosen])
        text.num_hidden_layers = self.num_layers
        config.name_or_path = ""
        model = type(target)(config).float()

        weights = {}
        for name, weight in target.state_dict().items():
            if not name.startswith(prefix):
                weights[name] = weight
                continue
            layer, _, rest = name.removeprefix(prefix).partition(".")
            for place, source in enumerate(chosen):
                if source == int(layer):
                    weights[f"{prefix}{place}.{rest}"] = weight
        model.load_state_dict(weights)
        return model


@dataclass(frozen=True, kw_only=True)
class CheckpointLM:
    """Any causal LM with the target's tokenizer.

    Attributes:
        path: a local folder or a hub id.
        revision: of a hub id.
    """

    path: str
    revision: str | None = None

    def build(self, target: PreTrainedModel) -> PreTrainedModel:
        """Load it; the vocabularies may be padded to different sizes.

        Raises:
            ValueError: it cannot be read as a causal LM; the message says why.
        """
        try:
            return load_lm(self.path, revision=self.revision, dtype=torch.float32)
        except Exception as error:  # transformers and safetensors raise many kinds here
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"cannot load a drafter from {self.path}: {reason}") from error


def evenly_chosen(total: int, count: int) -> list[int]:
    """Which `count` of `total` layers are kept: first and last, and evenly between them."""
    last = max(count - 1, 1)
    return [round(place * (total - 1) / last) for place in range(count)]


def _layer_list(target: PreTrainedModel, total: int) -> str:
    """Name, with its dot, of the module list that holds the target's layers."""
    names = [
        name
        for name, module in target.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    # A list of as many experts or heads may lie inside a layer: the outermost one is meant.
    names.sort(key=lambda name: name.count("."))
    if not names:
        raise ValueError(
            f"{type(target).__name__} keeps its {total} layers in no one list; "
            "use a drafter from scratch or from a checkpoint"
        )
    return f"{names[0]}."
