"""Estimate hours and disk space of the three ways to train, on GPUs of three classes.

    python benchmarks/hours.py --write docs/training.md

Nothing is measured here. Measured were the cost of a training step in units of an inference
(benchmarks/training.py and inference.py, both plain fp32) and, by the letter, inference on a
GTX 1080 Ti: 71 FPS at 512x1024. A network with so few operations per byte is assumed to speed up
with the memory bandwidth of the GPU.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import RESULTS, make_parser, markdown, publish
from lednet.errors import exit_on_user_error
from lednet.io import read_json

LETTER_FPS = 71
"""On a GTX 1080 Ti at 512x1024 (the letter)."""
BANDWIDTHS = {"GTX 1080 Ti": 484, "RTX 4090": 1008, "H200": 4800}
"""Memory bandwidth of each GPU in GB/s (vendors' data sheets)."""
CITYSCAPES, IMAGENET = 512 * 1024, 224 * 224
FINE, EXTRA, VAL = 2975, 19_998, 500
"""Cityscapes images: train, train_extra, val."""
IMAGENET_TRAIN, IMAGENET_VAL = 1_281_167, 50_000
CORE_PAIRS = 13.8
"""Cityscapes pairs that one core reads from files in a second (docs/speed.md)."""


class Way(NamedTuple):
    """A way to train, or a step of it: training images in all, and pixels of each."""

    name: str
    images: int
    pixels: int
    cache_gb: float
    downloads_gb: float


PAIR_GB, PICTURE_GB = 4 * CITYSCAPES / 1e9, 3 * 256 * 256 / 1e9
WAYS = (
    Way("1. fine: 300 + 300 epochs", 600 * FINE, CITYSCAPES, (FINE + VAL) * PAIR_GB, 11.2),
    Way("2. coarse to fine: 100 + 100 epochs coarse, 200 fine", 200 * (FINE + EXTRA) + 200 * FINE,
        CITYSCAPES, (2 * FINE + EXTRA + VAL) * PAIR_GB, 56.5),
    Way("3. ImageNet: 150 epochs", 150 * IMAGENET_TRAIN, IMAGENET,
        (IMAGENET_TRAIN + IMAGENET_VAL) * PICTURE_GB, 145),
    Way("   and then fine: 300 epochs", 300 * FINE, CITYSCAPES, (FINE + VAL) * PAIR_GB, 11.2),
)  # fmt: skip


def page(step_per_inference: float) -> str:
    """The text, given the cost of a training image in inferences."""
    rates = {
        gpu: LETTER_FPS / step_per_inference * bandwidth / BANDWIDTHS["GTX 1080 Ti"]
        for gpu, bandwidth in BANDWIDTHS.items()
    }
    rows = []
    for way in WAYS:
        hours = [way.images * way.pixels / CITYSCAPES / rate / 3600 for rate in rates.values()]
        times = [f"{h:.0f} h" if h < 72 else f"{h / 24:.0f} days" for h in hours]
        rows.append((way.name, *times, f"{way.downloads_gb:,.0f} GB", f"{way.cache_gb:,.0f} GB"))
    head = ("", *(f"{gpu} class" for gpu in BANDWIDTHS), "downloads", "cache")
    speeds = ", ".join(f"{value:.0f} on a {gpu}" for gpu, value in rates.items())
    cores = ", ".join(f"{value / CORE_PAIRS:.0f}" for value in rates.values())
    return (
        f"A training image was measured to cost {step_per_inference:.1f} inferences (plain fp32, "
        f"two CPU cores). **Estimates, not measurements:**\n\n{markdown(head, rows)}\n\n"
        f"In images of 512x1024 per second: {speeds}; decoding as fast without a cache takes "
        f"{cores} cores. What bf16, `--channels-last` and `--compile` save on a GPU was not "
        "measured; `benchmarks/training.py` measures it in ten minutes."
    )


def main() -> None:
    args = make_parser(__doc__, "--write").parse_args()
    step = read_json(RESULTS / "training.json")["step"][0]["images_per_second"]
    inference = read_json(RESULTS / "inference.json")["results"][0]
    publish(page(inference["fps"] / step), args.write)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
