"""Engines that run the network: each a function from uint8 images to logits at 1/8 size."""

import contextlib
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lednet.deploy.export import compile_openvino
from lednet.deploy.graph import BytesToLogits
from lednet.errors import UserError
from lednet.precision import autocast

Core = Callable[[Tensor], Tensor]
"""images (N, H, W, 3) uint8 on the device -> (N, C, ceil(H/8), ceil(W/8)) float32 there"""

BACKENDS = ("eager", "compiled", "onnxruntime", "openvino")
_PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxscript"),  # the second writes the file for the first
    "openvino": ("openvino",),
}
_FIRST_WITHOUT_TRITON = (7, 0)
"""Compute capability below which torch.compile has no code generator (Pascal and older)."""


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def available(backend: str, device: torch.device) -> bool:
    """Whether `backend` runs on `device` with what is installed."""
    if backend in _PACKAGES:
        return device.type == "cpu" and all(map(_installed, _PACKAGES[backend]))
    return backend in BACKENDS


def choose_backend(device: torch.device) -> str:
    """The fastest backend for `device` whose packages are installed (see benchmarks/)."""
    if device.type == "cuda":
        return "compiled"
    return next(filter(lambda name: available(name, device), ("openvino", "onnxruntime")), "eager")


def make_core(
    backend: str, graph: BytesToLogits, device: torch.device, precision: str = "fp32"
) -> Core:
    """Prepare `graph` for running.

    Args:
        backend: one of `BACKENDS`. "eager" and "compiled" run on any device, the others
            on the CPU.
        precision: of `lednet.precision.AMP_DTYPES`.

    Raises:
        UserError: an unknown backend, one that lacks its package, device or precision.
    """
    if backend not in BACKENDS:
        raise UserError(f"no backend {backend}: choose one of auto, {', '.join(BACKENDS)}")
    with autocast(device, precision):
        pass  # refuses what the device lacks now, not at the first image
    if backend in ("eager", "compiled"):
        return _torch_core(graph, device, precision, compiled=backend == "compiled")
    missing = [package for package in _PACKAGES[backend] if not _installed(package)]
    if missing:
        raise UserError(f"backend {backend} is not installed: pip install {' '.join(missing)}")
    if device.type != "cpu":
        raise UserError(f"backend {backend} runs on the CPU here: give --device cpu")
    if backend == "onnxruntime":
        if precision != "fp32":
            raise UserError("backend onnxruntime computes in fp32: give --precision fp32")
        return _PerSize(lambda example: _onnxruntime_core(graph, example))
    if precision == "fp16":
        raise UserError("backend openvino computes in fp32 or bf16 on a CPU")
    return _PerSize(lambda example: _openvino_core(graph, example, precision))


def _torch_core(graph: BytesToLogits, device: torch.device, precision: str, compiled: bool) -> Core:
    graph = graph.to(device, memory_format=torch.channels_last).eval()
    run = graph
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


def _cuda_graph_core(graph: BytesToLogits, example: Tensor) -> Core:
    recorded = torch.cuda.make_graphed_callables(graph, (example,))
    return lambda images: recorded(images).clone()


class _PerSize:
    """A core for engines that are fastest at one fixed input size: made at its first use."""

    def __init__(self, make: Callable[[Tensor], Core]):
        self.make, self.cores = make, {}

    def __call__(self, images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if shape not in self.cores:
            self.cores[shape] = self.make(images)
        return self.cores[shape](images)


def _onnxruntime_core(graph: BytesToLogits, example: Tensor) -> Core:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, _quiet_exporter():
        path = Path(folder) / "network.onnx"
        torch.onnx.export(
            graph, (example,), path, dynamo=True, external_data=False, verbose=False,
            input_names=["image"],
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs each optional package that it does without."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _openvino_core(graph: BytesToLogits, example: Tensor, precision: str) -> Core:
    import openvino

    model = openvino.convert_model(torch.export.export(graph, (example,)))
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = compile_openvino(model, "CPU", hints)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])
