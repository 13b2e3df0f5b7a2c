"""The speed that the theory expects of a drafter's figures, beside the one that was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.report.figures import AUTOREGRESSIVE, DrafterFigures
from distill.report.tables import StepTimes


@dataclass(frozen=True, slots=True)
class Prediction:
    """Speedups over autoregressive decoding, the prompts' own forwards left out.

    Attributes:
        draft_length: γ, the mean one, rounded.
        c: drafting one token over an autoregressive step's forward.
        v: the verifying forward over the autoregressive one, v(γ).
        ideal: (1 - α^(γ+1)) / ((1 - α) (γ c + 1)), Leviathan et al. 2023, theorem 3.8: a verifying
            forward costs what one on a single token does, and every token is accepted alike.
        with_costs: the same tokens over what drafting, verifying and the loop really took. What
            is still missing to `measured` is that acceptance is not alike at every position.
        measured: tokens per second of steps.
    """

    draft_length: int
    c: float
    v: float
    ideal: float
    with_costs: float
    measured: float


def predict(
    drafters: Sequence[DrafterFigures], times: Mapping[str, StepTimes]
) -> dict[str, Prediction]:
    """By name; drafters of trees, and those that hardly draft, are left out.

    Args:
        drafters: their figures.
        times: milliseconds of a step by phase ("draft", "verify", "step"), also of the
            autoregressive loop.
    """
    plain = {phase: interval.value for phase, interval in times[AUTOREGRESSIVE].items()}
    found = {}
    for drafter in drafters:
        spent = {phase: interval.value for phase, interval in times[drafter.name].items()}
        drafted = 0.0  # tokens per step
        if drafter.draft_acceptance_rate.value > 0:
            accepted = drafter.block_efficiency.value - 1
            drafted = accepted / drafter.draft_acceptance_rate.value
        length = round(drafted)
        is_tree = drafted > len(drafter.accepted_at) + 0.01
        if length < 1 or is_tree:
            continue
        c, v = spent["draft"] / length / plain["verify"], spent["verify"] / plain["verify"]
        tokens = sum(drafter.alpha.value**accepted for accepted in range(length + 1))
        found[drafter.name] = Prediction(
            draft_length=length,
            c=c,
            v=v,
            ideal=tokens / (length * c + 1),
            with_costs=tokens * plain["step"] / spent["step"],
            measured=drafter.block_efficiency.value * plain["step"] / spent["step"],
        )
    return found
