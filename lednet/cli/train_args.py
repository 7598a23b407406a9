"""Flags of the training scripts, recipes, and the options of a run that is resumed.

This module is quick to import: it does not import PyTorch.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lednet.cli.common import (
    COUNT,
    DEVICES,
    POSITIVE,
    PRECISIONS,
    ROOT,
    SCHEDULES,
    SEED,
    Flags,
    add_num_workers_flag,
    at_least,
    usable_cpus,
)
from lednet.errors import UserError
from lednet.training.config import recipe_path, set_options, set_recipe

BASE_RECIPE = "paper"
NOT_NEGATIVE = at_least(0, float)


# fmt: off
def add_loading_flags(data: Flags) -> None:
    """Flags about loading the data."""
    add_num_workers_flag(data, min(4, usable_cpus()))
    add = data.add_argument
    add("--skip-corrupt", action="store_true",
        help="replace training images that cannot be read by others, and report them")
    add("--cache-device", action="store_true",
        help="keep the decoded data set in the memory of the training device")


def add_recipe_flags(recipe: Flags, optimizer: str) -> None:
    """Flags whose defaults come from a recipe, and others of the optimization.

    Args:
        optimizer: its name, for the help.
    """
    add = recipe.add_argument
    add("--recipe", default=BASE_RECIPE, metavar="NAME|FILE",
        help="file of options, or the name of one in the script's folder recipes/; flags that are "
             "given override it")
    add("--num-epochs", type=POSITIVE, metavar="N", help="epochs of each stage")
    add("--batch-size", type=POSITIVE, metavar="N", help="images per step and process")
    add("--lr", type=NOT_NEGATIVE, help=f"initial learning rate of {optimizer}")
    add("--schedule", choices=SCHEDULES, help="learning rate schedule")
    add("--warmup-epochs", type=COUNT, metavar="N", help="epochs of linear warm-up")
    add("--weight-decay", type=NOT_NEGATIVE, help="L2 penalty")
    add("--ema-decay", type=NOT_NEGATIVE, metavar="D",
        help="decay of an exponential moving average of the weights, which is then evaluated and "
             "saved; 0: none")
    add("--seed", type=SEED, default=1, help="random seed")
    add("--accumulate", type=POSITIVE, default=1, metavar="N",
        help="batches whose gradients are accumulated for one step")
    add("--clip-norm", type=NOT_NEGATIVE, metavar="X", help="largest norm of the gradients")
    add("--sync-batch-norm", action="store_true",
        help="synchronize batch norm statistics between GPUs (untested)")
    add("--skip-bad-steps", action="store_true",
        help="skip steps whose loss is not finite, instead of stopping")


def add_run_flags(parser: argparse.ArgumentParser, savedir: str) -> None:
    """Flags about speed, the run folder, checkpoints and loggers.

    Args:
        savedir: default name of the run folder, for the help.
    """
    add = parser.add_argument_group("speed").add_argument
    add("--precision", choices=PRECISIONS, default="fp32", help="number format")
    add("--channels-last", action="store_true",
        help="channels-last memory format, which suits bf16 and fp16")
    add("--compile", action="store_true", help="compile the network (torch.compile)")
    add("--cuda-graph", action="store_true",
        help="record the training step as a CUDA graph (one GPU)")
    add("--deterministic", action="store_true",
        help="use deterministic GPU kernels, which are slower; CPUs need no flag")

    add = parser.add_argument_group("run").add_argument
    add("--savedir", metavar="NAME|DIR",
        help=f"run folder; a name without a slash is created in save/ (default: {savedir})")
    add("--resume", nargs="?", choices=("always", "auto"), const="always",
        help="resume the run in --savedir with its options; flags that are given override them. "
             "auto: start the run if there is none (for torchrun --max-restarts and job queues)")
    add("--device", choices=DEVICES, default="auto", help="device to train on")
    add("--cuda", action="store_const", const="cuda", dest="device", default=argparse.SUPPRESS,
        help="same as --device cuda")
    add("--max-minutes", type=NOT_NEGATIVE, metavar="X",
        help="end after X minutes, validation included; the schedule follows the time, which "
             "stages divide in proportion to their epochs")
    add("--save-minutes", type=NOT_NEGATIVE, default=10, metavar="X",
        help="minutes between checkpoints, besides the one after each epoch; 0: none")
    add("--save-steps", type=COUNT, default=0, metavar="N",
        help="steps between checkpoints; 0: none")
    add("--keep-checkpoints", type=POSITIVE, default=2, metavar="N", help="checkpoints to keep")
    add("--epochs-save", type=COUNT, default=0, metavar="N",
        help="also keep the weights of every N-th epoch; 0: none")
    add("--validate-every", type=POSITIVE, default=1, metavar="N",
        help="validate after every N-th epoch and after the last of a stage")
    add("--visualize", action="store_true", help="log to a visdom server")
    add("--port", type=int, default=8097, help="port of the visdom server")
    add("--tensorboard", action="store_true", help="log to TensorBoard, in the run folder")
# fmt: on


def run_folder(name: str) -> Path:
    """The run folder of --savedir: a name without a slash is in save/ of the repository."""
    return ROOT / "save" / name if Path(name).name == name else Path(name)


def parse_flags(
    parser: argparse.ArgumentParser,
    run_path: Callable[[argparse.Namespace], Path],
    recipes: Path,
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Arguments, with defaults from the recipe or, with --resume, the options of the run.

    Args:
        run_path: returns the run folder.
        recipes: folder of the recipes that are known by name.
        argv: arguments (default: those of the process).

    Raises:
        UserError: a value is invalid, there is no run to resume, or its options are damaged.
    """
    set_recipe(parser, recipe_path(BASE_RECIPE, recipes))  # first: --help shows its values
    args = parser.parse_args(argv)
    if args.recipe != BASE_RECIPE:
        set_recipe(parser, recipe_path(args.recipe, recipes))
        args = parser.parse_args(argv)
    from lednet.training.run_dir import holds_run, read_options  # imports PyTorch

    path, resume = run_path(args), args.resume
    if resume == "auto" and not holds_run(path):
        resume = None
    if resume:
        saved = {"recipe": BASE_RECIPE} | read_options(path)
        known = {action.dest for action in parser._actions} - {"resume"}
        options = {key: value for key, value in saved.items() if key in known}
        set_options(parser, options, path / "options.json")
    args = parser.parse_args(argv)
    args.resume = resume
    if resume:
        if args.recipe != saved["recipe"]:
            raise UserError(
                f"the run was started with the recipe {saved['recipe']}, not {args.recipe}: resume "
                "it without --recipe, and give the flags that shall change"
            )
        _require_same_options(parser, args, saved)
    for name in ("clip_norm", "max_minutes"):
        if getattr(args, name, None) == 0:
            raise UserError(f"--{name.replace('_', '-')} is 0: give more, or leave it out")
    if args.ema_decay is not None and args.ema_decay >= 1:
        raise UserError(f"--ema-decay is {args.ema_decay}: give less than 1")
    return args


FIXED_OPTIONS = (
    "dataset", "annotations", "val_stride", "val_prefix", "with_val", "variant",
    "pyramid_channels", "state", "reset_head", "pretrained_encoder",
)  # fmt: skip
"""Options that a resumed run cannot change."""


def _require_same_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, saved: dict[str, Any]
) -> None:
    flags = {action.dest: action.option_strings[0] for action in reversed(parser._actions)}

    def describe(name: str, value: Any) -> str:
        if not value:
            return f"without {flags[name]}"
        return f"with {flags[name]}" + (f" {value}" if value is not True else "")

    for name in FIXED_OPTIONS:
        if name in saved and name in vars(args) and str(saved[name]) != str(getattr(args, name)):
            raise UserError(
                f"the run was started {describe(name, saved[name])}: resume it so, not "
                f"{describe(name, getattr(args, name))}, or start a new run with --state"
            )


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
