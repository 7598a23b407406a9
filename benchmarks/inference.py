"""Race the backends: from a uint8 image to a uint8 label map, against the plain network.

    python benchmarks/inference.py --weights save/cityscapes-d20 --images val --calibrate train \
        --json benchmarks/results/inference.json --plot benchmarks/results/inference.png

"plain" is the network as it was trained: eager, fp32, batch norms, logits at full size,
argmax. The others are `Predictor`'s backends, its int8 file where nncf is installed
(calibrated on images of --calibrate), and torchvision's lraspp_mobilenet_v3_large (random
weights, for its speed alone). Every round runs each of them once, so that they share the
machine's good and bad moments: compare ratios. With real weights and --images the
agreement of the labels means something; without, the images are random blocks. About
half an hour on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from torchvision.transforms import v2
from tqdm import tqdm

from lednet.data.image_io import read_image
from lednet.files import IMAGE_SUFFIXES
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
from lednet.inference.backends import BACKENDS, is_available
from lednet.inference.benchmark import count_macs
from lednet.inference.predictor import Predictor
from lednet.io import write_json
from lednet.model import LEDNet, load_model
from lednet.training.run_dir import environment

ROOT = Path(__file__).resolve().parents[1]

SIZES = ((512, 1024), (1024, 2048))
CALIBRATION_IMAGES = 32
PEER = "lraspp_mobilenet_v3_large"
SETTLE = 0.1
"""Seconds before each timed run, in which the threads of the engine before it, which go on
spinning for a while, come to rest: who uses one engine has no other's beside it."""


class Runner(NamedTuple):
    """One competitor: uint8 images (N, 3, H, W) in main memory to label maps there."""

    backend: str
    precision: str
    run: Callable[[Tensor], Tensor]
    weights: Path | None = None
    """What a process of its own would open."""


def plain_runner(net: LEDNet, meta: dict, device: torch.device) -> Runner:
    """The network as trained, nothing folded or fused."""
    net = net.to(device)
    mean, std = (
        torch.tensor(meta.get(key, [value] * 3), device=device).view(-1, 1, 1)
        for key, value in (("mean", 0.0), ("std", 1.0))
    )

    def run(images: Tensor) -> Tensor:
        x = (images.to(device).float() / 255 - mean) / std
        return net(x).argmax(dim=1).to(torch.uint8).cpu()

    return Runner("plain", "fp32", run)


def peer_runner(device: torch.device) -> Runner:
    net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=20)
    net = net.to(device).eval()

    def run(images: Tensor) -> Tensor:
        return net(images.to(device).float() / 255)["out"].argmax(1).to(torch.uint8).cpu()

    return Runner(PEER, "fp32", run)


def openvino_peer_runner() -> Runner:
    """The peer through OpenVINO, its argmax inside."""
    openvino = import_optional("openvino")

    net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=20).eval()

    class Labels(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return net(images.float() / 255)["out"].argmax(1).to(torch.uint8)

    compiled: dict[tuple, Any] = {}

    def run(images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if shape not in compiled:
            model = openvino.convert_model(torch.export.export(Labels(), (images.clone(),)))
            hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
            compiled[shape] = compile_openvino(model, hints)
        return torch.from_numpy(compiled[shape](images.numpy())[0])

    return Runner(f"{PEER}, openvino", "fp32", run)


def precisions(backend: str, device: torch.device) -> list[str]:
    """Those that the backend and the machine are made for."""
    return ["fp32", *(fast_precisions(device) if backend != "onnxruntime" else ())]


def make_runners(
    args: argparse.Namespace, device: torch.device, size: tuple[int, int], folder: Path
) -> list[Runner]:
    """All that run here; files that they need are written to `folder`."""
    net, meta = open_network(args.weights)
    normalization = {key: meta[key] for key in ("mean", "std") if key in meta}
    runners = [plain_runner(net, meta, device)._replace(weights=args.weights)]
    for backend in args.backends:
        if not is_available(backend, device):
            print(f"skipped: backend {backend} is not installed, or not for {device}")
            continue
        for precision in precisions(backend, device):
            predictor = Predictor(
                net, size, **normalization, device=device, backend=backend, precision=precision
            )
            runners.append(Runner(backend, precision, labels_of(predictor), args.weights))
    if args.int8 and device.type == "cpu" and not missing_packages("openvino", "int8"):
        path = write_int8(args, net, meta, size, folder / f"int8_{size[0]}x{size[1]}.xml")
        run = labels_of(Predictor.from_weights(path))
        runners.append(Runner("openvino", "int8", run, path))
    if args.peer:
        runners.append(peer_runner(device))
        if device.type == "cpu" and is_available("openvino", device):
            runners.append(openvino_peer_runner())
    return runners


def labels_of(predictor: Predictor) -> Callable[[Tensor], Tensor]:
    return lambda images: predictor.label_maps(images)[0].cpu()


def write_int8(
    args: argparse.Namespace, net: LEDNet, meta: dict, size: tuple[int, int], path: Path
) -> Path:
    images = load_images(args.calibrate or args.images, size, CALIBRATION_IMAGES)
    batches = [image[None].permute(0, 2, 3, 1).numpy() for image in images]
    export(
        net, meta, path, "openvino", size, batches[:1], output="logits", calibration=batches,
        min_agreement=0, max_difference=float("inf"),  # the table says how near it is
    )  # fmt: skip
    return path


def open_network(weights: Path | None) -> tuple[LEDNet, dict]:
    if weights:
        return load_model(weights)
    torch.manual_seed(0)
    return LEDNet(20).eval(), {}


def load_images(folder: Path | None, size: tuple[int, int], count: int) -> Tensor:
    """(count, 3, *size) uint8: images of the folder at even distances, resized; or blocks."""
    if folder is None:
        rng = np.random.default_rng(0)
        blocks = rng.integers(0, 256, (count, 3, size[0] // 32, size[1] // 32), dtype=np.uint8)
        return torch.from_numpy(blocks.repeat(32, axis=2).repeat(32, axis=3))
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(
            f"{folder} holds no images (png, jpg or webp): check --images and --calibrate"
        )
    images = (read_image(paths[i * len(paths) // count]) for i in range(count))
    return torch.stack(
        [
            v2.functional.resize(torch.from_numpy(image).permute(2, 0, 1), size, antialias=True)
            for image in images
        ]
    )


@torch.inference_mode()
def race(
    runners: list[Runner], images: Tensor, device: torch.device, warmup: int, runs: int
) -> list[list[float]]:
    """Milliseconds of each run of each runner, all of them in turn in every round."""
    times: list[list[float]] = [[] for _ in runners]
    for round_ in tqdm(range(warmup + runs), f"{tuple(images.shape)}", leave=False):
        for runner, record in zip(runners, times, strict=True):
            synchronize(device)
            time.sleep(SETTLE)
            start = time.perf_counter()
            runner.run(images)
            synchronize(device)
            if round_ >= warmup:
                record.append((time.perf_counter() - start) * 1000)
    return times


@torch.inference_mode()
def agreements(runners: list[Runner], images: Tensor) -> list[float | None]:
    """Share of the pixels labelled as the first runner does; None for another network."""
    expected = [runners[0].run(image[None]) for image in images]
    found: list[float | None] = []
    for runner in runners:
        if runner.backend.startswith(PEER):
            found.append(None)
            continue
        same = [
            (runner.run(image[None]) == labels).double().mean().item()
            for image, labels in zip(images, expected, strict=True)
        ]
        found.append(statistics.mean(same))
    return found


def matrix_rate(device: torch.device, precision: str = "fp32", seconds: float = 1.0) -> float:
    """Best rate of a 2048 x 2048 matrix product, in GFLOP/s."""
    a = torch.rand(2048, 2048, device=device)
    best, end = float("inf"), time.perf_counter() + seconds
    with torch.inference_mode(), autocast(device, precision):
        while time.perf_counter() < end:
            synchronize(device)
            start = time.perf_counter()
            a @ a
            synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e9


def peak_of(args: argparse.Namespace, runner: Runner, size: tuple[int, int]) -> float | None:
    """Peak memory in MB of a process that runs this runner alone."""
    command = [sys.executable, __file__, "--peak-of", runner.backend, runner.precision]
    command += [str(side) for side in size] + ["--device", args.device]
    command += ["--weights", str(runner.weights)] if runner.weights else []
    result = subprocess.run(command, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None


def print_peak(args: argparse.Namespace, device: torch.device) -> None:
    backend, precision, *size = args.peak_of
    size = tuple(map(int, size))
    if precision == "int8":
        run = labels_of(Predictor.from_weights(args.weights))
    else:
        args.backends = [backend] if backend in BACKENDS else []
        args.peer, args.int8 = PEER in backend, False
        runners = make_runners(args, device, size, Path())
        run = next(r for r in runners if (r.backend, r.precision) == (backend, precision)).run
    with torch.inference_mode():
        for _ in range(2):
            run(load_images(None, size, 1))
    print(json.dumps(peak_memory_mb(device)))


def measure(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Every size and batch; see the module's docstring."""
    results = []
    for size in SIZES if args.sizes is None else args.sizes:
        runners = make_runners(args, device, size, folder)
        images = load_images(args.images, size, max(args.agreement_images, *args.batches))
        shares = agreements(runners, images[: args.agreement_images])
        peaks = [peak_of(args, r, size) if args.memory else None for r in runners]
        for batch in args.batches:
            runs = max(3, args.runs // batch)
            times = race(runners, images[:batch], device, args.warmup, runs)
            plain = statistics.median(times[0])
            for runner, record, share, peak in zip(runners, times, shares, peaks, strict=True):
                p50 = statistics.median(record)
                results.append(
                    {
                        "backend": runner.backend,
                        "precision": runner.precision,
                        "height": size[0],
                        "width": size[1],
                        "batch": batch,
                        "p50_ms": p50,
                        "p95_ms": float(np.quantile(record, 0.95)),
                        "fps": batch * 1000 / p50,
                        "fps_per_core": batch * 1000 / p50 / torch.get_num_threads(),
                        "ratio_to_plain": plain / p50,
                        "agreement": share,
                        "peak_mb": peak,
                        "runs": runs,
                    }
                )
                print_row(results[-1])
    print_best_batches(results)
    net, _ = open_network(args.weights)
    return {"results": results, "limits": limits(results, net, device)}


def print_best_batches(results: list[dict[str, Any]]) -> None:
    """For each size the batch that each runner answers the most images a second with."""
    best: dict[tuple, dict[str, Any]] = {}
    for row in results:
        key = (row["height"], row["width"], row["backend"], row["precision"])
        best[key] = max(best.get(key, row), row, key=lambda r: r["fps"])
    for (height, width, backend, precision), row in best.items():
        print(
            f"{height}x{width} {backend} {precision}: best batch {row['batch']}, "
            f"{row['fps']:.2f} images/s, {row['fps_per_core']:.2f} a core"
        )


def limits(
    results: list[dict[str, Any]], net: LEDNet, device: torch.device
) -> dict[str, dict[str, Any]]:
    """For each size and precision that PyTorch multiplies matrices in: the time that the
    network's operations would take at that rate, and the share of it that the best reaches."""
    found: dict[str, dict[str, Any]] = {}
    for precision in ("fp32", "bf16", "fp16"):
        rows = [r for r in results if r["batch"] == 1 and r["precision"] == precision
                and r["backend"] in BACKENDS]  # fmt: skip
        rate = matrix_rate(device, precision) if rows else 0
        for size in sorted({(r["height"], r["width"]) for r in rows}):
            best = min((r for r in rows if (r["height"], r["width"]) == size),
                       key=lambda r: r["p50_ms"])  # fmt: skip
            operations = 2 * count_macs(net, size) / 1e9
            limit = 1000 * operations / rate
            found[f"{size[0]}x{size[1]} {precision}"] = {
                "gflop": operations,
                "matrix_gflops": rate,
                "limit_ms": limit,
                "best": best["backend"],
                "share_of_limit": limit / best["p50_ms"],
            }
            print(
                f"{size[0]}x{size[1]} {precision}: {operations:.1f} GFLOP at {rate:.0f} GFLOP/s "
                f"is {limit:.0f} ms; {best['backend']} reaches {limit / best['p50_ms']:.0%} of it"
            )
    return found


def print_row(row: dict[str, Any]) -> None:
    share = "-" if row["agreement"] is None else f"{100 * row['agreement']:.4f} %"
    peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f} MB"
    print(
        f"{row['backend']:36} {row['precision']}  {row['height']}x{row['width']} x{row['batch']}  "
        f"{row['p50_ms']:8.1f} ms  p95 {row['p95_ms']:8.1f}  {row['fps']:7.2f} FPS  "
        f"{row['ratio_to_plain']:5.2f}x  {share:>11}  {peak}",
        flush=True,
    )


def plot(results: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of the ratio to plain at batch 1, a panel for each size."""
    rows = [row for row in results if row["batch"] == 1]
    sizes = sorted({(row["height"], row["width"]) for row in rows})
    bars = max(sum((r["height"], r["width"]) == size for r in rows) for size in sizes)
    figure = Figure(figsize=(6.5 * len(sizes), 1.4 + 0.42 * bars), layout="constrained")
    figure.suptitle(title)
    for axis, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        here = [row for row in rows if (row["height"], row["width"]) == size]
        names = [f"{row['backend']} {row['precision']}" for row in here]
        ratios = [row["ratio_to_plain"] for row in here]
        colors = ["#f58518" if row["backend"].startswith(PEER) else "#4c78a8" for row in here]
        axis.barh(names, ratios, color=colors)
        for y, row in enumerate(here):
            text = f" {row['ratio_to_plain']:.2f}x, {row['p50_ms']:.0f} ms"
            axis.text(row["ratio_to_plain"], y, text, va="center")
        axis.set(xlim=(0, 1.35 * max(ratios)), title=f"{size[0]}x{size[1]}, batch 1",
                 xlabel="times as fast as plain")  # fmt: skip
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--weights", type=Path, help="weights file or run folder (random ones)")
    parser.add_argument("--images", type=Path, help="folder of images to compare labels on")
    parser.add_argument("--calibrate", type=Path, metavar="DIR",
                        help=f"{CALIBRATION_IMAGES} images of this folder calibrate int8 "
                             "(those of --images)")
    parser.add_argument("--int8", action=argparse.BooleanOptionalAction, default=True,
                        help="race OpenVINO's int8 as well")
    parser.add_argument("--agreement-images", type=int, default=4, metavar="N")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--sizes", nargs="+", metavar="HxW",
                        type=lambda text: tuple(map(int, text.split("x"))),
                        help="images and network input (512x1024 1024x2048)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True,
                        help=f"race torchvision's {PEER} too")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True,
                        help="peak memory, each in a process of its own")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--runs", type=int, default=12, help="rounds at batch 1")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--peak-of", nargs=4, help=argparse.SUPPRESS)
    # fmt: on
    return parser


def main() -> None:
    args = build_parser().parse_args()
    device = choose_device(args.device)
    if args.peak_of:
        print_peak(args, device)
        return
    with tempfile.TemporaryDirectory() as folder:
        record = {
            "command": " ".join(["python", "benchmarks/inference.py", *sys.argv[1:]]),
            "device": describe_device(device),
            "environment": environment(ROOT),
        } | measure(args, device, Path(folder))
    if args.json:
        write_json(args.json, record)
    if args.plot:
        plot(record["results"], args.plot, record["device"])


if __name__ == "__main__":
    with exit_on_user_error():
        main()
