"""Speed measurements of a predictor, reported with their conditions."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lednet.device import describe_device, peak_memory_mb, synchronize
from lednet.inference.predictor import Predictor

MIN_RUNS = 5
NOISY_RATIO = 1.3
"""Ratio of the 95th percentile and the median above which a time is called noisy."""


def time_runs(
    step: Callable[[], Any],
    device: torch.device,
    warmup: int,
    runs: int,
    max_seconds: float = math.inf,
) -> dict[str, float]:
    """Time `step`, with the device synchronized before and after each call.

    Args:
        max_seconds: stop after so much time, but not before `MIN_RUNS` timed calls.

    Returns:
        Median and 95th percentile of `runs` calls after `warmup` untimed ones, in ms.
    """
    times: list[float] = []
    end = time.perf_counter() + max_seconds
    for run in range(warmup + runs):
        if len(times) >= MIN_RUNS and time.perf_counter() > end:
            break
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        if run >= warmup:
            times.append((time.perf_counter() - start) * 1000)
    return percentiles(times)


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile of times in ms."""
    p95 = statistics.quantiles(times, n=20, method="inclusive")[-1] if len(times) > 1 else times[0]
    return {"p50_ms": statistics.median(times), "p95_ms": p95}


def with_rate(times: dict[str, float], images: int) -> dict[str, Any]:
    """Add "fps", images per second by the median, and "noisy" to the `percentiles` of a batch."""
    noisy = times["p95_ms"] > NOISY_RATIO * times["p50_ms"]
    return {**times, "fps": images * 1000 / times["p50_ms"], "noisy": noisy}


@torch.inference_mode()
def count_macs(net: nn.Module, size: Sequence[int]) -> int:
    """Multiply-accumulates of the convolutions for one image of `size` (height, width)."""
    net = copy.deepcopy(net).to("meta")  # shapes only, nothing is computed
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, *size, device="meta"))
    return counter.get_total_flops() // 2


def benchmark(
    predictor: Predictor,
    image_size: tuple[int, int],
    batch: int = 1,
    warmup: int = 3,
    runs: int = 20,
    max_seconds: float = math.inf,
) -> dict[str, Any]:
    """Measure a predictor on random images.

    "forward" is one pass of the network alone (over one tile, with tiles), from a resized uint8
    image on the device to logits at 1/8 of its size. "image_to_label_map" is from uint8 images of
    `image_size` in main memory to uint8 label maps there, with resizing, normalization,
    upsampling and argmax, without files.

    Args:
        image_size: (height, width) in pixels.
        batch: number of images.
        warmup, runs: untimed and timed calls of each.
        max_seconds: limit for the timed calls of each, after at least `MIN_RUNS`.

    Returns:
        Conditions, cost and times, serializable as JSON; times in ms for a whole batch, fps in
        images per second from the median. "noisy" marks times that vary (`NOISY_RATIO`).
    """
    device, size = predictor.device, predictor.size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    images = torch.randint(0, 256, (batch, 3, *image_size), dtype=torch.uint8)
    height, width = predictor.tile or size
    prepared = predictor.prepare(images)[:, :height, :width].contiguous()
    forward_size = tuple(prepared.shape[1:3])
    with torch.inference_mode():
        limits = (device, warmup, runs, max_seconds)
        forward = time_runs(lambda: predictor.runner(prepared), *limits)
        whole = time_runs(lambda: predictor.label_maps(images)[0].cpu(), *limits)
    return {
        "device": describe_device(device),
        "torch": torch.__version__,
        "backend": predictor.backend,
        "precision": predictor.precision,
        "batch_norm": "folded" if predictor.folded else "not folded",
        "network_size": list(size),
        "forward_size": list(forward_size),
        "image_size": list(image_size),
        "batch": batch,
        "warmup": warmup,
        "runs": runs,
        "scales": list(predictor.scales),
        "flip": predictor.flip,
        "tile": list(predictor.tile) if predictor.tile else None,
        "parameters": predictor.parameters,
        "gmacs": count_macs(predictor.net, forward_size) / 1e9,
        "peak_memory_mb": peak_memory_mb(device),
        "peak_memory_of": "GPU's tensors" if device.type == "cuda" else "whole process",
        "forward": with_rate(forward, batch),
        "image_to_label_map": with_rate(whole, batch),
    }


def benchmark_rows(card: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows (name, value) of a `benchmark` for display."""

    def time(part: dict[str, float]) -> str:
        noise = f"; noisy (p95 over {NOISY_RATIO} x p50), measure again on an idle machine"
        text = f"{part['fps']:.1f} FPS; p50 {part['p50_ms']:.1f} ms, p95 {part['p95_ms']:.1f} ms"
        return text + noise * bool(part["noisy"])

    forward, image = ("{}x{}".format(*card[f"{name}_size"]) for name in ("forward", "image"))
    extras = [f"scales {card['scales']}"] * (card["scales"] != [1.0])
    extras += ["flip"] * card["flip"] + [f"tiles of {card['tile']}"] * bool(card["tile"])
    options = f" ({', '.join(extras)})" if extras else ""
    return [
        (f"network alone, {forward}", time(card["forward"])),
        (f"image to labels, {image}", time(card["image_to_label_map"]) + options),
        ("device", f"{card['device']}, torch {card['torch']}"),
        (
            "conditions",
            f"{card['backend']}, {card['precision']}, batch norm {card['batch_norm']}, "
            f"batch {card['batch']}, up to {card['runs']} runs after {card['warmup']} to warm up; "
            "decoding files left out",
        ),
        ("parameters", f"{card['parameters']:,}"),
        ("cost", f"{card['gmacs']:.2f} GMAC for one pass at {forward}"),
        ("peak memory", f"{card['peak_memory_mb']:,.0f} MB of the {card['peak_memory_of']}"),
    ]
