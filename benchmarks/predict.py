"""Time utils/predict.py from file to file, against the network's own rate.

    python benchmarks/predict.py --json benchmarks/results/predict.json

Draws toy streets and writes them as JPEGs, PNGs and a video. Three ways, in turn in every round,
over the same images: the network alone, from a uint8 image to a label map in memory ("network");
from files to files as the script does it ("overlapped"); the same without overlap ("one by one").
Compare the shares of the network's rate; where other programs use the same cores, the CPU time of
an image is more reliable. Some ten minutes on two cores.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "datasets")]

import numpy as np
from make_toy_cityscapes import toy_scene
from PIL import Image

from benchmarks._common import Row, add_options, alternate, make_parser, print_row, write_record
from lednet.data.image_io import open_image, to_rgb
from lednet.device import AMP_DTYPES, choose_device
from lednet.errors import exit_on_user_error
from lednet.inference.backends import BACKENDS
from lednet.inference.predictor import Predictor
from lednet.inference.video import DEFAULT_RATE, VideoReader, write_video
from lednet.inference.writers import (
    PredictionJob,
    PredictionWriter,
    predict_images,
    predict_video,
    video_output,
)
from lednet.visualization import Visualizer

SCENES = 4
WAYS = ("network", "overlapped", "one_by_one")

Case = tuple[str, Callable[[], object], Callable[[], object]]
"""A kind of input: its name, and what runs it overlapped, and one by one."""


def draw_images(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """A camera that pans over some streets by four pixels an image, (height, width, 3) each."""
    each = -(-count // SCENES)
    for index in range(SCENES):
        scene = toy_scene(1, "val", index, width=width + 4 * each, height=height).image
        for i in range(min(each, count - index * each)):
            yield np.ascontiguousarray(scene[:, 4 * i : 4 * i + width])


def image_case(
    predictor: Predictor, images: list[np.ndarray], output: PredictionWriter, folder: Path,
    suffix: str, workers: int,
) -> Case:  # fmt: skip
    jobs = []
    for i, image in enumerate(images):
        path = folder / suffix / f"{i:04d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path, quality=92)  # of JPEG; ignored for PNG
        jobs.append(PredictionJob(path.stem, path, output.image_files(path.stem)))

    def one_by_one() -> None:
        for job in jobs:
            image = to_rgb(open_image(job.path))
            label = predictor(image).labels
            for kind, path in job.outputs.items():
                output.write(kind, path, image, label)

    overlapped = partial(predict_images, predictor, jobs, output, lambda: None, num_workers=workers)
    return f"{suffix} to {' and '.join(output.kinds)}", overlapped, one_by_one


def video_case(
    predictor: Predictor, images: list[np.ndarray], output: PredictionWriter, folder: Path
) -> Case:
    path = folder / "toy.mp4"
    with write_video(path, DEFAULT_RATE, 1 / DEFAULT_RATE) as writer:
        for i, image in enumerate(images):
            writer.append(image, i)

    def run(frames: Callable[[VideoReader, Any], None]) -> None:
        with (
            VideoReader(path) as video,
            video_output(output, "toy", video.rate, video.time_base) as out,
        ):
            frames(video, out)

    def one_by_one(video: VideoReader, out: Any) -> None:
        for frame in video:
            out.add(frame, predictor(frame.image).labels)

    def overlapped(video: VideoReader, out: Any) -> None:
        predict_video(predictor, iter(video), out, lambda: None)

    name = f"video to {' and '.join(output.kinds)}"
    return name, partial(run, overlapped), partial(run, one_by_one)


def time_both(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process."""
    start, cpu_start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu_start


def measure(cases: list[Case], network: Callable[[], object], count: int, rounds: int) -> list[Row]:
    """A row for each case, with the rate, CPU time and share of the network's rate of each way."""
    runs = {
        (case, way): partial(time_both, run)
        for case, *ways in cases
        for way, run in zip(WAYS, (network, *ways), strict=True)
    }
    times = alternate(runs, rounds, warmup=1)  # which prepares engines and fills caches
    rows: list[Row] = []
    for case, *_ in cases:
        row: Row = {"case": case}
        rows.append(row)
        for way in WAYS:
            seconds, cpu = zip(*times[case, way], strict=True)
            shares = (a / b for (a, _), b in zip(times[case, "network"], seconds, strict=True))
            row[way] = {
                "per_second": count / statistics.median(seconds),
                "cpu_ms": 1000 * statistics.median(cpu) / count,
                "share_of_network": statistics.median(shares),
            }
            print_row({"case": case, "way": way} | row[way])
    return rows


def main() -> None:
    parser = make_parser(__doc__, "--json", "--device")
    # fmt: off
    parser.add_argument("--weights", type=Path, default=Path("camvid-d20"))
    parser.add_argument("--height", type=int, help="network input in pixels (default: as trained)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    parser.add_argument("--precision", choices=tuple(AMP_DTYPES), default="fp32")
    # fmt: on
    add_options(
        parser,
        image_height=(720, "of the images"),
        image_width=(1280, "of the images"),
        images=(100, "number of images"),
        rounds=(5, "after an untimed one"),
        num_workers=(2, "threads"),
    )
    args = parser.parse_args()
    device = choose_device(args.device)
    predictor = Predictor(
        args.weights, (args.height, args.width),
        device=device, backend=args.backend, precision=args.precision,
    )  # fmt: skip
    scheme = predictor.scheme
    images = list(draw_images(args.images, args.image_height, args.image_width))

    def network() -> None:
        for image in images:
            predictor(image)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        both, labels, overlay = (
            PredictionWriter(folder / "out", kinds, Visualizer(scheme), ".jpg")
            for kinds in (("labels", "overlay"), ("labels",), ("overlay",))
        )
        cases = [
            image_case(predictor, images, both, folder, "jpg", args.num_workers),
            image_case(predictor, images, labels, folder, "png", args.num_workers),
            video_case(predictor, images, overlay, folder),
        ]
        rows = measure(cases, network, len(images), args.rounds)
    record = {
        "backend": predictor.backend,
        "precision": predictor.precision,
        "network_size": list(predictor.size),
        "image_size": [args.image_height, args.image_width],
        "images": args.images,
        "rounds": args.rounds,
        "workers": args.num_workers,
        "results": rows,
    }
    write_record(args.json, device, record)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
