"""Files of a network that run without this repository, and the gate that each must pass.

A file holds the network with its pre- and post-processing: images (N, H, W, 3) uint8 RGB
go in as "image"; "labels" (N, H, W) uint8 or "logits" (N, C, ceil(H/8), ceil(W/8)) float32
come out. Batch norm is folded, and what a user of the file has to know (classes, colours,
size) is inside it.

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
from lednet.export.common import RunOptions
from lednet.export.formats import FORMATS, ExportedModel, require_packages
from lednet.export.wrappers import BytesToLabels, BytesToLogits
from lednet.io import write_atomically
from lednet.model import LEDNet, resize

OUTPUTS = {"labels": BytesToLabels, "logits": BytesToLogits}
"""Name of a file's output -> the module that computes it."""

PRECISIONS = ("fp32", "int8")
"""Number formats of the convolutions in a file."""


class ParityError(Exception):
    """An exported file answers otherwise than the network; one sentence with the numbers."""


@dataclass(frozen=True)
class Parity:
    """How closely a file answers as its network does.

    Attributes:
        agreement: share of the pixels with the same class.
        max_difference: largest difference of two logits, relative to the network's
            largest; None if no logits were compared.
        images: how many were compared.
    """

    agreement: float
    max_difference: float | None
    images: int


def describe(
    net: LEDNet, meta: dict, size: tuple[int, int], output: str, precision: str = "fp32"
) -> dict[str, str]:
    """What a file says about itself; every value but "lednet", "output" and "dataset" is JSON.

    Args:
        meta: of the weights, as `load_model` returned it; what it lacks is left out.
        size: (height, width) in pixels that the network is meant to work at.
        output: a key of `OUTPUTS`.
        precision: one of `PRECISIONS`.
    """
    mean, std = _normalization(meta)
    told = {
        "outputs": net.num_classes,
        "variant": net.variant,
        "pyramid_channels": None if net.variant == "d20" else net.pyramid_channels,
        "precision": precision,
        "size": list(size),
        **{key: meta[key] for key in ("classes", "colors") if key in meta},
        "mean": list(mean),
        "std": list(std),
    }
    names = {"lednet": lednet.__version__, "output": output}
    if "dataset" in meta:
        names["dataset"] = str(meta["dataset"])
    return names | {key: json.dumps(value) for key, value in told.items()}


def _normalization(meta: dict) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the [0, 1] image."""
    return meta.get("mean", (0, 0, 0)), meta.get("std", (1, 1, 1))


@torch.no_grad()
def reference_logits(net: LEDNet, images: np.ndarray, meta: dict) -> Tensor:
    """The network's own answer before the last upsampling, as trained and in float32.

    images: (N, H, W, 3) uint8 RGB -> (N, C, ceil(H/8), ceil(W/8))
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).float().view(-1, 1, 1) for v in _normalization(meta))
    return net.decoder(net.encoder((x - mean) / std))


def check_parity(
    run: Callable[[np.ndarray], np.ndarray],
    net: LEDNet,
    meta: dict,
    images: Iterable[np.ndarray],
    run_logits: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Parity:
    """Hold an exported file against the unfolded network in PyTorch, on the same bytes.

    Args:
        run: an `ExportedModel` file with either output; of logits, the labels are worked out.
        net: on the CPU, in evaluation mode.
        meta: of the weights, for their normalisation.
        images: batches (N, H, W, 3) uint8 RGB of sizes that the file takes.
        run_logits: a file of the same network with logits, to compare those too.
    """
    equal = pixels = count = 0
    difference: float | None = None
    largest = 0.0
    for batch in images:
        expected = reference_logits(net, batch, meta)
        labels = resize(expected, batch.shape[1:3]).argmax(dim=1).numpy()
        found = run(batch)
        logits: np.ndarray | None = found
        if found.ndim == 4:
            found = resize(torch.from_numpy(found), batch.shape[1:3]).argmax(dim=1).numpy()
        else:
            logits = run_logits(batch) if run_logits else None
        if logits is not None:
            worst = np.abs(logits - expected.numpy()).max().item()
            difference = max(worst, difference or 0.0)
            largest = max(largest, expected.abs().max().item())
        equal += int((found == labels).sum())
        pixels += labels.size
        count += len(batch)
    if not count:
        raise ValueError("no images to compare")
    if difference is not None:
        difference /= largest or 1.0
    return Parity(equal / pixels, difference, count)


def require_parity(parity: Parity, min_agreement: float, max_difference: float) -> None:
    """
    Raises:
        ParityError: below one threshold or above the other (or not a number).
    """
    if not parity.agreement >= min_agreement:
        raise ParityError(
            f"the exported file agrees with the network in {parity.agreement:.6f} of the pixels "
            f"of {parity.images} images, {min_agreement} is asked for; nothing was written"
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
    """Write `net` to `path`, if the file, run by its own runtime, answers as `net` does.

    For labels, a second file with logits is written to a temporary folder and compared
    as well. Whatever fails, `path` stays as it was.

    Args:
        net: on the CPU, in evaluation mode, as `load_model` returns it with `meta`.
        format: a key of `FORMATS`.
        size: (height, width) in pixels.
        images: to compare on, batches (N, H, W, 3) uint8 RGB: of one image of `size`, or
            for `dynamic` of several sizes.
        output: a key of `OUTPUTS`.
        dynamic: take any batch and size, as far as the format can.
        calibration: images (1, *size, 3) uint8 RGB to quantise to int8 with; None writes
            float32.
        min_agreement, max_difference: what a `Parity` must reach.
        accept: a further test of the file with `output` "logits", which raises what
            it likes.

    Raises:
        UserError: a package is missing, another suffix than the format's, a format without
            int8, or a file that cannot be written.
        ParityError: the answers differ.
    """
    row, path = FORMATS[format], Path(path)
    precision = "fp32" if calibration is None else "int8"
    require_packages(format, precision)
    if path.suffix != row.suffix:
        raise UserError(f"{path} does not end in {row.suffix}, as a file of {format}: rename it")
    quantized = {} if calibration is None else {"calibration": calibration}

    def write(output: str, path: Path) -> ExportedModel:
        module = OUTPUTS[output](net, *_normalization(meta))
        metadata = describe(net, meta, size, output, precision)
        row.write(module, path, (1, *size), dynamic, metadata, **quantized)
        return row.load(path, RunOptions())

    with contextlib.ExitStack() as stack:
        # Left in the opposite order: what belongs beside the file is in place before it.
        temporary = stack.enter_context(write_atomically(path))
        for suffix in row.beside:
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
