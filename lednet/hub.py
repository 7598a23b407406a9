"""Weights to hand on: a folder with config.json and model.safetensors, as Hugging Face lays it out.

config.json says what network the tensors belong to, what they were trained on, and the
checksum of the file that holds them. Nothing in either file can run code.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from lednet.errors import UserError
from lednet.io import read_json, write_atomically, write_json
from lednet.model import LEDNet

_HERE = Path(__file__).resolve().parent
RELEASED = _HERE / "released"
"""Folders of the weights that come with the project, by name: inside an installed package, or
in a clone's save/released."""
if not RELEASED.is_dir():
    RELEASED = _HERE.parent / "save/released"
CONFIG = "config.json"
TENSORS = "model.safetensors"
NETWORK = ("num_classes", "variant", "pyramid_channels")
"""What `LEDNet` is built from."""


def released_names(released: Path = RELEASED) -> list[str]:
    """Names that `LEDNet.from_pretrained` knows."""
    return sorted(path.parent.name for path in released.glob(f"*/{CONFIG}"))


def save_pretrained(folder: str | os.PathLike, net: LEDNet, meta: dict[str, Any]) -> None:
    """Write `net` and what is known of it to `folder`.

    Args:
        meta: about data and training, ready for JSON, as `load_network` returns it.
    """
    folder = Path(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    content = save(state, metadata={"format": "pt"})
    with write_atomically(folder / TENSORS) as temporary:
        temporary.write_bytes(content)
    network = {key: getattr(net, key) for key in NETWORK}
    if net.variant == "d20":
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
