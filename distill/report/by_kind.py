"""Block efficiency by kinds of steps: the length of the text that they continue, its category.

A table is mode -> kind of step -> tokens per target forward.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from distill.report.bootstrap import Interval, ratio, resamples
from distill.report.figures import Measurement

NUM_BINS = 4

Table = dict[str, dict[str, Interval]]


def by_length(
    measurements: Sequence[Measurement],
    modes: Sequence[str],
    prompt_lengths: Mapping[str, int],
    *,
    num_resamples: int,
    seed: int,
) -> Table:
    """τ of each mode by length of prompt and output before the step, as many steps in each range.

    Args:
        measurements: of all modes.
        modes: names.
        prompt_lengths: tokens of each prompt by its id.
        num_resamples: of the bootstrap over units.
        seed: of the bootstrap.
    """
    steps = _steps(measurements, modes, prompt_lengths)
    lengths = [length for rows in steps.values() for _, _, length, _ in rows]
    if not lengths:
        return {}
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, NUM_BINS + 1)).round().astype(int))
    inner = edges[1:-1]
    names = [
        f"{low}–{high}"
        for low, high in zip([edges[0], *inner], [*(inner - 1), edges[-1]], strict=True)
    ]
    kinds = {
        mode: [
            (unit, names[int(np.searchsorted(inner, length, side="right"))], emitted)
            for unit, _, length, emitted in rows
        ]
        for mode, rows in steps.items()
    }
    return _table(measurements, kinds, names, num_resamples, seed)


def by_category(
    measurements: Sequence[Measurement],
    modes: Sequence[str],
    categories: Mapping[str, str],
    *,
    num_resamples: int,
    seed: int,
) -> Table:
    """τ of each mode by category of the prompt; nothing where there are not two of them.

    Args:
        measurements: of all modes.
        modes: names.
        categories: of each prompt by its id.
        num_resamples: of the bootstrap over units.
        seed: of the bootstrap.
    """
    names = sorted(set(categories.values()))
    if len(names) < 2:
        return {}
    steps = _steps(measurements, modes, dict.fromkeys(categories, 0))
    kinds = {
        mode: [(unit, categories[prompt], emitted) for unit, prompt, _, emitted in rows]
        for mode, rows in steps.items()
    }
    return _table(measurements, kinds, names, num_resamples, seed)


def _steps(
    measurements: Sequence[Measurement], modes: Sequence[str], prompt_lengths: Mapping[str, int]
) -> dict[str, list[tuple[int, str, int, int]]]:
    """Of each mode (unit, prompt, length before it, tokens emitted) of each step.

    The prompt's own forward is none.
    """
    found: dict[str, list[tuple[int, str, int, int]]] = {mode: [] for mode in modes}
    for measured in measurements:
        if measured.mode not in found or measured.repeat:
            continue
        for output in measured.outputs:
            length = prompt_lengths[output.prompt_id]
            for number, (_, _, emitted, _) in enumerate(output.steps):
                if number:
                    row = (measured.unit, output.prompt_id, length, emitted)
                    found[measured.mode].append(row)
                length += emitted
    return found


def _table(
    measurements: Sequence[Measurement],
    kinds: Mapping[str, Sequence[tuple[int, str, int]]],
    names: Sequence[str],
    num_resamples: int,
    seed: int,
) -> Table:
    """From (unit, kind, tokens emitted) of every step of every mode."""
    num_units = 1 + max(m.unit for m in measurements)
    draws = resamples(num_units, num_resamples, seed)
    table: Table = {}
    for mode, rows in kinds.items():
        sums = np.zeros((2, len(names), num_units))
        for unit, name, emitted in rows:
            sums[:, names.index(name), unit] += emitted, 1
        table[mode] = {
            name: ratio(sums[0, place], sums[1, place], draws) for place, name in enumerate(names)
        }
    return table
