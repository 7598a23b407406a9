"""Checkpoints and released weights: strict, safe reading and atomic writing.

Reads this project's checkpoints and released folders, plain state dicts, and the files of the
original release (its key names, bundled checkpoints and `module.` prefix).
"""

import hashlib
import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lednet.errors import UserError
from lednet.files import require_content
from lednet.io import max_pixels, read_json, write_atomically, write_json

# Prefixes of keys: DataParallel and DDP, torch.compile, the release's classifier.
_PREFIXES = ("module.", "_orig_mod.", "features.")

# Key names of the original release -> ours, applied in order. The left branch of a block starts
# with a 3x1 convolution, the right branch with a 1x3.
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

CONFIG = "config.json"
TENSORS = "model.safetensors"
"""Files in a folder of released weights."""

NETWORK = ("num_classes", "variant", "pyramid_channels")
"""Arguments of `LEDNet` in `CONFIG`."""


@dataclass
class LoadReport:
    """Result of comparing the keys of a state dict with those of a network.

    Attributes:
        loaded: keys whose values were copied into the network.
        missing: keys of the network that the file lacks.
        unexpected: keys of the file that the network lacks.
        mismatched: (key, shape in the network, shape in the file).
        skipped: keys outside the requested part of the network.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple, tuple]]
    skipped: list[str]

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
        found = [
            *(f"{k} is {theirs} in the file and {ours} in the network"
              for k, ours, theirs in self.mismatched[:1]),
            *(f"{key} is missing" for key in self.missing[:1]),
            *(f"{key} is unknown" for key in self.unexpected[:1]),
        ]  # fmt: skip
        return "; ".join(found)


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint to the CPU with a loader that runs no code.

    Returns:
        A dictionary with at least "state_dict", its keys without wrappers' prefixes and under
        this project's names.

    Raises:
        UserError: the file is missing, damaged or no checkpoint, or contains more than tensors,
            numbers, strings and plain containers.
    """
    path = Path(path)
    require_content(path)
    content = _read_released(path.parent) if path.name == TENSORS else _read_torch_file(path)
    if "meta" in content:
        require_meta(content["meta"], path)
    return content


def _read_torch_file(path: Path) -> dict[str, Any]:
    try:
        _require_intact(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no weights at {path}: check the path") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a checkpoint of plain tensors, and code in it is never run: "
            "save it again as a state dict"
        ) from error
    except Exception as error:  # the legacy reader raises anything on damaged bytes
        raise UserError(
            f"{path} is damaged or no PyTorch checkpoint: copy or download it again"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not _is_plain_state(state):
        raise UserError(f"{path} holds no state dict: give a file written by training")
    if sum(value.nbytes for value in state.values()) > path.stat().st_size:  # expanded tensors
        raise UserError(f"{path} has tensors larger than the file: save it again as a state dict")
    entries = content if "state_dict" in content else {}
    return {**entries, "state_dict": {_our_name(key): value for key, value in state.items()}}


def _require_intact(path: Path) -> None:
    """Check the CRC-32 of each member of the file, which PyTorch writes but does not check.

    Files from before PyTorch 1.6 have none.

    Raises:
        zipfile.BadZipFile: a checksum differs, or the members are compressed, which PyTorch's
            never are: they could expand to more than the memory holds.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise zipfile.BadZipFile("compressed")
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)


def _is_plain_state(state: dict) -> bool:
    return all(
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_meta or value.is_complex())
        for key, value in state.items()
    )


def _our_name(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    for pattern, replacement in _REFERENCE_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _is_list(value: Any, is_valid: Callable[[Any], bool], length: int | None = None) -> bool:
    fits = isinstance(value, list | tuple) and length in (None, len(value))
    return fits and all(map(is_valid, value))


def _in_range(low: float, high: float, types: Any = int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types) and low <= value <= high


_META: dict[str, Callable[[Any], bool]] = {
    "size": lambda v: _is_list(v, _in_range(1, 1e9), 2) and math.prod(v) <= max_pixels(),
    "classes": lambda v: _is_list(v, lambda name: isinstance(name, str)),
    "label_values": lambda v: _is_list(v, lambda pair: _is_list(pair, _in_range(0, 255), 2)),
    "colors": lambda v: _is_list(v, lambda color: _is_list(color, _in_range(0, 255), 3)),
    "mean": lambda v: _is_list(v, _in_range(-1e6, 1e6, int | float), 3),
    "std": lambda v: _is_list(v, _in_range(1e-6, 1e6, int | float), 3),
}
"""Validators of the entries of "meta" that code relies on."""


def require_meta(meta: Any, source: str | os.PathLike) -> None:
    """Check "meta", the description of data and training that goes with weights.

    Raises:
        UserError: `meta` is no dictionary, or one of its entries has another form than training
            writes; names `source`.
    """
    if not isinstance(meta, dict):
        raise UserError(f'the "meta" of {source} is no dictionary: give a file written by training')
    for key, is_valid in _META.items():
        if key in meta and not is_valid(meta[key]):
            raise UserError(
                f'the "{key}" of {source} is damaged or of another kind: give a file written by '
                "training"
            )


def compare_keys(net: nn.Module, state: dict[str, Tensor], part: str = "") -> LoadReport:
    """Compare the keys and shapes of `state` with those of `net`, which is not changed.

    Args:
        part: prefix of the keys to compare, for instance "encoder."; other keys of `state` are
            reported as skipped.
    """
    wanted = {key: value.shape for key, value in net.state_dict().items() if key.startswith(part)}
    found = {key: value.shape for key, value in state.items() if key.startswith(part)}
    known = [key for key in found if key in wanted]
    # PyTorch before 0.4.1 wrote no batch counters, and batch norm with a fixed momentum needs none.
    needed = [key for key in wanted if not key.endswith(".num_batches_tracked")]
    return LoadReport(
        loaded=[key for key in known if found[key] == wanted[key]],
        missing=[key for key in needed if key not in found],
        unexpected=[key for key in found if key not in wanted],
        mismatched=[
            (key, tuple(wanted[key]), tuple(found[key]))
            for key in known
            if found[key] != wanted[key]
        ],
        skipped=[key for key in state if key not in found],
    )


def require_fit(
    net: nn.Module, state: dict[str, Tensor], source: str | os.PathLike, part: str = ""
) -> LoadReport:
    """`compare_keys` that raises a `UserError` naming `source` unless all keys fit."""
    report = compare_keys(net, state, part)
    if not report.complete:
        raise UserError(
            f"{source} does not fit {type(net).__name__}({net.extra_repr()}) ({report}): "
            f"{report.examples()}; choose the weights' own variant and number of classes, or "
            "other weights"
        )
    return report


def load_state(
    net: nn.Module, state: dict[str, Tensor], source: str | os.PathLike, part: str = ""
) -> LoadReport:
    """Copy `state` into `net`, all of it or nothing.

    Raises:
        UserError: a key is missing, unexpected or of another shape, or a value is infinite or NaN;
            names `source`.
    """
    report = require_fit(net, state, source, part)
    for key in report.loaded:
        if not state[key].float().isfinite().all():
            raise UserError(
                f"{source} has values that are not finite ({key}): take weights from before the "
                "training diverged"
            )
    net.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    return report


def save_checkpoint(path: str | os.PathLike, net: nn.Module, meta: dict, **extra: Any) -> None:
    """Write the weights of `net`, `meta` and `extra` to `path`, atomically.

    `meta` and `extra` may contain tensors, numbers, strings and plain containers only, which the
    safe loader reads.
    """
    state = {key: value.detach().cpu() for key, value in net.state_dict().items()}
    content = io.BytesIO()  # torch.save to a file hides the reason of a failure
    torch.save({"state_dict": state, "meta": meta, **extra}, content)
    # CPython 3.12.1 crashes if the view is left to the garbage collector.
    with write_atomically(path) as temporary, content.getbuffer() as view:
        temporary.write_bytes(view)


def save_pretrained(folder: str | os.PathLike, net: nn.Module, meta: dict[str, Any]) -> None:
    """Write a `LEDNet` to a folder in Hugging Face's layout: `CONFIG` and `TENSORS`.

    Args:
        meta: about data and training, as `load_model` returns it, in JSON's types.
    """
    folder = Path(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    content = save(state, metadata={"format": "pt"})
    with write_atomically(folder / TENSORS) as temporary:
        temporary.write_bytes(content)
    network = {key: getattr(net, key) for key in NETWORK}
    if network["variant"] == "d20":
        network["pyramid_channels"] = None
    checksum = hashlib.sha256(content).hexdigest()
    config = {"model_type": "lednet", "network": network, "meta": meta, "sha256": checksum}
    write_json(folder / CONFIG, config)


def _read_released(folder: Path) -> dict[str, Any]:
    """Read "network", "meta" and "state_dict" from a folder that `save_pretrained` wrote."""
    config_path, path = folder / CONFIG, folder / TENSORS
    config = read_json(config_path)
    if not isinstance(config, dict) or config.get("model_type") != "lednet":
        raise UserError(f"{config_path} does not describe a LEDNet: give a folder of its weights")
    network, meta = config.get("network"), config.get("meta")
    if not isinstance(network, dict) or not {*network} <= {*NETWORK} or not isinstance(meta, dict):
        raise UserError(f"{config_path} lacks `network` or `meta`: download the folder again")
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != config.get("sha256"):
            raise UserError(
                f"{path} is not the file that {config_path} was written for (its SHA-256 "
                "differs): download both again"
            )
        return {"network": network, "meta": meta, "state_dict": load(content)}
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): download it again") from error
