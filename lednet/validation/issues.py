"""What can be wrong with a data set, in plain words. Severities:

error    training or scoring stops there, or takes it for something else
warning  it runs, and what comes out is worse than it could be, or flatters
note     good to know
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lednet.data.pairs import list_examples

SEVERITIES = ("error", "warning", "note")


class IssueType(NamedTuple):
    severity: str
    noun: str
    what: str
    next_step: str


_error, _warning, _note = (partial(IssueType, severity) for severity in SEVERITIES)

# fmt: off
ISSUE_TYPES = {
    "split": _error("", "", ""),
    "damaged": _error("file", "unreadable", "copy it again, or remove the pair"),
    "no-label": _error("image", "without a label", "add the label, or remove the image"),
    "no-image": _error("label", "without an image", "add the image, or remove the label"),
    "name": _error("image", "with a label of another name",
                 "name each label as its image, with .png behind it"),
    "double": _error("file", "beside another of the same name", "keep one of each"),
    "image-mode": _error("image", "in a mode that cannot be read", "save it as 8-bit RGB"),
    "label-mode": _error("label", "not of 8-bit ids",
                       "save class ids, not colours, as 8-bit grey or palette PNG"),
    "size": _error("label", "of another size than the image", "both must have one size"),
    "id": _error("label", "with values that {scheme} does not have",
               "correct the file, or declare what it holds (--labels, or the class file)"),
    "encoding": _error("label", "with {inside} inside, taken for {taken}",
                     "declare it with --labels, and give all files of the split one kind"),
    "leak": _warning("image", "of what {other} shows too",
                 "a score on {split} flatters; hold out a whole recording instead (--val-names), "
                 "or say so beside the score"),
    "mixed-up": _warning("pair", "in which most other labels would fit the image better",
                     "see on the contact sheet whether the labels belong to other images"),
    "copy": _warning("image", "twice in the split", "keep one of each"),
    "turned": _warning("image", "turned by EXIF",
                   "pixels are taken as they are stored; see whether the label lies that way too"),
    "blank": _warning("image", "of one even colour", "look, and remove the pair"),
    "all-void": _warning("label", "void everywhere",
                     "nothing is learned or scored there; annotate it, or remove the pair"),
    "void": _warning("", "",
                 "nothing is learned or scored there; annotate more, or see what is ignored"),
    "absent": _warning("class", "without a pixel",
                   "none can be learned; add images of them, or take them out of the classes"),
    "not-taken": _warning("picture", "not taken, for name or format",
                      "images are png, jpg or webp, labels png; convert, rename or remove it"),
    "unscored": _note("class", "without a pixel", "no IoU will be given for these"),
    "mode": _note("{noun}", "of mode {mode}", "{reading}"),
    "sizes": _note("", "", "each is brought to the working size, whatever its proportions"),
}
# fmt: on
"""Everything that is looked for: how grave, what is counted, what of it, and the next step."""


class Issue(NamedTuple):
    """Something to know about a split.

    Attributes:
        kind: a key of `OUTPUTS`.
        sentence: what, with the first of `files`.
        files: all of them, relative to the data set's folder, with a remark; or classes.
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
    """Those of one split of the data set in `root`."""

    def __init__(self, root: Path, split: str):
        super().__init__()
        self.root, self.split = root, split

    def add(self, kind: str, files: Sequence[tuple[Path, str]], **words: str) -> None:
        """Nothing where `files`, each with a remark or "", are none; words fill the kind's text."""
        if not files:
            return
        names = [relative_name(file, self.root) for file, _ in files]
        marked = [
            f"{name}: {remark}" if remark else name
            for name, (_, remark) in zip(names, files, strict=True)
        ]
        text = IssueType(*(part.format(**words, split=self.split) for part in ISSUE_TYPES[kind]))
        sentence = f"{counted(len(files), text.noun)} {text.what} ({list_examples(marked)})"
        self.say(kind, sentence, text.next_step, marked)

    def say(self, kind: str, sentence: str, next_step: str = "", files: Sequence[str] = ()) -> None:
        """In words of one's own."""
        kind_of = ISSUE_TYPES[kind]
        step = next_step or kind_of.next_step
        self.append(Issue(kind, kind_of.severity, self.split, sentence, step, tuple(files)))


def relative_name(path: Path, root: Path) -> str:
    """Name of a file below the root, and one that would break a line as its code."""
    name = os.path.relpath(path, root)
    return name if name.isprintable() else ascii(name)


def counted(count: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural if count != 1 else ''}"
