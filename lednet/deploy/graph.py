"""What backends run and exports hold: the network with its pre- and post-processing inside."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lednet.deploy.fold import fold_batch_norm
from lednet.model import LEDNet, resize


class BytesToLogits(nn.Module):
    """uint8 images to logits at 1/8 of their size: everything but the last upsampling.

    Args:
        net: folded here, unless it is already; not changed.
        mean, std: normalisation of the [0, 1] image that the network was trained with.

    images: (N, H, W, 3) uint8 RGB -> (N, C, ceil(H/8), ceil(W/8)) float32
    """

    def __init__(
        self, net: LEDNet, mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1)
    ):
        super().__init__()
        folded = fold_batch_norm(net)
        self.encoder, self.decoder = folded.encoder, folded.decoder
        self.register_buffer("scale", 1 / (255 * torch.tensor(std, dtype=torch.float32)))
        self.register_buffer("shift", -torch.tensor(mean) / torch.tensor(std).float())

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() * self.scale + self.shift  # (N, H, W, 3)
        return self.decoder(self.encoder(x.permute(0, 3, 1, 2)))


class BytesToLabels(BytesToLogits):
    """uint8 images to label maps of their size: bytes in, bytes out.

    images: (N, H, W, 3) uint8 RGB -> (N, H, W) uint8 class indices
    """

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return resize(logits, images.shape[1:3]).argmax(dim=1).to(torch.uint8)
