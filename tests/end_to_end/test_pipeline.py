"""The pipeline, killed again and again, ends as if nothing had happened."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from decode import SamplingParams
from distill.generate import Generate
from distill.prompts import StandardLibraryPrompts
from distill.store import RowStore
from distill.target import EMBEDDED, TargetSettings

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 24


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random target with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("target")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def start(target: Path, output: Path) -> subprocess.Popen[str]:
    overrides = [
        "experiment=quickstart",
        f"target.path={target}",
        f"output={output}",
        f"prompts.limit={NUM_PROMPTS}",
        f"held_out.limit={NUM_PROMPTS + 4}",
        "evaluation.limit=3",
        f"variants.text.data.prompts.limit={NUM_PROMPTS}",
        "sampling.max_new_tokens=24",
        "batch_size=4",
        "drafter.hidden_size=32",
        "trainer.steps=12",
        "trainer.evaluate_every=4",
        "trainer.checkpoint_every=2",
        "trainer.sequence_length=128",
        "compare_transformers=false",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "distill.pipeline", *overrides],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_pipeline_gives_the_same_rows_and_a_finished_report(
    target: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    moments = random.Random(7)
    for _ in range(4):
        process = start(target, output)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("[generate]"):
                break
        time.sleep(moments.uniform(0.1, 6.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(target, output)
    log, _ = process.communicate(timeout=300)
    assert process.returncode == 0, log

    undisturbed = Generate(
        target=TargetSettings(path=str(target)),
        prompts=StandardLibraryPrompts(limit=NUM_PROMPTS, prompt_tokens=64),
        sampling=SamplingParams(max_new_tokens=24),
        batch_size=7,
        output=tmp_path / "undisturbed",
    ).run()
    expected = {row.key: row for row in RowStore(undisturbed).rows()}
    store = RowStore(output / "generate" / "rows")
    assert {row.key: row for row in store.rows()} == expected
    written = [key for shard in store.shards() for key in pq.read_table(shard)["key"].to_pylist()]
    assert sorted(written) == sorted(expected)  # none missing, none twice
    assert "<html" in (output / "report" / "report.html").read_text()
    results = json.loads((output / "report" / "results.json").read_text())
    assert list(results["drafters"]) == ["text", "seq_kd", "seq_kd_forward_kl"]
    assert all(d["mismatches"] == 0 for d in results["drafters"].values())

    again = start(target, output)
    log, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    assert log.count("done already") == 8  # generate, three times train and export, evaluate
