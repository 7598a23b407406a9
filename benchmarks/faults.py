"""Inject faults into training runs, and compare the resumed runs with undisturbed ones.

    python benchmarks/faults.py --json benchmarks/results/faults.json

Each fault gets a small run of its own (32 steps, 32x64 pixels, two stages). The run is then
resumed, and its weights, optimizer and log are compared with those of an undisturbed run. Five
minutes on two shared virtual cores. Linux only; some faults need the right to mount (root).
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "datasets")]

import fault_injection as fi
import torch
from fault_injection import Fault, Missed, Run, Site
from make_toy_cityscapes import write_toy_cityscapes

from benchmarks._common import Row, add_options, make_parser, markdown, write_record
from lednet.errors import UserError, exit_on_user_error
from lednet.progress import progress_bar

EPOCHS = 2
STEPS = 2 * EPOCHS * fi.STEPS
"""Steps of a run."""


def mount(*arguments: object, command: str = "mount") -> None:
    subprocess.run([command, *map(str, arguments)], check=True, capture_output=True)


unmount = partial(mount, command="umount")


def may_mount(folder: Path) -> bool:
    try:
        mount("-t", "tmpfs", "tmpfs", folder)
        unmount(folder)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def fill_disk(run: Run) -> None:
    """Give the run a disk with room for two checkpoints only; it is enlarged afterwards."""
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
    """Put a file in the place of the run's folder."""
    run.site.folder.write_text("in the way")
    run.mending.callback(run.site.folder.unlink)


def random_kills(count: int, seed: int) -> Iterator[Fault]:
    """Every fourth while a checkpoint is written, the others at any time."""
    rng = random.Random(seed)
    for number in range(count):
        if number % 4 == 3:
            strike = partial(fi.kill_in_writing, number=rng.randrange(1, STEPS - 4))
            yield Fault("SIGKILL while a checkpoint is written", strike, fi.KILLED,
                        leaves=fi.TEMPORARY, struck=fi.left_a_temporary)  # fmt: skip
        else:
            steps = rng.randrange(STEPS - 4)
            strike = partial(fi.kill, number=steps, seconds=rng.uniform(0, 0.3 if steps else 4))
            yield Fault("SIGKILL at a random moment", strike, fi.KILLED, leaves=fi.TEMPORARY)


READ_ONLY = r"error: cannot write \S+: Read-only file system; .*"
MORE = (
    Fault("SIGTERM in an epoch", fi.stop(signal.SIGTERM, False, fi.MIDDLE), 143, fi.BY_TERM,
          struck=fi.in_the_middle),
    Fault("disk full (ENOSPC) at the end of a checkpoint", fi.nothing, 2, fi.NO_CHECKPOINT,
          script=(fi.SABOTAGE, "full", 2)),
    Fault("SIGINT in validation", fi.stop(signal.SIGINT, False, fi.LAST), 130, fi.BY_INT,
          struck=fi.in_validation),
    Fault("an image is cut in half", fi.cut_image, 2,
          r"error: \S+\.png is damaged .*copy it again"),
    Fault("a NaN loss and a cut image, with --skip-bad-steps --skip-corrupt", fi.cut_image, 0, "",
          script=(fi.SABOTAGE, "nan", 2), flags=("--skip-bad-steps", "--skip-corrupt")),
    Fault("the run's folder cannot be made", block_folder, 2, r"error: cannot write to .*"),
    Fault("torchrun: a process is killed (--max-restarts=1)", fi.kill_process, 0, fi.LOST,
          launcher=fi.TORCHRUN),
    Fault("torchrun: SIGTERM to all processes", fi.stop_everywhere, 1, fi.BY_TERM,
          launcher=fi.TORCHRUN, struck=fi.in_the_middle),
)  # fmt: skip
MOUNTED = (
    Fault("disk full (a small tmpfs)", fill_disk, 2, fi.NO_CHECKPOINT),
    Fault("the run's folder becomes read-only", make_read_only, 2, READ_ONLY, leaves=fi.TEMPORARY),
)


def try_fault(fault: Fault, folder: Path, data: Path, references: dict) -> Row:
    """Inject `fault` into a new run in `folder`, resume it, and compare its results."""
    site = Site(folder / "data", folder / "run", EPOCHS)
    shutil.copytree(data, site.data)
    flags = ("--save-steps", 2)
    row: Row = {"fault": fault.name, "status": None, "said": "", "problems": [], "compared": False}
    try:
        outcome = fi.suffer(site, fault, *flags, anew=True)
        said = outcome.ended.sentence.replace(str(site.folder), "RUN")
        row |= {"status": outcome.ended.status, "said": said.replace(str(site.data), "DATA")}
        row["problems"] += outcome.problems
        if "--skip-corrupt" not in fault.flags:  # skipped images change the weights
            fi.complete(site, *flags, launcher=fault.launcher)
            tolerance = 1e-6 if fault.launcher else 0.0
            row["problems"] += fi.differences(site, references[fault.launcher], tolerance)
            row["compared"] = True
    except Missed as error:
        row["problems"].append(str(error))
    finally:
        if os.path.ismount(site.folder):
            unmount(site.folder)
    shutil.rmtree(folder)
    for problem in row["problems"]:
        print(f"{fault.name}: {problem}", file=sys.stderr)
    return row


def table(rows: list[Row]) -> str:
    """Markdown, with one line for all faults of a name."""
    lines = []
    for name in dict.fromkeys(row["fault"] for row in rows):
        group = [row for row in rows if row["fault"] == name]
        good = sum(not row["problems"] for row in group)
        result = ("yes" if good == len(group) else "**no**") + f", {good} of {len(group)}"
        if good and not any(row["compared"] for row in group):
            result = "continues without them, and counts them"
        status = ", ".join({str(row["status"]) for row in group})  # None: the moment was missed
        lines.append((name, status, max((row["said"] for row in group), key=len), result))
    head = ("fault", "exit status", "message of the run", "resumed to the same weights and log")
    return markdown(head, lines)


def main() -> None:
    parser = make_parser(__doc__, "--json")
    add_options(
        parser,
        kills=(20, "number of SIGKILLs"),
        seed=(1, "of their times"),
        jobs=(2, "runs at a time"),
    )
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        raise UserError("processes and limits are those of Linux: run this on Linux")
    faults = [*fi.FAULTS, *MORE]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if may_mount(scratch):
            faults += MOUNTED
        else:
            skipped = ", ".join(fault.name for fault in MOUNTED)
            print(f"left out, since they need the right to mount: {skipped}", file=sys.stderr)
        faults += random_kills(args.kills, args.seed)
        data = scratch / "data"
        write_toy_cityscapes(data, 2 * fi.STEPS, 8, 0, 0, width=128, height=64)
        references = {}
        for launcher in ((), fi.TORCHRUN):
            references[launcher] = Site(data, scratch / f"reference{len(launcher)}", EPOCHS)
            fi.complete(references[launcher], launcher=launcher)
        with ThreadPoolExecutor(args.jobs) as pool:
            folders = [scratch / f"{number:03d}" for number in range(len(faults))]
            work = pool.map(partial(try_fault, data=data, references=references), faults, folders)
            rows = list(progress_bar(work, total=len(faults), desc="faults", unit="fault"))
    print(table(rows))
    write_record(args.json, torch.device("cpu"), {"rows": rows})
    sys.exit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
