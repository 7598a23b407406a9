"""Draw the network for docs/architecture.md, and write its tables of modules.

    python docs/draw_architecture.py

Kernels, channels, dilations, sizes and parameters are read from the modules and a forward pass of
a 512x1024 image; only the positions in the figure are set here.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor, nn

from lednet import LEDNet
from lednet.io import write_atomically, write_between_marks
from lednet.model import VARIANTS, Downsampler, SSnbt, count_parameters

DOCS = Path(__file__).resolve().parent

SIZE = (512, 1024)
INK, PAPER = "#1f2933", "white"
DOWN, BLOCK, CONV, JOIN = "#f2b179", "#9cc5e8", "#cfe3d4", "#f3f3f3"


class Stage(NamedTuple):
    """A module and the size of its output."""

    name: str
    module: nn.Module
    shape: tuple[int, int, int]
    """(channels, height, width) of its output."""


def trace(net: LEDNet, size: tuple[int, int] = SIZE) -> dict[str, Stage]:
    """All modules of `net` by name, with their outputs' sizes for an image of `size`."""
    stages: dict[str, Stage] = {}

    def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, _: object, out: Tensor) -> None:
            channels, height, width = out.shape[1:]
            stages[name] = Stage(name, module, (channels, height, width))

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in net.named_modules()]
    with torch.inference_mode():
        net.eval()(torch.zeros(1, 3, *size))
    for handle in handles:
        handle.remove()
    return stages


def kernel_of(conv: nn.Conv2d) -> str:
    return "×".join(map(str, conv.kernel_size))


def describe(module: nn.Module) -> str:
    """Description of a module in the tables."""
    if isinstance(module, Downsampler):
        conv = module.conv
        return (
            f"downsampler: {kernel_of(conv)} stride {conv.stride[0]} to {conv.out_channels}, "
            f"and 2×2 max-pool of {conv.in_channels}"
        )
    if isinstance(module, SSnbt):
        dropout = next(layer.p for layer in module.left if isinstance(layer, nn.Dropout2d))
        return f"SS-nbt, dilation {dilation_of(module)}, dropout {dropout:g}"
    conv = conv_of(module)
    stride = f" stride {conv.stride[0]}" if conv.stride[0] > 1 else ""
    return f"{kernel_of(conv)}{stride}, {conv.in_channels} to {conv.out_channels}, BN, ReLU"


def conv_of(module: nn.Module) -> nn.Conv2d:
    return next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))


def dilation_of(block: nn.Module) -> int:
    return max(r for m in block.modules() if isinstance(m, nn.Conv2d) for r in m.dilation)


def row(stage: Stage) -> str:
    shape = " × ".join(map(str, stage.shape))
    parameters = count_parameters(stage.module)
    return f"| `{stage.name}` | {describe(stage.module)} | {shape} | {parameters:,} |"


def table(title: str, rows: list[str], module: nn.Module) -> str:
    """A Markdown table of modules with a total."""
    header = f"| {title} | | output at {SIZE[0]}x{SIZE[1]} | parameters |\n|---|---|---|---|"
    return "\n".join((header, *rows, f"| total | | | **{count_parameters(module):,}** |"))


def tables() -> str:
    """Tables of the encoder and of each variant's decoder."""
    parts: list[str] = []
    for variant in VARIANTS:
        stages = trace(LEDNet(variant=variant))
        for part in ("encoder", "decoder"):
            module = stages[part].module
            if part == "encoder" and parts:
                continue  # the same in all variants
            title = "encoder" if part == "encoder" else f"decoder of `{variant}`"
            rows = [row(stages[f"{part}.{name}"]) for name, _ in module.named_children()]
            parts.append(table(title, rows, module))
    return "\n\n".join(parts)


def box(
    ax: Axes, x: float, y: float, text: str, color: str, width: float = 1.5, height: float = 0.62
) -> None:
    """A rounded box around (x, y)."""
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02",
            facecolor=color, edgecolor=INK, linewidth=0.8, zorder=2,
        )
    )  # fmt: skip
    ax.text(x, y, text, ha="center", va="center", fontsize=7.5, color=INK, zorder=3)


def sign(ax: Axes, x: float, y: float, text: str) -> None:
    """A circle with the sign of an operation of two inputs."""
    ax.text(
        x, y, text, ha="center", va="center", fontsize=10, color=INK, zorder=3,
        bbox={"boxstyle": "circle,pad=0.18", "facecolor": JOIN, "edgecolor": INK, "linewidth": 0.8},
    )  # fmt: skip


def arrow(ax: Axes, *points: tuple[float, float], text: str = "") -> None:
    """An arrow along `points`, with `text` at its last segment."""
    for start, end in itertools.pairwise(points[:-1]):
        ax.plot(*zip(start, end, strict=True), color=INK, linewidth=0.9, zorder=1)
    ax.annotate(
        "", points[-1], points[-2],
        arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 0.9, "shrinkA": 0, "shrinkB": 0},
        zorder=1,
    )  # fmt: skip
    if text:
        (x0, y0), (x1, y1) = points[-2:]
        ax.text((x0 + x1) / 2 + 0.06, (y0 + y1) / 2, text, fontsize=7, color=INK, va="center")


def draw_encoder(ax: Axes, stages: dict[str, Stage]) -> None:
    """The modules of the encoder, with heights of the outputs and widths of the channels."""
    x, group_start, last = 0.0, 0.0, None
    ax.text(0, 1.16, f"Encoder of {SIZE[0]}x{SIZE[1]} px", fontsize=10, weight="bold", color=INK)

    def close_group(shape: tuple[int, int, int], start: float, end: float) -> None:
        ax.text((start + end) / 2, -0.06, " × ".join(map(str, shape)), ha="center", va="top",
                fontsize=8, color=INK)  # fmt: skip

    for name, _ in stages["encoder"].module.named_children():
        stage = stages[f"encoder.{name}"]
        channels, height, _ = stage.shape
        if last is not None and stage.shape != last:
            close_group(last, group_start, x - 0.05)
            x += 0.25
            group_start = x
        last = stage.shape
        down = isinstance(stage.module, Downsampler)
        tall, wide = (height / 256) ** 0.6, 0.28 + channels / 400
        ax.add_patch(Rectangle((x, 0), wide, tall, facecolor=DOWN if down else BLOCK,
                               edgecolor=INK, linewidth=0.8))  # fmt: skip
        label = "Down" if down else f"SS-nbt  r = {dilation_of(stage.module)}"
        ax.text(x + wide / 2, tall / 2, label, rotation=90, ha="center", va="center",
                fontsize=6.5, color=INK)  # fmt: skip
        x += wide + 0.05
    close_group(stage.shape, group_start, x - 0.05)
    ax.set(xlim=(-0.2, x + 0.2), ylim=(-0.2, 1.25))
    ax.axis("off")


def draw_block(ax: Axes, block: SSnbt) -> None:
    """The two branches of a split-shuffle block, layer by layer."""
    ax.text(0, 6.3, "SS-nbt block", ha="center", fontsize=10, weight="bold", color=INK)
    box(ax, 0, 5.5, "split in halves", JOIN, width=1.9, height=0.46)
    for x, branch in ((-1.2, block.left), (1.2, block.right)):
        lines = []
        for layer in branch:
            if isinstance(layer, nn.Conv2d):
                rate = "" if max(layer.dilation) == 1 else ", dilation r"
                lines.append(f"{kernel_of(layer)}{rate}")
            elif isinstance(layer, nn.BatchNorm2d):
                lines[-1] += ", BN"
            elif isinstance(layer, nn.ReLU):
                lines[-1] += ", ReLU"
            else:
                lines.append("dropout")
        top = 4.7
        arrow(ax, (0.95 if x > 0 else -0.95, 5.5), (x, 5.5), (x, top + 0.25))
        for k, line in enumerate(lines):
            box(ax, x, top - 0.72 * k, line, CONV, width=2.15, height=0.46)
            if k:
                arrow(ax, (x, top - 0.72 * (k - 1) - 0.23), (x, top - 0.72 * k + 0.23))
        end = top - 0.72 * (len(lines) - 1)
        arrow(ax, (x, end - 0.25), (x, 0.9), (0.77 if x > 0 else -0.77, 0.9))
    box(ax, 0, 0.9, "concatenate", JOIN, width=1.5, height=0.46)
    arrow(ax, (0, 6.1), (0, 5.75))
    arrow(ax, (0, 0.65), (0, 0.28))
    sign(ax, 0, 0.05, "+")
    arrow(ax, (0, 5.98), (-2.6, 5.98), (-2.6, 0.05), (-0.25, 0.05))
    arrow(ax, (0, -0.18), (0, -0.5))
    box(ax, 0, -0.75, "ReLU, channel shuffle", JOIN, width=2.4, height=0.46)
    ax.set(xlim=(-2.8, 2.5), ylim=(-1.1, 6.6))
    ax.axis("off")


def draw_decoder(ax: Axes, stages: dict[str, Stage], variant: str) -> None:
    """The attention pyramid network: each box is a convolution with BN and ReLU."""
    decoder = stages["decoder"].module

    def conv(name: str, x: float, y: float) -> None:
        layer = conv_of(stages[f"decoder.{name}"].module)
        stride = f" s{layer.stride[0]}" if layer.stride[0] > 1 else ""
        text = f"{kernel_of(layer)}{stride}\n{layer.in_channels} → {layer.out_channels}"
        box(ax, x, y, text, CONV)

    def size(name: str, x: float, y: float) -> None:
        _, height, width = stages[name].shape
        ax.text(x, y, f"{height}×{width}", fontsize=6.5, color="#616e7c", ha="right", va="center")

    title = f"APN decoder, variant {variant}: {count_parameters(decoder):,} parameters"
    ax.text(-0.9, 6.55, title, fontsize=10, weight="bold", color=INK)
    left = 1.6
    box(ax, 0, 4.6, f"features\n{stages['encoder'].shape[0]} × 1/8", BLOCK, width=1.1)
    # The global-pooling branch above, the 1x1 in the middle, the pyramid below.
    box(ax, left, 5.8, "global\naverage", JOIN)
    conv("pooled", 3.6, 5.8)
    conv("mid", left, 4.6)
    for name, lateral, y in (("down1", "lateral1", 3.0), ("down2", "lateral2", 1.8)):
        conv(name, left, y)
        conv(lateral, 3.6, y)
        size(f"decoder.{name}", left - 0.85, y)
        arrow(ax, (left + 0.77, y), (2.83, y))
        arrow(ax, (4.37, y), (5.33, y))
        sign(ax, 5.6, y, "+")
    conv("down3", left, 0.6)
    conv("last", 3.6, 0.6)
    size("decoder.down3", left - 0.85, 0.6)
    arrow(ax, (left + 0.77, 0.6), (2.83, 0.6))
    arrow(ax, (0, 4.93), (0, 5.8), (left - 0.77, 5.8))
    arrow(ax, (0.57, 4.6), (left - 0.77, 4.6))
    arrow(ax, (0, 4.27), (0, 3.65), (left, 3.65), (left, 3.33))
    arrow(ax, (left, 2.67), (left, 2.13))
    arrow(ax, (left, 1.47), (left, 0.93))
    arrow(ax, (4.37, 0.6), (5.6, 0.6), (5.6, 1.55), text="×2")
    arrow(ax, (5.6, 2.05), (5.6, 2.75), text="×2")
    arrow(ax, (5.6, 3.25), (5.6, 4.35), text="×2")
    sign(ax, 5.6, 4.6, "×")
    arrow(ax, (left + 0.77, 4.6), (5.33, 4.6))
    arrow(ax, (left + 0.77, 5.8), (2.83, 5.8))
    arrow(ax, (4.37, 5.8), (5.33, 5.8))
    sign(ax, 5.6, 5.8, "+")
    arrow(ax, (5.6, 4.87), (5.6, 5.53))
    channels, height, width = stages[""].shape
    arrow(ax, (5.87, 5.8), (6.4, 5.8))
    box(ax, 7.3, 5.8, f"×8, logits\n{channels} × {height} × {width}", BLOCK, width=1.75)
    ax.text(4.6, 0.12, "×2, ×8: bilinear upsampling", fontsize=7, color="#616e7c")
    ax.set(xlim=(-1.0, 8.3), ylim=(-0.1, 6.9))
    ax.axis("off")


def draw(path: Path) -> None:
    """Draw the encoder, its block and both decoders into one figure."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 9.2), facecolor=PAPER)
    grid = figure.add_gridspec(2, 12, height_ratios=(1, 1.1), hspace=0.08, wspace=0.3)
    for i, variant in enumerate(VARIANTS):
        net = LEDNet(variant=variant)
        stages = trace(net)
        if i == 0:  # the same in all variants
            draw_encoder(figure.add_subplot(grid[0, :8]), stages)
            last = [layer for layer in net.encoder if isinstance(layer, SSnbt)][-1]
            draw_block(figure.add_subplot(grid[0, 8:]), last)
        draw_decoder(figure.add_subplot(grid[1, 6 * i : 6 * i + 6]), stages, variant)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    write_between_marks(DOCS / "architecture.md", "docs/draw_architecture.py", tables())
    draw(DOCS / "architecture.png")
    print(f"wrote {DOCS / 'architecture.md'} and architecture.png")


if __name__ == "__main__":
    main()
