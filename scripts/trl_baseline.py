"""TRL's off-policy GKD on the setting of bench_train.py; runs in an environment that has TRL.

    python scripts/trl_baseline.py FOLDER MODE STEPS

FOLDER is what `bench_train.py` prepared. Prints one JSON line: tokens per second over all steps
but the first two, the last loss, and the peak resident memory of this process.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer  # type: ignore[import-not-found]

WARM_UP = 2
FP32 = {"bf16": False, "gradient_checkpointing": False}
BF16 = {"bf16": True, "gradient_checkpointing": False}
MODES: dict[str, dict[str, Any]] = {
    "forward_kl_fp32": {"beta": 0.0, **FP32},
    "forward_kl_bf16": {"beta": 0.0, **BF16},
    "forward_kl_defaults": {"beta": 0.0},  # bf16, checkpointed gradients
    "jsd_fp32": {"beta": 0.5, **FP32},
    "jsd_bf16": {"beta": 0.5, **BF16},
}


class Clock(TrainerCallback):
    """Notes when each step ends, and how many tokens were seen by then."""

    def __init__(self) -> None:
        self.tokens = 0
        self.ends: list[tuple[float, int]] = []

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        """A step has ended."""
        self.ends.append((time.perf_counter(), self.tokens))


def main(folder: Path, mode: str, steps: int) -> dict[str, float]:
    """Train, and say how fast."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("teacher", "student")
    )
    ids = np.load(folder / "ids.npy")
    batch, length = 8, ids.shape[1]
    quarter = length // 4
    messages = [
        {
            "messages": [
                {"role": "user", "content": tokenizer.decode(row[:quarter])},
                {"role": "assistant", "content": tokenizer.decode(row[quarter:])},
            ]
        }
        for row in ids
    ]
    config = GKDConfig(
        output_dir=str(folder / "trl_out"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        max_length=length,
        lmbda=0.0,
        temperature=1.0,
        learning_rate=1e-4,
        logging_steps=10**6,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **MODES[mode],
    )
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(messages),
        processing_class=tokenizer,
    )
    clock = Clock()
    compute_loss = trainer.compute_loss

    def counting(model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        clock.tokens += int(inputs["attention_mask"].sum())
        return compute_loss(model, inputs, *arguments, **named)

    trainer.compute_loss = counting
    trainer.add_callback(clock)
    result = trainer.train()
    (begun, before), (ended, after) = clock.ends[WARM_UP - 1], clock.ends[-1]
    return {
        "tokens_per_s": (after - before) / (ended - begun),
        "loss": result.training_loss,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
