"""Time our training loop beside TRL's off-policy GKD: tokens per second and peak memory.

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
    python scripts/bench_train.py --trl-python trl/bin/python

Teacher of 8 layers of width 256, student of 1 layer of 128, both Llamas with random weights and
8,192 ids; 8 sequences of 512 tokens per step, of which the last three quarters are learnt; one
thread. Every run is a process of its own; they alternate, round after round, and the median over
rounds counts. Ours goes through `Trainer`, as `draftsmith train` does.

Both sides compute products in bf16 (autocast; weights and moments stay float32) and in float32.
TRL runs forward KL in three settings: float32, bf16, and its defaults, which are bf16 with
checkpointed gradients; JSD(0.5) in the first two. `--json FILE` writes the rows and

    tokens_per_s_over_trl         ours, forward KL beside the live teacher, bf16 (our default)
                                  / TRL's fastest of its three settings
    stored_tokens_per_s_over_trl  ours from 16 stored log-probabilities per token, bf16 / the same
    jsd_tokens_per_s_over_trl     ours, JSD(0.5) beside the live teacher, bf16
                                  / TRL's faster of its two settings
    peak_memory_over_trl          of the process: ours, forward KL beside the live teacher, bf16
                                  / TRL's lowest of its three settings for forward KL
    tokens_per_s_fp32_over_trl_fp32, jsd_tokens_per_s_fp32_over_trl_fp32
                                  ours with precision=no / TRL's in float32
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from distill.alignment.lm import LiveTarget, LMAlignment
from distill.batches import BatchStream, Example, Pool
from distill.laws import TopLaw
from distill.loop import Precision, Schedule, Trainee, Trainer, TrainerSettings
from distill.objectives import ForwardKL, JensenShannon
from distill.standard_library import pieces
from distill.teachers.stored import StoredTop
from distill.tracking import NoTracker, read_metrics

ROOT = Path(__file__).resolve().parents[1]
VOCAB, LENGTH, BATCH, TOP = 8192, 512, 8, 16
STORED = ("ids", "logprobs", "tail_mass")
WARM_UP = 2
TEMPLATE = (
    "{% for m in messages %}{{ '# ' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant\n' }}{% endif %}"
)
# Mode -> precision of the products, for the printed rows.
OURS = {
    "live": "bf16",
    "live_fp32": "fp32",
    "stored": "bf16",
    "live_jsd": "bf16",
    "live_jsd_fp32": "fp32",
}
TRL = {
    "forward_kl_fp32": "fp32",
    "forward_kl_bf16": "bf16",
    "forward_kl_defaults": "bf16",
    "jsd_fp32": "fp32",
    "jsd_bf16": "bf16",
}
Figures = dict[str, float]


def prepare(folder: Path, _: str, steps: int) -> Figures:
    """Write models, token ids [N, LENGTH], and the teacher's likeliest tokens at each of them."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "distill" / "embedded_target")
    tokenizer.chat_template = TEMPLATE
    for name, layers, width in (("teacher", 8, 256), ("student", 1, 128)):
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    needed = BATCH * (steps + 2) * LENGTH
    flat: list[int] = []
    for piece in pieces("distill"):
        flat += tokenizer(piece.text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(flat) >= needed:
            break
    ids = np.array(flat[:needed]).reshape(-1, LENGTH)
    np.save(folder / "ids.npy", ids)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    tops = []
    with torch.no_grad():
        for row in torch.from_numpy(ids):
            logprobs, top = teacher(row[None]).logits[0].log_softmax(-1)[:-1].topk(TOP)
            tops.append(TopLaw(top.int(), logprobs, 1 - logprobs.exp().sum(-1)))
    columns = {name: torch.stack([getattr(top, name) for top in tops]) for name in STORED}
    save_file(columns, folder / "top.safetensors")
    return {}


def ours(folder: Path, mode: str, steps: int) -> Figures:
    """Train `steps` steps in this process."""
    ids = np.load(folder / "ids.npy").tolist()
    quarter = LENGTH // 4
    tops: list[TopLaw | None] = [None] * len(ids)
    if mode == "stored":  # row n of a law is about token n + 1
        stored = load_file(folder / "top.safetensors")
        laws = zip(*(stored[name] for name in STORED), strict=True)
        tops = [TopLaw(*law)[slice(quarter - 1, None)] for law in laws]
    examples = [
        Example(row[:quarter], row[quarter:], top=top) for row, top in zip(ids, tops, strict=True)
    ]
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    teacher: Any = StoredTop()
    if mode != "stored":
        teacher = LiveTarget(
            AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
        )
    settings = TrainerSettings(
        steps=steps,
        batch_size=BATCH,
        micro_batch_size=BATCH,
        sequence_length=LENGTH,
        learning_rate=1e-4,
        precision=Precision.no if OURS[mode] == "fp32" else Precision.bf16,
        warmup_steps=0,
        schedule=Schedule.constant,
        log_every=1,
        checkpoint_every=steps,
        num_threads=1,
    )
    objective = JensenShannon() if "jsd" in mode else ForwardKL()
    output = Path(tempfile.mkdtemp(dir=folder))
    trainer = Trainer(
        Trainee(student, LMAlignment(student), objective, teacher, settings.precision),
        BatchStream([Pool(examples)], sequence_length=LENGTH, batch_size=BATCH, seed=0),
        settings,
        folder=output,
        accelerator=Accelerator(cpu=True),
        tracker=NoTracker().start(output, {}),
    )
    trainer.run()
    lines = read_metrics(output / "metrics.jsonl")
    first, last = lines[WARM_UP - 1], lines[-1]
    before = 0.0
    seconds = 0.0
    for line in lines:
        if line["step"] > first["step"]:
            seconds += (line["tokens"] - before) / line["tokens_per_second"]
        before = line["tokens"]
    return {
        "tokens_per_s": (last["tokens"] - first["tokens"]) / seconds,
        "loss": last["loss"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def timed(python: str, arguments: list[str]) -> Figures:
    """What a process of its own says on its last line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if "trl_baseline.py" in arguments[0]:
        del environment["PYTHONPATH"]
    done = subprocess.run([python, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def over_trl(median: Mapping[str, Figures]) -> Figures:
    """The ratios that the module's docstring explains, from the figures of each mode."""

    def speeds(prefix: str) -> list[float]:
        return [
            run["tokens_per_s"] for mode, run in median.items() if mode.startswith(f"trl_{prefix}")
        ]

    def speed(mode: str) -> float:
        return median[mode]["tokens_per_s"]

    lowest = min(
        run["peak_mb"] for mode, run in median.items() if mode.startswith("trl_forward_kl")
    )
    return {
        "tokens_per_s_over_trl": speed("live") / max(speeds("forward_kl")),
        "stored_tokens_per_s_over_trl": speed("stored") / max(speeds("forward_kl")),
        "jsd_tokens_per_s_over_trl": speed("live_jsd") / max(speeds("jsd")),
        "peak_memory_over_trl": median["live"]["peak_mb"] / lowest,
        "tokens_per_s_fp32_over_trl_fp32": speed("live_fp32") / speed("trl_forward_kl_fp32"),
        "jsd_tokens_per_s_fp32_over_trl_fp32": speed("live_jsd_fp32") / speed("trl_jsd_fp32"),
    }


def main() -> None:
    """Alternate, and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", help="the interpreter of an environment with trl 1.16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="the first two are not timed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(1)
        folder, mode = Path(arguments.one[0]), arguments.one[1]
        print(json.dumps((prepare if mode == "prepare" else ours)(folder, mode, arguments.steps)))
        return
    runs: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory() as name:
        steps = str(arguments.steps)
        own = {mode: [__file__, "--one", name, mode, "--steps", steps] for mode in OURS}
        # Also in a process of its own: Linux counts a parent's peak memory as its children's.
        timed(sys.executable, [__file__, "--one", name, "prepare", "--steps", steps])
        for _ in range(arguments.rounds):
            for mode, call in own.items():
                runs.setdefault(mode, []).append(timed(sys.executable, call))
            for mode in TRL if arguments.trl_python else ():
                call = [str(ROOT / "scripts" / "trl_baseline.py"), name, mode, steps]
                runs.setdefault(f"trl_{mode}", []).append(timed(arguments.trl_python, call))
    median = {
        mode: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for mode, found in runs.items()
    }
    precision = OURS | {f"trl_{mode}": held for mode, held in TRL.items()}
    print(f"{'':24} {'':4} {'tokens/s':>9} {'rounds':>24} {'peak MB':>8} {'loss':>8}")
    for mode, figures in median.items():
        rounds = " ".join(f"{run['tokens_per_s']:.0f}" for run in runs[mode])
        print(
            f"{mode:24} {precision[mode]:4} {figures['tokens_per_s']:9.0f} {rounds:>24} "
            f"{figures['peak_mb']:8.0f} {figures['loss']:8.4f}"
        )
    if not arguments.trl_python:
        return
    ratios = over_trl(median)
    print("\n".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    if arguments.json:
        arguments.json.write_text(
            json.dumps(ratios | {"precision": precision, "runs": runs}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
