"""A training step and a forward pass with settings of OpenMP, with and without a busy neighbour.

    python benchmarks/threads.py --json threads.json

Each row is a new process with two threads: milliseconds (median) of a step on two images of
256x512, and of a forward pass of one. The neighbour is a process that computes all the time.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch.nn.functional import cross_entropy

from benchmarks._common import Row, add_options, make_parser, print_row, write_record
from lednet.errors import exit_on_user_error
from lednet.model import LEDNet

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "passive, short spin": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"},
}
"""The last is that of the scripts."""


def median_ms(call: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def measure(runs: int) -> None:
    """Print the two medians."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    net = LEDNet(20)
    optimizer = torch.optim.Adam(net.parameters())
    images, labels = torch.rand(2, 3, 256, 512), torch.randint(0, 20, (2, 256, 512))

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(images), labels).backward()
        optimizer.step()

    print(median_ms(step, runs))
    net.eval()
    with torch.inference_mode():
        print(median_ms(lambda: net(images[:1]), 2 * runs))


def main() -> None:
    parser = make_parser(__doc__, "--json")
    add_options(parser, runs=(8, "timed steps, and twice as many forward passes"))
    parser.add_argument("--measure", action="store_true", help="measure in this process only")
    args = parser.parse_args()
    if args.measure:
        measure(args.runs)
        return
    command = [sys.executable, __file__, "--measure", "--runs", str(args.runs)]
    plain = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    rows: list[Row] = []
    for busy in (False, True):
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            for name, setting in SETTINGS.items():
                output = subprocess.check_output(command, env=plain | setting, text=True)
                step, forward = map(round, map(float, output.split()))
                rows.append({"neighbour": busy, "OpenMP": name, "step_ms": step,
                             "forward_ms": forward})  # fmt: skip
                print_row(rows[-1])
        finally:
            if neighbour:
                neighbour.kill()
    write_record(args.json, torch.device("cpu"), {"results": rows})


if __name__ == "__main__":
    with exit_on_user_error():
        main()
