"""Faults of a training run: how each is caused, how the run must end, what it may leave.

Shared by `tests/test_faults.py`, where they affect one run in turn, and `benchmarks/faults.py`,
where each has its own run. The library has no part in this: runs are affected from outside by
signals, limits and damaged files, or started by `tests/sabotage.py`.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lednet.checkpoint import load_checkpoint
from lednet.errors import UserError
from lednet.training.checkpointing import Checkpoints
from lednet.training.run_dir import MEASURED_KEYS

ROOT = Path(__file__).resolve().parents[1]
SABOTAGE = "tests/sabotage.py"

IMAGES, BATCH = 16, 2
STEPS = IMAGES // BATCH
"""Steps of an epoch."""
MIDDLE, LAST = range(1, STEPS - 1), range(STEPS, STEPS + 1)
"""Steps within an epoch, and its last one."""

FLAGS = (
    "--height", 32, "--width", 64, "--batch-size", BATCH, "--num-workers", 1, "--device", "cpu",
    "--lr", 5e-4, "--no-iouTrain",
)  # fmt: skip
TORCHRUN = (
    "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
    "--monitor-interval=0.1",
)  # fmt: skip

TIMEOUT = 120
"""Seconds after which a run counts as hanging."""
TRIES = 5
"""Attempts at a moment that only lasts milliseconds."""

SENTENCE = re.compile(r"(?:^|\])((error: |stopped by |interrupted).*)")
"""At the start of a line, or after a progress bar that could not be cleared."""


class Missed(Exception):
    """The run did not come to the moment that was waited for."""


@dataclass
class Site:
    """Data and folder of a run that is started again and again.

    Attributes:
        data: a toy Cityscapes tree.
        folder: the run folder.
        num_epochs: epochs of each stage.
        options: further flags of train/main.py.
        next_says: pattern that the next process must print.
    """

    data: Path
    folder: Path
    num_epochs: int = 2
    options: tuple[object, ...] = ()
    next_says: str = ""

    @property
    def flags(self) -> tuple[object, ...]:
        paths = ("--datadir", self.data, "--savedir", self.folder)
        return (*paths, *FLAGS, "--num-epochs", self.num_epochs, *self.options)

    def step(self) -> int:
        """Number of the newest checkpoint; 0 without one."""
        return max((int(path.stem[-9:]) for path in Checkpoints(self.folder).paths()), default=0)

    def position(self) -> int | None:
        """Trained batches of the epoch in the newest checkpoint; None between epochs."""
        state = load_checkpoint(Checkpoints(self.folder).paths()[0])["progress"]["tally"]
        return state and state["step"]

    def records(self) -> list[dict[str, Any]]:
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status; the negative number of a signal that killed it.
        sentence: the reason that it printed.
        text: all that it printed.
    """

    status: int
    sentence: str
    text: str


class Run:
    """A process of train/main.py in its own process group.

    Attributes:
        mending: undoes what a fault has done, once the process has ended.
    """

    def __init__(
        self,
        site: Site,
        *flags: object,
        script: tuple[object, ...] = ("train/main.py",),
        launcher: tuple[str, ...] = (),
    ):
        self.site, self.first, self.mending = site, site.step(), contextlib.ExitStack()
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe would outlive its end
        path = ROOT / str(script[0])
        command = [sys.executable, *launcher, path, *script[1:], *site.flags, *flags]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def wait_for(self, happened: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Missed(f"no {what} in\n{self.abandon().text}")
            time.sleep(0.001)

    def wait_for_steps(self, number: int = 1) -> None:
        """Wait until the run has saved `number` further steps."""
        self.wait_for(lambda: self.site.step() >= self.first + number, f"{number} steps")

    def wait_for_phase(self, steps: range) -> None:
        """Wait until it has saved a new step that is one of `steps` of its epoch, from 1."""

        def reached() -> bool:
            step = self.site.step()
            return step > self.first and (step - 1) % STEPS + 1 in steps

        self.wait_for(reached, f"step among {steps}")

    def wait_for_writing(self) -> None:
        """Wait until a checkpoint is being written."""
        self.wait_for(lambda: left_a_temporary(self.site), "checkpoint being written")

    def children(self) -> list[int]:
        return children(self.process.pid)

    def finish(self) -> Ended:
        """Wait for its end."""
        try:
            status = self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise Missed(f"no end of\n{self.abandon().text}") from error
        self.output.seek(0)
        text = self.output.read()
        lines = map(SENTENCE.search, re.split("[\r\n]+", text))
        return Ended(status, " / ".join(line[1] for line in lines if line), text)

    def abandon(self) -> Ended:
        """Kill it with all that it has started."""
        for pid in (*(p for child in self.children() for p in children(child)), *self.children()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        return self.finish()


def children(pid: int) -> list[int]:
    """Processes that `pid` has started, oldest first (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(path.parent.name))
    return sorted(found)


# What a fault does to a run


def kill(run: Run, number: int = 2, seconds: float = 0.0) -> None:
    """SIGKILL, some time after a step. The loading processes need seconds to notice."""
    if number:
        run.wait_for_steps(number)
    time.sleep(seconds)
    workers = run.children()
    run.process.kill()
    run.process.wait()
    if number and not any(Path(f"/proc/{pid}").exists() for pid in workers):
        raise Missed("no loading process was left over")


def kill_in_writing(run: Run, number: int = 1) -> None:
    run.wait_for_steps(number)
    run.wait_for_writing()
    run.process.kill()


def stop(number: int, group: bool, steps: range) -> Callable[[Run], None]:
    """Send a signal after one of `steps`, to the process or to its whole group."""

    def strike(run: Run) -> None:
        run.wait_for_phase(steps)
        (os.killpg if group else os.kill)(run.process.pid, number)

    return strike


def limit_file_size(run: Run) -> None:
    """Let writes to large files fail half-way, as on a disk that fills up."""
    import resource  # not on Windows

    run.wait_for_steps()
    _, hard = resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (1 << 20, hard))


def _change_image(run: Run, change: Callable[[Path, bytes], object]) -> None:
    path = sorted(run.site.data.glob("leftImg8bit/train/*/*.png"))[3]
    content = path.read_bytes()
    run.mending.callback(path.write_bytes, content)
    run.wait_for_steps()
    change(path, content)


def remove_image(run: Run) -> None:
    _change_image(run, lambda path, content: path.unlink())


def cut_image(run: Run) -> None:
    _change_image(run, lambda path, content: path.write_bytes(content[: len(content) // 2]))


def kill_worker(run: Run, in_writing: bool = False) -> None:
    run.wait_for_phase(MIDDLE)
    if in_writing:
        run.wait_for_writing()
    os.kill(run.children()[0], signal.SIGKILL)


def kill_worker_in_writing(run: Run) -> None:
    kill_worker(run, in_writing=True)


def nothing(run: Run) -> None:
    """The fault is in the flags or in the script."""


def kill_process(run: Run) -> None:
    """Of two processes that `torchrun` has started, kill the second."""
    run.wait_for_phase(MIDDLE)
    os.kill(run.children()[1], signal.SIGKILL)


def stop_everywhere(run: Run) -> None:
    """SIGTERM to `torchrun` and to what it has started, as a scheduler does."""
    run.wait_for_phase(MIDDLE)
    for pid in (*run.children(), run.process.pid):
        os.kill(pid, signal.SIGTERM)


def start_another(run: Run) -> Ended:
    """Start a second run in the folder; the first is paused, and must then make two more steps."""
    run.wait_for_steps()
    os.kill(run.process.pid, signal.SIGSTOP)
    ended = Run(run.site, "--resume").finish()
    os.kill(run.process.pid, signal.SIGCONT)
    run.first = run.site.step()
    kill(run, 2)
    return ended


def cut_checkpoint(run: Run) -> None:
    """Kill the run, and leave half of its newest checkpoint."""
    kill(run, 4)  # by then there is an older one
    newest = Checkpoints(run.site.folder).paths()[0]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    run.site.next_says = f"{newest.name} is damaged.*resuming from checkpoint_"


# What must be true afterwards


def incomplete_files(folder: Path) -> list[str]:
    """Files of a run folder that are not complete."""
    names = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            if path.name.startswith(".") and path.name != ".lock":
                raise ValueError("a temporary file")
            if path.suffix == ".pth":
                load_checkpoint(path)
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in path.read_text().splitlines()]
        except (OSError, ValueError, UserError):
            names.append(path.name)
    return names


def lock_is_free(site: Site, ended: Ended) -> bool:
    """Whether the folder can be locked at once: loading processes must not hold the lock."""
    import fcntl  # not on Windows

    with open(site.folder / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def finite_checkpoint(site: Site, ended: Ended) -> bool:
    """Whether the checkpoint that the sentence names holds finite weights."""
    name = re.search(r"checkpoint_\d+\.pth", ended.sentence)
    if name is None:
        return site.step() == 0
    state = load_checkpoint(site.folder / name[0])["state_dict"]
    return all(value.isfinite().all() for value in state.values())


def in_the_middle(site: Site) -> bool:
    return 0 < (site.position() or 0) < STEPS


def in_validation(site: Site) -> bool:
    return site.position() == STEPS


def left_a_temporary(site: Site) -> bool:
    return any(site.folder.glob(".checkpoint_*"))


def same(a: Any, b: Any) -> bool:
    """Whether nested containers hold equal values, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(site: Site, reference: Site, loss_tolerance: float = 0.0) -> list[str]:
    """Differences between a run that has ended and an undisturbed one, apart from speed.

    Args:
        loss_tolerance: relative, for the mean training loss in the log. The sums of several
            processes are joined at each checkpoint, so that they add up in another order.
    """
    found = [f"{name} is not complete" for name in incomplete_files(site.folder)]
    ours, theirs = site.records(), reference.records()
    if len(ours) != len(theirs):
        found.append(f"log.jsonl has {len(ours)} lines, not {len(theirs)}")
    for a, b in zip(ours, theirs, strict=False):
        if math.isclose(a["train_loss"], b["train_loss"], rel_tol=loss_tolerance):
            a["train_loss"] = b["train_loss"]
        found += [
            f"{key} of {b['stage']} {b['epoch']} differs in log.jsonl"
            for key in a.keys() | b.keys()
            if key not in MEASURED_KEYS and a.get(key) != b.get(key)
        ]
    newest = Checkpoints(reference.folder).paths()[0].name
    for name in ("encoder_best.pth", "best.pth", newest):
        if not (site.folder / name).exists():
            found.append(f"no {name}")
            continue
        a, b = (load_checkpoint(place.folder / name) for place in (site, reference))
        if not all(same(a.get(key), b.get(key)) for key in ("state_dict", "meta", "trainer")):
            found.append(f"{name} differs")
    return found


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with a run.

    Attributes:
        name: a description.
        strike: causes it in a run that has been started; may return the process to be judged.
        status: expected status, see `Ended`.
        says: pattern of the sentence.
        script: what is started, with its own arguments.
        launcher: what starts it; `TORCHRUN` for two processes.
        flags: further flags of train/main.py.
        leaves: pattern of the files that may be left incomplete.
        struck: whether the moment was met.
        check: condition on what is left.
    """

    name: str
    strike: Callable[[Run], Ended | None]
    status: int
    says: str = ""
    script: tuple[object, ...] = ("train/main.py",)
    launcher: tuple[str, ...] = ()
    flags: tuple[object, ...] = ()
    leaves: str = ""
    struck: Callable[[Site], bool] = lambda site: True
    check: Callable[[Site, Ended], bool] = lambda site, ended: True


@dataclass(frozen=True)
class Outcome:
    """How a run ended after a fault, and what is not as it should be."""

    ended: Ended
    problems: list[str]


def suffer(site: Site, fault: Fault, *flags: object, anew: bool = False) -> Outcome:
    """Start or resume the run at `site`, and cause `fault`.

    Args:
        anew: after a missed moment start the run from nothing again. A resumed one may already
            be past the step at which the fault is caused.

    Raises:
        Missed: the moment was missed in all attempts.
    """
    flags = ("--resume", "auto", *flags, *fault.flags)
    for _ in range(TRIES):
        run = Run(site, *flags, script=fault.script, launcher=fault.launcher)
        expected, site.next_says = site.next_says, ""
        with run.mending:
            other = fault.strike(run)
            ended = run.finish()
        if fault.struck(site):
            break
        if anew:
            shutil.rmtree(site.folder)
    else:
        raise Missed(f"{fault.name}: missed {TRIES} times")
    judged = other or ended
    incomplete = incomplete_files(site.folder)
    found = {
        f"it did not say {expected!r}": not re.search(expected, ended.text),
        f"status {judged.status}, not {fault.status}": judged.status != fault.status,
        f"it said {judged.sentence!r}": not re.fullmatch(fault.says, judged.sentence),
        "a traceback": judged.status in (0, 2, 130, 143) and "Traceback" in judged.text,
        "the check of what it left fails": not fault.check(site, judged),
        **{f"{name} is not complete": not re.fullmatch(fault.leaves, name) for name in incomplete},
    }
    return Outcome(judged, [problem for problem, present in found.items() if present])


def complete(site: Site, *flags: object, launcher: tuple[str, ...] = ()) -> Ended:
    """Let the run continue to its end."""
    run = Run(site, "--resume", "auto", *flags, launcher=launcher)
    expected, site.next_says = site.next_says, ""
    ended = run.finish()
    if ended.status != 0 or not re.search(expected, ended.text):
        raise Missed(f"no good end of\n{ended.text}")
    return ended


TEMPORARY = r"\..+"
"""Names of files that a process could not remove; the next one does."""

TERM, INT, KILLED = signal.SIGTERM, signal.SIGINT, -signal.SIGKILL
BY_TERM = "stopped by SIGTERM; continue with --resume"
BY_INT = "interrupted by SIGINT; continue with --resume"
NO_CHECKPOINT = r"error: cannot write \S+/checkpoint_\d+\.pth: .*; free some space or choose .*"
NO_WORKER = "error: a loading process died .*: continue with --resume, perhaps with fewer .*"
IN_LOSS = r"error: the loss is nan in step \d of \w+ \d/\d, of \w+\.png, \w+\.png; "
IN_WEIGHTS = r"error: the weights are not finite after \d+ steps; "
CONTINUE = (
    r"(\S+\.pth is valid|there is no checkpoint yet): continue with --resume and a lower --lr, .*"
)
LOST = r"(error: another process of this run has ended .* --resume)?"
"""What the other process says, if it has the time."""

FAULTS = (
    Fault("SIGKILL while a checkpoint is written", kill_in_writing, KILLED,
          leaves=TEMPORARY, struck=left_a_temporary),
    Fault("SIGINT in an epoch, to the whole group", stop(INT, True, MIDDLE), 130, BY_INT,
          struck=in_the_middle),
    Fault("SIGTERM in validation, to the whole group", stop(TERM, True, LAST), 143, BY_TERM,
          struck=in_validation),
    Fault("a write fails half-way through a checkpoint", limit_file_size, 2, NO_CHECKPOINT),
    Fault("an image vanishes", remove_image, 2, r"error: no file \S+\.png: check the path"),
    Fault("a loading process is killed", kill_worker, 2, NO_WORKER),
    Fault("a loading process is killed while a checkpoint is written", kill_worker_in_writing, 2,
          NO_WORKER),
    Fault("the loss becomes NaN", nothing, 2, IN_LOSS + CONTINUE, script=(SABOTAGE, "nan", 2),
          check=finite_checkpoint),
    Fault("a step makes weights infinite (--lr 1e39)", nothing, 2, IN_WEIGHTS + CONTINUE,
          flags=("--lr", 1e39, "--save-steps", 1), check=finite_checkpoint),
    Fault("an error that nobody foresaw", nothing, 1, script=(SABOTAGE, "bug", 2)),
    Fault("a second run in the same folder", start_another, 2,
          "error: another process is training in .*: wait for its end, or choose .*",
          leaves=TEMPORARY),
    Fault("the newest checkpoint is cut in half", cut_checkpoint, KILLED,
          leaves=rf"{TEMPORARY}|checkpoint_\d+\.pth", check=lock_is_free),
)  # fmt: skip
