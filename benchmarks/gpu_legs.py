"""Base of the legs of `benchmarks/gpu.py`, and two of them: the machine, and a training run.

A leg is a list of measurements in a process of its own. A measurement that raises becomes a row
with its error, and the next one follows. Rows are written after each measurement, so that a
process that is killed keeps them; started again on the same file, it continues after the
measurement that ended it.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import ROOT, Row, product_rate, rates, summarize, time_calls
from lednet.data.registry import open_dataset
from lednet.device import describe_device
from lednet.errors import UserError
from lednet.io import read_json, write_json
from lednet.model import LEDNet, load_model
from lednet.training.cuda_graph import record_cuda_graph, warm_up
from lednet.training.run_dir import environment, read_records

CONTEXT_LOST = 3
"""Exit status of a leg whose CUDA context no longer works; it can be started again."""


class Leg:
    """A running leg.

    Args:
        args: options of `benchmarks/gpu.py`.
        path: JSON file of the rows. Measurements that are already in it are not repeated.

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
        self.row: Row = {}
        if killed := found.get("current"):
            self.rows.append({**killed, "error": "its process ended or hung; see log.txt"})
        self.save()

    def left(self) -> float:
        """Seconds until the leg must end."""
        return self.end - time.monotonic()

    def save(self, **state: Any) -> None:
        rest = {"rows": self.rows, "info": self.info, "left_out": self.left_out}
        write_json(self.path, finite({**rest, **state}))

    def find(self, name: str, key: str) -> Any:
        """A value of the row `name`, or None."""
        return next((row.get(key) for row in self.rows if row["name"] == name), None)

    def note(self, **facts: Any) -> None:
        """Add items to the row of the current measurement, which are kept even if it fails."""
        self.row |= facts
        self.save(current=self.row)

    def measure(
        self,
        name: str,
        function: Callable[[], Row],
        *,
        cuda: bool = False,
        needs: float = 1.0,
        limit: float = 60.0,
        **facts: Any,
    ) -> None:
        """Call `function` and keep the row that it returns.

        Args:
            cuda: whether it needs a GPU.
            needs: seconds that must be left; with less, it is left out.
            limit: seconds after which the process is ended with a traceback of all threads.
            facts: further items of the row.
        """
        done = any(row["name"] == name for row in self.rows)
        if done or (self.args.only and not re.search(self.args.only, name)):
            return
        self.row = {"name": name, **facts}
        if cuda and not self.cuda:
            self._keep({"note": "needs CUDA"})
            return
        if self.left() < needs:
            self.left_out.append(name)
            self.save()
            return
        self.note()
        start, found = time.monotonic(), {}
        faulthandler.dump_traceback_later(min(limit, max(self.left(), 1) + 5), exit=True, file=2)
        try:
            found = function()
        except Exception as error:
            print(f"{name} failed:", flush=True)
            traceback.print_exc(file=sys.stdout)
            found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        finally:
            faulthandler.cancel_dump_traceback_later()
        self._keep(found | {"seconds": time.monotonic() - start})
        if "error" in found:
            self._recover()

    def _keep(self, found: Row) -> None:
        self.rows.append(self.row | found)
        self.save()
        print(json.dumps(finite(self.rows[-1])), flush=True)

    def _recover(self) -> None:
        """Free memory; end the process if CUDA no longer works."""
        gc.collect()
        if self.cuda:
            try:
                torch.cuda.empty_cache()
                use(self.device)
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


def use(device: torch.device) -> None:
    """Compute something on the device and wait for it."""
    torch.zeros(1, device=device).add_(1).item()


def open_leg(args: argparse.Namespace) -> Leg:
    """The leg `args.leg`, on a GPU, or on a CPU in a dry run."""
    faulthandler.enable()
    path = Path(args.work) / f"{args.leg}.json"
    if args.dry_run:
        torch.set_num_threads(1)
        return Leg(args, torch.device("cpu"), path)
    if not torch.cuda.is_available():
        raise UserError("no CUDA GPU can be used here: repair the driver, or try --dry-run")
    use(device := torch.device("cuda", 0))  # statistics of memory need a context
    return Leg(args, device, path)


def capture(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`call` as a CUDA graph: recorded once, replayed at each call, with the same output tensor."""
    warm_up(call, device)
    replay, (output,) = record_cuda_graph(lambda: (call(),))

    def run() -> Tensor:
        replay()
        return output

    return run


def toy_data(args: argparse.Namespace) -> Path:
    """A small Cityscapes tree, drawn once for all legs."""
    root = Path(args.work) / "toy"
    if not root.is_dir():
        command = [sys.executable, "datasets/make_toy_cityscapes.py", "--out", str(root)]
        options = "--train 16 --val 2 --test 0 --train-extra 0 --width 128 --height 64 --workers 1"
        subprocess.run(command + options.split(), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return root


def data_of(args: argparse.Namespace) -> tuple[str, Path]:
    """Name and folder of the data set to measure with."""
    return (args.dataset, args.data) if args.data else ("cityscapes", toy_data(args))


def image_folder(args: argparse.Namespace) -> Path:
    name, root = data_of(args)
    return root / "leftImg8bit/val" if name == "cityscapes" else root / "val"


def trained_network(args: argparse.Namespace) -> tuple[LEDNet, Row]:
    """The network of --state, or a released one, and its normalization."""
    net, meta = load_model(args.state or "cityscapes-d20")
    return net.eval(), {key: meta[key] for key in ("mean", "std") if key in meta}


# The first leg


def machine(leg: Leg) -> None:
    """Describe the machine and measure two rates: of copying, and of matrix products."""
    leg.info.update(describe_machine(leg.device))
    for bits in (28, 30, 32) if leg.cuda else (22,):
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
        **environment(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        found |= {
            "memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        with contextlib.suppress(Exception):
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
            done = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, timeout=9)
            values = done.stdout.decode().splitlines()[0].split(", ")
            found |= dict(zip(("driver", "max_clock", "power_limit"), values, strict=False))
    return found


def copy_rate(device: torch.device, size: int) -> Row:
    """GB/s of copying `size` bytes on the device; bytes read and bytes written count."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return rates(2 * size / 1e9, time_calls(lambda: target.copy_(source), device, 0.3))


def best_rates(rows: Iterable[Row]) -> dict[str, float]:
    """Highest rate of each kind: GB/s of copying, TFLOP/s in each precision."""
    found: dict[str, float] = {}
    for row in rows:
        if isinstance(row.get("best"), float):
            found[row["kind"]] = max(row["best"], found.get(row["kind"], 0.0))
    return found


def ceilings(leg: Leg) -> dict[str, float]:
    """The rates that the first leg measured; measured now if it did not run."""
    path = Path(leg.args.work) / "machine.json"
    found = read_json(path).get("info", {}).get("ceilings", {}) if path.is_file() else {}
    if not found and leg.cuda:
        rows = [{"kind": "copy", **copy_rate(leg.device, 2**30)}]
        kinds = ("bf16", "tf32", "fp32")
        rows += [{"kind": kind, **product_rate(leg.device, kind, 8192)} for kind in kinds]
        found = best_rates(rows)
    return found


# The last leg

OVERHEAD = 20.0
"""Seconds of a run before and after its time limit counts: imports, plots, copies."""


def run(leg: Leg) -> None:
    """A training run with train/main.py for the remaining time."""
    leg.measure("training run", partial(train, leg), limit=leg.left() + 5)


def run_flags(leg: Leg, folder: Path, minutes: float) -> list[str]:
    """Arguments of train/main.py: a short training on one large GPU."""
    name, root = data_of(leg.args)
    data = open_dataset(name, root, "train")
    size, batch, lr = ((360, 480), 16, 1.5e-3) if name == "camvid" else ((256, 512), 32, 2e-3)
    if name == "cityscapes" and data.read(0)[0].shape[1] > 512:
        size = (512, 1024)
    if leg.dry:
        size, batch = (64, 128), 2
    workers = 0 if leg.dry else min(12, os.cpu_count() or 1)
    flags = ["--dataset", name, "--datadir", root.resolve(), "--savedir", folder]
    flags += (
        f"--height {size[0]} --width {size[1]} --max-minutes {minutes:.3f} --num-epochs 100 "
        f"--warmup-epochs 3 --batch-size {batch} --lr {lr} --schedule cosine --augment modern "
        f"--ema-decay 0.999 --decoder --no-iouTrain --validate-every {2 if leg.dry else 10} "
        f"--device {leg.device.type} --num-workers {workers} --cache-device"
    ).split()
    flags += ["--precision", "bf16", "--channels-last", "--cuda-graph"] if leg.cuda else []
    if state := leg.args.state:
        same = load_model(state)[0].num_classes == data.scheme.num_outputs
        flags += ["--state" if same else "--pretrainedEncoder",
                  state.resolve() if state.exists() else state]  # fmt: skip
    return [str(flag) for flag in flags]


def train(leg: Leg) -> Row:
    """Train, copy the files of the run, and read its scores."""
    row: Row = {}
    with tempfile.TemporaryDirectory(dir=leg.args.work) as name:
        folder = Path(name) / "run"
        seconds = 3.0 if leg.dry else leg.left() - OVERHEAD
        if seconds <= 0:
            raise UserError(f"only {leg.left():.0f} s are left: give the leg more --minutes")
        flags = run_flags(leg, folder, seconds / 60)
        leg.info["command"] = " ".join(["python", "train/main.py", *flags])
        leg.note()
        print(leg.info["command"], flush=True)
        process = subprocess.Popen([sys.executable, "train/main.py", *flags], cwd=ROOT)
        try:
            process.wait(timeout=max(leg.left() - 6, 5))
        except subprocess.TimeoutExpired:
            row["note"] = "stopped at its limit"
            process.send_signal(signal.SIGTERM)  # it saves, and ends after its step
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.kill()
        else:
            if process.returncode:
                row["error"] = f"train/main.py ended with {process.returncode}; see log.txt"
        files = {"best.pth": "weights.pth", "log.jsonl": "log.jsonl", "curves.png": "curves.png"}
        for source, target in files.items():
            if (folder / source).is_file():
                shutil.copyfile(folder / source, Path(leg.args.out) / target)
        if (folder / "log.jsonl").is_file():
            row |= scores(folder)
            lines = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
            leg.info["fallbacks"] = [line for line in lines if "--cuda-graph:" in line]
    return row


def scores(folder: Path) -> Row:
    """Speed, memory and scores of a run, from its log."""
    records = read_records(folder)
    scored = [r for r in records if r.get("val_miou") is not None]
    best: Row = max(scored, key=lambda r: r["val_miou"], default={})
    speed = summarize([1000 / r["images_per_second"] for r in records])
    return {
        "epochs": len(records),
        "training_seconds": sum(r["seconds"] for r in records),
        "images_per_second": speed["fps"],
        "noisy": speed["noisy"],
        "gpu_memory_mb": records[-1].get("gpu_memory_mb"),
        "best_val_miou": best.get("val_miou"),
        "best_epoch": best.get("epoch"),
        "last_val_miou": scored[-1]["val_miou"] if scored else None,
        "class_iou": best.get("val_class_iou"),
        "curve": [[r["epoch"], r["val_miou"]] for r in scored],
    }
