"""What the legs of `benchmarks/gpu.py` share, and two of them: the machine, and a training run.

A leg is a list of measurements in a process of its own. A measurement that raises becomes a row
with its error, and the next one follows. Rows are written after each measurement, so that a
process that is killed keeps what it had; started again on the same file, it continues after the
measurement that ended it.
"""

import argparse
import contextlib
import faulthandler
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

import numpy as np
import torch
from torch import Tensor

from benchmarks.inference import load_images
from benchmarks.training import KEYS, Repeated, busy_share, time_steps
from lednet.checkpoint import load_checkpoint
from lednet.data.cache import CachedDataset, build_cache
from lednet.data.dataset import SegmentationDataset
from lednet.data.device_cache import DeviceLoader, load_to_device
from lednet.data.loaders import make_loaders
from lednet.data.registry import open_dataset
from lednet.data.transforms import Augmentation
from lednet.device import allow_tf32, autocast, describe_device, peak_memory_mb, synchronize
from lednet.distributed import DistributedContext
from lednet.errors import UserError
from lednet.export.fuse import fuse_conv_bn
from lednet.export.unshuffle import fuse_channel_shuffles
from lednet.hub import load_weights
from lednet.inference.backends import BACKENDS, is_available
from lednet.inference.benchmark import count_macs
from lednet.inference.predictor import Predictor
from lednet.io import read_json, write_json
from lednet.model import LEDNet, load_model, resize
from lednet.training.checkpointing import Checkpoints
from lednet.training.losses import WeightedCrossEntropy
from lednet.training.run_dir import environment
from lednet.training.tasks import Segmentation
from lednet.training.trainer import Trainer, TrainerConfig, seed_everything

Row = dict[str, Any]

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16}  # fmt: skip
CONTEXT_LOST = 3
"""Exit status of a leg whose CUDA context no longer works; it can be started again."""


class NeedsCuda(Exception):
    """A measurement makes sense on a GPU only."""


class Leg:
    """A leg that is running.

    Args:
        args: of `benchmarks/gpu.py`.
        path: JSON file of the rows. Measurements that it has already are not repeated.

    Attributes:
        rows: one per measurement, with its "name" and "seconds", and "error" if it failed.
        info: facts that belong to no single row.
        left_out: names of measurements for which no time was left.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, path: Path):
        self.args, self.device, self.path = args, device, path
        self.cuda = device.type == "cuda"
        self.dry: bool = args.dry_run
        self.end = time.monotonic() + args.seconds
        found = read_json(path) if path.is_file() else {}
        self.rows: list[Row] = found.get("rows", [])
        self.info: Row = found.get("info", {})
        self.left_out: list[str] = []
        if lost := found.get("current"):
            self.rows.append({**lost, "error": "its process ended or hung; see log.txt"})
        self.save()

    def left(self) -> float:
        """Seconds until the leg must end."""
        return self.end - time.monotonic()

    def save(self, **state: Any) -> None:
        rest = {"rows": self.rows, "info": self.info, "left_out": self.left_out}
        write_json(self.path, finite({**rest, **state}))

    def measure(
        self,
        name: str,
        function: Callable[[], Row],
        *,
        cuda: bool = False,
        needs: float = 1.0,
        limit: float = 60.0,
        **facts: Any,
    ) -> Row:
        """Call `function` and keep the row that it returns.

        Args:
            cuda: whether it needs a GPU.
            needs: seconds that must be left, or it is left out.
            limit: seconds after which the process is ended with a traceback of all threads.
            facts: further items of the row.

        Returns:
            The row; empty if the measurement was left out or has been done before.
        """
        if any(row["name"] == name for row in self.rows):
            return {}
        if self.args.only and not re.search(self.args.only, name):
            return {}
        row: Row = {"name": name, **facts}
        if cuda and not self.cuda:
            return self._keep(row | {"note": "needs CUDA"})
        if self.left() < needs:
            self.left_out.append(name)
            self.save()
            return {}
        self.save(current=row)
        start = time.monotonic()
        patience = min(limit, max(self.left(), 1) + 5)
        faulthandler.dump_traceback_later(patience, exit=True, file=2)
        try:
            row |= function()
        except NeedsCuda:
            row["note"] = "needs CUDA"
        except Exception as error:
            print(f"{name} failed:", flush=True)
            traceback.print_exc(file=sys.stdout)
            row["error"] = one_line(error)
        finally:
            faulthandler.cancel_dump_traceback_later()
        row["seconds"] = time.monotonic() - start
        self._keep(row)
        if "error" in row:
            self._recover()
        return row

    def _keep(self, row: Row) -> Row:
        self.rows.append(row)
        self.save()
        print(json.dumps(finite(row)), flush=True)
        return row

    def _recover(self) -> None:
        """Free memory; end the process if CUDA does not work any more."""
        gc.collect()
        if not self.cuda:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.zeros(1, device=self.device).add_(1).item()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(CONTEXT_LOST)


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become text."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return str(value) if isinstance(value, Path) else value


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def time_calls(
    call: Callable[[], Any],
    device: torch.device,
    seconds: float = 0.6,
    warmup: int = 3,
    least: int = 5,
    most: int = 300,
) -> list[float]:
    """Milliseconds of each of `least` to `most` calls, about `seconds` in all.

    On CUDA, events around each call give the time; the queue is not emptied between calls.
    """
    for _ in range(warmup):
        call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    count = round(seconds / max(time.perf_counter() - start, 1e-6))
    count = min(most, max(least, count))
    if device.type == "cuda":
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, finish in pairs:
            begin.record()
            call()
            finish.record()
        torch.cuda.synchronize(device)
        return [begin.elapsed_time(finish) for begin, finish in pairs]
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times


def time_whole_calls(call: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of each call by the host's clock, which stops when the device has finished."""

    def whole() -> None:
        call()
        synchronize(device)

    times: list[float] = []
    for _ in range(2):
        whole()
    start = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - start < seconds and len(times) < 200):
        before = time.perf_counter()
        whole()
        times.append(1000 * (time.perf_counter() - before))
    return times


def speed(times: Sequence[float], batch: int, prefix: str = "") -> Row:
    """Percentiles of `times` in ms, and images a second by the median."""
    p50 = statistics.median(times)
    return {
        f"{prefix}p50_ms": p50,
        f"{prefix}p95_ms": float(np.quantile(times, 0.95)),
        f"{prefix}fps": 1000 * batch / p50,
        f"{prefix}runs": len(times),
    }


def float_modes(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """TF32 permitted or forbidden; nothing for modules that have been brought to 16 bits."""
    if device.type == "cuda":
        return autocast(device, "fp32" if precision == "fp32" else "tf32")
    if precision == "tf32":
        raise NeedsCuda
    return contextlib.nullcontext()


def capture(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` as a CUDA graph: recorded once, replayed at each call, with the same output tensor."""
    if not torch.cuda.is_available():
        raise NeedsCuda
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def toy_data(args: argparse.Namespace) -> Path:
    """A small Cityscapes tree, drawn once for all legs."""
    root = Path(args.work) / "toy"
    if not root.is_dir():
        command = [sys.executable, str(ROOT / "datasets/make_toy_cityscapes.py")]
        command += ["--out", str(root), "--train", "16", "--val", "2", "--test", "0"]
        command += ["--train-extra", "0", "--width", "128", "--height", "64", "--workers", "1"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return root


def data_of(args: argparse.Namespace) -> tuple[str, Path]:
    """Name and folder of the data set to measure with."""
    return (args.dataset, args.data) if args.data else ("cityscapes", toy_data(args))


def image_folder(args: argparse.Namespace) -> Path:
    name, root = data_of(args)
    return root / "leftImg8bit/val" if name == "cityscapes" else root / "val"


def trained_network(args: argparse.Namespace) -> tuple[LEDNet, Row]:
    """The network of --state, else a released one, and its normalisation."""
    net, meta = load_model(args.state or "cityscapes-demo-d20")
    return net.eval(), {key: meta[key] for key in ("mean", "std") if key in meta}


# The first leg


def machine(leg: Leg) -> None:
    """What is there, and two ceilings: of copying and of multiplying."""
    leg.info.update(describe_machine(leg.device))
    leg.save()
    sizes = (28, 30, 32) if leg.cuda else (22,)
    for bits in sizes:
        copying = partial(copy_rate, leg.device, 2**bits)
        leg.measure(f"copy {2**bits >> 20} MiB", copying, kind="copy", unit="GB/s")
    sides = (4096, 8192, 16384) if leg.cuda else (256,)
    for precision in ("bf16", "tf32", "fp32"):
        for side in sides[: 2 if precision == "fp32" else None]:
            leg.measure(
                f"{precision} product {side}", partial(product_rate, leg.device, precision, side),
                cuda=precision == "tf32", kind=precision, unit="TFLOP/s",
            )  # fmt: skip
    leg.info["ceilings"] = best_rates(leg.rows)
    leg.save()


def describe_machine(device: torch.device) -> Row:
    found: Row = {
        "device": describe_device(device),
        **environment(ROOT),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "platform": platform.platform(),
    }
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    found |= {
        "memory_gb": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": getattr(properties, "L2_cache_size", 0) / 1e6,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    with contextlib.suppress(Exception):
        found["triton"] = importlib.metadata.version("triton")
    with contextlib.suppress(Exception):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
        done = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, timeout=20)
        keys = ("driver", "max_clock", "power_limit")
        found |= dict(zip(keys, done.stdout.decode().splitlines()[0].split(", "), strict=False))
    return found


def rates(amount: float, times: Sequence[float]) -> Row:
    """Best and median of `amount` over `times` in ms, both per second."""
    best, median = min(times) / 1000, statistics.median(times) / 1000
    return {"best": amount / best, "median": amount / median, "runs": len(times)}


def copy_rate(device: torch.device, size: int) -> Row:
    """GB/s of copying `size` bytes on the device; bytes read and bytes written count."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return rates(2 * size / 1e9, time_calls(lambda: target.copy_(source), device, 0.3))


def product_rate(device: torch.device, precision: str, side: int) -> Row:
    """TFLOP/s of a product of two square matrices of random values."""
    with float_modes(device, precision), torch.inference_mode():
        a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
        out = torch.empty_like(a)
        times = time_calls(lambda: torch.matmul(a, b, out=out), device, 0.3)
    return rates(2 * side**3 / 1e12, times)


def best_rates(rows: Iterable[Row]) -> dict[str, float]:
    """Highest rate of each kind: GB/s of copying, TFLOP/s in each precision."""
    found: dict[str, float] = {}
    for row in rows:
        if isinstance(row.get("best"), float):
            found[row["kind"]] = max(row["best"], found.get(row["kind"], 0.0))
    return found


def ceilings(leg: Leg) -> dict[str, float]:
    """Those that the first leg measured; measured now if it did not run."""
    path = Path(leg.args.work) / "machine.json"
    found = read_json(path).get("info", {}).get("ceilings", {}) if path.is_file() else {}
    if not found and leg.cuda:
        rows = [{"kind": "copy", **copy_rate(leg.device, 2**30)}]
        kinds = ("bf16", "tf32", "fp32")
        rows += [{"kind": kind, **product_rate(leg.device, kind, 8192)} for kind in kinds]
        found = best_rates(rows)
    return found


# 2. Proof

TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 5e-2}
"""Of the network's outputs, relative to the largest value. For the last three, about four times
what rounding each operand of the convolutions on a CPU costs."""
EQUAL_LABELS = 0.999
GRADIENT_TOLERANCE = 1e-3
LOSS_TOLERANCE = 1e-3


def at_most(value: float, limit: float, **facts: Any) -> Row:
    return {"value": value, "limit": f"<= {limit:g}", "passed": value <= limit, **facts}


def at_least(value: float, limit: float | None, **facts: Any) -> Row:
    if limit is None:
        return {"value": value, **facts}
    return {"value": value, "limit": f">= {limit:g}", "passed": value >= limit, **facts}


def proof(leg: Leg) -> None:
    """Whether the results are right on this device."""
    torch.backends.cudnn.benchmark = False
    with background_checks(leg) as checks:
        for variant in ("d20", "d128"):
            leg.measure(f"tests/golden {variant} fp32", partial(committed_error, leg, variant))
            for precision in PRECISIONS if leg.args.golden else ():
                leg.measure(
                    f"golden {variant} {precision}", partial(golden_error, leg, variant, precision),
                    cuda=precision in ("tf32", "fp16"),
                )  # fmt: skip
        leg.measure("gradients of a step, fp32", partial(gradient_error, leg))
        leg.measure("folded against plain, fp32", partial(fold_error, leg))
        compare = LabelComparison(leg)
        for backend in BACKENDS:
            if backend == "openvino":  # for CPUs only
                continue
            for precision in PRECISIONS if backend != "onnxruntime" else PRECISIONS[:1]:
                name = f"Predictor {backend} {precision}"
                needs_gpu = backend != "eager" or precision in ("tf32", "fp16")
                leg.measure(
                    name, partial(compare, backend, precision), cuda=needs_gpu, limit=100, needs=8
                )
        leg.measure("captured step against eager, fp32", partial(captured_error, leg), cuda=True)
        for name, check in checks.items():
            patience = max(leg.left() - 2, 1)
            leg.measure(name, partial(check.result, patience), limit=patience + 5, needs=0.0)


def relative_error(found: Tensor | np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    array = found.detach().float().cpu().numpy() if isinstance(found, Tensor) else found
    return float(np.abs(array - expected).max() / np.abs(expected).max())


def committed_error(leg: Leg, variant: str) -> Row:
    """The network under weights by formula, against the file in tests/golden."""
    sys.path.append(str(ROOT / "tests"))
    from make_golden import GOLDEN, formula_image, formula_state

    reference = np.load(GOLDEN / f"{variant}.npz")
    net = LEDNet(20, variant).eval()
    net.load_state_dict(formula_state(net))
    net.to(leg.device)
    with torch.inference_mode(), float_modes(leg.device, "fp32"):
        image = formula_image().to(leg.device)
        errors = [
            relative_error(net(image)[:, :, ::4, ::4], reference["logits"]),
            relative_error(net.encoder_stage()(image), reference["encoder_logits"]),
        ]
    return at_most(max(errors), TOLERANCES["fp32"])


def golden_error(leg: Leg, variant: str, precision: str) -> Row:
    """The network against the reference implementation's outputs."""
    from PIL import Image

    folder: Path = leg.args.golden
    reference = np.load(folder / f"official_{variant}_outputs.npz")
    net = LEDNet(20, variant)
    load_weights(net, folder / f"official_{variant}_model_best.pth")
    net.to(leg.device).eval()
    pixels = np.array(Image.open(folder / "input_512x1024.png").convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(leg.device).float() / 255
    with torch.inference_mode(), autocast(leg.device, precision):
        features = net.encoder(image)
        outputs = {
            "encoder_logits": net.encoder_head(features),
            "apn_logits": net.decoder(features),
            "logits_4x4_stride": (logits := net(image))[:, :, ::4, ::4],
        }
    errors = {key: relative_error(output, reference[key]) for key, output in outputs.items()}
    equal = (logits.argmax(1).cpu().numpy() == reference["argmax"]).mean()
    return at_most(max(errors.values()), TOLERANCES[precision], equal_labels=float(equal))


def without_dropout(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return net


def gradient_error(leg: Leg) -> Row:
    """Gradients of a training step here and on the CPU; dropout is off."""
    size = (64, 128) if leg.dry else (256, 512)
    generator = torch.Generator().manual_seed(1)
    images = load_images(image_folder(leg.args), size, 2).float() / 255
    target = torch.randint(0, 20, (2, *size), generator=generator)

    def gradients(device: torch.device) -> Tensor:
        net, _ = trained_network(leg.args)
        without_dropout(net).to(device).train()
        net.encoder_head.requires_grad_(False)
        criterion = WeightedCrossEntropy([1.0] * 19, net.num_classes).to(device)
        if device.type == "cuda":
            allow_tf32(False)
        total, weights = criterion(net(images.to(device)), target.to(device))
        (total / weights).backward()
        parts = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        return torch.cat(parts).double().cpu()

    expected, found = gradients(torch.device("cpu")), gradients(leg.device)
    return at_most(((found - expected).norm() / expected.norm()).item(), GRADIENT_TOLERANCE)


def fold_error(leg: Leg) -> Row:
    """Logits of the folded network without channel shuffles, against the plain one's."""
    net, normalization = trained_network(leg.args)
    size = (64, 128) if leg.dry else (512, 1024)
    images = load_images(image_folder(leg.args), size, 1)
    plain, folded = (
        Predictor(net, size, **normalization, device=leg.device, fold=fold).scores(images)
        for fold in (False, True)
    )
    equal = (plain.argmax(1) == folded.argmax(1)).float().mean().item()
    error = relative_error(folded, plain.cpu().numpy())
    return at_most(error, TOLERANCES["fp32"], equal_labels=equal)


class LabelComparison:
    """Label maps of `Predictor` here, against those of the CPU."""

    def __init__(self, leg: Leg):
        self.leg = leg
        self.size = (64, 128) if leg.dry else (512, 1024)

    @functools.cached_property
    def images(self) -> Tensor:
        return load_images(image_folder(self.leg.args), self.size, 1 if self.leg.dry else 4)

    def labels(self, device: torch.device, backend: str, precision: str) -> Tensor:
        net, normalization = trained_network(self.leg.args)
        predictor = Predictor(
            net, self.size, **normalization, device=device, backend=backend, precision=precision
        )
        return torch.cat([predictor.label_maps(image[None])[0].cpu() for image in self.images])

    @functools.cached_property
    def expected(self) -> Tensor:
        return self.labels(torch.device("cpu"), "eager", "fp32")

    def __call__(self, backend: str, precision: str) -> Row:
        if backend == "onnxruntime":
            if not is_available(backend, self.leg.device):
                return {"note": "not installed"}
            import onnxruntime

            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                return {"note": "onnxruntime has no CUDA provider here"}
        found = self.labels(self.leg.device, backend, precision)
        equal = (found == self.expected).double().mean().item()
        return at_least(equal, EQUAL_LABELS if precision == "fp32" else None)


class Batches(list):
    """Batches in place of a loader."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]):
        super().__init__(batches)
        self.sampler = range(sum(len(images) for images, _ in batches))


def make_trainer(
    device: torch.device, num_classes: int, dropout: bool = True, **options: Any
) -> Trainer:
    """A trainer for stage 2, as train/main.py makes it."""
    allow_tf32(options.get("precision", "fp32") != "fp32")
    seed_everything(1)
    net = LEDNet(num_classes + 1).to(device)
    net.encoder_head.requires_grad_(False)
    if not dropout:
        without_dropout(net)
    criterion = WeightedCrossEntropy([1.0] * num_classes, num_classes + 1)
    classes = [str(number) for number in range(num_classes)]
    task = Segmentation(criterion, Augmentation("modern"), classes)
    world = DistributedContext(0, 1, device)
    return Trainer(net, task, 1, world, TrainerConfig(**options), False, notify=_refuse)


def _refuse(message: str) -> None:
    """Steps were not captured: a measurement must not count eager ones."""
    raise RuntimeError(message)


def captured_error(leg: Leg, steps: int = 20) -> Row:
    """Losses of training steps that are replayed as a CUDA graph, against eager ones."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (steps, 4, 3, 64, 128), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 20, (steps, 4, 64, 128), dtype=torch.uint8, generator=generator)
    batches = Batches(list(zip(images, labels.masked_fill_(labels == 19, 255), strict=True)))

    def losses(cuda_graph: bool) -> tuple[Tensor, Tensor]:
        trainer = make_trainer(
            leg.device, 19, dropout=False, lr=1e-3, ema_decay=0.9, cuda_graph=cuda_graph
        )
        tally, sums = trainer.new_epoch_state(), [torch.zeros(2, device=leg.device)]
        trainer.train_one_epoch(
            batches,  # type: ignore[arg-type]  # has what is needed of a loader
            "steps", KEYS, tally, after_update=lambda: sums.append(tally.sums.clone()),
        )  # fmt: skip
        steps = torch.stack(sums).diff(dim=0).cpu()
        weights = [p.detach().flatten() for p in trainer.eval_model.parameters()]
        return steps[:, 0] / steps[:, 1], torch.cat(weights).cpu()

    (expected, weights), (found, captured) = losses(False), losses(True)
    error = ((found - expected).abs() / expected).max().item()
    difference = (captured - weights).abs().max().item()
    return at_most(error, LOSS_TOLERANCE, note=f"largest difference of weights {difference:.1e}")


@contextlib.contextmanager
def background_checks(leg: Leg) -> Iterator[dict[str, Future[Row]]]:
    """Checks that run scripts as a user would, beside those of this process."""
    jobs: dict[str, Callable[[], Row]] = {
        "killed run resumes, --deterministic": partial(resumed_difference, leg, True),
        "killed run resumes": partial(resumed_difference, leg, False),
        "fp16, scaler, EMA, SyncBN": partial(fp16_run, leg),
        "pytest -m gpu": partial(gpu_tests, leg),
    }
    if leg.args.only:
        jobs = {name: job for name, job in jobs.items() if re.search(leg.args.only, name)}
    if jobs:
        toy_data(leg.args)
    pool = ThreadPoolExecutor(2 if leg.dry else len(jobs) or 1)
    try:
        yield {name: pool.submit(job) for name, job in jobs.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def toy_command(leg: Leg, folder: Path, *flags: str) -> list[str]:
    """A short training of stage 2 on toy data."""
    command = ["train/main.py", "--datadir", str(toy_data(leg.args)), "--savedir", str(folder)]
    command += ["--height", "64", "--width", "128", "--batch-size", "2", "--num-workers", "0"]
    command += ["--num-epochs", "2" if leg.dry else "3", "--decoder", "--no-iouTrain"]
    command += ["--augment", "modern", "--device", leg.device.type, *flags]
    return command


def start(leg: Leg, words: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(leg: Leg, process: subprocess.Popen[str]) -> str:
    """Output of a process that must succeed in the time that is left."""
    try:
        output = process.communicate(timeout=max(leg.left() - 3, 1))[0]
    except subprocess.TimeoutExpired:
        process.kill()
        print(process.communicate()[0], flush=True)
        raise
    if process.returncode:
        print(output, flush=True)
        raise RuntimeError(f"exit status {process.returncode}: {' '.join(output.split())[-200:]}")
    return output


def resumed_difference(leg: Leg, deterministic: bool) -> Row:
    """Final weights of a run that is killed and resumed, against those of one left alone."""
    with tempfile.TemporaryDirectory(dir=leg.args.work) as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        flags = ["--save-steps", "3"] + ["--deterministic"] * deterministic
        alone = start(leg, toy_command(leg, whole, *flags))
        victim = start(leg, toy_command(leg, killed, *flags))
        while victim.poll() is None and not Checkpoints(killed).paths():
            time.sleep(0.01)
        if victim.poll() is not None:
            finish(leg, victim)
            raise RuntimeError("the run ended before it could be killed")
        victim.kill()
        victim.communicate()
        at = int(Checkpoints(killed).paths()[0].stem[-9:])
        finish(leg, start(leg, [*toy_command(leg, killed, *flags), "--resume"]))
        finish(leg, alone)
        states = [
            load_checkpoint(Checkpoints(folder).paths()[0])["state_dict"]
            for folder in (whole, killed)
        ]
    differences = [(states[0][key].double() - states[1][key].double()).abs() for key in states[0]]
    largest = max(part.max().item() for part in differences)
    row = at_most(largest, 0.0) if deterministic or not leg.cuda else {"value": largest}
    return row | {"note": f"largest difference of weights; killed at step {at}"}


def fp16_run(leg: Leg) -> Row:
    """A run in fp16 with loss scaling, moving average and synchronised batch norm."""
    if not leg.cuda:
        raise NeedsCuda
    with tempfile.TemporaryDirectory(dir=leg.args.work) as name:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        flags = ["--precision", "fp16", "--ema-decay", "0.9", "--sync-batch-norm"]
        finish(leg, start(leg, [*launcher, *toy_command(leg, Path(name) / "run", *flags)]))
        lines = (Path(name) / "run/log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_loss"] for line in lines]
    last: float = losses[-1]
    return {"value": last, "limit": "finite", "passed": math.isfinite(last), "note": "last loss"}


def gpu_tests(leg: Leg) -> Row:
    """The project's tests that need a GPU."""
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py"))
             if "mark.gpu" in p.read_text(encoding="utf-8")]  # fmt: skip
    command = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    process = start(leg, [*command, "--continue-on-collection-errors", *files])
    try:
        output = process.communicate(timeout=max(leg.left() - 3, 1))[0]
    except subprocess.TimeoutExpired:
        process.kill()
        print(process.communicate()[0], flush=True)
        raise
    print(output, flush=True)
    summary = output.strip().splitlines()[-1].strip("= ") if output.strip() else "no output"
    return {"value": summary, "limit": "all pass", "passed": process.returncode == 0}


# 3. Inference


class Variant(NamedTuple):
    """A network and how it is run.

    Attributes:
        network: "lednet" or a model of torchvision.
        engine: "eager", "graph" (a captured CUDA graph), or a mode of torch.compile.
        shuffles: keep the channel shuffles of a folded network.
    """

    network: str = "lednet"
    precision: str = "fp32"
    engine: str = "eager"
    fold: bool = True
    channels_last: bool = True
    shuffles: bool = True

    @property
    def title(self) -> str:
        words = [self.network] if self.network != "lednet" else []
        if self.network == "lednet" and not self.fold:
            words.append("as published" if self == PUBLISHED else "unfolded")
        words += ["no shuffles"] * (not self.shuffles)
        words += [self.engine, self.precision]
        words += ["channels last"] * (self.channels_last and self.engine == "eager")
        return ", ".join(words)


PUBLISHED = Variant(fold=False, channels_last=False)
GRAPH = Variant(precision="bf16", engine="graph")
COMPILED = Variant(precision="bf16", engine="reduce-overhead")
PEERS = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")
LOGITS, LABELS = "logits", "labels"
SMALL, LARGE = (512, 1024), (1024, 2048)


class ToLogits(nn.Module):
    """(N, 3, H, W) floats to logits (N, C, H, W)."""

    def __init__(self, core: nn.Module):
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        logits = self.core(x)
        return logits if logits.shape[-2:] == x.shape[-2:] else resize(logits, x.shape[-2:])


class ToLabels(nn.Module):
    """(N, H, W, 3) uint8 to label maps (N, H, W) uint8.

    Args:
        core: floats (N, 3, H, W) to logits of any size.
    """

    def __init__(self, core: nn.Module, mean: Sequence[float], std: Sequence[float], how: Variant):
        super().__init__()
        self.core, self.dtype, self.channels_last = core, DTYPES[how.precision], how.channels_last
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        x = ((images.float() / 255 - self.mean) / self.std).to(self.dtype).permute(0, 3, 1, 2)
        logits = self.core(x if self.channels_last else x.contiguous())
        if logits.shape[-2:] != x.shape[-2:]:
            logits = resize(logits, x.shape[-2:])
        return logits.argmax(1).to(torch.uint8)


class Peer(nn.Module):
    """A model of torchvision with random weights: what counts is its speed."""

    def __init__(self, name: str):
        super().__init__()
        build = getattr(peers, name)
        self.net = build(weights=None, weights_backbone=None, num_classes=20)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)["out"]


def make_core(how: Variant, net: LEDNet) -> nn.Module:
    """A new module for a variant, on the CPU, in float32."""
    if how.network != "lednet":
        return Peer(how.network).eval()
    if not how.fold:
        return copy.deepcopy(nn.Sequential(net.encoder, net.decoder)).eval()
    folded = fuse_conv_bn(net)
    if not how.shuffles:
        return fuse_channel_shuffles(folded)
    return nn.Sequential(folded.encoder, folded.decoder)


@torch.no_grad()
def count_traffic(core: nn.Module, size: tuple[int, int]) -> int:
    """An estimate of the values that must pass through the memory for one image: the input and
    the output of every convolution and pooling, as a forward hook sees them. Elementwise
    operations are taken to be part of the layer before them. Weights are not in it."""
    core = copy.deepcopy(core).to("meta")
    values = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal values
        values += inputs[0].numel() + output.numel()

    for module in core.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AdaptiveAvgPool2d):
            module.register_forward_hook(add)
    core(torch.zeros(1, 3, *size, device="meta"))
    return values


class Inference:
    """The race: networks are built for one measurement at a time, and compared with the one as
    published of the same size and batch."""

    def __init__(self, leg: Leg):
        self.leg = leg
        self.net, normalization = trained_network(leg.args)
        self.mean = normalization.get("mean", (0.0, 0.0, 0.0))
        self.std = normalization.get("std", (1.0, 1.0, 1.0))
        self.ceilings = ceilings(leg)
        self.expected: dict[tuple, Tensor] = {}

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the process
    def images(self, size: tuple[int, int], batch: int) -> Tensor:
        """(batch, *size, 3) uint8; eight different ones at most."""
        few = load_images(image_folder(self.leg.args), size, min(batch, 8))
        return few[torch.arange(batch) % len(few)].permute(0, 2, 3, 1).contiguous()

    def measure(self, how: Variant, scope: str, size: tuple[int, int], batch: int) -> None:
        slow = how.engine in ("reduce-overhead", "max-autotune")
        self.leg.measure(
            f"{how.title}; {scope} {size[0]}x{size[1]} x{batch}",
            partial(self._measure, how, scope, size, batch),
            cuda=how.engine != "eager" or how.precision in ("tf32", "fp16"),
            needs={"reduce-overhead": 20.0, "max-autotune": 60.0}.get(how.engine, 2.0),
            limit=120.0 if slow else 60.0,
            **{**how._asdict(), "title": how.title, "scope": scope},
            height=size[0], width=size[1], batch=batch,
        )  # fmt: skip
        gc.collect()
        if self.leg.cuda:
            torch._dynamo.reset()
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _measure(self, how: Variant, scope: str, size: tuple[int, int], batch: int) -> Row:
        device, seconds = self.leg.device, 0.2 if self.leg.dry else 0.7
        if self.leg.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        core = make_core(how, self.net)
        floor = self._floor(core, how, scope, size, batch)
        layout = torch.channels_last if how.channels_last else torch.contiguous_format
        core.to(device=device, dtype=DTYPES[how.precision]).to(memory_format=layout)
        images = self.images(size, batch)
        given = images.to(device)
        module: nn.Module = ToLabels(core, self.mean, self.std, how).to(device)
        example = given
        if scope == LOGITS:
            mean, std = (torch.tensor(v, device=device) for v in (self.mean, self.std))
            example = ((given.float() / 255 - mean) / std).permute(0, 3, 1, 2)
            example = example.to(DTYPES[how.precision]).contiguous(memory_format=layout)
            module = ToLogits(core)
        with float_modes(device, how.precision):
            call: Callable[[], Tensor] = partial(module.eval(), example)
            if how.engine == "graph":
                call = capture(call)
            elif how.engine != "eager":
                call = partial(torch.compile(module, mode=how.engine, dynamic=False), example)
            row = speed(time_calls(call, device, seconds), batch)
            labels = call() if scope == LABELS else call().argmax(1).to(torch.uint8)
            row |= floor | self._agreement(how, size, batch, labels)
            del labels
            if scope == LABELS:
                row |= self._with_copies(call, given, images, seconds)
        return row | {"peak_mb": peak_memory_mb(device)}

    def _with_copies(
        self, call: Callable[[], Tensor], given: Tensor, images: Tensor, seconds: float
    ) -> Row:
        """The same from page-locked main memory and back to it, by the host's clock."""
        source, target = images, torch.empty(images.shape[:3], dtype=torch.uint8)
        if self.leg.cuda:
            source, target = source.pin_memory(), target.pin_memory()

        def whole() -> None:
            given.copy_(source, non_blocking=True)
            target.copy_(call(), non_blocking=True)

        times = time_whole_calls(whole, self.leg.device, seconds)
        return speed(times, len(images), "copies_")

    def _agreement(self, how: Variant, size: tuple[int, int], batch: int, labels: Tensor) -> Row:
        """Share of the labels that are those of the network as published."""
        if how.network != "lednet":
            return {}
        key = (size, batch)
        if how == PUBLISHED:
            self.expected = {key: labels.clone()}  # of one size and batch: they may be large
        if key not in self.expected:
            return {}
        return {"equal_labels": (labels == self.expected[key]).float().mean().item()}

    def _floor(
        self, core: nn.Module, how: Variant, scope: str, size: tuple[int, int], batch: int
    ) -> Row:
        """The least time that the operations and the memory traffic take at the measured rates."""
        rate = self.ceilings.get({"fp16": "bf16"}.get(how.precision, how.precision))
        bandwidth = self.ceilings.get("copy")
        if not rate or not bandwidth:
            return {}
        item, pixels = ITEM_BYTES[how.precision], size[0] * size[1]
        ends = 4 * pixels if scope == LABELS else 20 * pixels * item
        weights = sum(p.numel() for p in core.parameters()) * item
        moved = batch * (count_traffic(core, size) * item + ends) + weights
        operations = 2 * batch * count_macs(core, size)
        times = {"flop_ms": operations / rate / 1e9, "bytes_ms": moved / bandwidth / 1e6}
        return {"gflop": operations / 1e9, "mb": moved / 1e6, **times,
                "floor_ms": max(times.values())}  # fmt: skip

    def predictor(self, backend: str, precision: str, size: tuple[int, int], batch: int) -> None:
        """`Predictor` as a user calls it: uint8 in main memory to label maps there."""

        def run() -> Row:
            images = self.images(size, batch).permute(0, 3, 1, 2).contiguous()
            predictor = Predictor(
                self.net, size, self.mean, self.std, device=self.leg.device, backend=backend,
                precision=precision,
            )  # fmt: skip
            call = partial(predictor.label_maps, images)
            times = time_whole_calls(lambda: call()[0].cpu(), self.leg.device, 0.7)
            row = speed(times, batch, "copies_") | {"peak_mb": peak_memory_mb(self.leg.device)}
            if (size, batch) in self.expected:
                same = call()[0].to(self.leg.device) == self.expected[(size, batch)]
                row["equal_labels"] = same.float().mean().item()
            return row

        if self.leg.cuda:
            torch.cuda.reset_peak_memory_stats(self.leg.device)
        title = f"Predictor, {backend}, {precision}"
        self.leg.measure(
            f"{title}; labels {size[0]}x{size[1]} x{batch}", run, limit=100,
            needs=20 if backend == "compiled" else 2, cuda=backend == "compiled",
            title=title, scope=LABELS, height=size[0], width=size[1], batch=batch,
            network="lednet", precision=precision, engine=backend,
        )  # fmt: skip
        gc.collect()


def inference(leg: Leg) -> None:
    """How fast the network is, and how near to what the machine could do."""
    torch.backends.cudnn.benchmark = True
    race = Inference(leg)
    small, large, batches = SMALL, LARGE, (1, 8, 32)
    if leg.dry:
        small, large, batches = (64, 128), (128, 256), (1, 2, 2)
    one, eight, many = batches
    folded = Variant(channels_last=False)
    graph16, graph_tf32 = GRAPH._replace(precision="fp16"), GRAPH._replace(precision="tf32")
    unshuffled = GRAPH._replace(shuffles=False)
    # The best first: what stands below is left out when the time is over.
    for batch in (one, many):
        for scope in (LOGITS, LABELS):
            for how in (PUBLISHED, GRAPH, *((folded, unshuffled) if batch == one else ())):
                race.measure(how, scope, small, batch)
    race.measure(COMPILED, LABELS, small, one)
    race.predictor("compiled", "bf16", small, one)
    for network in PEERS:
        peer = Variant(network, fold=False, channels_last=False)
        race.measure(peer, LOGITS, small, one)
        race.measure(peer._replace(precision="bf16", engine="graph", channels_last=True),
                     LOGITS, small, one)  # fmt: skip
    for precision in PRECISIONS:
        race.measure(Variant(precision=precision), LOGITS, small, one)
    race.measure(PUBLISHED._replace(precision="tf32"), LOGITS, small, one)
    for how in (graph16, graph_tf32, GRAPH._replace(precision="fp32")):
        race.measure(how, LOGITS, small, one)
    for size, batch in ((large, one), (small, eight), (large, eight), (large, many)):
        for how in (PUBLISHED, GRAPH):
            for scope in (LOGITS, LABELS):
                race.measure(how, scope, size, batch)
    race.measure(COMPILED, LABELS, small, many)
    race.measure(COMPILED, LOGITS, small, one)
    race.predictor("eager", "fp32", small, one)
    race.predictor("compiled", "bf16", small, many)
    for how in (graph16, unshuffled, Variant(precision="bf16"), folded):
        for scope in (LOGITS, LABELS):
            race.measure(how, scope, small, many)
    for network in PEERS:
        race.measure(Variant(network, "bf16", "reduce-overhead", fold=False), LOGITS, small, one)
    race.measure(COMPILED, LABELS, large, one)
    race.measure(COMPILED._replace(engine="max-autotune"), LOGITS, small, one)


# 4. Training


class Cycle(Sampler[int]):
    """`length` indices of a data set of `count` samples, again and again."""

    def __init__(self, count: int, length: int):
        self.count, self.length = count, length

    def __iter__(self) -> Iterator[int]:
        return (index % self.count for index in range(self.length))

    def __len__(self) -> int:
        return self.length


class Training:
    """Training steps of every kind, on the first images of the data set."""

    def __init__(self, leg: Leg, folder: Path):
        self.leg, self.folder = leg, folder
        self.steps, self.workers = (2, 0) if leg.dry else (16, min(12, os.cpu_count() or 1))
        self.world = DistributedContext(0, 1, leg.device)
        name, root = data_of(leg.args)
        self.whole = open_dataset(name, root, "train")
        self.most = 8 if leg.dry else 256

    @functools.lru_cache(maxsize=1)  # noqa: B019 - lives as long as the process
    def files(self, size: tuple[int, int]) -> SegmentationDataset:
        step = -(-len(self.whole) // self.most)
        return SegmentationDataset(self.whole.pairs[::step], self.whole.scheme, size)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def cache(self, size: tuple[int, int]) -> CachedDataset:
        folder = self.folder / f"{size[0]}x{size[1]}"
        build_cache(folder, {"train": self.files(size)}, self.workers)
        return CachedDataset(folder / "train", self.files(size), "")

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def on_device(self, size: tuple[int, int]) -> DeviceLoader:
        data = self.files(size)
        loader, _ = make_loaders(data, data, self.world, 1, self.workers, seed=1)
        return load_to_device(loader, loader.sampler, self.leg.device)  # type: ignore[arg-type]

    def loader(self, source: str, size: tuple[int, int], batch: int) -> Any:
        length = self.steps * batch
        if source == "device":
            stored = self.on_device(size)
            order = Cycle(len(stored.images), length)
            return DeviceLoader(stored.dataset, order, batch, stored.images, stored.targets)
        data = Repeated(self.files(size) if source == "files" else self.cache(size), length)
        return make_loaders(data, data, self.world, batch, self.workers, seed=1)[0]

    def measure(
        self, source: str, precision: str, mode: str, size: tuple[int, int], batch: int,
        profile: bool = False,
    ) -> None:  # fmt: skip
        """Rate of a way to train, and its memory.

        Args:
            source: "files", "cache" or "device".
            mode: "eager", "compiled" or "captured".
            profile: take the share of the time that the GPU computes, too.
        """
        facts = {"source": source, "precision": precision, "mode": mode, "height": size[0],
                 "width": size[1], "batch": batch}  # fmt: skip
        name = f"{source}, {precision}, {mode} {size[0]}x{size[1]} x{batch}"
        gpu_only = mode != "eager" or precision in ("tf32", "fp16")
        run = partial(self._measure, source, precision, mode, size, batch)
        needs, limit = (30.0, 120.0) if mode == "compiled" else (3.0, 60.0)
        trainer: list[Callable[[], list[float]]] = []
        self.leg.measure(
            name, lambda: run(trainer), cuda=gpu_only, needs=needs, limit=limit, **facts
        )
        if profile and trainer:  # apart, so that a profiler that fails costs no rate
            self.leg.measure(
                f"{name}: GPU busy", lambda: self._busy(trainer[0]), cuda=True, **facts
            )
        trainer.clear()
        gc.collect()
        if self.leg.cuda:
            torch._dynamo.reset()
            torch.cuda.empty_cache()

    def _measure(
        self, source: str, precision: str, mode: str, size: tuple[int, int], batch: int,
        keep: list[Callable[[], list[float]]],
    ) -> Row:  # fmt: skip
        device = self.leg.device
        if self.leg.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        options = {"precision": precision, "channels_last": precision != "fp32"}
        options |= {"compile": mode == "compiled", "cuda_graph": mode == "captured"}
        trainer = make_trainer(device, self.whole.scheme.num_classes, **options)
        loader = self.loader(source, size, batch)
        run = partial(time_steps, trainer, loader)
        run()  # starts workers, compiles or captures
        times = run()
        keep.append(run)
        mean = statistics.mean(times[1:] or times)
        return {
            "images_per_second": 1000 * batch / mean,
            "p50_ms": statistics.median(times),
            "p95_ms": float(np.quantile(times, 0.95)),
            "peak_mb": peak_memory_mb(device),
            "steps": len(times),
        }

    def _busy(self, run: Callable[[], list[float]]) -> Row:
        return {"busy": busy_share(run, self.leg.device)}


def training(leg: Leg) -> None:
    """How fast training is."""
    torch.backends.cudnn.benchmark = True
    small, odd, large = (256, 512), (360, 480), (512, 1024)
    if leg.dry:
        small, odd, large = (64, 128), (60, 80), (64, 128)
    six, sixteen, many, most = (1, 2, 2, 2) if leg.dry else (6, 16, 32, 64)
    with tempfile.TemporaryDirectory(dir=leg.args.work) as folder:
        race = Training(leg, Path(folder))
        best, plain = ("device", "bf16", "captured"), ("files", "fp32", "eager")
        race.measure(*best, small, many, profile=True)
        race.measure(*plain, small, many, profile=True)
        for way in (("device", "bf16", "eager"), ("device", "fp32", "eager"),
                    ("device", "tf32", "captured"), ("device", "fp32", "captured"),
                    ("cache", "bf16", "captured"), ("files", "bf16", "captured")):  # fmt: skip
            race.measure(*way, small, many, profile=way[2] == "eager")
        race.measure(*best, small, six)
        race.measure(*plain, small, six)
        race.measure(*best, small, most)
        for size, batch in ((large, sixteen), (odd, sixteen)):
            race.measure(*best, size, batch, profile=True)
            race.measure(*plain, size, batch)
        race.measure("device", "bf16", "compiled", small, many, profile=True)
        for way in (("cache", "fp32", "eager"), ("device", "tf32", "eager")):
            race.measure(*way, small, many)
        for size, batch in ((large, six), (large, many), (odd, many), (small, sixteen)):
            race.measure(*best, size, batch)
            race.measure(*plain, size, batch)


# 5. A run


def run(leg: Leg) -> None:
    """A training run through train/main.py for the time that is left."""
    leg.measure("training run", partial(train, leg), needs=1.0, limit=leg.left() + 5)


OVERHEAD = 20.0
"""Seconds of a run before its time counts and after it: imports, plots, copies."""


def run_flags(leg: Leg, folder: Path, minutes: float) -> list[str]:
    """Arguments of train/main.py: a short training on one large GPU."""
    name, root = data_of(leg.args)
    data = open_dataset(name, root, "train")
    stored = data.read(0)[0].shape[:2]
    size, batch, lr = ((360, 480), 16, "1.5e-3") if name == "camvid" else ((256, 512), 32, "2e-3")
    if name == "cityscapes" and stored[1] > 512:
        size = (512, 1024)
    if leg.dry:
        height, width = 64, 128
    flags = ["--dataset", name, "--datadir", root, "--savedir", folder, "--height", height]
    flags += ["--width", width, "--max-minutes", f"{minutes:.3f}", "--num-epochs", 100]
    flags += [
        "--warmup-epochs",
        3,
        "--batch-size",
        2 if leg.dry else 32 if name != "camvid" else 16,
    ]
    flags += ["--lr", "2e-3" if name != "camvid" else "1.5e-3", "--schedule", "cosine"]
    flags += ["--augment", "modern", "--ema-decay", 0.999, "--decoder", "--no-iouTrain"]
    flags += ["--validate-every", 2 if leg.dry else 10, "--device", leg.device.type]
    flags += ["--num-workers", 0 if leg.dry else min(12, os.cpu_count() or 1), "--cache-device"]
    flags += ["--precision", "bf16", "--channels-last", "--cuda-graph"] if leg.cuda else []
    if leg.args.state:
        outputs = load_model(leg.args.state)[0].num_classes
        same = outputs == data.scheme.num_outputs
        state = leg.args.state.resolve() if leg.args.state.exists() else leg.args.state
        flags += ["--state" if same else "--pretrainedEncoder", state]
    return [str(flag) for flag in flags]


def train(leg: Leg) -> Row:
    """Train, copy what the run wrote, and read its scores."""
    out = Path(leg.args.out)
    with tempfile.TemporaryDirectory(dir=leg.args.work) as name:
        folder = Path(name) / "run"
        seconds = 6.0 if leg.dry else leg.left() - OVERHEAD
        if seconds <= 0:
            raise UserError(f"only {leg.left():.0f} s are left: give the leg more --minutes")
        flags = run_flags(leg, folder, seconds / 60)
        leg.info["command"] = " ".join(["python", "train/main.py", *flags])
        leg.save(current={"name": "training run"})
        print(leg.info["command"], flush=True)
        process = subprocess.Popen([sys.executable, "train/main.py", *flags], cwd=ROOT)
        stopped = False
        try:
            process.wait(timeout=max(leg.left() - 6, 5))
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGTERM)  # it saves, and ends after its step
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.kill()
        for source, target in (
            ("best.pth", "weights.pth"), ("log.jsonl", "log.jsonl"), ("curves.png", "curves.png")
        ):  # fmt: skip
            if (folder / source).is_file():
                shutil.copyfile(folder / source, out / target)
        row = scores(folder / "log.jsonl")
        said = (folder / "log.txt").read_text(encoding="utf-8") if row else ""
        leg.info["fallbacks"] = [line for line in said.splitlines() if "--cuda-graph:" in line]
    if stopped:
        row["note"] = "stopped at its limit"
    elif process.returncode:
        row["error"] = f"train/main.py ended with {process.returncode}; see log.txt"
    return row


def scores(path: Path) -> Row:
    """What a log says of a run."""
    if not path.is_file():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    scored = [r for r in records if r.get("val_miou") is not None]
    best = max(scored, key=lambda r: r["val_miou"], default=None)
    return {
        "epochs": len(records),
        "training_seconds": sum(r["seconds"] for r in records),
        "images_per_second": statistics.median(r["images_per_second"] for r in records),
        "gpu_memory_mb": records[-1].get("gpu_memory_mb") if records else None,
        "best_val_miou": best and best["val_miou"],
        "best_epoch": best and best["epoch"],
        "last_val_miou": scored[-1]["val_miou"] if scored else None,
        "class_iou": best and best.get("val_class_iou"),
        "curve": [[r["epoch"], r["val_miou"]] for r in scored],
    }


def open_leg(args: argparse.Namespace) -> Leg:
    """The leg `args.leg`, on a GPU that is ready, or on a CPU for a dry run."""
    faulthandler.enable()
    if args.dry_run:
        torch.set_num_threads(1)
        return Leg(args, torch.device("cpu"), Path(args.work) / f"{args.leg}.json")
    if not torch.cuda.is_available():
        raise UserError("no CUDA GPU can be used here: mend the driver, or try --dry-run")
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device).add_(1).item()  # statistics of memory need a context
    return Leg(args, device, Path(args.work) / f"{args.leg}.json")
