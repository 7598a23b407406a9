"""Shared by the benchmarks: options, timing, alternating runs, tables, plots and records."""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from lednet.device import describe_device, synchronize
from lednet.io import write_atomically, write_between_marks, write_json
from lednet.training.run_dir import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"

Row = dict[str, Any]
Name = TypeVar("Name")
Result = TypeVar("Result")


# Options and records

OPTIONS: dict[str, dict[str, Any]] = {
    "--json": {"type": Path, "metavar": "FILE", "help": "write results and conditions to FILE"},
    "--plot": {"type": Path, "metavar": "PNG", "help": "draw the results into PNG"},
    "--device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "(default: auto)"},
    "--page": {"type": Path, "help": "write the table between the marks of this page"},
    "--write": {"type": Path, "metavar": "PAGE",
                "help": "write the text between the marks of PAGE instead of printing it"},
}  # fmt: skip
"""Options that several scripts have."""


def make_parser(doc: str | None, *options: str) -> argparse.ArgumentParser:
    """A parser with a script's docstring as help, and `options` of `OPTIONS`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    for option in options:
        parser.add_argument(option, **OPTIONS[option])
    return parser


def add_options(parser: argparse.ArgumentParser, **options: tuple[Any, str]) -> None:
    """Add an option for each keyword: its default, which also gives its type, and its help."""
    for name, (default, text) in options.items():
        kind: Row = {"type": type(default)}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        text = f"{text} (default: %(default)s)"
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **kind)


def conditions(device: torch.device) -> Row:
    """Command, device and environment, for a record of results."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"command": command, "device": describe_device(device), "environment": environment(ROOT)}


def write_record(path: Path | None, device: torch.device, results: Row) -> None:
    """Write results with their conditions as JSON; do nothing without a path."""
    if path:
        write_json(path, conditions(device) | results)


def publish(text: str, page: Path | None) -> None:
    """Print a text, or write it between the marks of this script in a page."""
    if page:
        write_between_marks(page, f"benchmarks/{Path(sys.argv[0]).name}", text)
    else:
        print(text)


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


def alternate(
    competitors: Mapping[Name, Callable[[], Result]], rounds: int, warmup: int = 0
) -> dict[Name, list[Result]]:
    """Results of each competitor. All run in turn in every round, so that they share the
    machine's load; those of the first `warmup` rounds are left out."""
    results: dict[Name, list[Result]] = {name: [] for name in competitors}
    for number in tqdm(range(warmup + rounds), "round", leave=False):
        for name, run in competitors.items():
            result = run()
            if number >= warmup:
                results[name].append(result)
    return results


def percentiles(times: Sequence[float]) -> Row:
    return {"p50_ms": statistics.median(times), "p95_ms": float(np.quantile(times, 0.95))}


def summarize(times: Sequence[float], images: int) -> Row:
    """Percentiles of `times` in ms, and images per second by the median."""
    found = percentiles(times)
    return found | {"fps": 1000 * images / found["p50_ms"], "runs": len(times)}


def call_alone(function: Callable[..., Result], *arguments: Any) -> Result | None:
    """Call a function in a new process; None if it fails."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except Exception as error:
            print(f"failed in a process of its own: {error}")
            return None


# Tables and plots


def print_row(row: Row) -> None:
    """Print the values of a row with their names."""
    values = {key: value for key, value in row.items() if value is not None}
    print(", ".join(f"{key} {show(value)}" for key, value in values.items()), flush=True)


def show(value: Any, digits: int = 3) -> str:
    """A number in few characters; other values as text, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
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


def save_figure(figure: Figure, path: Path) -> None:
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110)


def plot_bars(
    path: Path, title: str, xlabel: str, panels: Mapping[str, Sequence[tuple[str, float, str, str]]]
) -> None:
    """Horizontal bars, a panel for each of `panels`: (name, value, text, colour) of each bar."""
    height = 1.6 + 0.45 * max(map(len, panels.values()))
    figure = Figure(figsize=(6 * len(panels), height), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, bars) in zip(axes, panels.items(), strict=True):
        labels, values, texts, colors = zip(*bars, strict=True)
        axis.barh(labels, values, color=colors)
        for y, (value, text) in enumerate(zip(values, texts, strict=True)):
            axis.text(value, y, f" {text}", va="center")
        axis.set(xlim=(0, 1.45 * max(values)), title=name, xlabel=xlabel)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
