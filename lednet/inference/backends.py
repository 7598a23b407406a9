"""Inference backends: functions from uint8 images to logits at 1/8 of their size."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from lednet.device import autocast
from lednet.errors import UserError
from lednet.exporting.common import TRACE_LOCK
from lednet.exporting.formats import (
    FORMATS,
    ExportedModel,
    RunOptions,
    missing_packages,
    require_packages,
    require_supported,
)
from lednet.exporting.wrappers import EndToEndModel
from lednet.inference.engine_cache import is_cached, open_exported

InferenceFn = Callable[[Tensor], Tensor]
"""images (N, H, W, 3) uint8 on the device -> (N, C, ceil(H/8), ceil(W/8)) float32 there.
Threads may share one."""

BACKENDS = ("eager", "compiled", "onnxruntime", "openvino")
_FILE_FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Backend -> format of the file that it runs."""
FEW_IMAGES, FEW_IMAGES_CACHED = 100, 10
"""Up to this many images, PyTorch has finished before an engine's file is exported, or opened
from the cache (docs/speed.md#first-result)."""
_FIRST_WITH_TRITON = (7, 0)
"""Compute capability from which torch.compile can generate code (not for Pascal and older)."""


def is_available(backend: str, device: torch.device) -> bool:
    """Whether `backend` runs on `device` with what is installed."""
    if backend in _FILE_FORMATS:
        format = _FILE_FORMATS[backend]
        return device.type in FORMATS[format].devices and not missing_packages(format)
    return backend in BACKENDS


def choose_backend(
    device: torch.device,
    graph: EndToEndModel | None = None,
    size: tuple[int, int] = (0, 0),
    images: int | None = None,
) -> str:
    """The fastest backend for `device` whose packages are installed (see benchmarks/).

    Args:
        graph, size: the network, and (height, width) of its input.
        images: number of images to predict, if known: for few, "eager" has no start-up time.
    """
    if device.type == "cuda":
        backend = "compiled"
    else:
        engines = (b for b in ("openvino", "onnxruntime") if is_available(b, device))
        backend = next(engines, "eager")
    if images is None or images > FEW_IMAGES:
        return backend
    format = _FILE_FORMATS.get(backend)
    cached = graph and format and is_cached(graph, format, (1, *size))
    return backend if cached and images > FEW_IMAGES_CACHED else "eager"


def build_runner(
    backend: str,
    graph: EndToEndModel,
    device: torch.device,
    precision: str = "fp32",
    cache: bool = True,
) -> InferenceFn:
    """Build the function that runs `graph` on a backend.

    Args:
        backend: one of `BACKENDS`. "eager" and "compiled" run on any device, the others
            where `FORMATS` says.
        graph: with output "logits"; moved to `device`.
        precision: a key of `lednet.device.AMP_DTYPES`.
        cache: keep what "onnxruntime" and "openvino" export; see `lednet.inference.engine_cache`.

    Raises:
        UserError: an unknown backend, or one without its package, the device or the precision.
    """
    if backend not in BACKENDS:
        raise UserError(f"no backend {backend}: choose one of auto, {', '.join(BACKENDS)}")
    with autocast(device, precision):
        pass  # raises now, not at the first image
    if backend not in _FILE_FORMATS:
        return _torch_runner(graph, device, precision, compiled=backend == "compiled")
    format = _FILE_FORMATS[backend]
    require_packages(format)
    row = FORMATS[format]
    options = RunOptions(torch.get_num_threads(), device.type, precision)
    require_supported(row, f"backend {backend}", options)

    def build(example: Tensor) -> InferenceFn:
        batch, height, width, _ = example.shape
        return exported_runner(open_exported(graph, format, (batch, height, width), options, cache))

    return _RunnerPerSize(build)


def exported_runner(exported: ExportedModel) -> InferenceFn:
    """An inference function that runs a file with logits.

    A file that takes single images gets the images of a batch one by one.
    """
    takes_one = exported.bounds[0] == (1, 1)

    def run(images: Tensor) -> Tensor:
        batches = images.cpu().split(1 if takes_one else len(images))
        logits = [torch.from_numpy(exported(batch.numpy())) for batch in batches]
        return (torch.cat(logits) if len(logits) > 1 else logits[0]).to(images.device)

    return run


def _torch_runner(
    graph: EndToEndModel, device: torch.device, precision: str, compiled: bool
) -> InferenceFn:
    graph = graph.to(device).to(memory_format=torch.channels_last).eval()
    cuda = device.type == "cuda"
    has_compiler = not cuda or torch.cuda.get_device_capability(device) >= _FIRST_WITH_TRITON
    forward: Callable[..., Tensor] = torch.compile(graph) if compiled and has_compiler else graph

    def run(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(device, precision):
            return forward(images).to(torch.float32)

    def build(example: Tensor) -> InferenceFn:
        with TRACE_LOCK:
            if cuda:
                return _CudaGraphRunner(run, example)
            run(example)  # compiles for this size
            return run

    return _RunnerPerSize(build) if compiled else run


class _CudaGraphRunner:
    """A forward pass recorded in a CUDA graph for one size.

    torch.compile's own CUDA graphs (mode "reduce-overhead") run only in the thread that first
    used them. All calls share the graph's memory: a lock keeps them apart in the host's threads,
    and an event in their streams.
    """

    def __init__(self, forward: InferenceFn, example: Tensor):
        self._lock, self._done = threading.Lock(), torch.cuda.Event()
        with torch.inference_mode(False):
            self._images = torch.empty_like(example)
        self._images.copy_(example)
        stream = torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and chooses algorithms
                forward(self._images)
        torch.cuda.current_stream(example.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._logits = forward(self._images)

    def __call__(self, images: Tensor) -> Tensor:
        with self._lock:
            self._done.wait()  # of the last call, which may be in another stream
            self._images.copy_(images)
            self._graph.replay()
            logits = self._logits.clone()
            self._done.record()
            return logits


class _RunnerPerSize:
    """A runner for engines that are fastest at a fixed input size: built at its first use.

    Other threads wait for a size that is being built, and use those that are built already.
    """

    def __init__(self, build: Callable[[Tensor], InferenceFn]):
        self.build = build
        self.runners: dict[tuple[int, ...], InferenceFn] = {}
        self._lock = threading.Lock()

    def __call__(self, images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if shape not in self.runners:
            with self._lock:
                if shape not in self.runners:
                    self.runners[shape] = self.build(images)
        return self.runners[shape](images)
