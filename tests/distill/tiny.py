"""What tests of training share: targets of a few words, and random ids to learn."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from decode import SamplingParams
from decode.models import ScratchLM
from distill.batches import Example
from distill.loop import Precision, Trainer, TrainerSettings
from distill.objectives import ForwardKL
from distill.prompts import Prompt
from distill.target import TargetSettings
from distill.train import Train

VOCAB = 24


@dataclass(frozen=True)
class Numbers:
    """Random ids as prompts and as examples."""

    count: int
    seed: int

    def ids(self, number: int) -> list[int]:
        """Those of a prompt, or below 0 of an output."""
        draw = random.Random(f"{self.seed} {number}")
        return [draw.randrange(3, VOCAB) for _ in range(6)]

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """As prompts."""
        return [Prompt(str(n), self.ids(n), "", None, "test") for n in range(self.count)]

    def examples(self, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """As examples."""
        return [Example(self.ids(n), self.ids(-n - 1)) for n in range(self.count)]


def llama(seed: int = 0, *, num_layers: int = 3, spread: float = 0.3) -> LlamaForCausalLM:
    """A random model of `VOCAB` words, whose weights are `spread` wide."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=48,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def t5(vocab_size: int = VOCAB) -> T5ForConditionalGeneration:
    """A random T5 whose greedy output hangs on the source and on all tokens before."""
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=9.0 if "relative" in name else 0.5)
        model.get_input_embeddings().weight.mul_(0.1)
    return model.eval()


def bart(vocab_size: int = VOCAB) -> BartForConditionalGeneration:
    """A random BART that begins with two tokens, with a bias on its logits."""
    torch.manual_seed(2)
    config = BartConfig(
        vocab_size=vocab_size,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=48,
        init_std=0.3,
        bos_token_id=1,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_bos_token_id=1,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config)
    model.final_logits_bias += torch.linspace(-1, 1, vocab_size)
    return model.eval()


def save_target(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Write a model, `llama()` by default, and the tokenizer of its words."""
    (model or llama()).save_pretrained(folder)
    save_word_tokenizer(folder, VOCAB)
    return folder


TRAINER = TrainerSettings(
    steps=4,
    batch_size=2,
    micro_batch_size=2,
    sequence_length=24,
    precision=Precision.no,
    log_every=2,
    evaluate_every=2,
    checkpoint_every=2,
)


def training(target: Path, output: Path, data: Any, prompts: Any, **trainer: Any) -> Train:
    """A training of seconds; `trainer` changes what `TRAINER` says."""
    return Train(
        target=TargetSettings(path=str(target)),
        drafter=ScratchLM(num_layers=1, hidden_size=32),
        objective=ForwardKL(),
        data=data,
        trainer=replace(TRAINER, **trainer),
        prompts=prompts,
        sampling=SamplingParams(max_new_tokens=8, ignore_eos=True),
        draft_length=2,
        output=output,
    )


def save_word_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write it beside a model: "<unk>", "<s>", "</s>", then "t3", "t4", ..."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, vocab_size)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def run_until_killed(train: Train, *, before_step: int) -> None:
    """Run, and end there without a word, as a killed process does."""
    step = Trainer._train_step

    def killed(trainer: Trainer) -> None:
        if trainer.step == before_step:
            raise SystemExit("killed")
        step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", killed)
        with pytest.raises(SystemExit):
            train.run()
