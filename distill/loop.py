"""The training loop: blind to drafter families and objectives, the same on one process or many.

Accelerate wraps model and optimizer. Sums of the loss are divided once, by the number of tokens of
the whole batch over all micro-batches and processes, so that neither count changes the result. All
that a run must remember is the step, the weights, the optimizer's moments and a few sums: data,
learning rate and random draws follow from the step.
"""

import contextlib
import enum
import io
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.optim import AdamW

from distill import checkpoint as checkpoints
from distill.alignment import Alignment, Teacher
from distill.batches import Batch, BatchStream
from distill.checkpoint import Checkpoint
from distill.chunked import projected_loss
from distill.depth_weights import DepthWeights, Uniform
from distill.errors import UserError
from distill.fresh import FreshStream
from distill.interrupts import interrupts
from distill.joint import Anchor
from distill.objectives import LossTerms, Objective
from distill.progress import Progress
from distill.selection import TokenSelection
from distill.tracking import MetricsFile, TrackerRun
from distill.window import Window

ONE_COPY_EACH = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}

Evaluation = Callable[[nn.Module], dict[str, float]]
Stream: TypeAlias = BatchStream | FreshStream


class Precision(enum.Enum):
    """What matrix products are computed in; weights and moments are float32."""

    no = "no"
    bf16 = "bf16"


class Schedule(enum.Enum):
    """How the learning rate goes after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How the loop trains.

    Attributes:
        steps: optimizer steps.
        batch_size: packed sequences per step, over all processes.
        micro_batch_size: sequences at a time on one process; more are accumulated.
        sequence_length: tokens per packed sequence.
        learning_rate: its peak.
        warmup_steps: steps of linear rise.
        schedule: what follows.
        min_lr_ratio: where the schedule ends, as a share of the peak.
        weight_decay: of matrices (AdamW); vectors are not decayed.
        beta1: AdamW's.
        beta2: AdamW's.
        max_grad_norm: longer gradients are clipped.
        precision: no or bf16 autocast.
        log_every: steps per line of metrics.jsonl.
        evaluate_every: steps between measurements on held-out prompts.
        checkpoint_every: steps between checkpoints; there is one after each measurement too.
        keep_checkpoints: how many of the last are kept, besides the best.
        num_threads: CPU threads; None leaves torch's choice.
    """

    steps: int = 1000
    batch_size: int = 16
    micro_batch_size: int = 16
    sequence_length: int = 512
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    schedule: Schedule = Schedule.cosine
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    precision: Precision = Precision.bf16
    log_every: int = 10
    evaluate_every: int = 250
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    num_threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        for name in (
            "steps",
            "batch_size",
            "micro_batch_size",
            "log_every",
            "evaluate_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be >= 2, got {self.sequence_length}")

    def learning_rate_at(self, step: int) -> float:
        """The rate of the step that follows `step` finished ones."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        match self.schedule:
            case Schedule.constant:
                share = 1.0
            case Schedule.linear:
                share = 1 - progress
            case Schedule.cosine:
                share = (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (self.min_lr_ratio + (1 - self.min_lr_ratio) * share)


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """What a finished run came to.

    Attributes:
        best: the checkpoint with the best block efficiency, or the last where none was measured.
        figures: what was measured there.
        tokens: tokens seen, repetitions counted.
    """

    best: Checkpoint
    figures: dict[str, float]
    tokens: int


class Trainee(nn.Module):
    """Drafter, alignment and objective as one module: what data parallelism wraps."""

    def __init__(
        self,
        drafter: nn.Module,
        alignment: Alignment,
        objective: Objective,
        teacher: Teacher | None,
        precision: Precision,
        *,
        depth_weights: DepthWeights | None = None,
        selection: TokenSelection | None = None,
        anchor: Anchor | None = None,
        slow: tuple[str, float] | None = None,
    ):
        """Only the drafter is trained; the teacher is no part of the module.

        Args:
            drafter: what is trained.
            alignment: what it predicts from which states.
            objective: what is minimised.
            teacher: needed by objectives that ask what the target says.
            precision: of the products.
            depth_weights: how much each depth counts; by default all the same.
            selection: of the tokens that are learnt; by default all.
            anchor: holds a target that is trained with its heads.
            slow: the name of a part of the drafter, and the share of the learning rate it gets.
        """
        super().__init__()
        if objective.needs_target and teacher is None:
            raise ValueError(f"{type(objective).__name__} needs a teacher")
        self.drafter = drafter
        self.alignment = alignment
        self.objective = objective
        self.teacher = teacher if objective.needs_target else None
        self.precision = precision
        self.depth_weights = depth_weights or Uniform()
        self.selection = selection
        self.anchor = anchor
        self.slow = slow

    def forward(self, batch: Batch, step: int) -> LossTerms:
        """The sums over the batch, in the step that follows `step` finished ones."""
        is_half = self.precision is Precision.bf16
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=is_half):
            signal = None if self.teacher is None else self.teacher.signal(batch)
            aligned = self.alignment.align(self.drafter, batch)
            if self.selection is not None and signal is not None:
                aligned = self.selection.select(aligned, batch, signal)
            terms = projected_loss(
                aligned,
                signal,
                self.objective,
                depth_weights=self.depth_weights,
                token_weights=batch.weights,
            )
            return terms if self.anchor is None else self.anchor.added(terms, batch, step)


class Trainer:
    """One training run in a folder; `run` begins it or goes on with it."""

    def __init__(
        self,
        trainee: Trainee,
        stream: Stream,
        settings: TrainerSettings,
        *,
        folder: Path,
        accelerator: Accelerator,
        tracker: TrackerRun,
        evaluate: Evaluation | None = None,
        seed: int = 0,
    ):
        """Set up the run, and restore its last checkpoint where there is one.

        Args:
            trainee: what is trained.
            stream: step -> batches; one that writes is asked to on the main process.
            settings: how.
            folder: gets checkpoints/ and metrics.jsonl.
            accelerator: the processes.
            tracker: gets the figures on the main process.
            evaluate: drafter -> figures on held-out prompts, called on the main process; by its
                "tau" the best checkpoint is chosen.
            seed: of dropout.

        Raises:
            UserError: the checkpoint is damaged or of another drafter, or this kind of
                parallelism is not supported.
        """
        if accelerator.distributed_type not in ONE_COPY_EACH:
            raise UserError(
                f"training under {accelerator.distributed_type.value} is not supported",
                None,
                "start it with plain data parallelism (MULTI_GPU or MULTI_CPU)",
            )
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        self.settings = settings
        self.accelerator = accelerator
        self.stream = stream
        self.drafter = trainee.drafter
        self.evaluate = evaluate
        self.seed = seed
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.tokens = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self.window = Window(accelerator)
        self._folder = folder / "checkpoints"
        optimizer = _optimizer(trainee, settings)
        resumed = self._restore(optimizer)
        self.model, self.optimizer = accelerator.prepare(trainee.to(accelerator.device), optimizer)
        self._logs: list[TrackerRun] = []
        if accelerator.is_main_process:
            metrics = MetricsFile(folder / "metrics.jsonl", resumed_step=resumed)
            self._logs = [metrics, tracker]

    def run(self) -> TrainingSummary:
        """Train to the last step.

        Raises:
            UserError: the loss is not a number any more, or the disk is full.
            KeyboardInterrupt: the run was stopped; a checkpoint of its last step is there.
        """
        is_main = self.accelerator.is_main_process
        stream = sys.stderr if is_main else io.StringIO()
        self._since = (time.monotonic(), float(self.tokens))
        self._progress = Progress(self.settings.steps, "steps", "train", stream)
        try:
            with interrupts() as interrupted, self._progress:
                self._train(interrupted)
        finally:
            for log in self._logs:
                log.finish()
        best = self.best or {"step": self.step, "figures": {}}
        self.accelerator.wait_for_everyone()
        found = [c for c in checkpoints.checkpoints(self._folder) if c.step == best["step"]]
        if not found:
            raise UserError(
                f"the best checkpoint, of step {best['step']}, is gone",
                self._folder,
                "train again in another output folder",
            )
        return TrainingSummary(found[0], dict(best["figures"]), int(self.tokens))

    def _train(self, interrupted: threading.Event) -> None:
        self._progress.skip(self.step)
        if self.step == 0 and self.evaluate is not None:
            self._measure()
            self._save()
        while self.step < self.settings.steps:
            self._refresh()
            self._train_step()
            self._after_step()
            if self._is_stopped(interrupted):
                self._save()
                raise KeyboardInterrupt

    def _refresh(self) -> None:
        """Have the data of the coming steps written, where they hang on the drafter."""
        if not isinstance(self.stream, FreshStream) or not self.stream.is_due(self.step):
            return
        if self.accelerator.is_main_process:
            self.stream.refresh(self.step, self.drafter.eval())
        self.accelerator.wait_for_everyone()

    def _train_step(self) -> None:
        settings, accelerator = self.settings, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        batches = self.stream.for_process(self.step, rank, world, settings.micro_batch_size)
        counted = torch.tensor([_num_targets(batches), _num_tokens(batches)], dtype=torch.float64)
        own_tokens = int(counted[1])
        counted = counted.to(accelerator.device)
        if world > 1:
            counted = cast(Tensor, accelerator.reduce(counted, reduction="sum"))
        # Data parallelism averages the gradients of its processes; the sum is wanted.
        scale = (world / counted[0].clamp(min=1)).float()

        torch.manual_seed(hash((self.seed, self.step, rank)))
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(self.step) * group["share"]
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                terms: LossTerms = self.model(batch.to(accelerator.device), self.step)
                accelerator.backward(terms.loss * scale)
            self.window.add(terms)
        norm = accelerator.clip_grad_norm_(self.drafter.parameters(), settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.window.add_value("grad_norm", cast(Tensor, norm))
        self.tokens += counted[1]
        self.step += 1
        self._progress.advance(1, tokens=own_tokens * world)

    def _after_step(self) -> None:
        is_last = self.step == self.settings.steps
        if is_last or self.step % self.settings.log_every == 0:
            self._log()
        is_measured = self.evaluate is not None and (
            is_last or self.step % self.settings.evaluate_every == 0
        )
        if is_measured:
            self._measure()
        if is_measured or is_last or self.step % self.settings.checkpoint_every == 0:
            self._save()

    def _log(self) -> None:
        """Write the means since the last line."""
        means = self.window.means()
        self._check(means)
        self.window.clear()
        tokens, now = float(self.tokens), time.monotonic()
        rate = (tokens - self._since[1]) / max(now - self._since[0], 1e-9)
        self._since = (now, tokens)
        self._progress.advance(0, **{k: v for k, v in means.items() if k != "grad_norm"})
        self._record(
            {
                **means,
                "learning_rate": self.settings.learning_rate_at(self.step - 1),
                "tokens": tokens,
                "tokens_per_second": rate,
            }
        )

    def _check(self, means: dict[str, float]) -> None:
        for name in ("loss", "grad_norm"):
            if name in means and not math.isfinite(means[name]):
                rate = self.settings.learning_rate_at(self.step - 1)
                last = checkpoints.latest(self._folder)
                raise UserError(
                    f"{name} is {means[name]} at step {self.step} (learning rate {rate:.3g})",
                    last.path if last else self._folder,
                    "train again with a lower trainer.learning_rate in another output folder; "
                    + ("the last checkpoint is sound" if last else "there is no checkpoint yet"),
                )

    def _measure(self) -> None:
        """Run the decoder with the drafter as it is now; the others wait."""
        if self.accelerator.is_main_process and self.evaluate is not None:
            started = time.monotonic()
            figures = self.evaluate(self.drafter.eval())
            self._since = (self._since[0] + time.monotonic() - started, self._since[1])
            self._record({f"heldout_{name}": value for name, value in figures.items()})
            self._progress.advance(0, tau=figures["tau"])
            if self.best is None or figures["tau"] > self.best["figures"]["tau"]:
                self.best = {"step": self.step, "figures": figures}
        self.accelerator.wait_for_everyone()

    def _record(self, metrics: dict[str, float]) -> None:
        for log in self._logs:
            log.log(self.step, metrics)

    def _save(self) -> None:
        window = self.window.gather()
        self._check(self.window.means())
        if self.accelerator.is_main_process:
            state = {"tokens": float(self.tokens), "best": self.best, "window": window}
            optimizer = self.optimizer.optimizer
            checkpoints.save(self._folder, self.step, self.drafter, optimizer, state)
            best = self.best["step"] if self.best else None
            checkpoints.prune(self._folder, keep=self.settings.keep_checkpoints, best=best)
        self.accelerator.wait_for_everyone()

    def _restore(self, optimizer: AdamW) -> int | None:
        """Go on from the last checkpoint; returns its step."""
        last = checkpoints.latest(self._folder)
        if last is None:
            return None
        state = last.state()
        last.restore_model(self.drafter)
        last.restore_optimizer(self.drafter, optimizer)
        self.step = last.step
        self.best = state["best"]
        self.tokens.fill_(state["tokens"])
        self.window.restore(state["window"])
        return last.step

    def _is_stopped(self, interrupted: threading.Event) -> bool:
        """Whether any process was interrupted; several ask each other only when they log."""
        if self.accelerator.num_processes == 1:
            return interrupted.is_set()
        if self.step % self.settings.log_every:
            return False
        flag = torch.tensor(float(interrupted.is_set()), device=self.accelerator.device)
        return bool(cast(Tensor, self.accelerator.reduce(flag, reduction="sum")))


def part(accelerator: Accelerator) -> None:
    """Leave the group of processes, at the very end.

    gloo's threads abort an interpreter that exits while they run, and they run for as long as
    anything, here the wrapped model, refers to the group.
    """
    accelerator.free_memory()
    accelerator.end_training()


def _optimizer(trainee: Trainee, settings: TrainerSettings) -> AdamW:
    name, share = trainee.slow or ("", 1.0)
    parts: dict[tuple[float, float], list[nn.Parameter]] = {}
    for path, parameter in trainee.drafter.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            key = share if path.startswith(f"{name}.") else 1.0, decay
            parts.setdefault(key, []).append(parameter)
    return AdamW(
        [
            {"params": parameters, "weight_decay": decay, "share": share}
            for (share, decay), parameters in parts.items()
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )


def _num_targets(batches: list[Batch]) -> int:
    return sum(int(batch.loss_mask.sum()) for batch in batches)


def _num_tokens(batches: list[Batch]) -> int:
    return sum(int((batch.segment_ids > 0).sum()) for batch in batches)
