"""The folded encoder without channel shuffles: the same features from plain convolutions.

A shuffle is a reshape and a transposition, which takes inference engines out of their
blocked memory layouts twice a block. Three things make it unnecessary:

- Both halves of the channels travel as two tensors, so nothing is split or joined.
- Between two blocks, shuffle and split together choose channels: each half is a 1x1
  convolution with one 1 in each row. Multiplying by it is exact.
- Behind the last block of a stage the order of channels is left as it is; the weights of
  what comes next are permuted instead.
"""

import torch
from torch import Tensor, nn

from lednet.export.fuse import FusedDownsampler
from lednet.model import LEDNet, SSnbt


def _conv_with(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """`conv`'s geometry with other weights (out, in, kh, kw)."""
    new = nn.Conv2d(
        weight.shape[1], weight.shape[0],
        # A layer's own attributes, which PyTorch annotates more widely than its arguments.
        conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
        bias=bias is not None, dtype=weight.dtype,
    )  # fmt: skip
    new.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return new


def _conv_of(layer: nn.Module) -> nn.Conv2d:
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"no convolution: {layer}")
    return layer


def _choose_outputs(conv: nn.Conv2d, chosen: Tensor | slice) -> nn.Conv2d:
    """The convolution that answers with these of its output channels alone, in this order."""
    bias = None if conv.bias is None else conv.bias[chosen]
    return _conv_with(conv, conv.weight[chosen], bias)


def _reorder_inputs(conv: nn.Conv2d, order: Tensor) -> nn.Conv2d:
    """The convolution for an input whose channel j is the original's channel order[j]."""
    return _conv_with(conv, conv.weight[:, order], conv.bias)


def _reorder_branch(branch: nn.Sequential, order: Tensor) -> nn.Sequential:
    """A block's branch for an input, and an output, in another order of channels."""
    first, *between, last = (layer for layer in branch if not isinstance(layer, nn.Dropout2d))
    last = _choose_outputs(_conv_of(last), order)
    return nn.Sequential(_reorder_inputs(_conv_of(first), order), *between, last)


class _Block(nn.Module):
    """An SS-nbt on two halves. left, right: (N, C/2, H, W) each -> the same"""

    def __init__(self, block: SSnbt, left_order: Tensor, right_order: Tensor):
        super().__init__()
        self.left = _reorder_branch(block.left, left_order)
        self.right = _reorder_branch(block.right, right_order)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.left(left) + left), torch.relu(self.right(right) + right)


class _ShuffleSplit(nn.Module):
    """What the shuffle makes of two halves, split again.

    order: (C,) for each channel of the joined halves its place behind the shuffle.
    """

    to_left: nn.Conv2d
    to_right: nn.Conv2d

    def __init__(self, order: Tensor):
        super().__init__()
        channels = len(order)
        choice = torch.zeros(channels, channels)
        choice[order, torch.arange(channels)] = 1
        for name, rows in zip(("to_left", "to_right"), choice.chunk(2), strict=True):
            conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
            conv.weight.data.copy_(rows[:, :, None, None])
            setattr(self, name, conv)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat((left, right), dim=1)
        return self.to_left(x), self.to_right(x)


class _Down(nn.Module):
    """A folded downsampler that answers in two halves.

    The left half is convolution alone; of the right one, the pooled channels come last.

    order: (in_channels,) of the input's channels, as in `_reorder_inputs`.

    x: (N, in_channels, H, W) -> two of (N, out_channels / 2, ceil(H/2), ceil(W/2))
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, block: FusedDownsampler, order: Tensor):
        super().__init__()
        conv = _reorder_inputs(block.conv, order)
        half = (conv.out_channels + conv.in_channels) // 2
        self.left = _choose_outputs(conv, slice(half))
        rest = conv.out_channels - half
        self.right = _choose_outputs(conv, slice(half, None)) if rest else None
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

    Attributes:
        order: (out,) the channel of the original that stands at each place of the answer.
    """

    def __init__(self, down: FusedDownsampler, blocks: list[SSnbt], order: Tensor):
        super().__init__()
        self.down = _Down(down, order)
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
            steps.append(_Block(block, left, right))
        self.steps = nn.ModuleList(steps)
        shuffled, plain = (2 * left, 2 * right + 1), (left, half + right)
        self.order = torch.cat(shuffled if blocks else plain)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.down(x)
        for step in self.steps:
            halves = step(*halves)
        return torch.cat(halves, dim=1)


def fuse_channel_shuffles(folded: LEDNet) -> nn.Sequential:
    """Encoder and decoder of a folded network, without a shuffle or a split.

    Args:
        folded: from `fuse_conv_bn`; its decoder's weights are reordered in place.

    Returns:
        x: (N, 3, H, W) -> (N, num_classes, ceil(H/8), ceil(W/8)), as the decoder answers.
    """
    parts: list[tuple[FusedDownsampler, list[SSnbt]]] = []
    for layer in folded.encoder:
        if isinstance(layer, FusedDownsampler):
            parts.append((layer, []))
        elif isinstance(layer, SSnbt):
            parts[-1][1].append(layer)
    stages: list[_Stage] = []
    order = torch.arange(3)
    for down, blocks in parts:
        stages.append(_Stage(down, blocks, order))
        order = stages[-1].order
    decoder = folded.decoder
    for entry in (decoder.mid, decoder.pooled, decoder.down1):
        entry[0] = _reorder_inputs(_conv_of(entry[0]), order)
    return nn.Sequential(*stages, decoder).eval().requires_grad_(False)
