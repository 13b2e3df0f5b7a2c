"""Packed batches give each example the states it would have alone, on every architecture."""

import random

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill.alignment.lm import LiveTarget, LMAlignment, PlainHead
from distill.batches import BatchStream, Example, Pool

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=16, sliding_window=5, final_logit_softcapping=2.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=5, layer_types=KINDS)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE)),  # logits are scaled by 1/16
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=6.0)),
    "odd": lambda: with_odd_logits(LlamaForCausalLM(LlamaConfig(**SHAPE))),
}  # fmt: skip


def with_odd_logits(model):
    """The model, its head no linear layer any more."""
    model.lm_head.register_forward_hook(lambda head, given, logits: logits.square())
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_do_not_see_each_other(name, attention):
    if (name, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers offers none")
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(attention)
    draw = random.Random(0)
    examples = [
        Example(
            [draw.randrange(3, 40) for _ in range(draw.randrange(1, 6))],
            [draw.randrange(3, 40) for _ in range(draw.randrange(1, 12))],
        )
        for _ in range(6)
    ]
    stream = BatchStream([Pool(examples)], sequence_length=32, batch_size=4, seed=0)
    (batch,) = stream.for_process(0, 0, 1, 4)
    expected, labels = [], []
    for pack in stream[0]:
        for example in pack:
            logits = model(torch.tensor([example.ids]), use_cache=False).logits[0]
            expected.append(logits[len(example.prompt_ids) - 1 : -1].detach())
            labels += example.output_ids

    aligned = LMAlignment(model).align(model, batch)
    (depth,) = aligned.depths
    assert depth.labels.tolist() == labels
    assert depth.rows is depth.valid is None
    logits = depth.states.law(slice(None)).logits
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-5, atol=1e-5)
    target = LiveTarget(model, layers=(0, 2))
    signal = target.signal(batch)
    torch.testing.assert_close(signal.law(slice(2, 5)).logits, logits[2:5])
    torch.testing.assert_close(signal.law(torch.tensor([4, 1])).logits, logits[[4, 1]])
    assert not signal.hidden.requires_grad
    plain = PlainHead.of(model)
    assert (plain is None) == (name == "odd")

    model.forward = model.base_model.forward = None  # what it reads was computed with the signal
    hidden = target.states(batch)
    assert hidden.keys() == {0, 2}
    learnt = hidden[2][:, :-1][batch.loss_mask[:, 1:]]
    if plain is not None:
        torch.testing.assert_close(learnt * plain.scale, signal.hidden)
