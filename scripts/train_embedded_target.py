"""Train the target that ships with the package: a small Llama of Python source.

    python scripts/train_embedded_target.py --out distill/embedded_target

Data: the standard library of the running interpreter, its `target` split
(distill/standard_library.py). Model: 8 layers x 256, tied embeddings, byte-level BPE of 4,096
tokens, context 1,024; 7.3 M parameters. Optimiser: Muon (Jordan 2024) for the matrices, AdamW for
embeddings and norms, bf16 autocast. Two phases, each with a warm-up, a constant and a linearly
decaying learning rate: the model learns the text; then, as small models repeat themselves for ever
when they decode greedily, it also unlearns the repeats of its own outputs (scripts/repeats.py).
Progress is kept in OUT.partial: a run that was cut off goes on where it was.
"""

import argparse
import copy
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from repeats import RUN, distance_from_unrepeated, ends_in_loop, greedy_outputs, repeated
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.progress import Progress
from distill.prompts import StandardLibraryPrompts
from distill.run_folder import write_json, write_text
from distill.standard_library import pieces

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CONTEXT = 1024
SAVE_EVERY = 300  # seconds
OWN_OUTPUTS = 16  # in a step of the second phase
OWN_LENGTH = 160  # tokens of each
SHOWN_TOKENS = 128  # of greedy outputs that are measured and shown
NUM_SHOWN = 6

CARD = """\
---
library_name: transformers
license: psf-2.0
tags: [code, python, draftsmith]
---

# Draftsmith's embedded target

A small Llama of Python source, {parameters:,} parameters, for trying speculative decoding without a
model hub. It writes text that looks like Python; it is not a programming assistant.

| | |
| --- | --- |
| architecture | Llama, {layers} layers x {hidden}, {vocab:,} tokens of byte-level BPE, context 1,024, tied |
| data | standard library of CPython {python}: {train_documents:,} documents, {train_tokens:,} tokens |
| split | by a hash of the module's name: 76 % of modules here, 16 % for distillation prompts, 8 % held out; no text is in two of them |
| licence of the data | PSF License Agreement (Python Software Foundation); some modules carry their own compatible notice |
| tokens seen | {tokens_seen:,} in {steps:,} steps, {minutes:.0f} minutes on {cores} cores |
| of these while it unlearned its repeats | {finish_tokens_seen:,} in {finish_steps:,} steps, {finish_minutes:.0f} minutes |
| bits per byte, held-out modules | {held_out:.3f} ({held_out_documents} documents, cut to the context) |
| bits per byte, training documents | {trained:.3f} |
| greedy, {continuations} held-out prompts x {continuation_tokens} tokens | {loops} end in a loop; {repeats:.0%} of the tokens end a run of {run} that stood there before (real text: {real_repeats:.0%}) |

Made by `python scripts/train_embedded_target.py --out {out} --minutes {learn_minutes:.0f} --finish-minutes {finish_minutes:.0f}`.

## What it writes

Greedy, behind the beginnings of held-out documents:

{samples}
"""


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE; every text begins with BOS when special tokens are added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All documents in one stream: BOS text EOS BOS text EOS ..."""
    stream: list[int] = []
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    return torch.tensor(stream, dtype=torch.int32)


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The architecture, with random weights."""
    heads = args.hidden // 64
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 8 // 3 // 16 * 16,
            num_hidden_layers=args.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(args.device)


def optimizers_for(model: LlamaForCausalLM, lr: float) -> list[Optimizer]:
    """Muon for the matrices inside the layers, AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save_progress(
    path: Path, model: LlamaForCausalLM, optimizers: list[Optimizer], facts: dict[str, Any]
) -> None:
    """Weights, moments and counts in one file, written whole."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer/{number}/{index}/{name}"] = torch.as_tensor(value)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"facts": json.dumps(facts)})
    os.replace(partial, path)


def load_progress(
    path: Path, model: LlamaForCausalLM, optimizers: list[Optimizer]
) -> dict[str, Any]:
    """Put everything back; returns the counts."""
    parameters = dict(model.named_parameters())
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, tensor in load_file(path).items():
        kind, _, rest = name.partition("/")
        if kind == "model":
            parameters[rest].data.copy_(tensor)
        else:
            number, index, field = rest.split("/")
            states[int(number)].setdefault(int(index), {})[field] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
    return facts


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Attributes:
        minutes: how long.
        lr: highest learning rate.
        decay: share of the time, at its end, in which the rate falls to 0.
        lengths: up to which share of the time windows of how many tokens are read.
        more: takes the step's number and adds gradients to those of the text.
    """

    minutes: float
    lr: float
    decay: float
    lengths: tuple[tuple[float, int], ...]
    more: Callable[[int], None] | None = None


def train(
    args: argparse.Namespace, phase: Phase, model: LlamaForCausalLM, stream: Tensor, path: Path
) -> dict[str, Any]:
    """Train for the given time; returns the counts."""
    optimizers = optimizers_for(model, phase.lr)
    facts: dict[str, Any] = {"steps": 0, "seconds": 0.0, "tokens_seen": 0}
    if path.exists():
        facts = load_progress(path, model, optimizers)
    total = phase.minutes * 60
    before, started, saved = facts["seconds"], time.monotonic(), time.monotonic()
    with Progress(int(total), unit="seconds", label=path.stem) as progress:
        progress.skip(int(before))
        while facts["seconds"] < total:
            fraction = facts["seconds"] / total
            length = next(length for end, length in phase.lengths if fraction < end)
            generator = torch.Generator().manual_seed(facts["steps"])
            places = torch.randint(
                len(stream) - length - 1, (args.batch_tokens // length,), generator=generator
            )
            batch = torch.stack([stream[i : i + length] for i in places.tolist()])
            batch = batch.long().to(args.device)
            scale = min(1.0, (facts["steps"] + 1) / 50) * min(1.0, (1 - fraction) / phase.decay)
            with torch.autocast(args.device, dtype=torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            if phase.more is not None:
                phase.more(facts["steps"])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = phase.lr * scale
                optimizer.step()
                optimizer.zero_grad()
            now = before + time.monotonic() - started
            progress.advance(
                int(now) - int(facts["seconds"]), tokens=batch.numel(), loss=loss.item()
            )
            facts["steps"] += 1
            facts["tokens_seen"] += batch.numel()
            facts["seconds"] = now
            if time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                save_progress(path, model, optimizers, facts)
    save_progress(path, model, optimizers, facts)
    return facts


def unlearner(
    args: argparse.Namespace, model: LlamaForCausalLM, stream: Tensor
) -> Callable[[int], None]:
    """Adds a gradient away from the repeats that it writes behind beginnings of documents."""
    teacher = copy.deepcopy(model)
    begins = (stream == model.config.bos_token_id).nonzero()[:, 0]
    ends = torch.cat([begins[1:], torch.tensor([len(stream)])]) - 1  # each before its EOS

    def unlearn(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        documents = torch.randint(len(begins), (OWN_OUTPUTS,), generator=generator)
        lengths = torch.randint(16, 97, (OWN_OUTPUTS,), generator=generator)
        stops = torch.minimum(begins[documents] + lengths, ends[documents])
        prompts = [
            stream[begin:stop].tolist()
            for begin, stop in zip(begins[documents].tolist(), stops.tolist(), strict=True)
        ]
        outputs = greedy_outputs(model, prompts, OWN_LENGTH)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = distance_from_unrepeated(model, teacher, prompts, outputs)
        torch.autograd.backward(loss)

    return unlearn


@torch.inference_mode()
def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> float:
    """Bits per UTF-8 byte, documents cut to the context, EOS included where they are whole."""
    bits = num_bytes = 0.0
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        is_whole = len(ids) < CONTEXT
        ids = [*ids, tokenizer.eos_token_id] if is_whole else ids[:CONTEXT]
        row = torch.tensor([ids], device=model.device)
        bits += model(input_ids=row, labels=row).loss.item() * (len(ids) - 1) / math.log(2)
        num_bytes += len((text if is_whole else tokenizer.decode(ids[1:])).encode())
    return bits / num_bytes


def samples(
    tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], outputs: list[list[int]]
) -> str:
    """Continuations, as Markdown."""
    shown = []
    for prompt, output in zip(prompts, outputs, strict=True):
        before, after = (
            tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, output)
        )
        shown.append(
            f"````python\n{before}   # <- the prompt ends here\n{after.removeprefix(chr(10))}\n````"
        )
    return "\n\n".join(shown)


def greedy_figures(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, Any], str]:
    """How much of what it writes behind held-out beginnings repeats, and the first of that."""
    found = StandardLibraryPrompts(split="evaluate", limit=96, prompt_tokens=64).load(tokenizer)
    prompts = [prompt.ids for prompt in found]
    outputs = greedy_outputs(model, prompts, SHOWN_TOKENS)
    references = [
        tokenizer(prompt.reference or "", add_special_tokens=False, verbose=False)["input_ids"]
        for prompt in found
    ]

    def share(texts: list[list[int]]) -> float:
        return sum(sum(repeated(ids)) for ids in texts) / sum(map(len, texts))

    figures = {
        "continuations": len(outputs),
        "loops": sum(map(ends_in_loop, outputs)),
        "repeats": share(outputs),
        "real_repeats": share([ids[:SHOWN_TOKENS] for ids in references]),
    }
    return figures, samples(tokenizer, prompts[:NUM_SHOWN], outputs[:NUM_SHOWN])


def describe_model(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    trained_on: list[str],
    facts: dict[str, Any],
) -> None:
    """Measure, and write the figures and the model card."""
    held_out = [piece.text for piece in pieces("evaluate")]
    random.Random(0).shuffle(held_out)
    seconds, finish_seconds = facts["seconds"], facts["finish_seconds"]
    figures = facts | {
        "minutes": seconds / 60,
        "learn_minutes": (seconds - finish_seconds) / 60,
        "finish_minutes": finish_seconds / 60,
        "parameters": model.num_parameters(),
        "train_documents": len(trained_on),
        "held_out": bits_per_byte(model, tokenizer, held_out[:400]),
        "held_out_documents": len(held_out[:400]),
        "trained": bits_per_byte(model, tokenizer, trained_on[:200]),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    greedy, written = greedy_figures(model, tokenizer)
    figures |= greedy
    shown = {"continuation_tokens": SHOWN_TOKENS, "run": RUN, "samples": written}
    write_json(args.out / "training.json", figures)
    write_text(args.out / "README.md", CARD.format(**(vars(args) | figures | shown)))


def main() -> None:
    """Train what is not trained yet, then measure and describe it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=92, help="to learn the text")
    parser.add_argument("--finish-minutes", type=float, default=22, help="to unlearn repeats")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--finish-lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--describe", action="store_true", help="measure the model in --out again; no training"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    texts = [piece.text for piece in pieces("target")]
    if args.describe:
        random.Random(0).shuffle(texts)
        model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
        facts = json.loads((args.out / "training.json").read_text())
        describe_model(args, model.eval(), tokenizer, texts, facts)
        return
    partial = args.out.with_name(f"{args.out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    if (partial / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(partial)
    else:
        tokenizer = train_tokenizer(texts, args.vocab)
        tokenizer.save_pretrained(partial)
    random.Random(0).shuffle(texts)
    stream = tokens_of(texts, tokenizer)
    print(f"{len(texts):,} documents, {len(stream):,} tokens")

    model = new_model(args, tokenizer)
    # Short windows first: cheaper attention while the model learns local structure.
    learn = Phase(args.minutes, args.lr, 0.3, ((0.5, 256), (0.8, 512), (1.0, CONTEXT)))
    learnt = train(args, learn, model, stream, partial / "learn.safetensors")
    unlearn = unlearner(args, model, stream)
    finish = Phase(args.finish_minutes, args.finish_lr, 0.7, ((1.0, CONTEXT),), unlearn)
    finished = train(args, finish, model, stream, partial / "finish.safetensors")
    facts = {name: learnt[name] + finished[name] for name in learnt}
    facts |= {f"finish_{name}": count for name, count in finished.items()}
    facts["train_tokens"] = len(stream)
    model = model.to(torch.bfloat16).eval()
    model.generation_config.do_sample = False
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    describe_model(args, model.float(), tokenizer, texts, facts)
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()
