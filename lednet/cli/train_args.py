"""What both training scripts do around the training itself: flags, processes, signals."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lednet.data.labels import LabelScheme
from lednet.data.loaders import worker_failures
from lednet.device import AMP_DTYPES, allow_tf32, autocast
from lednet.distributed import (
    DistributedContext,
    destroy_distributed,
    init_distributed,
    report_lost_process,
)
from lednet.errors import UserError
from lednet.training.checkpointing import Checkpoints
from lednet.training.config import recipe_path, set_options, set_recipe
from lednet.training.loggers import LoggerBackend, MetricLogger
from lednet.training.run_dir import RunDir, holds_run, read_options
from lednet.training.signals import CheckpointTimer, StopRequest, TrainingStopped
from lednet.training.trainer import TrainerConfig

BASE_RECIPE = "paper"
POSITIVE = ("num_epochs", "batch_size", "accumulate", "keep_checkpoints", "validate_every")
NOT_NEGATIVE = ("num_workers", "epochs_save", "save_minutes", "save_steps", "warmup_epochs")


def add_loading_flags(data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "--num-workers", type=int, default=min(4, os.cpu_count() or 1), help="loading processes"
    )
    data.add_argument(
        "--skip-damaged",
        action="store_true",
        help="replace training images that cannot be read by others, count and name them",
    )


def add_recipe_flags(recipe: argparse._ArgumentGroup) -> None:
    """The recipe, and flags of `TrainerConfig` that have the same meaning in each."""
    recipe.add_argument(
        "--recipe",
        default=BASE_RECIPE,
        metavar="NAME|FILE",
        help=f"of the script's folder recipes/ ({BASE_RECIPE}); it sets what is not given, and "
        f"{BASE_RECIPE} what it does not set",
    )
    recipe.add_argument("--seed", type=int, default=1, help="of everything random (1)")
    recipe.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="batches whose gradients make a step"
    )
    recipe.add_argument(
        "--clip-norm", type=float, metavar="X", help="largest norm of the gradients (no limit)"
    )
    recipe.add_argument(
        "--sync-batch-norm",
        action="store_true",
        help="batch norm over the images of all GPUs (untested)",
    )
    recipe.add_argument(
        "--skip-bad-steps",
        action="store_true",
        help="leave out a step whose loss is not finite, instead of stopping",
    )


def add_run_flags(parser: argparse.ArgumentParser, savedir: str) -> None:
    """How fast, where, and what is kept.

    Args:
        savedir: the folder's default name, for the help.
    """
    speed = parser.add_argument_group("speed")
    speed.add_argument("--precision", choices=tuple(AMP_DTYPES), default="fp32")
    speed.add_argument(
        "--channels-last", action="store_true", help="memory layout that suits bf16 and fp16"
    )
    speed.add_argument("--compile", action="store_true", help="torch.compile the network")
    speed.add_argument(
        "--cuda-graph",
        action="store_true",
        help="record the training step as a CUDA graph (one GPU)",
    )
    speed.add_argument(
        "--cache-device",
        action="store_true",
        help="keep the decoded data set in the memory of the training device",
    )
    speed.add_argument(
        "--deterministic",
        action="store_true",
        help="use deterministic GPU kernels, which are slower; CPUs need no flag",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--savedir", help=f"run folder; a bare name lies below save/ ({savedir})")
    run.add_argument(
        "--resume",
        nargs="?",
        choices=("always", "auto"),
        const="always",
        help="continue the run in --savedir with its options; flags given override. auto: "
        "where there is none yet, start it (for torchrun --max-restarts and job queues)",
    )
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    run.add_argument(
        "--cuda", action="store_const", const="cuda", dest="device", help="same as --device cuda"
    )
    run.add_argument(
        "--save-minutes",
        type=float,
        default=10,
        metavar="X",
        help="a checkpoint every X minutes, besides the one after each epoch; 0: none (10)",
    )
    run.add_argument(
        "--save-steps", type=int, default=0, metavar="N", help="and every N steps; 0: none"
    )
    run.add_argument(
        "--keep-checkpoints", type=int, default=2, metavar="N", help="to resume from (2)"
    )
    run.add_argument(
        "--epochs-save",
        type=int,
        default=0,
        metavar="N",
        help="also keep the weights of every N-th epoch",
    )
    run.add_argument(
        "--validate-every",
        type=int,
        default=1,
        metavar="N",
        help="score every N-th epoch, and the last of a stage (1)",
    )
    run.add_argument(
        "--max-minutes",
        type=float,
        metavar="X",
        help="end after X minutes, validation included: the schedule follows the time, and numbers "
        "of epochs say how stages share it (no limit)",
    )
    run.add_argument("--visualize", action="store_true", help="show the run on a visdom server")
    run.add_argument("--port", type=int, default=8097, help="of the visdom server")
    run.add_argument(
        "--tensorboard",
        action="store_true",
        help="show it in TensorBoard: writes tensorboard/ in the run's folder",
    )


def parse_flags(
    parser: argparse.ArgumentParser, run_path: Callable[[argparse.Namespace], Path], recipes: Path
) -> argparse.Namespace:
    """Arguments; the defaults are the recipe's or, with --resume, the run's own options.

    Args:
        run_path: the run's folder.
        recipes: folder of the recipes that have names.

    Raises:
        UserError: a number is out of its range, there is nothing to resume, or its options
            are damaged.
    """
    set_recipe(parser, recipe_path(BASE_RECIPE, recipes))  # first: --help shows its values
    args = parser.parse_args()
    if args.recipe != BASE_RECIPE:
        set_recipe(parser, recipe_path(args.recipe, recipes))
        args = parser.parse_args()
    resume = args.resume
    if resume == "auto" and not holds_run(run_path(args)):
        resume = None
    if resume:
        path = run_path(args)
        saved = {"recipe": BASE_RECIPE} | read_options(path)
        known = {action.dest for action in parser._actions} - {"resume"}
        options = {key: value for key, value in saved.items() if key in known}
        set_options(parser, options, path / "options.json")
    args = parser.parse_args()
    args.resume = resume
    if resume and args.recipe != saved["recipe"]:
        raise UserError(
            f"the run has the recipe {saved['recipe']}, not {args.recipe}: resume it "
            "without --recipe, and give the flags that shall change"
        )
    require_range(args, POSITIVE, 1)
    require_range(args, NOT_NEGATIVE, 0)
    for name in ("clip_norm", "max_minutes"):
        value = getattr(args, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give more than 0")
    if args.ema_decay is not None and not 0 <= args.ema_decay < 1:
        raise UserError(f"--ema-decay is {args.ema_decay}: give 0 to below 1")
    return args


def require_range(args: argparse.Namespace, names: Sequence[str], least: int) -> None:
    """
    Raises:
        UserError: one of the values called `names` is given and below `least`.
    """
    for name in names:
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give {least} or more")


def require_schedule(args: argparse.Namespace, epochs: int) -> None:
    """
    Raises:
        UserError: the warm-up takes all the epochs of a stage.
    """
    if args.warmup_epochs >= epochs:
        raise UserError(
            f"--warmup-epochs {args.warmup_epochs} leaves nothing of a stage's {epochs} epochs: "
            "give fewer"
        )


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


def open_dashboard(
    args: argparse.Namespace, folder: RunDir, scheme: LabelScheme | None = None
) -> MetricLogger | None:
    """What --visualize and --tensorboard ask for, in the main process.

    Args:
        scheme: see `MetricLogger`.

    Raises:
        UserError: what one of them needs is not installed.
    """
    displays: list[LoggerBackend] = []
    if folder.main and args.visualize:
        try:
            from lednet.training.visdom_logger import VisdomBackend
        except ImportError as error:
            raise UserError(
                "--visualize needs visdom: docs/install.md says how, or leave the flag out"
            ) from error
        displays.append(VisdomBackend(folder.path.name, port=args.port))
    if folder.main and args.tensorboard:
        try:
            from lednet.training.tensorboard_logger import TensorBoardBackend
        except ImportError as error:
            raise UserError(
                "--tensorboard needs TensorBoard: pip install tensorboard, or leave the flag out"
            ) from error
        displays.append(TensorBoardBackend(folder.path / "tensorboard"))
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
        keeper = CheckpointTimer(world, StopRequest(), args.save_steps, args.save_minutes)
        with report_lost_process(), worker_failures():
            train(world, keeper)
    except TrainingStopped as stopped:
        if world.is_main:
            print(f"{stopped}; go on with --resume", file=sys.stderr)
        sys.exit(stopped.exit_status)
    finally:
        destroy_distributed()
