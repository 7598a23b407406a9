"""Time utils/predict.py from file to file against the network's own rate.

    python benchmarks/predict.py --json benchmarks/results/predict.json

Draws toy streets and makes of them JPEGs, PNGs and a video. Three ways, in turn in every round,
over the same pictures: the network alone, from a uint8 image in memory to a label map in memory
("network"); from files to files as the script does it ("overlapped"); the same without overlap
("one by one"). Compare the shares of the network's rate; where other programs want the cores too,
the CPU time of a picture says more. Some ten minutes on two cores.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "datasets"))

import numpy as np
from make_toy_cityscapes import toy_scene
from PIL import Image
from tqdm import tqdm

from lednet.data.image_io import open_image, to_rgb
from lednet.data.registry import DEFAULT_SIZES
from lednet.device import AMP_DTYPES, choose_device, describe_device
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
from lednet.io import write_json
from lednet.training.run_dir import environment
from lednet.visualization import Visualizer, output_scheme

SCENES = 4
WAYS = ("network", "overlapped", "one_by_one")


class Case(NamedTuple):
    """One kind of input, and the three ways over its pictures."""

    name: str
    network: Callable[[], object]
    overlapped: Callable[[], object]
    one_by_one: Callable[[], object]


def draw_pictures(count: int, height: int, width: int) -> list[np.ndarray]:
    """A camera that pans over some streets, each (height, width, 3)."""
    each = -(-count // SCENES)
    wide = width + 4 * each  # by four pixels a picture
    scenes = (toy_scene(1, "val", i, width=wide, height=height).image for i in range(SCENES))
    pictures = [
        np.ascontiguousarray(scene[:, 4 * i : 4 * i + width])
        for scene in tqdm(scenes, "draw", SCENES, leave=False)
        for i in range(each)
    ]
    return pictures[:count]


def network_alone(predictor: Predictor, pictures: list[np.ndarray]) -> None:
    for picture in pictures:
        predictor(picture)


def image_case(
    predictor: Predictor,
    pictures: list[np.ndarray],
    output: PredictionWriter,
    folder: Path,
    suffix: str,
    workers: int,
) -> Case:
    tasks = []
    for i, picture in enumerate(pictures):
        path = folder / suffix / f"{i:04d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path, quality=92)  # of JPEG; PNG has none
        tasks.append(PredictionJob(path.stem, path, output.image_files(path.stem)))

    def one_by_one() -> None:
        for task in tasks:
            image = to_rgb(open_image(task.path))
            label = predictor(image)
            for kind, path in task.outputs.items():
                output.write(kind, path, image, label)

    def overlapped() -> None:
        predict_images(predictor, tasks, output, lambda: None, num_workers=workers)

    network = partial(network_alone, predictor, pictures)
    return Case(f"{suffix} to {' and '.join(output.kinds)}", network, overlapped, one_by_one)


def video_case(
    predictor: Predictor, pictures: list[np.ndarray], output: PredictionWriter, folder: Path
) -> Case:
    path = folder / "toy.mp4"
    with write_video(path, DEFAULT_RATE, 1 / DEFAULT_RATE) as writer:
        for i, picture in enumerate(pictures):
            writer.append(picture, i)

    def one_by_one() -> None:
        with (
            VideoReader(path) as video,
            video_output(output, "toy", video.rate, video.time_base) as out,
        ):
            for frame in video:
                out.add(frame, predictor(frame.image))

    def overlapped() -> None:
        with (
            VideoReader(path) as video,
            video_output(output, "toy", video.rate, video.time_base) as out,
        ):
            predict_video(predictor, iter(video), out, lambda: None)

    network = partial(network_alone, predictor, pictures)
    return Case(f"video to {' and '.join(output.kinds)}", network, overlapped, one_by_one)


def race(cases: list[Case], count: int, rounds: int) -> list[dict[str, Any]]:
    """Time of each way of each case, all of them in turn in every round."""
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for round_ in tqdm(range(rounds + 1), "round", leave=False):
        for case in cases:
            for name in WAYS:
                start, cpu_start = time.perf_counter(), time.process_time()
                getattr(case, name)()
                both = time.perf_counter() - start, time.process_time() - cpu_start
                if round_:  # the first one prepares engines and fills caches
                    seconds.setdefault((case.name, name), []).append(both)
    rows = []
    for case in cases:
        row: dict[str, Any] = {"case": case.name}
        network = [wall for wall, _ in seconds[case.name, "network"]]
        for name in WAYS:
            own, cpu = zip(*seconds[case.name, name], strict=True)
            row[name] = {
                "per_second": count / statistics.median(own),
                "cpu_ms": 1000 * statistics.median(cpu) / count,
                "share_of_network": statistics.median(
                    a / b for a, b in zip(network, own, strict=True)
                ),
            }
        rows.append(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    cells = "  ".join(
        f"{name.replace('_', ' ')} {row[name]['per_second']:7.2f}/s "
        f"({row[name]['share_of_network']:4.0%}, CPU {row[name]['cpu_ms']:.0f} ms)"
        for name in WAYS
    )
    print(f"{row['case']:28} {cells}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--weights", type=Path, default=Path("camvid-d20"))
    parser.add_argument("--height", type=int, help="network input in pixels (as trained)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--image-height", type=int, default=720, help="of the pictures (720)")
    parser.add_argument("--image-width", type=int, default=1280, help="(1280)")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="pictures (100)")
    parser.add_argument("--rounds", type=int, default=5, help="timed, after one that is not (5)")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    parser.add_argument("--precision", choices=tuple(AMP_DTYPES), default="fp32")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    # fmt: on
    return parser


def main() -> None:
    args = build_parser().parse_args()
    device = choose_device(args.device)
    predictor = Predictor.from_weights(
        args.weights, None, DEFAULT_SIZES["cityscapes"], args.height, args.width,
        device=device, backend=args.backend, precision=args.precision,
    )  # fmt: skip
    scheme = output_scheme(predictor.meta, predictor.net.num_classes, args.weights)
    pictures = draw_pictures(args.images, args.image_height, args.image_width)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        both, labels, overlay = (
            PredictionWriter(folder / "out", kinds, Visualizer(scheme), ".jpg")
            for kinds in (("labels", "overlay"), ("labels",), ("overlay",))
        )
        cases = [
            image_case(predictor, pictures, both, folder, "jpg", args.num_workers),
            image_case(predictor, pictures, labels, folder, "png", args.num_workers),
            video_case(predictor, pictures, overlay, folder),
        ]
        rows = race(cases, len(pictures), args.rounds)
    for row in rows:
        print_row(row)
    if args.json:
        record = {
            "command": " ".join(["python", "benchmarks/predict.py", *sys.argv[1:]]),
            "device": describe_device(device),
            "environment": environment(ROOT),
            "backend": predictor.backend,
            "precision": predictor.precision,
            "network_size": list(predictor.size),
            "image_size": [args.image_height, args.image_width],
            "images": args.images,
            "rounds": args.rounds,
            "workers": args.num_workers,
            "results": rows,
        }
        write_json(args.json, record)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
