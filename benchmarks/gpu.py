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
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# The scripts that are started from here find lednet, which need not be installed, in this way.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.getenv("PYTHONPATH"))))

from benchmarks._common import Row, make_parser, markdown, show
from lednet.errors import UserError, exit_on_user_error
from lednet.io import read_json, write_json, write_text

LEGS = {"machine": ("gpu_legs", 1.5), "proof": ("gpu_proof", 5.0), "inference": ("gpu_speed", 5.0),
        "training": ("gpu_speed", 4.0), "run": ("gpu_legs", 7.0)}  # fmt: skip
"""The legs in their order: the module of the function of the same name, and the share of the
remaining time."""
RESERVE = 8.0
"""Seconds kept for this process and for ending the last leg."""
LEAST_SECONDS = 15.0
"""A leg with less time is left out."""
ATTEMPTS = 4
"""How often a leg is started whose process ends early; each start resumes the one before."""
MARK = "LEDNET_GPU_LEG"
"""Environment variable by which the processes of a leg are found, whatever their group."""


def run_leg(command: Sequence[str], path: Path, log: Path, limit: float) -> str:
    """Run a leg, which writes `path`, for at most `limit` seconds; append its output to `log`.

    A process that ends early is started again as long as that brings new rows.

    Returns:
        "ran", "failed" or "over its limit".
    """
    end, status = time.monotonic() + limit, "failed"
    for attempt in range(ATTEMPTS):
        before, left = read_leg(path), end - time.monotonic()
        if attempt and left < LEAST_SECONDS:
            return "over its limit"
        seconds = left - min(10.0, 0.15 * left)  # at which the leg ends by itself
        with open(log, "a", encoding="utf-8") as output:
            print(f"\n=== {path.stem}: {left:.0f} s ===", file=output, flush=True)
            code = run_process([*command, "--seconds", f"{seconds:.1f}"], output, left)
        status = {0: "ran", None: "over its limit"}.get(code, "failed")
        if status != "failed" or read_leg(path) == before:
            break
    return status


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


def leg_command(name: str, work: Path) -> list[str]:
    """The command of a leg, without its --seconds."""
    return [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--leg", name,
            "--work", str(work)]  # fmt: skip


def run_legs(args: argparse.Namespace, work: Path) -> Row:
    """Run the legs in order; results and summary are written after each."""
    end = time.monotonic() + 60 * args.minutes - RESERVE
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    results: Row = {"command": command, "dry_run": args.dry_run, "legs": {}}
    for index, name in enumerate(args.legs):
        begin, path = time.monotonic(), work / f"{name}.json"
        rest = sum(LEGS[leg][1] for leg in args.legs[index:])
        limit = (end - begin) * LEGS[name][1] / rest
        ended: Row = {"status": "left out", "limit": max(limit, 0.0)}
        try:
            if limit >= LEAST_SECONDS:
                print(f"{name}: {limit:.0f} s at most ...", flush=True)
                ended["status"] = "interrupted"
                log = args.out / "log.txt"
                ended["status"] = run_leg(leg_command(name, work), path, log, limit)
        finally:
            ended["seconds"] = time.monotonic() - begin
            print(f"{name}: {ended['status']} after {ended['seconds']:.0f} s", flush=True)
            found = read_leg(path)
            if killed := found.pop("current", None):
                found["rows"].append({**killed, "error": "ended in it; see log.txt"})
            results["legs"][name] = ended | found
            write_json(args.out / "results.json", results)
            write_text(args.out / "summary.md", summary(results))
    return results


# The summary


def summary(results: Mapping[str, Any]) -> str:
    """All results as Markdown tables, with the keys of the rows as titles of the columns."""
    parts = [f"`{results['command']}`"]
    if results["dry_run"]:
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
    return show(value, digits=4)


# The command


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    parser.add_argument("--data", type=Path, help="folder of the data set (default: toy data)")
    parser.add_argument("--dataset", choices=("cityscapes", "camvid"), default="cityscapes",
                        help="layout of --data")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True,
                        help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit")
    parser.add_argument("--legs", nargs="+", choices=tuple(LEGS), default=list(LEGS),
                        help="legs to run, always in this order (default: all)")
    parser.add_argument("--only", metavar="REGEX", help="only measurements whose names match")
    parser.add_argument("--golden", type=Path, metavar="DIR",
                        help="outputs of the reference implementation")
    parser.add_argument("--state", type=Path,
                        help="weights to measure with and to train from: a file, a run folder or "
                             "a released name (default: cityscapes-d20, training from "
                             "scratch)")
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU, at tiny sizes")
    parser.add_argument("--leg", choices=tuple(LEGS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    # fmt: on
    return parser


def run_in_this_process(args: argparse.Namespace) -> NoReturn:
    """Run one leg and end the process."""
    function = getattr(importlib.import_module(f"benchmarks.{LEGS[args.leg][0]}"), args.leg)
    function(importlib.import_module("benchmarks.gpu_legs").open_leg(args))
    sys.stdout.flush()
    os._exit(0)  # without waiting for threads, whose processes are ended by the parent


def main() -> int:
    args = build_parser().parse_args()
    if args.leg:
        run_in_this_process(args)
    args.legs = [name for name in LEGS if name in args.legs]
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
