"""ExecuTorch programs for phones, their networks computed by XNNPACK."""

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lednet.errors import UserError
from lednet.export.common import ExportedModel, RunOptions, Shape, import_optional, opening, trace
from lednet.export.wrappers import BytesToLogits


@contextlib.contextmanager
def _executorch_imports() -> Iterator[None]:
    """Turn what executorch raises beside a torch that it was not built for into a sentence."""
    import_optional("executorch")
    try:
        yield
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"executorch {importlib.metadata.version('executorch')} does not load beside torch "
            f"{torch.__version__}: pip install executorch==1.5.1 torch==2.15.0, which do"
        ) from error


def write_executorch(
    module: BytesToLogits,
    path: str | os.PathLike,
    shape: Shape,
    dynamic: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a program.

    Args:
        module, shape: as of `lednet.export.onnx.to_onnx`.
        dynamic: refused: memory is planned for one size.
        metadata: as JSON, what the program's method "metadata" returns.

    Raises:
        UserError: `dynamic`, or executorch is missing or does not fit this torch.
    """
    if dynamic:
        raise UserError("an ExecuTorch file has a fixed size: leave --dynamic out")
    with _executorch_imports():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    lowered = to_edge_transform_and_lower(
        trace(module, shape, dynamic),
        partitioner=[XnnpackPartitioner()],
        constant_methods={"metadata": json.dumps(metadata or {})},
    )
    with open(path, "wb") as file:
        lowered.to_executorch().write_to_file(file)


def load_executorch(path: str | os.PathLike, options: RunOptions) -> ExportedModel:
    """Open a program of `write_executorch` in ExecuTorch's runtime for this machine, which
    chooses its own number of threads.

    Raises:
        UserError: no such file, or executorch is missing or does not fit this torch.
    """
    with _executorch_imports():
        from executorch.runtime import Runtime
    with opening(path):
        program = Runtime.get().load_program(Path(path))
        method = program.load_method("forward")
    metadata = {}
    if "metadata" in program.method_names:
        metadata = json.loads(program.load_method("metadata").execute([])[0])
    bounds = tuple((n, n) for n in method.metadata.input_tensor_meta(0).sizes()[:3])

    def run(images: np.ndarray) -> np.ndarray:
        return method.execute([torch.from_numpy(images)])[0].clone().numpy()

    return ExportedModel(Path(path), "executorch", bounds, metadata, run)
