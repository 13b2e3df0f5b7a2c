"""Tiny random encoder-decoder models, and what transformers makes of a source with them."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    BlenderbotSmallConfig,
    BlenderbotSmallForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PLBartConfig,
    PLBartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB_SIZE = 97
CONTEXT = 64
CLASSES = {
    "bart": (BartConfig, BartForConditionalGeneration),
    "blenderbot": (BlenderbotConfig, BlenderbotForConditionalGeneration),
    "blenderbot-small": (BlenderbotSmallConfig, BlenderbotSmallForConditionalGeneration),
    "marian": (MarianConfig, MarianMTModel),
    "mbart": (MBartConfig, MBartForConditionalGeneration),
    "mt5": (MT5Config, MT5ForConditionalGeneration),
    "pegasus": (PegasusConfig, PegasusForConditionalGeneration),
    "plbart": (PLBartConfig, PLBartForConditionalGeneration),
    "t5": (T5Config, T5ForConditionalGeneration),
}
TOKENS = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
BART_SHAPE = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": CONTEXT,
    "init_std": 0.5,
    "tie_word_embeddings": False,
}
T5_SHAPE = {  # few buckets, so that most distances share theirs with others
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 20,
}
SCALES = {
    "out_proj.weight": 0.05,
    "fc2.weight": 0.1,
    "embed_positions.weight": 0.3,
    "EncDecAttention.o.weight": 0.3,
    "shared.weight": 0.1,
}


@pytest.fixture(scope="session")
def tiny_seq2seq() -> Callable[..., PreTrainedModel]:
    """`tiny_seq2seq(family, seed=2, **config)`: a random model whose greedy output does not loop.

    It hangs on the source, on positions and on all tokens before: attention and feed-forward parts
    as large as such weights make them would leave nothing of the tokens.
    """

    @cache
    def build(family: str, seed: int = 2, **changes: object) -> PreTrainedModel:
        make_config, make_model = CLASSES[family]
        is_t5 = family.endswith("t5")
        shape = TOKENS | (T5_SHAPE if is_t5 else BART_SHAPE) | changes
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make_model(make_config(**shape))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn(parameter.shape), alpha=0.1)
                    elif is_t5:
                        parameter.normal_(std=9.0 if "relative" in name else 0.5)
                    for part, scale in SCALES.items():
                        if name.endswith(part):
                            parameter.mul_(scale)
        for name in ("encoder_no_repeat_ngram_size", "min_length", "num_beams", "max_length"):
            setattr(model.generation_config, name, None)  # Blenderbot's classes bring them along
        return model.eval()

    return build
