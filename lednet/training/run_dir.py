"""A run's folder: its options, logs and checkpoints."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

import lednet
from lednet.device import describe_device
from lednet.distributed import DistributedContext
from lednet.errors import UserError
from lednet.io import read_json, remove_leftovers, write_json, write_text

if sys.platform != "win32":
    import fcntl


def environment(repository: Path) -> dict[str, Any]:
    """Versions and commit that a run depends on; the commit is None outside git."""
    git = ["git", "-C", str(repository)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        commit += "+changes" if changed else ""
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "lednet": lednet.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def holds_run(path: Path) -> bool:
    """Whether a run has saved anything in the folder `path`."""
    return (path / "log.jsonl").exists() or any(path.glob("checkpoint_*.pth"))


def require_run(path: Path) -> None:
    """
    Raises:
        UserError: there is nothing to resume in the folder `path`.
    """
    if not holds_run(path):
        raise UserError(f"nothing to resume in {path}: start without --resume")


RENAMED_OPTIONS: dict[str, str] = {
    "val_every": "val_stride",
    "val_names": "val_prefix",
    "skip_damaged": "skip_corrupt",
}
"""Options of version 0.1 under their present names."""


def read_options(path: Path) -> dict[str, Any]:
    """Options of the run in the folder `path`.

    Raises:
        UserError: there is none, or its file is damaged.
    """
    require_run(path)
    content = read_json(path / "options.json")
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise UserError(f"{path / 'options.json'} holds no options: start a new run")
    return {str(RENAMED_OPTIONS.get(name, name)): value for name, value in options.items()}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Lines of the log of the run in the folder `path`, one an epoch.

    Raises:
        UserError: there is no run, or none whose first epoch has ended.
    """
    require_run(path)
    try:
        lines = (path / "log.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        if not all(isinstance(record, dict) and "stage" in record for record in records):
            raise ValueError("a line is no record of an epoch")
        return records
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path / 'log.jsonl'} ({error}): train on") from error


MEASURED_KEYS = ("images_per_second", "seconds", "process_memory_mb", "gpu_memory_mb")
"""Of an epoch's record in log.jsonl, what differs between two runs that do the same. `seconds`
are those of training and validation since the run was last started; memory is the most that the
main process, and tensors on its GPU, took since then, in MB (10^6 bytes)."""


class RunDir:
    """Files of one training run.

    | file | what |
    |---|---|
    | `options.json` | command, options, versions, commit |
    | `log.jsonl` | one line an epoch |
    | `log.txt` | what was printed |
    | `model.txt` | the network, layer by layer |
    | `checkpoint_<steps>.pth` | to resume from; the last few |
    | `best.pth`, `encoder_best.pth` ... | weights of the best validation score of each stage |
    | `curves.png` | loss and score |
    | `tensorboard/` | event files, if asked for |

    Args:
        path: the folder, made if need be.
        resume: continue the run in it; otherwise a folder that holds one is refused.
        main: whether this process writes; of many, one does.

    Raises:
        UserError: it cannot be written, holds a run already, or none to resume, or another
            process is training in it.
    """

    def __init__(self, path: str | Path, resume: bool = False, main: bool = True):
        self.path, self.main = Path(path), main
        if resume:
            require_run(self.path)
        if not main:
            return
        if not resume and holds_run(self.path):
            raise UserError(
                f"{self.path} already holds a run: add --resume to continue it, or choose "
                "another --savedir"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / "log.txt", "a", encoding="utf-8"):
                pass
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held to the end
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; choose another --savedir"
            ) from error
        self._take_lock()
        remove_leftovers(self.path)

    def _take_lock(self) -> None:
        """Refuse a folder that another process writes to. The lock dies with its process,
        and loading processes do not inherit it. Nothing is locked outside POSIX."""
        if sys.platform == "win32":
            return
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"another process is training in {self.path}: wait for its end, or choose "
                "another --savedir"
            ) from error

    def log(self, text: str) -> None:
        """Print `text` and add it to `log.txt`.

        Raises:
            UserError: the disk is full, or the folder gone.
        """
        if not self.main:
            return
        print(text, flush=True)
        path = self.path / "log.txt"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; free some space and go on with --resume"
            ) from error

    def write_options(
        self, options: dict[str, Any], repository: Path, world: DistributedContext
    ) -> None:
        """Record the command, every option, and what the run depends on and runs on."""
        if not self.main:
            return
        launcher = ["python"]
        if world.size > 1:
            launcher = ["torchrun", f"--nproc-per-node={world.size}"]
        record = {
            "command": [*launcher, *sys.argv],
            "options": options,
            "environment": environment(repository),
            "hardware": f"{world.size} x {describe_device(world.device)}",
        }
        write_json(self.path / "options.json", record)

    def write_records(self, records: list[dict[str, Any]]) -> None:
        """Write `log.jsonl` whole: it never disagrees with the checkpoint."""
        if not self.main:
            return
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        write_text(self.path / "log.jsonl", "".join(lines))
