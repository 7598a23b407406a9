"""Two legs of `benchmarks/gpu.py`: how fast inference is, and how fast training is."""

import copy
import functools
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from torchvision.models import segmentation as peers

from benchmarks.gpu_legs import (
    DTYPES,
    PRECISIONS,
    Leg,
    Row,
    capture,
    ceilings,
    data_of,
    float_modes,
    image_folder,
    speed,
    time_calls,
    time_whole_calls,
    trained_network,
)
from benchmarks.inference import load_images
from benchmarks.training import Repeated, busy_share, time_steps
from lednet.data.cache import CachedDataset, build_cache
from lednet.data.dataset import SegmentationDataset
from lednet.data.device_cache import DeviceLoader, load_to_device
from lednet.data.loaders import make_loaders
from lednet.data.registry import open_dataset
from lednet.data.transforms import Augmentation
from lednet.device import allow_tf32, peak_memory_mb, synchronize
from lednet.distributed import DistributedContext
from lednet.export.fuse import fuse_channel_shuffles, fuse_conv_bn
from lednet.inference.benchmark import count_macs
from lednet.inference.predictor import Predictor
from lednet.model import LEDNet, resize
from lednet.training.losses import WeightedCrossEntropy
from lednet.training.tasks import Segmentation
from lednet.training.trainer import Trainer, TrainerConfig, seed_everything

# Inference


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
        words = [self.network]
        if self.network == "lednet":
            words = ["as published" if not self.fold else "folded"]
        words += ["no shuffles"] * (not self.shuffles)
        words += [self.engine, self.precision]
        words += ["channels last"] * (self.channels_last and self.engine == "eager")
        return ", ".join(words)


def clean_up(leg: Leg, engine: str) -> None:
    """Free what a measurement has left in memory."""
    if leg.cuda and engine in ("compiled", "reduce-overhead", "max-autotune"):
        torch._dynamo.reset()
    gc.collect()
    if leg.cuda:
        torch.cuda.empty_cache()


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

    mean: Tensor
    std: Tensor

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
            needs={"reduce-overhead": 35.0, "max-autotune": 60.0}.get(how.engine, 2.0),
            limit=120.0 if slow else 60.0,
            **{**how._asdict(), "title": how.title, "scope": scope},
            height=size[0], width=size[1], batch=batch,
        )  # fmt: skip
        clean_up(self.leg, how.engine)

    @torch.no_grad()
    def _measure(self, how: Variant, scope: str, size: tuple[int, int], batch: int) -> Row:
        device, seconds = self.leg.device, 0.05 if self.leg.dry else 0.7
        if self.leg.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
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
        mode = torch.inference_mode() if how.engine == "eager" else torch.no_grad()
        with mode, float_modes(device, how.precision):
            call: Callable[[], Tensor] = partial(module.eval(), example)
            if how.engine == "graph":
                call = capture(call)
            elif how.engine != "eager":
                call = partial(torch.compile(module, mode=how.engine, dynamic=False), example)
            call()
            synchronize(device)
            row = {"prepared_s": time.perf_counter() - start}
            row |= speed(time_calls(call, device, seconds), batch)
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
            self.expected[key] = labels
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
        item, pixels = DTYPES[how.precision].itemsize, size[0] * size[1]
        outputs = self.net.num_classes if how.network == "lednet" else 20
        ends = 4 * pixels if scope == LABELS else outputs * pixels * item
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
            needs=30 if backend == "compiled" else 2, cuda=backend == "compiled",
            title=title, scope=LABELS, height=size[0], width=size[1], batch=batch,
            network="lednet", precision=precision, engine=backend,
        )  # fmt: skip
        clean_up(self.leg, backend)


def inference(leg: Leg) -> None:
    """How fast the network is, and how near to what the machine could do."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 5  # algorithms tried for each convolution, in seconds
    race = Inference(leg)
    small, large, batches = SMALL, LARGE, (1, 8, 32)
    if leg.dry:
        small, large, batches = (64, 128), (64, 128), (1, 2, 2)
    one, eight, many = batches
    folded = Variant(channels_last=False)
    graph16, graph_tf32 = GRAPH._replace(precision="fp16"), GRAPH._replace(precision="tf32")
    unshuffled = GRAPH._replace(shuffles=False)
    # The most valuable first: what follows is left out when the time is over.
    for batch in (one, many):
        for scope in (LOGITS, LABELS):
            for how in (PUBLISHED, GRAPH, *((folded, unshuffled) if batch == one else ())):
                race.measure(how, scope, small, batch)
    for network in PEERS:
        peer = Variant(network, fold=False, channels_last=False)
        captured = peer._replace(precision="bf16", engine="graph", channels_last=True)
        race.measure(peer, LOGITS, small, one)
        race.measure(captured, LOGITS, small, one)
    for how in (PUBLISHED, GRAPH):
        for scope in (LOGITS, LABELS):
            race.measure(how, scope, large, one)
    race.measure(COMPILED, LABELS, small, one)
    race.predictor("compiled", "bf16", small, one)
    for precision in PRECISIONS:
        race.measure(Variant(precision=precision), LOGITS, small, one)
    for how in (PUBLISHED._replace(precision="tf32"), graph16, graph_tf32,
                GRAPH._replace(precision="fp32")):  # fmt: skip
        race.measure(how, LOGITS, small, one)
    race.predictor("eager", "fp32", small, one)
    for size, batch in ((small, eight), (large, eight), (large, many)):
        for how in (PUBLISHED, GRAPH):
            for scope in (LOGITS, LABELS):
                race.measure(how, scope, size, batch)
    race.measure(COMPILED, LABELS, small, many)
    race.measure(COMPILED, LOGITS, small, one)
    race.predictor("compiled", "bf16", small, many)
    for how in (graph16, unshuffled, Variant(precision="bf16"), folded):
        for scope in (LOGITS, LABELS):
            race.measure(how, scope, small, many)
    for network in PEERS:
        race.measure(Variant(network, "bf16", "reduce-overhead", fold=False), LOGITS, small, one)
    race.measure(COMPILED, LABELS, large, one)
    race.measure(COMPILED._replace(engine="max-autotune"), LOGITS, small, one)


# Training


def without_dropout(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return net


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
        facts: Row = {"source": source, "precision": precision, "mode": mode, "height": size[0],
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
            busy = partial(self._busy, trainer[0])
            self.leg.measure(f"{name}: GPU busy", busy, cuda=True, **facts)
        trainer.clear()
        clean_up(self.leg, mode)

    def _measure(
        self, source: str, precision: str, mode: str, size: tuple[int, int], batch: int,
        keep: list[Callable[[], list[float]]],
    ) -> Row:  # fmt: skip
        device = self.leg.device
        if self.leg.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        options: Row = {"precision": precision, "channels_last": precision != "fp32"}
        options |= {"compile": mode == "compiled", "cuda_graph": mode == "captured"}
        trainer = make_trainer(device, self.whole.scheme.num_classes, **options)
        loader = self.loader(source, size, batch)
        run = partial(time_steps, trainer, loader)
        start = time.perf_counter()
        run()  # starts workers, compiles or captures
        prepared, times = time.perf_counter() - start, run()
        keep.append(run)
        mean = statistics.mean(times[1:] or times)
        return {
            "images_per_second": 1000 * batch / mean,
            "prepared_s": prepared,
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
