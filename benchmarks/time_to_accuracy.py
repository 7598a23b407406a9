"""Report after how many hours of training and validation runs reached an accuracy.

    torchrun --nproc-per-node=2 train/main.py --recipe camvid --datadir /data/camvid \\
        --val-prefix 0006R0 --savedir held-out
    python benchmarks/time_to_accuracy.py --runs save/held-out --page docs/results.md

Reads the logs in the folders of the runs, which took place one after the other. The results are
written to benchmarks/results/time_to_accuracy.json and .png.
"""

import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

from benchmarks._common import RESULTS, Row, make_parser, markdown, publish, save_figure
from lednet.errors import UserError, exit_on_user_error
from lednet.io import read_json, write_json
from lednet.training.run_dir import read_records

THRESHOLDS = (0.55, 0.60, 0.65)

Timeline = Sequence[tuple[float, float]]
"""Hours since the start, and val mIoU, after each epoch."""


def timeline(runs: Sequence[Path]) -> Timeline:
    """Hours and val mIoU after each epoch of the full network.

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


def first_reached(times: Timeline, threshold: float) -> float | None:
    """Hours until the mIoU first reached the threshold; None if it never did."""
    return next((hour for hour, miou in times if miou >= threshold), None)


def table(result: Row) -> str:
    reached = result["reached"]
    cells = ("not reached" if hours is None else f"{hours:.2f} h" for hours in reached.values())
    best = max(miou for _, miou in result["timeline"])
    total = f"{best:.3f} in {result['timeline'][-1][0]:.2f} h"
    head = ("", *(f"val mIoU {threshold}" for threshold in reached), "best")
    return markdown(head, [(result["hardware"], *cells, total)])


def plot(path: Path, times: Timeline, thresholds: Sequence[float]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*times, strict=True), color="#4c78a8", linewidth=2)
    for threshold in thresholds:
        axis.axhline(threshold, color="#f58518", linewidth=0.8, linestyle="--")
    axis.set(xlabel="hours of training and validation", ylabel="val mIoU", ylim=(0, None))
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    parser = make_parser(__doc__, "--page")
    # fmt: off
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders, in order")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
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
    publish(table(result), args.page)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
