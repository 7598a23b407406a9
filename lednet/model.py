"""LEDNet: a lightweight encoder-decoder network for real-time semantic segmentation.

Source: Wang et al., "LEDNet" (arXiv 1905.02423, section 2) and the letter "An
open-source project for real-time image semantic segmentation" (SCIS 2019,
62(12):227101); where the two leave something open, the released network decides.

    image -> Encoder (1/8 size, 128 channels) -> AttentionPyramid -> x8 bilinear -> logits
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lednet.checkpoint import save_pretrained
from lednet.hub import HUB_PREFIX, load_network

NORM_EPS = 1e-3
FEATURE_CHANNELS = 128


class Down(NamedTuple):
    """Row of `ENCODER_STAGES`: halve the size, reach `channels`."""

    channels: int


class Block(NamedTuple):
    """Row of `ENCODER_STAGES`: one split-shuffle block."""

    dropout: float
    dilation: int


ENCODER_STAGES: tuple[Down | Block, ...] = (
    Down(32),
    *[Block(dropout=0.03, dilation=1)] * 3,
    Down(64),
    *[Block(dropout=0.03, dilation=1)] * 2,
    Down(FEATURE_CHANNELS),
    *[Block(dropout=0.3, dilation=dilation) for dilation in (1, 2, 5, 9, 2, 5, 9, 17)],
)

VARIANTS = ("d20", "d128")


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave `groups` equal runs of channels: (a0 a1 .. b0 b1 ..) -> (a0 b0 a1 b1 ..).

    The memory format of `x` is kept: a plain reshape would return a channels_last tensor in the
    contiguous format, which slows down every following convolution.

    x: (N, C, H, W) -> (N, C, H, W), C a multiple of `groups`
    """
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        x = x.permute(0, 2, 3, 1)  # (N, H, W, C), contiguous
        x = x.unflatten(3, (groups, -1)).transpose(3, 4).flatten(3)
        return x.permute(0, 3, 1, 2)
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation with aligned corners, as in the released network.

    x: (N, C, h, w) -> (N, C, *size)
    """
    if x.shape[-2] == 1 and x.shape[-1] == 1:
        # Interpolation gives the same values, but torch.compile cannot differentiate it.
        return x.expand(-1, -1, *size)
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with the network's eps that accepts one value per channel in training.

    After the global pooling a batch of one image has a single value per channel and no variance:
    the running statistics normalise it, and are not updated.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


class ConvNormReLU(nn.Sequential):
    """Convolution, batch norm, ReLU; stride 1 keeps the size.

    x: (N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride))
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2),
            BatchNorm(out_channels),
            nn.ReLU(inplace=True),
        )


class Downsampler(nn.Module):
    """3x3 stride-2 convolution and 2x2 max-pool, concatenated (paper section 2.1).

    The pool rounds odd sizes up, as the convolution does.

    x: (N, in_channels, H, W) -> (N, out_channels, ceil(H/2), ceil(W/2))
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels - in_channels, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.norm = BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.conv(x), self.pool(x)), dim=1)
        return torch.relu_(self.norm(x))


def _factorized_branch(
    channels: int, first: tuple[int, int], dropout: float, dilation: int
) -> nn.Sequential:
    """Two pairs of one-dimensional convolutions, the second pair dilated.

    `first` is the first kernel of each pair, (3, 1) or (1, 3).
    """

    def conv(kernel: tuple[int, int], rate: int) -> nn.Conv2d:
        # "Same" padding along the kernel's long side.
        height, width = kernel
        padding = rate * (height // 2), rate * (width // 2)
        rates = rate if height > 1 else 1, rate if width > 1 else 1
        return nn.Conv2d(channels, channels, kernel, padding=padding, dilation=rates)

    second = first[::-1]
    layers: list[nn.Module] = [
        conv(first, 1),
        nn.ReLU(inplace=True),
        conv(second, 1),
        BatchNorm(channels),
        nn.ReLU(inplace=True),
        conv(first, dilation),
        nn.ReLU(inplace=True),
        conv(second, dilation),
        BatchNorm(channels),
    ]
    if dropout > 0:
        layers.append(nn.Dropout2d(dropout))
    return nn.Sequential(*layers)


class SSnbt(nn.Module):
    """Split-shuffle non-bottleneck block (paper section 2.1, figure 2).

    Each half of the channels runs its own pairs of factorised convolutions; the
    halves are joined, added to the input and shuffled.

    x: (N, C, H, W) -> (N, C, H, W), C even
    """

    def __init__(self, channels: int, dropout: float, dilation: int):
        super().__init__()
        self.left = _factorized_branch(channels // 2, (3, 1), dropout, dilation)
        self.right = _factorized_branch(channels // 2, (1, 3), dropout, dilation)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)  # (N, C/2, H, W) each
        out = torch.cat((self.left(left), self.right(right)), dim=1)
        return channel_shuffle(torch.relu_(out + x), groups=2)


class Encoder(nn.Sequential):
    """Downsamplers and split-shuffle blocks in the order of `ENCODER_STAGES`.

    x: (N, 3, H, W) -> (N, 128, ceil(H/8), ceil(W/8))
    """

    def __init__(self) -> None:
        channels = 3
        layers: list[nn.Module] = []
        for stage in ENCODER_STAGES:
            if isinstance(stage, Down):
                layers.append(Downsampler(channels, stage.channels))
                channels = stage.channels
            else:
                layers.append(SSnbt(channels, stage.dropout, stage.dilation))
        super().__init__(*layers)


class AttentionPyramid(nn.Module):
    """Attention pyramid network (APN), the decoder (paper section 2.2, figure 3).

    A feature pyramid gives an attention map that multiplies the 1x1 `mid` branch;
    the global-pooling branch is added. Every convolution ends in a ReLU, so the
    logits are >= 0.

    The two released networks differ in the pyramid. The light one has a single channel, and its
    lateral convolutions have the kernel sizes of their level; in the heavy one, 1x1 convolutions
    map each level from `pyramid_channels` to the classes.

    x: (N, 128, h, w) -> (N, num_classes, h, w)
    """

    def __init__(self, num_classes: int, pyramid_channels: int, light: bool):
        super().__init__()
        inner = pyramid_channels
        outer = inner if light else num_classes
        lateral_kernels, last_kernel = ((7, 5), 3) if light else ((1, 1), 1)
        self.mid = ConvNormReLU(FEATURE_CHANNELS, num_classes, 1)
        self.pooled = ConvNormReLU(FEATURE_CHANNELS, num_classes, 1)
        self.down1 = ConvNormReLU(FEATURE_CHANNELS, inner, 7, stride=2)
        self.down2 = ConvNormReLU(inner, inner, 5, stride=2)
        self.down3 = ConvNormReLU(inner, inner, 3, stride=2)
        self.last = ConvNormReLU(inner, outer, last_kernel)
        self.lateral1 = ConvNormReLU(inner, outer, lateral_kernels[0])
        self.lateral2 = ConvNormReLU(inner, outer, lateral_kernels[1])

    def forward(self, x: Tensor) -> Tensor:
        level1 = self.down1(x)  # (N, inner, h/2, w/2)
        level2 = self.down2(level1)  # (N, inner, h/4, w/4)
        level3 = self.down3(level2)  # (N, inner, h/8, w/8)

        attention = resize(self.last(level3), level2.shape[-2:])  # (N, outer, h/4, w/4)
        attention = attention + self.lateral2(level2)
        attention = resize(attention, level1.shape[-2:])  # (N, outer, h/2, w/2)
        attention = attention + self.lateral1(level1)
        attention = resize(attention, x.shape[-2:])  # (N, outer, h, w)

        pooled = self.pooled(x.mean(dim=(2, 3), keepdim=True))  # (N, num_classes, 1, 1)
        return attention * self.mid(x) + pooled


class EncoderStage(nn.Module):
    """Network of the first training stage: an encoder and a 1x1 head on its features.

    x: (N, 3, H, W) -> logits (N, num_classes, ceil(H/8), ceil(W/8))
    """

    def __init__(self, encoder: Encoder, head: nn.Conv2d):
        super().__init__()
        self.encoder = encoder
        self.encoder_head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder_head(self.encoder(x))


class LEDNet(nn.Module):
    """LEDNet as released, in its lighter ("d20") and heavier ("d128") variant.

    Parameters at 20 classes: d20 925,663; d128 2,288,140.

    Args:
        num_classes: output channels; for Cityscapes 20, the 19 classes and void.
        variant: "d20" or "d128".
        pyramid_channels: width of the pyramid of variant "d128" (default: 128).

    x: (N, 3, H, W), normalised as in training -> logits (N, num_classes, H, W), any H and W
    """

    def __init__(
        self, num_classes: int = 20, variant: str = "d20", pyramid_channels: int | None = None
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, not {variant!r}")
        light = variant == "d20"
        if light and pyramid_channels is not None:
            raise ValueError("pyramid_channels goes with variant 'd128'; 'd20' has one channel")
        if num_classes < 1 or (pyramid_channels is not None and pyramid_channels < 1):
            raise ValueError("num_classes and pyramid_channels must be positive")
        self.num_classes = num_classes
        self.variant = variant
        self.pyramid_channels = 1 if light else pyramid_channels or 128
        self.encoder = Encoder()
        self.encoder_head = nn.Conv2d(FEATURE_CHANNELS, num_classes, 1)
        self.decoder = AttentionPyramid(num_classes, self.pyramid_channels, light)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.decoder(self.encoder(x))  # (N, num_classes, H/8, W/8)
        return resize(logits, x.shape[-2:])

    def disable_last_class(self) -> None:
        """Make the last logit of the decoder 0, which is the minimum, before and during training.

        Of equal logits the first class is predicted, so the last class is not. The zeros have no
        gradient, because they precede a ReLU.
        """
        with torch.no_grad():
            for branch in (self.decoder.mid, self.decoder.pooled):
                for parameter in branch[1].parameters():
                    parameter[-1] = 0

    def encoder_stage(self) -> EncoderStage:
        """The encoder with its 1x1 head, sharing this network's parameters."""
        return EncoderStage(self.encoder, self.encoder_head)

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """A network with random weights and the sizes of a state dict.

        Raises:
            KeyError, IndexError, ValueError: the state dict is of another kind of network.
        """
        num_classes = state["decoder.mid.0.weight"].shape[0]
        if state["decoder.lateral1.0.weight"].shape[-1] > 1:
            return cls(num_classes, "d20")
        return cls(num_classes, "d128", state["decoder.down1.0.weight"].shape[0])

    @classmethod
    def load(cls, path: str | os.PathLike) -> tuple[Self, dict[str, Any]]:
        """The network that the weights at `path` belong to, and their "meta".

        Args:
            path: weights file, run folder, folder of released weights, or name of such.

        Raises:
            UserError: the weights cannot be read safely, or are of another kind of network.
        """
        return load_network(path, cls.from_state)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike) -> Self:
        """The network with its weights, in evaluation mode.

        Args:
            name: of released weights ("camvid-d20"), or a path as for `load`; if there is none,
                "owner/name" of a repository of the Hugging Face Hub, which is downloaded.

        Raises:
            UserError: there are no such weights, their checksum differs, or they are of another
                kind of network.
        """
        name = os.fspath(name)
        on_hub = name.count("/") == 1 and not name.startswith((".", HUB_PREFIX))
        if on_hub and not os.path.exists(name):
            name = HUB_PREFIX + name
        return cls.load(name)[0]

    def save_pretrained(
        self, folder: str | os.PathLike, meta: Mapping[str, Any] | None = None
    ) -> None:
        """Write config.json and model.safetensors to `folder`, for `from_pretrained`.

        Args:
            meta: metadata of the weights, from `load`.
        """
        save_pretrained(folder, self, dict(meta or {}))

    def push_to_hub(
        self, repo_id: str, meta: Mapping[str, Any] | None = None, private: bool = False
    ) -> None:
        """Upload the network to the repository owner/name of the Hugging Face Hub (untested).

        Needs huggingface_hub and its login. The repository is created if there is none.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, meta)
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, variant={self.variant!r}, "
            f"pyramid_channels={self.pyramid_channels}"
        )


class EncoderClassifier(nn.Module):
    """Image classifier for pretraining on ImageNet: the encoder, global pooling, a linear layer.

    The release averages 14x14 cells, the whole feature map at 224x224 px; averaging the whole map
    is the same there and works at any size. 1,040,436 parameters at 1,000 classes.

    x: (N, 3, H, W) -> logits (N, num_classes)
    """

    def __init__(self, num_classes: int):
        super().__init__()
        if num_classes < 1:
            raise ValueError("num_classes must be positive")
        self.num_classes = num_classes
        self.encoder = Encoder()
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.classifier = nn.Linear(FEATURE_CHANNELS, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.encoder(x))  # (N, 128, H/16, W/16)
        return self.classifier(x.mean(dim=(2, 3)))

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}"


def load_model(path: str | os.PathLike) -> tuple[LEDNet, dict[str, Any]]:
    """Short for `LEDNet.load(path)`: the network and its "meta"."""
    return LEDNet.load(path)


def count_parameters(module: nn.Module) -> int:
    """Number of trainable values in `module`."""
    return sum(p.numel() for p in module.parameters())


def upsample_scores(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation of scores to `size`, as evaluation does it.

    scores: (N, C, h, w) -> (N, C, *size)
    """
    if scores.shape[-2:] == torch.Size(size):
        return scores
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


def argmax_at(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Class of every pixel at `size`: upsampling of the logits, then argmax.

    logits: (N, C, h, w) -> (N, *size) int64
    """
    return upsample_scores(logits, size).argmax(dim=1)
