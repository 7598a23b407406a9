"""The folder of a training run: options, logs and checkpoints."""

import contextlib
import json
import logging
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lednet
from lednet.device import describe_device
from lednet.distributed import DistributedContext
from lednet.errors import UserError
from lednet.io import process_command, read_json, remove_leftovers, write_json, write_text

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

REPOSITORY = Path(lednet.__file__).resolve().parents[1]

RENAMED_OPTIONS = {
    "val_every": "val_stride", "val_names": "val_prefix", "skip_damaged": "skip_corrupt",
}  # fmt: skip
"""Options of version 0.1, and their present names."""

MEASURED_KEYS = ("images_per_second", "seconds", "process_memory_mb", "gpu_memory_mb")
"""Entries of a record in log.jsonl that differ between two equal runs.

`seconds` of training and validation, and peak memory of the main process and of tensors on its GPU
in MB (10^6 bytes), count from the last start of the run.
"""


def environment() -> dict[str, Any]:
    """Versions of the software that a run depends on. The commit is None outside of a clone."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    commit = None
    # An installed package may lie in the environment of another project, with commits of its own.
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (REPOSITORY / ".git").exists():
            commit = git("rev-parse", "HEAD")
            commit += "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "lednet": lednet.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,  # with its CUDA version
        **{name: version(name) for name in ("torchvision", "numpy", "pillow")},
    }


def holds_run(path: Path) -> bool:
    """Whether the folder `path` contains a log or a checkpoint."""
    try:
        return (path / "log.jsonl").exists() or any(path.glob("checkpoint_*.pth"))
    except OSError:  # the name is too long, or the folder cannot be read
        return False


def require_run(path: Path) -> None:
    """
    Raises:
        UserError: there is nothing to resume in the folder `path`.
    """
    if not holds_run(path):
        raise UserError(f"nothing to resume in {path}: start without --resume")


def read_options(path: Path) -> dict[str, Any]:
    """Options of the run in the folder `path`.

    Raises:
        UserError: there is no run, or its file is damaged.
    """
    require_run(path)
    content = read_json(path / "options.json")
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise UserError(f"{path / 'options.json'} holds no options: start a new run")
    return {str(RENAMED_OPTIONS.get(name, name)): value for name, value in options.items()}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of the epochs of the run in the folder `path`.

    Raises:
        UserError: there is no run, or its first epoch has not ended.
    """
    require_run(path)
    try:
        lines = (path / "log.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        if not all(isinstance(record, dict) and "stage" in record for record in records):
            raise ValueError("a line is no record of an epoch")
        return records
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path / 'log.jsonl'} ({error}): resume the training"
        ) from error


class RunDir:
    """The folder of a training run.

    | file | contents |
    |---|---|
    | `options.json` | command, options, versions, commit |
    | `log.jsonl` | one line per epoch |
    | `log.txt` | messages |
    | `model.txt` | the layers of the network |
    | `checkpoint_<steps>.pth` | the newest checkpoints |
    | `best.pth`, `encoder_best.pth` ... | weights with the best validation score of each stage |
    | `curves.png` | loss and score |
    | `tensorboard/` | event files, with --tensorboard |

    Args:
        path: the folder; created if it does not exist.
        resume: resume the run in the folder; otherwise a folder with a run is refused.
        main: whether this process writes files.

    Raises:
        UserError: the folder cannot be written, contains a run or no run to resume, or is used by
            another process.
    """

    def __init__(self, path: str | Path, resume: bool = False, main: bool = True):
        self.path, self.main = Path(path), main
        if resume:
            require_run(self.path)
        if not main:
            return
        if not resume and holds_run(self.path):
            raise UserError(
                f"{path} already holds a run: add --resume to continue it, or choose another "
                "--savedir"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "log.txt").open("a").close()
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held to the end
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; choose another --savedir"
            ) from error
        self._take_lock()
        remove_leftovers(self.path)

    def _take_lock(self) -> None:
        """Lock the folder against other processes, on POSIX systems only.

        The lock ends with the process, and worker processes do not inherit it. Some network file
        systems have no locks, which is logged.
        """
        if sys.platform == "win32":
            return
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"another process is training in {self.path}: wait for its end, or choose "
                "another --savedir"
            ) from error
        except OSError as error:
            logger.warning(
                "%s is not protected against a second run, because its file system has no locks "
                "(%s)", self.path, error.strerror,
            )  # fmt: skip

    def log(self, text: str) -> None:
        """Print `text` and append it to `log.txt`.

        Raises:
            UserError: the disk is full, or the folder has been removed.
        """
        if not self.main:
            return
        print(text, flush=True)
        path = self.path / "log.txt"
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; free some space and continue with --resume"
            ) from error

    def write_options(self, options: dict[str, Any], dist_context: DistributedContext) -> None:
        """Write `options.json`: command, options, versions and hardware."""
        if not self.main:
            return
        size = dist_context.size
        record = {
            "command": process_command(size),
            "options": options,
            "environment": environment(),
            "hardware": f"{size} x {describe_device(dist_context.device)}",
        }
        write_json(self.path / "options.json", record)

    def write_records(self, records: list[dict[str, Any]]) -> None:
        """Rewrite `log.jsonl`, so that it agrees with the checkpoint."""
        if self.main:
            lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
            write_text(self.path / "log.jsonl", "".join(lines))
