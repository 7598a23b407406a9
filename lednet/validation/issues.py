"""Types of data-set issues, their messages and severities.

error    training or scoring fails, or reads the data wrongly
warning  training and scoring run, but results are worse than they could be, or too optimistic
note     for information
"""

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lednet.data.pairs import list_examples
from lednet.files import IMAGE_SUFFIXES, LABEL_SUFFIXES

SEVERITIES = ("error", "warning", "note")


class IssueType(NamedTuple):
    """Severity and message of a type of issue: "<count> <noun> <what> (<files>): <next step>"."""

    severity: str
    noun: str
    what: str
    next_step: str


def _list(suffixes: Sequence[str]) -> str:
    return " ".join(suffix[1:] for suffix in suffixes)


_error, _warning, _note = (partial(IssueType, severity) for severity in SEVERITIES)

# fmt: off
ISSUE_TYPES = {
    "split": _error("", "", ""),
    "damaged": _error("file", "unreadable", "copy it again, or remove the pair"),
    "no-label": _error("image", "without a label", "add the label, or remove the image"),
    "no-image": _error("label", "without an image", "add the image, or remove the label"),
    "name": _error("image", "with a label of another name",
                   "give each label the name of its image, with the suffix .png"),
    "double": _error("file", "with the same name as another file", "keep one of them"),
    "image-mode": _error("image", "in an unsupported mode", "save it as 8-bit RGB"),
    "label-mode": _error("label", "that cannot be read as ids",
                         "save class ids, not colours, as 8-bit grey or palette PNG"),
    "size": _error("label", "with a size other than its image's",
                   "image and label must have the same size"),
    "id": _error("label", "with values that {scheme} does not define",
                 "correct the file, or declare the values (--labels, or the class file)"),
    "encoding": _error("label", "with values of {found}, read as {expected}",
                       "declare the encoding with --labels, and use one for the whole split"),
    "leak": _warning("", "",
                     "scores on {split} are too optimistic; hold out a whole recording instead "
                     "(--val-prefix), or state the overlap with the score"),
    "mixed-up": _warning("image", "aligned better with most of the other labels",
                         "check on the contact sheet whether the labels belong to other images"),
    "copy": _warning("image", "duplicated within the split", "keep one of them"),
    "turned": _warning("image", "turned by EXIF, whose labels have the size of both orientations",
                       "labels are taken to be upright; if one is not, remove the EXIF data"),
    "blank": _warning("image", "of a single colour", "check the image, or remove the pair"),
    "all-void": _warning("label", "with void only",
                         "it adds nothing to training or scores; annotate it, or remove the pair"),
    "void": _warning("", "",
                     "void adds nothing to training or scores; annotate more, or check which "
                     "values are ignored"),
    "absent": _warning("class", "without a pixel",
                       "they cannot be learned; add images of them, or remove the classes"),
    "not-taken": _warning("file", "ignored because of name or format",
                          f"images are {_list(IMAGE_SUFFIXES)}, labels {_list(LABEL_SUFFIXES)}; "
                          "convert, rename or remove it"),
    "unscored": _note("class", "without a pixel",
                      "where one is predicted, its IoU is 0 and lowers the mean; otherwise it has "
                      "no IoU"),
    "mode": _note("{noun}", "of mode {mode}", "{reading}"),
    "sizes": _note("", "", "all are resized to the working size, ignoring the aspect ratio"),
}
# fmt: on
"""Every type of issue by its name in reports. Types without a noun have their own messages."""


class Issue(NamedTuple):
    """An issue of a split.

    Attributes:
        kind: key of `ISSUE_TYPES`.
        severity: one of `SEVERITIES`.
        split: name of the split.
        sentence: what is wrong, naming the first of `files`.
        next_step: what to do.
        files: all of them, relative to the data set's folder, with remarks; or class names.
    """

    kind: str
    severity: str
    split: str
    sentence: str
    next_step: str
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.split}: {self.sentence}: {self.next_step}"


class IssueCollector(list[Issue]):
    """The issues of one split of the data set in `root`."""

    def __init__(self, root: Path, split: str):
        super().__init__()
        self.root, self.split = root, split

    def add(self, kind: str, files: Iterable[Path | tuple[Path, str]], **values: str) -> None:
        """Append an issue about files; nothing if there are none.

        Args:
            kind: key of `ISSUE_TYPES`.
            files: paths, or paths with a remark.
            values: placeholders in the type's message.
        """
        entries = [(file, "") if isinstance(file, Path) else file for file in files]
        if not entries:
            return
        named = [f"{relative_name(path, self.root)}: {remark}".removesuffix(": ")
                 for path, remark in entries]  # fmt: skip
        _, noun, what, next_step = (part.format(**values) for part in ISSUE_TYPES[kind])
        sentence = f"{counted(len(named), noun)} {what} ({list_examples(named)})"
        self.add_message(kind, sentence, next_step, named)

    def add_message(
        self, kind: str, sentence: str, next_step: str = "", files: Sequence[str] = ()
    ) -> None:
        """Append an issue with its own sentence; the next step defaults to the type's."""
        severity, *_, default = ISSUE_TYPES[kind]
        next_step = next_step or default.format(split=self.split)
        self.append(Issue(kind, severity, self.split, sentence, next_step, tuple(files)))


def relative_name(path: Path, root: Path) -> str:
    """Path relative to `root`; names with unprintable characters are escaped."""
    name = os.path.relpath(path, root)
    return name if name.isprintable() else ascii(name)


def counted(count: int, noun: str) -> str:
    """A count with its noun, such as "1 image" or "2 classes"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural if count != 1 else ''}"
