"""The command `lednet`, and its commands as scripts.

This module is quick to import: it does not import PyTorch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import lednet
from lednet.cli import parsers
from lednet.cli.common import make_parser
from lednet.errors import UserError, exit_on_user_error, exit_when_interrupted

COMMANDS = {
    "predict": "label maps, overlays and class shares of images, videos and cameras",
    "evaluate": "IoU of each class, mIoU and pixel accuracy on a data set",
    "evaluate-cityscapes": "scores of the Cityscapes benchmark, speed, and the upload",
    "train": "train both stages",
    "pretrain": "pretrain the encoder as an image classifier",
    "export": "write a network to an ONNX, OpenVINO, torch.export or ExecuTorch file",
    "benchmark": "inference speed on this machine",
    "check": "check the files of a data set",
    "serve": "the network in a browser tab, on this machine",
}
"""Command -> what it does. Its flags are in `lednet.cli.parsers`, its code is `main` of the module
of the same name."""


def run(name: str, argv: Sequence[str] | None = None) -> Any:
    """Run a command as a script does: errors of the user are printed and exit with status 2.

    Flags are checked before PyTorch is imported, which takes seconds.

    Args:
        name: a key of `COMMANDS`.
        argv: arguments (default: those of the process).
    """
    module = name.replace("-", "_")
    # OpenMP threads that spin take the cores from other programs (docs/speed.md#threads).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    exit_when_interrupted()
    with exit_on_user_error():
        getattr(parsers, module)().parse_args(argv)
        return import_module(f"lednet.cli.{module}").main(argv)


def completion(shell: str) -> str:
    """A script with which `shell` completes commands, flags, their choices, and file names.

    Raises:
        UserError: the package shtab is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError("shell completion needs shtab: pip install shtab") from error
    parser = argparse.ArgumentParser("lednet")
    commands = parser.add_subparsers()
    for name, text in COMMANDS.items():
        command = getattr(parsers, name.replace("-", "_"))()
        for action in command._actions:
            if action.choices is None and action.nargs != 0:
                action.complete = shtab.FILE
        commands.add_parser(name, help=text, parents=[command], add_help=False)
    return shtab.complete(parser, shell)


def main() -> None:
    """Entry point of `lednet COMMAND ...`."""
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        name = sys.argv.pop(1)
        sys.argv[0] = f"lednet {name}"
        run(name)
        return
    width = max(map(len, COMMANDS))
    table = "\n".join(f"    {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = make_parser(
        f"LEDNet: real-time semantic segmentation.\n\n{table}\n\n"
        "`lednet COMMAND --help` lists the flags of a command."
    )
    parser.prog = "lednet"
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--print-completion", choices=("bash", "zsh", "tcsh"), metavar="SHELL",
                        help="print a completion script for bash, zsh or tcsh")  # fmt: skip
    parser.add_argument("--version", action="version", version=lednet.__version__)
    with exit_on_user_error():
        args = parser.parse_args(sys.argv[1:] or ["--help"])
        if not args.print_completion:
            parser.error("the command comes first")
        print(completion(args.print_completion))
