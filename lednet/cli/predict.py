"""The command `lednet predict`: predict images, videos and cameras."""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lednet.cli import parsers
from lednet.cli.common import predictor_options, report_header
from lednet.data.labels import LabelScheme, cityscapes_label_ids, cityscapes_scheme
from lednet.distributed import DistributedContext, destroy_distributed, init_distributed
from lednet.errors import UserError, raise_if_problems
from lednet.files import IMAGE_SUFFIXES
from lednet.hub import weights_checksum
from lednet.inference import writers
from lednet.inference.inputs import find_inputs
from lednet.inference.predictor import Predictor
from lednet.inference.progress_log import ProgressLog
from lednet.inference.video import (
    CAMERA,
    VIDEO_SUFFIXES,
    VideoError,
    VideoReader,
    import_av,
    open_camera,
)
from lednet.io import write_atomically, write_json
from lednet.progress import progress_bar
from lednet.signals import StopRequest
from lednet.visualization import Visualizer

IMAGE_OUTPUTS, VIDEO_OUTPUTS = ("labels", "overlay"), ("overlay",)

FilesOf = Callable[[str], Iterable[Path]]


@dataclass
class Run:
    """What all inputs share."""

    args: argparse.Namespace
    context: DistributedContext
    predictor: Predictor
    scheme: LabelScheme
    log: ProgressLog

    def writer(self, default_outputs: tuple[str, ...]) -> writers.PredictionWriter:
        args = self.args
        visualizer = Visualizer(self.scheme, args.alpha, args.legend)
        ids = cityscapes_label_ids() if args.label_ids else None
        outputs = args.outputs or default_outputs
        return writers.PredictionWriter(args.out, outputs, visualizer, f".{args.image_format}", ids)

    def shares_file(self, name: str) -> Path:
        return self.args.out / f"{name}_shares.json"

    def with_shares(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry of an image or frame, with class shares in place of pixel counts."""
        kept = {key: value for key, value in entry.items() if key not in ("pixels", "source")}
        return kept | {"shares": writers.class_shares([entry["pixels"]], self.scheme)}

    def bar(self, total: int | None, name: str, unit: str) -> Any:
        hidden = total == 0 or not self.context.is_main
        return progress_bar(total=total, desc=name, unit=unit, disable=hidden)


@dataclass
class VideoReport:
    """Class shares of a video, written frame by frame, so that hours of video need no memory."""

    run: Run
    file: TextIO
    frames: int = 0
    pixels: list[int] = field(default_factory=list)

    def add(self, entry: dict[str, Any]) -> None:
        """Write the entry of a frame."""
        self.file.write(",\n    " if self.frames else '{\n  "frames": [\n    ')
        self.file.write(json.dumps(self.run.with_shares(entry)))
        self.frames += 1
        counts = entry["pixels"]
        self.pixels = [a + b for a, b in zip(self.pixels or [0] * len(counts), counts, strict=True)]

    def finish(self, **more: Any) -> dict[str, float]:
        """Write everything else; returns the shares in all frames."""
        shares = writers.class_shares([self.pixels], self.run.scheme)
        rest = json.dumps(
            report_header(self.run.args, self.run.predictor) | more | {"shares": shares}, indent=2
        )
        self.file.write("\n  ],\n" + rest.removeprefix("{\n") + "\n")
        return shares


def print_largest(shares: dict[str, float]) -> None:
    largest = sorted(shares.items(), key=lambda item: -item[1])[:5]
    print(", ".join(f"{label} {share:.1%}" for label, share in largest))


def split_long_names(items: dict[str, Path], files: FilesOf) -> tuple[dict[str, Path], list[str]]:
    """Leave out inputs whose results would have too long names.

    Args:
        files: function from the name of an input to the paths of its results.

    Returns:
        The inputs that are left, and a sentence for each of the others.
    """
    long = {name for name in items if any(map(writers.is_name_too_long, files(name)))}
    problems = [f"{items[name]} has too long a name for its results: rename it" for name in long]
    return {name: path for name, path in items.items() if name not in long}, problems


def fingerprint(path: Path) -> list:
    """Resolved path, size and modification time of a file."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def open_run(
    args: argparse.Namespace,
    context: DistributedContext,
    inputs: dict[str, Path],
    expected: int | None,
) -> Run:
    """Load the weights, and check that earlier results are of the same settings and files.

    Args:
        expected: number of images, if there are no videos or cameras.
    """
    options = predictor_options(args) | {"device": context.device}
    predictor = Predictor(args.weights, expected_images=expected, **options)
    scheme = predictor.scheme
    if args.label_ids and scheme.classes != cityscapes_scheme().classes:
        raise UserError(
            f"{args.weights} has the classes of {scheme.name}, --label-ids is for those of "
            "Cityscapes: leave it out"
        )
    if args.overwrite and context.is_main:
        ProgressLog.clear(args.out)
    context.barrier()
    settings: dict[str, Any] = {"weights": weights_checksum(args.weights), "size": predictor.size}
    settings["precision"] = predictor.precision
    settings |= {key: getattr(args, key) for key in ("backend", "label_ids", "alpha", "legend")}

    def check(entry: dict[str, Any]) -> None:
        _path, _size, _time = entry["source"]
        if "pixels" in entry:  # an image, not a video
            writers.class_shares([entry["pixels"]], scheme)

    log = ProgressLog(args.out, settings, context.rank, check)
    for name, path in inputs.items():
        entry = log.entries.get(name)
        if entry and entry["source"] != fingerprint(path):
            raise UserError(
                f"{args.out} holds the results for {name} of {entry['source'][0]}, another file "
                f"than {path} or the same before a change: choose another --out, or add "
                "--overwrite to start over"
            )
    context.barrier()  # all processes have read the logs before one writes
    return Run(args, context, predictor, scheme, log)


def run_images(run: Run, images: dict[str, Path]) -> list[str]:
    """Predict the images that have no results yet, and write the shares of all.

    Returns:
        In the main process, the errors of skipped images.
    """
    writer = run.writer(IMAGE_OUTPUTS)
    images, too_long = split_long_names(images, lambda name: writer.image_files(name).values())
    jobs, done = [], []
    for name, path in images.items():
        files, entry = writer.image_files(name), run.log.entries.get(name)
        if entry:  # otherwise existing files may be of an older run
            files = {kind: file for kind, file in files.items() if not file.exists()}
        if files:
            jobs.append(writers.PredictionJob(name, path, files))
        else:
            done.append(entry)

    def on_written(entry: dict[str, Any]) -> None:
        run.log.add(entry | {"source": fingerprint(images[entry["name"]])})

    jobs = jobs[run.context.rank :: run.context.size]
    with run.bar(len(jobs), "images", "image") as bar:
        entries = writers.predict_images(
            run.predictor, jobs, writer, bar.update, on_written=on_written,
            num_workers=run.args.num_workers,
        )  # fmt: skip
    entries = sorted(done + run.context.all_gather(entries), key=lambda entry: entry["name"])
    if not run.context.is_main:
        return []
    predicted = [entry for entry in entries if "error" not in entry]
    skipped = [entry for entry in entries if "error" in entry]
    note = f"; {len(done)} were there already (--overwrite starts over)" if done else ""
    height, width = run.predictor.size
    engine = f"{run.predictor.backend} {run.predictor.precision}, network {height}x{width}"
    count = len(predicted) - len(done)
    print(f"{count} of {len(images)} images predicted in {run.args.out} ({engine}){note}")
    if predicted:
        shares = writers.class_shares((entry["pixels"] for entry in predicted), run.scheme)
        report = report_header(run.args, run.predictor) | {"passed_over": skipped, "shares": shares}
        report["images"] = [run.with_shares(entry) for entry in predicted]
        write_json(run.args.out / "shares.json", report)
        print_largest(shares)
    return writers.errors_of(skipped) + too_long


def predict_frames(run: Run, name: str, video: VideoReader, frames: Iterator) -> None:
    """Predict a video or camera, and write its files and shares."""
    limit = run.args.max_frames
    expected = min(filter(None, (video.expected, limit)), default=None)
    with (
        writers.video_output(run.writer(VIDEO_OUTPUTS), name, video.rate, video.time_base) as files,
        write_atomically(run.shares_file(name)) as shares_file,
        open(shares_file, "w", encoding="utf-8") as file,
        run.bar(expected, name, "frame") as bar,
    ):
        report = VideoReport(run, file)
        frames = itertools.islice(frames, limit)
        writers.predict_video(run.predictor, frames, files, bar.update, report.add)
        if not report.frames:
            raise VideoError(f"{video.source} gave no frame: nothing was written")
        shares = report.finish(
            video=video.source, frame_rate=str(video.rate), height=files.size[0],
            width=files.size[1],
        )  # fmt: skip
    print(f"{report.frames} frames of {video.source} predicted in {run.args.out}")
    print_largest(shares)
    if files.padded:
        print(
            f"one side of {', '.join(files.padded)} is odd, which H.264 does not allow: its last "
            "line was repeated"
        )


def run_videos(run: Run, videos: dict[str, Path]) -> list[str]:
    """Predict the videos that are not finished, each in one process; returns errors."""
    writer = run.writer(VIDEO_OUTPUTS)
    videos, too_long = split_long_names(
        videos, lambda name: [*writer.video_files(name).values(), run.shares_file(name)]
    )
    unfinished = []
    for name, path in videos.items():
        files = [*writer.video_files(name).values(), run.shares_file(name)]
        if name not in run.log.entries or not all(file.exists() for file in files):
            unfinished.append((name, path))
        elif run.context.is_main:
            print(f"{path} is done already in {run.args.out} (--overwrite starts over)")
    errors = too_long if run.context.is_main else []
    for name, path in unfinished[run.context.rank :: run.context.size]:
        try:
            with VideoReader(path) as video:
                predict_frames(run, name, video, iter(video))
        except VideoError as error:
            errors.append(str(error))
            continue
        if video.problem:
            errors.append(video.problem)
        elif run.args.max_frames is None:
            run.log.add({"name": name, "source": fingerprint(path)})
    return errors


def run_camera(run: Run, device: str) -> list[str]:
    """Record one camera's predictions until Ctrl-C or --max-frames; returns errors."""
    name = f"camera{Path(device).name}_{time.strftime('%Y%m%d-%H%M%S')}"
    stop = StopRequest()
    with open_camera(device) as camera, stop.watching():
        print(f"recording {camera.source}; Ctrl-C stops")
        frames = itertools.takewhile(lambda frame: not stop.number, camera)
        predict_frames(run, name, camera, frames)
    return [f"{camera.source} stopped: earlier frames were written"] if camera.problem else []


def predict(args: argparse.Namespace, context: DistributedContext) -> None:
    """Predict all images, then all videos, then all cameras."""
    cameras = [text.removeprefix(CAMERA) for text in args.inputs if text.startswith(CAMERA)]
    sources = [text for text in args.inputs if not text.startswith(CAMERA)]
    inputs = find_inputs(sources, args.out, IMAGE_SUFFIXES + VIDEO_SUFFIXES)
    if cameras and context.size > 1:
        raise UserError("a camera is read by one process: run the command without torchrun")
    videos = {name: path for name, path in inputs.items() if path.suffix.lower() in VIDEO_SUFFIXES}
    images = {name: path for name, path in inputs.items() if name not in videos}
    if videos or cameras:
        import_av()  # report a missing package before predicting images
    few = None if videos or cameras else len(images)
    run = open_run(args, context, inputs, few)
    errors = run_images(run, images) if images else []
    errors += run_videos(run, videos)
    for device in cameras:
        errors += run_camera(run, device)
    raise_if_problems(errors)


def main(argv: Sequence[str] | None = None) -> None:
    args = parsers.predict().parse_args(argv)
    context = init_distributed(args.device)
    try:
        predict(args, context)
    finally:
        destroy_distributed()
