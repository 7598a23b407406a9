"""Export of a network to a file that runs without this repository, and its parity check.

A file contains the network with its pre- and postprocessing: the input "image" is
(N, H, W, 3) uint8 RGB; the output is "labels" (N, H, W) uint8 or "logits"
(N, C, ceil(H/8), ceil(W/8)) float32. Batch norm is fused, and the metadata that users of the file
need (classes, colours, size) are inside it.

    net, meta = load_model("save/run")
    parity = export(net, meta, "street.onnx", "onnx", (512, 1024), batches)
    label_map = load("street.onnx")(images)
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lednet
from lednet.errors import UserError
from lednet.exporting.common import ExportedModel, ExportOptions, RunOptions
from lednet.exporting.formats import FORMATS, require_packages
from lednet.exporting.wrappers import EndToEndModel
from lednet.io import write_atomically
from lednet.model import LEDNet, resize

PRECISIONS = ("fp32", "int8")
"""Precisions of the convolutions in a file."""


class ParityError(Exception):
    """The outputs of an exported file differ too much from the network's."""


@dataclass(frozen=True)
class Parity:
    """Agreement of an exported file with its network.

    Attributes:
        agreement: fraction of the pixels with the same class.
        max_difference: largest difference between two logits, relative to the network's largest
            logit; None if only labels were compared.
        images: number of images compared.
    """

    agreement: float
    max_difference: float | None
    images: int


def describe(
    net: LEDNet, meta: dict, size: tuple[int, int], output: str, precision: str = "fp32"
) -> dict[str, str]:
    """Metadata of a file; every value but "lednet", "output" and "dataset" is JSON.

    Args:
        meta: metadata of the weights, from `load_model`; missing keys are left out.
        size: (height, width) in pixels that the network is meant to run at.
        output: one of `lednet.exporting.wrappers.OUTPUTS`.
        precision: one of `PRECISIONS`.
    """
    mean, std = _normalization(meta)
    values = {
        "outputs": net.num_classes,
        "variant": net.variant,
        "pyramid_channels": None if net.variant == "d20" else net.pyramid_channels,
        "precision": precision,
        "size": size,
        **{key: meta[key] for key in ("classes", "colors") if key in meta},
        "mean": mean,
        "std": std,
    }
    texts = {"lednet": lednet.__version__, "output": output}
    texts |= {key: str(meta[key]) for key in ("dataset",) if key in meta}
    return texts | {key: json.dumps(value) for key, value in values.items()}


def _normalization(meta: dict) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the [0, 1] image."""
    return meta.get("mean", (0, 0, 0)), meta.get("std", (1, 1, 1))


@torch.no_grad()
def reference_logits(net: LEDNet, images: np.ndarray, meta: dict) -> Tensor:
    """Logits of the original network before the last upsampling, in float32.

    images: (N, H, W, 3) uint8 RGB -> (N, C, ceil(H/8), ceil(W/8))
    """
    x = torch.tensor(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).float().view(-1, 1, 1) for v in _normalization(meta))
    return net.decoder(net.encoder((x - mean) / std))


def check_parity(
    run: Callable[[np.ndarray], np.ndarray],
    net: LEDNet,
    meta: dict,
    images: Iterable[np.ndarray],
    run_logits: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Parity:
    """Compare an exported file with the original network in PyTorch on the same images.

    Args:
        run: an exported file with either output; labels are computed from logits.
        net: on the CPU, in evaluation mode.
        meta: metadata of the weights, for their normalization.
        images: batches (N, H, W, 3) uint8 RGB of sizes that the file takes.
        run_logits: the same network exported with logits, compared if `run` returns labels.
    """

    def labels_of(logits: Tensor, size: Sequence[int]) -> np.ndarray:
        return resize(logits, size).argmax(dim=1).numpy()

    equal = pixels = count = 0
    differences, largest = [], 0.0
    for batch in images:
        expected, size = reference_logits(net, batch, meta), batch.shape[1:3]
        labels, found = labels_of(expected, size), run(batch)
        logits: np.ndarray | None = found
        if found.ndim == 4:
            found = labels_of(torch.from_numpy(found), size)
        else:
            logits = run_logits(batch) if run_logits else None
        if logits is not None:
            differences.append(np.abs(logits - expected.numpy()).max())
            largest = max(largest, expected.abs().max().item())
        equal += int((found == labels).sum())
        pixels += labels.size
        count += len(batch)
    if not count:
        raise ValueError("no images to compare")
    # np.max, unlike max, propagates NaN.
    difference = float(np.max(differences)) / (largest or 1.0) if differences else None
    return Parity(equal / pixels, difference, count)


def require_parity(parity: Parity, min_agreement: float, max_difference: float) -> None:
    """Raise a `ParityError` if the agreement is too low, or the difference too high or NaN."""
    if not parity.agreement >= min_agreement:
        raise ParityError(
            f"the exported file agrees with the network in {parity.agreement:.6f} of the pixels "
            f"of {parity.images} images, {min_agreement} is required; nothing was written"
        )
    if parity.max_difference is not None and not parity.max_difference <= max_difference:
        raise ParityError(
            f"the exported file's logits differ by {parity.max_difference:.1e} of the largest "
            f"one over {parity.images} images, {max_difference:.1e} is allowed; nothing was written"
        )


def export(
    net: LEDNet,
    meta: dict,
    path: str | os.PathLike,
    format: str,
    size: tuple[int, int],
    images: Iterable[np.ndarray],
    *,
    output: str = "labels",
    dynamic: bool = False,
    calibration: Sequence[np.ndarray] | None = None,
    min_agreement: float = 0.9999,
    max_difference: float = 1e-3,
    accept: Callable[[ExportedModel], None] | None = None,
) -> Parity:
    """Write `net` to `path` if the file, run by its own runtime, has the outputs of `net`.

    For labels, a second file with logits is written to a temporary folder and compared too.
    On any error, existing files at `path` are unchanged.

    Args:
        net: on the CPU, in evaluation mode, from `load_model` together with `meta`.
        format: a key of `FORMATS`.
        size: (height, width) in pixels.
        images: batches to compare on, (N, H, W, 3) uint8 RGB: single images of `size`, or of
            several sizes with `dynamic`.
        output: one of `lednet.exporting.wrappers.OUTPUTS`.
        dynamic: take any batch and size, as far as the format supports it.
        calibration: images (1, *size, 3) uint8 RGB to quantize to int8 with; None writes float32.
        min_agreement, max_difference: thresholds for `require_parity`.
        accept: a further check of the file with `output` "logits"; it raises to reject it.

    Raises:
        UserError: as `require_packages`; the suffix is not the format's; a write error.
        ParityError: the outputs differ.
    """
    row, path = FORMATS[format], Path(path)
    precision = "fp32" if calibration is None else "int8"
    require_packages(format, precision)
    if path.suffix != row.suffix:
        raise UserError(f"{path} does not end in {row.suffix}, as a file of {format}: rename it")

    def write(output: str, path: Path) -> ExportedModel:
        module = EndToEndModel(net, *_normalization(meta), output=output)
        metadata = describe(net, meta, size, output, precision)
        row.write(module, path, ExportOptions((1, *size), dynamic, metadata, calibration))
        return row.load(path, RunOptions())

    with contextlib.ExitStack() as stack:
        # Closed in reverse order: the further files are in place before the main file.
        temporary = stack.enter_context(write_atomically(path))
        for suffix in row.companions:
            stack.enter_context(write_atomically(path.with_suffix(suffix)))
        run = run_logits = write(output, temporary)
        if output != "logits":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            run_logits = write("logits", Path(folder) / f"logits{row.suffix}")
        parity = check_parity(run, net, meta, images, run_logits)
        require_parity(parity, min_agreement, max_difference)
        if accept:
            accept(run_logits)
    return parity
