"""Predict images, videos and cameras: label maps, visualizations and class shares.

    python utils/predict.py docs/toy_street.png
    python utils/predict.py photos "drive/**/*.jpg" clip.mp4 --weights save/mine --out labelled
    python utils/predict.py camera:0 --outputs side
    torchrun --nproc-per-node=4 utils/predict.py photos --out labelled

Takes image and video files, folders (searched recursively), patterns and, on Linux, cameras.
Videos and cameras need PyAV: pip install av. Files in --out (default: save/predictions):

    <name>_labels.png   class index of each pixel; for a video a folder of them
    <name>_overlay.jpg  image tinted by class, with a legend
    <name>_color.png    class colours                                  (--outputs color)
    <name>_side.jpg     image and class colours side by side           (--outputs side)
    shares.json         share of each class in each image and in all images

For a video, visualizations are .mp4 with its timestamps, and the shares <name>_shares.json.

An interrupted run is resumed by the same command. A camera is recorded until Ctrl-C. Images
that cannot be read are skipped and named at the end, with exit status 2. Speed on two CPU cores:
about 12 images of 480x360 a second with the weights camvid-d20.
"""

import argparse
from pathlib import Path

from lednet.cli.common import (
    BACKENDS,
    DEVICES,
    OUTPUTS,
    POSITIVE,
    PRECISIONS,
    add_alias,
    add_input_size_flags,
    make_parser,
    print_help_early,
)

ROOT = Path(__file__).resolve().parents[1]

CAMERA = "camera:"
IMAGE_OUTPUTS, VIDEO_OUTPUTS = ("labels", "overlay"), ("overlay",)


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help='image, video, folder, pattern ("*.jpg"), or camera:NUMBER')
    parser.add_argument("--weights", type=Path, default=Path("camvid-d20"),
                        help="released name, weights file, run folder (its best.pth) or exported "
                             "file")
    parser.add_argument("--out", type=Path, default=ROOT / "save" / "predictions",
                        help="folder of the results (default: save/predictions)")
    parser.add_argument("--outputs", choices=OUTPUTS, nargs="+",
                        help="files to write (default: labels and overlay for images, overlay for "
                             "videos)")
    parser.add_argument("--label-ids", action="store_true",
                        help="write label ids instead of class indices, as the Cityscapes "
                             "benchmark expects (Cityscapes weights only)")
    parser.add_argument("--alpha", type=float, default=0.5,
                        help="opacity of the class colours in overlays, 0 to 1")
    parser.add_argument("--legend", action=argparse.BooleanOptionalAction, default=True,
                        help="draw a legend")
    parser.add_argument("--image-format", choices=("jpg", "png"), default="jpg",
                        help="format of overlay and side; png is lossless, slower and larger")
    parser.add_argument("--overwrite", action="store_true", help="discard earlier results")
    parser.add_argument("--max-frames", type=POSITIVE, metavar="N",
                        help="stop each video or camera after N frames; a video is then not "
                             "marked as finished")
    parser.add_argument("--num-workers", type=POSITIVE, default=2, metavar="N",
                        help="threads that decode images, and threads that write")
    add_input_size_flags(parser)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="device to run on")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto",
                        help="inference engine; auto: the fastest that is installed")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="number format")
    # fmt: on
    add_alias(parser, "--what", "--outputs")
    add_alias(parser, "--photo", "--image-format")
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

import itertools
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lednet.data.imagefolder import SUFFIXES
from lednet.data.labels import LabelScheme, cityscapes_label_ids, cityscapes_scheme
from lednet.data.registry import DEFAULT_SIZES
from lednet.distributed import DistributedContext, destroy_distributed, init_distributed
from lednet.errors import UserError, exit_on_user_error, raise_if_problems
from lednet.hub import weights_checksum
from lednet.inference.inputs import find_inputs
from lednet.inference.predictor import Predictor
from lednet.inference.progress_log import ProgressLog
from lednet.inference.video import VIDEO_SUFFIXES, VideoError, VideoReader, import_av, open_camera
from lednet.inference.writers import (
    PredictionJob,
    PredictionWriter,
    class_shares,
    errors_of,
    predict_images,
    predict_video,
    video_output,
)
from lednet.io import write_json
from lednet.signals import StopRequest
from lednet.visualization import Visualizer, output_scheme


@dataclass
class Run:
    """What all inputs share."""

    args: argparse.Namespace
    context: DistributedContext
    predictor: Predictor
    scheme: LabelScheme
    log: ProgressLog

    def writer(self, default_outputs: tuple[str, ...]) -> PredictionWriter:
        return PredictionWriter(
            self.args.out,
            self.args.outputs or default_outputs,
            Visualizer(self.scheme, self.args.alpha, self.args.legend),
            f".{self.args.image_format}",
            cityscapes_label_ids() if self.args.label_ids else None,
        )

    def write_report(
        self, path: Path, entries: list[dict[str, Any]], name: str, **more: Any
    ) -> None:
        """Write class shares as JSON, and print the largest.

        Args:
            entries: images or frames with "pixels".
            name: key of the entries.
            more: further keys of the report.
        """
        total = class_shares((entry["pixels"] for entry in entries), self.scheme)
        rows = [
            {key: value for key, value in entry.items() if key not in ("pixels", "source")}
            | {"shares": class_shares([entry["pixels"]], self.scheme)}
            for entry in entries
        ]
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "weights": str(self.args.weights),
            "network_size": list(self.predictor.size),
            "backend": self.predictor.backend,
            "precision": self.predictor.precision,
        }
        write_json(path, report | more | {"shares": total, name: rows})
        largest = sorted(total.items(), key=lambda item: -item[1])[:5]
        print(", ".join(f"{label} {share:.1%}" for label, share in largest))

    def bar(self, total: int | None, name: str, unit: str) -> tqdm:
        hidden = total == 0 or not self.context.is_main
        return tqdm(total=total, desc=name, unit=unit, dynamic_ncols=True, disable=hidden)


def open_run(args: argparse.Namespace, context: DistributedContext) -> Run:
    predictor = Predictor.from_weights(
        args.weights, None, DEFAULT_SIZES["cityscapes"], args.height, args.width,
        device=context.device, backend=args.backend, precision=args.precision,
    )  # fmt: skip
    scheme = output_scheme(predictor.meta, predictor.net.num_classes, args.weights)
    if args.label_ids and scheme.classes != cityscapes_scheme().classes:
        raise UserError(
            f"{args.weights} has the classes of {scheme.name}, --label-ids is for those of "
            "Cityscapes: leave it out"
        )
    if args.overwrite and context.is_main:
        ProgressLog.clear(args.out)
    context.barrier()
    settings = {
        "weights": weights_checksum(args.weights),
        "size": predictor.size,
        "backend": predictor.backend,
        "precision": predictor.precision,
        "label_ids": args.label_ids,
        "alpha": args.alpha,
        "legend": args.legend,
    }

    def check(entry: dict[str, Any]) -> None:
        _path, _size, _time = entry["source"]
        if "pixels" in entry:  # an image, not a video
            class_shares([entry["pixels"]], scheme)

    log = ProgressLog(args.out, settings, context.rank, check)
    context.barrier()  # all processes have read the logs before one writes
    return Run(args, context, predictor, scheme, log)


def fingerprint(path: Path) -> list:
    """Resolved path, size and modification time of a file."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def require_same_inputs(run: Run, inputs: dict[str, Path]) -> None:
    """Check that earlier results are of the same files.

    Raises:
        UserError: There are results of another file for an input's name.
    """
    for name, path in inputs.items():
        entry = run.log.entries.get(name)
        if entry and entry["source"] != fingerprint(path):
            raise UserError(
                f"{run.args.out} holds the results for {name} of {entry['source'][0]}, another "
                f"file than {path} or the same before a change: choose another --out, or add "
                "--overwrite to start over"
            )


def run_images(run: Run, images: dict[str, Path]) -> list[str]:
    """Predict the images that have no results yet, and write the shares of all.

    Returns:
        In the main process, the errors of skipped images.
    """
    writer = run.writer(IMAGE_OUTPUTS)
    jobs, done = [], []
    for name, path in images.items():
        files, entry = writer.image_files(name), run.log.entries.get(name)
        if entry:  # otherwise existing files may be of an older run
            files = {kind: file for kind, file in files.items() if not file.exists()}
        if files:
            jobs.append(PredictionJob(name, path, files))
        else:
            done.append(entry)

    def on_written(entry: dict[str, Any]) -> None:
        run.log.add(entry | {"source": fingerprint(images[entry["name"]])})

    jobs = jobs[run.context.rank :: run.context.size]
    with run.bar(len(jobs), "images", "image") as bar:
        entries = predict_images(
            run.predictor, jobs, writer, bar.update, on_written=on_written,
            num_workers=run.args.num_workers,
        )  # fmt: skip
    entries = sorted(done + run.context.all_gather(entries), key=lambda entry: entry["name"])
    if not run.context.is_main:
        return []
    predicted = [entry for entry in entries if "error" not in entry]
    skipped = [entry for entry in entries if "error" in entry]
    note = f"; {len(done)} were there already (--overwrite starts over)" if done else ""
    print(f"{len(predicted) - len(done)} of {len(images)} images predicted in {run.args.out}{note}")
    if predicted:
        run.write_report(run.args.out / "shares.json", predicted, "images", passed_over=skipped)
    return errors_of(skipped)


def predict_frames(run: Run, name: str, video: VideoReader, frames: Iterator) -> None:
    """Predict a video or camera, and write its files and shares."""
    limit = run.args.max_frames
    expected = min(filter(None, (video.expected, limit)), default=None)
    with (
        video_output(run.writer(VIDEO_OUTPUTS), name, video.rate, video.time_base) as files,
        run.bar(expected, name, "frame") as bar,
    ):
        entries = predict_video(run.predictor, itertools.islice(frames, limit), files, bar.update)
        if not entries:
            raise VideoError(f"{video.source} gave no frame: nothing was written")
    print(f"{len(entries)} frames of {video.source} predicted in {run.args.out}")
    run.write_report(
        shares_file(run, name), entries, "frames", video=video.source, frame_rate=str(video.rate),
        height=files.size[0], width=files.size[1],
    )  # fmt: skip
    if files.padded:
        print(
            f"one side of {', '.join(files.padded)} is odd, which H.264 does not allow: its last "
            "line was repeated"
        )


def shares_file(run: Run, name: str) -> Path:
    return run.args.out / f"{name}_shares.json"


def run_videos(run: Run, videos: dict[str, Path]) -> list[str]:
    """Predict the videos that are not finished, each in one process; returns errors."""
    writer = run.writer(VIDEO_OUTPUTS)
    unfinished = []
    for name, path in videos.items():
        files = [*writer.video_files(name).values(), shares_file(run, name)]
        if name not in run.log.entries or not all(file.exists() for file in files):
            unfinished.append((name, path))
        elif run.context.is_main:
            print(f"{path} is done already in {run.args.out} (--overwrite starts over)")
    errors = []
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
    inputs = find_inputs(sources, args.out, SUFFIXES + VIDEO_SUFFIXES)
    if cameras and context.size > 1:
        raise UserError("a camera is read by one process: run the command without torchrun")
    videos = {name: path for name, path in inputs.items() if path.suffix.lower() in VIDEO_SUFFIXES}
    images = {name: path for name, path in inputs.items() if name not in videos}
    if videos or cameras:
        import_av()  # report a missing package before predicting images
    run = open_run(args, context)
    require_same_inputs(run, inputs)
    errors = run_images(run, images) if images else []
    errors += run_videos(run, videos)
    for device in cameras:
        errors += run_camera(run, device)
    raise_if_problems(errors)


def main() -> None:
    args = build_parser().parse_args()
    if not 0 <= args.alpha <= 1:
        raise UserError(f"--alpha is {args.alpha}: give a number from 0 to 1")
    context = init_distributed(args.device)
    try:
        predict(args, context)
    finally:
        destroy_distributed()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
