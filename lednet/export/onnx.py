"""ONNX files, run by ONNX Runtime."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lednet.errors import UserError
from lednet.export.common import (
    ExportedModel,
    RunOptions,
    Shape,
    import_optional,
    opening,
    output_name,
    trace,
)
from lednet.export.wrappers import BytesToLogits


def to_onnx(module: BytesToLogits, shape: Shape, dynamic: bool = False) -> Any:
    """The `onnx.ModelProto` of a graph, its weights inside.

    Args:
        module: on the CPU.
        shape: (N, H, W) of the images that it takes.
        dynamic: take any batch, height and width instead.

    Raises:
        UserError: a package is missing.
    """
    onnx, _ = import_optional("onnx"), import_optional("onnxscript")
    program = trace(module, shape, dynamic)
    options: dict[str, Any] = {}
    if dynamic:  # names the axes
        options["dynamic_shapes"] = ({0: "batch", 1: "height", 2: "width"},)
    with _quiet_exporter():
        model = torch.onnx.export(  # type: ignore[union-attr]  # None only without dynamo
            program,
            program.example_inputs[0],
            dynamo=True,
            input_names=["image"],
            output_names=[output_name(module)],
            verbose=False,
            **options,
        ).model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input):
        del part.metadata_props[:]  # the exporter's own notes, an eighth of the file
    onnx.checker.check_model(model, full_check=True)
    return model


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


def write_onnx(
    module: BytesToLogits,
    path: str | os.PathLike,
    shape: Shape,
    dynamic: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write an ONNX file; args and errors as of `to_onnx`.

    Args:
        metadata: written to the file's metadata_props.
    """
    onnx = import_optional("onnx")
    model = to_onnx(module, shape, dynamic)
    onnx.helper.set_model_props(model, metadata or {})
    onnx.save(model, path)


def load_onnx(path: str | os.PathLike, run_options: RunOptions) -> ExportedModel:
    """Open an ONNX file of `write_onnx` in ONNX Runtime.

    Raises:
        UserError: no such file, or onnxruntime is missing or is not the one for the device.
    """
    ort = import_optional("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = run_options.threads or 0
    providers = ["CPUExecutionProvider"]
    if run_options.device == "cuda":
        providers.insert(0, "CUDAExecutionProvider")
        if providers[0] not in ort.get_available_providers():
            raise UserError("onnxruntime has no CUDA here: pip install onnxruntime-gpu instead")
    with opening(path):
        session = ort.InferenceSession(str(path), options, providers=providers)
        image = session.get_inputs()[0]
        batch, height, width, _ = ((n, n) if isinstance(n, int) else (1, None) for n in image.shape)
        metadata = dict(session.get_modelmeta().custom_metadata_map)
    return ExportedModel(
        Path(path), "onnxruntime", (batch, height, width), metadata,
        lambda images: session.run(None, {image.name: images})[0],
    )  # fmt: skip
