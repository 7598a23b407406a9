"""The last few states of a run, to resume from."""

from pathlib import Path
from typing import Any

from torch import nn

from lednet.checkpoint import load_checkpoint, save_checkpoint
from lednet.errors import UserError


class Checkpoints:
    """Files `checkpoint_<number>.pth` of a folder, of which the newest few are kept.

    Args:
        folder: of the run.
        keep: how many; 1 or more. With 2, one is left when the other turns out damaged.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """All that are there, the newest first."""
        return sorted(self.folder.glob("checkpoint_*.pth"), reverse=True)

    def save(self, number: int, net: nn.Module, meta: dict, **state: Any) -> Path:
        """Write one; the oldest go only when it is whole.

        Args:
            number: steps of the run so far: the order of the files.
        """
        path = self.folder / f"checkpoint_{number:09d}.pth"
        save_checkpoint(path, net, meta, **state)
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def load_latest(self, main: bool = True) -> tuple[Path, dict[str, Any], list[str]]:
        """Open the newest that is sound.

        Args:
            main: whether this process may put damaged ones aside (as `.damaged`).

        Returns:
            Its path and content, and a sentence for each newer one that is damaged.

        Raises:
            UserError: none is sound.
        """
        complaints: list[str] = []
        for path in self.paths():
            try:
                return path, load_checkpoint(path), complaints
            except UserError as error:
                complaints.append(str(error))
                if main and path.exists():
                    path.rename(path.with_suffix(".damaged"))
        found = complaints[0] if complaints else f"no checkpoint in {self.folder}"
        raise UserError(f"{found}; nothing to resume: start anew in another --savedir")
