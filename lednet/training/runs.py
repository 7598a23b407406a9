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
from lednet.errors import UserError
from lednet.files import read_json, write_json, write_text
from lednet.weights import BEST_WEIGHTS

STAGES = ("encoder", "decoder")
LAST = {"encoder": "encoder_last.pth", "decoder": "last.pth"}
BEST = {"encoder": "encoder_best.pth", "decoder": BEST_WEIGHTS}


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


class RunFolder:
    """Files of one training run.

    | file | what |
    |---|---|
    | `options.json` | command, options, versions, commit |
    | `log.jsonl` | one line an epoch |
    | `log.txt` | what was printed |
    | `model.txt` | the network, layer by layer |
    | `encoder_last.pth`, `last.pth` | to resume from: stage 1, stage 2 |
    | `encoder_best.pth`, `best.pth` | weights of the best validation mIoU |
    | `curves.png` | loss and mIoU |

    Args:
        path: the folder, made if need be.
        resume: continue the run in it; otherwise a folder that holds one is refused.
        main: whether this process writes; of many, one does.

    Raises:
        UserError: it cannot be written, holds a run already, or none to resume.
    """

    def __init__(self, path: str | Path, resume: bool = False, main: bool = True):
        self.path, self.main = Path(path), main
        if resume and self.resume_file() is None:
            raise UserError(
                f"nothing to resume in {self.path}: it has neither {LAST['decoder']} nor "
                f"{LAST['encoder']}; start without --resume"
            )
        if not main:
            return
        if not resume and (self.path / "log.jsonl").exists():
            raise UserError(
                f"{self.path} already holds a run: add --resume to continue it, or choose "
                "another --savedir"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / "log.txt", "a", encoding="utf-8"):
                pass
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; choose another --savedir"
            ) from error

    def resume_file(self) -> Path | None:
        """The checkpoint of the latest stage, or None."""
        for stage in reversed(STAGES):
            path = self.path / LAST[stage]
            if path.is_file():
                return path
        return None

    def say(self, text: str) -> None:
        """Print `text` and add it to `log.txt`."""
        if not self.main:
            return
        print(text, flush=True)
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def write_options(self, options: dict[str, Any], repository: Path) -> None:
        """Record the command, every option and what the run depends on."""
        if not self.main:
            return
        record = {"command": sys.argv, "options": options, "environment": environment(repository)}
        write_json(self.path / "options.json", record)

    def read_options(self) -> dict[str, Any]:
        """Options of the run in this folder."""
        return read_json(self.path / "options.json")["options"]

    def write_records(self, records: list[dict[str, Any]]) -> None:
        """Write `log.jsonl` whole: it never disagrees with the checkpoint."""
        if not self.main:
            return
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        write_text(self.path / "log.jsonl", "".join(lines))
