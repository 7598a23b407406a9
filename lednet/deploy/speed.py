"""How fast a network is, measured so that the number can be believed."""

import statistics
import time
from typing import Any

import torch
from torch import nn


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.inference_mode()
def measure_latency(
    net: nn.Module,
    size: tuple[int, int],
    device: torch.device,
    batch: int = 1,
    warmup: int = 3,
    runs: int = 10,
) -> dict[str, Any]:
    """Time forward passes of `net` on random input: the network alone, nothing before or behind.

    The clock stops only when the device has finished. The network is left in evaluation mode.

    Args:
        size: (height, width) in pixels.
        warmup: passes before the clock starts.
        runs: timed passes.

    Returns:
        What was measured and under which conditions; times in milliseconds.
    """
    net.eval()
    images = torch.rand(batch, 3, *size, device=device)
    times = []
    for run in range(warmup + runs):
        _synchronize(device)
        start = time.perf_counter()
        net(images)
        _synchronize(device)
        if run >= warmup:
            times.append((time.perf_counter() - start) * 1000)
    median = statistics.median(times)
    return {
        "device": describe_device(device),
        "precision": "fp32",
        "height": size[0],
        "width": size[1],
        "batch": batch,
        "warmup": warmup,
        "runs": runs,
        "p50_ms": median,
        "fps": batch * 1000 / median,
    }


def describe_device(device: torch.device) -> str:
    """A device's name for a report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return device.type
