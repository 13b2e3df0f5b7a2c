"""Tiny seeded targets and tokenizers, built once per session, and how tests measure with them."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cache

import pytest
import torch
from scipy.stats import chi2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
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
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 97
CONTEXT = 96
WINDOW = 9  # shorter than most test sequences

Build = Callable[..., PreTrainedModel]
ALTERNATING = ["sliding_attention", "full_attention"]
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}


def _llama_shape(**changes: object) -> dict[str, object]:
    shape: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # grouped queries
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return shape | changes


def _model(name: str, **changes: object) -> PreTrainedModel:
    shape = _llama_shape(**changes)
    match name:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**shape))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**shape))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**shape, sliding_window=WINDOW))
        case "gemma2":  # tied, soft-capped low enough to bite
            caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0}
            config = Gemma2Config(
                **shape, **GEMMA, **caps, layer_types=ALTERNATING, attn_implementation="eager"
            )
            return Gemma2ForCausalLM(config)
        case "gemma3":
            return Gemma3ForCausalLM(Gemma3TextConfig(**shape, **GEMMA, layer_types=ALTERNATING))
        case "granite":  # divides its logits
            return GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=6.0))
        case "cohere2":  # multiplies them
            config = Cohere2Config(**shape, logit_scale=0.0625, layer_types=ALTERNATING)
            return Cohere2ForCausalLM(config)
        case "gpt2":
            sizes = {"n_embd": "hidden_size", "n_positions": "max_position_embeddings"}
            sizes |= {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
            given = {ours: shape[theirs] for ours, theirs in sizes.items()}
            same = ("vocab_size", "initializer_range", "eos_token_id", "bos_token_id")
            return GPT2LMHeadModel(GPT2Config(**given, **{key: shape[key] for key in same}))
    raise KeyError(name)


@pytest.fixture(scope="session")
def tiny() -> Build:
    """`tiny(architecture, seed=0, **config)`: a random model whose greedy output does not loop.

    Large weights, small embeddings and uneven norms: a random model of the usual scale repeats one
    token for ever, and then every drafter is right.
    """

    @cache
    def build(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = _model(name, **changes)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn(parameter.shape), alpha=0.3)
                model.get_input_embeddings().weight.mul_(0.05)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def perturbed() -> Build:
    """`perturbed(model, noise=0.07, seed=1)`: a copy that agrees with it often, not always."""

    @cache
    def build(model: PreTrainedModel, noise: float = 0.07, seed: int = 1) -> PreTrainedModel:
        generator = torch.Generator().manual_seed(seed)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.ndim > 1:
                    scale = noise * parameter.std()
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        return other

    return build


@pytest.fixture(scope="session")
def prompt() -> Callable[..., list[int]]:
    """`prompt(length, vocab_size=97)`: the same random token ids for the same length."""

    def make(length: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(0, vocab_size, (length,), generator=generator).tolist()

    return make


@pytest.fixture(scope="session")
def greedy() -> Callable[[PreTrainedModel, Iterable[int], int], list[int]]:
    """`greedy(model, prompt, count)`: what transformers' own greedy `generate` appends."""

    @cache
    def cached(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()

    return lambda model, prompt, count: cached(model, tuple(prompt), count)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """97 tokens: "</s>", "<s>" and 95 syllables, so that texts run across token borders."""
    syllables = [a + b for a in "bdfgklmnprstvwxz" for b in "aeiouy"][: VOCAB_SIZE - 2]
    vocab = {token: index for index, token in enumerate(["</s>", "<s>", *syllables])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="ba"))
    core.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>")


@pytest.fixture(scope="session")
def g_test() -> Callable[..., float]:
    """`g_test(counts, exact)`: the chance of a fit this bad; 0 where the impossible was observed.

    Cells of fewer than five expected counts are pooled.
    """

    def chance(counts: Mapping[Hashable, int], exact: Mapping[Hashable, float]) -> float:
        total = sum(counts.values())
        assert math.isclose(sum(exact.values()), 1.0, abs_tol=1e-6)
        if any(exact.get(outcome, 0.0) <= 0 for outcome in counts):
            return 0.0
        cells: Counter[Hashable] = Counter()
        expected: Counter[Hashable] = Counter()
        for outcome, probability in exact.items():
            cell = outcome if total * probability >= 5 else "rare"
            cells[cell] += counts.get(outcome, 0)
            expected[cell] += total * probability
        if len(cells) == 1:
            return 1.0  # there is nothing to deviate
        g = 2 * sum(n * math.log(n / expected[cell]) for cell, n in cells.items() if n)
        return float(chi2.sf(g, len(cells) - 1))

    return chance
