"""Linear layers in eight bits: close to float32, and the same for a token whoever is beside it."""

import copy

import pytest
import torch
from torch import nn

from decode import (
    Draft,
    Request,
    SamplingParams,
    SpeculativeDecoder,
    Target,
    certify,
    lay_out_for_decoding,
    quantize_int8,
)
from decode.cached_model import CachedModel
from decode.drafters import ExpansionTrees, LMDrafter, NoDrafter, load_drafter
from decode.int8 import tiles
from decode.int8.linear import Int8Linear, Matrix, is_int8
from decode.models import trim

pytestmark = pytest.mark.skipif(not tiles.is_available(), reason="needs AVX512-VNNI")

FAMILIES = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"hidden_size": 48},
}


@pytest.fixture
def quantised(tiny):
    """`quantised(name)`: a tiny random model in int8, and the same in float32."""

    def build(name):
        model = tiny.__wrapped__(name.split()[0], **FAMILIES[name])
        exact = copy.deepcopy(model)
        quantize_int8(model)
        return model, exact

    return build


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("num_outputs", [16, 97, 160])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 11, 50])
def test_a_product_is_that_of_the_rounded_numbers(num_outputs, num_rows):
    """In double precision, by the definition: each row and output in units of its own."""
    weight, bias = random(num_outputs, 64), random(num_outputs)
    x = random(num_rows, 64) * torch.logspace(-3, 3, num_rows)[:, None]
    scale, unit = (t.abs().amax(-1, keepdim=True) / 127 for t in (weight, x))
    rounded = ((x / unit).round() * unit).double() @ ((weight / scale).round() * scale).double().T
    found = Matrix.of(weight, bias)(x)
    # A value that lies between two units may go either way: half a unit of rounding remains.
    torch.testing.assert_close(found.double(), rounded + bias, rtol=1e-3, atol=1e-3)


def test_rows_of_zeros_and_of_nothing_finite_are_what_they_should_be():
    weight = random(32, 16)
    weight[3] = 0
    x = torch.stack([torch.zeros(16), torch.full((16,), 1e-40), torch.full((16,), torch.nan)])
    found = Matrix.of(weight, None)(x)
    assert torch.equal(found[0], torch.zeros(32))
    assert found[1].abs().max() < 1e-30
    assert found[2].isnan().all()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_near_those_in_float32(quantised, name):
    model, exact = quantised(name)
    ours, modules, theirs = (CachedModel(m, num_slots=1) for m in (model, model, exact))
    assert ours._lean is not None
    modules._lean = None
    ids = tokens(1, 30)
    expected = theirs.forward([0], ids, layers=(1,))
    spread = expected.logits.std()
    for cached in (ours, modules):
        found = cached.forward([0], ids, layers=(1,))
        # Of weights this large in so small a model the roundings show; elsewhere they hardly do.
        assert (found.logits - expected.logits).pow(2).mean().sqrt() < 0.15 * spread
    first = [cached.forward([0], ids, layers=(1,)).hidden[1] for cached in (ours, modules)]
    assert (first[0] - first[1]).abs().median() < 1e-5  # but for values rounded another way


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_token_has_the_same_logits_in_any_company(quantised, name):
    """Read alone, among 40, in a ragged batch, and as a node of a tree: bit by bit."""
    model, _ = quantised(name)
    prompt, text = tokens(1, 7), tokens(1, 40)
    whole = CachedModel(model, num_slots=4)
    whole.forward([2], prompt, commit=[7])
    expected = whole.forward([2], text).logits
    single = CachedModel(model, num_slots=4)
    single.forward([0], prompt, commit=[7])
    one_by_one = [single.forward([0], token[None, None], commit=[1]).logits for token in text[0]]
    assert torch.equal(torch.cat(one_by_one, dim=1), expected)
    ragged = CachedModel(model, num_slots=4)
    ragged.forward([1], prompt, commit=[7])
    ragged.forward([3], tokens(1, 21), commit=[21])
    both = ragged.forward([1, 3], torch.cat([text[:, :3], tokens(1, 3)])).logits
    assert torch.equal(both[0], expected[0, :3])
    root, one, two = text[0, :3].tolist()
    tree = Draft.from_lists([root], [[9, one, 8, two]], [[0, 0, 1, 2]])
    nodes = ragged.forward([1], tree.tokens, tree=tree).logits
    assert torch.equal(nodes[0, [0, 2, 4]], expected[0, :3])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("is_tree", [False, True])
def test_drafted_and_plain_outputs_are_the_same(quantised, perturbed, prompt, batch, is_tree):
    model, exact = quantised("llama")
    small = copy.deepcopy(perturbed(exact))
    quantize_int8(small)
    target = Target(model, max_batch_size=batch)
    drafter = LMDrafter(small, target=target, draft_length=4)
    if is_tree:
        drafter = ExpansionTrees(counts=(2, 2)).build(small, target)
    sampling = SamplingParams(max_new_tokens=24)
    requests = [Request(id=str(n), prompt=prompt(n), sampling=sampling) for n in (1, 6, 11)]
    drafted = SpeculativeDecoder(target, drafter).generate(requests)
    plain = SpeculativeDecoder(Target(model), NoDrafter()).generate(requests)
    assert [result.tokens for result in drafted] == [result.tokens for result in plain]
    certificate = certify(target, drafter, [r.prompt for r in requests], max_new_tokens=24)
    assert certificate.mismatches == ()
    assert str(certificate).endswith(
        "all are the int8 target's own without drafts, token for token"
    )


def test_a_small_model_follows_its_target_into_int8_and_heads_are_refused(
    quantised, perturbed, tiny, tmp_path
):
    model, exact = quantised("llama")
    target = Target(model)
    perturbed(exact).save_pretrained(tmp_path / "small")
    drafter = load_drafter(tmp_path / "small", target=target, draft=3)
    assert is_int8(drafter.reader.cached.model)
    tiny("gpt2").save_pretrained(tmp_path / "other")
    drafter = load_drafter(tmp_path / "other", target=target, draft=3)
    assert drafter.reader.cached.model.dtype == torch.float32
    trim(exact, range(20)).save_pretrained(tmp_path / "trimmed")
    drafter = load_drafter(tmp_path / "trimmed", target=target, draft=3)
    assert not is_int8(drafter.reader.cached.model)
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "draftsmith.json").write_text('{"family": "medusa"}')
    with pytest.raises(ValueError, match="the target's own weights, which are in int8"):
        load_drafter(tmp_path / "heads", target=target, draft=3)


def test_the_weights_in_float_are_gone(quantised):
    model, exact = quantised("llama")
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    linears = [module for module in exact.modules() if isinstance(module, nn.Linear)]
    matrices = [m.matrix for m in model.modules() if isinstance(m, Int8Linear)]
    stored = {m.blocks.untyped_storage().data_ptr(): m.blocks.untyped_storage() for m in matrices}
    num_weights = sum(linear.weight.numel() for linear in linears)
    padding = 15 * exact.config.hidden_size  # of a vocabulary that is no multiple of 16
    assert sum(storage.nbytes() for storage in stored.values()) <= num_weights + padding
    # What lies side by side is read as one matrix, where it is.
    layer = CachedModel(model, num_slots=1)._lean.layers[0]
    storages = {matrix.blocks.untyped_storage().data_ptr() for matrix in layer.matrices}
    assert storages <= stored.keys()


@torch.no_grad()
def test_a_copy_stands_on_its_own(quantised):
    model, _ = quantised("llama")
    expected = model(tokens(1, 5)).logits
    twin = copy.deepcopy(model)
    addresses = [
        {m.matrix.address for m in each.modules() if isinstance(m, Int8Linear)}
        for each in (model, twin)
    ]
    assert addresses[0].isdisjoint(addresses[1])
    assert torch.equal(twin(tokens(1, 5)).logits, expected)


def test_laying_out_changes_nothing_more(quantised):
    model, _ = quantised("qwen3")
    before = model(tokens(1, 5)).logits
    lay_out_for_decoding(model)
    assert torch.equal(model(tokens(1, 5)).logits, before)


def test_it_is_not_saved(quantised, tmp_path):
    model, _ = quantised("llama")
    with pytest.raises(RuntimeError, match="save it before it is quantised"):
        model.save_pretrained(tmp_path)


def twice(tiny):
    model = tiny("llama")
    quantize_int8(model)
    return model


REFUSED = {
    "gpt2": (lambda tiny: tiny("gpt2"), "GPT2LMHeadModel is none of them"),
    "half precision": (lambda tiny: tiny("llama").bfloat16(), "LlamaForCausalLM is in bfloat16"),
    "odd sizes": (lambda tiny: tiny("llama", intermediate_size=40), "gate_proj is 32 to 40"),
    "twice": (twice, "in int8 already"),
    "a trimmed head": (lambda tiny: trim(tiny("llama"), range(20)), "covers some ids only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_is_not_built_for_is_refused_by_name(tiny, case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        quantize_int8(build(tiny.__wrapped__))


def test_a_cpu_without_the_instruction_is_named(tiny, monkeypatch):
    monkeypatch.setattr(tiles, "is_available", lambda: False)
    with pytest.raises(ValueError, match="AVX512-VNNI"):
        quantize_int8(tiny.__wrapped__("llama"))
