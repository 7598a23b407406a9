"""Training stages of a run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lednet.data.registry import TRAINING_PARTS
from lednet.errors import UserError
from lednet.hub import BEST_WEIGHTS


@dataclass(frozen=True)
class Stage:
    """A training stage.

    Attributes:
        name: unique name in logs and checkpoints.
        title: name in plots and messages.
        epochs: number of epochs.
        best_file: name of the file of its best weights in the run folder.
        encoder_file: name of a file of the encoder's weights only; empty for none.
        part: "encoder" (with its 1x1 head) or "decoder" (the full network) in segmentation.
        annotations: annotations of its training data, a key of `TRAINING_PARTS`.
        size: (height, width) in pixels that images are resized to; None keeps their size.
    """

    name: str
    title: str
    epochs: int
    best_file: str = BEST_WEIGHTS
    encoder_file: str = ""
    part: str = "decoder"
    annotations: str = "fine"
    size: tuple[int, int] | None = None


def parse_curriculum(text: str) -> list[tuple[str, int]]:
    """Parse a curriculum such as "coarse:100,fine:200".

    Returns:
        Annotations and epochs of each part.

    Raises:
        UserError: the text has another form.
    """
    parts = []
    for word in text.split(","):
        annotations, _, epochs = word.strip().partition(":")
        if annotations not in TRAINING_PARTS or not epochs.isdecimal() or int(epochs) < 1:
            raise UserError(
                f"--curriculum {text!r}: write annotations ({', '.join(TRAINING_PARTS)}) and "
                "epochs, as in coarse:100,fine:200"
            )
        parts.append((annotations, int(epochs)))
    return parts


def parse_sizes(text: str) -> list[tuple[tuple[int, int], int]]:
    """Parse sizes and epochs such as "128x256:50,256x512:50".

    Returns:
        (height, width) and epochs of each part; an empty list for an empty text.

    Raises:
        UserError: the text has another form.
    """
    if not text:
        return []
    parts = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+):(\d+)", word.strip())
        height, width, epochs = map(int, match.groups()) if match else (0, 0, 0)
        if not (height and width and epochs):
            raise UserError(
                f"--progressive {text!r}: write height, width and epochs, as in "
                "128x256:50,256x512:50"
            )
        parts.append(((height, width), epochs))
    return parts


def plan_stages(
    parts: Sequence[tuple[str, int]],
    encoder_epochs: int | None = None,
    smaller: Sequence[tuple[tuple[int, int], int]] = (),
) -> list[Stage]:
    """Plan the stages of a run.

    First the encoder is trained, then the full network at smaller sizes, both on the data of the
    first part, then the full network on each part.

    Args:
        parts: annotations and epochs, see `parse_curriculum`; a single part without a curriculum.
        encoder_epochs: epochs of the encoder stage; None for no such stage.
        smaller: sizes and epochs, see `parse_sizes`.

    Returns:
        The stages. The best weights of the last one are those of the run.
    """
    stages = []
    if encoder_epochs is not None:
        stages.append(
            Stage(
                "encoder",
                "Stage 1: encoder",
                encoder_epochs,
                "encoder_best.pth",
                part="encoder",
                annotations=parts[0][0],
            )
        )
    for (height, width), epochs in smaller:
        size = f"{height}x{width}"
        stages.append(
            Stage(
                f"{size}-{len(stages) + 1}",
                f"Full network at {size}",
                epochs,
                f"{size}-{len(stages) + 1}_best.pth",
                annotations=parts[0][0],
                size=(height, width),
            )
        )
    if len(parts) == 1:
        annotations, epochs = parts[0]
        full = Stage("decoder", "Stage 2: full network", epochs, annotations=annotations)
        return [*stages, full]
    for number, (annotations, epochs) in enumerate(parts, 1):
        last = number == len(parts)
        stages.append(
            Stage(
                name=f"{annotations}-{number}",
                title=f"Full network, {number}: {annotations}",
                epochs=epochs,
                best_file=BEST_WEIGHTS if last else f"{annotations}-{number}_best.pth",
                annotations=annotations,
            )
        )
    return stages
