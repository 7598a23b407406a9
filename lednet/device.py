"""Devices and precisions."""

import contextlib
import platform
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from lednet.errors import UserError

AMP_DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision -> autocast type; None: float32 everywhere.

"fp32" is IEEE single precision; "tf32" allows TF32 (10 bits of mantissa) in convolutions and
matrix products. PyTorch's default is TF32 in convolutions alone.
"""


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in convolutions and matrix products of this process."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast context for a precision of `AMP_DTYPES` on `device`.

    On CUDA, TF32 is forbidden inside for "fp32" and allowed for the others. PyTorch has one such
    setting for all threads: while threads are inside with different precisions, it is forbidden,
    and the settings from before return when the last one leaves. The backward pass runs outside of
    it: call `allow_tf32` for training.

    Raises:
        UserError: fp16 on a CPU, where it overflows and is not faster, or tf32 without CUDA.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU: choose --precision bf16 or fp32 on a CPU")
    if precision == "tf32" and device.type != "cuda":
        raise UserError("tf32 needs an NVIDIA GPU: choose --precision fp32")
    dtype = AMP_DTYPES[precision]
    tf32 = _tf32(precision != "fp32") if device.type == "cuda" else contextlib.nullcontext()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None), tf32:
        yield


_tf32_lock = threading.Lock()
_tf32_inside: list[bool] = []
"""What each thread inside `_tf32` asked for."""
_tf32_before: tuple[bool, bool] = (True, False)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    global _tf32_before
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with _tf32_lock:
        if not _tf32_inside:
            _tf32_before = cudnn.allow_tf32, matmul.allow_tf32
        _tf32_inside.append(allowed)
        allow_tf32(all(_tf32_inside))
    try:
        yield
    finally:
        with _tf32_lock:
            _tf32_inside.remove(allowed)
            allow_tf32(all(_tf32_inside))
            if not _tf32_inside:
                cudnn.allow_tf32, matmul.allow_tf32 = _tf32_before


def fast_precisions(device: torch.device) -> tuple[str, ...]:
    """Precisions besides fp32 that `device` has instructions for."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16" if bf16 else "fp16",)
    bf16 = device.type == "cpu" and "avx512_bf16" in (_proc_value("cpuinfo", "flags") or "")
    return ("bf16",) if bf16 else ()


def choose_device(name: str) -> torch.device:
    """The device `name`; "auto" is the first available of CUDA, MPS (Apple) and the CPU.

    Raises:
        UserError: the device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA GPU can be used here: choose --device cpu, or repair the driver")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("no Apple GPU can be used here: choose --device cpu")
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB (10^6 bytes): of tensors since the last reset on CUDA, elsewhere of the
    whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if peak := _proc_value("self/status", "VmHWM"):  # Linux's ru_maxrss includes the parent process
        return int(peak.split()[0]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def describe_device(device: torch.device) -> str:
    """A device's name for a report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        processor = _proc_value("cpuinfo", "model name") or platform.processor() or "CPU"
        return f"{processor}, {torch.get_num_threads()} threads"
    return device.type


def _proc_value(file: str, name: str) -> str | None:
    """The first value of `name` in a file of /proc; None if there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None


def free_memory(device: torch.device) -> int | None:
    """Free memory of `device` in bytes; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and (available := _proc_value("meminfo", "MemAvailable")):
        return int(available.split()[0]) * 1024
    return None
