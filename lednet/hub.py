"""Weights by name, folder or file, and networks built from them.

Released weights are folders in Hugging Face's layout: config.json (arguments of the network, what
it was trained on, checksum of the tensors) and model.safetensors. Neither can run code.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lednet.checkpoint import CONFIG, TENSORS, LoadReport, load_checkpoint, load_state, require_fit
from lednet.errors import UserError

_HERE = Path(__file__).resolve().parent
RELEASED = _HERE / "released"
"""Folder of the released weights: inside an installed package, or a clone's save/released."""
if not RELEASED.is_dir():
    RELEASED = _HERE.parent / "save/released"

BEST_WEIGHTS = "best.pth"
"""File in a run folder: the weights with the best validation score."""

HUB_PREFIX = "hf-hub:"
"""Prefix of weights on the Hugging Face Hub: hf-hub:owner/name, as in timm."""

Network = TypeVar("Network", bound=nn.Module)


def list_pretrained(released: Path = RELEASED) -> list[str]:
    """Names of the released weights in the folder `released`."""
    return sorted(path.parent.name for path in released.glob(f"*/{CONFIG}"))


def resolve_weights(path: str | os.PathLike) -> Path:
    """The weights file that `path` means.

    Args:
        path: a file, a run folder (its best weights), a folder of released weights, the name of
            released weights, or hf-hub:owner/name.

    Raises:
        UserError: there is no such file or name, or the folder has no weights.
    """
    if os.fspath(path).startswith(HUB_PREFIX):
        path = download(os.fspath(path).removeprefix(HUB_PREFIX))
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


def download(repo_id: str, revision: str | None = None) -> Path:
    """Folder with the weights of a repository of the Hugging Face Hub, downloaded if needed.

    They are kept in the Hub's cache ($HF_HOME), where they are also found without a network.

    Args:
        repo_id: owner/name.
        revision: branch, tag or commit (default: the main branch).

    Raises:
        UserError: huggingface_hub is not installed, or there is no such repository.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("the Hub needs a package: pip install huggingface_hub") from error
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=[CONFIG, TENSORS]
        )
    except Exception as error:  # the package and its HTTP client have no common base class
        raise UserError(
            f"no weights {repo_id} here or on the Hugging Face Hub ({type(error).__name__}): check "
            "the name, and the network connection"
        ) from error
    return Path(folder)


def weights_checksum(path: str | os.PathLike) -> str:
    """SHA-256 of the weights file that `path` means (see `resolve_weights`), in hexadecimal."""
    try:
        with open(resolve_weights(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check --weights") from error


def load_weights(net: nn.Module, path: str | os.PathLike, part: str = "") -> LoadReport:
    """Load the weights at `path` into `net`, strictly.

    Args:
        net: a `LEDNet`, a part of one with the same key names, or an `EncoderClassifier`.
        path: as for `resolve_weights`.
        part: prefix of the keys to load: "" for all, "encoder." for the encoder alone, for
            instance from pretraining on ImageNet.

    Returns:
        A report of every key, which can be printed.

    Raises:
        UserError: the file cannot be read safely, or a key does not fit. The network is not
            changed.
    """
    return load_state(net, load_checkpoint(resolve_weights(path))["state_dict"], path, part)


def load_network(
    path: str | os.PathLike, build: Callable[[dict[str, Tensor]], Network]
) -> tuple[Network, dict[str, Any]]:
    """Build the network that the weights at `path` belong to, and load them.

    Args:
        path: as for `resolve_weights`.
        build: creates a network whose sizes are those of a state dict. Raises `KeyError`,
            `IndexError` or `ValueError` if the state dict is of another kind of network.

    Returns:
        The network in evaluation mode, and the file's "meta" (empty for other projects' files).

    Raises:
        UserError: as `load_weights`, or the weights are of another kind of network.
    """
    path = resolve_weights(path)
    checkpoint = load_checkpoint(path)
    state = checkpoint["state_dict"]
    try:
        with torch.device("meta"):
            require_fit(build(state), state, path)  # before memory is allocated
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{path} holds no LEDNet decoder: give the weights of a full network"
        ) from error
    net = build(state)
    load_state(net, state, path)
    return net.eval(), checkpoint.get("meta", {})


def input_size(
    meta: dict,
    default: tuple[int, int] | None = None,
    height: int | None = None,
    width: int | None = None,
) -> tuple[int, int]:
    """Network input size (height, width) in pixels: as requested, as trained, or `default`.

    Raises:
        UserError: none of them gives a size.
    """
    known = meta.get("size") or default or (None, None)
    height, width = height or known[0], width or known[1]
    if height is None or width is None:
        raise UserError("the weights do not say their input size: give --height and --width")
    return height, width
