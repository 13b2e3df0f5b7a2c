"""Train the target that ships with the package: a small Llama of Python source.

    python scripts/train_embedded_target.py --out distill/embedded_target --minutes 80

Data: the standard library of the running interpreter, its `target` split (distill/standard_library.py).
Model: 8 layers x 256, tied embeddings, byte-level BPE of 4,096 tokens, context 1,024; 7.4M parameters.
Optimiser: Muon (Jordan 2024) for the matrices, AdamW for embeddings and norms, bf16 autocast;
warm-up, constant, then linear decay over the last 30 % of the time. Progress is kept in OUT.partial,
so that a run that was cut off goes on where it was.
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from distill.standard_library import pieces

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE; every text begins with BOS when special tokens are added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
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
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All documents in one stream: BOS text EOS BOS text EOS ..."""
    stream: list[int] = []
    for encoding in tokenizer(texts)["input_ids"]:
        stream += [*encoding, tokenizer.eos_token_id]
    return torch.tensor(stream, dtype=torch.int32)


def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Bits per UTF-8 byte over whole documents, cut to the context, EOS included."""
    bits = num_bytes = 0.0
    model.eval()
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            whole = len(ids) < 1024
            ids = [*ids, tokenizer.eos_token_id] if whole else ids[:1024]
            row = torch.tensor([ids])
            loss = model(input_ids=row, labels=row).loss.item()
            bits += loss * (len(ids) - 1) / math.log(2)
            num_bytes += len(text.encode() if whole else tokenizer.decode(ids[1:]).encode())
    model.train()
    return bits / num_bytes


def optimizers_for(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    partial = args.out.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)

    texts = [piece.text for piece in pieces("target")]
    print(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} M characters", flush=True)
    if (partial / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(partial)
    else:
        tokenizer = train_tokenizer(texts, args.vocab)
        tokenizer.save_pretrained(partial)
    random.Random(0).shuffle(texts)
    stream = tokens_of(texts, tokenizer)
    print(f"{len(stream):,} tokens, {sum(len(t.encode()) for t in texts) / len(stream):.2f} bytes/token", flush=True)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 8 // 3 // 16 * 16,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=args.hidden // 64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(args.device)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    optimizers = optimizers_for(model, args.lr)
    generator = torch.Generator().manual_seed(0)
    step, spent, tokens_seen = 0, 0.0, 0
    if (partial / "state.pt").exists():
        state = torch.load(partial / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"])
        step, spent, tokens_seen = state["step"], state["spent"], state["tokens_seen"]
        print(f"resumed at step {step}, {spent / 60:.1f} minutes", flush=True)

    total = args.minutes * 60
    started, last_save, recent = time.monotonic() - spent, time.monotonic(), []
    while (spent := time.monotonic() - started) < total:
        fraction = spent / total
        # Short windows first: cheaper attention while the model learns local structure.
        length = 256 if fraction < 0.5 else 512 if fraction < 0.8 else 1024
        rows = args.batch_tokens // length
        starts = torch.randint(len(stream) - length - 1, (rows,), generator=generator)
        batch = torch.stack([stream[i : i + length] for i in starts.tolist()]).long().to(args.device)
        scale = min(1.0, (step + 1) / 50) * min(1.0, (1 - fraction) / 0.3)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, tokens_seen = step + 1, tokens_seen + batch.numel()
        recent.append(loss.item())
        if step % 20 == 0:
            rate = tokens_seen / (time.monotonic() - started)
            print(
                f"step {step} loss {sum(recent) / len(recent):.4f} {tokens_seen / 1e6:.2f} M tokens "
                f"{rate:,.0f} tokens/s left {(total - spent) / 60:.1f} min",
                flush=True,
            )
            recent = []
        if time.monotonic() - last_save > 300:
            last_save = time.monotonic()
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "generator": generator.get_state(),
                "step": step,
                "spent": spent,
                "tokens_seen": tokens_seen,
            }
            torch.save(state, partial / "state.tmp")
            os.replace(partial / "state.tmp", partial / "state.pt")

    model = model.to("cpu", torch.bfloat16)
    model.generation_config.do_sample = False
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    held_out = [piece.text for piece in pieces("evaluate")]
    random.Random(0).shuffle(held_out)
    facts = {
        "parameters": model.num_parameters(),
        "tokens_seen": tokens_seen,
        "train_tokens": len(stream),
        "steps": step,
        "minutes": round(args.minutes, 1),
        "bits_per_byte_held_out": round(bits_per_byte(model.float(), tokenizer, held_out[:400]), 4),
        "bits_per_byte_train": round(bits_per_byte(model.float(), tokenizer, texts[:200]), 4),
        "held_out_documents": min(400, len(held_out)),
        "python": platform.python_version(),
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
