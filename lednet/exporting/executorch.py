"""ExecuTorch programs for phones, run by XNNPACK."""

import contextlib
import importlib.metadata
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lednet.errors import UserError
from lednet.exporting import common
from lednet.exporting.common import ExportedModel, ExportOptions, RunOptions, import_optional
from lednet.exporting.wrappers import EndToEndModel


@contextlib.contextmanager
def _executorch_imports() -> Iterator[None]:
    """Turn the errors of an executorch built for another torch into a UserError."""
    import_optional("executorch")
    try:
        yield
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"executorch {importlib.metadata.version('executorch')} does not load with torch "
            f"{torch.__version__}: pip install executorch==1.5.1 torch==2.15.0, which do"
        ) from error


def write_executorch(module: EndToEndModel, path: Path, options: ExportOptions) -> None:
    """Write a program; its method "metadata" returns the metadata as JSON.

    Raises:
        UserError: dynamic sizes (memory is planned for one size), or executorch is missing or
            does not fit this torch.
    """
    if options.dynamic:
        raise UserError("an ExecuTorch file has a fixed size: leave --dynamic out")
    with _executorch_imports():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    with common.TRACE_LOCK:
        lowered = to_edge_transform_and_lower(
            common.trace(module, options),
            partitioner=[XnnpackPartitioner()],
            constant_methods={"metadata": json.dumps(options.metadata)},
        )
        program = lowered.to_executorch()
    with open(path, "wb") as file:
        program.write_to_file(file)


def load_executorch(path: Path, options: RunOptions) -> ExportedModel:
    """Open a program in ExecuTorch's runtime, which chooses its own number of threads."""
    with _executorch_imports():
        from executorch.runtime import Runtime
    with common.opening(path):
        program = Runtime.get().load_program(path)
        method = program.load_method("forward")
    metadata = {}
    if "metadata" in program.method_names:
        metadata = json.loads(program.load_method("metadata").execute([])[0])
    bounds = tuple((n, n) for n in method.metadata.input_tensor_meta(0).sizes()[:3])

    lock = threading.Lock()  # a method has one set of buffers

    def run(images: np.ndarray) -> np.ndarray:
        with lock:
            return method.execute([torch.from_numpy(images)])[0].clone().numpy()

    return ExportedModel(path, "executorch", bounds, metadata, run)
