"""A run from its first step, or any later one, to its last."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

import torch
from torch import nn

from lednet.checkpoint import load_state, save_checkpoint
from lednet.data.dataset import SkipCorruptDataset
from lednet.data.loaders import Batches, TrainBatches, end_loading
from lednet.device import peak_memory_mb
from lednet.errors import UserError
from lednet.plots import plot_curves
from lednet.training.checkpointing import Checkpoints
from lednet.training.loggers import MetricLogger
from lednet.training.run_dir import RunDir
from lednet.training.signals import SAVE, CheckpointTimer, TrainingStopped
from lednet.training.stages import Stage
from lednet.training.time_budget import TimeBudget
from lednet.training.trainer import EpochState, NonFiniteLoss, Trainer


@dataclass
class Progress:
    """What a run has behind it.

    Attributes:
        stage: name of the current one.
        epoch: finished epochs of that stage.
        steps: updates of the weights, of all stages.
        best_score: best validation score of that stage; -1 before the first.
        records: the lines of `log.jsonl` so far, of all stages.
        tally: of the epoch that was interrupted, as `EpochState.state` gave it; or None.
        seconds: of the whole run so far.
        stage_start: value of `seconds` when the stage began.
    """

    stage: str
    epoch: int = 0
    steps: int = 0
    best_score: float = -1.0
    records: list[dict[str, Any]] = field(default_factory=list)
    tally: dict[str, Any] | None = None
    seconds: float = 0.0
    stage_start: float = 0.0

    def state(self) -> dict[str, Any]:
        """For a checkpoint, all but stage and epoch, which its "meta" has."""
        return {key: getattr(self, key) for key in (*PROGRESS_KINDS, *TIME_KEYS)}


META_KINDS: dict[str, type | UnionType] = {
    "stage": str,
    "epoch": int,
    "mean": list | tuple,
    "std": list | tuple,
}
PROGRESS_KINDS: dict[str, type | UnionType] = {
    "steps": int,
    "best_score": int | float,
    "records": list,
    "tally": dict | None,
}
"""What a checkpoint's "meta" and "progress" hold to go on from, and of which types."""
TIME_KEYS = ("seconds", "stage_start")
"""What "progress" holds too, but for checkpoints of earlier versions."""


@dataclass
class TrainingRun:
    """What all stages of a run have in common.

    Attributes:
        net: the whole network, of which each stage trains a part.
        folder: written to by the main process only.
        meta: about data and classes, stored with the weights.
        seed: of everything random.
        keeper: says when to save and when to stop.
        keep_every: keep the weights of every n-th epoch as well; 0 keeps none.
        validate_every: score every n-th epoch of a stage, and its last.
        budget: time that the run has; None for any.
    """

    net: nn.Module
    stages: Sequence[Stage]
    folder: RunDir
    checkpoints: Checkpoints
    meta: dict[str, Any]
    seed: int
    keeper: CheckpointTimer
    dashboard: MetricLogger | None = None
    keep_every: int = 0
    validate_every: int = 1
    budget: TimeBudget | None = None

    def resume(self) -> tuple[Progress, dict[str, Any]]:
        """Load the newest sound checkpoint into `net`; returns where to go on, and the trainer's
        state.

        Raises:
            UserError: there is none, it holds weights alone, or it is in a stage that the
                run no longer has.
        """
        path, content, complaints = self.checkpoints.load_latest(self.folder.main)
        for complaint in complaints:
            self.folder.log(f"{complaint}; going on from {path.name}")
        if not {"meta", "trainer", "progress"} <= content.keys():
            raise UserError(f"{path} holds weights alone: start a new run with --state {path}")
        meta, state = content["meta"], content["progress"]
        if not _is_progress(meta, state):
            raise UserError(
                f"{path} was written by another version: resume with that, or start a new run "
                f"with --state {path}"
            )
        if meta["stage"] not in [stage.name for stage in self.stages]:
            raise UserError(
                f"{path} is in stage {meta['stage']}, which these options leave out: resume with "
                "the run's own"
            )
        load_state(self.net, content["state_dict"], path)
        self.meta |= {key: meta[key] for key in ("mean", "std")}
        kept = {key: state[key] for key in (*PROGRESS_KINDS, *TIME_KEYS) if key in state}
        progress = Progress(meta["stage"], meta["epoch"], **kept)
        self.folder.write_records(progress.records)
        step = progress.tally["step"] if progress.tally else 0
        within = f", {step} batches into the next" if step else ""
        self.folder.log(
            f"resuming {progress.stage} after epoch {progress.epoch}{within} ({path.name})"
        )
        return progress, content["trainer"]


def _is_progress(meta: Any, state: Any) -> bool:
    """Whether a checkpoint's "meta" and "progress" are what `StageRunner` wrote."""
    for told, kinds in ((meta, META_KINDS), (state, PROGRESS_KINDS)):
        if not isinstance(told, dict) or not kinds.keys() <= told.keys():
            return False
        if not all(isinstance(told[key], kind) for key, kind in kinds.items()):
            return False
    try:
        json.dumps(state["records"], allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    tally = state["tally"]
    counted = tally is None or isinstance(tally.get("step"), int)
    timed = all(isinstance(state.get(key, 0.0), int | float) for key in TIME_KEYS)
    return counted and timed and all(isinstance(record, dict) for record in state["records"])


class StageComponents(NamedTuple):
    """What a stage is trained with; loaders of training and of validation data."""

    trainer: Trainer
    train_loader: TrainBatches
    val_loader: Batches


def train_stages(
    course: TrainingRun,
    equip: Callable[[Stage], StageComponents],
    progress: Progress | None = None,
    trainer_state: dict[str, Any] | None = None,
) -> Progress:
    """Train the stages that are left.

    Args:
        equip: called when a stage begins, or is gone on with.
        progress, trainer_state: as `TrainingRun.resume` returned them; None begins with the first
            stage.

    Returns:
        What is behind the run at its end.

    Raises:
        Stopped: a signal came; the step was finished and all is saved.
        UserError: the loss is not finite, or data cannot be read.
    """
    names = [stage.name for stage in course.stages]
    progress = progress or Progress(names[0])
    budget = course.budget or TimeBudget(course.keeper.world)
    budget.add(progress.seconds)
    with course.keeper.request.watching():
        for stage in course.stages[names.index(progress.stage) :]:
            if stage.name != progress.stage:
                progress = Progress(
                    stage.name,
                    steps=progress.steps,
                    records=progress.records,
                    stage_start=budget.elapsed,
                )
                trainer_state = None
            equipment = equip(stage)
            if trainer_state is not None:
                with report_mismatch():
                    equipment.trainer.load_state_dict(trainer_state)
            StageRunner(course, stage, equipment, progress, budget).train()
    return progress


@contextlib.contextmanager
def report_mismatch() -> Iterator[None]:
    """Take over a part of a checkpoint.

    Raises:
        UserError: it is that of another network or other options.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            "the checkpoint is of other options than this run: resume with those that it was "
            "begun with, or start a new run from its weights with --state"
        ) from error


class StageRunner:
    """A stage under way; brings `progress` forward, step by step."""

    def __init__(
        self,
        course: TrainingRun,
        stage: Stage,
        equipment: StageComponents,
        progress: Progress,
        budget: TimeBudget,
    ):
        self.course, self.stage, self.progress = course, stage, progress
        self.trainer, self.train_loader, self.val_loader = equipment
        self.run, self.keeper = course.folder, course.keeper
        self.number = [stage.name for stage in course.stages].index(stage.name)
        self.main = self.trainer.world.is_main
        self.budget = budget
        self.clock = self.trainer.clock = budget.stage(self.number, progress.stage_start)

    def train(self) -> None:
        """Train the rest of the stage; after each epoch score, save and log."""
        try:
            while not self._finished():
                self._epoch(self.progress.epoch + 1)
        except NonFiniteLoss as error:
            saved = self.course.checkpoints.paths()
            last = f"{saved[0]} is sound" if saved else "there is no checkpoint yet"
            raise UserError(
                f"{error}; {last}: go on with --resume and a lower --lr, --skip-bad-steps or "
                "--precision fp32"
            ) from error
        finally:
            end_loading(self.train_loader)
            end_loading(self.val_loader)
        self.trainer.keep_average()
        if self.main:
            task = self.trainer.task
            plot_curves(
                self.progress.records,
                self.run.path / "curves.png",
                f"{self.run.path.name}: {self.course.meta['model']}, {self.course.meta['dataset']}",
                {stage.name: stage.title for stage in self.course.stages},
                task.score,
                task.score_name,
            )

    def _finished(self) -> bool:
        """Whether the stage has had its epochs or, with a time limit, its time."""
        if self.clock is None:
            return self.progress.epoch >= self.stage.epochs
        records = [r for r in self.progress.records if r["stage"] == self.stage.name]
        scored = bool(records) and records[-1][f"val_{self.trainer.task.score}"] is not None
        return scored and self.progress.tally is None and self.clock.share() >= 1

    def _epoch(self, epoch: int) -> None:
        trainer, progress, loader = self.trainer, self.progress, self.train_loader
        task, world = trainer.task, trainer.world
        tally = trainer.new_epoch_state()
        if progress.tally is not None:
            with report_mismatch():
                tally.restore(progress.tally, world)
            progress.tally = None
        loader.sampler.epoch = epoch
        loader.sampler.start = min(tally.images // world.size, loader.sampler.num_samples)
        title = f"{self.stage.name} {epoch}"
        if self.clock is None:
            title += f"/{self.stage.epochs}"
        lr = trainer.start_epoch(epoch)
        begin = time.perf_counter()
        keys = (self.course.seed, self.number, epoch)

        images_before = tally.images

        def after_update() -> None:
            progress.steps += 1
            if self.clock is not None:  # a validation image takes no longer than a training image
                seconds_per_image = (time.perf_counter() - begin) / (tally.images - images_before)
                self.clock.expect_validation(len(self.val_loader.dataset) * seconds_per_image)
            self._handle_action(tally, self.keeper.poll(progress.steps))

        trained = trainer.train_one_epoch(loader, title, keys, tally, after_update)

        def between() -> None:
            if world.size == 1:  # of many, some have fewer batches: they stop at the end
                self._handle_action(tally, self.keeper.stop())

        start = time.perf_counter()
        scored: dict[str, Any] = {"loss": None, task.score: None}
        last = epoch == self.stage.epochs
        if self.clock is not None:
            last = self.clock.share() >= 1
        if epoch % self.course.validate_every == 0 or last:
            scored = trainer.evaluate(self.val_loader, f"{title} val", between)
            if self.clock is not None:
                self.clock.validated(time.perf_counter() - start)
        end = time.perf_counter()
        record = {
            "stage": self.stage.name,
            "epoch": epoch,
            "lr": lr,
            **{f"train_{key}": trained[key] for key in ("loss", task.score)},
            **{f"val_{key}": value for key, value in scored.items()},
            "images_per_second": trained["images_per_second"],
            "seconds": end - begin,
            **_peak_memory(world.device),
            **{key: trained[key] for key in ("skipped",) if key in trained},
            **self._damaged(),
        }
        progress.records.append(record)
        progress.epoch = epoch
        score = scored[task.score]
        improved = score is not None and score > progress.best_score
        if improved:
            progress.best_score = score
        if self.main:
            self._require_finite()
            self._save_weights(improved)
            self._save(None)
            self.run.log(self._line(record, improved, end - start))
            if self.course.dashboard is not None:
                self.course.dashboard.show(
                    progress.records, task, trainer.eval_model, self.val_loader
                )
        if number := self.keeper.stop():
            raise TrainingStopped(number)

    def _handle_action(self, tally: EpochState, order: int) -> None:
        """Save in the middle of an epoch, and stop if that is the order."""
        if not order:
            return
        state = tally.state(self.trainer.world)  # of all processes: each comes here
        if self.main:
            self._require_finite()
            path = self._save(state)
            if order > SAVE:
                self.run.log(f"saved {path}; --resume goes on from it")
        if order > SAVE:
            raise TrainingStopped(order)

    def _require_finite(self) -> None:
        """Save no weights that a step with a finite loss has made infinite.

        Raises:
            NonFiniteLoss: it has.
        """
        if not all(value.isfinite().all() for value in self.course.net.state_dict().values()):
            raise NonFiniteLoss(f"the weights are not finite after {self.progress.steps} steps")

    def _damaged(self) -> dict[str, int]:
        """How many damaged images were replaced so far, if they may be."""
        data, world = self.train_loader.dataset, self.trainer.world
        if not isinstance(data, SkipCorruptDataset):
            return {}
        found = world.all_reduce_sum(
            data.damaged.to(world.device, torch.int32)
        )  # each process met its own
        names = [data.pairs[i].image.name for i in found.nonzero().flatten().tolist()]
        if not names:
            return {}
        self.run.log(f"damaged and replaced by others: {', '.join(names)}")
        return {"damaged": len(names)}

    def _save_weights(self, improved: bool) -> None:
        stage, epoch, meta, folder = self.stage, self.progress.epoch, self._meta(), self.run.path
        scored = self.trainer.eval_model
        if improved:
            save_checkpoint(folder / stage.best_file, scored, meta)
            if stage.encoder_file:
                encoder = nn.ModuleDict({"encoder": scored.get_submodule("encoder")})
                save_checkpoint(folder / stage.encoder_file, encoder, meta)
        if self.course.keep_every and epoch % self.course.keep_every == 0:
            save_checkpoint(folder / f"{stage.name}_epoch{epoch:03d}.pth", scored, meta)

    def _save(self, tally: dict[str, Any] | None) -> Path:
        """Write a checkpoint, and the log that belongs to it."""
        self.progress.tally, self.progress.seconds = tally, self.budget.elapsed
        path = self.course.checkpoints.save(
            self.progress.steps,
            self.course.net,
            self._meta(),
            trainer=self.trainer.state_dict(),
            progress=self.progress.state(),
        )
        self.progress.tally = None
        self.run.write_records(self.progress.records)
        return path

    def _meta(self) -> dict[str, Any]:
        records, score = self.progress.records, self.trainer.task.score
        return {
            **self.course.meta,
            "stage": self.stage.name,
            "epoch": self.progress.epoch,
            score: records[-1][f"val_{score}"] if records else None,
        }

    def _line(self, record: dict[str, Any], improved: bool, validation_seconds: float) -> str:
        """What is printed of an epoch."""
        score, epoch, epochs = self.trainer.task.score, record["epoch"], self.stage.epochs
        left, rate, of_epochs = "", record["images_per_second"], f"/{epochs}"
        if self.clock is not None:
            seconds, of_epochs = max(0.0, self.clock.end - self.budget.elapsed), ""
            left = f"  {timedelta(seconds=math.ceil(seconds))} left"
        elif epoch < epochs and rate:  # resumed behind its last step, an epoch has no rate
            seconds = len(self.train_loader.dataset) / rate + validation_seconds
            left = f"  {timedelta(seconds=math.ceil(seconds * (epochs - epoch)))} left"
        return (
            f"{record['stage']} {epoch:3d}{of_epochs}  lr {record['lr']:.2e}  "
            f"loss {_show(record['train_loss'])} val {_show(record['val_loss'])}  "
            f"{self.trainer.task.score_name} {_show(record[f'train_{score}'])} "
            f"val {_show(record[f'val_{score}'])}  "
            f"{rate:.1f} images/s{left}"
            + (f"  {record['skipped']} steps skipped" if "skipped" in record else "")
            + ("  best" if improved else "")
        )


def _peak_memory(device: torch.device) -> dict[str, int]:
    """The most that the main process, and tensors on its GPU, took so far, in MB."""
    peaks = {"process_memory_mb": round(peak_memory_mb(torch.device("cpu")))}
    if device.type == "cuda":
        peaks["gpu_memory_mb"] = round(peak_memory_mb(device))
    return peaks


def _show(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.3f}"
