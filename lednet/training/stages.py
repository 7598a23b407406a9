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
    matches = [re.fullmatch(r"(\w+):0*([1-9]\d*)", word.strip()) for word in text.split(",")]
    parts = [(match[1], int(match[2])) for match in matches if match and match[1] in TRAINING_PARTS]
    if len(parts) < len(matches):
        raise UserError(
            f"--curriculum {text!r}: write annotations ({', '.join(TRAINING_PARTS)}) and "
            "epochs, as in coarse:100,fine:200"
        )
    return parts


def parse_sizes(text: str) -> list[tuple[tuple[int, int], int]]:
    """Parse sizes and epochs such as "128x256:50,256x512:50".

    Returns:
        (height, width) and epochs of each part; an empty list for an empty text.

    Raises:
        UserError: the text has another form.
    """
    words = [word.strip() for word in text.split(",")] if text else []
    number = r"0*([1-9]\d*)"
    matches = [re.fullmatch(f"{number}x{number}:{number}", word) for word in words]
    values = [tuple(map(int, match.groups())) for match in matches if match]
    if len(values) < len(words):
        raise UserError(
            f"--progressive {text!r}: write height, width and epochs, as in 128x256:50,256x512:50"
        )
    return [((height, width), epochs) for height, width, epochs in values]


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
    stages, annotations = [], parts[0][0]
    if encoder_epochs is not None:
        stages.append(
            Stage("encoder", "Stage 1: encoder", encoder_epochs, "encoder_best.pth",
                  part="encoder", annotations=annotations)
        )  # fmt: skip
    for (height, width), epochs in smaller:
        name = f"{height}x{width}-{len(stages) + 1}"
        stages.append(
            Stage(name, f"Full network at {height}x{width}", epochs, f"{name}_best.pth",
                  annotations=annotations, size=(height, width))
        )  # fmt: skip
    for number, (annotations, epochs) in enumerate(parts, 1):
        name, title = f"{annotations}-{number}", f"Full network, {number}: {annotations}"
        if len(parts) == 1:
            name, title = "decoder", "Stage 2: full network"
        best_file = BEST_WEIGHTS if number == len(parts) else f"{name}_best.pth"
        stages.append(Stage(name, title, epochs, best_file, annotations=annotations))
    return stages
