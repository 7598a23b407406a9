"""Weights on disk: strict, safe loading with a report of every key.

Opens this project's checkpoints and released weights, bare state dicts, and the files of the
original release (their key names, checkpoint bundle and `module.` prefix).
"""

import hashlib
import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lednet.errors import UserError
from lednet.io import max_pixels, read_json, write_atomically, write_json

# What stands before a key: DataParallel and DDP, torch.compile, the release's classifier.
_PREFIXES = ("module.", "_orig_mod.", "features.")

# Key names of the original release -> ours, tried in order. In its pairs of
# convolutions the left half starts with 3x1, the right half with 1x3.
_REFERENCE_NAMES: tuple[tuple[str, Any], ...] = (
    (r"^encoder\.initial_block\.bn\.", "encoder.0.norm."),
    (r"^encoder\.initial_block\.", "encoder.0."),
    (r"^encoder\.output_conv\.", "encoder_head."),
    (r"^encoder\.layers\.(\d+)\.", lambda m: f"encoder.{int(m[1]) + 1}."),
    (r"^(encoder\.\d+)\.bn\.", r"\1.norm."),
    (r"\.conv3x1_1_l\.", ".left.0."),
    (r"\.conv1x3_1_l\.", ".left.2."),
    (r"\.bn1_l\.", ".left.3."),
    (r"\.conv3x1_2_l\.", ".left.5."),
    (r"\.conv1x3_2_l\.", ".left.7."),
    (r"\.bn2_l\.", ".left.8."),
    (r"\.conv1x3_1_r\.", ".right.0."),
    (r"\.conv3x1_1_r\.", ".right.2."),
    (r"\.bn1_r\.", ".right.3."),
    (r"\.conv1x3_2_r\.", ".right.5."),
    (r"\.conv3x1_2_r\.", ".right.7."),
    (r"\.bn2_r\.", ".right.8."),
    (r"^decoder\.apn\.branch1\.1\.conv\.", "decoder.pooled."),
    (r"^decoder\.apn\.mid\.0\.conv\.", "decoder.mid."),
    (r"^decoder\.apn\.down3\.0\.conv\.", "decoder.down3."),
    (r"^decoder\.apn\.down3\.1\.conv\.", "decoder.last."),
    (r"^decoder\.apn\.(down\d)\.conv\.", r"decoder.\1."),
    (r"^decoder\.apn\.conv(\d)\.conv\.", r"decoder.lateral\1."),
    (r"^classifier\.linear\.", "classifier."),
)


@dataclass
class LoadReport:
    """What became of each key when weights met a network.

    Attributes:
        loaded: keys whose values are now in the network.
        missing: keys of the network that the file lacks.
        unexpected: keys of the file that the network lacks.
        mismatched: (key, shape in the network, shape in the file).
        skipped: keys outside the part of the network that was asked for.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple, tuple]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        return (
            f"{len(self.loaded)} loaded, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.mismatched)} of another shape"
            + (f", {len(self.skipped)} skipped" if self.skipped else "")
        )

    def examples(self) -> str:
        """The first key of each kind that did not fit."""
        found = []
        if self.mismatched:
            key, ours, theirs = self.mismatched[0]
            found.append(f"{key} is {theirs} in the file and {ours} in the network")
        if self.missing:
            found.append(f"{self.missing[0]} is missing")
        if self.unexpected:
            found.append(f"{self.unexpected[0]} is unknown")
        return "; ".join(found)


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Open a checkpoint on the CPU with PyTorch's safe loader, which runs no code.

    Returns:
        A dictionary with at least "state_dict", its keys without wrappers' prefixes
        and under this project's names.

    Raises:
        UserError: no such file, not a checkpoint, or one that holds more than
            tensors, numbers, strings and plain containers.
    """
    path = Path(path)
    content = read_pretrained(path.parent) if path.name == TENSORS else _read_bundle(path)
    if "meta" in content:
        require_meta(content["meta"], path)
    return content


def _read_bundle(path: Path) -> dict[str, Any]:
    """`load_checkpoint` of a file that `torch.save` wrote."""
    try:
        require_intact(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no weights at {path}: check the path") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a checkpoint of plain tensors, and code in it is never run: "
            "save it again as a state dict"
        ) from error
    except Exception as error:  # the reader of old files lets damaged bytes raise anything
        raise UserError(
            f"{path} is damaged or no PyTorch checkpoint: copy or download it again"
        ) from error
    if isinstance(content, dict) and "state_dict" not in content:
        content = {"state_dict": content}
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not _all_tensors(state):
        raise UserError(f"{path} holds no state dict: give a file written by training")
    if sum(value.numel() * value.element_size() for value in state.values()) > _size(path):
        raise UserError(f"{path} has tensors larger than the file: save it again as a state dict")
    content["state_dict"] = {_our_name(key): value for key, value in state.items()}
    return content


def require_intact(path: Path) -> None:
    """Compare the parts of a checkpoint with the CRC-32 that each carries, which PyTorch
    writes and does not read.

    Raises:
        zipfile.BadZipFile: they differ, or are together larger than the file: PyTorch
            compresses none. Files from before PyTorch 1.6 carry none.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > _size(path):
                raise zipfile.BadZipFile("compressed")
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(damaged)


def _size(path: Path) -> int:
    return path.stat().st_size


def _all_tensors(state: dict) -> bool:
    return all(
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_meta or value.is_complex())
        for key, value in state.items()
    )


def require_meta(meta: Any, source: str | os.PathLike) -> None:
    """
    Raises:
        UserError: `meta` is no dictionary, or what a network is run and shown with has
            another form than training wrote.
    """
    if not isinstance(meta, dict):
        raise UserError(f'the "meta" of {source} is no dictionary: give a file written by training')
    for key, is_sound in _META.items():
        if key in meta and not is_sound(meta[key]):
            raise UserError(
                f'the "{key}" of {source} is damaged or of another kind: give a file written by '
                "training"
            )


def _is_list(value: Any, is_sound: Callable[[Any], bool], count: int | None = None) -> bool:
    fits = isinstance(value, list | tuple) and count in (None, len(value))
    return fits and all(map(is_sound, value))


def _is_whole(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and least <= value <= most


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e6


_META: dict[str, Callable[[Any], bool]] = {
    "size": lambda value: (
        _is_list(value, lambda side: _is_whole(side, 1), 2) and math.prod(value) <= max_pixels()
    ),
    "classes": lambda value: _is_list(value, lambda name: isinstance(name, str)),
    "colors": lambda value: _is_list(value, _is_color),
    "mean": lambda value: _is_list(value, _is_finite, 3),
    "std": lambda value: _is_list(value, lambda v: _is_finite(v) and v > 0, 3),
}
"""What entries of "meta" must be like, as far as there is code that relies on it."""


def _is_color(value: Any) -> bool:
    return _is_list(value, lambda part: _is_whole(part, 0, 255), 3)


def _our_name(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    for pattern, replacement in _REFERENCE_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def compare_keys(net: nn.Module, state: dict[str, Tensor], part: str = "") -> LoadReport:
    """Hold the keys and shapes of `state` against those of `net`; changes nothing.

    Args:
        part: prefix of the keys asked for, "encoder." for instance; keys of the file
            outside it are listed as skipped.
    """
    report = LoadReport()
    wanted = {k: v for k, v in net.state_dict().items() if k.startswith(part)}
    for key, value in state.items():
        if not key.startswith(part):
            report.skipped.append(key)
        elif key not in wanted:
            report.unexpected.append(key)
        elif wanted[key].shape != value.shape:
            shapes = tuple(wanted[key].shape), tuple(value.shape)
            report.mismatched.append((key, *shapes))
        else:
            report.loaded.append(key)
    # PyTorch before 0.4.1 wrote no such counters; a fixed momentum has no use for them.
    needed = (k for k in wanted if not k.endswith(".num_batches_tracked"))
    report.missing = [key for key in needed if key not in state]
    return report


def load_state(
    net: nn.Module, state: dict[str, Tensor], source: str | os.PathLike, part: str = ""
) -> LoadReport:
    """Copy `state` into `net`, all of it or nothing.

    Raises:
        UserError: a key is missing, unexpected or of another shape; names `source`.
    """
    report = require_fit(net, state, source, part)
    net.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    return report


def require_fit(
    net: nn.Module, state: dict[str, Tensor], source: str | os.PathLike, part: str = ""
) -> LoadReport:
    report = compare_keys(net, state, part)
    if not report.complete:
        raise UserError(
            f"{source} does not fit {_describe(net)} ({report}): {report.examples()}; choose the "
            "weights' own variant and number of classes, or other weights"
        )
    return report


def save_checkpoint(path: str | os.PathLike, net: nn.Module, meta: dict, **extra: Any) -> None:
    """Write `net`'s weights, `meta` and `extra` to `path`, atomically.

    `meta` and `extra` hold tensors, numbers, strings and plain containers only, so
    that the safe loader opens them again.
    """
    state = {key: value.detach().cpu() for key, value in net.state_dict().items()}
    content = io.BytesIO()  # writing to a file, torch.save does not say why it fails
    torch.save({"state_dict": state, "meta": meta, **extra}, content)
    # CPython 3.12.1 crashes if the view is left to the garbage collector.
    with write_atomically(path) as temporary, content.getbuffer() as view:
        temporary.write_bytes(view)


def _describe(net: nn.Module) -> str:
    return f"{type(net).__name__}({net.extra_repr()})"


CONFIG = "config.json"


TENSORS = "model.safetensors"


NETWORK = ("num_classes", "variant", "pyramid_channels")
"""What `LEDNet` is built from."""


def save_pretrained(folder: str | os.PathLike, net: nn.Module, meta: dict[str, Any]) -> None:
    """Write `net` and what is known of it to `folder`.

    Args:
        meta: about data and training, ready for JSON, as `load_model` returns it.
    """
    folder = Path(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    content = save(state, metadata={"format": "pt"})
    with write_atomically(folder / TENSORS) as temporary:
        temporary.write_bytes(content)
    network = {key: getattr(net, key) for key in NETWORK}
    if network["variant"] == "d20":
        network["pyramid_channels"] = None
    config = {
        "model_type": "lednet",
        "network": network,
        "meta": meta,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_json(folder / CONFIG, config)


def read_pretrained(folder: str | os.PathLike) -> dict[str, Any]:
    """What `save_pretrained` wrote: "network", "meta" and "state_dict".

    Raises:
        UserError: a file is missing, damaged, or of another kind.
    """
    config_path, path = Path(folder) / CONFIG, Path(folder) / TENSORS
    config = read_json(config_path)
    if not isinstance(config, dict) or config.get("model_type") != "lednet":
        raise UserError(f"{config_path} does not describe a LEDNet: give a folder of its weights")
    network, meta = config.get("network"), config.get("meta")
    if not isinstance(network, dict) or not {*network} <= {*NETWORK} or not isinstance(meta, dict):
        raise UserError(f"{config_path} lacks `network` or `meta`: download the folder again")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): download it again") from error
    if hashlib.sha256(content).hexdigest() != config.get("sha256"):
        raise UserError(
            f"{path} is not the file that {config_path} was written for (its SHA-256 differs): "
            "download both again"
        )
    try:
        state = load(content)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from error
    return {"network": network, "meta": meta, "state_dict": state}
