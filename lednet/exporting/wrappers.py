"""The network with its pre- and postprocessing inside, as backends run it and files hold it."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lednet.exporting.fuse import fuse_channel_shuffles, fuse_conv_bn
from lednet.model import LEDNet, resize

OUTPUTS = ("labels", "logits")
"""What an `EndToEndModel` returns, and the name of that output in exported files."""


class EndToEndModel(nn.Module):
    """A network from uint8 images to label maps, or to logits at 1/8 of the image's size.

    Args:
        net: is not modified.
        mean, std: normalization of the [0, 1] image, per channel.
        output: one of `OUTPUTS`.
        fold: fuse batch norms and channel shuffles into convolutions (equal outputs to float32
            rounding).

    images: (N, H, W, 3) uint8 RGB -> labels (N, H, W) uint8 or logits
    (N, C, ceil(H/8), ceil(W/8)) float32
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        net: LEDNet,
        mean: Sequence[float] = (0, 0, 0),
        std: Sequence[float] = (1, 1, 1),
        *,
        output: str = "logits",
        fold: bool = True,
    ):
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {OUTPUTS}, not {output!r}")
        self.output = output
        # A copy in either case: a backend moves it to its device and memory format.
        plain = nn.Sequential(net.encoder, net.decoder)
        self.net = fuse_channel_shuffles(fuse_conv_bn(net)) if fold else copy.deepcopy(plain)
        # Not "mean": torch 2.6 gives a buffer and the operation of that name one name in ONNX.
        self.register_buffer("pixel_mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("pixel_std", torch.tensor(std, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() / 255 - self.pixel_mean) / self.pixel_std  # (N, H, W, 3)
        logits = self.net(x.permute(0, 3, 1, 2))
        if self.output == "logits":
            return logits
        return resize(logits, images.shape[1:3]).argmax(dim=1).to(torch.uint8)
