"""Estimate the hours and the disk space of the three ways to train, on GPUs of three classes.

    python benchmarks/hours.py --write docs/training.md

Prints markdown, or puts it between the marks in a page; takes a second. Nothing is measured
here. What a training step costs in units of an inference was measured (benchmarks/training.py
and inference.py, plain fp32 both); the letter measured inference on a GTX 1080 Ti, 71 FPS at
512x1024; and a network of so few operations to each byte is taken to speed up as the memory of
the GPU does.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from lednet.errors import exit_on_user_error
from lednet.io import read_json, write_between_marks

ROOT = Path(__file__).resolve().parents[1]

LETTER_FPS = 71
"""On a GTX 1080 Ti at 512x1024 (the letter)."""
BANDWIDTHS = {"GTX 1080 Ti": 484, "RTX 4090": 1008, "H200": 4800}
"""Of the GPU's memory, GB/s (their makers)."""
CITYSCAPES, IMAGENET = 512 * 1024, 224 * 224
FINE, EXTRA, VAL = 2975, 19_998, 500
"""Cityscapes images: train, train_extra, val."""
IMAGENET_TRAIN, IMAGENET_VAL = 1_281_167, 50_000
CORE_PAIRS = 13.8
"""Cityscapes pairs that one core reads from files in a second (docs/speed.md)."""


class Way(NamedTuple):
    """A way to train, or a step of it.

    Attributes:
        images: trained on in all.
        pixels: of each.
        cache_gb: size of its cache.
        downloads_gb: of the archives, as their pages state.
    """

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
    lines = [
        f"A training image was measured to cost {step_per_inference:.1f} inferences (plain fp32, "
        "two CPU cores). **Estimates, not measurements:**",
        "",
        f"| | {' | '.join(f'{gpu} class' for gpu in BANDWIDTHS)} | downloads | cache |",
        f"|---|{'---|' * (len(BANDWIDTHS) + 2)}",
    ]
    rates = {
        gpu: LETTER_FPS / step_per_inference * bandwidth / BANDWIDTHS["GTX 1080 Ti"]
        for gpu, bandwidth in BANDWIDTHS.items()
    }
    for way in WAYS:
        hours = [
            f"{hours_text(way.images * way.pixels / CITYSCAPES / rate / 3600)}"
            for rate in rates.values()
        ]
        lines.append(
            f"| {way.name} | {' | '.join(hours)} | {way.downloads_gb:,.0f} GB "
            f"| {way.cache_gb:,.0f} GB |"
        )
    rate = ", ".join(f"{value:.0f} on a {gpu}" for gpu, value in rates.items())
    cores = ", ".join(f"{value / CORE_PAIRS:.0f}" for value in rates.values())
    lines += [
        "",
        f"That is, in images of 512x1024 a second, {rate}; to decode as fast without a cache takes "
        f"{cores} cores. What bf16, `--channels-last` and `--compile` save on a GPU was not "
        "measured; `benchmarks/training.py` does it in ten minutes.",
    ]
    return "\n".join(lines)


def hours_text(hours: float) -> str:
    return f"{hours:.0f} h" if hours < 72 else f"{hours / 24:.0f} days"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the text into this page")
    args = parser.parse_args()
    results = ROOT / "benchmarks/results"
    step = read_json(results / "training.json")["step"][0]["images_per_second"]
    inference = read_json(results / "inference.json")["results"][0]
    text = page(inference["fps"] / step)
    if args.write:
        write_between_marks(args.write, "benchmarks/hours.py", text)
    else:
        print(text)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
