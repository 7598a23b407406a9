"""What the formats share: an opened file, and the graph that all of them are written from."""

import contextlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from lednet.checkpoint import require_meta
from lednet.errors import UserError
from lednet.export.wrappers import BytesToLabels, BytesToLogits
from lednet.model import LEDNet

TRACED_SHAPE = (2, 160, 224)
"""(N, H, W) of the example that a dynamic graph is traced with."""

MIN_TRACED_SIDE = 65
"""From here on no level of the pyramid is a single pixel, which is traced differently."""

Shape = tuple[int, int, int]
"""(N, H, W) of the images that a file of fixed size takes."""

Bounds = tuple[int, int | None]
"""Least and largest length of an axis; None where nothing bounds it."""


class RunOptions(NamedTuple):
    """How a file is run.

    Attributes:
        threads: of one answer on a CPU, where the runtime can be told; None leaves it to it.
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16", of all that is not int8 in the file.
    """

    threads: int | None = None
    device: str = "cpu"
    precision: str = "fp32"


_STRANGE = (KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError)
"""What metadata of another kind lead to."""


@dataclass(frozen=True)
class ExportedModel:
    """An exported file in its own runtime: call it with images (N, H, W, 3) uint8 RGB.

    Attributes:
        runtime: what answers.
        bounds: of batch, height and width.
        metadata: as `lednet.export.exporter.describe` wrote it.
        run: what answers, once the images are known to fit.
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
        if not all(
            least <= length and (most is None or length <= most)
            for length, (least, most) in zip(images.shape, self.bounds, strict=False)
        ):
            taken = [
                f"{least}" if most == least else f"{least} or more" for least, most in self.bounds
            ]
            raise UserError(
                f"{self.path} takes batch {taken[0]}, height {taken[1]} and width {taken[2]}, not "
                f"{' x '.join(map(str, images.shape[:3]))}: resize the images, or export for "
                "their size or with --dynamic"
            )
        return self.run(np.ascontiguousarray(images))

    @property
    def meta(self) -> dict[str, Any]:
        """The metadata with its JSON read, under the keys of the weights' own "meta".

        Raises:
            UserError: the file was not written by `lednet.export.exporter`.
        """
        try:
            told = {
                key: value if key in ("lednet", "output", "dataset") else json.loads(value)
                for key, value in self.metadata.items()
            }
            require_meta(told, self.path)
            missing = {"output", "precision", "size"} - told.keys()
            if missing:
                raise KeyError(*missing)
            return told | {"size": tuple(told["size"])}
        except _STRANGE as error:
            raise self._unknown() from error

    def _unknown(self) -> UserError:
        return UserError(
            f"{self.path} does not say what network it holds: write it with utils/export_model.py"
        )

    def build_meta_model(self) -> LEDNet:
        """The network that the file was written from, without weights (on "meta")."""
        meta = self.meta
        try:
            with torch.device("meta"):
                return LEDNet(meta["outputs"], meta["variant"], meta["pyramid_channels"]).eval()
        except _STRANGE as error:
            raise self._unknown() from error


def import_optional(name: str) -> ModuleType:
    """An optional package, kept from telling its maker that it is used.

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
def opening(path: str | os.PathLike) -> Iterator[None]:
    """Name the file when a runtime, each with errors of its own, cannot open it."""
    if not Path(path).is_file():
        raise UserError(f"no exported network at {path}: write it with utils/export_model.py")
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} cannot be opened as {Path(path).suffix}: export it again"
        ) from error


def trace(module: BytesToLogits, shape: Shape, dynamic: bool) -> ExportedProgram:
    """The graph of `module` for images of `shape`, or for any batch and size."""
    options: dict[str, Any] = {}
    if dynamic:
        # That both halves of a downsampler have one size is beyond the tracer's algebra;
        # it becomes a check at run time instead of a refusal.
        deferred = "prefer_deferred_runtime_asserts_over_guards"
        if deferred not in inspect.signature(torch.export.export).parameters:
            raise UserError(f"--dynamic needs a torch newer than {torch.__version__}: update it")
        sides = {1: Dim("height", min=MIN_TRACED_SIDE), 2: Dim("width", min=MIN_TRACED_SIDE)}
        options = {"dynamic_shapes": ({0: Dim("batch", min=1), **sides},), deferred: True}
        shape = TRACED_SHAPE
    example = torch.zeros(*shape, 3, dtype=torch.uint8)
    # Wrapped, because torch 2.6 gives a buffer of the outermost module and the operation
    # of its name, "mean", one name in ONNX.
    wrapped = nn.Sequential(module).eval()
    with torch.no_grad():
        program = torch.export.export(wrapped, (example,), strict=False, **options)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def output_name(module: BytesToLogits) -> str:
    return "labels" if isinstance(module, BytesToLabels) else "logits"
