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

from lednet.data.registry import open_dataset
from lednet.device import autocast, describe_device, synchronize
from lednet.errors import UserError
from lednet.io import read_json, write_json
from lednet.model import LEDNet, load_model
from lednet.training.run_dir import environment

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


# The last leg


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
        size, batch = (64, 128), 2
    flags = [
        "--dataset",
        name,
        "--datadir",
        root.resolve(),
        "--savedir",
        folder,
        "--height",
        size[0],
    ]
    flags += ["--width", size[1], "--max-minutes", f"{minutes:.3f}", "--num-epochs", 100]
    flags += ["--warmup-epochs", 3, "--batch-size", batch, "--lr", lr, "--schedule", "cosine"]
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
        seconds = 3.0 if leg.dry else leg.left() - OVERHEAD
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
