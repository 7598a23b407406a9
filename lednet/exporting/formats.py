"""Registry of file formats, each with a writer and its own runtime.

The packages of a format are imported when it is used: see the extra "deploy" in pyproject.toml.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lednet.errors import UserError
from lednet.exporting.common import MIN_TRACED_SIDE, ExportedModel, ExportOptions, RunOptions
from lednet.exporting.executorch import load_executorch, write_executorch
from lednet.exporting.onnx import load_onnx, write_onnx
from lednet.exporting.openvino import (
    PRECISION_HINTS,
    compile_openvino,
    load_openvino,
    write_openvino,
)
from lednet.exporting.torch_export import load_torch, write_torch
from lednet.exporting.wrappers import EndToEndModel
from lednet.files import require_content

__all__ = ["FORMATS", "MIN_TRACED_SIDE", "ExportOptions", "ExportedModel", "Format", "RunOptions",
           "compile_openvino", "is_exported", "load", "missing_packages", "require_packages",
           "require_supported"]  # fmt: skip


class Format(NamedTuple):
    """Row of `FORMATS`.

    Attributes:
        suffix: suffix of its files, by which `load` recognizes the format.
        packages: pip names of what writing and checking it needs.
        write, load: the writer, and the function that opens a file in its runtime.
        companions: suffixes of further files that belong to one.
        int8: the package that quantizes for it; None if int8 is not supported.
        devices, precisions: values of `RunOptions` that its runtime supports.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[EndToEndModel, Path, ExportOptions], None]
    load: Callable[[Path, RunOptions], ExportedModel]
    companions: tuple[str, ...] = ()
    int8: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    precisions: tuple[str, ...] = ("fp32",)


_ONNX = ("onnx", "onnxscript")
FORMATS = {
    "onnx": Format(
        ".onnx", (*_ONNX, "onnxruntime"), write_onnx, load_onnx, devices=("cpu", "cuda")
    ),
    "openvino": Format(
        ".xml", (*_ONNX, "openvino"), write_openvino, load_openvino, companions=(".bin",),
        int8="nncf", precisions=tuple(PRECISION_HINTS),
    ),
    "torch": Format(".pt2", (), write_torch, load_torch),
    "executorch": Format(".pte", ("executorch",), write_executorch, load_executorch),
}  # fmt: skip


def is_exported(path: str | os.PathLike) -> bool:
    """Whether `path` has the suffix of an exported file."""
    return Path(path).suffix in {row.suffix for row in FORMATS.values()}


def load(path: str | os.PathLike, **options: Any) -> ExportedModel:
    """Open an exported file of any format in its own runtime.

    Args:
        options: fields of `RunOptions`.

    Raises:
        UserError: no such file, an unknown suffix, a package is missing, or the format's
            runtime does not support the device or precision.
    """
    run_options, path = RunOptions(**options), Path(path)
    rows = {row.suffix: row for row in FORMATS.values()}
    if path.suffix not in rows:
        raise UserError(
            f"{path} is no exported network: give a file that ends in one of {', '.join(rows)}"
        )
    require_supported(rows[path.suffix], path, run_options)
    require_content(path)
    return rows[path.suffix].load(path, run_options)


def require_supported(row: Format, what: object, options: RunOptions) -> None:
    """Check that a format's runtime supports the device and precision.

    Args:
        what: a file or backend, for the message.
    """
    for name, supported in (("device", row.devices), ("precision", row.precisions)):
        value = getattr(options, name)
        if value not in supported:
            raise UserError(f"{what} runs with --{name} {' or '.join(supported)}, not {value}")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing_packages(format: str, precision: str = "fp32") -> list[str]:
    """Packages needed to write a file of `precision` that are not installed."""
    row = FORMATS[format]
    packages = (*row.packages, row.int8) if precision == "int8" and row.int8 else row.packages
    return [name for name in packages if not installed(name)]


def require_packages(format: str, precision: str = "fp32") -> None:
    """Check that a file of `precision` can be written.

    Raises:
        UserError: packages are missing (all are named, in one command), or the format does not
            support int8.
    """
    if precision == "int8" and not FORMATS[format].int8:
        able = [name for name, row in FORMATS.items() if row.int8]
        raise UserError(f"int8 is not for {format}: give --format {' or '.join(able)}")
    missing = missing_packages(format, precision)
    if missing:
        raise UserError(f"{format} needs more packages: pip install {' '.join(missing)}")
