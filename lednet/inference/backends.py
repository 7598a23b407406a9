"""Inference backends: functions from uint8 images to logits at 1/8 of their size."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lednet.device import autocast
from lednet.errors import UserError
from lednet.export.formats import (
    FORMATS,
    ExportedModel,
    ExportOptions,
    RunOptions,
    missing_packages,
    require_packages,
    require_supported,
)
from lednet.export.wrappers import EndToEndModel

InferenceFn = Callable[[Tensor], Tensor]
"""images (N, H, W, 3) uint8 on the device -> (N, C, ceil(H/8), ceil(W/8)) float32 there"""

BACKENDS = ("eager", "compiled", "onnxruntime", "openvino")
_FILE_FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Backend -> format of the file that it runs."""
_FIRST_WITH_TRITON = (7, 0)
"""Compute capability from which torch.compile can generate code (not for Pascal and older)."""


def is_available(backend: str, device: torch.device) -> bool:
    """Whether `backend` runs on `device` with what is installed."""
    if backend in _FILE_FORMATS:
        format = _FILE_FORMATS[backend]
        return device.type in FORMATS[format].devices and not missing_packages(format)
    return backend in BACKENDS


def choose_backend(device: torch.device) -> str:
    """The fastest backend for `device` whose packages are installed (see benchmarks/)."""
    if device.type == "cuda":
        return "compiled"
    return next((b for b in ("openvino", "onnxruntime") if is_available(b, device)), "eager")


def build_runner(
    backend: str, graph: EndToEndModel, device: torch.device, precision: str = "fp32"
) -> InferenceFn:
    """Build the function that runs `graph` on a backend.

    Args:
        backend: one of `BACKENDS`. "eager" and "compiled" run on any device, the others
            where `FORMATS` says.
        graph: with output "logits"; moved to `device`.
        precision: a key of `lednet.device.AMP_DTYPES`.

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
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{row.suffix}"
            batch, height, width, _ = example.shape
            row.write(graph, path, ExportOptions((batch, height, width)))
            return exported_runner(row.load(path, options))

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
    forward: Callable[..., Tensor] = graph
    if compiled and device.type != "cuda":
        forward = torch.compile(graph)
    elif compiled:
        if torch.cuda.get_device_capability(device) < _FIRST_WITH_TRITON:
            return _RunnerPerSize(lambda example: _cuda_graph_runner(graph, example))
        forward = torch.compile(graph, mode="reduce-overhead")  # in a CUDA graph

    def run(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(device, precision):
            # A copy: the next call of a CUDA graph writes to the same memory.
            return forward(images).to(torch.float32, copy=compiled)

    return run


def _cuda_graph_runner(graph: EndToEndModel, example: Tensor) -> InferenceFn:
    recorded = torch.cuda.make_graphed_callables(graph, (example,))
    # PyTorch does not annotate what it returns.
    return lambda images: recorded(images).clone()  # type: ignore[union-attr]


class _RunnerPerSize:
    """A runner for engines that are fastest at a fixed input size: built at its first use."""

    def __init__(self, build: Callable[[Tensor], InferenceFn]):
        self.build = build
        self.runners: dict[tuple[int, ...], InferenceFn] = {}

    def __call__(self, images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if shape not in self.runners:
            self.runners[shape] = self.build(images)
        return self.runners[shape](images)
