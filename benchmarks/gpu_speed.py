"""Two legs of `benchmarks/gpu.py`: the speed of inference, and of training steps."""

import copy
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks._common import DTYPES, Row, Size, summarize, tf32_mode, time_calls
from benchmarks.gpu_legs import Leg, capture, ceilings, data_of, image_folder, trained_network
from benchmarks.inference import Peer, ToLabels, labels_of, load_images
from benchmarks.training import TrainingData, busy_share, make_trainer, time_steps
from lednet.data.registry import open_dataset
from lednet.device import peak_memory_mb, synchronize
from lednet.exporting.fuse import fuse_channel_shuffles, fuse_conv_bn
from lednet.inference.benchmark import count_macs
from lednet.inference.predictor import Predictor
from lednet.model import LEDNet

PEERS = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")
LOGITS, LABELS = "logits", "labels"


def free_memory(leg: Leg) -> None:
    """Free what a measurement has left in memory, and restart the count of the peak."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if leg.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(leg.device)


# Inference


class Variant(NamedTuple):
    """A network and how it is run.

    Attributes:
        network: "lednet" or a model of torchvision.
        engine: "eager", "graph" (a captured CUDA graph), or a mode of torch.compile.
        shuffles: whether a folded network keeps its channel shuffles.
    """

    network: str = "lednet"
    precision: str = "fp32"
    engine: str = "eager"
    fold: bool = True
    channels_last: bool = True
    shuffles: bool = True

    @property
    def title(self) -> str:
        own = "folded" if self.fold else "as published"
        words = [own if self.network == "lednet" else self.network]
        words += ["no shuffles"] * (not self.shuffles) + [self.engine, self.precision]
        words += ["channels last"] * (self.channels_last and self.engine == "eager")
        return ", ".join(words)


PUBLISHED = Variant(fold=False, channels_last=False)
GRAPH = Variant(precision="bf16", engine="graph")
COMPILED = Variant(precision="bf16", engine="reduce-overhead")


def make_module(variant: Variant, net: LEDNet, normalization: Row) -> ToLabels:
    """A new module for a variant, on the CPU."""
    core: nn.Module
    if variant.network != "lednet":
        core = Peer(variant.network)
    elif not variant.fold:
        core = copy.deepcopy(nn.Sequential(net.encoder, net.decoder))
    else:
        folded = fuse_conv_bn(net)
        core = nn.Sequential(folded.encoder, folded.decoder)
        core = core if variant.shuffles else fuse_channel_shuffles(folded)
    dtype = DTYPES[variant.precision]
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    return ToLabels(core, normalization, dtype, layout).eval()


@torch.no_grad()
def count_traffic(core: nn.Module, size: Size) -> int:
    """An estimate of the values that must pass through the memory for one image, without weights:
    the input and the output of every convolution and pooling. Elementwise operations count as
    part of the layer before them."""
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


def row_name(title: str, scope: str, size: Size, batch: int) -> str:
    return f"{title}; {scope} {size[0]}x{size[1]} x{batch}"


class InferenceTable:
    """Measurements of inference. Labels are compared with those of the network as published, for
    the same size and batch."""

    def __init__(self, leg: Leg):
        self.leg, self.seconds = leg, 0.05 if leg.dry else 0.7
        self.net, self.normalization = trained_network(leg.args)
        self.ceilings = ceilings(leg)
        self.expected: dict[tuple[Size, int], Tensor] = {}

    @lru_cache(maxsize=2)  # noqa: B019 - lives as long as the process
    def images(self, size: Size, batch: int) -> Tensor:
        """(batch, 3, *size) uint8, channels last as decoders write them; eight different ones."""
        few = load_images(image_folder(self.leg.args), size, min(batch, 8))
        return few[torch.arange(batch) % len(few)].contiguous(memory_format=torch.channels_last)

    def measure(self, variant: Variant, size: Size, batch: int, *scopes: str) -> None:
        slow = {"reduce-overhead": 35.0, "max-autotune": 60.0}
        for scope in scopes or (LOGITS, LABELS):
            free_memory(self.leg)
            self.leg.measure(
                row_name(variant.title, scope, size, batch),
                partial(self._measure, variant, scope, size, batch),
                cuda=variant.engine != "eager" or variant.precision in ("tf32", "fp16"),
                needs=slow.get(variant.engine, 2.0),
                limit=120.0 if variant.engine in slow else 60.0,
            )  # fmt: skip

    @torch.no_grad()
    def _measure(self, variant: Variant, scope: str, size: Size, batch: int) -> Row:
        device = self.leg.device
        start = time.perf_counter()
        module = make_module(variant, self.net, self.normalization)
        row = self._floor(module.net, variant, scope, size, batch)
        module.to(device).net.to(dtype=module.dtype).to(memory_format=module.memory_format)
        images = self.images(size, batch)
        given = images.to(device)
        function: Callable[[Tensor], Tensor] = module
        example = given
        if scope == LOGITS:
            function, example = module.logits, module.prepare(given)
        mode = torch.inference_mode() if variant.engine == "eager" else torch.no_grad()
        with mode, tf32_mode(device, variant.precision):
            call: Callable[[], Tensor] = partial(function, example)
            if variant.engine == "graph":
                call = capture(call, device)
            elif variant.engine != "eager":
                call = partial(torch.compile(function, mode=variant.engine, dynamic=False), example)
            call()
            synchronize(device)
            row["prepared_s"] = time.perf_counter() - start
            row |= summarize(time_calls(call, device, self.seconds), batch)
            output = call()
            labels = output if scope == LABELS else output.argmax(1).to(torch.uint8)
            if variant == PUBLISHED:
                self.expected[size, batch] = labels
            if variant.network == "lednet":
                row |= self._agreement(size, labels)
            plain = self.leg.find(row_name(PUBLISHED.title, scope, size, batch), "p50_ms")
            row |= {"x_published": plain / row["p50_ms"]} if plain else {}
            row |= {"floor_share": row["floor_ms"] / row["p50_ms"]} if "floor_ms" in row else {}
            if scope == LABELS:
                row |= self._with_copies(call, given, images)
        return row | {"peak_mb": peak_memory_mb(device)}

    def _with_copies(self, call: Callable[[], Tensor], given: Tensor, images: Tensor) -> Row:
        """The same from page-locked main memory and back to it, by the host's clock."""
        source, target = images, torch.empty_like(images[:, 0])
        if self.leg.cuda:
            source, target = source.pin_memory(), target.pin_memory()

        def whole() -> None:
            given.copy_(source, non_blocking=True)
            target.copy_(call(), non_blocking=True)

        return self._time_copies(whole, len(images))

    def _time_copies(self, call: Callable[[], object], batch: int) -> Row:
        times = time_calls(call, self.leg.device, self.seconds, host_clock=True)
        return {f"copies_{key}": value for key, value in summarize(times, batch).items()}

    def _agreement(self, size: Size, labels: Tensor) -> Row:
        """Share of the labels that equal those of the network as published."""
        expected = self.expected.get((size, len(labels)))
        if expected is None:
            return {}
        return {"equal_labels": (labels == expected).float().mean().item()}

    def _floor(self, core: nn.Module, variant: Variant, scope: str, size: Size, batch: int) -> Row:
        """The least time for the operations and the memory traffic at the measured rates."""
        rate = self.ceilings.get(variant.precision.replace("fp16", "bf16"))
        bandwidth = self.ceilings.get("copy")
        if not rate or not bandwidth:
            return {}
        item, pixels = DTYPES[variant.precision].itemsize, size[0] * size[1]
        outputs = self.net.num_classes if variant.network == "lednet" else 20
        ends = 4 * pixels if scope == LABELS else outputs * pixels * item
        weights = sum(p.numel() for p in core.parameters()) * item
        moved = batch * (count_traffic(core, size) * item + ends) + weights
        operations = 2 * batch * count_macs(core, size)
        times = {"flop_ms": operations / rate / 1e9, "bytes_ms": moved / bandwidth / 1e6}
        return times | {"floor_ms": max(times.values())}

    def predictor(self, backend: str, precision: str, size: Size, batch: int) -> None:
        """`Predictor` as a user calls it: uint8 in main memory to label maps there."""

        def measure() -> Row:
            images = self.images(size, batch)
            predictor = Predictor(
                self.net, size, **self.normalization, device=self.leg.device, backend=backend,
                precision=precision,
            )  # fmt: skip
            run = labels_of(predictor)
            row = self._time_copies(partial(run, images), batch)
            row |= {"peak_mb": peak_memory_mb(self.leg.device)}
            return row | self._agreement(size, run(images).to(self.leg.device))

        free_memory(self.leg)
        self.leg.measure(
            row_name(f"Predictor, {backend}, {precision}", LABELS, size, batch), measure, limit=100,
            needs=30 if backend == "compiled" else 2, cuda=backend == "compiled",
        )  # fmt: skip


def inference(leg: Leg) -> None:
    """Measure the speed of the network, and how near it is to the limits of the machine."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 5  # algorithms tried for each convolution
    table = InferenceTable(leg)
    small, large, (one, eight, many) = (512, 1024), (1024, 2048), (1, 8, 32)
    if leg.dry:
        small, large, (one, eight, many) = (64, 128), (64, 128), (1, 2, 2)
    folded, unshuffled = Variant(channels_last=False), GRAPH._replace(shuffles=False)
    graph16 = GRAPH._replace(precision="fp16")
    # The most valuable first: what follows is left out when the time is over.
    for variant in (PUBLISHED, GRAPH, folded, unshuffled):
        table.measure(variant, small, one)
    for variant in (PUBLISHED, GRAPH):
        table.measure(variant, small, many)
    for network in PEERS:
        peer = Variant(network, fold=False, channels_last=False)
        table.measure(peer, small, one, LOGITS)
        table.measure(Variant(network, "bf16", "graph", fold=False), small, one, LOGITS)
    for variant in (PUBLISHED, GRAPH):
        table.measure(variant, large, one)
    table.measure(COMPILED, small, one, LABELS)
    table.predictor("compiled", "bf16", small, one)
    for precision in DTYPES:
        table.measure(Variant(precision=precision), small, one, LOGITS)
    table.measure(PUBLISHED._replace(precision="tf32"), small, one, LOGITS)
    for precision in ("fp16", "tf32", "fp32"):
        table.measure(GRAPH._replace(precision=precision), small, one, LOGITS)
    table.predictor("eager", "fp32", small, one)
    for size, batch in ((small, eight), (large, eight), (large, many)):
        for variant in (PUBLISHED, GRAPH):
            table.measure(variant, size, batch)
    table.measure(COMPILED, small, many, LABELS)
    table.measure(COMPILED, small, one, LOGITS)
    table.predictor("compiled", "bf16", small, many)
    for variant in (graph16, unshuffled, Variant(precision="bf16"), folded):
        table.measure(variant, small, many)
    for network in PEERS:
        table.measure(COMPILED._replace(network=network, fold=False), small, one, LOGITS)
    table.measure(COMPILED, large, one, LABELS)
    table.measure(COMPILED._replace(engine="max-autotune"), small, one, LOGITS)


# Training

PLAIN = "files, fp32, eager"


class TrainingTable:
    """Measurements of training steps, on the first images of the data set."""

    def __init__(self, leg: Leg, folder: Path):
        self.leg, self.folder = leg, folder
        self.steps, self.workers = (2, 0) if leg.dry else (16, min(12, os.cpu_count() or 1))
        self.whole = open_dataset(*data_of(leg.args), "train")

    @lru_cache(maxsize=1)  # noqa: B019 - lives as long as the process
    def data(self, size: Size) -> TrainingData:
        folder, count = self.folder / f"{size[0]}x{size[1]}", 8 if self.leg.dry else 256
        return TrainingData(self.whole, size, count, self.leg.device, folder, self.workers)

    def measure(self, way: str, size: Size, batch: int, profile: bool = False) -> None:
        """Measure a way to train.

        Args:
            way: source ("files", "cache" or "device"), precision, and mode ("eager", "compiled"
                or "captured"), with commas.
            profile: also measure the share of the time in which the GPU computes.
        """
        source, precision, mode = way.split(", ")
        needs, limit = (30.0, 120.0) if mode == "compiled" else (3.0, 60.0)
        free_memory(self.leg)
        self.leg.measure(
            f"{way} {size[0]}x{size[1]} x{batch}",
            partial(self._measure, source, precision, mode, size, batch, profile),
            cuda=mode != "eager" or precision in ("tf32", "fp16"), needs=needs, limit=limit,
        )  # fmt: skip

    def _measure(
        self, source: str, precision: str, mode: str, size: Size, batch: int, profile: bool
    ) -> Row:
        device = self.leg.device
        trainer = make_trainer(
            device, self.whole.scheme.num_classes, "modern", precision=precision,
            channels_last=precision != "fp32", compile=mode == "compiled",
            cuda_graph=mode == "captured",
        )  # fmt: skip
        run = partial(time_steps, trainer, self.data(size).loader(source, batch, self.steps))
        start = time.perf_counter()
        run()  # starts workers, compiles or captures
        prepared, times = time.perf_counter() - start, run()
        rate = 1000 * batch / statistics.mean(times[1:])
        row = summarize(times, batch) | {"prepared_s": prepared, "peak_mb": peak_memory_mb(device)}
        row["images_per_second"], _ = rate, row.pop("fps")  # the mean includes waiting for data
        plain = self.leg.find(f"{PLAIN} {size[0]}x{size[1]} x{batch}", "images_per_second")
        row |= {"x_plain": rate / plain} if plain else {}
        self.leg.note(**row)  # a profiler that fails does not lose them
        return row | ({"busy": busy_share(run, device)} if profile else {})


def training(leg: Leg) -> None:
    """Measure the speed of training steps."""
    torch.backends.cudnn.benchmark = True
    small, odd, large = (256, 512), (360, 480), (512, 1024)
    if leg.dry:
        small, odd, large = (64, 128), (60, 80), (64, 128)
    six, sixteen, many, most = (1, 2, 2, 2) if leg.dry else (6, 16, 32, 64)
    best = "device, bf16, captured"
    with tempfile.TemporaryDirectory(dir=leg.args.work) as folder:
        table = TrainingTable(leg, Path(folder))
        for way in (PLAIN, best, "device, bf16, eager", "device, fp32, eager"):
            table.measure(way, small, many, profile=True)
        for way in ("device, tf32, captured", "device, fp32, captured", "cache, bf16, captured",
                    "files, bf16, captured"):  # fmt: skip
            table.measure(way, small, many)
        table.measure(PLAIN, small, six)
        table.measure(best, small, six)
        table.measure(best, small, most)
        for size in (large, odd):
            table.measure(PLAIN, size, sixteen)
            table.measure(best, size, sixteen, profile=True)
        table.measure("device, bf16, compiled", small, many, profile=True)
        for way in ("cache, fp32, eager", "device, tf32, eager"):
            table.measure(way, small, many)
        for size, batch in ((large, six), (large, many), (odd, many), (small, sixteen)):
            table.measure(PLAIN, size, batch)
            table.measure(best, size, batch)
