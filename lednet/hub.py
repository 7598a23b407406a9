"""Names and folders of weights, and networks that are built from them.

Released weights: folders with config.json and model.safetensors in the layout of Hugging Face.
config.json says what network the tensors belong to, what they were trained on, and the
checksum of the file that holds them. Nothing in either file can run code.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lednet.checkpoint import CONFIG, TENSORS, LoadReport, load_checkpoint, load_state, require_fit
from lednet.errors import UserError

_HERE = Path(__file__).resolve().parent
RELEASED = _HERE / "released"
"""Folders of the weights that come with the project, by name: inside an installed package, or
in a clone's save/released."""
if not RELEASED.is_dir():
    RELEASED = _HERE.parent / "save/released"


def list_pretrained(released: Path = RELEASED) -> list[str]:
    """Names that `LEDNet.from_pretrained` knows."""
    return sorted(path.parent.name for path in released.glob(f"*/{CONFIG}"))


BEST_WEIGHTS = "best.pth"
"""In a run's folder, the weights of the best validation score."""


def resolve_weights(path: str | os.PathLike) -> Path:
    """The file that `path` stands for: itself, the best weights of a run's folder, the tensors
    of a folder in the layout of `lednet.hub`, or the released weights of that name.

    Raises:
        UserError: there is no such file or name, or a folder without weights.
    """
    path = Path(path)
    if not path.exists() and path.name == str(path) and (RELEASED / path / CONFIG).is_file():
        return RELEASED / path / TENSORS
    if not path.exists():
        known = ", ".join(list_pretrained()) or "there are none"
        raise UserError(f"no weights at {path}: check the path, or give a released name ({known})")
    if not path.is_dir():
        return path
    for name in (BEST_WEIGHTS, TENSORS):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} holds no {BEST_WEIGHTS}: give a run whose second stage has begun")


def weights_checksum(path: str | os.PathLike) -> str:
    """SHA-256 of the file that `path` stands for.

    Raises:
        UserError: as `resolve_weights`, or there is no such file.
    """
    try:
        with open(resolve_weights(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check --weights") from error


def load_weights(net: nn.Module, path: str | os.PathLike, part: str = "") -> LoadReport:
    """Load the weights at `path` into `net`, strictly.

    Args:
        net: a `LEDNet`, a part of one under the same key names, or an `EncoderClassifier`.
        part: "" for all of it, or "encoder." to take the encoder alone, for instance
            out of ImageNet pretraining.

    Returns:
        A report of every key; `print` it.

    Raises:
        UserError: the file cannot be opened safely, or a key does not fit. The network
            is left as it was.
    """
    return load_state(net, load_checkpoint(resolve_weights(path))["state_dict"], path, part)


class PretrainedMixin(nn.Module):
    """A network that can be built from weights alone."""

    @classmethod
    def arguments_from_state(cls, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Arguments of the constructor, read off the shapes of a state dict.

        Raises:
            KeyError, IndexError, ValueError: the state dict belongs to another network.
        """
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | os.PathLike) -> tuple[Self, dict[str, Any]]:
        """Build the network that the weights at `path` belong to, and load them.

        Args:
            path: weights, the folder of a training run, or the name of released weights.

        Returns:
            The network in evaluation mode, and the file's "meta" (empty for foreign files).

        Raises:
            UserError: as `load_weights`; also for weights of another kind of network.
        """
        path = resolve_weights(path)
        checkpoint = load_checkpoint(path)
        state = checkpoint["state_dict"]
        try:
            arguments = cls.arguments_from_state(state)
            with torch.device("meta"):
                require_fit(cls(**arguments), state, path)  # before memory is allocated
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"{path} holds no {cls.__name__} decoder: give the weights of a full network"
            ) from error
        net = cls(**arguments)
        load_state(net, state, path)
        return net.eval(), checkpoint.get("meta", {})

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike) -> Self:
        """The network with its weights, in evaluation mode.

        Args:
            name: of released weights ("camvid-d20"), a folder in their layout (config.json and
                model.safetensors), a run's folder or a weights file. Nothing is downloaded.

        Raises:
            UserError: there is none, its checksum differs, or it is another network.
        """
        return cls.load(name)[0]


def input_size(
    meta: dict,
    default: tuple[int, int] | None = None,
    height: int | None = None,
    width: int | None = None,
) -> tuple[int, int]:
    """(height, width) in pixels to run a network at: as asked for, as trained, or `default`.

    Raises:
        UserError: nothing says it.
    """
    known = meta.get("size") or default or (None, None)
    height, width = height or known[0], width or known[1]
    if height is None or width is None:
        raise UserError("the weights do not say their input size: give --height and --width")
    return height, width
