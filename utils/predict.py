"""Label images, videos and cameras: label maps, pictures, and how much of each class there is.

    python utils/predict.py docs/toy_street.png
    python utils/predict.py photos "drive/**/*.jpg" clip.mp4 --weights save/mine --out labelled
    python utils/predict.py camera:0 --what side
    torchrun --nproc-per-node=4 utils/predict.py photos --out labelled

Takes image and video files, folders (with their sub-folders), patterns and, on Linux,
cameras; for videos and cameras: pip install av. In --out, by default save/predictions:

    <name>_labels.png   the class index of each pixel; of a video a folder of them
    <name>_overlay.jpg  the image tinted by class, with a legend
    <name>_color.png    the class colours alone                        (--what color)
    <name>_side.jpg     the image, and the class colours beside it     (--what side)
    shares.json         the classes' shares, in each image and in all

For a video the pictures are .mp4, at its frame rate, and the shares <name>_shares.json.

The same command goes on where it was interrupted. A camera is recorded until Ctrl-C. An image
that cannot be read is passed over and named at the end, with exit status 2. On two CPU cores
some 12 images a second of 480x360 with the weights camvid-d20.
"""

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lednet.data.imagefolder import SUFFIXES
from lednet.data.labels import LabelScheme, cityscapes_label_ids, cityscapes_scheme
from lednet.data.registry import DEFAULT_SIZES
from lednet.device import AMP_DTYPES
from lednet.distributed import DistributedContext, destroy_distributed, init_distributed
from lednet.errors import UserError, exit_on_user_error, raise_if_problems
from lednet.hub import weights_checksum
from lednet.inference.backends import BACKENDS
from lednet.inference.inputs import find_inputs
from lednet.inference.predictor import Predictor
from lednet.inference.progress_log import ProgressLog
from lednet.inference.video import VIDEO_SUFFIXES, VideoError, VideoReader, import_av, open_camera
from lednet.inference.writers import (
    OUTPUTS,
    PredictionJob,
    PredictionWriter,
    class_shares,
    errors_of,
    predict_images,
    predict_video,
    video_output,
)
from lednet.io import write_json
from lednet.training.signals import StopRequest
from lednet.visualization import Visualizer, output_scheme

ROOT = Path(__file__).resolve().parents[1]

CAMERA = "camera:"
IMAGE_KINDS, VIDEO_KINDS = ("labels", "overlay"), ("overlay",)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help='image, video, folder, pattern ("*.jpg"), or camera:NUMBER')
    parser.add_argument("--weights", type=Path, default=Path("camvid-d20"),
                        help="released name, weights file, run folder (its best.pth) or exported "
                             "file (camvid-d20)")
    parser.add_argument("--out", type=Path, default=ROOT / "save" / "predictions",
                        help="folder for the results (save/predictions)")
    parser.add_argument("--what", choices=OUTPUTS, nargs="+",
                        help="what is written (of images labels and overlay, of videos overlay)")
    parser.add_argument("--label-ids", action="store_true",
                        help="of Cityscapes weights: label maps hold label ids, as its benchmark "
                             "wants them")
    parser.add_argument("--alpha", type=float, default=0.5,
                        help="share of the class's colour in overlays, 0 to 1 (0.5)")
    parser.add_argument("--legend", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--photo", choices=("jpg", "png"), default="jpg",
                        help="file type of overlay and side; png is exact, slower and "
                             "larger (jpg)")
    parser.add_argument("--overwrite", action="store_true",
                        help="begin anew what is there already")
    parser.add_argument("--max-frames", type=int, metavar="N",
                        help="of each video or camera; its files are not taken for finished")
    parser.add_argument("--num-workers", type=int, default=2,
                        help="threads that decode images, and as many that write (2)")
    parser.add_argument("--height", type=int, help="network input in pixels (as trained)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto",
                        help="what runs the network; auto: the fastest that is installed (auto)")
    parser.add_argument("--precision", choices=tuple(AMP_DTYPES), default="fp32")
    # fmt: on
    return parser


def parse_options() -> argparse.Namespace:
    args = build_parser().parse_args()
    if not 0 <= args.alpha <= 1:
        raise UserError(f"--alpha is {args.alpha}: give a share from 0 to 1")
    for name in ("max_frames", "num_workers", "height", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
    return args


@dataclass
class Run:
    """What all inputs have in common."""

    args: argparse.Namespace
    world: DistributedContext
    predictor: Predictor
    scheme: LabelScheme
    journal: ProgressLog

    def output(self, default_kinds: tuple[str, ...]) -> PredictionWriter:
        return PredictionWriter(
            self.args.out,
            self.args.what or default_kinds,
            Visualizer(self.scheme, self.args.alpha, self.args.legend),
            f".{self.args.photo}",
            cityscapes_label_ids() if self.args.label_ids else None,
        )

    def report(self, **found: Any) -> dict[str, Any]:
        """The content of a file of shares."""
        return {
            "command": shlex.join(["python", *sys.argv]),
            "weights": str(self.args.weights),
            "network_size": list(self.predictor.size),
            "backend": self.predictor.backend,
            "precision": self.predictor.precision,
        } | found

    def with_shares(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Entries whose pixels have become shares."""
        return [
            {key: value for key, value in entry.items() if key not in ("pixels", "source")}
            | {"shares": class_shares([entry["pixels"]], self.scheme)}
            for entry in entries
        ]

    def bar(self, total: int | None, name: str, unit: str) -> tqdm:
        hidden = total == 0 or not self.world.is_main
        return tqdm(total=total, desc=name, unit=unit, dynamic_ncols=True, disable=hidden)


def open_run(args: argparse.Namespace, world: DistributedContext) -> Run:
    predictor = Predictor.from_weights(
        args.weights, None, DEFAULT_SIZES["cityscapes"], args.height, args.width,
        device=world.device, backend=args.backend, precision=args.precision,
    )  # fmt: skip
    scheme = output_scheme(predictor.meta, predictor.net.num_classes, args.weights)
    if args.label_ids and scheme.classes != cityscapes_scheme().classes:
        raise UserError(
            f"{args.weights} has the classes of {scheme.name}, --label-ids is for those of "
            "Cityscapes: leave it out"
        )
    if args.overwrite and world.is_main:
        ProgressLog.clear(args.out)
    world.barrier()
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
        if "pixels" in entry:  # an image's
            class_shares([entry["pixels"]], scheme)

    journal = ProgressLog(args.out, settings, world.rank, check)
    world.barrier()  # all have read before one writes
    return Run(args, world, predictor, scheme, journal)


def state_of(path: Path) -> list:
    """What tells a file from another one of its name, and from itself after a change."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def refuse_others(run: Run, inputs: dict[str, Path]) -> None:
    """
    Raises:
        UserError: there are results of another file under an input's name.
    """
    for name, path in inputs.items():
        entry = run.journal.entries.get(name)
        if entry and entry["source"] != state_of(path):
            raise UserError(
                f"{run.args.out} holds the results for {name} of {entry['source'][0]}, another "
                f"file than {path} or the same before a change: choose another --out, or add "
                "--overwrite to begin anew"
            )


def run_images(run: Run, images: dict[str, Path]) -> list[str]:
    """Predict what is left to do, each image in one process; write the shares of all.

    Returns:
        In the main process, what went wrong.
    """
    output = run.output(IMAGE_KINDS)
    tasks, done = [], []
    for name, path in images.items():
        files, entry = output.image_files(name), run.journal.entries.get(name)
        if entry:  # what is not in the journal may be of an older run
            files = {kind: file for kind, file in files.items() if not file.exists()}
        if files:
            tasks.append(PredictionJob(name, path, files))
        else:
            done.append(entry)

    def keep(entry: dict[str, Any]) -> None:
        run.journal.add(entry | {"source": state_of(images[entry["name"]])})

    mine = tasks[run.world.rank :: run.world.size]
    with run.bar(len(mine), "images", "image") as bar:
        entries = predict_images(
            run.predictor, mine, output, bar.update, keep=keep, workers=run.args.num_workers
        )
    entries = sorted(done + run.world.all_gather(entries), key=lambda entry: entry["name"])
    if not run.world.is_main:
        return []
    read = [entry for entry in entries if "error" not in entry]
    note = f"; {len(done)} were there already (--overwrite begins anew)" if done else ""
    print(f"{len(read) - len(done)} of {len(images)} images predicted in {run.args.out}{note}")
    if read:
        total = class_shares((entry["pixels"] for entry in read), run.scheme)
        print(describe(total))
        errors = [entry for entry in entries if "error" in entry]
        report = run.report(shares=total, images=run.with_shares(read), passed_over=errors)
        write_json(run.args.out / "shares.json", report)
    return errors_of(entries)


def describe(shares: dict[str, float], count: int = 5) -> str:
    """The largest shares in words."""
    largest = sorted(shares.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {share:.1%}" for name, share in largest)


def predict_frames(run: Run, name: str, video: VideoReader, frames: Iterator) -> None:
    """Predict a video, write its files and its shares."""
    output = run.output(VIDEO_KINDS)
    limit = run.args.max_frames
    expected = min(filter(None, (video.expected, limit)), default=None)
    with (
        video_output(output, name, video.rate, video.unit) as files,
        run.bar(expected, name, "frame") as bar,
    ):
        frames = itertools.islice(frames, limit)
        entries = predict_video(run.predictor, frames, files, bar.update)
        if not entries:
            raise VideoError(f"{video.source} gave no frame: nothing was written")
    total = class_shares((entry["pixels"] for entry in entries), run.scheme)
    report = run.report(
        video=video.source,
        frame_rate=str(video.rate),
        height=files.size[0],
        width=files.size[1],
        shares=total,
        frames=run.with_shares(entries),
    )
    write_json(shares_file(run, name), report)
    print(f"{len(entries)} frames of {video.source} predicted in {run.args.out}")
    print(describe(total))
    if files.padded:
        print(
            f"one side of {', '.join(files.padded)} was odd, which H.264 does not take: its last "
            "line stands twice"
        )


def shares_file(run: Run, name: str) -> Path:
    return run.args.out / f"{name}_shares.json"


def run_videos(run: Run, videos: dict[str, Path]) -> list[str]:
    """Predict the videos that are left to do, each in one process; returns what went wrong."""
    output = run.output(VIDEO_KINDS)
    left = []
    for name, path in videos.items():
        files = [*output.video_files(name).values(), shares_file(run, name)]
        if name not in run.journal.entries or not all(file.exists() for file in files):
            left.append((name, path))
        elif run.world.is_main:
            print(f"{path} is done already in {run.args.out} (--overwrite begins anew)")
    problems = []
    for name, path in left[run.world.rank :: run.world.size]:
        try:
            with VideoReader(path) as video:
                predict_frames(run, name, video, iter(video))
        except VideoError as error:
            problems.append(str(error))
            continue
        if video.problem:
            problems.append(video.problem)
        elif run.args.max_frames is None:
            run.journal.add({"name": name, "source": state_of(path)})
    return problems


def run_camera(run: Run, device: str) -> list[str]:
    """Record one camera's predictions until Ctrl-C, or --max-frames; returns what went wrong."""
    name = f"camera{Path(device).name}_{time.strftime('%Y%m%d-%H%M%S')}"
    stop = StopRequest()
    with open_camera(device) as camera, stop.watching():
        print(f"recording {camera.source}; Ctrl-C ends it")
        frames = itertools.takewhile(lambda frame: not stop.number, camera)
        predict_frames(run, name, camera, frames)
    return [f"{camera.source} stopped: what came before is kept"] if camera.problem else []


def predict(args: argparse.Namespace, world: DistributedContext) -> None:
    """Every input in order: images, videos, cameras."""
    cameras = [text.removeprefix(CAMERA) for text in args.inputs if text.startswith(CAMERA)]
    sources = [text for text in args.inputs if not text.startswith(CAMERA)]
    inputs = find_inputs(sources, args.out, SUFFIXES + VIDEO_SUFFIXES)
    if cameras and world.size > 1:
        raise UserError("a camera is read by one process: leave torchrun out")
    videos = {name: path for name, path in inputs.items() if path.suffix.lower() in VIDEO_SUFFIXES}
    images = {name: path for name, path in inputs.items() if name not in videos}
    if videos or cameras:
        import_av()  # or say now that it is missing
    run = open_run(args, world)
    refuse_others(run, inputs)
    problems = run_images(run, images) if images else []
    problems += run_videos(run, videos)
    for device in cameras:
        problems += run_camera(run, device)
    raise_if_problems(problems)


def main() -> None:
    args = parse_options()
    world = init_distributed(args.device)
    try:
        predict(args, world)
    finally:
        destroy_distributed()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
