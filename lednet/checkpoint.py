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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lednet.data.image_io import max_pixels
from lednet.data.labels import LabelScheme
from lednet.errors import UserError
from lednet.hub import CONFIG, RELEASED, TENSORS, read_pretrained, released_names
from lednet.io import write_atomically
from lednet.model import EncoderClassifier, LEDNet

BEST_WEIGHTS = "best.pth"
"""In a run's folder, the weights of the best validation score."""

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
class KeyReport:
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


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
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
    """`read_checkpoint` of a file that `torch.save` wrote."""
    try:
        require_intact(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        known = ", ".join(released_names()) or "there are none"
        raise UserError(
            f"no weights at {path}: check the path, or give a released name ({known})"
        ) from error
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


def compare_keys(net: nn.Module, state: dict[str, Tensor], part: str = "") -> KeyReport:
    """Hold the keys and shapes of `state` against those of `net`; changes nothing.

    Args:
        part: prefix of the keys asked for, "encoder." for instance; keys of the file
            outside it are listed as skipped.
    """
    report = KeyReport()
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
) -> KeyReport:
    """Copy `state` into `net`, all of it or nothing.

    Raises:
        UserError: a key is missing, unexpected or of another shape; names `source`.
    """
    report = _require_fit(net, state, source, part)
    net.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    return report


def _require_fit(
    net: nn.Module, state: dict[str, Tensor], source: str | os.PathLike, part: str = ""
) -> KeyReport:
    report = compare_keys(net, state, part)
    if not report.complete:
        raise UserError(
            f"{source} does not fit {_describe(net)} ({report}): {report.examples()}; choose the "
            "weights' own variant and number of classes, or other weights"
        )
    return report


def load_weights(net: nn.Module, path: str | os.PathLike, part: str = "") -> KeyReport:
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
    return load_state(net, read_checkpoint(path)["state_dict"], path, part)


def weights_file(path: str | os.PathLike) -> Path:
    """The file that `path` stands for: itself, the best weights of a run's folder, the tensors
    of a folder in the layout of `lednet.hub`, or the released weights of that name.

    Raises:
        UserError: a folder without them.
    """
    path = Path(path)
    if not path.exists() and path.name == str(path) and (RELEASED / path / CONFIG).is_file():
        return RELEASED / path / TENSORS
    if not path.is_dir():
        return path
    for name in (BEST_WEIGHTS, TENSORS):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} holds no {BEST_WEIGHTS}: give a run whose second stage has begun")


def weights_checksum(path: str | os.PathLike) -> str:
    """SHA-256 of the file that `path` stands for.

    Raises:
        UserError: as `weights_file`, or there is no such file.
    """
    try:
        with open(weights_file(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check --weights") from error


def load_network(path: str | os.PathLike) -> tuple[LEDNet, dict[str, Any]]:
    """Build the network that the weights at `path` belong to, and load them.

    Variant, pyramid width and number of classes are read off the shapes.

    Args:
        path: weights, the folder of a training run, or the name of released weights.

    Returns:
        The network in evaluation mode, and the file's "meta" (empty for foreign files).

    Raises:
        UserError: as `load_weights`; also for weights of the encoder stage alone.
    """
    path = weights_file(path)
    checkpoint = read_checkpoint(path)
    state = checkpoint["state_dict"]
    try:
        num_classes = state["decoder.mid.0.weight"].shape[0]
        width = state["decoder.down1.0.weight"].shape[0]
        light = state["decoder.lateral1.0.weight"].shape[-1] > 1
        build = partial(LEDNet, num_classes, *(("d20",) if light else ("d128", width)))
        with torch.device("meta"):
            _require_fit(build(), state, path)  # before memory is taken for what they claim
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{path} holds no LEDNet decoder: give the weights of a full network"
        ) from error
    net = build()
    load_state(net, state, path)
    return net.eval(), checkpoint.get("meta", {})


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


def require_classes(
    net: LEDNet, meta: dict, scheme: LabelScheme, source: str | os.PathLike
) -> None:
    """Refuse a network whose outputs mean something else than the classes of `scheme`.

    Args:
        net, meta: as `load_network` returned them.
        source: of the weights, for the message.

    Raises:
        UserError: another number of classes, or others by name.
    """
    if net.num_classes != scheme.num_outputs:
        raise UserError(
            f"{source} has {net.num_classes} outputs, {scheme.name} needs {scheme.num_outputs} "
            f"({scheme.num_classes} classes and void): choose the data set it was trained on"
        )
    if "classes" in meta and tuple(meta["classes"]) != scheme.classes:
        raise UserError(
            f"{source} was trained on {meta.get('dataset')}, whose classes are not those of "
            f"{scheme.name}: choose the data set it was trained on"
        )


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
    if isinstance(net, LEDNet):
        return f"LEDNet {net.variant} with {net.num_classes} outputs"
    if isinstance(net, EncoderClassifier):
        return f"the classifier with {net.num_classes} classes"
    return type(net).__name__
