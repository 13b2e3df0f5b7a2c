"""`draftsmith evaluate`: what drafters gain on prompts, with honest statistics."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from decode import (
    AcceptanceRule,
    Certificate,
    Drafter,
    Exactness,
    GenerationResult,
    GenerationStats,
    SamplingParams,
    SpeculativeDecoder,
    StepRecord,
    Target,
    certify,
    compare,
    lay_out_for_decoding,
)
from decode.acceptance import SpeculativeSampling
from decode.drafters import Drafting, ModelFree, NoDrafter, load_drafter
from distill.batches import FixedData
from distill.config import command
from distill.drafter_folder import (
    check_target,
    find_drafter,
    read_description,
    weights_hash,
)
from distill.errors import UserError
from distill.measure import Learner, Mode, begin_anew, measure
from distill.past import past_hash, past_outputs
from distill.progress import Progress
from distill.prompts import Prompt, PromptSettings, StandardLibraryPrompts
from distill.report.bootstrap import FEW
from distill.report.figures import (
    AUTOREGRESSIVE,
    TRANSFORMERS,
    DrafterFigures,
    Measurement,
    figures,
)
from distill.report.html import passages_of
from distill.report.tables import terminal, verdicts
from distill.report.writing import write_report
from distill.run_folder import RunFolder, describe, environment, write_json, write_text
from distill.target import LoadedTarget, Quantization, TargetSettings


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Run target and drafters on prompts, interleaved, and compare them.

    Attributes:
        target: whose output is to be had faster.
        drafters: name -> checkpoint folder; the first is the one others are paired with.
        model_free: name -> how to draft without a model; these come behind the drafters. What
            learns from outputs learns in the order of the prompts.
        past: what drafters that learn from outputs have seen before; without it nothing. Outputs of
            the prompts that are evaluated are left out.
        prompts: what is continued.
        sampling: how.
        acceptance: the rule.
        draft_length: tokens per draft.
        draft: how to draft otherwise; None makes chains of `draft_length` tokens.
        batch_size: prompts decoded together; these then are one unit of the statistics.
        repeats: timings of each unit.
        certify: compare greedy outputs with transformers' own `generate` before measuring, and keep
            every difference, with the margin there, in certificate.json.
        trace: decode everything once more, apart from the timings, and keep every step in
            trace.jsonl: the draft, the accepted path, the times; the page then draws the drafts.
        compare_transformers: time transformers' own `generate` too (batches of one only).
        num_resamples: of the bootstrap.
        num_threads: CPU threads; None leaves torch's choice.
        title: of the report.
        output: the run folder.
        seed: of draws and bootstrap.
    """

    target: TargetSettings = field(default_factory=TargetSettings)
    drafters: dict[str, str] = field(default_factory=dict)
    model_free: dict[str, ModelFree] = field(default_factory=dict)
    past: FixedData | None = None
    prompts: PromptSettings = field(
        default_factory=lambda: StandardLibraryPrompts(split="evaluate", limit=32)
    )
    sampling: SamplingParams = field(default_factory=SamplingParams)
    acceptance: AcceptanceRule = field(default_factory=SpeculativeSampling)
    draft_length: int = 5
    draft: Drafting | None = None
    batch_size: int = 1
    repeats: int = 1
    certify: bool = False
    trace: bool = False
    compare_transformers: bool = True
    num_resamples: int = 2000
    num_threads: int | None = None
    title: str = "Draftsmith evaluation"
    output: Path
    seed: int = 0

    def run(self) -> Path:
        """Measure what is not measured yet and write the report; returns its path.

        Raises:
            UserError: a drafter is unfinished or of another target, there are too few prompts, or
                the folder holds other work.
        """
        self._check_names()
        if self.target.compile and self.batch_size > 1:
            raise UserError(
                "target.compile=true is for prompts decoded one by one, and "
                f"batch_size={self.batch_size}",
                hint="leave out one of the two",
            )
        folders = {name: find_drafter(path) for name, path in self.drafters.items()}
        settings = self._settings(folders)
        folder = RunFolder(self.output, settings)
        report = self.output / "report.html"
        if folder.begin() is not None and report.is_file():
            print(f"{self.output} is finished: {report}")
            return report
        if self.num_threads:
            torch.set_num_threads(self.num_threads)
        target = self.target.load(is_only_decoded=True, may_have_encoder=True)
        lay_out_for_decoding(target.model)
        prompts = self._load_prompts(target)
        longest = max(len(prompt.ids) for prompt in prompts)
        wrapped = Target(
            target.model,
            max_batch_size=self.batch_size,
            max_length=target.cache_length(longest, self.sampling.max_new_tokens),
            compiles=self.target.compile,
        )
        loaded = self._load_drafters(target, wrapped, folders)
        certificates = self._certify(wrapped, loaded, prompts) if self.certify else {}
        modes = self._modes(target, wrapped, loaded)
        units = [
            prompts[begin : begin + self.batch_size]
            for begin in range(0, len(prompts), self.batch_size)
        ]
        learners = {
            name: drafter for name, drafter in loaded.items() if isinstance(drafter, Learner)
        }
        journal = self.output / "measurements.jsonl"
        past = []
        if self.past is not None:
            past = past_outputs(self.past, target.tokenizer, prompts, learners.values())
        measurements = measure(modes, units, self.repeats, journal, learners, past)
        ties = self._compare(target, measurements, prompts)
        traces = self._trace(target, wrapped, loaded, units, past) if self.trace else {}
        drafters = figures(
            measurements,
            self.names,
            is_greedy=self.sampling.temperature == 0,
            ties=ties,
            num_resamples=self.num_resamples,
            seed=self.seed,
        )
        self._write(target, drafters, measurements, prompts, settings, certificates, traces)
        folder.finish({"report": report.name, "prompts": len(prompts)})
        print(terminal(drafters, self._exactness()))
        print("\n".join(verdicts(drafters, self._exactness())))
        if relative := self._relative_to():
            print(f"{self._exactness()} is{relative.lstrip(',')}.")
        if len(prompts) <= (FEW - 1) * self.batch_size:
            print("These are few prompts: the intervals are too narrow; give more.")
        print(f"report: {report}")
        return report

    @property
    def names(self) -> list[str]:
        """Of all drafters, in the order of the tables."""
        return [*self.drafters, *self.model_free]

    def _check_names(self) -> None:
        if not self.names:
            raise UserError(
                "there is no drafter to evaluate",
                hint="name one: drafters.mine=FOLDER or, without a model, model_free=[suffix]",
            )
        if {AUTOREGRESSIVE, TRANSFORMERS} & set(self.names):
            raise UserError(f"a drafter cannot be called {AUTOREGRESSIVE!r} or {TRANSFORMERS!r}")
        if twice := self.drafters.keys() & self.model_free.keys():
            raise UserError(f"two drafters are called {min(twice)!r}")

    def _settings(self, folders: Mapping[str, str]) -> dict[str, Any]:
        """What decides the figures, the drafters' descriptions included."""
        settings: dict[str, Any] = describe(self)
        del settings["output"]
        settings["descriptions"] = {name: read_description(path) for name, path in folders.items()}
        settings["weights"] = {name: weights_hash(Path(path)) for name, path in folders.items()}
        if self.past is not None:
            settings["past_hash"] = past_hash(self.past)
        return settings

    def _load_prompts(self, target: LoadedTarget) -> list[Prompt]:
        """The prompts whose output fits the context: one cut off there is nobody's measure."""
        loaded = self.prompts.load(target.tokenizer)
        longest = self.sampling.max_new_tokens
        prompts = [prompt for prompt in loaded if target.fits(len(prompt.ids), longest)]
        if len(prompts) < len(loaded):
            left_out = len(loaded) - len(prompts)
            print(f"{left_out} prompts are left out: with their output they exceed the context")
        if len(prompts) <= self.batch_size:
            raise UserError(
                f"{len(prompts)} prompts fit the context, decoded {self.batch_size} at a time: "
                "intervals need two such units at least",
                hint="give more or shorter prompts, or a smaller batch_size",
            )
        return prompts

    def _relative_to(self) -> str:
        """What exactness is relative to, where that is not the target as stored."""
        quantization = self.target.quantization
        if quantization is Quantization.none:
            return ""
        return f", relative to the target in {quantization.value}"

    def _exactness(self) -> str:
        is_lossless = self.acceptance.exactness is Exactness.LOSSLESS
        if is_lossless and self.sampling.temperature == 0:
            return Exactness.GREEDY.value
        return self.acceptance.exactness.value

    def _load_drafters(
        self, target: LoadedTarget, wrapped: Target, folders: Mapping[str, str]
    ) -> dict[str, Drafter]:
        drafters = {}
        for name, path in folders.items():
            check_target(read_description(path), path, target)
            try:
                drafters[name] = load_drafter(
                    path,
                    target=wrapped,
                    draft=self.draft or self.draft_length,
                    tokenizer=target.tokenizer,
                )
            except ValueError as error:
                raise UserError(str(error), hint=f"check drafters.{name}") from error
        for name, settings in self.model_free.items():
            try:
                drafters[name] = settings.build(wrapped)
            except ValueError as error:
                raise UserError(str(error), hint=f"check model_free.{name}") from error
        return drafters

    def _certify(
        self, wrapped: Target, drafters: Mapping[str, Drafter], prompts: Sequence[Prompt]
    ) -> dict[str, Certificate]:
        """Greedy identity of every drafter, by transformers' own `generate`; also on disk."""
        certificates = {}
        with Progress(len(drafters), unit="drafters", label="certify") as progress:
            for name, drafter in drafters.items():
                certificates[name] = certify(
                    wrapped,
                    drafter,
                    [prompt.ids for prompt in prompts],
                    max_new_tokens=self.sampling.max_new_tokens,
                    ignore_eos=self.sampling.ignore_eos,
                )
                progress.advance(1)
        for name, certificate in certificates.items():
            print(f"{name}: {certificate}")
        contents = {name: asdict(certificate) for name, certificate in certificates.items()}
        write_json(self.output / "certificate.json", contents)
        return certificates

    def _modes(
        self, target: LoadedTarget, wrapped: Target, drafters: Mapping[str, Drafter]
    ) -> dict[str, Mode]:
        modes: dict[str, Mode] = {AUTOREGRESSIVE: self._ours(target, wrapped, NoDrafter())}
        if self._why_not_theirs() is None:
            modes[TRANSFORMERS] = self._theirs(target, wrapped)
        for name, drafter in drafters.items():
            modes[name] = self._ours(target, wrapped, drafter)
        return modes

    def _ours(
        self,
        target: LoadedTarget,
        wrapped: Target,
        drafter: Drafter,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> Mode:
        decoder = SpeculativeDecoder(
            wrapped, drafter, self.acceptance, tokenizer=target.tokenizer, on_step=on_step
        )

        def run(prompts: Sequence[Prompt]) -> tuple[list[GenerationResult], float]:
            requests = [
                wrapped.request(
                    p.ids, id=p.id, sampling=self.sampling, seed=self.seed, material=p.material
                )
                for p in prompts
            ]
            started = time.perf_counter()
            results = decoder.generate(requests)
            return results, time.perf_counter() - started

        return run

    def _trace(
        self,
        target: LoadedTarget,
        wrapped: Target,
        drafters: Mapping[str, Drafter],
        units: Sequence[Sequence[Prompt]],
        past: Sequence[Sequence[int]],
    ) -> dict[str, list[StepRecord]]:
        """Every step of every drafter; trace.jsonl appears when it is whole."""
        records: dict[str, list[StepRecord]] = {name: [] for name in drafters}
        lines = []
        with Progress(len(drafters) * len(units), unit="runs", label="trace") as progress:
            for name, drafter in drafters.items():
                if isinstance(drafter, Learner):
                    begin_anew(drafter, past)
                run = self._ours(target, wrapped, drafter, on_step=records[name].append)
                for unit in units:
                    run(unit)
                    progress.advance(1)
                lines += [json.dumps({"drafter": name} | asdict(r)) for r in records[name]]
        write_text(self.output / "trace.jsonl", "\n".join(lines) + "\n")
        return records

    def _why_not_theirs(self) -> str | None:
        """Why transformers' `generate` is not timed; it pads batches and stops otherwise."""
        if not self.compare_transformers:
            return "not timed: compare_transformers=false"
        if self.batch_size > 1:
            return "not timed: batch_size is above 1"
        return "not timed: there are stop strings" if self.sampling.stop else None

    def _theirs(self, target: LoadedTarget, wrapped: Target) -> Mode:
        """The `generate` of transformers, with the same sampling."""
        params, model = self.sampling, target.model
        eos = None if params.ignore_eos else model.generation_config.eos_token_id
        is_sampling = params.temperature > 0
        begins = wrapped.decoder_prompt()  # a forced token counts as new there
        # Not as a GenerationConfig: what is None there is filled in from the model's own.
        settings = {
            "max_new_tokens": params.max_new_tokens + max(0, len(begins) - 1),
            "do_sample": is_sampling,
            "num_beams": 1,
            "temperature": params.temperature if is_sampling else None,
            "top_k": params.top_k if is_sampling else None,
            "top_p": params.top_p if is_sampling else None,
            "min_p": params.min_p if is_sampling and params.min_p else None,
            "repetition_penalty": params.repetition_penalty
            or model.generation_config.repetition_penalty,
            "eos_token_id": eos,
            "pad_token_id": 0,
        }

        def run(prompts: Sequence[Prompt]) -> tuple[list[GenerationResult], float]:
            ids = torch.tensor([prompts[0].ids], device=model.device)
            torch.manual_seed(self.seed)
            started = time.perf_counter()
            with torch.inference_mode():
                output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            tokens = output[0, len(begins) or ids.shape[1] :].tolist()
            seconds = time.perf_counter() - started
            return [
                GenerationResult(prompts[0].id, tokens, "length", GenerationStats(), [])
            ], seconds

        return run

    def _compare(
        self, target: LoadedTarget, measurements: Sequence[Measurement], prompts: Sequence[Prompt]
    ) -> dict[str, tuple[int, int]]:
        """Greedy outputs against the autoregressive ones: mismatches, and near ties among them."""
        if self.sampling.temperature > 0:
            return dict.fromkeys(self.names, (0, 0))
        outputs = {
            (m.mode, output.prompt_id): output.tokens
            for m in measurements
            if m.repeat == 0
            for output in m.outputs
        }
        ties = {}
        for name in self.names:
            found = [
                compare(
                    target.model, p.id, p.ids, outputs[AUTOREGRESSIVE, p.id], outputs[name, p.id]
                )
                for p in prompts
            ]
            wrong = [mismatch for mismatch in found if mismatch is not None]
            ties[name] = (len(wrong), sum(mismatch.near_tie for mismatch in wrong))
        return ties

    def _write(
        self,
        target: LoadedTarget,
        drafters: Sequence[DrafterFigures],
        measurements: Sequence[Measurement],
        prompts: Sequence[Prompt],
        settings: Mapping[str, Any],
        certificates: Mapping[str, Certificate],
        traces: Mapping[str, Sequence[StepRecord]],
    ) -> None:
        exactness, relative = self._exactness(), self._relative_to()
        about = environment()
        num_units = 1 + max(m.unit for m in measurements)
        doubt = f"; {num_units} units are few: intervals are too narrow" if num_units < FEW else ""
        facts = {
            "command": command_line(),
            "target": f"{target.path} ({target.fingerprint})",
            "drafters": ", ".join(
                [
                    *(f"{n}: {p} ({settings['weights'][n]})" for n, p in self.drafters.items()),
                    *(f"{n}: {settings}" for n, settings in self.model_free.items()),
                ]
            ),
            "prompts": f"{len(prompts)}, {self.prompts}",
            "seen before": str(self.past or "nothing"),
            "sampling": self.sampling,
            "acceptance rule": f"{type(self.acceptance).__name__}: {exactness}{relative}",
            "drafts": self.draft or f"chains of {self.draft_length}",
            "batch size": self.batch_size,
            "certificate": "; ".join(f"{n}: {c}" for n, c in certificates.items()) or "not asked",
            "timings of each": self.repeats,
            "order": "interleaved by prompt, rotated; one prompt to warm up is not counted",
            "transformers' generate": self._why_not_theirs() or "timed on the same prompts",
            "bootstrap": f"{self.num_resamples} resamples of {num_units} units, seed {self.seed}",
            "threads": torch.get_num_threads(),
            "machine": about["machine"],
            "versions": ", ".join(f"{k} {v}" for k, v in about["versions"].items()),
            "source": about["git"],
        }
        mode = "greedy" if self.sampling.temperature == 0 else f"T = {self.sampling.temperature}"
        write_report(
            self.output,
            title=self.title,
            lead=f"{len(drafters)} drafters for {target.path}, {len(prompts)} prompts, {mode}, "
            f"{self.draft or f'draft length {self.draft_length}'}; {exactness}"
            f"{relative}{doubt}",
            facts=facts,
            exactness=exactness,
            drafters=drafters,
            measurements=measurements,
            prompts=prompts,
            passages={
                d.name: passages_of(target, prompts, measurements, d.name, traces.get(d.name, ()))
                for d in drafters
            },
            num_resamples=self.num_resamples,
            seed=self.seed,
            record={
                "settings": settings,
                "target_fingerprint": target.fingerprint,
                "environment": about,
            },
        )


def command_line() -> str:
    """What was typed; a console script is shown by its name alone."""
    interpreter, *words = sys.orig_argv
    if words and Path(words[0]).name == "draftsmith":
        return shlex.join(["draftsmith", *words[1:]])
    return shlex.join([Path(interpreter).name, *words])


main = command("evaluate", Evaluate)

if __name__ == "__main__":
    main()
