"""Setup and shutdown of a training process: device, run folder, loggers, signals."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lednet.data.labels import LabelScheme
from lednet.data.loaders import worker_failures
from lednet.device import allow_tf32, autocast
from lednet.distributed import (
    DistributedContext,
    destroy_distributed,
    init_distributed,
    report_lost_process,
)
from lednet.errors import UserError
from lednet.io import plain_values, write_text
from lednet.model import count_parameters
from lednet.signals import StopRequest
from lednet.training.checkpointing import Checkpoints
from lednet.training.loggers import LoggerBackend, MetricLogger
from lednet.training.loop import StageComponents, TrainingRun, report_result, train_stages
from lednet.training.run_dir import RunDir
from lednet.training.signals import CheckpointTimer, TrainingStopped
from lednet.training.stages import Stage
from lednet.training.time_budget import TimeBudget
from lednet.training.trainer import TrainerConfig


def config_from_args(args: argparse.Namespace, **options: Any) -> TrainerConfig:
    """`TrainerConfig` from the flags of the same names; `options` are those without flags."""
    names = {field.name for field in dataclasses.fields(TrainerConfig)}
    values = {name: value for name, value in vars(args).items() if name in names}
    return TrainerConfig(**values | {"ema_decay": args.ema_decay or None} | options)


def open_run(
    args: argparse.Namespace,
    path: Path,
    net: nn.Module,
    stages: list[Stage],
    meta: dict[str, Any],
    timer: CheckpointTimer,
    costs: Sequence[float] = (1.0,),
    scheme: LabelScheme | None = None,
) -> TrainingRun:
    """The run in the folder `path`, with the options of `args`.

    Args:
        meta: see `TrainingRun`.
        costs: see `TimeBudget`.
        scheme: see `MetricLogger`.

    Raises:
        UserError: see `RunDir` and `open_logger`.
    """
    run_dir = RunDir(path, bool(args.resume), timer.dist_context.is_main)
    return TrainingRun(
        net, stages, run_dir, Checkpoints(path, args.keep_checkpoints), meta, args.seed, timer,
        logger=open_logger(args, run_dir, scheme), keep_every=args.epochs_save,
        validate_every=args.validate_every,
        budget=TimeBudget(timer.dist_context, args.max_minutes, costs),
    )  # fmt: skip


def train_run(
    args: argparse.Namespace,
    run: TrainingRun,
    build_stage: Callable[[Stage], StageComponents],
    about: str,
    score: str,
) -> None:
    """Describe the run in its folder, train its remaining stages, and log the result.

    Args:
        run: a new run, or one that is resumed if `args` say so.
        build_stage: see `train_stages`.
        about: what is trained, for the log.
        score: name of the score.
    """
    context = run.timer.dist_context
    state = run.resume() if args.resume else ()
    run.net.to(context.device)
    if args.sync_batch_norm:
        if context.device.type != "cuda":  # PyTorch has no other implementation
            raise UserError("--sync-batch-norm needs CUDA GPUs: leave it out")
        run.net = nn.SyncBatchNorm.convert_sync_batchnorm(run.net)
    run.run_dir.write_options(plain_values(vars(args)), context)
    parameters = f"{count_parameters(run.net):,} parameters"
    if context.is_main:
        write_text(run.run_dir.path / "model.txt", f"{run.net}\n\n{parameters}\n")
    on = f"on {context.size} x {context.device}; {run.run_dir.path}"
    run.run_dir.log(f"{about}, {parameters}, {on}")
    progress, last = train_stages(run, build_stage, *state), run.stages[-1]
    report_result(run, progress, score, last.encoder_file or last.best_file)


def open_logger(
    args: argparse.Namespace, run_dir: RunDir, scheme: LabelScheme | None = None
) -> MetricLogger | None:
    """The loggers of --visualize and --tensorboard, in the main process.

    Args:
        scheme: see `MetricLogger`.

    Raises:
        UserError: a package is not installed.
    """
    backends: list[LoggerBackend] = []
    hint = ""
    try:
        if run_dir.main and args.visualize:
            hint = "--visualize needs visdom: docs/install.md says how"
            from lednet.training.visdom_logger import VisdomBackend

            backends.append(VisdomBackend(run_dir.path.name, port=args.port))
        if run_dir.main and args.tensorboard:
            hint = "--tensorboard needs TensorBoard: pip install tensorboard"
            from lednet.training.tensorboard_logger import TensorBoardBackend

            backends.append(TensorBoardBackend(run_dir.path / "tensorboard"))
    except ImportError as error:
        raise UserError(f"{hint}, or leave the flag out") from error
    return MetricLogger(backends, scheme) if backends else None


def set_backends(device: torch.device, precision: str, deterministic: bool = False) -> None:
    """Settings of the whole process for training on `device`."""
    if device.type != "cuda":
        return
    allow_tf32(precision != "fp32")
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # Read when cuBLAS is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # PyTorch warns of max pooling, whose windows do not overlap here: it is deterministic.
        torch.use_deterministic_algorithms(True, warn_only=True)


def launch(
    args: argparse.Namespace,
    train: Callable[[argparse.Namespace, DistributedContext, CheckpointTimer], None],
) -> None:
    """Join the other processes, and train.

    Exits with 143, 130 or 129 after SIGTERM, SIGINT or SIGHUP.

    Raises:
        UserError: the device or its precision is not available, another process of the run or a
            data loading process has ended; and what `train` raises.
    """
    with report_lost_process():
        dist_context = init_distributed(args.device)
    try:
        with autocast(dist_context.device, args.precision):
            pass  # refuses a precision that the device lacks, before anything is written
        set_backends(dist_context.device, args.precision, args.deterministic)
        timer = CheckpointTimer(dist_context, StopRequest(), args.save_steps, args.save_minutes)
        with report_lost_process(), worker_failures():
            train(args, dist_context, timer)
    except TrainingStopped as stopped:
        if dist_context.is_main:
            print(f"{stopped}; continue with --resume", file=sys.stderr)
        sys.exit(stopped.exit_status)
    finally:
        destroy_distributed()
