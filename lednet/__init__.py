"""LEDNet: real-time semantic segmentation."""

from lednet.checkpoint import KeyReport, load_network, load_weights
from lednet.errors import UserError
from lednet.model import LEDNet

__all__ = ["KeyReport", "LEDNet", "UserError", "load_network", "load_weights"]
__version__ = "0.1.0"
