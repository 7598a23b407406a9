"""Let training runs suffer what can go wrong, and see whether they end as if nothing had.

    python benchmarks/faults.py --json benchmarks/results/faults.json --markdown faults.md

Each fault strikes a small run of its own (32 steps, 32x64 pixels, two stages); the run is then
resumed, and its weights, optimizer and log are compared with those of a run that was left alone.
Five minutes on two shared virtual cores. Linux; some faults need the right to mount (root).
"""

import argparse
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "datasets")]

from fault_injection import (
    BY_INT,
    BY_TERM,
    FAULTS,
    KILLED,
    LAST,
    LOST,
    MIDDLE,
    NO_CHECKPOINT,
    SABOTAGE,
    STEPS,
    TEMPORARY,
    TORCHRUN,
    Fault,
    Missed,
    Run,
    Site,
    complete,
    cut_image,
    differences,
    in_the_middle,
    in_validation,
    kill,
    kill_in_writing,
    kill_process,
    left_a_temporary,
    nothing,
    stop,
    stop_everywhere,
    suffer,
)
from make_toy_cityscapes import write_toy_cityscapes
from tqdm import tqdm

from lednet.errors import UserError, exit_on_user_error
from lednet.io import write_json, write_text
from lednet.training.run_dir import environment

EPOCHS = 2
KILLS = "SIGKILL at a random moment"
IN_WRITING = "SIGKILL while a checkpoint is written"


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def may_mount(folder: Path) -> bool:
    try:
        mount("-t", "tmpfs", "tmpfs", folder)
        unmount(folder)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def fill_disk(run: Run) -> None:
    """A disk of its own with room for two checkpoints, but not for the third; enlarged later."""
    run.site.folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=28m", "tmpfs", run.site.folder)
    run.mending.callback(mount, "-o", "remount,size=200m", run.site.folder)


def make_read_only(run: Run) -> None:
    folder = run.site.folder
    run.wait_for_steps()
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)
    run.mending.callback(unmount, folder)


def block_folder(run: Run) -> None:
    """Where the run's folder should be, there is a file."""
    run.site.folder.write_text("in the way")
    run.mending.callback(run.site.folder.unlink)


def random_kills(count: int, seed: int) -> Iterator[Fault]:
    """Every fourth while a checkpoint is written, the others anywhere from the start on."""
    rng = random.Random(seed)
    for number in range(count):
        if number % 4 == 3:
            steps = rng.randrange(1, 2 * EPOCHS * STEPS - 4)
            strike = functools.partial(kill_in_writing, number=steps)
            yield Fault(IN_WRITING, strike, KILLED, leaves=TEMPORARY, struck=left_a_temporary)
        else:
            steps = rng.randrange(2 * EPOCHS * STEPS - 4)
            seconds = rng.uniform(0, 0.3 if steps else 4)
            strike = functools.partial(kill, number=steps, seconds=seconds)
            yield Fault(KILLS, strike, KILLED, leaves=TEMPORARY)


READ_ONLY = r"error: cannot write \S+: Read-only file system; .*"
MORE = (
    Fault("SIGTERM in an epoch", stop(signal.SIGTERM, False, MIDDLE), 143, BY_TERM,
          struck=in_the_middle),
    Fault("disk full (ENOSPC) at the end of a checkpoint", nothing, 2, NO_CHECKPOINT,
          script=(SABOTAGE, "full", 2)),
    Fault("SIGINT in validation", stop(signal.SIGINT, False, LAST), 130, BY_INT,
          struck=in_validation),
    Fault("an image is cut in half", cut_image, 2, r"error: \S+\.png is damaged .*copy it again"),
    Fault("a NaN loss and a cut image, with --skip-bad-steps --skip-corrupt", cut_image, 0, "",
          script=(SABOTAGE, "nan", 2), flags=("--skip-bad-steps", "--skip-corrupt")),
    Fault("the run's folder cannot be made", block_folder, 2, r"error: cannot write to .*"),
    Fault("torchrun: a process is killed (--max-restarts=1)", kill_process, 0, LOST,
          launcher=TORCHRUN),
    Fault("torchrun: SIGTERM to all processes", stop_everywhere, 1, BY_TERM, launcher=TORCHRUN,
          struck=in_the_middle),
)  # fmt: skip
MOUNTED = (
    Fault("disk full (a small tmpfs)", fill_disk, 2, NO_CHECKPOINT),
    Fault("the run's folder becomes read-only", make_read_only, 2, READ_ONLY, leaves=TEMPORARY),
)


def try_fault(folder: Path, data: Path, references: dict, fault: Fault) -> dict:
    """Let `fault` strike a new run in `folder`, resume it, and compare its end."""
    site = Site(folder / "data", folder / "run", EPOCHS)
    shutil.copytree(data, site.data)
    flags = ("--save-steps", 2)
    row: dict[str, Any] = {
        "fault": fault.name,
        "status": None,
        "said": "",
        "problems": [],
        "compared": False,
    }
    try:
        outcome = suffer(site, fault, *flags, anew=True)
        row |= {"status": outcome.ended.status, "said": outcome.ended.sentence}
        row["problems"] += outcome.problems
        if "--skip-corrupt" not in fault.flags:  # what is left out is missed in the weights
            complete(site, *flags, launcher=fault.launcher)
            tolerance = 1e-6 if fault.launcher else 0.0
            row["problems"] += differences(site, references[fault.launcher], tolerance)
            row["compared"] = True
    except Missed as error:
        row["problems"].append(str(error))
    finally:
        if os.path.ismount(site.folder):
            unmount(site.folder)
    for path, name in ((site.folder, "RUN"), (site.data, "DATA")):
        row["said"] = row["said"].replace(str(path), name)
    shutil.rmtree(folder)
    for problem in row["problems"]:
        tqdm.write(f"{fault.name}: {problem}", file=sys.stderr)
    return row


def table(rows: list[dict]) -> str:
    """As Markdown, with one line for all faults of a name."""
    lines = ["| fault | exit status | what the run says | resumed to the same weights and log |",
             "|---|---|---|---|"]  # fmt: skip
    for name in dict.fromkeys(row["fault"] for row in rows):
        group = [row for row in rows if row["fault"] == name]
        struck = [row for row in group if row["status"] is not None]
        states = list(dict.fromkeys(str(row["status"]) for row in struck))
        if len(struck) < len(group):
            states.append(f"{len(group) - len(struck)} missed")
        said = max((row["said"] for row in group), key=len).replace("|", "/")
        good = sum(not row["problems"] for row in group)
        answer = "yes" if good == len(group) else "**no**"
        if len(group) > 1:
            answer += f", {good} of {len(group)}"
        if good and not any(row["compared"] for row in group):
            answer = "goes on without them, and counts them"
        lines.append(f"| {name} | {', '.join(states)} | {said and f'`{said}`'} | {answer} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="SIGKILLs (20)")
    parser.add_argument("--seed", type=int, default=1, help="of their moments")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (2)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table")
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        raise UserError("this finds processes and sets limits as Linux does: run it there")
    faults = [*FAULTS, *MORE]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if may_mount(scratch):
            faults += MOUNTED
        else:
            skipped = ", ".join(fault.name for fault in MOUNTED)
            print(f"left out, since they need the right to mount: {skipped}", file=sys.stderr)
        faults += random_kills(args.kills, args.seed)
        data = scratch / "data"
        write_toy_cityscapes(data, 2 * STEPS, 8, 0, 0, width=128, height=64)
        references = {}
        for launcher in ((), TORCHRUN):
            references[launcher] = Site(data, scratch / f"reference{len(launcher)}", EPOCHS)
            complete(references[launcher], launcher=launcher)
        with ThreadPoolExecutor(args.jobs) as pool:
            folders = [scratch / f"{number:03d}" for number in range(len(faults))]
            attempt = functools.partial(try_fault, data=data, references=references)
            work = pool.map(lambda folder, fault: attempt(folder, fault=fault), folders, faults)
            rows = list(tqdm(work, "faults", len(faults), unit="fault"))
    print(table(rows), end="")
    if args.json:
        command = " ".join(["python", "benchmarks/faults.py", *sys.argv[1:]])
        record = {"command": command, "environment": environment(ROOT), "rows": rows}
        write_json(args.json, record)
    if args.markdown:
        write_text(args.markdown, table(rows))
    sys.exit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
