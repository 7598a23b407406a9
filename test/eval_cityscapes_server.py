"""Score a network as the Cityscapes benchmark does, measure its speed, write the upload.

    python test/eval_cityscapes_server.py --weights save/cityscapes-d20 --datadir /data/cityscapes
    python test/eval_cityscapes_server.py --weights save/cityscapes-d20 --datadir /data/cityscapes \
        --subset test
    python test/eval_cityscapes_server.py --predictions results --datadir /data/cityscapes \
        --json scores.json --report report.html

One to two seconds an image on two CPU cores, at 512x1024. Figures are those of the
official tool (cityscapesscripts), in its result file's format. The folder --out receives
label-id PNGs under the benchmark's names, results.json and, for the test split,
upload.zip. The same command resumes an interrupted run.
"""

import argparse
from pathlib import Path

from lednet.cli.common import (
    COUNT,
    LABEL_ENCODINGS,
    POSITIVE,
    add_backend_flags,
    add_input_size_flags,
    add_num_workers_flag,
    add_test_time_flags,
    make_parser,
    print_help_early,
)

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path,
                        help="weights file, run folder (its best.pth), released name or exported "
                             "file")
    source.add_argument("--predictions", type=Path, metavar="DIR",
                        help="evaluate the label-id PNGs below DIR, from any network")
    data = parser.add_argument_group("data")
    data.add_argument("--datadir", type=Path, default=ROOT / "datasets" / "cityscapes",
                      help="Cityscapes in the official layout (default: datasets/cityscapes)")
    data.add_argument("--subset", choices=("train", "val", "test"), default="val",
                      help="split to evaluate")
    data.add_argument("--labels", choices=LABEL_ENCODINGS, default="auto",
                      help="encoding of the label files; auto: by their names")
    data.add_argument("--max-images", type=POSITIVE, metavar="N", help="only the first N images")
    add_num_workers_flag(data, 2, "decoding processes")

    net = parser.add_argument_group("network")
    add_input_size_flags(net)
    net.add_argument("--batch-size", type=POSITIVE, default=1, help="images per batch")
    add_test_time_flags(net)
    net.add_argument("--tile", type=int, nargs=2, metavar=("H", "W"),
                     help="run the network on overlapping tiles of this size in pixels, for an "
                          "input too large for the memory")
    net.add_argument("--overlap", type=int, default=128, metavar="PIXELS",
                     help="overlap of neighbouring tiles")
    add_backend_flags(net, fold=True)

    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path,
                     help="folder for all results (default: <weights>-eval-<subset>)")
    out.add_argument("--overwrite", action="store_true", help="discard existing results in --out")
    out.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to FILE")
    out.add_argument("--report", nargs="?", const=True, type=Path, metavar="FILE",
                     help="write an HTML report (default file: report.html in --out)")
    out.add_argument("--report-images", type=COUNT, default=500, metavar="N",
                     help="show the N images with the lowest scores in the report")
    out.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True,
                     help="measure the speed")
    out.add_argument("--warmup", type=COUNT, default=3, metavar="N", help="passes before timing")
    out.add_argument("--runs", type=POSITIVE, default=20, metavar="N", help="timed passes")
    # fmt: on
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from lednet.data.image_io import read_image
from lednet.data.labels import LabelScheme, cityscapes_scheme
from lednet.data.pairs import require_file
from lednet.data.registry import DEFAULT_SIZES
from lednet.distributed import DistributedContext, destroy_distributed, init_distributed
from lednet.errors import UserError, exit_on_user_error
from lednet.evaluation.cityscapes_evaluator import (
    Frame,
    FrameResult,
    find_frames,
    find_predictions,
    predict_frames,
    score_predictions,
    total_scores,
)
from lednet.evaluation.cityscapes_metrics import (
    EVALUATED_CATEGORIES,
    EVALUATED_CLASSES,
    BenchmarkScores,
)
from lednet.evaluation.cityscapes_submission import (
    NUM_FILES,
    check_submission,
    prediction_name,
    write_submission,
)
from lednet.evaluation.report import write_benchmark_report
from lednet.hub import RELEASED, resolve_weights, weights_checksum
from lednet.inference.benchmark import benchmark, benchmark_rows
from lednet.inference.predictor import Predictor
from lednet.inference.progress_log import ProgressLog
from lednet.io import plain_values, write_json


def parse_options() -> argparse.Namespace:
    args = build_parser().parse_args()
    if args.subset == "test" and (args.predictions or args.report):
        raise UserError(
            "the labels of --subset test are withheld, so there is nothing to score: check an "
            "upload with utils/check_upload.py, or choose --subset val"
        )
    if args.predictions and args.report is True:
        raise UserError("--report needs a file name with --predictions: --report report.html")
    if args.weights and args.out is None:
        path = resolve_weights(args.weights)
        folder = path.with_suffix("") if path == args.weights else path.parent
        runs = ROOT / "save" if folder.parent == RELEASED else folder.parent
        args.out = runs / f"{folder.name}-eval-{args.subset}"
    return args


def settings(args: argparse.Namespace, predictor: Predictor) -> dict:
    """Settings on which the results depend; a run is resumed with the same settings only."""
    return {
        "weights": weights_checksum(args.weights),
        "datadir": str(args.datadir.resolve()),
        "labels": args.labels,
        "subset": args.subset,
        "size": predictor.size,
        "scales": predictor.scales,
        "flip": predictor.flip,
        "tile": predictor.tile,
        "overlap": predictor.overlap if predictor.tile else None,
        "backend": predictor.backend,
        "precision": predictor.precision,
    }


def show_progress(
    results: Iterable[FrameResult], total: int, args: argparse.Namespace, world: DistributedContext
) -> Iterable[FrameResult]:
    name = args.subset if world.size == 1 else f"{args.subset} (process 1 of {world.size})"
    return tqdm(results, name, total, unit="image", dynamic_ncols=True, disable=not world.is_main)


def run_network(
    args: argparse.Namespace,
    predictor: Predictor,
    frames: list[Frame],
    scheme: LabelScheme,
    world: DistributedContext,
) -> list[FrameResult]:
    """Predict and score what is left to do, each image in one process; results of all."""
    folder = args.out / "predictions"
    if args.overwrite and world.is_main:
        ProgressLog.clear(args.out)
        shutil.rmtree(folder, ignore_errors=True)
    world.barrier()
    journal = ProgressLog(
        args.out, settings(args, predictor), world.rank, check=FrameResult.from_json
    )
    world.barrier()  # all have read before one writes
    wanted = {frame.name for frame in frames}
    done = {
        name: FrameResult.from_json(entry)
        for name, entry in journal.entries.items()
        if name in wanted and (folder / prediction_name(name)).is_file()
    }
    if done and world.is_main:
        print(f"{len(done)} of {len(frames)} images are done already in {args.out}")
    left = [frame for frame in frames if frame.name not in done][world.rank :: world.size]
    results = predict_frames(
        predictor.label_maps, predictor.size, left, scheme, folder, args.batch_size,
        args.num_workers,
    )  # fmt: skip
    mine = []
    for result in show_progress(results, len(left), args, world):
        journal.add(result.to_json())
        mine.append(result)
    return [*done.values(), *world.all_gather(mine)]


def score_files(
    args: argparse.Namespace,
    frames: list[Frame],
    files: dict[str, Path],
    scheme: LabelScheme,
    world: DistributedContext,
) -> list[FrameResult]:
    """Score --predictions, each image in one process; results of all."""
    mine = frames[world.rank :: world.size]
    paths = [files[frame.name] for frame in mine]
    results = score_predictions(mine, scheme, paths, max(1, args.num_workers))
    return world.all_gather(list(show_progress(results, len(mine), args, world)))


def print_scores(
    full: BenchmarkScores, network: BenchmarkScores | None, size: Sequence[int] | None
) -> None:
    """Classes, categories and means; IoU at the network's size beside them."""
    headings = ["IoU", "iIoU"] + ([f"IoU at {size[0]}x{size[1]}"] if network and size else [])

    def row(name: str, *cells: str) -> None:
        print(f"{name:16}" + "".join(f"{cell:>16}" for cell in cells))

    def score(value: float | None, absent: str = "absent") -> str:
        return absent if value is None or value != value else f"{value:.4f}"

    kinds = {"class": EVALUATED_CLASSES, "category": EVALUATED_CATEGORIES}
    for kind, names in kinds.items():
        print()
        row(kind, *headings)
        iou, iiou = getattr(full, f"{kind}_iou")(), getattr(full, f"{kind}_iiou")()
        small = getattr(network, f"{kind}_iou")() if network else {}
        for name in names:
            row(name, score(iou[name]), score(iiou[name], "-"),
                *([score(small[name])] if network else []))  # fmt: skip
        means = [full.summary()[f"{kind}_iou"], full.summary()[f"{kind}_iiou"]]
        means += [network.summary()[f"{kind}_iou"]] if network else []
        row("mean", *(score(mean, "-") for mean in means))
    print(
        f"\npixel accuracy {full.pixel_accuracy():.4f}, frequency-weighted IoU "
        f"{full.frequency_weighted_iou():.4f}; {full.images} images"
    )


def results_file(full: BenchmarkScores, network: BenchmarkScores | None, **details: Any) -> dict:
    """The official tool's result file, with further figures under keys of our own."""
    result = full.official_result() | {
        "pixelAccuracy": full.summary()["pixel_accuracy"],
        "frequencyWeightedIoU": full.summary()["frequency_weighted_iou"],
        "images": full.images,
    }
    if network:
        result["atNetworkSize"] = network.official_result()
    return result | details


def full_size(frames: list[Frame]) -> tuple[int, int]:
    """(height, width) of the images, as of the first."""
    height, width = read_image(require_file(frames[0].image, "images")).shape[:2]
    return height, width


def write_zip(args: argparse.Namespace, frames: list[Frame]) -> None:
    """Pack the predictions and check the zip as a user would before uploading it."""
    path = args.out / "upload.zip"
    folder = args.out / "predictions"
    write_submission(path, [folder / prediction_name(frame.name) for frame in frames])
    names = {frame.name for frame in frames}
    problems = check_submission(path, args.subset, frames=names, size=full_size(frames))
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if len(frames) != NUM_FILES[args.subset]:
        print(
            f"warning: {path} holds {len(frames)} files, the benchmark's {args.subset} split "
            f"has {NUM_FILES[args.subset]}",
            file=sys.stderr,
        )
    print(f"{path}: {len(frames)} files, for the benchmark's pixel-level upload")


def evaluate(args: argparse.Namespace, world: DistributedContext) -> None:
    """Every step in order: predict and score, measure, write."""
    predictor, files, network, card = None, {}, None, None
    frames, scheme = find_frames(
        args.datadir, args.subset, args.labels, images=bool(args.weights or args.report)
    )
    if args.weights:
        predictor = Predictor.from_weights(
            args.weights, cityscapes_scheme(), DEFAULT_SIZES["cityscapes"], args.height, args.width,
            device=world.device, backend=args.backend, precision=args.precision, fold=args.fold,
            scales=args.scales, flip=args.flip, tile=args.tile and tuple(args.tile),
            overlap=args.overlap,
        )  # fmt: skip
        frames = frames[: args.max_images]
        results = run_network(args, predictor, frames, scheme, world)
        files = {f.name: args.out / "predictions" / prediction_name(f.name) for f in frames}
    else:
        files = find_predictions(args.predictions, frames)
        frames = frames[: args.max_images]
        results = score_files(args, frames, files, scheme, world)
    if not world.is_main:
        return
    results.sort(key=lambda result: result.name)  # sums come out alike for any number of processes
    full = total_scores(result.full for result in results)
    if predictor and args.speed:
        card = benchmark(predictor, full_size(frames), 1, args.warmup, args.runs)
    details = {"options": plain_values(vars(args))} | ({"speed": card} if card else {})
    if args.subset != "test":
        if predictor:
            network = total_scores(result.network for result in results)
        if full.class_matrix().sum() == 0:
            raise UserError(f"{args.datadir} {args.subset} has no labelled pixel: check --labels")
        print_scores(full, network, predictor.size if predictor else None)
        details = results_file(full, network, **details)
    if card:
        print("\n" + "\n".join(f"{name:22} {value}" for name, value in benchmark_rows(card)))
    for path in {args.json, args.out and args.out / "results.json"} - {None}:
        write_json(path, details)
    if args.subset == "test":
        write_zip(args, frames)
    if args.report:
        path = args.out / "report.html" if args.report is True else args.report
        write_benchmark_report(
            path, f"Cityscapes {args.subset}", results, frames, files, scheme,
            network=network, card=card, speed=benchmark_rows(card) if card else (),
            options=plain_values(vars(args)), images=args.report_images,
        )  # fmt: skip
        print(f"report: {path}")


def main() -> None:
    args = parse_options()
    world = init_distributed(args.device)
    try:
        evaluate(args, world)
    finally:
        destroy_distributed()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
