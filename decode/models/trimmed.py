"""A language model whose head covers some of its ids: the embedding reads all, few are drafted.

The head's product is most of a small drafter's step where vocabularies are large, and most ids are
never written (FR-Spec, Zhao et al. 2025, 2502.14856). What the head does not cover has probability
zero, which lossless rules are indifferent to. On disk such a model is a transformers folder whose
config.json names the number of kept ids; transformers itself refuses its head as one of another
size.

Shape legend: D hidden size, V vocabulary, K kept ids.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

LLAMA_LIKE = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
NUM_KEPT = "num_kept_ids"  # in config.json


class TrimmedHead(nn.Linear):
    """A language-model head over K of V ids; the logits of all others are -inf.

    Attributes:
        ids: [K] the kept ids, ascending.
        vocab_size: V.
    """

    ids: Tensor

    def __init__(self, hidden_size: int, num_kept: int, vocab_size: int):
        """A head without weights and ids yet."""
        super().__init__(hidden_size, num_kept, bias=False)
        self.vocab_size = vocab_size
        self.register_buffer("ids", torch.arange(num_kept))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] states to [..., V] logits."""
        return self.spread(super().forward(hidden))

    def spread(self, logits: Tensor) -> Tensor:
        """[..., K] logits of the kept ids to [..., V]."""
        full = logits.new_full((*logits.shape[:-1], self.vocab_size), -torch.inf)
        return full.index_copy_(-1, self.ids, logits)


def trimmed_head(model: PreTrainedModel) -> TrimmedHead | None:
    """The head of `model`, where it covers only some of the ids."""
    head = model.get_output_embeddings()
    return head if isinstance(head, TrimmedHead) else None


def trim(model: PreTrainedModel, ids: Sequence[int]) -> PreTrainedModel:
    """A copy of `model` whose head covers `ids` only; of these it says what the model says.

    Embeddings that the head was tied to stay whole, and are its own no longer.

    Raises:
        ValueError: it is no Llama-like model, is trimmed already, or does not have these ids.
    """
    name = type(model).__name__
    if type(model) not in LLAMA_LIKE:
        raise ValueError(
            f"the head of {name} cannot be trimmed; that of a Llama, Mistral, Qwen2 or Qwen3 can, "
            "and that of a drafter from scratch"
        )
    if trimmed_head(model) is not None:
        raise ValueError(f"the head of this {name} covers only some ids already; keep them")
    size = model.config.vocab_size
    kept = torch.tensor(sorted(set(ids)))
    if len(kept) == 0 or kept[0] < 0 or kept[-1] >= size:
        raise ValueError(f"the kept ids must be some of the model's {size:,}")
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    setattr(config, NUM_KEPT, len(kept))
    weights = model.state_dict()
    weights["lm_head.weight"] = weights["lm_head.weight"][kept]
    weights["lm_head.ids"] = kept
    copied = _without_weights(config).to(model.dtype)
    copied.load_state_dict(weights)
    return copied.train(model.training)


def load_lm(
    path: str | Path, *, revision: str | None = None, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """A causal LM from a folder or a hub id, its head trimmed or not.

    Raises:
        ValueError: the folder of a trimmed one is half-written or damaged.
        Exception: whatever transformers raises of others.
    """
    config = AutoConfig.from_pretrained(path, revision=revision)
    if getattr(config, NUM_KEPT, None) is None:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype
        )
        return model
    weights: dict[str, Tensor] = {}
    try:
        for file in sorted(Path(path).glob("*.safetensors")):
            weights |= load_file(file)
        model = _without_weights(config)
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} does not hold this trimmed model: {reason}") from error
    return model.to((config.dtype or torch.float32) if dtype == "auto" else dtype).eval()


def _without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config, its head trimmed as that says, weights and ids still to come."""
    with torch.random.fork_rng():  # transformers draws weights
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        head = TrimmedHead(config.hidden_size, getattr(config, NUM_KEPT), config.vocab_size)
    model.set_output_embeddings(head)
    return model
