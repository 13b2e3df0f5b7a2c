"""Where drafters begin: from scratch, from the target's layers, from a checkpoint."""

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from decode.models import CheckpointLM, ScratchLM, TargetLayersLM

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def target(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    match name:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8))
        case "gemma3":
            kinds = ["sliding_attention"] * 4 + ["full_attention"]
            config = Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=8, layer_types=kinds)
            model = Gemma3ForCausalLM(config)
        case "gpt2":
            sizes = {"n_embd": 32, "n_layer": 5, "n_head": 2, "n_positions": 96}
            ids = {"bos_token_id": 1, "eos_token_id": 2}
            model = GPT2LMHeadModel(GPT2Config(vocab_size=61, **sizes, **ids))
    return model.eval()


ALL = pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3", "gpt2"])
TOKENS = torch.arange(3, 23)[None]


@ALL
def test_all_layers_of_the_target_are_the_target(name):
    model = target(name)
    copy = TargetLayersLM(num_layers=5).build(model).eval()
    assert torch.equal(copy(TOKENS).logits, model(TOKENS).logits)


@ALL
def test_few_layers_are_the_target_with_the_others_left_out(name):
    model = target(name)
    drafter = TargetLayersLM(num_layers=3).build(model).eval()
    logits = drafter(TOKENS).logits
    # Layers 0, 2, 4 are kept: a target whose layers 1 and 3 are cut out says the same.
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == 5:
            layers = module
    model.config.num_hidden_layers = 3
    if name in {"qwen3", "gemma3"}:
        model.config.layer_types = [model.config.layer_types[layer] for layer in (0, 2, 4)]
    for place in (3, 1):
        del layers[place]
    assert torch.equal(logits, model(TOKENS, use_cache=False).logits)
    assert drafter.config.num_hidden_layers == 3


@ALL
def test_a_scratch_drafter_speaks_the_targets_tokens(name):
    model = target(name)
    drafter = ScratchLM(num_layers=1, hidden_size=32, seed=3).build(model)
    assert drafter(TOKENS).logits.shape == (1, 20, 61)
    assert drafter.config.max_position_embeddings == 96
    assert drafter.config.eos_token_id == 2
    again = ScratchLM(num_layers=1, hidden_size=32, seed=3).build(model)
    assert torch.equal(drafter.lm_head.weight, again.lm_head.weight)
    assert drafter.lm_head.weight is drafter.model.embed_tokens.weight


def test_building_leaves_the_global_draws_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    ScratchLM(hidden_size=16).build(target("llama"))
    torch.manual_seed(5)
    assert torch.rand(1) == expected


def test_a_checkpoint_is_loaded_in_float32(tmp_path):
    model = target("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    drafter = CheckpointLM(path=str(tmp_path)).build(model)
    assert drafter.dtype == torch.float32
    assert torch.equal(drafter.lm_head.weight, model.lm_head.weight.float())


def test_what_cannot_be_built_is_named(tmp_path):
    with pytest.raises(ValueError, match="has 5 layers, num_layers=6"):
        TargetLayersLM(num_layers=6).build(target("llama"))
    with pytest.raises(ValueError, match="does not split into num_heads=3"):
        ScratchLM(hidden_size=128, num_heads=3)
    with pytest.raises(ValueError, match=f"cannot load a drafter from {tmp_path}"):
        CheckpointLM(path=str(tmp_path)).build(target("llama"))
