"""Command-line flags that several scripts share.

This module is quick to import: it does not import PyTorch.
"""

import argparse
import contextlib
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lednet.cli.released_flags import translate
from lednet.errors import UserError, exit_when_interrupted
from lednet.files import expand_home
from lednet.io import process_command

DATASETS = ("cityscapes", "camvid", "voc", "ade20k", "folders")
ANNOTATIONS = ("fine", "coarse", "both", "aug")
LABEL_ENCODINGS = ("auto", "labelIds", "labelTrainIds")
VARIANTS = ("d20", "d128")
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
BACKENDS = ("eager", "compiled", "onnxruntime", "openvino")
SCHEDULES = ("poly", "exponential", "cosine")
AUGMENTATIONS = ("paper", "modern")
OUTPUTS = ("labels", "color", "overlay", "side")

_CLONE = Path(__file__).resolve().parents[2]
ROOT = _CLONE if (_CLONE / "train/main.py").is_file() else Path()
"""Parent of the default folders save/ and datasets/: the clone that the library is run from, or
the current folder if the library is installed."""


def recipe_folder(script_folder: str) -> Path:
    """Recipes of the scripts in a folder of the repository: "train" or "imagenet"."""
    folder = _CLONE / script_folder / "recipes"
    packaged = Path(__file__).resolve().parents[1] / "recipes" / script_folder
    return folder if folder.is_dir() else packaged


CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of CPU time that a container has in each period, and the period."""

EARLIER_FLAGS = {
    "--val-every": "--val-stride", "--val-names": "--val-prefix", "--workers": "--num-workers",
    "--skip-damaged": "--skip-corrupt", "--what": "--outputs", "--photo": "--image-format",
    "--at": "--eval-size", "--sheet": "--contact-sheet",
}  # fmt: skip
"""Earlier spellings of flags, which are accepted, and the present ones."""

Flags = argparse.ArgumentParser | argparse._ArgumentGroup


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, and ends each help text with its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        shown = action.option_strings and action.default not in (None, False, argparse.SUPPRESS)
        if shown and "(default:" not in text and text != argparse.SUPPRESS:
            text = f"{text} (default: {format_default(action.default)})".lstrip()
        return text


def format_default(value: Any) -> str:
    """A default as it would be typed. A percent sign is doubled for argparse."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value).replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """A parser that raises a `UserError` for a wrong argument.

    Attributes:
        released: also accept the flags of the original release's script.
    """

    released = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        known = self._option_string_actions.keys()
        if self.released:
            words = translate(words, known)
        flags = {old: new for old, new in EARLIER_FLAGS.items() if new in known}
        parts = (word.partition("=") for word in words)
        words = [flags.get(flag, flag) + equals + value for flag, equals, value in parts]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        return super()._get_value(action, expand_home(arg_string))


def make_parser(description: str | None, released: bool = False) -> argparse.ArgumentParser:
    """A parser for a script whose docstring is `description`; `released` as in `Parser`."""
    parser = Parser(description=description, formatter_class=HelpFormatter)
    parser.released = released
    return parser


def print_help_early(build_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Print the help and exit, if the command line asks for it.

    Scripts call this before they import PyTorch, which takes seconds and can be interrupted.
    """
    exit_when_interrupted()
    if {"-h", "--help"} & set(sys.argv[1:]):
        build_parser().parse_args()


def at_least(least: float, kind: type = int, most: float = math.inf) -> Callable[[str], Any]:
    """A type for `argparse`: a number from `least` to `most`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {limits}")
        return value

    return parse


POSITIVE = at_least(1)
COUNT = at_least(0)
SEED = at_least(0, most=2**32 - 1)


def usable_cpus() -> int:
    """CPU cores that this process may use, rounded up: of its affinity (`taskset`, Slurm) and of
    the quota of its container (`docker run --cpus`)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no file, or no quota
        quota, period = CPU_QUOTA.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


# fmt: off
def add_dataset_flags(
    flags: Flags,
    annotations: tuple[str, ...] = ANNOTATIONS,
    hold_out: str = "hold out every N-th training image for validation",
    datadir: str = "folder of the data set (default: datasets/<dataset>)",
) -> None:
    """Flags that select a data set and its held-out part.

    Args:
        annotations: choices of --annotations.
        hold_out: help text of --val-stride.
        datadir: help text of --datadir.
    """
    add = flags.add_argument
    add("--dataset", choices=DATASETS, default="cityscapes", help="data set")
    add("--datadir", type=Path, help=datadir)
    add("--annotations", choices=annotations, default="fine",
        help="Cityscapes: fine, coarse (train_extra and train, coarsely annotated) or both; Pascal "
             "VOC: fine or aug (trainaug)")
    add("--labels", choices=LABEL_ENCODINGS, default="auto",
        help="encoding of Cityscapes label files; auto: by their names")
    add("--classes", type=Path, help="class file of own data (default: classes.yaml in --datadir)")
    add("--val-stride", type=COUNT, default=0, metavar="N", help=hold_out)
    add("--val-prefix", metavar="PREFIX",
        help="or hold out the images whose names begin with PREFIX: a recording, a city")


def dataset_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `open_dataset` from the flags of `add_dataset_flags`."""
    names = ("annotations", "labels", "val_stride", "val_prefix")
    return {name: getattr(args, name) for name in names} | {"class_file": args.classes}


def add_input_size_flags(flags: Flags, default: str = "as trained") -> None:
    """--height and --width of the network's input."""
    for name in ("height", "width"):
        flags.add_argument(f"--{name}", type=POSITIVE, metavar="PIXELS",
                           help=f"{name} of the network's input (default: {default})")


def add_num_workers_flag(flags: Flags, default: int, what: str = "data loading processes") -> None:
    flags.add_argument("--num-workers", type=COUNT, default=default, metavar="N", help=what)


def add_backend_flags(flags: Flags, fold: bool = False) -> None:
    """--device, --precision, --backend and, with `fold`, --fold."""
    add = flags.add_argument
    add("--device", choices=DEVICES, default="auto", help="device to run on")
    add("--precision", choices=PRECISIONS, default="fp32", help="number format")
    add("--backend", choices=("auto", *BACKENDS), default="auto",
        help="inference engine; auto: the fastest that is installed, for few images eager, which "
             "starts at once")
    add("--cache", action=argparse.BooleanOptionalAction, default=True,
        help="keep exported networks for later runs (in $XDG_CACHE_HOME/lednet)")
    if fold:
        add("--fold", action=argparse.BooleanOptionalAction, default=True,
            help="fold batch norm into the convolutions, which changes no output")


def predictor_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `Predictor` from its flags, as far as the parser has them."""
    names = ("device", "precision", "backend", "cache", "fold", "scales", "flip")
    return {"size": (args.height, args.width), **{n: getattr(args, n) for n in names if n in args}}


def report_header(args: argparse.Namespace, predictor: Any) -> dict[str, Any]:
    """Command, weights and engine, with which a JSON report of predictions begins."""
    return {
        "command": shlex.join(process_command()),
        "weights": str(args.weights),
        "network_size": list(predictor.size),
        "backend": predictor.backend,
        "precision": predictor.precision,
    }


def add_test_time_flags(flags: Flags) -> None:
    """--scales and --flip, whose predictions are averaged."""
    add = flags.add_argument
    add("--scales", type=at_least(0, float), nargs="+", default=[1.0], metavar="S",
        help="average the predictions at these sizes, relative to the network's input")
    add("--flip", action="store_true", help="average with the predictions of the mirrored image")


def add_overlay_flags(flags: Flags) -> None:
    add = flags.add_argument
    add("--alpha", type=at_least(0, float, most=1), default=0.5, metavar="SHARE",
        help="opacity of the class colours in overlays, 0 to 1")
    add("--legend", action=argparse.BooleanOptionalAction, default=True,
        help="draw a legend below each output")
# fmt: on
