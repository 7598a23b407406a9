"""Estimate training on 1 to 64 GPUs from a step that was measured on one device.

    python benchmarks/training.py --datadir /data/cityscapes --json benchmarks/results/training.json
    python benchmarks/scaling.py --write docs/scaling.md

Prints markdown, or puts it between the marks in a page. The step comes from the first
command's JSON; what communication adds to it is computed, for links whose speeds are stated
below. Nothing is measured here, and it takes seconds.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

from lednet.errors import UserError, exit_on_user_error
from lednet.io import read_json, write_between_marks
from lednet.model import LEDNet, count_parameters

ROOT = Path(__file__).resolve().parents[1]

FIRST_BUCKET = 2**20
"""Bytes of DDP's first bucket of gradients; the next, of up to 25 MiB, takes all the rest."""
BYTES = 4
"""Of a gradient, and of a running statistic."""
TRAINING_IMAGES = 2975
RECIPE_BATCH, RECIPE_LR = 5, 5e-4
LOSS = 0.1
"""Share of a step that communication may take, for the last column."""


class Link(NamedTuple):
    """Between two neighbours of a ring, one way: what its makers state, and a guess."""

    name: str
    bytes_per_second: float
    latency: float
    """Seconds for a message of no length."""


NVLINK = Link("NVLink 4", 450e9, 5e-6)
PCIE = Link("PCIe 4 x16", 25e9, 10e-6)
ETHERNET = Link("100 Gb/s Ethernet", 12.5e9, 30e-6)
ROWS = ((2, NVLINK), (4, NVLINK), (8, NVLINK), (2, PCIE), (4, PCIE), (8, PCIE),
        (16, ETHERNET), (32, ETHERNET), (64, ETHERNET))  # fmt: skip


def ring_all_reduce(size: int, volume: float, link: Link) -> float:
    """Seconds to sum `volume` bytes over `size` processes: 2(n-1) messages of 1/n each."""
    messages = 2 * (size - 1)
    return messages * (link.latency + volume / size / link.bytes_per_second)


def broadcast(size: int, volume: float, link: Link) -> float:
    """Seconds to pass `volume` bytes on along a chain, in small pieces."""
    return (size - 1) * link.latency + volume / link.bytes_per_second


def communication(size: int, link: Link, gradients: float, statistics: float) -> float:
    """Seconds that a step waits for others.

    DDP hands over its first bucket of gradients while the backward pass goes on, so that
    one is hidden. The rest is ready only at its end. Before the step come the running
    statistics (two broadcasts: numbers and counters), behind it the loss's two sums.
    """
    return (
        ring_all_reduce(size, max(0, gradients - FIRST_BUCKET), link)
        + ring_all_reduce(size, 2 * BYTES, link)
        + broadcast(size, statistics, link)
        + broadcast(size, 0, link)
    )


def learning_rates(batch: int) -> tuple[float, float]:
    """By the linear and the square-root rule, from the paper's batch and rate."""
    ratio = batch / RECIPE_BATCH
    return RECIPE_LR * ratio, RECIPE_LR * ratio**0.5


def batch_table(batch: int) -> list[str]:
    """What a larger batch means for the schedule."""
    lines = [
        f"| GPUs | images a step | updates an epoch ({TRAINING_IMAGES:,} images) | "
        "rate, linear | rate, square root |",
        "|---|---|---|---|---|",
    ]
    for size in (1, 2, 4, 8, 16, 32, 64):
        updates = math.ceil(math.ceil(TRAINING_IMAGES / size) / batch)
        linear, root = learning_rates(size * batch)
        lines.append(f"| {size} | {size * batch} | {updates} | {linear:.1e} | {root:.1e} |")
    return lines


def speed_table(rate: float, batch: int, gradients: float, statistics: float) -> list[str]:
    """Estimates for the links of `ROWS`.

    Args:
        rate: images a second of one device.
    """
    step = batch / rate
    lines = [
        f"| GPUs | slowest link | communication, ms | efficiency | images/s | "
        f"{100 * (1 - LOSS):.0f} % efficient from a step of |",
        "|---|---|---|---|---|---|",
        f"| 1 | | | 100 % | {number(rate)} (measured) | |",
    ]
    for size, link in ROWS:
        seconds = communication(size, link, gradients, statistics)
        efficiency = step / (step + seconds)
        lines.append(
            f"| {size} | {link.name} | {1000 * seconds:.2f} | {100 * efficiency:.1f} % | "
            f"{number(size * rate * efficiency)} | {1000 * seconds * (1 - LOSS) / LOSS:.1f} ms |"
        )
    return lines


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def loader_lines(record: dict[str, Any], rate: float) -> list[str]:
    """What loading gives, against what a device needs."""
    lines = [
        f"One device needs {number(rate)} images/s at that step. One training process got, from "
        "the loader alone:",
        "",
        "| source | loading processes | images/s | devices it feeds |",
        "|---|---|---|---|",
    ]
    for row in record["loader"]:
        source = {"plain": "files", "fast": "cache"}[row["name"]]
        workers, found = row["num_workers"], row["images_per_second"]
        lines.append(f"| {source} | {workers} | {number(found)} | {number(found / rate)} |")
    return lines


def memory_lines(record: dict[str, Any], parameters: int) -> list[str]:
    """What one process takes, measured, and the part that does not depend on the images."""
    fixed = parameters * BYTES * 4 / 1e6
    lines = [
        f"Weights, gradients and Adam's two moments are {fixed:.1f} MB in every process, and DDP "
        f"adds {parameters * BYTES / 1e6:.1f} MB of buckets: activations, which grow with batch "
        "and image size, decide.",
        "",
    ]
    for name, peak in record["peak_memory"].items():
        if peak:
            lines.append(
                f"- {name}: {peak['peak_mb']:,.0f} MB at the peak of two steps, "
                f"{peak['before_mb']:,.0f} MB of them before the first (the "
                f"{record['peak_memory_of']}, in a process of its own, without DDP)"
            )
    return lines


def page(record: dict[str, Any]) -> str:
    """All of it, as markdown."""
    net = LEDNet(20)
    statistics = sum(buffer.numel() for buffer in net.buffers()) * BYTES
    net.encoder_head.requires_grad_(False)
    parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    batch, (height, width) = record["batch_size"], record["size"]
    best = next(row for row in record["step"] if row["name"] == record["best"])
    rate = best["images_per_second"]
    commit = (record["environment"]["commit"] or "unknown")[:10]
    gradients = parameters * BYTES
    head = [
        f"Measured: {best['p50_ms']:.1f} ms a step (median; {best['name']}), batch {batch} of "
        f"{height}x{width}, {number(rate)} images/s, on {record['device']}, commit {commit}.",
        "",
        f"Each step sums {gradients / 1e6:.2f} MB of gradients ({parameters:,} parameters of stage "
        f"2; {count_parameters(net):,} with stage 1's head) and passes on "
        f"{statistics / 1e6:.2f} MB of running statistics.",
    ]
    parts = (
        head,
        ["**Batch and learning rate** (arithmetic)", "", *batch_table(batch)],
        ["**Speed: estimates, not measurements**, each GPU with the same batch", "",
         *speed_table(rate, batch, gradients, statistics)],
        ["**Loading**", "", *loader_lines(record, rate)],
        ["**Memory of one process**", "", *memory_lines(record, parameters)],
    )  # fmt: skip
    return "\n\n".join("\n".join(part).rstrip() for part in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--json", type=Path, metavar="FILE",
                        default=ROOT / "benchmarks/results/training.json",
                        help="of benchmarks/training.py (benchmarks/results/training.json)")
    parser.add_argument("--write", type=Path, metavar="PAGE",
                        help="put the text between this page's marks, instead of printing it")
    # fmt: on
    args = parser.parse_args()
    if not args.json.is_file():
        raise UserError(f"no file {args.json}: run benchmarks/training.py --json first")
    text = page(read_json(args.json))
    if args.write:
        write_between_marks(args.write, "benchmarks/scaling.py", text)
    else:
        print(text)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
