"""The stages of a run, one after the other in the same network."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lednet.data.registry import TRAINING_PARTS
from lednet.errors import UserError
from lednet.hub import BEST_WEIGHTS


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        name: in logs and checkpoints; of one run, no two have the same.
        title: in pictures.
        epochs: how many.
        best_file: file of its best weights, in the run's folder.
        encoder_file: file of the encoder alone out of them; none if empty.
        part: "encoder" (with its 1x1 head) or "decoder" (the full network) in segmentation.
        annotations: of its training data, a key of `TRAINING_PARTS`.
        size: (height, width) in pixels that it shrinks images to; None leaves them.
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
    """Annotations and epochs of each part of a curriculum such as "coarse:100,fine:200".

    Raises:
        UserError: it has another form.
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
    """(height, width) and epochs of each part of a text such as "128x256:50,256x512:50"; none
    of an empty one.

    Raises:
        UserError: it has another form.
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
    """The encoder on the first part's data, then the full network on it at smaller sizes, then
    on each part's.

    Args:
        parts: annotations and epochs, see `parse_curriculum`; one without a curriculum.
        encoder_epochs: of the first stage; None leaves it out.
        smaller: sizes and epochs, see `parse_sizes`.

    Returns:
        Stages; the last one's best weights are the run's.
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
