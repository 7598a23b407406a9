"""How long a recipe takes to reach an accuracy: hours of training and validation, from its logs.

    torchrun --nproc-per-node=2 train/main.py --recipe camvid --datadir /data/camvid \\
        --val-prefix 0006R0 --savedir held-out
    python benchmarks/time_to_accuracy.py --runs save/held-out --page docs/results.md

Measures nothing itself: the runs' folders tell what was reached when. Several runs are one after
the other. The results go to benchmarks/results/time_to_accuracy.json and .png.
"""

import argparse
import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lednet.errors import UserError, exit_on_user_error
from lednet.io import read_json, write_atomically, write_between_marks, write_json
from lednet.training.run_dir import read_records

ROOT = Path(__file__).resolve().parents[1]

THRESHOLDS = (0.55, 0.60, 0.65)


def timeline(runs: Sequence[Path]) -> list[tuple[float, float]]:
    """Hours since the beginning, and val mIoU, after each epoch of the full network.

    Raises:
        UserError: a run's log has no seconds.
    """
    records = [record for run in runs for record in read_records(run)]
    if any("seconds" not in record for record in records):
        raise UserError(f"{runs[0]} was trained before logs held seconds: train anew")
    hours = itertools.accumulate(record["seconds"] / 3600 for record in records)
    return [
        (hour, record["val_miou"])
        for hour, record in zip(hours, records, strict=True)
        if record["stage"] != "encoder" and record["val_miou"] is not None
    ]


def first_reached(times: Sequence[tuple[float, float]], threshold: float) -> float | None:
    """Hours until the mIoU was first that high; None where it never was."""
    return next((hour for hour, miou in times if miou >= threshold), None)


def table(result: dict[str, Any]) -> str:
    best = max(miou for _, miou in result["timeline"])
    cells = [
        "not reached" if hours is None else f"{hours:.2f} h" for hours in result["reached"].values()
    ]
    return "\n".join(
        (
            "| " + " | ".join(("", *(f"val mIoU {t}" for t in result["reached"]), "best")) + " |",
            "|---" * (2 + len(cells)) + "|",
            "| "
            + " | ".join(
                (
                    result["hardware"],
                    *cells,
                    f"{best:.3f} in {result['timeline'][-1][0]:.2f} h",
                )
            )
            + " |",
        )
    )


def plot(path: Path, times: Sequence[tuple[float, float]], thresholds: Sequence[float]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*times, strict=True), color="#4c78a8", linewidth=2)
    for threshold in thresholds:
        axis.axhline(threshold, color="#f58518", linewidth=0.8, linestyle="--")
    axis.set(xlabel="hours of training and validation", ylabel="val mIoU", ylim=(0, None))
    axis.grid(alpha=0.3)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders, in order")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--page", type=Path, help="write the table between this page's marks")
    # fmt: on
    args = parser.parse_args()
    times = timeline(args.runs)
    options = [read_json(run / "options.json") for run in args.runs]
    result = {
        "commands": [shlex.join(option["command"]) for option in options],
        "hardware": options[-1]["hardware"],
        "environment": options[-1]["environment"],
        "reached": {f"{t:.2f}": first_reached(times, t) for t in args.thresholds},
        "timeline": times,
    }
    write_json(args.out / "time_to_accuracy.json", result)
    plot(args.out / "time_to_accuracy.png", times, args.thresholds)
    print(table(result))
    if args.page:
        write_between_marks(args.page, "benchmarks/time_to_accuracy.py", table(result))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
