"""Train the target that ships with the package: a small Llama of Python source.

    python scripts/train_embedded_target.py --out distill/embedded_target --minutes 92

Data: the standard library of the running interpreter, its `target` split
(distill/standard_library.py). Model: 8 layers x 256, tied embeddings, byte-level BPE of 4,096
tokens, context 1,024; 7.3 M parameters. Optimiser: Muon (Jordan 2024) for the matrices, AdamW for
embeddings and norms, bf16 autocast; warm-up, constant, then linear decay over the last 30 % of the
time. Progress is kept in OUT.partial: a run that was cut off goes on where it was.
"""

import argparse
import json
import math
import os
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.progress import Progress
from distill.run_folder import write_json, write_text
from distill.standard_library import pieces

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CONTEXT = 1024
SAVE_EVERY = 300  # seconds

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
| bits per byte, held-out modules | {held_out:.3f} ({held_out_documents} documents, cut to the context) |
| bits per byte, training documents | {trained:.3f} |

Made by `python scripts/train_embedded_target.py --out {out} --minutes {minutes:.0f}`.

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


def train(
    args: argparse.Namespace, model: LlamaForCausalLM, stream: Tensor, path: Path
) -> dict[str, Any]:
    """Train for the given time; returns the counts."""
    optimizers = optimizers_for(model, args.lr)
    facts: dict[str, Any] = {"steps": 0, "seconds": 0.0, "tokens_seen": 0}
    if path.exists():
        facts = load_progress(path, model, optimizers)
    total = args.minutes * 60
    before, started, saved = facts["seconds"], time.monotonic(), time.monotonic()
    with Progress(int(total), unit="seconds", label="train") as progress:
        progress.skip(int(before))
        while facts["seconds"] < total:
            fraction = facts["seconds"] / total
            # Short windows first: cheaper attention while the model learns local structure.
            length = 256 if fraction < 0.5 else 512 if fraction < 0.8 else CONTEXT
            generator = torch.Generator().manual_seed(facts["steps"])
            places = torch.randint(
                len(stream) - length - 1, (args.batch_tokens // length,), generator=generator
            )
            batch = torch.stack([stream[i : i + length] for i in places.tolist()])
            batch = batch.long().to(args.device)
            scale = min(1.0, (facts["steps"] + 1) / 50) * min(1.0, (1 - fraction) / 0.3)
            with torch.autocast(args.device, dtype=torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * scale
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
    return facts


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


@torch.inference_mode()
def samples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> list[str]:
    """Greedy continuations of the first lines of documents, as Markdown."""
    shown = []
    for text in texts:
        prompt = "\n".join(text[:240].split("\n")[:-1])
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, do_sample=False
        )
        written = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        shown.append(
            f"````python\n{prompt}   # <- the prompt ends here\n{written.removeprefix(chr(10))}\n````"
        )
    return shown


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
    figures = facts | {
        "parameters": model.num_parameters(),
        "train_documents": len(trained_on),
        "minutes": facts["seconds"] / 60,
        "held_out": bits_per_byte(model, tokenizer, held_out[:400]),
        "held_out_documents": len(held_out[:400]),
        "trained": bits_per_byte(model, tokenizer, trained_on[:200]),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    write_json(args.out / "training.json", figures)
    shown = "\n\n".join(samples(model, tokenizer, held_out[:3]))
    write_text(args.out / "README.md", CARD.format(**(vars(args) | figures), samples=shown))


def main() -> None:
    """Train what is not trained yet, then measure and describe it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=92)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=6e-3)
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
    facts = train(args, model, stream, partial / "progress.safetensors")
    facts["train_tokens"] = len(stream)
    model = model.to(torch.bfloat16).eval()
    model.generation_config.do_sample = False
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    describe_model(args, model.float(), tokenizer, texts, facts)
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()
