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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.transforms import v2

from benchmarks._common import (
    Row,
    Size,
    add_options,
    alternate,
    make_parser,
    plot_bars,
    print_row,
    product_rate,
    summarize,
    write_record,
)
from lednet.cli.common import POSITIVE
from lednet.data.image_io import read_image
from lednet.device import (
    choose_device,
    describe_device,
    fast_precisions,
    synchronize,
)
from lednet.errors import UserError, exit_on_user_error
from lednet.exporting.common import import_optional
from lednet.exporting.exporter import export
from lednet.exporting.formats import compile_openvino, missing_packages
from lednet.files import IMAGE_SUFFIXES, find_files
from lednet.inference.backends import BACKENDS, is_available
from lednet.inference.benchmark import count_macs
from lednet.inference.predictor import Predictor
from lednet.model import LEDNet, load_model, resize

CALIBRATION_IMAGES = 32
PEER = "lraspp_mobilenet_v3_large"
SETTLE = 0.1
"""Seconds before each timed run, in which the threads of the previous engine, which spin for a
while, go to sleep."""

Run = Callable[[Tensor], Tensor]
"""uint8 images (N, 3, H, W) in main memory to label maps (N, H, W) there."""
Key = tuple[str, str]
"""Backend or model, and precision."""


class Peer(nn.Module):
    """A model of torchvision with random weights, for its speed: (N, 3, H, W) to logits."""

    def __init__(self, name: str):
        super().__init__()
        build = getattr(segmentation, name)
        self.net = build(weights=None, weights_backbone=None, num_classes=20).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)["out"]


class ToLabels(nn.Module):
    """uint8 images (N, 3, H, W) to label maps (N, H, W), without any optimization.

    Args:
        net: to logits of any size.
        meta: of the weights, for "mean" and "std".
        dtype, memory_format: of the network's input.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        meta: Row,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        super().__init__()
        self.net, self.dtype, self.memory_format = net, dtype, memory_format
        for key, value in (("mean", 0.0), ("std", 1.0)):
            values = torch.tensor(meta.get(key, [value] * 3), dtype=torch.float32)
            self.register_buffer(key, values.view(-1, 1, 1))

    def prepare(self, images: Tensor) -> Tensor:
        x = (images.to(self.mean.device).float() / 255 - self.mean) / self.std
        return x.to(self.dtype).contiguous(memory_format=self.memory_format)

    def logits(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits if logits.shape[-2:] == x.shape[-2:] else resize(logits, x.shape[-2:])

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.prepare(images)).argmax(1).to(torch.uint8)


def eager_run(net: nn.Module, meta: Row, device: torch.device) -> Run:
    module = ToLabels(net, meta).to(device).eval()
    return lambda images: module(images).cpu()


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


def int8_run(args: argparse.Namespace, net: LEDNet, size: Size, meta: Row, folder: Path) -> Run:
    """OpenVINO's int8 file, exported to `folder`."""
    path = folder / f"int8_{size[0]}x{size[1]}.xml"
    images = load_images(args.calibrate or args.images, size, CALIBRATION_IMAGES)
    batches = [image[None].permute(0, 2, 3, 1).numpy() for image in images]
    export(
        net, meta, path, "openvino", size, batches[:1], output="logits", calibration=batches,
        min_agreement=0, max_difference=float("inf"),  # the table contains its agreement
    )  # fmt: skip
    return labels_of(Predictor(path))


def make_runs(
    args: argparse.Namespace, device: torch.device, size: Size, folder: Path
) -> dict[Key, Run]:
    """All that can run here, "plain" first; files that they need are written to `folder`."""
    net, meta = open_network(args.weights)
    normalization = {key: meta[key] for key in ("mean", "std") if key in meta}
    runs = {("plain", "fp32"): eager_run(net, meta, device)}
    for backend in args.backends:
        if not is_available(backend, device):
            print(f"skipped: backend {backend} is not installed, or not for {device}")
            continue
        for precision in ("fp32", *(fast_precisions(device) if backend != "onnxruntime" else ())):
            predictor = Predictor(
                net, size, **normalization, device=device, backend=backend, precision=precision
            )
            runs[backend, precision] = labels_of(predictor)
    if args.int8 and device.type == "cpu" and not missing_packages("openvino", "int8"):
        runs["openvino", "int8"] = int8_run(args, net, size, meta, folder)
    if args.peer:
        runs[PEER, "fp32"] = eager_run(Peer(PEER), {}, device)
        if device.type == "cpu" and is_available("openvino", device):
            runs[f"{PEER}, openvino", "fp32"] = openvino_peer()
    return runs


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
    paths = find_files(folder, IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{folder} has no images (png, jpg, webp): check --images and --calibrate")
    images = [torch.from_numpy(read_image(paths[i * len(paths) // count])) for i in range(count)]
    resize = partial(v2.functional.resize, size=size, antialias=True)
    return torch.stack([resize(image.permute(2, 0, 1)) for image in images])


def time_run(run: Run, images: Tensor, device: torch.device) -> float:
    """Milliseconds of a run."""
    synchronize(device)
    time.sleep(SETTLE)
    start = time.perf_counter()
    run(images)
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


def agreement(run: Run, images: Tensor, expected: list[Tensor]) -> float:
    """Share of the pixels labelled as expected."""
    pairs = zip(images, expected, strict=True)
    return statistics.mean(
        (run(image[None]) == labels).double().mean().item() for image, labels in pairs
    )


@torch.inference_mode()
def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> Row:
    """Measure every size and batch; see the module's docstring."""
    results: list[Row] = []
    for size in args.sizes:
        runs = make_runs(args, device, size, folder)
        images = load_images(args.images, size, max(args.agreement_images, *args.batches))
        compared, (plain, *_) = images[: args.agreement_images], runs
        expected = [runs[plain](image[None]) for image in compared]
        shares = {
            key: None if key[0].startswith(PEER) else agreement(run, compared, expected)
            for key, run in runs.items()
        }
        for batch in args.batches:
            calls = {key: partial(time_run, run, images[:batch], device)
                     for key, run in runs.items()}  # fmt: skip
            found = alternate(calls, max(3, args.runs // batch), args.warmup)
            for key, times in found.items():
                row: Row = {"name": " ".join(key), "backend": key[0], "precision": key[1],
                            "size": f"{size[0]}x{size[1]}", "batch": batch}  # fmt: skip
                row |= summarize(times, batch)
                row["fps_per_core"] = row["fps"] / torch.get_num_threads()
                row["ratio_to_plain"] = statistics.median(found[plain]) / row["p50_ms"]
                results.append(row | {"agreement": shares[key]})
                print_row(results[-1])
    net, _ = open_network(args.weights)
    return {"results": results, "limits": limits(results, args.sizes, net, device)}


def limits(
    results: list[Row], sizes: list[Size], net: LEDNet, device: torch.device
) -> dict[str, Row]:
    """For each size and precision of a matrix product in PyTorch: the time of the network's
    operations at that rate, and the share of it that the best backend reaches."""
    found: dict[str, Row] = {}
    for precision in ("fp32", *fast_precisions(device)):
        rate = 1000 * product_rate(device, precision, 2048, 1.0)["best"]
        for size in sizes:
            facts = {"size": f"{size[0]}x{size[1]}", "precision": precision, "batch": 1}
            rows = [
                row
                for row in results
                if row["backend"] in BACKENDS and facts.items() <= row.items()
            ]
            if not rows:
                continue
            best = min(rows, key=lambda row: row["p50_ms"])
            operations = 2 * count_macs(net, size) / 1e9
            limit = 1000 * operations / rate
            key = f"{facts['size']} {precision}"
            found[key] = {"gflop": operations, "matrix_gflops": rate, "limit_ms": limit,
                          "best": best["backend"], "noisy": best["noisy"],
                          "share_of_limit": limit / best["p50_ms"]}  # fmt: skip
            print_row({"limit": key} | found[key])
    return found


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
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS),
                        help="those that are installed are compared")
    parser.add_argument("--sizes", nargs="+", metavar="HxW", type=parse_size,
                        default=[(512, 1024), (1024, 2048)],
                        help="of images and network input (default: 512x1024 1024x2048)")
    parser.add_argument("--batches", type=POSITIVE, nargs="+", default=[1, 2, 4],
                        help="batch sizes")
    # fmt: on
    add_options(
        parser,
        int8=(True, "include OpenVINO's int8"),
        agreement_images=(4, "images to compare labels on"),
        peer=(True, f"include torchvision's {PEER}"),
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
        panels: dict[str, list[Row]] = {}
        for row in (row for row in record["results"] if row["batch"] == 1):
            panels.setdefault(f"{row['size']}, batch 1", []).append(row)
        plot_bars(args.plot, describe_device(device), panels)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
