"""The start and the end of a training process: device, run folder, loggers, signals."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
from lednet.training.checkpointing import Checkpoints
from lednet.training.loggers import LoggerBackend, MetricLogger
from lednet.training.run_dir import RunDir
from lednet.training.signals import CheckpointTimer, StopRequest, TrainingStopped
from lednet.training.trainer import TrainerConfig


def config_from_args(args: argparse.Namespace, **options: Any) -> TrainerConfig:
    """`TrainerConfig` from the flags of the same names; `options` are those without flags."""
    names = {field.name for field in dataclasses.fields(TrainerConfig)}
    values = {name: value for name, value in vars(args).items() if name in names}
    return TrainerConfig(**values | {"ema_decay": args.ema_decay or None} | options)


def open_run(
    args: argparse.Namespace, path: Path, world: DistributedContext
) -> tuple[RunDir, Checkpoints]:
    return (
        RunDir(path, bool(args.resume), world.is_main),
        Checkpoints(path, args.keep_checkpoints),
    )


def open_logger(
    args: argparse.Namespace, run_dir: RunDir, scheme: LabelScheme | None = None
) -> MetricLogger | None:
    """What --visualize and --tensorboard ask for, in the main process.

    Args:
        scheme: see `MetricLogger`.

    Raises:
        UserError: what one of them needs is not installed.
    """
    displays: list[LoggerBackend] = []
    if run_dir.main and args.visualize:
        try:
            from lednet.training.visdom_logger import VisdomBackend
        except ImportError as error:
            raise UserError(
                "--visualize needs visdom: docs/install.md says how, or leave the flag out"
            ) from error
        displays.append(VisdomBackend(run_dir.path.name, port=args.port))
    if run_dir.main and args.tensorboard:
        try:
            from lednet.training.tensorboard_logger import TensorBoardBackend
        except ImportError as error:
            raise UserError(
                "--tensorboard needs TensorBoard: pip install tensorboard, or leave the flag out"
            ) from error
        displays.append(TensorBoardBackend(run_dir.path / "tensorboard"))
    return MetricLogger(displays, scheme) if displays else None


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
    args: argparse.Namespace, train: Callable[[DistributedContext, CheckpointTimer], None]
) -> None:
    """Take this process's place, and train so that signals find a moment to stop at.

    Exits with 143 or 130 after SIGTERM or SIGINT.

    Raises:
        UserError: the device or its precision is not there, another process of the run, or
            one that loads, has gone; and whatever `train` raises.
    """
    with report_lost_process():
        world = init_distributed(args.device)
    try:
        with autocast(world.device, args.precision):
            pass  # refuses a precision that the device lacks, before anything is written
        set_backends(world.device, args.precision, args.deterministic)
        timer = CheckpointTimer(world, StopRequest(), args.save_steps, args.save_minutes)
        with report_lost_process(), worker_failures():
            train(world, timer)
    except TrainingStopped as stopped:
        if world.is_main:
            print(f"{stopped}; continue with --resume", file=sys.stderr)
        sys.exit(stopped.exit_status)
    finally:
        destroy_distributed()
