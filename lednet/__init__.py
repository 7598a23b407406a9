"""LEDNet: real-time semantic segmentation.

Names are imported on first use, so that importing the package does not import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lednet.api import evaluate, export, train
    from lednet.checkpoint import LoadReport
    from lednet.errors import UserError
    from lednet.hub import list_pretrained, load_weights
    from lednet.inference.predictor import Predictor
    from lednet.inference.result import Segmentation
    from lednet.model import EncoderClassifier, LEDNet, load_model

__version__ = "0.1.0"

_MODULES = {
    "EncoderClassifier": "lednet.model",
    "LEDNet": "lednet.model",
    "LoadReport": "lednet.checkpoint",
    "Predictor": "lednet.inference.predictor",
    "Segmentation": "lednet.inference.result",
    "UserError": "lednet.errors",
    "evaluate": "lednet.api",
    "export": "lednet.api",
    "list_pretrained": "lednet.hub",
    "load_model": "lednet.model",
    "load_weights": "lednet.hub",
    "train": "lednet.api",
}
__all__ = [
    "EncoderClassifier",
    "LEDNet",
    "LoadReport",
    "Predictor",
    "Segmentation",
    "UserError",
    "evaluate",
    "export",
    "list_pretrained",
    "load_model",
    "load_weights",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
