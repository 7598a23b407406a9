"""Checkpoints of a run."""

from pathlib import Path
from typing import Any

from torch import nn

from lednet.checkpoint import load_checkpoint, save_checkpoint
from lednet.errors import UserError


class Checkpoints:
    """The newest few files `checkpoint_<steps>.pth` of a run folder.

    Args:
        folder: the run folder.
        keep: number of checkpoints to keep, at least 1. With 2, one is left if the other is
            damaged.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Existing checkpoints, the newest first."""
        return sorted(self.folder.glob("checkpoint_*.pth"), reverse=True)

    def save(self, number: int, net: nn.Module, meta: dict, **state: Any) -> Path:
        """Write a checkpoint, then remove the oldest ones.

        Args:
            number: steps of the run so far, by which the files are ordered.
            net, meta, state: see `save_checkpoint`.
        """
        path = self.folder / f"checkpoint_{number:09d}.pth"
        save_checkpoint(path, net, meta, **state)
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def load_latest(self, main: bool = True) -> tuple[Path, dict[str, Any], list[str]]:
        """Load the newest valid checkpoint.

        Args:
            main: whether this process renames damaged checkpoints to `.damaged`.

        Returns:
            Path, content, and a sentence about each newer checkpoint that is damaged.

        Raises:
            UserError: none is valid.
        """
        warnings: list[str] = []
        for path in self.paths():
            try:
                return path, load_checkpoint(path), warnings
            except UserError as error:
                warnings.append(str(error))
                if main and path.exists():
                    path.rename(path.with_suffix(".damaged"))
        reason = warnings[0] if warnings else f"no checkpoint in {self.folder}"
        raise UserError(f"{reason}; nothing to resume: start a new run in another --savedir")
