"""Block efficiency by the length of the text that a step continues."""

from collections.abc import Mapping, Sequence

import numpy as np

from distill.report.bootstrap import Interval, ratio, resamples
from distill.report.figures import Measurement

NUM_BINS = 4


def by_length(
    measurements: Sequence[Measurement],
    modes: Sequence[str],
    prompt_lengths: Mapping[str, int],
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, dict[str, Interval]]:
    """τ of each mode by length of prompt and output before the step.

    Args:
        measurements: of all modes.
        modes: names.
        prompt_lengths: tokens of each prompt by its id.
        num_resamples: of the bootstrap over units.
        seed: of the bootstrap.

    Returns:
        mode -> range of lengths, as many steps in each -> tokens per target forward.
    """
    found = {
        mode: [
            (m.unit, length, emitted)
            for m in measurements
            if m.mode == mode and m.repeat == 0
            for output in m.outputs
            for length, emitted in _steps(prompt_lengths[output.prompt_id], output.steps)
        ]
        for mode in modes
    }
    lengths = [length for rows in found.values() for _, length, _ in rows]
    if not lengths:
        return {}
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, NUM_BINS + 1)).round().astype(int))
    inner = edges[1:-1]
    num_units = 1 + max(m.unit for m in measurements)
    draws = resamples(num_units, num_resamples, seed)
    names = [
        f"{low}–{high}"
        for low, high in zip([edges[0], *inner], [*(inner - 1), edges[-1]], strict=True)
    ]
    table: dict[str, dict[str, Interval]] = {}
    for mode, rows in found.items():
        sums = np.zeros((2, len(names), num_units))
        for unit, length, emitted in rows:
            place = int(np.searchsorted(inner, length, side="right"))
            sums[:, place, unit] += emitted, 1
        table[mode] = {
            name: ratio(sums[0, place], sums[1, place], draws) for place, name in enumerate(names)
        }
    return table


def _steps(length: int, steps: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(length before it, tokens emitted) of each step behind the prompt's own forward."""
    rows = []
    for number, (_, _, emitted, _) in enumerate(steps):
        if number:
            rows.append((length, emitted))
        length += emitted
    return rows
