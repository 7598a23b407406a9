"""The commands as functions: keyword arguments are the flags of the scripts.

    run = train(dataset="camvid", datadir="/data/camvid", num_epochs=50, savedir="mine")
    scores = evaluate(run, dataset="camvid", datadir="/data/camvid")
    export(run, "mine.onnx", format="onnx")

PyTorch is imported when a function is called.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lednet.cli import parsers

if TYPE_CHECKING:
    from lednet.exporting.exporter import Parity


def evaluate(weights: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """Score weights on a data set, as `test/eval_iou.py` does; prints its table.

    Args:
        weights: released name, weights file, run folder or exported file.
        options: flags with underscores: `dataset`, `datadir`, `subset`, `scales`, `json` ...

    Returns:
        "miou", "class_iou", "pixel_accuracy", and the conditions of the evaluation.

    Raises:
        UserError: as the script.
    """
    from lednet.cli.evaluate import main

    return main(to_arguments(parsers.evaluate(), {"weights": weights, **options}))


def export(weights: str | os.PathLike, out: str | os.PathLike, **options: Any) -> "Parity":
    """Export weights to a file, as `utils/export_model.py` does.

    Args:
        weights: released name, weights file or run folder.
        out: file to write.
        options: flags with underscores: `format`, `dynamic`, `output`, `precision` ...

    Returns:
        The agreement of the file with the network.

    Raises:
        UserError: as the script.
        ParityError: the outputs of the file differ too much; nothing was written.
    """
    from lednet.cli.export import export_network

    arguments = to_arguments(parsers.export(), {"weights": weights, "out": out, **options})
    return export_network(parsers.export().parse_args(arguments))


def train(**options: Any) -> Path:
    """Train or resume a run, as `train/main.py` does.

    Args:
        options: flags with underscores: `dataset`, `datadir`, `num_epochs`, `savedir`,
            `resume` ...

    Returns:
        The run folder, from which `Predictor` loads the best weights.

    Raises:
        UserError: as the script.
    """
    from lednet.cli.train import main

    return main(to_arguments(parsers.train(), options))


def to_arguments(parser: argparse.ArgumentParser, options: dict[str, Any]) -> list[str]:
    """The command line of `options`, keyed by flag with underscores; None leaves a flag out.

    Raises:
        TypeError: there is no such flag.
    """
    actions = {action.dest: action for action in parser._actions}
    arguments: list[str] = []
    for name, value in options.items():
        if name not in actions:
            raise TypeError(f"unexpected keyword argument {name!r}")
        flags = actions[name].option_strings
        if isinstance(value, bool):
            negative = [flag for flag in flags if flag.startswith("--no-")]
            arguments += flags[:1] if value else negative[:1]
        elif value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            arguments += [flags[0], *map(str, values)]
    return arguments
