"""Parts that all formats share: options, an opened file, and the traced graph."""

import contextlib
import importlib
import inspect
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from lednet.checkpoint import require_meta
from lednet.errors import UserError
from lednet.exporting.wrappers import EndToEndModel
from lednet.model import LEDNet

TRACED_SHAPE = (2, 160, 224)
"""(N, H, W) of the example input that a dynamic graph is traced with."""

MIN_TRACED_SIDE = 65
"""Smallest height and width in pixels of a dynamic `torch.export` graph: no pyramid level is a
single pixel, which would be traced differently."""

TRACE_LOCK = threading.RLock()
"""Held while a graph is traced, converted or compiled, which PyTorch does in one thread."""

Bounds = tuple[int, int | None]
"""Smallest and largest length of an axis; None if it is unbounded."""


@dataclass(frozen=True)
class ExportOptions:
    """What a writer needs besides the model.

    Attributes:
        shape: (N, H, W) of the images that the file takes.
        dynamic: take any batch, height and width instead.
        metadata: stored in the file.
        calibration: images (1, H, W, 3) uint8 RGB to quantize to int8 with; None writes float32.
    """

    shape: tuple[int, int, int]
    dynamic: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    calibration: Sequence[np.ndarray] | None = None


class RunOptions(NamedTuple):
    """How a file is run.

    Attributes:
        threads: CPU threads, if the runtime lets the caller choose; None for its default.
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16", for the operations that are not quantized to int8.
    """

    threads: int | None = None
    device: str = "cpu"
    precision: str = "fp32"


@dataclass(frozen=True)
class ExportedModel:
    """An exported file in its own runtime: call it with images (N, H, W, 3) uint8 RGB.

    Attributes:
        path: path of the file, for messages.
        runtime: name of the runtime.
        bounds: limits of batch, height and width.
        metadata: as `lednet.exporting.exporter.describe` wrote them.
        run: forward pass of the runtime, for images that have been checked. Threads may share it.
    """

    path: Path
    runtime: str
    bounds: tuple[Bounds, ...]
    metadata: dict[str, str]
    run: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Labels (N, H, W) uint8 or logits (N, C, ceil(H/8), ceil(W/8)) float32.

        Raises:
            UserError: not uint8 RGB images, or of a size that the file does not take.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UserError(
                f"{self.path} takes images (N, H, W, 3) of bytes, not {images.dtype} of shape "
                f"{images.shape}: convert them to 8-bit RGB"
            )
        limits = [*zip(images.shape, self.bounds, strict=False)]
        if not all(low <= n and (high is None or n <= high) for n, (low, high) in limits):
            batch, height, width = (
                f"{low}" if high == low else f"{low} or more" for low, high in self.bounds
            )
            raise UserError(
                f"{self.path} takes batch {batch}, height {height} and width {width}, not "
                f"{' x '.join(map(str, images.shape[:3]))}: resize the images, or export for "
                "their size or with --dynamic"
            )
        return self.run(np.require(images, requirements=["C", "W"]))

    @property
    def meta(self) -> dict[str, Any]:
        """The metadata parsed from JSON, with the keys of a checkpoint's "meta".

        Raises:
            UserError: the file was not written by `lednet.exporting.exporter`.
        """
        with self._require_metadata():
            meta = {
                key: value if key in ("lednet", "output", "dataset") else json.loads(value)
                for key, value in self.metadata.items()
            }
            require_meta(meta, self.path)
            if not {"output", "precision", "size"} <= meta.keys():
                raise KeyError("output, precision or size")
            return meta | {"size": tuple(meta["size"])}

    def build_meta_model(self) -> LEDNet:
        """The network that the file was written from, without weights (on device "meta")."""
        meta = self.meta
        with self._require_metadata(), torch.device("meta"):
            return LEDNet(meta["outputs"], meta["variant"], meta["pyramid_channels"]).eval()

    @contextlib.contextmanager
    def _require_metadata(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # depends on where the code expects another value
            raise UserError(
                f"{self.path} does not say what network it holds: write it with "
                "utils/export_model.py"
            ) from error


def import_optional(name: str) -> ModuleType:
    """Import an optional package with its usage reports to the vendor disabled.

    Raises:
        UserError: not installed, with the command that installs it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of ONNX Runtime
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # of OpenVINO
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.split(".")[0]
        raise UserError(f"{package} is not installed: pip install {package}") from error


@contextlib.contextmanager
def opening(path: Path) -> Iterator[None]:
    """Turn any error of a runtime that cannot open a file into a UserError that names it."""
    if not path.is_file():
        raise UserError(f"no exported network at {path}: write it with utils/export_model.py")
    try:
        yield
    except Exception as error:
        raise UserError(f"{path} cannot be opened as {path.suffix}: export it again") from error


def trace(module: EndToEndModel, options: ExportOptions) -> ExportedProgram:
    """The `torch.export` graph of `module`.

    Raises:
        UserError: dynamic sizes with a torch that cannot trace them.
    """
    arguments: dict[str, Any] = {}
    shape = options.shape
    if options.dynamic:
        # The tracer cannot prove that both halves of a downsampler have one size; it becomes a
        # check at run time instead of an error.
        deferred = "prefer_deferred_runtime_asserts_over_guards"
        if deferred not in inspect.signature(torch.export.export).parameters:
            raise UserError(f"--dynamic needs a torch newer than {torch.__version__}: update it")
        sides = {1: Dim("height", min=MIN_TRACED_SIDE), 2: Dim("width", min=MIN_TRACED_SIDE)}
        arguments = {"dynamic_shapes": ({0: Dim("batch", min=1), **sides},), deferred: True}
        shape = TRACED_SHAPE
    example = torch.zeros(*shape, 3, dtype=torch.uint8)
    # Wrapped, because torch 2.6 gives a buffer of the outermost module and the operation
    # of its name, "mean", one name in ONNX.
    wrapped = nn.Sequential(module).eval()
    with torch.no_grad():
        program = torch.export.export(wrapped, (example,), strict=False, **arguments)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program
