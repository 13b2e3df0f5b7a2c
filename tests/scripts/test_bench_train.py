"""What the ratios of the training benchmark divide by."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from bench_train import OURS, TRL, over_trl


def test_ours_is_held_against_the_best_setting_of_the_same_divergence() -> None:
    speeds = {
        "live": 1200, "live_fp32": 600, "stored": 2400, "live_jsd": 700, "live_jsd_fp32": 300,
        "trl_forward_kl_fp32": 200, "trl_forward_kl_bf16": 600, "trl_forward_kl_defaults": 400,
        "trl_jsd_fp32": 700, "trl_jsd_bf16": 100,
    }  # fmt: skip
    assert speeds.keys() == {*OURS, *(f"trl_{mode}" for mode in TRL)}
    peaks = dict.fromkeys(speeds, 800.0) | {"trl_forward_kl_defaults": 500.0, "trl_jsd_bf16": 100.0}
    figures = {mode: {"tokens_per_s": speeds[mode], "peak_mb": peaks[mode]} for mode in speeds}
    assert over_trl(figures) == {
        "tokens_per_s_over_trl": 1200 / 600,
        "stored_tokens_per_s_over_trl": 2400 / 600,
        "jsd_tokens_per_s_over_trl": 700 / 700,
        "peak_memory_over_trl": 800 / 500,
        "tokens_per_s_fp32_over_trl_fp32": 600 / 200,
        "jsd_tokens_per_s_fp32_over_trl_fp32": 300 / 700,
    }
