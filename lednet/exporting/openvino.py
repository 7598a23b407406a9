"""OpenVINO's intermediate representation, in float32, bfloat16 or int8."""

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lednet.errors import UserError
from lednet.exporting.common import (
    ExportedModel,
    ExportOptions,
    RunOptions,
    import_optional,
    opening,
)
from lednet.exporting.onnx import write_onnx
from lednet.exporting.wrappers import EndToEndModel

MIN_OPENVINO_SIDE = 8
"""OpenVINO 2026.4 returns the previous image's output, or none, for sides of one or two pixels."""

_FIRST_ACCESS = threading.Lock()
"""OpenVINO 2026.4 creates its table of types at the first access to a tensor's data. Two threads at
once would wait for each other: one holds Python's lock, the other that of the table."""

PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}
"""Precision of what is not quantized -> OpenVINO's name of it. Its default is bfloat16 on some
CPUs."""


def write_openvino(module: EndToEndModel, path: Path, options: ExportOptions) -> None:
    """Write an IR: `path` ending in .xml, and the weights in a .bin file of the same name.

    It is converted from ONNX, so that both formats have one exporter. The metadata are its
    rt_info "lednet". With `options.calibration`, convolutions get 8-bit weights and activations
    by NNCF's post-training quantization. An application that needs float32 outputs also sets
    INFERENCE_PRECISION_HINT to f32: some CPUs compute in bfloat16 otherwise.
    """
    openvino = import_optional("openvino")
    if min(options.shape[1:]) < MIN_OPENVINO_SIDE:
        raise UserError(
            f"OpenVINO needs a height and width of at least {MIN_OPENVINO_SIDE} pixels, not "
            f"{options.shape[1]} and {options.shape[2]}: give a larger size or another backend"
        )
    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "network.onnx"
        write_onnx(module, onnx_file, options)
        model = openvino.Core().read_model(onnx_file)
    if options.dynamic:
        side = openvino.Dimension(MIN_OPENVINO_SIDE, -1)
        model.reshape(openvino.PartialShape([openvino.Dimension(1, -1), side, side, 3]))
    if options.calibration is not None:
        nncf = import_optional("nncf")
        if not options.calibration:
            raise UserError("int8 needs images to see the range of every value: give --calibrate")
        nncf.set_log_level("ERROR")
        images = nncf.Dataset(options.calibration)
        model = nncf.quantize(model, images, subset_size=len(options.calibration))
    for key, value in options.metadata.items():
        model.set_rt_info(value, ["lednet", key])
    openvino.save_model(model, path, compress_to_fp16=False)


def compile_openvino(model: Any, config: dict[str, Any]) -> Any:
    """`openvino.compile_model` for the CPU, in a thread of its own.

    OpenVINO 2026.4 gives the thread that compiles a signal stack, which is freed with the model.
    If that were the main thread, the next signal (a finished child process is one) would end the
    program.
    """
    openvino = import_optional("openvino")
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(openvino.compile_model, model, "CPU", config).result()


def load_openvino(path: Path, options: RunOptions) -> ExportedModel:
    """Open an IR on the CPU."""
    openvino = import_optional("openvino")
    config: dict[str, str | int] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[options.precision],
    }
    if options.threads:
        config["INFERENCE_NUM_THREADS"] = options.threads
    with opening(path):
        model = openvino.Core().read_model(path)
        compiled = compile_openvino(model, config)
        batch, height, width, _ = (
            (n.min_length, n.max_length if n.max_length > 0 else None)
            for n in model.input(0).partial_shape
        )
        metadata = {}
        if model.has_rt_info(["lednet"]):
            keys = model.get_rt_info(["lednet"]).astype(dict)
            metadata = {key: model.get_rt_info(["lednet", key]).astype(str) for key in keys}
    first = compiled.create_infer_request()
    with _FIRST_ACCESS:
        for tensor in (*first.input_tensors, *first.output_tensors):
            _ = tensor.data
    idle = [first]  # inference requests; each serves one thread at a time

    def run(images: np.ndarray) -> np.ndarray:
        try:
            request = idle.pop()
        except IndexError:
            request = compiled.create_infer_request()
        labels_or_logits = request.infer([images])[0].copy()
        idle.append(request)
        return labels_or_logits

    return ExportedModel(path, "openvino", (batch, height, width), metadata, run)
