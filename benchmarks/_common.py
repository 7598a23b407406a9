"""Shared by the benchmarks: timing, alternating runs, tables, plots and records."""

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure

from lednet.cli import common
from lednet.cli.common import DEVICES
from lednet.device import autocast, describe_device, synchronize
from lednet.inference.benchmark import percentiles, with_rate
from lednet.io import write_atomically, write_json
from lednet.progress import progress_bar
from lednet.training.run_dir import environment

ROOT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]
Size = tuple[int, int]
Name = TypeVar("Name")
Result = TypeVar("Result")


OPTIONS: dict[str, dict[str, Any]] = {
    "--json": {"type": Path, "metavar": "FILE", "help": "write results and conditions"},
    "--plot": {"type": Path, "metavar": "PNG", "help": "draw the results"},
    "--device": {"choices": DEVICES, "default": "auto", "help": "device to run on"},
}
"""Options that several scripts have."""


def make_parser(doc: str | None, *options: str) -> argparse.ArgumentParser:
    """A parser with a script's docstring as help, and `options` of `OPTIONS`."""
    parser = common.make_parser(doc)
    for option in options:
        parser.add_argument(option, **OPTIONS[option])
    return parser


def add_options(parser: argparse.ArgumentParser, **options: tuple[int | bool, str]) -> None:
    """Add an option for each keyword: its default (a positive number or a switch), and its help."""
    for name, (default, text) in options.items():
        kind: Row = {"type": common.POSITIVE}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **kind)


def write_record(path: Path | None, device: torch.device, results: Row) -> None:
    """Write results with command, device and environment as JSON; do nothing without a path."""
    if path:
        command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        conditions = {"command": command, "device": describe_device(device)}
        write_json(path, conditions | {"environment": environment()} | results)


# Timing


class Stopwatch:
    """Times between ticks in milliseconds.

    On CUDA they are taken by events, without waiting for the device. With `host_clock`, and on
    other devices, the device is synchronized at each tick.
    """

    def __init__(self, device: torch.device, host_clock: bool = False):
        self.device = device
        self.events = device.type == "cuda" and not host_clock
        self.marks: list[Any] = []

    def tick(self) -> None:
        if self.events:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            synchronize(self.device)
            self.marks.append(1000 * time.perf_counter())

    def times(self) -> list[float]:
        synchronize(self.device)
        pairs = itertools.pairwise(self.marks)
        return [a.elapsed_time(b) if self.events else b - a for a, b in pairs]


def time_each(calls: Iterable[object], device: torch.device, host_clock: bool = False) -> list:
    """Milliseconds of each step of an iterator."""
    watch = Stopwatch(device, host_clock)
    watch.tick()
    for _ in calls:
        watch.tick()
    return watch.times()


def time_calls(
    call: Callable[[], object],
    device: torch.device,
    seconds: float = 0.6,
    host_clock: bool = False,
) -> list[float]:
    """Milliseconds of each of 5 to 300 calls, about `seconds` in all, after four to warm up."""
    for _ in range(3):
        call()
    last = time_each((call() for _ in range(1)), device, host_clock=True)[0]
    count = min(300, max(5, round(1000 * seconds / max(last, 1e-3))))
    return time_each((call() for _ in range(count)), device, host_clock)


def summarize(times: Sequence[float], images: int = 1) -> Row:
    """Median, 95th percentile, images per second by the median, and whether times are noisy.

    Args:
        times: milliseconds, each of `images` images.
    """
    return with_rate(percentiles(times), images) | {"runs": len(times)}


DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16}  # fmt: skip


def tf32_mode(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """TF32 forbidden on CUDA for "fp32" and allowed for the others; tensors have 16-bit types."""
    return autocast(device, "tf32" if device.type == "cuda" and precision != "fp32" else "fp32")


def rates(amount: float, times: Sequence[float]) -> Row:
    """Best and median of `amount` over `times` in ms, both per second."""
    found = summarize(times)
    best, median = (1000 * amount / t for t in (min(times), found["p50_ms"]))
    return {"best": best, "median": median, "runs": len(times), "noisy": found["noisy"]}


def product_rate(device: torch.device, precision: str, side: int, seconds: float = 0.3) -> Row:
    """TFLOP/s of a product of two square matrices of random values."""
    with tf32_mode(device, precision), torch.inference_mode():
        a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
        out = torch.empty_like(a)
        times = time_calls(lambda: torch.matmul(a, b, out=out), device, seconds)
    return rates(2 * side**3 / 1e12, times)


def alternate(
    competitors: Mapping[Name, Callable[[], Result]], rounds: int, warmup: int = 0
) -> dict[Name, list[Result]]:
    """Results of each competitor. All run in turn in every round, so that they share the
    machine's load; those of the first `warmup` rounds are left out."""
    results: dict[Name, list[Result]] = {name: [] for name in competitors}
    for number in progress_bar(range(warmup + rounds), unit="round"):
        for name, run in competitors.items():
            result = run()
            if number >= warmup:
                results[name].append(result)
    return results


# Tables and plots


def print_row(row: Row) -> None:
    """Print the values of a row with their names."""
    values = {key: value for key, value in row.items() if value is not None}
    print(", ".join(f"{key} {show(value)}" for key, value in values.items()), flush=True)


def show(value: Any, digits: int = 3) -> str:
    """A number in few characters; other values as text, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    ruler = "|---" * len(head) + "|"
    first, *rest = (f"| {' | '.join(line)} |" for line in (head, *lines))
    return "\n".join((first, ruler, *rest))


def plot_bars(path: Path, title: str, panels: Mapping[str, Sequence[Row]]) -> None:
    """Horizontal bars of "ratio_to_plain", a panel for each of `panels`; noisy ones are grey.

    Rows have a "name" and "p50_ms" of an image or a batch; "num_workers" is added to the name.
    """
    height = 1.6 + 0.45 * max(map(len, panels.values()))
    figure = Figure(figsize=(6 * len(panels), height), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        for y, row in enumerate(rows):
            ratio = row["ratio_to_plain"]
            axis.barh(y, ratio, color="#bab0ac" if row["noisy"] else "#4c78a8")
            text = f" {ratio:.2f}x, {show(row['p50_ms'])} ms" + ", noisy" * row["noisy"]
            axis.text(ratio, y, text, va="center")
        labels = [row["name"] + (f", {row['num_workers']} workers" if "num_workers" in row else "")
                  for row in rows]  # fmt: skip
        axis.set_yticks(range(len(rows)), labels)
        axis.set(xlim=(0, 1.45 * max(row["ratio_to_plain"] for row in rows)), title=name)
        axis.set_xlabel("times as fast as plain")
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110)
