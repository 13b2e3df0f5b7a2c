"""Checkpoints made smaller by what they activate."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from decode import CachedModel
from decode.models import PrunedLM, trim

TOKENS = torch.arange(3, 23)[None]
TEXTS = [list(range(start, start + 40)) for start in (1, 17, 50)]
ARCHITECTURES = pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
NORMS = ("input_layernorm", "post_attention_layernorm")


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@ARCHITECTURES
@pytest.mark.parametrize("is_tied", [False, True])
def test_at_full_width_it_is_the_model(tiny, name, is_tied):
    model = tiny(name, tie_word_embeddings=is_tied)
    settings = PrunedLM(num_layers=2, hidden_size=32, intermediate_size=64, num_heads=4)
    for chosen in (PrunedLM(), settings):
        pruned = chosen.shrink(model, TEXTS)
        assert torch.equal(logits(pruned.model.eval()), logits(model))
        assert pruned.kept["hidden_channels"] == {"kept": 32, "of": 32, "share": 1.0}
        assert pruned.kept["layers"] == [0, 1]


def without(model, dead, of):
    """A copy in which the channels `dead` of a width are zero for every token."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            match of:
                case "feed-forward":
                    mlp.gate_proj.weight[dead] = 0  # silu(0) is 0
                case "heads":
                    for head in dead:
                        attention.v_proj.weight[8 * head : 8 * head + 8] = 0
                        if attention.v_proj.bias is not None:
                            attention.v_proj.bias[8 * head : 8 * head + 8] = 0
                case "hidden":
                    attention.o_proj.weight[dead] = 0
                    mlp.down_proj.weight[dead] = 0
        if of == "hidden":
            model.model.embed_tokens.weight[:, dead] = 0
    return model


@ARCHITECTURES
@pytest.mark.parametrize(
    ("of", "dead", "settings"),
    [
        ("feed-forward", [0, 5, 40, 63], {"intermediate_size": 60}),
        ("heads", [0], {"num_heads": 2}),  # of two key heads, each with two query heads
        ("hidden", [2, 3, 30], {"hidden_size": 29}),
    ],
    ids=["feed-forward", "heads", "hidden"],
)
def test_what_is_dead_is_not_missed(tiny, name, of, dead, settings):
    model = without(tiny(name), dead, of)
    pruned = PrunedLM(**settings).shrink(model, TEXTS)
    smaller = pruned.model.eval()
    assert smaller.num_parameters() < model.num_parameters()
    torch.testing.assert_close(logits(smaller), logits(model), atol=1e-4, rtol=1e-4)
    assert all(
        pruned.kept[name]["share"] == 1.0
        for name in ("hidden_channels", "feed_forward_channels", "key_heads")
    )
    # Others than the dead ones would have been missed: the choice is by activation.
    alive = without(tiny(name), [1], of)
    assert not torch.allclose(logits(alive), logits(model), atol=1e-2)


@ARCHITECTURES
def test_what_is_active_is_kept(tiny, name):
    model = copy.deepcopy(tiny(name))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[[7, 20]] *= 100
    layers = PrunedLM(intermediate_size=2).shrink(model, TEXTS).model.model.layers
    for before, after in zip(model.model.layers, layers, strict=True):
        assert torch.equal(after.mlp.up_proj.weight, before.mlp.up_proj.weight[[7, 20]])
        assert torch.equal(after.mlp.down_proj.weight, before.mlp.down_proj.weight[:, [7, 20]])


@ARCHITECTURES
def test_a_narrow_model_is_a_plain_one(tiny, name, tmp_path):
    settings = PrunedLM(num_layers=1, hidden_size=20, intermediate_size=24, num_heads=2)
    pruned = settings.shrink(tiny(name), TEXTS)
    model = pruned.model.eval()
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (20, 24, 1)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    with torch.inference_mode():
        cached = CachedModel(model, num_slots=1)
        assert cached._lean is not None
        ours = cached.forward([0], TOKENS).logits
    torch.testing.assert_close(ours, logits(model), atol=1e-4, rtol=1e-4)
    assert pruned.kept["calibration_tokens"] == 120
    assert pruned.kept["of_layers"] == 2


def test_the_same_texts_give_the_same_model(tiny):
    settings = PrunedLM(hidden_size=20, intermediate_size=24, num_heads=2, calibration_tokens=50)
    first, second = (settings.shrink(tiny("llama"), TEXTS) for _ in range(2))
    assert first.kept == second.kept
    assert first.kept["calibration_tokens"] == 50
    assert torch.equal(logits(first.model), logits(second.model))
    other = settings.shrink(tiny("llama"), TEXTS[::-1])
    assert other.kept != first.kept


def test_a_checkpoint_may_be_pruned_for_another_target(tiny, tmp_path):
    tiny("llama", seed=4).save_pretrained(tmp_path)
    pruned = PrunedLM(path=str(tmp_path)).shrink(tiny("gpt2"), TEXTS)
    assert torch.equal(logits(pruned.model.eval()), logits(tiny("llama", seed=4)))
    assert pruned.kept["from"] == str(tmp_path)


def test_what_cannot_be_pruned_is_named(tiny):
    def refused(settings, model="llama", texts=TEXTS, **shape):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            settings.shrink(tiny(model, **shape), texts)
        return str(caught.value)

    assert "GPT2LMHeadModel cannot be pruned" in refused(PrunedLM(), "gpt2")
    assert "drafter=lm_from_target" in refused(PrunedLM(), "gemma3")
    assert "hidden_size=33: this LlamaForCausalLM has 32" in refused(PrunedLM(hidden_size=33))
    assert "num_heads=3 are not whole groups: 2 query heads" in refused(PrunedLM(num_heads=3))
    assert "num_heads=6: this" in refused(PrunedLM(num_heads=6))
    assert "the target has 2 layers" in refused(PrunedLM(num_layers=3))
    assert "no text to measure" in refused(PrunedLM(), texts=[])
    with pytest.raises(ValueError, match="whose head is trimmed cannot be pruned"):
        PrunedLM().shrink(trim(tiny("llama"), [1, 2]), TEXTS)
    for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            PrunedLM(**{name: 0})
    with pytest.raises(ValueError, match="calibration_tokens must be >= 1"):
        PrunedLM(calibration_tokens=0)
