"""How the table of trained drafters groups runs, resamples them and goes on with a journal."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from decode import Target
from decode.drafters import LMDrafter, NoDrafter
from distill.errors import UserError
from distill.prompts import Prompt
from distill.report.bootstrap import tail
from distill.runs import Run, at_last_step, rows_of

sys.path.append(str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours

from bench_drafters import (
    COUNTS,
    PLAIN,
    Mode,
    Output,
    Pair,
    Table,
    begin,
    cell,
    check_weights,
    measure,
    paired,
    read,
    report,
)

LM = {"type": "ScratchLM", "num_layers": 1}
MEDUSA = {"type": "Medusa", "num_heads": 4}
SPEEDS = [{"tokens": 100, "tokens_per_second": 10}, {"tokens": 200, "tokens_per_second": 100}]


def trained(folder: Path, seed: int, drafter: dict[str, Any], **settings: Any) -> Run:
    """A finished run, as far as the table reads it."""
    (folder / "drafter").mkdir(parents=True)
    both = {"drafter": {**drafter, "seed": seed}, "seed": seed, "data_hash": folder.name}
    (folder / "settings.json").write_text(json.dumps({"settings": both | settings}))
    lines = [json.dumps(line) for line in ({"step": 0, "heldout_tau": 1.0}, *SPEEDS)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    save_file({"weight": torch.full((2, 3), float(seed))}, folder / "drafter/model.safetensors")
    return Run(folder)


def give_target(run: Run, **measured: float) -> Run:
    """The same run, with a target that was trained with its drafter."""
    (run.drafter / "target").mkdir()
    (run.drafter / "draftsmith.json").write_text(json.dumps({"measured": measured}))
    return run


def seeds(rows: dict[str, list[Run]]) -> dict[str, list[int]]:
    """Of every row."""
    return {name: [run.seed() for run in runs] for name, runs in rows.items()}


def test_seeds_share_a_row_and_go_in_order(tmp_path: Path) -> None:
    runs = [
        trained(tmp_path / f"{drafter['type']}{seed}", seed, drafter)
        for seed in (2, 10, 0)
        for drafter in (LM, MEDUSA)
    ]
    assert seeds(rows_of(runs)) == {"ScratchLM": [0, 2, 10], "Medusa": [0, 2, 10]}


def test_fields_name_a_row_only_among_runs_of_the_same_class(tmp_path: Path) -> None:
    runs = [
        trained(tmp_path / "one", 0, LM),
        trained(tmp_path / "two", 0, LM | {"num_layers": 2}),
        trained(tmp_path / "medusa", 0, MEDUSA),
    ]
    assert set(rows_of(runs)) == {"num_layers 1, ScratchLM", "num_layers 2, ScratchLM", "Medusa"}


def test_paths_that_follow_the_seed_do_not_make_rows(tmp_path: Path) -> None:
    runs = [
        trained(
            tmp_path / str(seed),
            seed,
            {"type": "CheckpointLM", "path": f"runs/{seed}"},
            objective={"type": "AdaSPEC", "reference": f"references/{seed}"},
            reference_fingerprint=f"abc{seed}",
        )
        for seed in (0, 1)
    ]
    assert seeds(rows_of(runs)) == {"drafter": [0, 1]}


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (("a/seq/rows", "a/text/rows"), {"rows seq", "rows text"}),
        (("a/gen/rows", "b/gen/rows"), {"rows a/gen/rows", "rows b/gen/rows"}),
    ],
)
def test_paths_of_rows_are_short_where_that_tells_them_apart(
    tmp_path: Path, paths: Sequence[str], shown: set[str]
) -> None:
    runs = [
        trained(tmp_path / str(number), 0, LM, data={"type": "SeqKD", "rows": path})
        for number, path in enumerate(paths)
    ]
    assert set(rows_of(runs)) == shown


def checkpoint(run: Run, step: int, name: str, value: float) -> None:
    """Of that step."""
    folder = run.folder / f"checkpoints/step-{step:08}"
    folder.mkdir(parents=True)
    save_file({name: torch.full((2, 3), value)}, folder / "model.safetensors")


def test_the_last_weights_take_the_place_of_the_best(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", 5, LM, trainer={"steps": 20})
    (run.folder / "summary.json").write_text('{"best_step": 0}')
    checkpoint(run, 20, "weight", 7.0)
    last = at_last_step(run, tmp_path / "copy")
    assert last.name == run.name
    assert last.weights() != run.weights()
    assert load_file(last.drafter / "model.safetensors")["weight"].eq(7).all()
    assert load_file(run.drafter / "model.safetensors")["weight"].eq(5).all()


def test_a_best_that_is_the_last_is_taken_as_it_is(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", 5, LM, trainer={"steps": 20})
    (run.folder / "summary.json").write_text('{"best_step": 20}')
    assert at_last_step(run, tmp_path / "copy") is run


@pytest.mark.parametrize(
    ("step", "name", "said"), [(10, "weight", "no checkpoint of step 20"), (20, "other", "weights")]
)
def test_last_weights_that_are_not_there_are_missed(
    tmp_path: Path, step: int, name: str, said: str
) -> None:
    run = trained(tmp_path / "run", 5, LM, trainer={"steps": 20})
    (run.folder / "summary.json").write_text('{"best_step": 0}')
    checkpoint(run, step, name, 7.0)
    with pytest.raises(UserError, match=said):
        at_last_step(run, tmp_path / "copy")


@pytest.mark.parametrize("others", [[0], [0, 2], [0, 0]])
def test_rows_with_other_seeds_are_refused(tmp_path: Path, others: list[int]) -> None:
    runs = [trained(tmp_path / f"lm{seed}", seed, LM) for seed in (0, 1)]
    runs += [trained(tmp_path / f"m{n}", seed, MEDUSA) for n, seed in enumerate(others)]
    with pytest.raises(UserError, match=r"same seeds, each once .*ScratchLM: 0, 1; Medusa: 0"):
        rows_of(runs)


def test_a_row_says_how_far_its_own_targets_have_moved(tmp_path: Path) -> None:
    moved = [{"target_kl": kl, "target_agreement": 1 - kl} for kl in (0.01, 0.03)]
    runs = [
        give_target(trained(tmp_path / str(seed), seed, MEDUSA), **moved[seed]) for seed in (0, 1)
    ]
    (name,) = rows_of(runs)
    assert name == "own target (KL 0.020, agreement 0.980)"


def test_training_speed_is_all_tokens_over_all_seconds(tmp_path: Path) -> None:
    assert trained(tmp_path / "run", 0, LM).training() == (200, 100 / 10 + 100 / 100)


def counts(emitted: float, steps: float, seconds: float = 1.0) -> dict[str, float]:
    """Of an output that drafts three tokens a step and has every token tried."""
    accepted = emitted - steps
    return {
        "emitted": emitted,
        "steps": steps,
        "accepted": accepted,
        "tried": 3 * accepted,
        "tokens": emitted,
        "seconds": seconds,
    }


def test_prompts_and_seeds_are_resampled(tmp_path: Path) -> None:
    """Two prompts and two seeds: the 16 draws of both are known, and so are their ratios."""
    runs = [trained(tmp_path / str(seed), seed, LM) for seed in (0, 1)]
    emitted = np.array([[10.0, 30.0], [20.0, 40.0]])  # [S, P], of 10 steps each
    pairs = {
        (run.name, 0.0, f"p{p}"): Pair(counts(emitted[s, p], 10), counts(10, 10, 2.0))
        for s, run in enumerate(runs)
        for p in range(2)
    }
    table = Table(pairs, ["p0", "p1"], 2)
    tau = table.rate(runs, 0.0, "emitted", "steps")
    of_draws = [
        emitted[np.ix_([a, b], [c, d])].mean() / 10
        for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)
    ]  # fmt: skip
    assert tau[0] == 2.5
    assert set(tau[1:].round(6)) == set(np.round(of_draws, 6))
    assert abs(tau[1:].mean() - 2.5) < 0.1
    assert table.tau_of_seeds(runs, 0.0) == [2.0, 3.0]
    found = table.interval(tau)
    assert (found.value, found.low, found.high) == (
        2.5, *np.quantile(tau[1:], [tail(2), 1 - tail(2)])
    )  # fmt: skip
    assert table.speedup(runs, 0.0)[0] == (100 / 4) / (40 / 8)


def test_nothing_over_nothing_is_not_a_number(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", 0, LM)
    pairs = {(run.name, 0.0, p): Pair(counts(10, 10), counts(10, 10)) for p in ("a", "b")}
    table = Table(pairs, ["a", "b"], 1)
    alpha = table.rate([run], 0.0, "accepted", "tried")
    assert np.isnan(alpha).all()
    assert cell(table.interval(alpha)) == "–"


def test_a_row_with_its_own_target_is_not_compared(tmp_path: Path) -> None:
    first = give_target(trained(tmp_path / "own", 0, MEDUSA), target_kl=0.0, target_agreement=1.0)
    others = [trained(tmp_path / "lm", 0, LM), trained(tmp_path / "medusa", 0, MEDUSA)]
    rows = rows_of([first, *others])
    pairs = {
        (run.name, temperature, p): Pair(counts(20 + 10 * n, 10), counts(10, 10, 2.0))
        for n, run in enumerate([first, *others])
        for temperature in (0.0, 1.0)
        for p in ("a", "b")
    }
    lines, figures = report(rows, Table(pairs, ["a", "b"], 1))
    changes = [line[lines[0].index("change of τ, T=0")] for line in lines[1:]]
    assert changes == ["–", "–", "+33.3 % [+33.3, +33.3]"]
    assert figures[next(iter(rows))]["T=0"]["change"] is None


def test_outputs_that_shared_a_batch_have_no_speed(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", 0, LM)
    pairs = {
        (run.name, t, p): Pair(counts(20, 10), counts(10, 10))
        for t in (0.0, 1.0)
        for p in ("a", "b")
    }
    rows = rows_of([run])
    for is_timed in (True, False):
        lines, figures = report(rows, Table(pairs, ["a", "b"], 1, is_timed=is_timed))
        assert (lines[1][lines[0].index("speed, T=0")] != "–") is is_timed
        assert (figures[next(iter(rows))]["T=1"]["speed"] is not None) is is_timed


def test_a_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    begin(journal, {"draft_length": 4, "prompts": {"limit": 2}})
    output = Output(1, "run", "abc", 0.0, "p", counts(20, 10))
    with journal.open("a") as file:
        file.write(json.dumps(asdict(output)) + "\n" + json.dumps(asdict(output))[:20])
    begin(journal, {"prompts": {"limit": 2}, "draft_length": 4})
    assert read(journal) == [output]
    with pytest.raises(UserError, match=r"other settings \(prompts.limit differ\)"):
        begin(journal, {"draft_length": 4, "prompts": {"limit": 3}})


def test_a_journal_of_other_weights_is_refused(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", 0, LM)
    outputs = [Output(1, run.name, run.weights(), 0.0, "p", counts(20, 10))]
    check_weights(outputs, {run.name: run.weights()}, tmp_path)
    save_file({"weight": torch.ones(2, 3)}, run.drafter / "model.safetensors")
    with pytest.raises(UserError, match="with other weights"):
        check_weights(outputs, {run.name: run.weights()}, tmp_path)


def test_an_output_counts_only_beside_the_plain_loop_of_its_session() -> None:
    def output(session: int, mode: str, seconds: float) -> Output:
        return Output(session, mode, "", 0.0, "p", counts(10, 10, seconds))

    outputs = [
        output(1, PLAIN, 1.0),
        output(1, "one", 2.0),
        output(2, "two", 3.0),
        output(3, PLAIN, 4.0),
        output(3, "three", 5.0),
    ]
    found = paired(outputs, dict.fromkeys(("one", "two", "three"), PLAIN))
    seconds = {name: (p.own["seconds"], p.plain["seconds"]) for (name, _, _), p in found.items()}
    assert seconds == {"one": (2.0, 1.0), "three": (5.0, 4.0)}


@pytest.mark.parametrize("batch", [2, 3])
def test_prompts_are_measured_together_and_once(
    tmp_path: Path, tiny: Any, perturbed: Any, prompt: Any, batch: int
) -> None:
    model = tiny("llama")
    prompts = [Prompt(str(n), prompt(n), "", None, "") for n in (5, 7, 9)]

    def modes(batch: int) -> dict[str, Mode]:
        target = Target(model, max_batch_size=batch)
        drafter = LMDrafter(perturbed(model), target=target, draft_length=3)
        plain = Mode(PLAIN, "", PLAIN, target, NoDrafter())
        return {PLAIN: plain, "lm": Mode("lm", "", PLAIN, target, drafter)}

    def counted(batch: int, name: str) -> dict[tuple[float, str], list[float]]:
        journal = tmp_path / name
        begin(journal, {})
        pairs = measure(modes(batch), prompts, 12, batch, journal)
        assert len(measure(modes(batch), prompts, 12, batch, journal)) == len(pairs) == 6
        assert len(read(journal)) == 12
        return {key[1:]: [pair.own[c] for c in COUNTS[:-1]] for key, pair in pairs.items()}

    assert counted(batch, "together") == counted(1, "one by one")
