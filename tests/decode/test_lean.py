"""The short way through Llama-like models gives what the modules give, or is not taken."""

import copy
import warnings

import pytest
import torch
from torch import nn

import decode.lean
from decode import Draft, Target, lay_out_for_decoding
from decode.cached_model import CachedModel
from decode.layout import multiply_packed
from decode.lean import LeanForward, Projection

FAMILIES = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with scaled positions": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {},
    "qwen2": {},
    "qwen2 with both kinds of layers": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {},
}


@pytest.fixture
def family(tiny):
    """`family(name)`: a tiny random model of it, of its own."""
    return lambda name: tiny.__wrapped__(name.split()[0], **FAMILIES[name])


def both(model) -> tuple[CachedModel, CachedModel]:
    """The model on the short way, and through its modules."""
    lean, plain = (CachedModel(model, num_slots=4, max_length=64) for _ in "ab")
    assert lean._lean is not None
    plain._lean = None
    return lean, plain


def filled(cached: CachedModel, prompts: list[torch.Tensor]) -> None:
    for slot, prompt in enumerate(prompts):
        cached.forward([slot], prompt[None])
        cached.cache.commit([slot], [len(prompt)])


def tokens(*shape: int, vocab_size: int = 64) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("layout", ["as loaded", "for decoding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_and_states_are_those_of_the_modules(family, name, dtype, layout, monkeypatch):
    model = family(name).to(dtype)
    if layout == "for decoding":
        lay_out_for_decoding(model)
        monkeypatch.setattr(decode.lean, "PACKED_PAYS", 1)  # however small the model
    num_layers = model.config.num_hidden_layers
    tree = Draft.from_lists(
        [1, 2, 3], [[4, 5, 6, 7], [8, 9], [5, 5, 5]], [[0, 0, 1, 2], [0, 1], [0, 0, 0]]
    )
    outputs = []
    for cached in both(model):
        filled(cached, [tokens(length) for length in (1, 9, 20)])
        alone = cached.forward([1], tokens(1, 5), layers=(0, 1, num_layers))
        single = cached.forward([2], tokens(1, 1))
        ragged = cached.forward([0, 1, 2], tokens(3, 4), layers=(1,), keep=[1, 3])
        wide = cached.forward([0, 1, 2], tree.tokens, tree=tree, layers=(num_layers,))
        found = [alone, single, ragged, wide]
        outputs.append([part for o in found for part in (o.logits, *o.hidden.values())])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert len(outputs[0]) == 9
    for ours, theirs in zip(*outputs, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_weights_side_by_side_are_one_product_and_the_same_values(family):
    model = family("llama with biases")
    before = copy.deepcopy(model.state_dict())
    lay_out_for_decoding(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lean = LeanForward.of(model, torch.arange(8)[None])
    assert lean is not None
    for layer in lean.layers:
        assert len(layer.qkv.weights) == len(layer.gate_up.weights) == 1
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr() or (
        not model.config.tie_word_embeddings
    )


def test_weights_changed_in_place_are_read(family):
    """A drafter in training is evaluated with the weights of now."""
    model = family("qwen3")
    lean, plain = both(model)
    with torch.no_grad():
        before = lean.forward([0], tokens(1, 4)).logits
        for parameter in model.parameters():
            parameter.mul_(1.5)
        ours, theirs = (cached.forward([0], tokens(1, 4)).logits for cached in (lean, plain))
    assert not torch.allclose(ours, before, atol=1e-2)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 40])
@pytest.mark.parametrize("has_bias", [True, False])
def test_packed_weights_give_the_same_product(num_rows, has_bias):
    generator = torch.Generator().manual_seed(0)
    parts = [nn.Linear(96, 64, bias=has_bias) for _ in range(3)]
    group = nn.Module()
    group.q_proj, group.k_proj, group.v_proj = parts
    for parameter in group.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(2, num_rows, 96, generator=generator)
    with torch.no_grad():
        expected = torch.cat([part(x) for part in parts], dim=-1)
        lay_out_for_decoding(group)
        projection = Projection.of(*parts)
        assert projection.packed is not None
        packed = multiply_packed(x, projection.packed, projection.biases[0])
        for ours in (packed, projection(x), torch.cat([part(x) for part in parts], dim=-1)):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def with_adapter(model):
    class Adapted(nn.Linear):
        pass

    old = model.base_model.layers[0].mlp.down_proj
    model.base_model.layers[0].mlp.down_proj = Adapted(
        old.in_features, old.out_features, bias=False
    )
    return model


def with_hook(model):
    model.base_model.layers[1].register_forward_hook(lambda *_: None)
    return model


def with_patched_forward(model):
    layer = model.base_model.layers[0].self_attn
    layer.forward = layer.forward
    return model


def with_two_dtypes(model):
    model.base_model.norm.double()
    return model


def with_eager_attention(model):
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    "change",
    [with_adapter, with_hook, with_patched_forward, with_two_dtypes, with_eager_attention],
)
def test_models_that_were_changed_keep_to_their_modules(family, change):
    assert LeanForward.of(change(family("llama")), torch.arange(8)[None]) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_models_that_compute_something_else_keep_to_their_modules(tiny, changes):
    assert LeanForward.of(tiny.__wrapped__("llama", **changes), torch.arange(8)[None]) is None


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gemma3"])
def test_other_architectures_keep_to_their_modules(tiny, architecture):
    assert LeanForward.of(tiny(architecture), torch.arange(8)[None]) is None


def test_a_model_with_other_logits_is_left_to_its_modules_with_a_warning(family, monkeypatch):
    model = family("llama")
    # Something that cannot be seen from outside: the modules compute with another epsilon.
    for layer in model.base_model.layers:
        layer.input_layernorm.variance_epsilon = 0.5
    with pytest.warns(UserWarning, match="lean forward of LlamaForCausalLM gives other logits"):
        target = Target(model, max_batch_size=1)
    assert target.cached._lean is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Target(family("llama"), max_batch_size=1).cached._lean is not None
