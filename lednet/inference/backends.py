"""Engines that run the network: each a function from uint8 images to logits at 1/8 size."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lednet.device import autocast
from lednet.errors import UserError
from lednet.export.formats import FORMATS, ExportedModel, load, missing_packages, require_packages
from lednet.export.wrappers import BytesToLogits

InferenceFn = Callable[[Tensor], Tensor]
"""images (N, H, W, 3) uint8 on the device -> (N, C, ceil(H/8), ceil(W/8)) float32 there"""

BACKENDS = ("eager", "compiled", "onnxruntime", "openvino")
_FILE_FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Backend -> format of the file that it is handed."""
_FIRST_WITHOUT_TRITON = (7, 0)
"""Compute capability below which torch.compile has no code generator (Pascal and older)."""


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
    return next(
        filter(lambda name: is_available(name, device), ("openvino", "onnxruntime")), "eager"
    )


def build_runner(
    backend: str, graph: BytesToLogits, device: torch.device, precision: str = "fp32"
) -> InferenceFn:
    """Prepare `graph` for running.

    Args:
        backend: one of `BACKENDS`. "eager" and "compiled" run on any device, the others
            where `FORMATS` says.
        precision: of `lednet.device.AMP_DTYPES`.

    Raises:
        UserError: an unknown backend, one that lacks its package, device or precision.
    """
    if backend not in BACKENDS:
        raise UserError(f"no backend {backend}: choose one of auto, {', '.join(BACKENDS)}")
    with autocast(device, precision):
        pass  # refuses what the device lacks now, not at the first image
    if backend in ("eager", "compiled"):
        return _torch_core(graph, device, precision, compiled=backend == "compiled")
    format = _FILE_FORMATS[backend]
    require_packages(format)
    row = FORMATS[format]
    for name, wanted, can in (
        ("device", device.type, row.devices), ("precision", precision, row.precisions)
    ):  # fmt: skip
        if wanted not in can:
            raise UserError(f"backend {backend} does not do {wanted}: give --{name} {can[0]}")

    def make(example: Tensor) -> InferenceFn:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{row.suffix}"
            row.write(graph, path, tuple(example.shape[:3]))
            return exported_runner(open_exported(path, device, precision))

    return _PerSize(make)


def open_exported(path: Path, device: torch.device, precision: str = "fp32") -> ExportedModel:
    """`lednet.export.formats.load` with as many threads as PyTorch uses."""
    return load(path, threads=torch.get_num_threads(), device=device.type, precision=precision)


def exported_runner(exported: ExportedModel) -> InferenceFn:
    """A file with logits as a core; one for single images gets them one by one."""
    size = 1 if exported.bounds[0] == (1, 1) else None

    def core(images: Tensor) -> Tensor:
        batches = images.cpu().split(size or len(images))
        answers = [torch.from_numpy(exported(batch.numpy())) for batch in batches]
        return (torch.cat(answers) if len(answers) > 1 else answers[0]).to(images.device)

    return core


def _torch_core(
    graph: BytesToLogits, device: torch.device, precision: str, compiled: bool
) -> InferenceFn:
    graph = graph.to(device).to(memory_format=torch.channels_last).eval()
    run: Callable[..., Tensor] = graph
    if compiled:
        if device.type != "cuda":
            run = torch.compile(graph)
        elif torch.cuda.get_device_capability(device) < _FIRST_WITHOUT_TRITON:
            return _PerSize(lambda example: _cuda_graph_core(graph, example))
        else:
            run = torch.compile(graph, mode="reduce-overhead")  # in a CUDA graph

    def core(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(device, precision):
            # A copy: the next call of a CUDA graph writes to the same memory.
            return run(images).to(torch.float32, copy=compiled)

    return core


def _cuda_graph_core(graph: BytesToLogits, example: Tensor) -> InferenceFn:
    recorded = torch.cuda.make_graphed_callables(graph, (example,))
    # PyTorch does not say what comes out of it.
    return lambda images: recorded(images).clone()  # type: ignore[union-attr]


class _PerSize:
    """A core for engines that are fastest at one fixed input size: made at its first use."""

    def __init__(self, make: Callable[[Tensor], InferenceFn]):
        self.make = make
        self.cores: dict[tuple[int, ...], InferenceFn] = {}

    def __call__(self, images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if shape not in self.cores:
            self.cores[shape] = self.make(images)
        return self.cores[shape](images)
