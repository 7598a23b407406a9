"""Prove, measure and train LEDNet on a CUDA GPU, with one command.

    python benchmarks/gpu.py --data /data/cityscapes --golden /data/golden --out gpu --minutes 9.5
    python benchmarks/gpu.py --dry-run --out gpu

Five legs, each in a process of its own with a time limit: what the machine can do, whether the
results on it are right, inference, training steps, and a real training for the time that is
left. A leg that fails or takes too long is logged, and the next ones run. OUT holds at most six
files: results.json, summary.md (printed at the end, too) and log.txt, and of the last leg
weights.pth, log.jsonl and curves.png. The exit status is 0 if every leg has run to its end.
--dry-run does it all on a CPU at tiny sizes, in a few minutes. docs/gpu.md says more.
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
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
# lednet may not be installed on a machine that is lent for minutes. Scripts that are started from
# here find it by PYTHONPATH.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
if "benchmarks" not in sys.modules:  # an installed package may have this name too
    sys.modules["benchmarks"] = types.ModuleType("benchmarks")
    sys.modules["benchmarks"].__path__ = [str(ROOT / "benchmarks")]

from lednet.errors import UserError, exit_on_user_error
from lednet.io import read_json, write_between_marks, write_json, write_text

Row = dict[str, Any]

WEIGHTS = {"machine": 1.5, "proof": 5.0, "inference": 5.0, "training": 4.0, "run": 7.0}
"""The legs in their order. Each gets its share of the time that is left; what it does not use
goes to the next ones."""
RESERVE = 8.0
"""Seconds that no leg gets: for this process, and for ending the last one."""
LEAST_SECONDS = 15.0
"""A leg that would get less is left out."""
ATTEMPTS = 4
"""How often a leg is started whose process ends in the middle; it continues after that point."""
LOG_BYTES = 8_000_000
PAGE = ROOT / "docs/gpu.md"
MARK = "LEDNET_GPU_LEG"
"""Environment variable by which the processes of a leg are found, whatever their group."""


class Ended(NamedTuple):
    """How a leg ended: `status` is "ran", "failed", "over its limit" or "left out"."""

    status: str
    seconds: float
    limit: float


def run_leg(
    name: str,
    command: Sequence[str],
    work: Path,
    log: Path,
    limit: float,
) -> Ended:
    """Run a leg for at most `limit` seconds; its output is added to `log`.

    A process that ends early, in whatever way, is started again while that brings new rows.
    """
    begin = time.monotonic()
    found = work / f"{name}.json"
    status = "failed"
    for _ in range(ATTEMPTS):
        rows = len(rows_of(found))
        left = limit - (time.monotonic() - begin)
        with open(log, "a", encoding="utf-8") as output:
            print(f"\n=== {name}: {left:.0f} s ===", file=output, flush=True)
            code = run_process([*command, "--seconds", f"{left - margin(left):.1f}"], output, left)
        if code is None:
            status = "over its limit"
            break
        if code == 0:
            status = "ran"
            break
        left = limit - (time.monotonic() - begin)
        came_further = len(rows_of(found)) > rows or current_of(found) is not None
        if left < LEAST_SECONDS:
            status = "over its limit"
        if left < LEAST_SECONDS or not came_further:
            break
    return Ended(status, time.monotonic() - begin, limit)


def margin(seconds: float) -> float:
    """Seconds before its limit at which a leg ends by itself."""
    return min(10.0, 0.15 * seconds)


def run_process(command: Sequence[str], output: Any, seconds: float) -> int | None:
    """Exit status; None if the process had to be ended, with all that it has started."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    environment = {**os.environ, MARK: mark, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process, mark)


def end_group(process: subprocess.Popen, mark: str) -> None:
    """End a process, its group, and what has left the group, as processes of torchrun do."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
    process.wait()


def content_of(path: Path) -> dict[str, Any]:
    with contextlib.suppress(UserError):
        found = read_json(path)
        if isinstance(found, dict):
            return found
    return {}


def rows_of(path: Path) -> list[Row]:
    return content_of(path).get("rows", [])


def current_of(path: Path) -> Row | None:
    return content_of(path).get("current")


def leg_command(name: str, work: Path) -> list[str]:
    """The command of a leg, but for its --seconds."""
    return [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--leg", name,
            "--work", str(work)]  # fmt: skip


def run_legs(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All legs, one after the other; results and summary are written after each."""
    end = time.monotonic() + 60 * args.minutes - RESERVE
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "dry_run": args.dry_run,
        "legs": {},
    }
    log = args.out / "log.txt"
    for place, name in enumerate(args.legs):
        rest = sum(WEIGHTS[leg] for leg in args.legs[place:])
        limit = (end - time.monotonic()) * WEIGHTS[name] / rest
        ended = Ended("left out", 0.0, max(limit, 0.0))
        try:
            if limit >= LEAST_SECONDS:
                print(f"{name}: {limit:.0f} s at most ...", flush=True)
                ended = Ended("interrupted", 0.0, limit)
                ended = run_leg(name, leg_command(name, work), work, log, limit)
        finally:
            print(f"{name}: {ended.status} after {ended.seconds:.0f} s", flush=True)
            results["legs"][name] = {**ended._asdict(), **rows_of_leg(work / f"{name}.json")}
            write_json(args.out / "results.json", results)
            write_text(args.out / "summary.md", summary(results))
            shorten(log)
    return results


def rows_of_leg(path: Path) -> dict[str, Any]:
    """What a leg has written, with a row for the measurement in which it was ended."""
    found = content_of(path)
    kept: dict[str, Any] = {key: found[key] for key in ("rows", "info", "left_out") if key in found}
    if lost := found.get("current"):
        kept["rows"] = [*kept.get("rows", []), {**lost, "error": "ended in it; see log.txt"}]
    return kept


def shorten(log: Path) -> None:
    """Keep the beginning and the end of a log that has grown too long to be sent home."""
    content = log.read_bytes() if log.is_file() else b""
    if len(content) > LOG_BYTES:
        half = LOG_BYTES // 2
        log.write_bytes(content[:half] + b"\n... cut out ...\n" + content[-half:])


# The summary


def summary(results: Mapping[str, Any]) -> str:
    """All results as Markdown tables."""
    parts = [f"`{results['command']}`"]
    if results.get("dry_run"):
        parts.append("A dry run on a CPU: no figure says anything about a GPU.")
    legs = results["legs"]
    head = ("leg", "", "seconds", "limit", "rows", "failed")
    parts.append(table(head, map(leg_line, legs.items())))
    for name, leg in legs.items():
        if leg.get("rows") or leg.get("info"):
            parts.append(f"### {TITLES[name]}")
            parts += TABLES[name](leg)
        if leg.get("left_out"):
            parts.append(f"No time was left for: {'; '.join(leg['left_out'])}.")
    return "\n\n".join(parts) + "\n"


def leg_line(item: tuple[str, Row]) -> tuple[Any, ...]:
    name, leg = item
    rows = leg.get("rows", [])
    failed = sum("error" in row or row.get("passed") is False for row in rows)
    return name, leg["status"], show(leg["seconds"]), show(leg["limit"]), len(rows), failed


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    cells = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells).replace("| --- ", "|---")


def show(value: Any, percent: bool = False) -> str:
    """A number in few characters."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if percent:
        return f"{100 * value:.2f} %"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def remark(row: Row) -> str:
    return f"**{row['error']}**" if "error" in row else str(row.get("note", ""))


def machine_tables(leg: Row) -> list[str]:
    info = {key: value for key, value in leg.get("info", {}).items() if key != "ceilings"}
    facts = ", ".join(f"{key} {show(value)}" for key, value in info.items() if value is not None)
    head = ("measured", "best", "median", "", "remark")
    lines = ((row["name"], show(row.get("best")), show(row.get("median")), row.get("unit", ""),
              remark(row)) for row in leg.get("rows", []))  # fmt: skip
    return [facts, table(head, lines)]


def proof_tables(leg: Row) -> list[str]:
    verdicts = {True: "yes", False: "**NO**", None: ""}
    lines = []
    for row in leg["rows"]:
        equal = row.get("equal_labels")
        text = remark(row) or ("" if equal is None else f"{show(equal, True)} equal labels")
        lines.append((row["name"], show(row.get("value")), row.get("limit", ""),
                      verdicts[row.get("passed")], text))  # fmt: skip
    return [table(("check", "value", "limit", "passed", "remark"), lines)]


def size_of(row: Row) -> str:
    return f"{row['height']}x{row['width']} x{row['batch']}"


def inference_tables(leg: Row) -> list[str]:
    published = {
        (row["scope"], size_of(row)): row["p50_ms"]
        for row in leg["rows"]
        if row["title"].startswith("as published, eager, fp32") and "p50_ms" in row
    }
    lines = []
    for row in leg["rows"]:
        p50, floor = row.get("p50_ms"), row.get("floor_ms")
        plain = published.get((row["scope"], size_of(row)))
        lines.append((
            row["title"], row["scope"], size_of(row), show(p50), show(row.get("p95_ms")),
            show(row.get("fps")), show(row.get("copies_p50_ms")), show(row.get("copies_fps")),
            show(plain / p50 if plain and p50 else None), show(floor),
            show(floor / p50 if floor and p50 else None, True), show(row.get("peak_mb")),
            show(row.get("equal_labels"), True), remark(row),
        ))  # fmt: skip
    head = ("network", "to", "size", "p50 ms", "p95 ms", "FPS", "with copies, ms", "FPS",
            "x published", "floor ms", "of it", "MB", "equal labels", "remark")  # fmt: skip
    return [table(head, lines)]


def training_tables(leg: Row) -> list[str]:
    rows = [row for row in leg["rows"] if not row["name"].endswith(": GPU busy")]
    busy = {row["name"]: row for row in leg["rows"] if row["name"].endswith(": GPU busy")}
    plain = {size_of(row): row.get("images_per_second") for row in rows
             if row["name"].startswith("files, fp32, eager")}  # fmt: skip
    lines = []
    for row in rows:
        profile = busy.get(f"{row['name']}: GPU busy", {})
        rate, base = row.get("images_per_second"), plain.get(size_of(row))
        lines.append((
            row["source"], f"{row['precision']}, {row['mode']}", size_of(row), show(rate),
            show(rate / base if rate and base else None), show(row.get("p50_ms")),
            show(row.get("p95_ms")), show(profile.get("busy"), True), show(row.get("peak_mb")),
            remark(row) or remark(profile),
        ))  # fmt: skip
    head = ("data from", "step", "size", "images/s", "x plain", "p50 ms", "p95 ms", "GPU busy",
            "MB", "remark")  # fmt: skip
    return [table(head, lines)]


def run_tables(leg: Row) -> list[str]:
    parts = [f"`{leg['info']['command']}`"] if "command" in leg.get("info", {}) else []
    parts += leg.get("info", {}).get("fallbacks", [])
    for row in leg["rows"]:
        figures = {key: value for key, value in row.items()
                   if key not in ("name", "class_iou", "curve", "error", "note")}  # fmt: skip
        lines = [(key.replace("_", " "), show(value)) for key, value in figures.items()]
        lines += [("remark", remark(row))] * bool(remark(row))
        parts.append(table(("run", ""), lines))
        if classes := row.get("class_iou"):
            ious = ", ".join(f"{name} {show(value)}" for name, value in classes.items())
            parts.append(f"IoU of the best epoch: {ious}.")
        if curve := row.get("curve"):
            parts.append("val mIoU by epoch: " + ", ".join(f"{e}: {s:.3f}" for e, s in curve) + ".")
    return parts


TITLES = {"machine": "The machine", "proof": "Proof", "inference": "Inference",
          "training": "Training steps", "run": "A training run"}  # fmt: skip
TABLES = {"machine": machine_tables, "proof": proof_tables, "inference": inference_tables,
          "training": training_tables, "run": run_tables}  # fmt: skip


# The command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--data", type=Path, help="folder of the data set (toy data)")
    parser.add_argument("--dataset", choices=("cityscapes", "camvid"), default="cityscapes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results are written")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (9.5)")
    parser.add_argument("--legs", nargs="+", choices=tuple(WEIGHTS), default=list(WEIGHTS),
                        help="which ones; always in this order")
    parser.add_argument("--only", metavar="REGEX", help="only measurements whose names match")
    parser.add_argument("--golden", type=Path, metavar="DIR",
                        help="outputs of the reference implementation")
    parser.add_argument("--state", type=Path,
                        help="weights to measure with and to train from: a file, a run's folder "
                             "or a released name (cityscapes-demo-d20, and from scratch)")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--write-docs", type=Path, metavar="JSON",
                        help="write the tables of a results.json into docs/gpu.md, and do no more")
    parser.add_argument("--leg", choices=tuple(WEIGHTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    # fmt: on
    return parser


MODULES = {"machine": "gpu_legs", "proof": "gpu_proof", "inference": "gpu_speed",
           "training": "gpu_speed", "run": "gpu_legs"}  # fmt: skip
"""Where the function of each leg, of the same name, is."""


def run_in_this_process(args: argparse.Namespace) -> NoReturn:
    """Run one leg, and end the process."""
    function = getattr(importlib.import_module(f"benchmarks.{MODULES[args.leg]}"), args.leg)
    leg = importlib.import_module("benchmarks.gpu_legs").open_leg(args)
    function(leg)
    leg.save(finished=True)
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
    if args.dry_run:  # a second thread only waits, on tensors as small as these
        os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        results = run_legs(args, Path(work))
    print(f"\n{summary(results)}")
    return int(any(leg["status"] != "ran" for leg in results["legs"].values()))


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
