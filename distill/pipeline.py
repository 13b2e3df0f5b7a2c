"""`draftsmith pipeline`: generate, train, export, evaluate, each once."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decode import SamplingParams
from distill.config import command
from distill.drafter_folder import DESCRIPTION
from distill.errors import UserError
from distill.evaluate import Evaluate
from distill.export import Export, write_card
from distill.families import makes_heads
from distill.generate import Generate
from distill.loop import TrainerSettings
from distill.prompts import PromptSettings, StandardLibraryPrompts
from distill.regimes import TrainingData, with_rows
from distill.report.figures import load_results
from distill.run_folder import content_hash, write_json
from distill.shrinking import DrafterSettings
from distill.store import RowStore
from distill.target import TargetSettings
from distill.tracking import NoTracker, Tracker
from distill.train import Train


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One drafter of the comparison: what it learns from, and towards what.

    Attributes:
        data: any; Seq-KD rows are the pipeline's own where no folder is named.
        objective: what is minimised.
    """

    data: TrainingData
    objective: Any


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The whole life of one or several drafters of one architecture and budget.

    Attributes:
        target: whose output the drafters learn to predict.
        prompts: what the target continues for training.
        held_out: prompts on which training measures τ; they are kept out of the training data.
        evaluation: prompts of the final comparison.
        sampling: of generation and evaluation.
        drafter: the architecture.
        variants: name -> data and objective; the first is what the others are compared with.
        trainer: the budget of each.
        tracker: where training reports to.
        title: of the report.
        output: the folder of everything.
        num_samples: outputs per prompt.
        batch_size: sequences generated at a time.
        draft_length: tokens per draft, in training's measurements and in the evaluation.
        compare_transformers: time transformers' own `generate` too.
        repeats: timings per prompt.
        evaluation_threads: CPU threads while timing; None leaves torch's choice.
        seed: of everything.
    """

    target: TargetSettings = field(default_factory=TargetSettings)
    prompts: PromptSettings = field(default_factory=StandardLibraryPrompts)
    held_out: PromptSettings = field(default_factory=StandardLibraryPrompts)
    evaluation: PromptSettings = field(default_factory=StandardLibraryPrompts)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    drafter: DrafterSettings
    variants: dict[str, Variant]
    trainer: TrainerSettings
    tracker: Tracker = field(default_factory=NoTracker)
    title: str = "Draftsmith pipeline"
    output: Path
    num_samples: int = 1
    batch_size: int = 32
    draft_length: int = 5
    compare_transformers: bool = True
    repeats: int = 1
    evaluation_threads: int | None = None
    seed: int = 0

    def run(self) -> Path:
        """Run what is not done yet; returns the path of the report.

        Raises:
            UserError: a step cannot use its input.
        """
        if not self.variants:
            raise UserError("the pipeline has no variants", hint="name at least one drafter")
        self.target.load_config(may_have_encoder=makes_heads(self.drafter))
        rows = self._generate()
        drafters = {name: self._drafter(name, rows) for name in self.variants}
        return self._evaluate(drafters)

    def _generate(self) -> Path:
        generate = Generate(
            target=self.target,
            prompts=self.prompts,
            sampling=self.sampling,
            output=self.output / "generate",
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        self._once("generate", generate, generate.output / "summary.json", generate.run)
        return generate.output / "rows"

    def _drafter(self, name: str, rows: Path) -> Path:
        variant = self.variants[name]
        train = Train(
            target=self.target,
            drafter=self.drafter,
            objective=variant.objective,
            data=with_rows(variant.data, rows),
            trainer=self.trainer,
            tracker=self.tracker,
            prompts=self.held_out,
            sampling=self.sampling,
            draft_length=self.draft_length,
            output=self.output / "train" / name,
            seed=self.seed,
        )
        trained = train.output / "drafter" / "draftsmith.json"
        inputs = [train, RowStore(rows).content_hash()]
        self._once(f"train/{name}", inputs, trained, train.run)
        export = Export(
            checkpoint=train.output,
            target=self.target,
            output=self.output / "drafters" / name,
            draft_length=self.draft_length,
        )
        inputs = [export, trained.read_text()]
        self._once(f"drafters/{name}", inputs, export.output / "config.json", export.run)
        return export.output

    def _evaluate(self, drafters: Mapping[str, Path]) -> Path:
        evaluate = Evaluate(
            target=self.target,
            drafters={name: str(path) for name, path in drafters.items()},
            prompts=self.evaluation,
            sampling=self.sampling,
            draft_length=self.draft_length,
            compare_transformers=self.compare_transformers,
            repeats=self.repeats,
            num_threads=self.evaluation_threads,
            title=self.title,
            output=self.output / "report",
            seed=self.seed,
        )
        results = evaluate.output / "results.json"
        inputs = [evaluate, *[(path / DESCRIPTION).read_text() for path in drafters.values()]]
        if not self._once("report", inputs, results, evaluate.run):
            print((evaluate.output / "results.md").read_text())
            print(f"report: {evaluate.output / 'report.html'}")
        for name, path in drafters.items():
            write_card(path, measured_in_evaluation(load_results(evaluate.output), name))
        return evaluate.output / "report.html"

    def _once(self, step: str, inputs: object, product: Path, run: Callable[[], object]) -> bool:
        """Run a step, unless its product is there and was made from the same inputs.

        A step's name is its folder below `output`. What was made there from other inputs is put
        aside as `<folder>.old`, which replaces an older one.

        Returns:
            whether it was run.
        """
        record = self.output / "steps.json"
        steps = json.loads(record.read_text()) if record.is_file() else {}
        now = content_hash(inputs)
        if steps.get(step) == now and product.exists():
            print(f"[{step}] done already")
            return False
        if steps.get(step, now) != now:
            folder = self.output / step
            print(f"[{step}] its inputs have changed: the earlier one is put aside")
            shutil.rmtree(folder.with_name(f"{folder.name}.old"), ignore_errors=True)
            if folder.exists():
                folder.rename(folder.with_name(f"{folder.name}.old"))
        # Noted before the work: a step that was cut off is gone on with, not put aside.
        write_json(record, {**steps, step: now})
        print(f"[{step}]")
        run()
        return True


def measured_in_evaluation(results: Mapping[str, Any], name: str) -> str:
    """One drafter's figures of the final comparison, as a Markdown passage for its card."""
    d = results["drafters"][name]
    figures = {
        "τ, tokens per target pass": d["block_efficiency"],
        "α, accepted / tried draft tokens": d["alpha"],
        "speedup over our autoregressive loop": d["speedup_over_autoregressive"],
        "speedup over transformers' generate": d["speedup_over_transformers"],
    }
    rows = "\n".join(
        f"| {figure} | {x['value']:.3f} | {x['low']:.3f} to {x['high']:.3f} |"
        for figure, x in figures.items()
        if x is not None
    )
    settings = results["settings"]
    return (
        f"`draftsmith evaluate`, drafts of {settings['draft_length']} tokens, temperature "
        f"{settings['sampling']['temperature']}, {results['num_prompts']} prompts; output "
        f"{results['exactness']}; 95 % bootstrap intervals.\n\n"
        f"| figure | value | interval |\n| --- | --- | --- |\n{rows}"
    )


main = command("pipeline", Pipeline)

if __name__ == "__main__":
    main()
