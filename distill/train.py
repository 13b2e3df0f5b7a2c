"""`draftsmith train`: align a drafter to the target."""

import atexit
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from transformers import AutoTokenizer

from decode import (
    SamplingParams,
    SpeculativeDecoder,
    Target,
    check_tokenizers,
    tokenizer_hash,
)
from decode.drafters import Chains
from decode.models import CheckpointLM, Heads, HeadsCheckpoint, PrunedLM
from distill.alignment import Teacher
from distill.alignment.lm import LiveTarget
from distill.batches import BatchStream, Example, Pool
from distill.config import command
from distill.depth_weights import DepthWeights, Uniform
from distill.drafter_folder import check_target, find_drafter, read_description, write_drafter
from distill.errors import UserError
from distill.families import FAMILIES, family_of, makes_heads
from distill.fresh import FreshStream
from distill.joint import (
    AdaptedTarget,
    Anchor,
    Joint,
    JointAlignment,
    JointSettings,
    drafter_in,
    moved,
)
from distill.loop import (
    Evaluation,
    Stream,
    Trainee,
    Trainer,
    TrainerSettings,
    TrainingSummary,
    part,
)
from distill.lora import LoraSettings
from distill.objectives import AdaSPEC, EndToEndTV, Objective
from distill.prompts import Prompt, PromptSettings, StandardLibraryPrompts
from distill.regimes import TrainingData, pools_of
from distill.run_folder import RunFolder, content_hash, describe, environment
from distill.selection import TokenSelection, load_reference
from distill.shrinking import DrafterSettings, VocabularySettings, begun, in_words
from distill.sources import read_by
from distill.target import LoadedTarget, TargetSettings, fingerprint, first_line
from distill.teachers.stored import LiveTeacher, StoredTeacher
from distill.tracking import NoTracker, Tracker

DRAFTER = "drafter"
WRITTEN = "written"  # by writers, while training
LONGEST_WAIT = timedelta(hours=4)  # of the other processes, while the main one measures
INDIFFERENT = ("num_threads", "keep_checkpoints", "log_every")


class TeacherSettings(Protocol):
    """Where the target's distribution comes from."""

    def build(
        self, live: LiveTarget, examples: Sequence[Example], objective: Objective, vocab_size: int
    ) -> Teacher:
        """The teacher; UserError where it has nothing to say about these examples."""
        ...


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a drafter; the best checkpoint is the one with the best τ on held-out prompts.

    Attributes:
        target: whose output it learns to predict.
        drafter: where it begins.
        vocabulary: which ids a language model drafts; None is all.
        objective: what is minimised.
        teacher: where the target's distribution comes from, for objectives that ask.
        depth_weights: how much each token of a draft counts, where several are predicted at once.
        data: what it reads.
        trainer: how.
        tracker: gets the figures besides metrics.jsonl.
        prompts: where held-out prompts are taken from; prompts of the data only if there are no
            others, and then they leave the data.
        num_held_out: how many.
        sampling: how τ is measured on them.
        draft_length: tokens per draft there.
        lora: train adapters only; of a language model from a checkpoint, or, where the drafter is
            heads, of the target under them, which is then trained with them.
        joint: how, in that case.
        output: the run folder; the finished drafter is its `drafter/`.
        seed: of data order and dropout.
    """

    target: TargetSettings = field(default_factory=TargetSettings)
    drafter: DrafterSettings
    vocabulary: VocabularySettings | None = None
    objective: Objective
    teacher: TeacherSettings = field(default_factory=LiveTeacher)
    depth_weights: DepthWeights = field(default_factory=Uniform)
    data: TrainingData
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    tracker: Tracker = field(default_factory=NoTracker)
    prompts: PromptSettings = field(default_factory=lambda: StandardLibraryPrompts(split="distill"))
    num_held_out: int = 16
    sampling: SamplingParams = field(default_factory=SamplingParams)
    draft_length: int = 5
    lora: LoraSettings | None = None
    joint: JointSettings = field(default_factory=JointSettings)
    output: Path
    seed: int = 0

    def run(self) -> Path:
        """Train, or go on with it, or say that it is done; returns the drafter's folder.

        Raises:
            UserError: drafter, data or prompts do not fit the target, or the folder holds the run
                of other settings.
        """
        target = self.target.load(may_have_encoder=makes_heads(self.drafter))
        accelerator = _accelerator(target)
        target.model.to(accelerator.device)
        held_out, pools = self._split(target)
        examples = [example for pool in pools for example in pool.examples]
        drafter, kept = self._drafter(target, examples)
        reference = self._reference(target, drafter)
        self._check_writers(pools, drafter)
        settings = self._settings(target, drafter, reference, examples, held_out)
        folder = RunFolder(self.output, settings)
        with accelerator.main_process_first():
            summary = folder.begin()
        finished = self.output / DRAFTER
        if summary is not None and finished.is_dir():
            if accelerator.is_main_process:
                print(f"{self.output} is finished: {finished}{_measured(summary)}")
            return finished

        if kept and accelerator.is_main_process:
            print(in_words(kept))
        torch.manual_seed(self.seed)
        trained, adapted = drafter, None
        if self.lora and isinstance(drafter, Heads):
            adapted = self.lora.wrap(target.model)
            trained = Joint(drafter, adapted)
        elif self.lora:
            adapted = self.lora.wrap(drafter)
        trainer = Trainer(
            self._trainee(trained, target, reference, examples, accelerator.device),
            self._stream(pools, target),
            self.trainer,
            folder=self.output,
            accelerator=accelerator,
            tracker=(self.tracker if accelerator.is_main_process else NoTracker()).start(
                self.output, settings
            ),
            evaluate=self._evaluation(target, held_out),
            seed=self.seed,
        )
        result = trainer.run()
        if accelerator.is_main_process:
            result.best.state()  # refuses a damaged one
            result.best.restore_model(trained)
            merged = None if adapted is None else adapted.merge_and_unload()
            description = self._describe(target, drafter, kept, examples, held_out, result)
            with_target = merged if trained is not drafter else None
            write_drafter(finished, drafter, target.tokenizer, description, with_target)
            folder.finish({**description["measured"], "best_step": result.best.step})
            print(f"{finished}{_measured(result.figures)}, step {result.best.step:,}")
        accelerator.wait_for_everyone()
        return finished

    def _trainee(
        self,
        trained: nn.Module,
        target: LoadedTarget,
        reference: nn.Module | None,
        examples: Sequence[Example],
        device: torch.device,
    ) -> Trainee:
        """Drafter, or heads with their target, and how they are taught."""
        drafter = drafter_in(trained)
        family = FAMILIES[family_of(drafter)]
        layers = family.layers(target.model)
        live: LiveTarget
        before: LiveTarget
        anchor: Anchor | None
        if isinstance(trained, Joint):
            live = adapted = AdaptedTarget(trained.target, target.model, layers)
            before, anchor = adapted.before, Anchor(adapted, self.joint)
        else:
            live = LiveTarget(target.model, layers)
            before, anchor = live, None
        teacher = None
        if self.objective.needs_target:
            vocab_size = family.vocab_size(drafter)
            teacher = self.teacher.build(live, examples, self.objective, vocab_size)
        alignment = family.alignment(drafter, live, self.objective.block)
        selection = None
        if reference is not None:
            assert isinstance(self.objective, AdaSPEC)
            beside = FAMILIES[family_of(reference)].alignment(reference, before, 1)
            selection = TokenSelection(self.objective, reference.to(device), beside)
        return Trainee(
            trained,
            alignment if anchor is None else JointAlignment(alignment),
            self.objective,
            teacher,
            self.trainer.precision,
            depth_weights=self.depth_weights,
            selection=selection,
            anchor=anchor,
            slow=None if anchor is None else ("target", self.joint.target_rate),
        )

    def _stream(self, pools: Sequence[Pool], target: LoadedTarget) -> Stream:
        """Step -> batches."""
        length, size = self.trainer.sequence_length, self.trainer.batch_size
        if all(pool.writer is None for pool in pools):
            return BatchStream(pools, sequence_length=length, batch_size=size, seed=self.seed)
        return FreshStream(
            pools,
            target,
            self.output / WRITTEN,
            sequence_length=length,
            batch_size=size,
            seed=self.seed,
        )

    def _check_writers(self, pools: Sequence[Pool], drafter: nn.Module) -> None:
        """Refuse what cannot learn from outputs that are written while training."""
        for writer in (pool.writer for pool in pools if pool.writer is not None):
            if isinstance(self.teacher, StoredTeacher) and self.objective.needs_target:
                raise UserError(
                    "nothing is stored about outputs that are written while training",
                    "teacher",
                    "let the target run beside the drafter: teacher=live",
                )
            writer.check(self.objective, drafter)

    def _split(self, target: LoadedTarget) -> tuple[list[Prompt], list[Pool]]:
        """Held-out prompts, and the data without them."""
        pools = read_by(target, pools_of(self.data, target.tokenizer))
        used = {tuple(example.asked) for pool in pools for example in pool.examples}
        fitting = [p for p in self.prompts.load(target.tokenizer) if target.fits(len(p.ids), 1)]
        fitting.sort(key=lambda prompt: tuple(prompt.ids) in used)  # stable: the unused ones first
        held_out = fitting[: self.num_held_out]
        if not held_out:
            raise UserError("there are no held-out prompts to measure τ on", hint="check prompts")
        withheld = {tuple(prompt.ids) for prompt in held_out}
        kept = [
            replace(pool, examples=[e for e in pool.examples if tuple(e.asked) not in withheld])
            for pool in pools
        ]
        for pool, rest in zip(pools, kept, strict=True):
            if not rest.examples:
                raise UserError(
                    f"all {len(pool.examples):,} examples are on the {len(held_out)} held-out "
                    "prompts",
                    hint="train on more prompts, or set num_held_out lower",
                )
        return held_out, kept

    def _drafter(
        self, target: LoadedTarget, examples: Sequence[Example]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The drafter before training, if it fits target, data and objective; and what it kept."""
        where, begin = None, self.drafter
        if isinstance(begin, HeadsCheckpoint):
            begin = replace(begin, path=find_drafter(begin.path))
            check_target(read_description(begin.path), begin.path, target)
            where = begin.path
        try:
            if isinstance(begin, CheckpointLM | PrunedLM) and begin.path is not None:
                where = begin.path
                tokenizer = AutoTokenizer.from_pretrained(where, revision=begin.revision)
                check_tokenizers(target.tokenizer, tokenizer)
            drafter, kept = begun(begin, self.vocabulary, target, examples)
        except (ValueError, OSError) as error:
            raise UserError(first_line(error), where, "choose another drafter") from error
        self._check_sizes(drafter, target, where)
        if isinstance(drafter, Heads) and drafter.one_at_a_time:
            self._check_one_at_a_time()
        is_single = not isinstance(drafter, Heads) and self.objective.block == 1
        if is_single and not isinstance(self.depth_weights, Uniform):
            raise UserError(
                "depth_weights weighs the tokens of a draft, and this language model learns its "
                "tokens one by one",
                hint="depth_weights=uniform, or give it drafts: objective.block=4",
            )
        return drafter, kept

    def _check_one_at_a_time(self) -> None:
        """Refuse what compares the heads of a draft, of which only one is there."""
        hint = "train all heads at once: drafter.one_at_a_time=false"
        if not isinstance(self.depth_weights, Uniform):
            raise UserError(
                f"depth_weights weighs the heads by {type(self.depth_weights).__name__}, but only "
                "one is trained at a time",
                hint=f"depth_weights=uniform, or {hint}",
            )
        if isinstance(self.objective, EndToEndTV):
            raise UserError(
                "end_to_end_tv judges whole drafts, but only one head is trained at a time",
                hint=f"objective=total_variation, or {hint}",
            )

    def _check_sizes(self, drafter: Any, target: LoadedTarget, where: str | None) -> None:
        """Refuse too few ids, and contexts shorter than the sequences."""
        family = FAMILIES[family_of(drafter)]
        if family.is_lm:
            vocab_size = family.vocab_size(drafter)
            if vocab_size < len(target.tokenizer):
                raise UserError(
                    f"the model has {vocab_size:,} ids, the target's tokenizer "
                    f"{len(target.tokenizer):,}",
                    where,
                    "choose one with the target's tokenizer",
                )
        models = [(drafter, where)] if family.is_lm else []
        if self.objective.needs_target or family.layers(target.model):
            models.append((target.model, target.path))
        for model, path in models:
            context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            if context is not None and self.trainer.sequence_length > context:
                raise UserError(
                    f"trainer.sequence_length={self.trainer.sequence_length} is longer than the "
                    f"context of {type(model).__name__}, {context}",
                    path,
                    f"set it to {context} or less",
                )

    def _reference(self, target: LoadedTarget, drafter: nn.Module) -> nn.Module | None:
        """The drafter that AdaSPEC compares with, if it fits drafter, target and sequences."""
        if not isinstance(self.objective, AdaSPEC):
            return None
        reference = load_reference(self.objective.reference, drafter, target)
        self._check_sizes(reference, target, self.objective.reference)
        return reference

    def _settings(
        self,
        target: LoadedTarget,
        drafter: nn.Module,
        reference: nn.Module | None,
        examples: Sequence[Example],
        held_out: Sequence[Prompt],
    ) -> dict[str, Any]:
        """What decides the outcome: not where it lies or how fast it comes.

        The size of micro-batches does where something is chosen for each of them: AdaSPEC's tokens,
        or the one head that is trained.
        """
        settings: dict[str, Any] = describe(self)
        for name in ("output", "tracker"):
            del settings[name]
        if self.lora is None:
            del settings["joint"]
        for name in INDIFFERENT:
            del settings["trainer"][name]
        if reference is None and not (isinstance(drafter, Heads) and drafter.one_at_a_time):
            del settings["trainer"]["micro_batch_size"]
        if reference is not None:
            settings["reference_fingerprint"] = fingerprint(reference)
        return settings | {
            "target_fingerprint": target.fingerprint,
            "drafter_fingerprint": fingerprint(drafter),
            "data_hash": _data_hash(examples),
            "held_out_hash": content_hash([prompt.id for prompt in held_out]),
        }

    def _evaluation(self, target: LoadedTarget, prompts: Sequence[Prompt]) -> Evaluation:
        """Drafter -> τ and α of decoding the held-out prompts with it."""
        sampling = replace(self.sampling, top_logprobs=0)
        longest = max(len(prompt.ids) for prompt in prompts)
        runtime = Target(
            target.model,
            max_batch_size=min(8, len(prompts)),
            max_length=target.cache_length(longest, sampling.max_new_tokens),
        )
        requests = [
            runtime.request(prompt.ids, id=str(number), sampling=sampling, seed=self.seed)
            for number, prompt in enumerate(prompts)
        ]

        def evaluate(model: nn.Module) -> dict[str, float]:
            try:
                drafter = Chains(length=self.draft_length).build(drafter_in(model), runtime)
            except ValueError as error:
                raise UserError(str(error)) from error
            decoder = SpeculativeDecoder(runtime, drafter, tokenizer=target.tokenizer)
            results = decoder.generate(requests)
            stats = reduce(add, (result.stats for result in results))
            if not stats.num_steps:
                raise UserError(
                    "the target ends every held-out prompt at once, so τ cannot be measured",
                    hint="choose other prompts, or sampling.ignore_eos=true",
                )
            figures = {"tau": stats.block_efficiency, "alpha": stats.alpha}
            if isinstance(model, Joint):
                texts, sources = [prompt.ids for prompt in prompts], []
                if target.is_encoder_decoder:
                    begins = runtime.decoder_prompt()
                    texts, sources = [[*begins, *result.tokens] for result in results], texts
                figures |= moved(model, texts, sources)
            return figures

        return evaluate

    def _describe(
        self,
        target: LoadedTarget,
        drafter: nn.Module,
        kept: dict[str, Any],
        examples: Sequence[Example],
        held_out: Sequence[Prompt],
        result: TrainingSummary,
    ) -> dict[str, Any]:
        """The drafter's draftsmith.json."""
        return {
            "family": family_of(drafter),
            "target": target.path,
            "target_fingerprint": target.fingerprint,
            "tokenizer_hash": tokenizer_hash(target.tokenizer),
            "drafter": describe(self.drafter),
            **({"kept": kept} if kept else {}),
            "objective": describe(self.objective),
            "data": describe(self.data),
            "data_hash": _data_hash(examples),
            "steps": self.trainer.steps,
            "best_step": result.best.step,
            "tokens": result.tokens,
            "measured": {
                **result.figures,
                "draft_length": self.draft_length,
                "num_prompts": len(held_out),
                "sampling": describe(self.sampling),
            },
            "versions": environment()["versions"],
        }


def _accelerator(target: LoadedTarget) -> Accelerator:
    accelerator = Accelerator(
        cpu=target.model.device.type == "cpu",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ],
    )
    if accelerator.num_processes > 1:
        atexit.register(part, accelerator)
    return accelerator


def _data_hash(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:  # their order counts: the seed shuffles from there
        digest.update(repr((example.ids, example.loss_mask)).encode())
        if example.encoder_ids is not None:
            digest.update(repr(example.encoder_ids).encode())
        if example.top is not None:
            for stored in (example.top.ids, example.top.logprobs, example.top.tail_mass):
                digest.update(stored.numpy().tobytes())
    return digest.hexdigest()[:16]


def _measured(figures: dict[str, Any]) -> str:
    return f", τ {figures['tau']:.3f}, α {figures['alpha']:.3f}" if "tau" in figures else ""


main = command("train", Train)

if __name__ == "__main__":
    main()
