"""Compare the backends with the plain network, from a uint8 image to a uint8 label map.

    python benchmarks/inference.py --weights save/cityscapes-d20 --images val --calibrate train \
        --json benchmarks/results/inference.json --plot benchmarks/results/inference.png

"plain" is the network as it was trained: eager, fp32, batch norms, logits at full size,
argmax. The others are `Predictor`'s backends, its int8 file where nncf is installed
(calibrated on images of --calibrate), and torchvision's lraspp_mobilenet_v3_large (random
weights, for its speed alone). Every round runs each of them once: compare ratios. Agreement of
the labels needs real weights and --images; without, the images are random blocks. About half an
hour on two cores.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.transforms import v2

from benchmarks._common import (
    Row,
    add_options,
    alternate,
    call_alone,
    make_parser,
    plot_bars,
    print_row,
    summarize,
    time_calls,
    write_record,
)
from lednet.data.image_io import read_image
from lednet.device import (
    autocast,
    choose_device,
    describe_device,
    fast_precisions,
    peak_memory_mb,
    synchronize,
)
from lednet.errors import UserError, exit_on_user_error
from lednet.export.common import import_optional
from lednet.export.exporter import export
from lednet.export.formats import compile_openvino, missing_packages
from lednet.files import IMAGE_SUFFIXES
from lednet.inference.backends import BACKENDS, is_available
from lednet.inference.benchmark import count_macs
from lednet.inference.predictor import Predictor
from lednet.model import LEDNet, load_model

SIZES = ((512, 1024), (1024, 2048))
CALIBRATION_IMAGES = 32
PEER = "lraspp_mobilenet_v3_large"
SETTLE = 0.1
"""Seconds before each timed run, in which the threads of the previous engine, which spin for a
while, go to sleep."""

Size = tuple[int, int]
Run = Callable[[Tensor], Tensor]


class Runner(NamedTuple):
    """A competitor. `run` takes uint8 images (N, 3, H, W) in main memory to label maps there."""

    backend: str
    precision: str
    run: Run
    weights: Path | None = None
    """What a process of its own would open."""

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"


class Peer(nn.Module):
    """A model of torchvision with random weights, for its speed: (N, 3, H, W) to logits."""

    def __init__(self, name: str):
        super().__init__()
        build = getattr(segmentation, name)
        self.net = build(weights=None, weights_backbone=None, num_classes=20).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)["out"]


class ToLabels(nn.Module):
    """uint8 images (N, 3, H, W) to label maps (N, H, W), without any optimization."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, meta: Row):
        super().__init__()
        self.net = net
        for key, value in (("mean", 0.0), ("std", 1.0)):
            self.register_buffer(key, torch.tensor(meta.get(key, [value] * 3)).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = (images.to(self.mean.device).float() / 255 - self.mean) / self.std
        return self.net(x).argmax(1).to(torch.uint8)


def openvino_peer() -> Run:
    """The peer through OpenVINO, with its argmax inside."""
    openvino, net = import_optional("openvino"), ToLabels(Peer(PEER), {}).eval()
    compiled: dict[torch.Size, Callable] = {}

    def run(images: Tensor) -> Tensor:
        if images.shape not in compiled:
            model = openvino.convert_model(torch.export.export(net, (images.clone(),)))
            hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
            compiled[images.shape] = compile_openvino(model, hints)
        return torch.from_numpy(compiled[images.shape](images.numpy())[0])

    return run


def labels_of(predictor: Predictor) -> Run:
    return lambda images: predictor.label_maps(images)[0].cpu()


def make_runners(
    args: argparse.Namespace, device: torch.device, size: Size, folder: Path
) -> list[Runner]:
    """All that can run here; files that they need are written to `folder`."""
    net, meta = open_network(args.weights)
    plain = ToLabels(net, meta).to(device)
    normalization = {key: meta[key] for key in ("mean", "std") if key in meta}
    runners = [Runner("plain", "fp32", lambda images: plain(images).cpu(), args.weights)]
    for backend in args.backends:
        if not is_available(backend, device):
            print(f"skipped: backend {backend} is not installed, or not for {device}")
            continue
        for precision in ("fp32", *(fast_precisions(device) if backend != "onnxruntime" else ())):
            predictor = Predictor(
                net, size, **normalization, device=device, backend=backend, precision=precision
            )
            runners.append(Runner(backend, precision, labels_of(predictor), args.weights))
    if args.int8 and device.type == "cpu" and not missing_packages("openvino", "int8"):
        path = folder / f"int8_{size[0]}x{size[1]}.xml"
        images = load_images(args.calibrate or args.images, size, CALIBRATION_IMAGES)
        batches = [image[None].permute(0, 2, 3, 1).numpy() for image in images]
        export(
            net, meta, path, "openvino", size, batches[:1], output="logits", calibration=batches,
            min_agreement=0, max_difference=float("inf"),  # the table contains its agreement
        )  # fmt: skip
        runners.append(Runner("openvino", "int8", labels_of(Predictor(path)), path))
    if args.peer:
        peer = ToLabels(Peer(PEER), {}).to(device).eval()
        runners.append(Runner(PEER, "fp32", lambda images: peer(images).cpu()))
        if device.type == "cpu" and is_available("openvino", device):
            runners.append(Runner(f"{PEER}, openvino", "fp32", openvino_peer()))
    return runners


def open_network(weights: Path | None) -> tuple[LEDNet, Row]:
    if weights:
        return load_model(weights)
    torch.manual_seed(0)
    return LEDNet(20).eval(), {}


def load_images(folder: Path | None, size: Size, count: int) -> Tensor:
    """(count, 3, *size) uint8: images of the folder at even distances, resized; or blocks."""
    if folder is None:
        rng = np.random.default_rng(0)
        blocks = rng.integers(0, 256, (count, 3, size[0] // 32, size[1] // 32), dtype=np.uint8)
        return torch.from_numpy(blocks.repeat(32, axis=2).repeat(32, axis=3))
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{folder} has no images (png, jpg, webp): check --images and --calibrate")
    images = [torch.from_numpy(read_image(paths[i * len(paths) // count])) for i in range(count)]
    resize = partial(v2.functional.resize, size=size, antialias=True)
    return torch.stack([resize(image.permute(2, 0, 1)) for image in images])


def time_run(runner: Runner, images: Tensor, device: torch.device) -> float:
    """Milliseconds of a run."""
    synchronize(device)
    time.sleep(SETTLE)
    start = time.perf_counter()
    runner.run(images)
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


def agreement(runner: Runner, images: Tensor, expected: list[Tensor]) -> float | None:
    """Share of the pixels labelled as expected; None for another network."""
    if runner.backend.startswith(PEER):
        return None
    pairs = zip(images, expected, strict=True)
    return statistics.mean((runner.run(i[None]) == labels).double().mean().item()
                           for i, labels in pairs)  # fmt: skip


@torch.inference_mode()
def peak_memory(
    args: argparse.Namespace, device: torch.device, size: Size, backend: str, precision: str,
    weights: Path | None,
) -> float:  # fmt: skip
    """Peak memory of this process in MB, after two runs of one runner."""
    if precision == "int8":
        run = labels_of(Predictor(weights))  # type: ignore[arg-type]
    else:
        args.backends = [backend] if backend in BACKENDS else []
        args.peer, args.int8 = PEER in backend, False
        runners = make_runners(args, device, size, Path())
        run = next(r.run for r in runners if (r.backend, r.precision) == (backend, precision))
    for _ in range(2):
        run(load_images(None, size, 1))
    return peak_memory_mb(device)


@torch.inference_mode()
def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> Row:
    """Measure every size and batch; see the module's docstring."""
    results: list[Row] = []
    for size in args.sizes or SIZES:
        runners = make_runners(args, device, size, folder)
        images = load_images(args.images, size, max(args.agreement_images, *args.batches))
        compared = images[: args.agreement_images]
        expected = [runners[0].run(image[None]) for image in compared]
        shares = [agreement(runner, compared, expected) for runner in runners]
        peaks = [
            args.memory and call_alone(
                peak_memory, args, device, size, r.backend, r.precision, r.weights
            )
            for r in runners
        ]  # fmt: skip
        for batch in args.batches:
            runs = {r.name: partial(time_run, r, images[:batch], device) for r in runners}
            found = alternate(runs, max(3, args.runs // batch), args.warmup)
            plain = statistics.median(found[runners[0].name])
            for runner, share, peak in zip(runners, shares, peaks, strict=True):
                row: Row = {"backend": runner.backend, "precision": runner.precision,
                            "height": size[0], "width": size[1], "batch": batch}  # fmt: skip
                row |= summarize(found[runner.name], batch)
                row |= {
                    "fps_per_core": row["fps"] / torch.get_num_threads(),
                    "ratio_to_plain": plain / row["p50_ms"],
                    "agreement": share,
                    "peak_mb": peak or None,
                }
                results.append(row)
                print_row(row)
    net, _ = open_network(args.weights)
    return {"results": results, "limits": limits(results, net, device)}


def limits(results: list[Row], net: LEDNet, device: torch.device) -> dict[str, Row]:
    """For each size and precision of a matrix product in PyTorch: the time of the network's
    operations at that rate, and the share of it that the best backend reaches."""
    found: dict[str, Row] = {}
    for precision in ("fp32", "bf16", "fp16"):
        rows = [r for r in results if r["batch"] == 1 and r["precision"] == precision
                and r["backend"] in BACKENDS]  # fmt: skip
        if not rows:
            continue
        a = torch.rand(2048, 2048, device=device)
        with torch.inference_mode(), autocast(device, precision):
            fastest = min(time_calls(partial(torch.matmul, a, a), device, 1.0, host_clock=True))
        rate = 2 * 2048**3 / fastest / 1e6
        for size in sorted({(r["height"], r["width"]) for r in rows}):
            same_size = (r for r in rows if (r["height"], r["width"]) == size)
            best = min(same_size, key=lambda r: r["p50_ms"])
            operations = 2 * count_macs(net, size) / 1e9
            limit = 1000 * operations / rate
            key = f"{size[0]}x{size[1]} {precision}"
            found[key] = {
                "gflop": operations,
                "matrix_gflops": rate,
                "limit_ms": limit,
                "best": best["backend"],
                "share_of_limit": limit / best["p50_ms"],
            }
            print_row({"limit": key} | found[key])
    return found


def plot(results: list[Row], path: Path, title: str) -> None:
    """Bars of the ratio to plain at batch 1, a panel for each size."""
    panels: dict[str, list[tuple[str, float, str, str]]] = {}
    for row in (row for row in results if row["batch"] == 1):
        text = f"{row['ratio_to_plain']:.2f}x, {row['p50_ms']:.0f} ms"
        color = "#f58518" if row["backend"].startswith(PEER) else "#4c78a8"
        bar = (f"{row['backend']} {row['precision']}", row["ratio_to_plain"], text, color)
        panels.setdefault(f"{row['height']}x{row['width']}, batch 1", []).append(bar)
    plot_bars(path, title, "times as fast as plain", panels)


def parse_size(text: str) -> Size:
    height, width = map(int, text.split("x"))
    return height, width


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "--json", "--plot", "--device")
    # fmt: off
    parser.add_argument("--weights", type=Path,
                        help="weights file or run folder (default: random weights)")
    parser.add_argument("--images", type=Path, help="folder of images to compare labels on")
    parser.add_argument("--calibrate", type=Path, metavar="DIR",
                        help=f"{CALIBRATION_IMAGES} images of this folder calibrate int8 "
                             "(default: those of --images)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--sizes", nargs="+", metavar="HxW", type=parse_size,
                        help="of images and network input (default: 512x1024 1024x2048)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4],
                        help="(default: 1 2 4)")
    # fmt: on
    add_options(
        parser,
        int8=(True, "include OpenVINO's int8"),
        agreement_images=(4, "images to compare labels on"),
        peer=(True, f"include torchvision's {PEER}"),
        memory=(True, "peak memory, each in a process of its own"),
        warmup=(2, "untimed rounds"),
        runs=(12, "rounds at batch 1"),
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        record = measure(args, device, Path(folder))
    write_record(args.json, device, record)
    if args.plot:
        plot(record["results"], args.plot, describe_device(device))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
