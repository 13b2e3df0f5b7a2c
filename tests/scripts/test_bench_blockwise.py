"""The table of k, backbone and data: cells by hand, and what was not trained stays empty."""

import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours

from bench_blockwise import Cell, report


def test_a_table_by_hand() -> None:
    """Prompts that are all alike: intervals are points."""

    def counts(tau: float) -> np.ndarray:
        return np.array([[[10 * tau] * 3, [10.0] * 3]])  # [S, 2, P]

    cells: dict[Cell, np.ndarray] = {
        (2, "frozen", "text"): counts(1.2),
        (2, "frozen", "Seq-KD"): counts(1.5),
        (4, "frozen", "Seq-KD"): counts(2.0),
        (2, "fine-tuned", "text"): counts(1.8),
    }
    lines, figures = report(cells, {(2, "fine-tuned", "text"): (0.123, 0.9)})
    found = {name: cells for name, *cells in lines}
    assert found[""] == ["k = 2", "k = 4"]
    assert found["frozen, text"] == ["1.20 [1.20, 1.20]", "–"]
    assert found["frozen, Seq-KD"] == ["1.50 [1.50, 1.50]", "2.00 [2.00, 2.00]"]
    assert found["frozen: Seq-KD over text"] == ["+25.0 % [+25.0, +25.0]", "–"]
    assert found["fine-tuned: Seq-KD over text"] == ["–", "–"]
    assert found["text: fine-tuned over frozen"] == ["+50.0 % [+50.0, +50.0]", "–"]
    assert found["text: how far the target moved"] == ["KL 0.12, 90% alike", "–"]
    assert figures[0]["k=2"]["value"] == 1.2


def test_seeds_are_pooled_and_told_apart() -> None:
    """Forwards are summed, not rates averaged: a seed that needs more of them counts for more."""

    def seed(tau: float, steps: float) -> np.ndarray:
        return np.array([[tau * steps] * 3, [steps] * 3])  # [2, P]

    lines, figures = report({(2, "frozen", "text"): np.stack([seed(1.2, 10), seed(1.6, 30)])}, {})
    found = {name: cells for name, *cells in lines}
    assert found["frozen, text"] == ["1.50 [1.20, 1.60]"]
    assert found["frozen, text: of the seeds"] == ["1.20–1.60"]
    assert found["frozen, Seq-KD: of the seeds"] == ["–"]
    by_row = {figure["row"]: figure for figure in figures}
    np.testing.assert_allclose(by_row["frozen, text: of the seeds"]["k=2"], [1.2, 1.6])
