"""Time the counting for the scores: one-hot planes, cityscapesscripts, and this project.

    python benchmarks/metrics.py --json benchmarks/results/metrics.json
    python benchmarks/metrics.py --datadir /data/cityscapes --subset val --max-images 12

Half a minute without data (block-wise random labels of 1024x2048), some seconds an image
with it. All ways get the same inputs and must agree: compare ratios.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks._common import Row, add_options, make_parser, print_row, write_record
from lednet.data.pairs import require_file
from lednet.errors import exit_on_user_error
from lednet.evaluation.cityscapes_evaluator import find_frames, score_predictions, total_scores
from lednet.evaluation.cityscapes_metrics import count_image
from lednet.inference.benchmark import time_runs
from lednet.metrics import ConfusionMatrix

SIZE = (1024, 2048)
NUM_CLASSES = 19
CPU = torch.device("cpu")


def one_hot_counts(prediction: Tensor, target: Tensor) -> Tensor:
    """True positives, false positives and false negatives of each class by float planes, as the
    original counts.

    prediction, target: (1, H, W) int64, void 19 -> (3, 19) float64
    """
    planes = []
    for labels in (prediction, target):
        hot = torch.zeros(len(labels), NUM_CLASSES + 1, *labels.shape[1:])
        planes.append(hot.scatter_(1, labels[:, None], 1.0))
    ignored = planes[1][:, NUM_CLASSES:]
    x, y = (plane[:, :NUM_CLASSES] for plane in planes)
    counts = (x * y, x * (1 - y - ignored), (1 - x) * y)
    return torch.stack([part.sum(dim=(0, 2, 3)).double() for part in counts])


def benchmark_counting(warmup: int, runs: int) -> Row:
    """Counting alone, with labels in memory."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, NUM_CLASSES + 1, (SIZE[0] // 32, SIZE[1] // 32))
    truth = np.kron(blocks, np.ones((32, 32), int)).astype(np.uint8)
    wrong = np.where(rng.random(SIZE) < 0.2, rng.integers(0, NUM_CLASSES + 1, SIZE), truth)
    prediction = wrong.astype(np.uint8)
    target64, prediction64 = (torch.from_numpy(a).long()[None] for a in (truth, prediction))
    confusion = ConfusionMatrix(NUM_CLASSES)
    confusion.update(prediction64, target64)
    counts = one_hot_counts(prediction64, target64)
    torch.testing.assert_close(confusion.class_iou(), counts[0] / counts.sum(0), rtol=1e-5, atol=0)

    ids, predicted_ids = truth + 7, prediction + 7  # label ids 7 to 26: person, rider, car last
    instances = np.where(ids < 24, ids, ids * np.int32(1000) + np.arange(SIZE[1]) // 32)
    ways: dict[str, Callable] = {
        "one-hot planes": lambda: one_hot_counts(prediction64, target64),
        "ConfusionMatrix, int64": lambda: confusion.update(prediction64, target64),
        "count_image, uint8": lambda: count_image(predicted_ids, ids),
        "count_image with instances": lambda: count_image(predicted_ids, ids, instances),
    }
    times = {name: time_runs(way, CPU, warmup, runs) for name, way in ways.items()}
    slowest = times["one-hot planes"]["p50_ms"]
    return {name: {**t, "times_faster": slowest / t["p50_ms"]} for name, t in times.items()}


def benchmark_files(args: argparse.Namespace) -> Row:
    """Scoring label files as predictions, from disk to class and instance scores."""
    if not hasattr(np, "in1d"):
        # cityscapesscripts calls the old name, which NumPy 2.4 removed.
        np.in1d = np.isin  # type: ignore[attr-defined]
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    official.args.quiet, official.args.JSONOutput = True, False
    frames, scheme = find_frames(args.datadir, args.subset, images=False)
    frames = frames[: args.max_images]
    labels = [require_file(frame.label, "labels") for frame in frames]
    predictions = labels[1:] + labels[:1]  # every image gets the labels of the next one
    start = time.perf_counter()
    names = [[str(path) for path in group] for group in (predictions, labels)]
    expected = official.evaluateImgLists(*names, official.args)["confMatrix"]
    seconds = {"cityscapesscripts": time.perf_counter() - start}
    for workers in (1, 2):
        start = time.perf_counter()
        results = score_predictions(frames, scheme, predictions, workers)
        found = total_scores(result.full for result in results).official_result()["confMatrix"]
        seconds[f"this project, {workers} threads"] = time.perf_counter() - start
    if found != expected:
        raise SystemExit("the two confusion matrices differ")
    first = seconds["cityscapesscripts"]
    rows = {
        name: {"seconds_an_image": s / len(frames), "times_faster": first / s}
        for name, s in seconds.items()
    }
    for name, row in rows.items():
        print_row({"way": name} | row)
    return rows | {"images": len(frames)}


def main() -> None:
    parser = make_parser(__doc__, "--json")
    parser.add_argument("--datadir", type=Path, help="Cityscapes, to time files from disk too")
    parser.add_argument("--subset", choices=("train", "val"), default="val")
    parser.add_argument("--max-images", type=int, metavar="N")
    add_options(parser, warmup=(2, "untimed runs"), runs=(15, "timed runs"))
    args = parser.parse_args()
    counting = benchmark_counting(args.warmup, args.runs)
    for name, row in counting.items():
        print_row({"way": name} | row)
    record = {"size": SIZE, "warmup": args.warmup, "runs": args.runs, "counting": counting}
    if args.datadir:
        record["files"] = benchmark_files(args)
    write_record(args.json, CPU, record)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
