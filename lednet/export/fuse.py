"""Batch norm folded into convolutions: the same function, fewer steps."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from lednet.model import Downsampler, LEDNet


class FusedDownsampler(nn.Module):
    """A `Downsampler` without batch norm.

    The norm works on a concatenation: its first channels go into the convolution, those
    of the pooled half, which has no weights to take them, stay as one scale and shift.

    x: (N, in_channels, H, W) -> (N, out_channels, ceil(H/2), ceil(W/2))
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, block: Downsampler):
        super().__init__()
        norm, conv = block.norm, copy.deepcopy(block.conv)
        split = conv.out_channels
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias,
            norm.running_mean[:split], norm.running_var[:split], norm.eps,
            norm.weight[:split], norm.bias[:split],
        )  # fmt: skip
        scale = norm.weight[split:] / torch.sqrt(norm.running_var[split:] + norm.eps)
        shift = norm.bias[split:] - norm.running_mean[split:] * scale
        self.conv, self.pool = conv, block.pool
        self.register_buffer("scale", scale.detach().view(-1, 1, 1))
        self.register_buffer("shift", shift.detach().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.addcmul(self.shift, self.pool(x), self.scale)
        return torch.relu_(torch.cat((self.conv(x), pooled), dim=1))


def fuse_conv_bn(net: LEDNet) -> LEDNet:
    """A copy of `net`, for inference, in which no batch norm is left.

    Running statistics and affine parameters are absorbed by the convolutions before
    them, in float64; nothing is dropped, so the answers agree to float32 rounding. `net`
    stays as it was. The copy is in evaluation mode and cannot be trained.
    """
    dtype = next(net.parameters()).dtype
    folded = copy.deepcopy(net).double().eval()
    for i, block in enumerate(folded.encoder):
        if isinstance(block, Downsampler):
            folded.encoder[i] = FusedDownsampler(block)
    for sequence in [m for m in folded.modules() if isinstance(m, nn.Sequential)]:
        for i in reversed(range(1, len(sequence))):
            conv, norm = sequence[i - 1], sequence[i]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequence[i - 1] = fuse_conv_bn_eval(conv, norm)
                del sequence[i]
    left = [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
    if left:
        raise ValueError(f"batch norm without a convolution before it: {left}")
    return folded.to(dtype).requires_grad_(False)
