"""Number formats that networks compute in."""

from pathlib import Path

import torch

from lednet.errors import UserError

AMP_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision's name -> autocast type; None computes in float32 throughout."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast context for a precision of `AMP_DTYPES` on `device`.

    Raises:
        UserError: fp16 on a CPU, where its range overflows and nothing is gained.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU: choose --precision bf16 or fp32 on a CPU")
    dtype = AMP_DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def fast_precisions(device: torch.device) -> tuple[str, ...]:
    """Those besides fp32 that `device` has instructions for; others it would imitate."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16" if bf16 else "fp16",)
    info = Path("/proc/cpuinfo")
    bf16 = device.type == "cpu" and info.is_file() and "avx512_bf16" in info.read_text()
    return ("bf16",) if bf16 else ()
