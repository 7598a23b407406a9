"""OpenVINO's intermediate representation, in float32, bfloat16 or int8."""

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lednet.errors import UserError
from lednet.export.common import ExportedModel, RunOptions, Shape, import_optional, opening
from lednet.export.onnx import write_onnx
from lednet.export.wrappers import BytesToLogits

MIN_OPENVINO_SIDE = 8
"""OpenVINO 2026.4 answers with the image before, or nothing, for sides of one or two pixels."""

PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}
"""Precision of what is not quantised -> OpenVINO's name of it. Left to itself it would
compute in bfloat16 on some CPUs."""


def to_openvino(module: BytesToLogits, shape: Shape, dynamic: bool = False) -> Any:
    """The `openvino.Model` of a graph.

    It is read from ONNX, as the file that ONNX Runtime gets: one way for both.

    Args:
        module: on the CPU.
        shape: (N, H, W) of the images that it takes.
        dynamic: take any batch, and sides from `MIN_OPENVINO_SIDE` pixels instead.

    Raises:
        UserError: a package is missing.
    """
    openvino = import_optional("openvino")
    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "network.onnx"
        write_onnx(module, onnx_file, shape, dynamic)
        model = openvino.Core().read_model(onnx_file)
    if dynamic:
        side = openvino.Dimension(MIN_OPENVINO_SIDE, -1)
        model.reshape(openvino.PartialShape([openvino.Dimension(1, -1), side, side, 3]))
    return model


def quantize(model: Any, images: Sequence[np.ndarray]) -> Any:
    """An int8 copy of an `openvino.Model`: convolutions with 8-bit weights and activations.

    The ranges of the activations are those seen on `images`, (N, H, W, 3) uint8 RGB each; the
    biases are corrected for the rounding of the weights (NNCF's post-training quantisation).

    Raises:
        UserError: no images, or nncf is missing.
    """
    nncf = import_optional("nncf")
    if not images:
        raise UserError("int8 needs images to see the range of every value: give --calibrate")
    nncf.set_log_level("ERROR")
    return nncf.quantize(model, nncf.Dataset(images), subset_size=len(images))


def write_openvino(
    module: BytesToLogits,
    path: str | os.PathLike,
    shape: Shape,
    dynamic: bool = False,
    metadata: dict[str, str] | None = None,
    calibration: Sequence[np.ndarray] | None = None,
) -> None:
    """Write an IR, `path` ending in .xml and the weights beside it in .bin.

    The weights stay float32 unless there are images to calibrate with. An application that
    wants these very answers also sets INFERENCE_PRECISION_HINT to f32: some CPUs compute in
    bfloat16 otherwise.

    Args:
        module, shape, dynamic: as of `to_openvino`.
        metadata: goes to the rt_info "lednet".
        calibration: as of `quantize`; None keeps float32.

    Raises:
        UserError: a package is missing.
    """
    openvino = import_optional("openvino")
    model = to_openvino(module, shape, dynamic)
    if calibration is not None:
        model = quantize(model, calibration)
    for key, value in (metadata or {}).items():
        model.set_rt_info(value, ["lednet", key])
    openvino.save_model(model, path, compress_to_fp16=False)


def compile_openvino(model: Any, config: dict[str, Any]) -> Any:
    """`openvino.compile_model` for the CPU, in a thread of its own.

    OpenVINO 2026.4 gives the thread that compiles a signal stack, which is freed with the
    model: were it the main thread, the next signal after that (a finished child process
    is one) would end the program.
    """
    openvino = import_optional("openvino")
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(openvino.compile_model, model, "CPU", config).result()


def load_openvino(path: str | os.PathLike, options: RunOptions) -> ExportedModel:
    """Open an IR of `write_openvino`, on the CPU.

    Raises:
        UserError: no such file, or openvino is missing.
    """
    openvino = import_optional("openvino")
    config: dict[str, str | int] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[options.precision],
    }
    if options.threads:
        config["INFERENCE_NUM_THREADS"] = options.threads
    with opening(path):
        model = openvino.Core().read_model(path)
        request = compile_openvino(model, config).create_infer_request()
        batch, height, width, _ = (
            (n.min_length, n.max_length if n.max_length > 0 else None)
            for n in model.input(0).partial_shape
        )
        metadata = {}
        if model.has_rt_info(["lednet"]):
            told = model.get_rt_info(["lednet"]).astype(dict)
            metadata = {key: model.get_rt_info(["lednet", key]).astype(str) for key in told}
    return ExportedModel(
        Path(path),
        "openvino",
        (batch, height, width),
        metadata,
        lambda images: request.infer([images])[0].copy(),
    )
