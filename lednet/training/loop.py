"""The training loop of a run: stages, epochs, checkpoints and logs."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
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
from lednet.training.signals import Action, CheckpointTimer, TrainingStopped
from lednet.training.stages import Stage
from lednet.training.time_budget import TimeBudget
from lednet.training.trainer import EpochState, NonFiniteLoss, Trainer


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        stage: name of the current stage.
        epoch: finished epochs of that stage.
        steps: optimizer steps of all stages.
        best_score: best validation score of that stage; -1 before the first.
        records: lines of `log.jsonl` so far, of all stages.
        epoch_state: state of an interrupted epoch, see `EpochState.state`; None between epochs.
        seconds: training time of the whole run.
        stage_start: value of `seconds` at the start of the stage.
    """

    stage: str
    epoch: int = 0
    steps: int = 0
    best_score: float = -1.0
    records: list[dict[str, Any]] = field(default_factory=list)
    epoch_state: dict[str, Any] | None = None
    seconds: float = 0.0
    stage_start: float = 0.0

    def state(self) -> dict[str, Any]:
        """Contents of a checkpoint's "progress". Stage and epoch are in its "meta"."""
        values = (getattr(self, entry.name) for entry in fields(self)[2:])
        return dict(zip(PROGRESS_TYPES, values, strict=True))


META_TYPES: dict[str, type | UnionType] = {
    "stage": str, "epoch": int, "mean": list | tuple, "std": list | tuple,
}  # fmt: skip
PROGRESS_TYPES: dict[str, type | UnionType] = {
    "steps": int, "best_score": int | float, "records": list, "tally": dict | None,
    "seconds": int | float, "stage_start": int | float,
}  # fmt: skip
"""Entries of a checkpoint's "meta" and "progress" and their types; those of `PROGRESS_TYPES` in the
order of `Progress`, whose `epoch_state` is "tally" in files."""


@dataclass
class TrainingRun:
    """What all stages of a run have in common.

    Attributes:
        net: the whole network; each stage trains a part of it.
        stages: all stages of the run.
        run_dir: the run folder; only the main process writes to it.
        checkpoints: checkpoints in that folder.
        meta: description of data and classes, stored with the weights.
        seed: random seed.
        timer: decides when to save and when to stop.
        logger: where metrics are shown after each epoch; None for nowhere.
        keep_every: also keep the weights of every n-th epoch; 0 keeps none.
        validate_every: validate after every n-th epoch of a stage and after its last.
        budget: time limit of the run; None for no limit.
    """

    net: nn.Module
    stages: Sequence[Stage]
    run_dir: RunDir
    checkpoints: Checkpoints
    meta: dict[str, Any]
    seed: int
    timer: CheckpointTimer
    logger: MetricLogger | None = None
    keep_every: int = 0
    validate_every: int = 1
    budget: TimeBudget | None = None

    def resume(self) -> tuple[Progress, dict[str, Any]]:
        """Load the newest valid checkpoint into `net`.

        Returns:
            The progress of the run, and the state of the trainer.

        Raises:
            UserError: there is no checkpoint, it holds weights only, or its stage is not one of
                `stages`.
        """
        path, content, warnings = self.checkpoints.load_latest(self.run_dir.main)
        for warning in warnings:
            self.run_dir.log(f"{warning}; resuming from {path.name}")
        if not {"meta", "trainer", "progress"} <= content.keys():
            raise UserError(f"{path} holds weights only: start a new run with --state {path}")
        meta, state = content["meta"], content["progress"]
        if isinstance(state, dict):  # checkpoints of version 0.1 have no times
            state = {"seconds": 0.0, "stage_start": 0.0, **state}
        if not _is_progress(meta, state):
            raise UserError(
                f"{path} was written by another version: resume with that version, or start a new "
                f"run with --state {path}"
            )
        if meta["stage"] not in [stage.name for stage in self.stages]:
            raise UserError(
                f"{path} is in stage {meta['stage']}, which these options leave out: resume with "
                "the original options"
            )
        _require_same_classes(meta, self.meta, path)
        load_state(self.net, content["state_dict"], path)
        self.meta |= {key: meta[key] for key in ("mean", "std")}
        entries = (state[key] for key in PROGRESS_TYPES)
        progress = Progress(meta["stage"], meta["epoch"], *entries)
        self.run_dir.write_records(progress.records)
        step = progress.epoch_state["step"] if progress.epoch_state else 0
        within = f", {step} batches into the next" if step else ""
        self.run_dir.log(
            f"resuming {progress.stage} after epoch {progress.epoch}{within} ({path.name})"
        )
        return progress, content["trainer"]


def _is_progress(meta: Any, state: Any) -> bool:
    """Whether a checkpoint's "meta" and "progress" have the form that `StageRunner` writes."""
    try:
        json.dumps(state["records"], allow_nan=False)
        return (
            all(isinstance(meta[key], kind) for key, kind in META_TYPES.items())
            and all(isinstance(state[key], kind) for key, kind in PROGRESS_TYPES.items())
            and all(isinstance(record, dict) for record in state["records"])
            and (state["tally"] is None or isinstance(state["tally"]["step"], int))
        )
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        return False


def _require_same_classes(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """
    Raises:
        UserError: the classes of a checkpoint or their label values are not the current ones;
            names the first difference. Checkpoints of version 0.1 have no label values.
    """

    def names(meta: dict[str, Any]) -> dict[tuple[str, int], str]:
        classes = dict(enumerate(meta.get("classes", ()))) if "classes" in saved else {}
        values = meta.get("label_values", ()) if "label_values" in saved else ()
        return {
            **{("class", index): name for index, name in classes.items()},
            **{("label value", value): classes.get(index, "void") for value, index in values},
        }

    before, now = names(saved), names(current)
    for key in sorted(before.keys() | now.keys()):
        was, present = before.get(key, "absent"), now.get(key, "absent")
        if was != present:
            raise UserError(
                f"the classes are not those of {path}: {key[0]} {key[1]} was {was}, and is "
                f"{present}. Restore them to resume the run, or start a new one with --state"
            )


class StageComponents(NamedTuple):
    """Trainer and data loaders of a stage."""

    trainer: Trainer
    train_loader: TrainBatches
    val_loader: Batches


def train_stages(
    run: TrainingRun,
    build_stage: Callable[[Stage], StageComponents],
    progress: Progress | None = None,
    trainer_state: dict[str, Any] | None = None,
) -> Progress:
    """Train the remaining stages.

    Args:
        build_stage: called when a stage starts or is resumed.
        progress, trainer_state: from `TrainingRun.resume`; None starts with the first stage.

    Returns:
        The progress at the end.

    Raises:
        TrainingStopped: a signal arrived; the step has been finished and everything saved.
        UserError: the loss is not finite, or data cannot be read.
    """
    names = [stage.name for stage in run.stages]
    progress = progress or Progress(names[0])
    budget = run.budget or TimeBudget(run.timer.dist_context)
    budget.add(progress.seconds)
    with run.timer.request.watching():
        for stage in run.stages[names.index(progress.stage) :]:
            if stage.name != progress.stage:
                progress = Progress(stage.name, 0, progress.steps, records=progress.records)
                progress.stage_start, trainer_state = budget.elapsed, None
            components = build_stage(stage)
            if trainer_state is not None:
                with report_mismatch():
                    components.trainer.load_state_dict(trainer_state)
            StageRunner(run, stage, components, progress, budget).train()
    return progress


def report_result(run: TrainingRun, progress: Progress, score: str, file: str) -> None:
    """Log the best score of a finished run, and the paths of weights and curves.

    Args:
        score: name of the score.
        file: name of the file of the weights.
    """
    folder, log = run.run_dir.path, run.run_dir.log
    if progress.best_score < 0 or not (folder / file).exists():
        last = next(iter(run.checkpoints.paths()), folder)
        reason = f"no epoch has a val {score}" if progress.best_score < 0 else "it was removed"
        log(f"done: there is no {file} ({reason}); the last weights are in {last}")
    else:
        best, curves = folder / file, folder / "curves.png"
        log(f"done: best val {score} {progress.best_score:.3f}; weights {best}, curves {curves}")


@contextlib.contextmanager
def report_mismatch() -> Iterator[None]:
    """Turn errors in loading a part of a checkpoint into a `UserError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            "checkpoint and current options do not match: resume with the original options, or "
            "start a new run from its weights with --state"
        ) from error


class StageRunner:
    """Trains a stage and updates `progress` after each step."""

    def __init__(
        self, run: TrainingRun, stage: Stage, components: StageComponents, progress: Progress,
        budget: TimeBudget,
    ):  # fmt: skip
        self.run, self.stage, self.progress, self.budget = run, stage, progress, budget
        self.trainer, self.train_loader, self.val_loader = components
        self.dist_context, self.task = self.trainer.dist_context, self.trainer.task
        self.number = run.stages.index(stage)
        self.clock = self.trainer.clock = budget.stage(self.number, progress.stage_start)
        self.time_over = False

    def train(self) -> None:
        """Train the remaining epochs; validate, save and log after each."""
        try:
            while not self._finished():
                self._run_epoch(self.progress.epoch + 1)
        except NonFiniteLoss as error:
            saved = self.run.checkpoints.paths()
            last = f"{saved[0]} is valid" if saved else "there is no checkpoint yet"
            raise UserError(
                f"{error}; {last}: continue with --resume and a lower --lr, --skip-bad-steps or "
                "--precision fp32"
            ) from error
        finally:
            end_loading(self.train_loader)
            end_loading(self.val_loader)
        self.trainer.copy_ema_to_model()
        if self.dist_context.is_main:
            folder, meta = self.run.run_dir.path, self.run.meta
            title = f"{folder.name}: {meta['model']}, {meta['dataset']}"
            stages = {stage.name: stage.title for stage in self.run.stages}
            scores = self.task.score, self.task.score_name
            plot_curves(self.progress.records, folder / "curves.png", title, stages, *scores)

    def _finished(self) -> bool:
        """Whether all epochs of the stage are done or, with a time limit, its time is over."""
        if self.clock is None:
            return self.progress.epoch >= self.stage.epochs
        if self.time_over:
            return True
        records = [r for r in self.progress.records if r["stage"] == self.stage.name]
        validated = bool(records) and records[-1][f"val_{self.task.score}"] is not None
        return validated and self.progress.epoch_state is None and self.clock.share() >= 1

    def _run_epoch(self, epoch: int) -> None:
        of_epochs = f"/{self.stage.epochs}" if self.clock is None else ""
        title = f"{self.stage.name} {epoch}{of_epochs}"
        begin = time.perf_counter()
        state = self.trainer.new_epoch_state()
        lr, trained = self._train_epoch(epoch, title, state)
        start = time.perf_counter()
        validated = self._validate(epoch, title, state)
        end = time.perf_counter()
        score, device = self.task.score, self.dist_context.device
        record = {
            "stage": self.stage.name,
            "epoch": epoch,
            "lr": lr,
            **{f"train_{key}": trained[key] for key in ("loss", score)},
            **{f"val_{key}": value for key, value in validated.items()},
            "images_per_second": trained["images_per_second"],
            "seconds": end - begin,
            "process_memory_mb": round(peak_memory_mb(torch.device("cpu"))),
            **({"gpu_memory_mb": round(peak_memory_mb(device))} if device.type == "cuda" else {}),
            **{key: trained[key] for key in ("skipped",) if key in trained},
            **self._count_corrupt(),
        }
        self._finish_epoch(record, validated[score], end - start)

    def _train_epoch(
        self, epoch: int, title: str, state: EpochState
    ) -> tuple[float, dict[str, Any]]:
        """Train an epoch, or the rest of an interrupted one; updates `state`. Returns the first
        learning rate, and the results of `Trainer.train_one_epoch`."""
        trainer, progress, loader = self.trainer, self.progress, self.train_loader
        if progress.epoch_state is not None:
            with report_mismatch():
                state.restore(progress.epoch_state, self.dist_context)
            progress.epoch_state = None
        loader.sampler.epoch = epoch
        per_process = state.images // self.dist_context.size
        loader.sampler.start = min(per_process, loader.sampler.num_samples)
        lr = trainer.start_epoch(epoch)
        # Not of the first step, in which the network may be compiled.
        begin: tuple[float, int] | None = None

        def after_step() -> None:
            nonlocal begin
            progress.steps += 1
            if begin is None:
                begin = time.perf_counter(), state.images
            elif self.clock is not None:  # a validation image takes no longer than a training image
                seconds = (time.perf_counter() - begin[0]) / (state.images - begin[1])
                self.clock.expect_validation(len(self.val_loader.dataset) * seconds)
            self._handle_action(state, self.run.timer.poll(progress.steps))

        keys = (self.run.seed, self.number, epoch)
        return lr, trainer.train_one_epoch(loader, title, keys, state, after_step)

    def _validate(self, epoch: int, title: str, state: EpochState) -> dict[str, Any]:
        """Results of `Trainer.evaluate`; None for each if this epoch is not validated."""
        clock, timer = self.clock, self.run.timer
        # Decided before the validation, which may take less time than expected.
        self.time_over = clock is not None and clock.share() >= 1
        last = epoch == self.stage.epochs if clock is None else self.time_over
        if epoch % self.run.validate_every and not last:
            return {"loss": None, self.task.score: None}

        def after_batch() -> None:
            # Processes may have different numbers of batches; several ones stop at the end.
            if self.dist_context.size == 1 and timer.stop_signal():
                self._handle_action(state, Action.STOP)

        start = time.perf_counter()
        results = self.trainer.evaluate(self.val_loader, f"{title} val", after_batch)
        if clock is not None:
            clock.validated(time.perf_counter() - start)
        return results

    def _finish_epoch(
        self, record: dict[str, Any], score: float | None, validation_seconds: float
    ) -> None:
        """Save and log a finished epoch, and stop if a signal has arrived."""
        progress, run = self.progress, self.run
        progress.records.append(record)
        progress.epoch = record["epoch"]
        improved = score is not None and score > progress.best_score
        if score is not None and improved:
            progress.best_score = score
        if self.dist_context.is_main:
            self._require_finite()
            self._save_weights(improved)
            self._save_checkpoint(None)
            run.run_dir.log(self._format_record(record, improved, validation_seconds))
            if run.logger is not None:
                model = self.trainer.eval_model
                run.logger.log(progress.records, self.task, model, self.val_loader)
        if number := run.timer.stop_signal():
            raise TrainingStopped(number)

    def _handle_action(self, state: EpochState, action: Action) -> None:
        """Save a checkpoint within an epoch, and stop, as `action` says."""
        if action == Action.CONTINUE:
            return
        saved = state.state(self.dist_context)  # a reduction: every process calls it
        if self.dist_context.is_main:
            self._require_finite()
            path = self._save_checkpoint(saved)
            if action == Action.STOP:
                self.run.run_dir.log(f"saved {path}; continue with --resume")
        if action == Action.STOP:
            raise TrainingStopped(self.run.timer.signal)

    def _require_finite(self) -> None:
        """Check the weights before they are saved: a step with a finite loss may overflow them."""
        if not all(value.isfinite().all() for value in self.run.net.state_dict().values()):
            raise NonFiniteLoss(f"the weights are not finite after {self.progress.steps} steps")

    def _count_corrupt(self) -> dict[str, int]:
        """Number of corrupt images that have been replaced so far, if --skip-corrupt is given."""
        data = self.train_loader.dataset
        if not isinstance(data, SkipCorruptDataset):
            return {}
        # Each process has read its own share of the images.
        flags = data.damaged.to(self.dist_context.device, torch.int32)
        found = self.dist_context.all_reduce_sum(flags)
        names = [data.pairs[i].image.name for i in found.nonzero().flatten().tolist()]
        if names:
            self.run.run_dir.log(f"damaged and replaced by others: {', '.join(names)}")
        return {"damaged": len(names)} if names else {}

    def _save_weights(self, improved: bool) -> None:
        """Write the best weights of the stage, and those of every n-th epoch."""
        stage, epoch, meta = self.stage, self.progress.epoch, self._meta()
        folder, model = self.run.run_dir.path, self.trainer.eval_model
        if improved:
            save_checkpoint(folder / stage.best_file, model, meta)
            if stage.encoder_file:
                encoder = nn.ModuleDict({"encoder": model.get_submodule("encoder")})
                save_checkpoint(folder / stage.encoder_file, encoder, meta)
        if self.run.keep_every and epoch % self.run.keep_every == 0:
            save_checkpoint(folder / f"{stage.name}_epoch{epoch:03d}.pth", model, meta)

    def _save_checkpoint(self, epoch_state: dict[str, Any] | None) -> Path:
        """Write a checkpoint, with the state of an interrupted epoch, and the log up to it."""
        self.progress.epoch_state, self.progress.seconds = epoch_state, self.budget.elapsed
        path = self.run.checkpoints.save(
            self.progress.steps, self.run.net, self._meta(),
            trainer=self.trainer.state_dict(), progress=self.progress.state(),
        )  # fmt: skip
        self.progress.epoch_state = None
        self.run.run_dir.write_records(self.progress.records)
        return path

    def _meta(self) -> dict[str, Any]:
        records, score = self.progress.records, self.task.score
        last = records[-1][f"val_{score}"] if records else None
        stage, epoch = self.stage.name, self.progress.epoch
        return {**self.run.meta, "stage": stage, "epoch": epoch, score: last}

    def _format_record(
        self, record: dict[str, Any], improved: bool, validation_seconds: float
    ) -> str:
        score, epoch, epochs = self.task.score, record["epoch"], self.stage.epochs
        rate, of_epochs, seconds = record["images_per_second"], f"/{epochs}", None
        if self.clock is not None:
            seconds, of_epochs = max(0.0, self.clock.end - self.budget.elapsed), ""
        elif epoch < epochs and rate:  # 0 if the epoch was resumed after its last step
            seconds = len(self.train_loader.dataset) / rate + validation_seconds
            seconds *= epochs - epoch
        return (
            f"{record['stage']} {epoch:3d}{of_epochs}  lr {record['lr']:.2e}  "
            f"loss {_format(record['train_loss'])} val {_format(record['val_loss'])}  "
            f"{self.task.score_name} {_format(record[f'train_{score}'])} "
            f"val {_format(record[f'val_{score}'])}  {rate:.1f} images/s"
            + ("" if seconds is None else f"  {timedelta(seconds=math.ceil(seconds))} left")
            + (f"  {record['skipped']} steps skipped" if "skipped" in record else "")
            + ("  best" if improved else "")
        )


def _format(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.3f}"
