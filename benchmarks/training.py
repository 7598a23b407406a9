"""Compare plain training with fast training: loader, step, and both together.

    python benchmarks/training.py --datadir /data/cityscapes \
        --json benchmarks/results/training.json --plot benchmarks/results/training.png

"plain" decodes and resizes files, and steps in fp32, eager, contiguous. "fast" reads a
cache, built in a temporary folder, and steps in the best of the compared ways: bf16 (or fp16)
where the device has instructions for it, channels last, and, on GPUs or with --compile,
compiled. Loaders, augmentation and steps are those of train/main.py, stage 2. Every round runs
each competitor once: compare ratios. A few images are enough, repeated: files and cache then
come from the memory of the operating system, and no number includes the disk's speed. About
ten minutes on two cores.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks._common import (
    ROOT,
    Row,
    Size,
    Stopwatch,
    add_options,
    alternate,
    make_parser,
    plot_bars,
    print_row,
    summarize,
    time_each,
    write_record,
)
from lednet.cli.common import COUNT, DATASETS, POSITIVE
from lednet.data.cache import CachedDataset, build_cache
from lednet.data.dataset import PairDataset, SegmentationDataset
from lednet.data.device_cache import DeviceLoader, load_to_device
from lednet.data.loaders import make_loaders
from lednet.data.registry import open_dataset
from lednet.data.transforms import Augmentation
from lednet.device import allow_tf32, choose_device, fast_precisions
from lednet.distributed import DistributedContext
from lednet.errors import exit_on_user_error
from lednet.io import plain_values
from lednet.model import LEDNet
from lednet.training.losses import WeightedCrossEntropy
from lednet.training.tasks import Segmentation
from lednet.training.trainer import Trainer, TrainerConfig, seed_everything

PLAIN, FAST = "plain", "fast"
SOURCES = {PLAIN: "files", FAST: "cache"}
LOADER_BATCHES = 8
KEYS = (1, 1, 1)
"""Seed, stage and epoch of every step's randomness: the same for all competitors."""


def without_dropout(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return net


def make_trainer(
    device: torch.device,
    num_classes: int,
    preset: str = "paper",
    dropout: bool = True,
    count_training: bool = False,
    **options: Any,
) -> Trainer:
    """A trainer for stage 2, as train/main.py makes it.

    Args:
        options: of `TrainerConfig`.
    """
    allow_tf32(options.get("precision", "fp32") != "fp32")
    seed_everything(1)
    net = LEDNet(num_classes + 1).to(device)
    net.encoder_head.requires_grad_(False)
    if not dropout:
        without_dropout(net)
    criterion = WeightedCrossEntropy([1.0] * num_classes, num_classes + 1)
    classes = [str(number) for number in range(num_classes)]
    task = Segmentation(criterion, Augmentation(preset), classes)
    world = DistributedContext(0, 1, device)
    config = TrainerConfig(**options)
    return Trainer(net, task, 1, world, config, count_training, notify=_refuse)


def _refuse(message: str) -> None:
    """Fail if steps are not captured: a measurement must not count eager ones."""
    raise RuntimeError(message)


class Batches(list):
    """Batches on the device, in place of a loader."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]):
        super().__init__(batches)
        self.sampler = range(sum(len(images) for images, _ in batches))


class Repeated(PairDataset):
    """The samples of a data set again and again, `length` in all."""

    def __init__(self, data: PairDataset, length: int):
        self.data, self.length, self.pairs = data, length, data.pairs

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[index % len(self.data)]


class TrainingData:
    """Some training images of a data set, in files, a cache and the memory of a device.

    Args:
        whole: the training images; at most `max_images` are taken, at even distances.
        folder: where the cache is built, unless it is there.
    """

    def __init__(
        self,
        whole: SegmentationDataset,
        size: Size,
        max_images: int,
        device: torch.device,
        folder: Path,
        workers: int,
    ):
        step = -(-len(whole) // max_images)
        self.files = SegmentationDataset(whole.pairs[::step], whole.scheme, size)
        self.dist_context = DistributedContext(0, 1, device)
        self.folder, self.workers = folder, workers

    @cached_property
    def cache(self) -> CachedDataset:
        if not self.folder.is_dir():
            build_cache(self.folder, {"train": self.files}, self.workers)
        return CachedDataset(self.folder / "train", self.files, "")

    @cached_property
    def on_device(self) -> DeviceLoader:
        loader = make_loaders(self.files, self.files, self.dist_context, 1, self.workers, seed=1)[0]
        return load_to_device(loader, loader.sampler, self.dist_context.device)  # type: ignore[arg-type]

    def loader(self, source: str, batch: int, steps: int, workers: int | None = None) -> Any:
        """A loader of `steps` batches from "files", "cache" or "device"."""
        if source == "device":
            stored = self.on_device
            indices: Any = [index % len(stored.images) for index in range(batch * steps)]
            return DeviceLoader(stored.dataset, indices, batch, stored.images, stored.targets)
        data = Repeated(self.files if source == "files" else self.cache, batch * steps)
        workers = self.workers if workers is None else workers
        return make_loaders(data, data, self.dist_context, batch, workers, seed=1)[0]


def time_steps(trainer: Trainer, loader: Any) -> list[float]:
    """Milliseconds of each step, with the wait for its batch."""
    allow_tf32(trainer.config.precision != "fp32")  # the trainer made last has set it
    watch = Stopwatch(trainer.dist_context.device)
    watch.tick()
    trainer.train_one_epoch(loader, "steps", KEYS, after_step=watch.tick)
    return watch.times()


def busy_share(run: Callable[[], list[float]], device: torch.device) -> float | None:
    """Share of the time in which a GPU computes or copies; None on a CPU.

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


def list_ways(device: torch.device, compiled: bool) -> dict[str, Row]:
    """Options of `TrainerConfig` of each compared way, plain first.

    Of each layout one is compiled, which takes minutes.
    """
    precisions = ("fp32", *fast_precisions(device))
    choices = list(itertools.product(precisions, (False, True), (False,)))
    if compiled:
        choices += itertools.product(precisions[-1:], (False, True), (True,))
    ways: dict[str, Row] = {}
    for precision, channels_last, compile in choices:
        name = precision + ", channels last" * channels_last + ", compiled" * compile
        options = {"precision": precision, "channels_last": channels_last, "compile": compile}
        ways[name if ways else PLAIN] = options
    return ways


class Comparison:
    """The measurements, with what they share."""

    def __init__(self, args: argparse.Namespace, device: torch.device, cache: Path):
        self.args, self.device = args, device
        whole = open_dataset(args.dataset, args.datadir, "train")
        size, workers = (args.height, args.width), max(args.num_workers)
        self.data = TrainingData(whole, size, args.max_images, device, cache, workers)
        self.num_classes = whole.scheme.num_classes
        self.ways = list_ways(device, args.compile)

    def loader(self, name: str, steps: int, workers: int) -> Any:
        return self.data.loader(SOURCES[name], self.args.batch_size, steps, workers)

    def trainer(self, way: str) -> Trainer:
        return make_trainer(self.device, self.num_classes, count_training=True, **self.ways[way])

    def rows(
        self, title: str, competitors: Mapping[str, Callable[[], list[float]]], **facts: Any
    ) -> list[Row]:
        """A row for each; times are the mean times of a batch in each round."""
        print(title + "".join(f", {value} {key}" for key, value in facts.items()))
        rows: list[Row] = []
        for name, rounds in alternate(competitors, self.args.rounds).items():
            row: Row = {"name": name}
            row |= summarize([*map(statistics.mean, rounds)], self.args.batch_size)
            row["images_per_second"] = row.pop("fps")
            first = rows[0] if rows else row
            row["ratio_to_plain"] = row["images_per_second"] / first["images_per_second"]
            rows.append(row | facts)
            print_row(rows[-1])
        return rows

    def loaders_alone(self, workers: int) -> list[Row]:
        cpu = torch.device("cpu")
        loaders = {name: self.loader(name, LOADER_BATCHES, workers) for name in SOURCES}
        for loader in loaders.values():  # starts the workers and reads the files into memory
            time_each(loader, cpu)
        runs = {name: partial(time_each, loader, cpu) for name, loader in loaders.items()}
        return self.rows("loader alone", runs, num_workers=workers)

    def steps_alone(self, trainers: dict[str, Trainer]) -> list[Row]:
        """All take the same batch, which is on the device."""
        images, labels = next(iter(self.loader(FAST, 1, 0)))
        batch = (images.to(self.device), labels.to(self.device))
        first = {}
        for name, trainer in trainers.items():
            start = time.perf_counter()
            time_steps(trainer, Batches([batch]))
            first[name] = time.perf_counter() - start
        same = Batches([batch] * self.args.steps)
        runs = {name: partial(time_steps, t, same) for name, t in trainers.items()}
        return [row | {"first_step_s": first[row["name"]]} for row in self.rows("step alone", runs)]

    def both(self, trainers: dict[str, Trainer], workers: int) -> list[Row]:
        runs = {}
        for name, trainer in trainers.items():
            loader = self.loader(name, self.args.steps, workers)
            time_each(loader, torch.device("cpu"))
            runs[name] = partial(time_steps, trainer, loader)
        return self.rows("both", runs, num_workers=workers)

    def measure(self) -> Row:
        """Run all measurements; see the module's docstring."""
        args, files = self.args, self.data.files
        loaders = [row for workers in args.num_workers for row in self.loaders_alone(workers)]
        trainers = {way: self.trainer(way) for way in self.ways}
        steps = self.steps_alone(trainers)
        best = max(steps, key=lambda row: row["images_per_second"])["name"]
        print(f"best: {best}")
        pair = {PLAIN: trainers[PLAIN], FAST: trainers[best]}
        both = [row for workers in args.num_workers for row in self.both(pair, workers)]
        return {
            "images": len(files),
            "image_size": list(files.read(0)[0].shape[:2]),
            "loader": loaders,
            "step": steps,
            "best": best,
            "whole": both,
        }


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "--json", "--plot", "--device")
    # fmt: off
    parser.add_argument("--dataset", choices=DATASETS, default="cityscapes", help="data set")
    parser.add_argument("--datadir", type=Path,
                        help="folder of the data set (default: datasets/<dataset>)")
    parser.add_argument("--num-workers", type=COUNT, nargs="+", metavar="N",
                        default=[0, min(4, os.cpu_count() or 1)],
                        help="numbers of loading processes to compare")
    parser.add_argument("--steps", type=POSITIVE, help="per round (default: 2; on GPUs 60)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="compare torch.compile too, minutes more (default: on GPUs)")
    # fmt: on
    add_options(
        parser,
        max_images=(64, "number of training images, at even distances"),
        height=(512, "in pixels"),
        width=(1024, "in pixels"),
        batch_size=(4, "images of a step"),
        rounds=(3, "of all competitors"),
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    device = choose_device(args.device)
    args.datadir = args.datadir or ROOT / "datasets" / args.dataset
    if args.compile is None:
        args.compile = device.type == "cuda"
    args.steps = args.steps or (60 if device.type == "cuda" else 2)
    with tempfile.TemporaryDirectory() as folder:
        record = Comparison(args, device, Path(folder) / "cache").measure()
    write_record(args.json, device, {"options": plain_values(vars(args))} | record)
    if args.plot:
        title = f"Training at {args.height}x{args.width}, batch {args.batch_size}"
        panels = {"loader alone": "loader", "step alone": "step", "both": "whole"}
        plot_bars(args.plot, title, {name: record[part] for name, part in panels.items()})


if __name__ == "__main__":
    with exit_on_user_error():
        main()
