"""ONNX files, run by ONNX Runtime."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lednet.errors import UserError
from lednet.exporting import common
from lednet.exporting.common import (
    TRACE_LOCK,
    ExportedModel,
    ExportOptions,
    RunOptions,
    import_optional,
)
from lednet.exporting.wrappers import EndToEndModel


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter, which logs every optional package that is missing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def write_onnx(module: EndToEndModel, path: Path, options: ExportOptions) -> None:
    """Write an ONNX file with its weights inside; the metadata are its metadata_props."""
    onnx, _ = import_optional("onnx"), import_optional("onnxscript")
    axes: dict[str, Any] = {}
    if options.dynamic:
        axes["dynamic_shapes"] = ({0: "batch", 1: "height", 2: "width"},)
    with TRACE_LOCK, _quiet_exporter():
        program = common.trace(module, options)
        model = torch.onnx.export(  # type: ignore[union-attr]  # None only without dynamo
            program, program.example_inputs[0], dynamo=True, input_names=["image"],
            output_names=[module.output], verbose=False, **axes,
        ).model_proto  # fmt: skip
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input):
        del part.metadata_props[:]  # the exporter's own notes, an eighth of the file
    onnx.checker.check_model(model, full_check=True)
    onnx.helper.set_model_props(model, options.metadata)
    onnx.save(model, path)


def load_onnx(path: Path, options: RunOptions) -> ExportedModel:
    """Open an ONNX file in ONNX Runtime.

    Raises:
        UserError: no such file, or onnxruntime is missing or is not the one for the device.
    """
    ort = import_optional("onnxruntime")
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    session_options.intra_op_num_threads = options.threads or 0
    providers = ["CPUExecutionProvider"]
    if options.device == "cuda":
        providers.insert(0, "CUDAExecutionProvider")
        if providers[0] not in ort.get_available_providers():
            raise UserError("onnxruntime has no CUDA here: pip install onnxruntime-gpu instead")
    with common.opening(path):
        session = ort.InferenceSession(str(path), session_options, providers=providers)
        image = session.get_inputs()[0]
        batch, height, width, _ = ((n, n) if isinstance(n, int) else (1, None) for n in image.shape)
        metadata = dict(session.get_modelmeta().custom_metadata_map)
    return ExportedModel(
        path, "onnxruntime", (batch, height, width), metadata,
        lambda images: session.run(None, {image.name: images})[0],
    )  # fmt: skip
