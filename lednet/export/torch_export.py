"""`torch.export` archives, run by PyTorch."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lednet.export.common import Bounds, ExportedModel, RunOptions, Shape, opening, trace
from lednet.export.safe_archive import inert_copy
from lednet.export.wrappers import BytesToLogits


def write_torch(
    module: BytesToLogits,
    path: str | os.PathLike,
    shape: Shape,
    dynamic: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write an archive; `torch.export.load(path).module()` runs it.

    Args:
        module, shape: as of `lednet.export.onnx.to_onnx`.
        dynamic: take any batch, and sides from `MIN_TRACED_SIDE` pixels.
        metadata: written to the archive's extra file "lednet.json".
    """
    program = trace(module, shape, dynamic)
    torch.export.save(program, path, extra_files={"lednet.json": json.dumps(metadata or {})})


def load_torch(path: str | os.PathLike, options: RunOptions) -> ExportedModel:
    """Open an archive of `write_torch`, on the CPU, with PyTorch's own number of threads. What
    else an archive may hold is never run.

    Raises:
        UserError: no such file, or no such archive.
    """
    extra = {"lednet.json": ""}

    def bounds(n: Any) -> Bounds:
        if isinstance(n, int):
            return n, n
        return max(1, int(program.range_constraints[n.node.expr].lower)), None

    with opening(path):
        program = torch.export.load(inert_copy(Path(path)), extra_files=extra)
        module = program.module()
        image = next(
            node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
        )
        batch, height, width, _ = map(bounds, image.meta["val"].shape)
        metadata = json.loads(extra["lednet.json"] or "{}")

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(images)).numpy()

    return ExportedModel(Path(path), "torch.export", (batch, height, width), metadata, run)
