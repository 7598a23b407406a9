"""Prove, measure and train LEDNet on a CUDA GPU, with one command.

    python benchmarks/gpu.py --data /data/cityscapes --golden /data/golden --out gpu --minutes 9.5
    python benchmarks/gpu.py --dry-run --out gpu

Five legs, each in a process of its own with a time limit: the rates of the machine, whether the
results on it are right, inference, training steps, and a real training for the remaining time.
A leg that fails or takes too long is logged, and the next ones run. OUT holds at most six
files: results.json, summary.md (also printed last) and log.txt, and from the last leg
weights.pth, log.jsonl and curves.png. The exit status is 0 if every leg has finished.
--dry-run runs everything on a CPU at tiny sizes, in a few minutes. See docs/gpu.md.
"""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# The scripts that are started from here find lednet, which need not be installed, in this way.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.getenv("PYTHONPATH"))))

from benchmarks._common import ROOT, Row, make_parser, markdown, show
from lednet.errors import UserError, exit_on_user_error
from lednet.io import read_json, write_between_marks, write_json, write_text

WEIGHTS = {"machine": 1.5, "proof": 5.0, "inference": 5.0, "training": 4.0, "run": 7.0}
"""The legs in their order, each with its share of the remaining time."""
RESERVE = 8.0
"""Seconds kept for this process and for ending the last leg."""
LEAST_SECONDS = 15.0
"""A leg with less time is left out."""
ATTEMPTS = 4
"""How often a leg is started whose process ends early; each start resumes the one before."""
LOG_BYTES = 8_000_000
PAGE = ROOT / "docs/gpu.md"
MARK = "LEDNET_GPU_LEG"
"""Environment variable by which the processes of a leg are found, whatever their group."""


class Ended(NamedTuple):
    """How a leg ended: `status` is "ran", "failed", "over its limit" or "left out"."""

    status: str
    seconds: float
    limit: float


def run_leg(name: str, command: Sequence[str], work: Path, log: Path, limit: float) -> Ended:
    """Run a leg for at most `limit` seconds, and append its output to `log`.

    A process that ends early is started again as long as that brings new rows.
    """
    begin, path = time.monotonic(), work / f"{name}.json"
    status = "failed"
    for attempt in range(ATTEMPTS):
        before, left = progress(path), limit - (time.monotonic() - begin)
        if attempt and left < LEAST_SECONDS:
            status = "over its limit"
            break
        seconds = left - min(10.0, 0.15 * left)  # at which the leg ends by itself
        with open(log, "a", encoding="utf-8") as output:
            print(f"\n=== {name}: {left:.0f} s ===", file=output, flush=True)
            code = run_process([*command, "--seconds", f"{seconds:.1f}"], output, left)
        status = {0: "ran", None: "over its limit"}.get(code, "failed")
        if status != "failed" or progress(path) == before:
            break
    return Ended(status, time.monotonic() - begin, limit)


def run_process(command: Sequence[str], output: Any, seconds: float) -> int | None:
    """Exit status, or None if the process and all that it started had to be killed."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    env = {**os.environ, MARK: mark, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for entry in Path("/proc").glob("[0-9]*"):  # processes of torchrun leave the group
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
        process.wait()


def read_leg(path: Path) -> Row:
    """The file that a leg writes; empty if there is none."""
    with contextlib.suppress(UserError):
        return read_json(path)
    return {}


def progress(path: Path) -> tuple[int, Row | None]:
    """Number of measurements, and the current one."""
    found = read_leg(path)
    return len(found.get("rows", [])), found.get("current")


def leg_command(name: str, work: Path) -> list[str]:
    """The command of a leg, without its --seconds."""
    return [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--leg", name,
            "--work", str(work)]  # fmt: skip


def run_legs(args: argparse.Namespace, work: Path) -> Row:
    """Run the legs in order; results and summary are written after each."""
    end = time.monotonic() + 60 * args.minutes - RESERVE
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    results: Row = {"command": command, "dry_run": args.dry_run, "legs": {}}
    log = args.out / "log.txt"
    for index, name in enumerate(args.legs):
        rest = sum(WEIGHTS[leg] for leg in args.legs[index:])
        limit = (end - time.monotonic()) * WEIGHTS[name] / rest
        ended = Ended("left out", 0.0, max(limit, 0.0))
        try:
            if limit >= LEAST_SECONDS:
                print(f"{name}: {limit:.0f} s at most ...", flush=True)
                ended = Ended("interrupted", 0.0, limit)
                ended = run_leg(name, leg_command(name, work), work, log, limit)
        finally:
            print(f"{name}: {ended.status} after {ended.seconds:.0f} s", flush=True)
            found = read_leg(work / f"{name}.json")
            if killed := found.pop("current", None):
                found["rows"].append({**killed, "error": "ended in it; see log.txt"})
            results["legs"][name] = ended._asdict() | found
            write_json(args.out / "results.json", results)
            write_text(args.out / "summary.md", summary(results))
            shorten(log)
    return results


def shorten(log: Path) -> None:
    """Keep the beginning and the end of a log that is too long."""
    content = log.read_bytes() if log.is_file() else b""
    if len(content) > LOG_BYTES:
        half = LOG_BYTES // 2
        log.write_bytes(content[:half] + b"\n... cut out ...\n" + content[-half:])


# The summary


def summary(results: Mapping[str, Any]) -> str:
    """All results as Markdown tables, with the keys of the rows as titles of the columns."""
    parts = [f"`{results['command']}`"]
    if results.get("dry_run"):
        parts.append("A dry run on a CPU: no figure says anything about a GPU.")
    counts = []
    for name, leg in results["legs"].items():
        rows = leg.get("rows", [])
        failed = sum("error" in row or row.get("passed") is False for row in rows)
        times = show(leg["seconds"]), show(leg["limit"])
        counts.append((name, leg["status"], *times, len(rows), failed))
    parts.append(markdown(("leg", "status", "seconds", "limit", "rows", "failed"), counts))
    for name, leg in results["legs"].items():
        if "rows" in leg:
            parts += [f"### {name}", text(leg["info"]), table(leg["rows"])]
        if leg.get("left_out"):
            parts.append(f"No time was left for: {'; '.join(leg['left_out'])}.")
    return "\n\n".join(filter(None, parts)) + "\n"


HIDDEN = ("kind", "runs", "copies_runs", "copies_p95_ms", "flop_ms", "bytes_ms")
"""Keys that are only in results.json."""


def table(rows: Sequence[Row]) -> str:
    """A table of several rows, or a list of the values of one."""
    if len(rows) == 1:
        return "\n".join(f"- {key.replace('_', ' ')}: {text(v)}" for key, v in rows[0].items())
    keys = dict.fromkeys(key for row in rows for key in row if key not in HIDDEN)
    head = [key.replace("_", " ") for key in keys]
    return markdown(head, [[text(row.get(key)) for key in keys] for row in rows])


def text(value: Any) -> str:
    """A value of a row as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return ", ".join(": ".join(map(text, item)) if isinstance(item, list) else text(item)
                         for item in value)  # fmt: skip
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return show(value, digits=4)


# The command


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    parser.add_argument("--data", type=Path, help="folder of the data set (default: toy data)")
    parser.add_argument("--dataset", choices=("cityscapes", "camvid"), default="cityscapes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit (default: 9.5)")
    parser.add_argument("--legs", nargs="+", choices=tuple(WEIGHTS), default=list(WEIGHTS),
                        help="legs to run, always in this order (default: all)")
    parser.add_argument("--only", metavar="REGEX", help="only measurements whose names match")
    parser.add_argument("--golden", type=Path, metavar="DIR",
                        help="outputs of the reference implementation")
    parser.add_argument("--state", type=Path,
                        help="weights to measure with and to train from: a file, a run folder or "
                             "a released name (default: cityscapes-demo-d20, training from "
                             "scratch)")
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU, at tiny sizes")
    parser.add_argument("--write-docs", type=Path, metavar="JSON",
                        help="only write the tables of a results.json into docs/gpu.md")
    parser.add_argument("--leg", choices=tuple(WEIGHTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    # fmt: on
    return parser


MODULES = {"machine": "gpu_legs", "proof": "gpu_proof", "inference": "gpu_speed",
           "training": "gpu_speed", "run": "gpu_legs"}  # fmt: skip
"""Module of the function of each leg, which has the leg's name."""


def run_in_this_process(args: argparse.Namespace) -> NoReturn:
    """Run one leg and end the process."""
    function = getattr(importlib.import_module(f"benchmarks.{MODULES[args.leg]}"), args.leg)
    function(importlib.import_module("benchmarks.gpu_legs").open_leg(args))
    sys.stdout.flush()
    os._exit(0)  # without waiting for threads, whose processes are ended by the parent


def main() -> int:
    args = build_parser().parse_args()
    args.legs = [name for name in WEIGHTS if name in args.legs]
    if args.write_docs:
        write_between_marks(PAGE, "benchmarks/gpu.py", summary(read_json(args.write_docs)))
        return 0
    if args.leg:
        run_in_this_process(args)
    if args.out is None:
        raise UserError("no --out: name a folder for the results")
    for flag in ("data", "golden"):
        path = getattr(args, flag)
        if path and not path.is_dir():
            raise UserError(f"no {path}: check --{flag}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.dry_run:  # more threads do not help on such small tensors
        os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        results = run_legs(args, Path(work))
    print(f"\n{summary(results)}")
    return int(any(leg["status"] != "ran" for leg in results["legs"].values()))


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
