"""`torch.export` archives, run by PyTorch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lednet.exporting.common import (
    TRACE_LOCK,
    Bounds,
    ExportedModel,
    ExportOptions,
    RunOptions,
    opening,
    trace,
)
from lednet.exporting.safe_archive import copy_safe_archive
from lednet.exporting.wrappers import EndToEndModel


def write_torch(module: EndToEndModel, path: Path, options: ExportOptions) -> None:
    """Write an archive that `torch.export.load(path).module()` runs.

    The metadata are its extra file "lednet.json". A dynamic archive takes sides from
    `MIN_TRACED_SIDE` pixels.
    """
    extra_files = {"lednet.json": json.dumps(options.metadata)}
    with TRACE_LOCK:
        torch.export.save(trace(module, options), path, extra_files=extra_files)


def load_torch(path: Path, options: RunOptions) -> ExportedModel:
    """Open an archive of `write_torch` on the CPU. Code in the archive is never run.

    Raises:
        UserError: no such file, or not such an archive.
    """
    extra = {"lednet.json": ""}

    def bounds(n: Any) -> Bounds:
        if isinstance(n, int):
            return n, n
        return max(1, int(program.range_constraints[n.node.expr].lower)), None

    with TRACE_LOCK, opening(path):
        program = torch.export.load(copy_safe_archive(path), extra_files=extra)
        module = program.module()
        image = next(
            node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
        )
        batch, height, width, _ = map(bounds, image.meta["val"].shape)
        metadata = json.loads(extra["lednet.json"] or "{}")

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(images)).numpy()

    return ExportedModel(path, "torch.export", (batch, height, width), metadata, run)
