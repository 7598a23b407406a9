"""Flags of the original release's scripts that have another spelling or no meaning here."""

import functools
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

IGNORED = {
    "--model": "there is one network, in the sizes of --variant",
    "-m": "there is one network, in the sizes of --variant",
    "--name": "the run is named by --savedir",
    "--loadModel": "the weights say which network they belong to",
    "--steps-loss": "the progress bar shows the loss",
    "--steps-plot": "--visualize plots every epoch",
    "--iouVal": "the validation images are always scored",
}
SWITCHES = ("--iouVal", "--cpu")
DEFAULTS = {"--loadDir": "../save/logs", "--loadWeights": "model_best.pth", "--subset": "val"}
COLOR_FLAGS = ("--datadir", "--subset")
"""Flags of eval_cityscapes_color.py, which has --input here."""


def translate(argv: Sequence[str], known: Collection[str]) -> list[str]:
    """Replace flags of the release in a command line.

    Args:
        known: flags of the script, which are left as they are.
    """
    arguments: list[str] = []
    released: dict[str, str] = {}
    renamed = {*IGNORED, "--loadDir", "--loadWeights", "--cpu"}
    if "--input" in known:
        renamed |= {*COLOR_FLAGS}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in known or flag not in renamed:
            arguments.append(word)
        elif flag in SWITCHES:
            released[flag] = ""
        else:
            released[flag] = value if equals else next(words, "")
    for flag in released.keys() & IGNORED.keys():
        _report(flag)
    if "--cpu" in released:
        arguments += ["--device", "cpu"]
    values = DEFAULTS | released
    if {"--loadDir", "--loadWeights"} & released.keys():
        weights = Path(values["--loadDir"]) / values["--loadWeights"]
        arguments += ["--weights", str(weights)]
    if "--datadir" in released:
        arguments += ["--input", str(Path(values["--datadir"], "leftImg8bit", values["--subset"]))]
    return arguments


@functools.cache
def _report(flag: str) -> None:
    print(f"note: {flag} has no effect: {IGNORED[flag]}", file=sys.stderr)
