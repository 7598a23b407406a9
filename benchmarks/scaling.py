"""Estimate training on 1 to 64 GPUs from a step that was measured on one device.

    python benchmarks/training.py --datadir /data/cityscapes --json benchmarks/results/training.json
    python benchmarks/scaling.py --write docs/scaling.md

The step comes from the first command's JSON; the cost of communication is computed for links
with the speeds below. Nothing is measured here.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import RESULTS, Row, make_parser, markdown, publish, show
from lednet.errors import UserError, exit_on_user_error
from lednet.io import read_json
from lednet.model import LEDNet, count_parameters

FIRST_BUCKET = 2**20
"""Bytes of DDP's first bucket of gradients; the next, of up to 25 MiB, takes all the rest."""
BYTES = 4
"""Bytes of a gradient, and of a running statistic."""
TRAINING_IMAGES = 2975
RECIPE_BATCH, RECIPE_LR = 5, 5e-4
LOSS = 0.1
"""Share of a step that communication may take, for the last column."""


class Link(NamedTuple):
    """A link between two neighbours of a ring, in one direction: the vendor's bytes per second,
    and an assumed latency of a message in seconds."""

    name: str
    bytes_per_second: float
    latency: float


NVLINK = Link("NVLink 4", 450e9, 5e-6)
PCIE = Link("PCIe 4 x16", 25e9, 10e-6)
ETHERNET = Link("100 Gb/s Ethernet", 12.5e9, 30e-6)
ROWS = ((2, NVLINK), (4, NVLINK), (8, NVLINK), (2, PCIE), (4, PCIE), (8, PCIE),
        (16, ETHERNET), (32, ETHERNET), (64, ETHERNET))  # fmt: skip


def communication(size: int, link: Link, gradients: float, statistics: float) -> float:
    """Seconds that a step waits for other processes.

    DDP reduces its first bucket of gradients during the backward pass, which hides it. The rest
    is ready only at its end. Running statistics are broadcast before the step (numbers and
    counters), and the two sums of the loss are reduced after it.
    """

    def all_reduce(volume: float) -> float:  # in a ring: 2(n-1) messages of 1/n each
        return 2 * (size - 1) * (link.latency + volume / size / link.bytes_per_second)

    broadcasts = 2 * (size - 1) * link.latency + statistics / link.bytes_per_second
    return all_reduce(max(0, gradients - FIRST_BUCKET)) + all_reduce(2 * BYTES) + broadcasts


def batch_table(batch: int) -> str:
    """Updates and learning rates of larger batches, from the paper's batch and rate."""
    rows = []
    for size in (1, 2, 4, 8, 16, 32, 64):
        updates = math.ceil(math.ceil(TRAINING_IMAGES / size) / batch)
        ratio = size * batch / RECIPE_BATCH
        linear, root = RECIPE_LR * ratio, RECIPE_LR * ratio**0.5
        rows.append((size, size * batch, updates, f"{linear:.1e}", f"{root:.1e}"))
    return markdown(
        ("GPUs", "images a step", f"updates an epoch ({TRAINING_IMAGES:,} images)",
         "rate, linear", "rate, square root"), rows,
    )  # fmt: skip


def speed_table(rate: float, batch: int, gradients: float, statistics: float) -> str:
    """Estimates for the links of `ROWS`, from the images per second of one device."""
    step = batch / rate
    rows = [(1, "", "", "100 %", f"{show(rate)} (measured)", "")]
    for size, link in ROWS:
        seconds = communication(size, link, gradients, statistics)
        efficiency = step / (step + seconds)
        rows.append((size, link.name, f"{1000 * seconds:.2f}", f"{100 * efficiency:.1f} %",
                     show(size * rate * efficiency),
                     f"{1000 * seconds * (1 - LOSS) / LOSS:.1f} ms"))  # fmt: skip
    return markdown(
        ("GPUs", "slowest link", "communication, ms", "efficiency", "images/s",
         f"{100 * (1 - LOSS):.0f} % efficient from a step of"), rows,
    )  # fmt: skip


def page(record: Row) -> str:
    """All of it as Markdown, from the record of benchmarks/training.py."""
    net = LEDNet(20)
    statistics = sum(buffer.numel() for buffer in net.buffers()) * BYTES
    net.encoder_head.requires_grad_(False)
    parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    batch, (height, width) = record["batch_size"], record["size"]
    best = next(row for row in record["step"] if row["name"] == record["best"])
    rate = best["images_per_second"]
    commit = (record["environment"]["commit"] or "unknown")[:10]
    sources = {"plain": "files", "fast": "cache"}
    loading = [
        (sources[row["name"]], row["num_workers"], show(row["images_per_second"]),
         show(row["images_per_second"] / rate))
        for row in record["loader"]
    ]  # fmt: skip
    memory = [
        f"- {name}: {peak['peak_mb']:,.0f} MB at the peak of two steps, "
        f"{peak['before_mb']:,.0f} MB of them before the first (the {record['peak_memory_of']}, in "
        "a process of its own, without DDP)"
        for name, peak in record["peak_memory"].items() if peak
    ]  # fmt: skip
    parts = (
        f"Measured: {best['p50_ms']:.1f} ms a step (median; {best['name']}), batch {batch} of "
        f"{height}x{width}, {show(rate)} images/s, on {record['device']}, commit {commit}.",
        f"Each step sums {parameters * BYTES / 1e6:.2f} MB of gradients ({parameters:,} parameters "
        f"of stage 2; {count_parameters(net):,} with stage 1's head) and broadcasts "
        f"{statistics / 1e6:.2f} MB of running statistics.",
        "**Batch and learning rate** (arithmetic)",
        batch_table(batch),
        "**Speed: estimates, not measurements**, each GPU with the same batch",
        speed_table(rate, batch, parameters * BYTES, statistics),
        "**Loading**",
        f"One device needs {show(rate)} images/s at that step. One training process got, from "
        "the loader alone:",
        markdown(("source", "loading processes", "images/s", "devices it feeds"), loading),
        "**Memory of one process**",
        f"Weights, gradients and Adam's two moments are {parameters * BYTES * 4 / 1e6:.1f} MB in "
        f"every process, and DDP adds {parameters * BYTES / 1e6:.1f} MB of buckets: activations, "
        "which grow with batch and image size, decide.",
        "\n".join(memory),
    )
    return "\n\n".join(parts).rstrip() + "\n"


def main() -> None:
    parser = make_parser(__doc__, "--write")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=RESULTS / "training.json",
        help="of benchmarks/training.py (default: benchmarks/results/training.json)",
    )
    args = parser.parse_args()
    if not args.json.is_file():
        raise UserError(f"no file {args.json}: run benchmarks/training.py --json first")
    publish(page(read_json(args.json)), args.write)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
