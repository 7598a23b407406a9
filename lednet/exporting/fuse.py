"""Graph rewrites for inference: batch norm and channel shuffles fused into convolutions."""

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from lednet.model import Downsampler, LEDNet, SSnbt


class FusedDownsampler(nn.Module):
    """A `Downsampler` without batch norm: (N, in, H, W) -> (N, out, ceil(H/2), ceil(W/2)).

    The norm is applied to a concatenation. Its first channels are fused into the convolution;
    the max-pooled channels have no weights, so they keep a scale and a shift.
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
    """A copy of `net` for inference with every batch norm fused into the preceding convolution.

    Computed in float64; the outputs agree to float32 rounding. The copy is in evaluation mode
    and cannot be trained.

    Args:
        net: is not modified.
    """
    dtype = next(net.parameters()).dtype
    fused = copy.deepcopy(net).double().eval()
    for i, block in enumerate(fused.encoder):
        if isinstance(block, Downsampler):
            fused.encoder[i] = FusedDownsampler(block)
    for sequence in [m for m in fused.modules() if isinstance(m, nn.Sequential)]:
        for i in reversed(range(1, len(sequence))):
            conv, norm = sequence[i - 1], sequence[i]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequence[i - 1] = fuse_conv_bn_eval(conv, norm)
                del sequence[i]
    left = [name for name, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)]
    if left:
        raise ValueError(f"batch norm without a preceding convolution: {left}")
    return fused.to(dtype).requires_grad_(False)


# A channel shuffle is a reshape and a transposition, which forces inference engines to leave
# their blocked memory layouts twice per block. Three steps remove it:
#
# - The two halves of the channels are kept as two tensors, so nothing is split or concatenated.
# - Between two blocks, shuffle and split together select channels: each half is a 1x1 convolution
#   whose rows contain a single 1. Multiplying by it is exact.
# - After the last block of a stage the channels keep their order, and the input weights of the
#   next layer are permuted instead.


def _select_channels(
    layer: nn.Module, outputs: Tensor | slice = slice(None), inputs: Tensor | slice = slice(None)
) -> nn.Conv2d:
    """A copy of a convolution with these of its output and input channels, in this order."""
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"not a convolution: {layer}")
    conv = copy.deepcopy(layer)
    weight = layer.weight[outputs][:, inputs]
    conv.out_channels, conv.in_channels = weight.shape[:2]
    conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if layer.bias is not None:
        conv.bias = nn.Parameter(layer.bias[outputs].detach().clone())
    return conv


def _permute_branch(branch: nn.Sequential, order: Tensor) -> nn.Sequential:
    """A block's branch whose input and output channels are permuted."""
    first, *between, last = (layer for layer in branch if not isinstance(layer, nn.Dropout2d))
    return nn.Sequential(
        _select_channels(first, inputs=order), *between, _select_channels(last, outputs=order)
    )


class _SplitBlock(nn.Module):
    """An SS-nbt block on two halves. left, right: (N, C/2, H, W) each -> the same"""

    def __init__(self, block: SSnbt, left_order: Tensor, right_order: Tensor):
        super().__init__()
        self.left = _permute_branch(block.left, left_order)
        self.right = _permute_branch(block.right, right_order)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.left(left) + left), torch.relu(self.right(right) + right)


class _ShuffleSplit(nn.Module):
    """The shuffled channels of two halves, split into halves again.

    order: (C,) position after the shuffle of each channel of the concatenated halves.
    """

    def __init__(self, order: Tensor):
        super().__init__()
        channels = len(order)
        selection = torch.zeros(channels, channels)
        selection[order, torch.arange(channels)] = 1
        self.to_left, self.to_right = (
            nn.Conv2d(channels, channels // 2, 1, bias=False) for _ in range(2)
        )
        for conv, rows in zip((self.to_left, self.to_right), selection.chunk(2), strict=True):
            conv.weight.data.copy_(rows[:, :, None, None])

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat((left, right), dim=1)
        return self.to_left(x), self.to_right(x)


class _SplitDownsampler(nn.Module):
    """A fused downsampler with its output in two halves.

    The left half is all convolution; in the right half the pooled channels come last.

    order: (in_channels,) the original channel at each position of the input.

    x: (N, in_channels, H, W) -> two of (N, out_channels / 2, ceil(H/2), ceil(W/2))
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, block: FusedDownsampler, order: Tensor):
        super().__init__()
        conv = block.conv
        half = (conv.out_channels + conv.in_channels) // 2
        self.left = _select_channels(conv, slice(half), order)
        has_conv = conv.out_channels > half
        self.right = _select_channels(conv, slice(half, None), order) if has_conv else None
        self.pool = block.pool
        self.register_buffer("scale", block.scale[order])
        self.register_buffer("shift", block.shift[order])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        right = self.pool(x) * self.scale + self.shift
        if self.right is not None:
            right = torch.cat((self.right(x), right), dim=1)
        return torch.relu(self.left(x)), torch.relu(right)


class _Stage(nn.Module):
    """A downsampler and its blocks. x: (N, in, H, W) -> (N, out, ceil(H/2), ceil(W/2))

    order: (out,) the original channel at each position of the output.
    """

    def __init__(self, down: FusedDownsampler, blocks: list[SSnbt], order: Tensor):
        super().__init__()
        self.down = _SplitDownsampler(down, order)
        half = (down.conv.out_channels + len(order)) // 2
        # Pooled channels keep the input's order; they are the end of the right half.
        pooled_from = half - len(order)
        left = torch.arange(half)
        right = torch.cat((torch.arange(pooled_from), pooled_from + order))
        steps: list[nn.Module] = []
        for block in blocks:
            if steps:
                steps.append(_ShuffleSplit(torch.cat((2 * left, 2 * right + 1))))
                left, right = torch.arange(half), torch.arange(half)
            steps.append(_SplitBlock(block, left, right))
        self.steps = nn.ModuleList(steps)
        self.order = torch.cat((2 * left, 2 * right + 1) if blocks else (left, half + right))

    def forward(self, x: Tensor) -> Tensor:
        halves = self.down(x)
        for step in self.steps:
            halves = step(*halves)
        return torch.cat(halves, dim=1)


def fuse_channel_shuffles(fused: LEDNet) -> nn.Sequential:
    """Encoder and decoder of a network without a channel shuffle or split; equal outputs.

    Args:
        fused: from `fuse_conv_bn`; the weights of its decoder are permuted in place.

    Returns:
        x: (N, 3, H, W) -> logits (N, num_classes, ceil(H/8), ceil(W/8))
    """
    layers: list[Any] = list(fused.encoder)
    starts = [i for i, layer in enumerate(layers) if isinstance(layer, FusedDownsampler)]
    stages: list[_Stage] = []
    order = torch.arange(3)
    for start, stop in itertools.pairwise([*starts, len(layers)]):
        stages.append(_Stage(layers[start], layers[start + 1 : stop], order))
        order = stages[-1].order
    decoder = fused.decoder
    for branch in (decoder.mid, decoder.pooled, decoder.down1):
        branch[0] = _select_channels(branch[0], inputs=order)
    return nn.Sequential(*stages, decoder).eval().requires_grad_(False)
