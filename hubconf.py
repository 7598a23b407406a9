"""torch.hub: `torch.hub.load(<this repository>, "lednet", pretrained="camvid-d20")`."""

from lednet.model import LEDNet

dependencies = ["numpy", "safetensors", "torch", "tqdm"]


def lednet(
    num_classes: int = 20,
    variant: str = "d20",
    pyramid_channels: int | None = None,
    pretrained: str | None = None,
) -> LEDNet:
    """LEDNet with random or, if `pretrained` is given, released weights.

    Args:
        num_classes, variant, pyramid_channels: as for `LEDNet`; ignored with `pretrained`.
        pretrained: name or path as for `LEDNet.from_pretrained`.
    """
    if pretrained is not None:
        return LEDNet.from_pretrained(pretrained)
    return LEDNet(num_classes, variant, pyramid_channels)
