"""The command `lednet evaluate-cityscapes`: score a network as the Cityscapes benchmark does."""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lednet.cli import parsers
from lednet.cli.common import ROOT, predictor_options
from lednet.data.image_io import read_image
from lednet.data.labels import LabelScheme, cityscapes_scheme
from lednet.data.pairs import require_file
from lednet.distributed import DistributedContext, destroy_distributed, init_distributed
from lednet.errors import UserError
from lednet.evaluation import cityscapes_evaluator as evaluator, cityscapes_submission as submission
from lednet.evaluation.cityscapes_evaluator import Frame, FrameResult
from lednet.evaluation.cityscapes_metrics import BenchmarkScores
from lednet.evaluation.report import format_scores, write_benchmark_report
from lednet.hub import RELEASED, resolve_weights, weights_checksum
from lednet.inference.benchmark import benchmark, benchmark_rows
from lednet.inference.predictor import Predictor
from lednet.inference.progress_log import ProgressLog
from lednet.io import plain_values, require_writable, write_json
from lednet.progress import progress_bar

SPEED_SECONDS = 5
"""Limit for each of the two measurements of the speed."""


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    args = parsers.evaluate_cityscapes().parse_args(argv)
    if args.subset == "test" and (args.predictions or args.report):
        raise UserError(
            "the labels of --subset test are withheld, so there is nothing to score: check an "
            "upload with utils/check_upload.py, or choose --subset val"
        )
    if args.predictions and args.report is True:
        raise UserError("--report needs a file name with --predictions: --report report.html")
    for path in (args.json, args.report):
        require_writable(path if isinstance(path, Path) else None)
    if args.weights and args.out is None:
        path = resolve_weights(args.weights)
        folder = path.with_suffix("") if path == args.weights else path.parent
        runs = ROOT / "save" if folder.parent == RELEASED else folder.parent
        args.out = runs / f"{folder.name}-eval-{args.subset}"
    require_writable(args.out, folder=True)
    return args


def settings(args: argparse.Namespace, predictor: Predictor) -> dict[str, Any]:
    """Settings on which the results depend; a run is resumed with the same settings only."""
    names = ("size", "scales", "flip", "tile", "overlap", "precision")
    return {
        "backend": args.backend,  # as given: "auto" depends on what is cached
        "weights": weights_checksum(args.weights),
        "datadir": str(args.datadir.resolve()),
        "labels": args.labels,
        "subset": args.subset,
        **{name: getattr(predictor, name) for name in names},
        "overlap": predictor.overlap if predictor.tile else None,
    }


def gather_results(
    results: Iterator[FrameResult], total: int, subset: str, dist_context: DistributedContext
) -> list[FrameResult]:
    """Results of all processes, with a progress bar for those of this one."""
    size = dist_context.size
    name = subset if size == 1 else f"{subset} (process 1 of {size})"
    hidden = not dist_context.is_main
    bar = progress_bar(results, total=total, desc=name, unit="image", disable=hidden)
    return dist_context.all_gather(list(bar))


def run_network(
    args: argparse.Namespace,
    predictor: Predictor,
    frames: list[Frame],
    scheme: LabelScheme,
    dist_context: DistributedContext,
) -> list[FrameResult]:
    """Predict and score the remaining frames, each in one process; results of all frames."""
    folder = args.out / "predictions"
    if args.overwrite and dist_context.is_main:
        ProgressLog.clear(args.out)
        shutil.rmtree(folder, ignore_errors=True)
    dist_context.barrier()
    log = ProgressLog(
        args.out, settings(args, predictor), dist_context.rank, check=FrameResult.from_json
    )
    dist_context.barrier()  # all have read before one writes
    done = [
        FrameResult.from_json(log.entries[frame.name])
        for frame in frames
        if frame.name in log.entries and (folder / submission.prediction_name(frame.name)).is_file()
    ]
    if done and dist_context.is_main:
        print(f"{len(done)} of {len(frames)} images are done already in {args.out}")
    names = {result.name for result in done}
    left = [frame for frame in frames if frame.name not in names]
    left = left[dist_context.rank :: dist_context.size]

    def results() -> Iterator[FrameResult]:
        for result in evaluator.predict_frames(
            predictor.label_maps, predictor.size, left, scheme, folder, args.batch_size,
            args.num_workers,
        ):  # fmt: skip
            log.add(result.to_json())
            yield result

    return done + gather_results(results(), len(left), args.subset, dist_context)


def results_file(full: BenchmarkScores, network: BenchmarkScores | None) -> dict[str, Any]:
    """The official tool's result file, with further figures under keys of our own."""
    result = full.official_result() | {
        "pixelAccuracy": full.summary()["pixel_accuracy"],
        "frequencyWeightedIoU": full.summary()["frequency_weighted_iou"],
        "images": full.images,
        "classPresence": full.presence(),
    }
    return result | ({"atNetworkSize": network.official_result()} if network else {})


def full_size(frames: Sequence[Frame]) -> tuple[int, int]:
    """(height, width) of the first image."""
    height, width = read_image(require_file(frames[0].image, "images")).shape[:2]
    return height, width


def write_zip(args: argparse.Namespace, frames: Sequence[Frame], files: dict[str, Path]) -> None:
    """Pack the predictions, and print a warning for each problem of the zip."""
    path, required = args.out / "upload.zip", submission.NUM_FILES[args.subset]
    submission.write_submission(path, [files[frame.name] for frame in frames])
    names = {frame.name for frame in frames}
    problems = submission.check_submission(path, args.subset, frames=names, size=full_size(frames))
    if len(frames) != required:
        problems.append(f"{path} holds {len(frames)} files, the {args.subset} split has {required}")
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    print(f"{path}: {len(frames)} files, for the benchmark's pixel-level upload")


def evaluate(args: argparse.Namespace, dist_context: DistributedContext) -> None:
    """Predict, score, measure the speed, and write the results."""
    predictor = network = card = None
    need_images = bool(args.weights or args.report)
    frames, scheme = evaluator.find_frames(args.datadir, args.subset, args.labels, need_images)
    if args.weights:
        options = predictor_options(args) | {"device": dist_context.device}
        predictor = Predictor(
            args.weights, scheme=cityscapes_scheme(), tile=args.tile and tuple(args.tile),
            overlap=args.overlap, expected_images=len(frames[: args.max_images]), **options,
        )  # fmt: skip
        frames = frames[: args.max_images]
        results = run_network(args, predictor, frames, scheme, dist_context)
        folder = args.out / "predictions"
        files = {f.name: folder / submission.prediction_name(f.name) for f in frames}
    else:
        files = evaluator.find_predictions(args.predictions, frames)
        frames = frames[: args.max_images]
        mine = frames[dist_context.rank :: dist_context.size]
        scored = evaluator.score_predictions(
            mine, scheme, [files[frame.name] for frame in mine], max(1, args.num_workers)
        )
        results = gather_results(scored, len(mine), args.subset, dist_context)
    if not dist_context.is_main:
        return
    results.sort(key=lambda result: result.name)  # sums are equal for any number of processes
    full = evaluator.total_scores(result.full for result in results)
    if predictor and args.speed:
        card = benchmark(
            predictor, full_size(frames), 1, args.warmup, args.runs, max_seconds=SPEED_SECONDS
        )
    details: dict[str, Any] = {"options": plain_values(vars(args))}
    if card:
        details["speed"] = card
    if args.predictions:
        evaluator.require_label_ids(full, args.predictions)
    if args.subset != "test":
        if full.class_matrix().sum() == 0:
            raise UserError(f"{args.datadir} {args.subset} has no labelled pixel: check --labels")
        if predictor:
            network = evaluator.total_scores(result.network for result in results)
        print(format_scores(full, network, predictor.size if predictor else None))
        details = results_file(full, network) | details
    speed = benchmark_rows(card) if card else []
    if speed:
        print("\n" + "\n".join(f"{name:22} {value}" for name, value in speed))
    for path in {args.json, args.out and args.out / "results.json"} - {None}:
        write_json(path, details)
    if args.subset == "test":
        write_zip(args, frames, files)
    if args.report:
        path = args.out / "report.html" if args.report is True else args.report
        source = f"predictions in {args.predictions}"
        if args.weights:
            file = resolve_weights(args.weights)
            source = f"{file.name} of {file.absolute().parent.name}"
        write_benchmark_report(
            path, f"Cityscapes {args.subset}", results, frames, files, scheme, source=source,
            network=network, card=card, speed=speed, options=details["options"],
            images=args.report_images,
        )  # fmt: skip
        print(f"report: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_options(argv)
    dist_context = init_distributed(args.device)
    try:
        evaluate(args, dist_context)
    finally:
        destroy_distributed()
