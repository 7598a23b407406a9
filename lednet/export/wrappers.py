"""What backends run and exports hold: the network with its pre- and post-processing inside."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lednet.export.fuse import fuse_conv_bn
from lednet.export.unshuffle import fuse_channel_shuffles
from lednet.model import LEDNet, resize


class BytesToLogits(nn.Module):
    """uint8 images to logits at 1/8 of their size: everything but the last upsampling.

    Args:
        net: not changed.
        mean, std: normalisation of the [0, 1] image that the network was trained with.
        fold: whether to fold batch norms and to remove channel shuffles (the same answer to
            float32 rounding); otherwise encoder and decoder are copied as they are.

    images: (N, H, W, 3) uint8 RGB -> (N, C, ceil(H/8), ceil(W/8)) float32
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        net: LEDNet,
        mean: Sequence[float] = (0, 0, 0),
        std: Sequence[float] = (1, 1, 1),
        fold: bool = True,
    ):
        super().__init__()
        # A copy in either case: a backend moves it to its device and memory format.
        plain = nn.Sequential(net.encoder, net.decoder)
        self.net = fuse_channel_shuffles(fuse_conv_bn(net)) if fold else copy.deepcopy(plain)
        # Not "mean": with torch 2.6 the ONNX exporter gives it and the operation one name.
        self.register_buffer("pixel_mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("pixel_std", torch.tensor(std, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() / 255 - self.pixel_mean) / self.pixel_std  # (N, H, W, 3)
        return self.net(x.permute(0, 3, 1, 2))


class BytesToLabels(BytesToLogits):
    """uint8 images to label maps of their size: bytes in, bytes out.

    images: (N, H, W, 3) uint8 RGB -> (N, H, W) uint8 class indices
    """

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return resize(logits, images.shape[1:3]).argmax(dim=1).to(torch.uint8)
