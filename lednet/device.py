"""Number formats that networks compute in."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from lednet.errors import UserError

AMP_DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision's name -> autocast type; None computes in float32 throughout.

"fp32" is IEEE single precision; "tf32" permits TF32 tensor cores, with 10 bits of mantissa, in
convolutions and matrix products. PyTorch's own default is TF32 in convolutions alone.
"""


def allow_tf32(allowed: bool) -> None:
    """Permit or forbid TF32 in convolutions and matrix products of this process."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast context for a precision of `AMP_DTYPES` on `device`.

    On CUDA, TF32 is forbidden inside for "fp32" and permitted for the others. A backward pass
    takes place outside: set `allow_tf32` for training.

    Raises:
        UserError: fp16 on a CPU, where its range overflows and nothing is gained, or tf32 on a
            device that does not have it.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU: choose --precision bf16 or fp32 on a CPU")
    if precision == "tf32" and device.type != "cuda":
        raise UserError("tf32 needs an NVIDIA GPU: choose --precision fp32")
    dtype = AMP_DTYPES[precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        if device.type != "cuda":
            yield
            return
        before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        allow_tf32(precision != "fp32")
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def fast_precisions(device: torch.device) -> tuple[str, ...]:
    """Those besides fp32 that `device` has instructions for; others it would imitate."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16" if bf16 else "fp16",)
    info = Path("/proc/cpuinfo")
    bf16 = device.type == "cpu" and info.is_file() and "avx512_bf16" in info.read_text()
    return ("bf16",) if bf16 else ()
