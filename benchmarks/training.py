"""Race training as it is against training made fast: loader, step, and both together.

    python benchmarks/training.py --datadir /data/cityscapes \
        --json benchmarks/results/training.json --plot benchmarks/results/training.png

"plain" decodes and resizes files, and steps in fp32, eager, contiguous. "fast" reads a
cache, built for this run in a temporary folder, and steps in the best of the ways that are
raced: bf16 (or fp16) where the device has instructions for it, channels last, and, on GPUs
or with --compile, compiled.
Loaders, augmentation and steps are those of train/main.py, stage 2. Every round runs each
competitor once, so that they share the machine's good and bad moments: compare ratios.
Some images are enough, taken again and again: files and cache then come from the memory of
the operating system, and the disk's speed is in no number. About ten minutes on two cores.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lednet.data.cache import CachedDataset, build_cache
from lednet.data.dataset import PairDataset, SegmentationDataset
from lednet.data.loaders import TrainBatches, make_loaders
from lednet.data.registry import DATASETS, open_dataset
from lednet.data.transforms import Augmentation
from lednet.device import (
    choose_device,
    describe_device,
    fast_precisions,
    peak_memory_mb,
    synchronize,
)
from lednet.distributed import DistributedContext
from lednet.errors import UserError, exit_on_user_error
from lednet.io import write_json
from lednet.model import LEDNet
from lednet.training.losses import WeightedCrossEntropy
from lednet.training.run_dir import environment
from lednet.training.tasks import Segmentation
from lednet.training.trainer import Trainer, TrainerConfig, seed_everything

ROOT = Path(__file__).resolve().parents[1]

PLAIN, FAST = "plain", "fast"
LOADER_BATCHES = 8
KEYS = (1, 1, 1)
"""Seed, stage and epoch of every step's randomness: all competitors have the same."""


class Way(NamedTuple):
    """A way to take a step."""

    name: str
    options: dict[str, Any]
    """Of `TrainerConfig`."""


def list_ways(device: torch.device, compiled: bool) -> list[Way]:
    """All that are raced, plain first; of each layout one is compiled, which takes minutes."""
    precisions = ("fp32", *fast_precisions(device))
    choices = list(itertools.product(precisions, (False, True), (False,)))
    if compiled:
        choices += itertools.product(precisions[-1:], (False, True), (True,))
    ways: list[Way] = []
    for precision, channels_last, compile in choices:
        options = {"precision": precision, "channels_last": channels_last, "compile": compile}
        name = precision + ", channels last" * channels_last + ", compiled" * compile
        ways.append(Way(name if ways else PLAIN, options))
    return ways


class Repeated(PairDataset):
    """A data set's images again and again, `length` in all."""

    def __init__(self, data: PairDataset, length: int):
        self.data, self.length, self.pairs = data, length, data.pairs

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[index % len(self.data)]


class SameBatch(list):
    """One batch `steps` times, in place of a loader that takes no time."""

    def __init__(self, batch: tuple[Tensor, Tensor], steps: int):
        super().__init__([batch] * steps)
        self.sampler = range(steps * len(batch[0]))


class Stopwatch:
    """Milliseconds between ticks, by the clock of `device`, which is not made to wait."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []

    def tick(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            synchronize(self.device)
            self.marks.append(time.perf_counter())

    def times(self) -> list[float]:
        synchronize(self.device)
        pairs = itertools.pairwise(self.marks)
        if self.device.type == "cuda":
            return [start.elapsed_time(end) for start, end in pairs]
        return [1000 * (end - start) for start, end in pairs]


def time_loader(loader: Iterable[Any]) -> list[float]:
    """Milliseconds of each batch that is loaded."""
    watch = Stopwatch(torch.device("cpu"))
    watch.tick()
    for _ in loader:
        watch.tick()
    return watch.times()


def time_steps(trainer: Trainer, loader: TrainBatches | SameBatch) -> list[float]:
    """Milliseconds of each step, with what it waits for its batch."""
    watch = Stopwatch(trainer.dist_context.device)
    watch.tick()
    trainer.train_one_epoch(
        loader,  # type: ignore[arg-type]  # of a loader, SameBatch has what is needed
        "steps",
        KEYS,
        after_step=watch.tick,
    )
    return watch.times()


def race(
    competitors: Mapping[str, Callable[[], list[float]]], rounds: int, batch_size: int
) -> list[dict[str, Any]]:
    """Run all in turn in every round.

    Args:
        competitors: each returns the milliseconds of its batches; plain first.

    Returns:
        A row for each: images a second in the median round, p50 and p95 of a batch.
    """
    rounds_of: dict[str, list[list[float]]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, run in competitors.items():
            rounds_of[name].append(run())
    rows: list[dict[str, Any]] = []
    for name, times in rounds_of.items():
        every = list(itertools.chain(*times))
        rate = batch_size * 1000 / statistics.median(map(statistics.mean, times))
        rows.append(
            {
                "name": name,
                "images_per_second": rate,
                "ratio_to_plain": rate / rows[0]["images_per_second"] if rows else 1.0,
                "p50_ms": statistics.median(every),
                "p95_ms": float(np.quantile(every, 0.95)),
                "batches": len(every),
            }
        )
        print_row(rows[-1])
    return rows


def print_row(row: dict[str, Any]) -> None:
    print(
        f"  {row['name']:32} {row['images_per_second']:10.2f} images/s  "
        f"{row['ratio_to_plain']:8.2f}x  p50 {row['p50_ms']:9.1f} ms  p95 {row['p95_ms']:9.1f}",
        flush=True,
    )


class Bench:
    """What all measurements have in common.

    Args:
        cache: folder of the cache; built in it unless it is there.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, cache: Path):
        self.args, self.device, self.world = args, device, DistributedContext(0, 1, device)
        size = (args.height, args.width)
        files = open_dataset(args.dataset, args.datadir, "train")
        step = -(-len(files) // args.max_images)
        files = SegmentationDataset(files.pairs[::step], files.scheme, size)
        self.scheme, self.image_size = files.scheme, files.read(0)[0].shape[:2]
        start = time.perf_counter()
        if not cache.is_dir():
            build_cache(cache, {"train": files}, max(args.num_workers))
        self.cache_seconds = time.perf_counter() - start
        self.cache_bytes = sum(path.stat().st_size for path in cache.rglob("*.npy"))
        self.data = {PLAIN: files, FAST: CachedDataset(cache / "train", files, "")}

    def loader(self, path: str, batches: int, workers: int) -> TrainBatches:
        data = Repeated(self.data[path], batches * self.args.batch_size)
        return make_loaders(data, data, self.world, self.args.batch_size, workers, seed=1)[0]

    def trainer(self, way: Way) -> Trainer:
        """Of stage 2."""
        seed_everything(1)
        net = LEDNet(self.scheme.num_outputs).to(self.device)
        net.encoder_head.requires_grad_(False)
        criterion = WeightedCrossEntropy([1.0] * self.scheme.num_classes, self.scheme.num_outputs)
        task = Segmentation(criterion, Augmentation(), self.scheme.classes)
        return Trainer(net, task, 1, self.world, TrainerConfig(**way.options))

    def race(self, competitors: Mapping[str, Callable[[], list[float]]]) -> list[dict[str, Any]]:
        return race(competitors, self.args.rounds, self.args.batch_size)

    def loaders_alone(self, workers: int) -> list[dict[str, Any]]:
        loaders = {path: self.loader(path, LOADER_BATCHES, workers) for path in (PLAIN, FAST)}
        for loader in loaders.values():  # starts the workers, and brings the files to memory
            time_loader(loader)
        return self.race({path: partial(time_loader, x) for path, x in loaders.items()})

    def steps_alone(self, trainers: dict[str, Trainer]) -> list[dict[str, Any]]:
        """All take the same batch, which is on the device."""
        images, labels = next(iter(self.loader(FAST, 1, 0)))
        batch = (images.to(self.device), labels.to(self.device))
        first = {}
        for name, trainer in trainers.items():
            start = time.perf_counter()
            time_steps(trainer, SameBatch(batch, 1))
            first[name] = time.perf_counter() - start
        same = SameBatch(batch, self.args.steps)
        rows = self.race({name: partial(time_steps, t, same) for name, t in trainers.items()})
        return [row | {"first_step_s": first[row["name"]]} for row in rows]

    def whole(self, plain: Trainer, fast: Trainer, workers: int) -> list[dict[str, Any]]:
        runs = {}
        for path, trainer in ((PLAIN, plain), (FAST, fast)):
            loader = self.loader(path, self.args.steps, workers)
            time_loader(loader)
            runs[path] = partial(time_steps, trainer, loader)
        rows = self.race(runs)
        return [row | {"busy": busy_share(runs[row["name"]], self.device)} for row in rows]

    def peak(self, way: Way, cache: Path) -> dict[str, float] | None:
        """Peak memory in MB of a process that trains in this way alone, before and after."""
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", way.name, str(cache)]
        result = subprocess.run(command, capture_output=True, text=True)
        return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None

    def print_peak(self, way: Way) -> None:
        trainer = self.trainer(way)
        loader = self.loader(PLAIN if way.name == PLAIN else FAST, 2, 0)
        before = peak_memory_mb(self.device)
        time_steps(trainer, loader)
        print(json.dumps({"before_mb": before, "peak_mb": peak_memory_mb(self.device)}))


def busy_share(run: Callable[[], list[float]], device: torch.device) -> float | None:
    """Share of the time in which a GPU computes or copies (untested); None on a CPU.

    Times between events would count the gaps between kernels as work.
    """
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        milliseconds = sum(run())
    on_gpu = (
        event.self_device_time_total
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    return sum(on_gpu) / 1000 / milliseconds


def measure(args: argparse.Namespace, device: torch.device, cache: Path) -> dict[str, Any]:
    """Everything; see the module's docstring."""
    bench = Bench(args, device, cache)
    count, ways = len(bench.data[PLAIN]), list_ways(device, args.compile)
    size = f"{args.height}x{args.width}"
    print(
        f"{count} images of {bench.image_size[0]}x{bench.image_size[1]} at {size}, batch "
        f"{args.batch_size}, {args.rounds} rounds; cache: {bench.cache_seconds:.1f} s, "
        f"{bench.cache_bytes / 1e6:.0f} MB"
    )
    loaders, wholes = [], []
    for workers in args.num_workers:
        print(f"loader alone, {workers} workers, {LOADER_BATCHES} batches a round")
        loaders += [row | {"num_workers": workers} for row in bench.loaders_alone(workers)]
    print(f"step alone, {args.steps} a round")
    trainers = {way.name: bench.trainer(way) for way in ways}
    steps = bench.steps_alone(trainers)
    best = max(steps, key=lambda row: row["images_per_second"])["name"]
    print(f"best: {best}")
    for workers in args.num_workers:
        print(f"whole, {workers} workers, {args.steps} steps a round")
        rows = bench.whole(trainers[PLAIN], trainers[best], workers)
        wholes += [row | {"num_workers": workers} for row in rows]
    for row in wholes:
        if row["busy"] is not None:
            print(f"  {row['name']}, {row['num_workers']} workers: GPU busy {row['busy']:.0%}")
    peaks = {}
    for way in [way for way in ways if args.memory and way.name in (PLAIN, best)]:
        peaks[way.name] = peak = bench.peak(way, cache)
        if peak:
            print(f"peak memory, {way.name}: {peak['peak_mb']:.0f} MB "
                  f"({peak['before_mb']:.0f} before the first step)")  # fmt: skip
    return {
        "dataset": args.dataset,
        "images": count,
        "image_size": list(bench.image_size),
        "size": [args.height, args.width],
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "cache": {"seconds": bench.cache_seconds, "bytes": bench.cache_bytes},
        "loader": loaders,
        "step": steps,
        "best": best,
        "whole": wholes,
        "peak_memory": peaks,
        "peak_memory_of": "GPU's tensors" if device.type == "cuda" else "whole process",
    }


def plot(record: dict[str, Any], path: Path) -> None:
    """Bars of images a second, a panel each for loader, step and both."""
    panels = {}
    for part in ("loader", "step", "whole"):
        panels[part] = {
            row["name"] + (f", {row['num_workers']} workers" if "num_workers" in row else ""): row
            for row in record[part]
        }
    figure = Figure(figsize=(15, 1.6 + 0.45 * max(map(len, panels.values()))), layout="constrained")
    height, width = record["size"]
    figure.suptitle(f"Training at {height}x{width}, batch {record['batch_size']}: "
                    f"{record['device']}")  # fmt: skip
    for axis, (part, rows) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        rates = [row["images_per_second"] for row in rows.values()]
        colors = ["#bab0ac" if row["name"] == PLAIN else "#4c78a8" for row in rows.values()]
        axis.barh(list(rows), rates, color=colors)
        for y, row in enumerate(rows.values()):
            text = f" {row['images_per_second']:.3g} ({row['ratio_to_plain']:.2f}x)"
            axis.text(row["images_per_second"], y, text, va="center")
        title = {"loader": "loader alone", "step": "step alone", "whole": "both"}[part]
        axis.set(xlim=(0, 1.45 * max(rates)), title=title, xlabel="images a second")
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--dataset", choices=DATASETS, default="cityscapes")
    parser.add_argument("--datadir", type=Path, help="data set's folder (datasets/<dataset>)")
    parser.add_argument("--max-images", type=int, default=64, metavar="N",
                        help="of the training images, at even distances (64)")
    parser.add_argument("--height", type=int, default=512, help="in pixels (512)")
    parser.add_argument("--width", type=int, default=1024, help="in pixels (1024)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-workers", type=int, nargs="+", metavar="N",
                        default=[0, min(4, os.cpu_count() or 1)],
                        help="loading processes, one after the other (0, and as in training)")
    parser.add_argument("--steps", type=int, help="in a round (2; on GPUs 60)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action=switch,
                        help="race torch.compile too: minutes more (on GPUs)")
    parser.add_argument("--memory", action=switch, default=True,
                        help="peak memory, each in a process of its own")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    # fmt: on
    return parser


def main() -> None:
    args = build_parser().parse_args()
    device = choose_device(args.device)
    args.datadir = args.datadir or ROOT / "datasets" / args.dataset
    if args.compile is None:
        args.compile = device.type == "cuda"
    if args.steps is None:
        args.steps = 60 if device.type == "cuda" else 2
    for name in ("max_images", "height", "width", "batch_size", "steps", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is too small: give 1 or more")
    if args.peak_of:
        name, cache = args.peak_of
        way = next(way for way in list_ways(device, args.compile) if way.name == name)
        Bench(args, device, Path(cache)).print_peak(way)
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        record = {
            "command": " ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
            "device": describe_device(device),
            "environment": environment(ROOT),
        } | measure(args, device, Path(folder) / "cache")
    record["seconds"] = time.perf_counter() - start
    if args.json:
        write_json(args.json, record)
    if args.plot:
        plot(record, args.plot)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
