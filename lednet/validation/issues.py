"""What can be wrong with a data set, in plain words. Severities:

error    training or scoring stops there, or takes it for something else
warning  it runs, and what comes out is worse than it could be, or flatters
note     good to know
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lednet.data.pairs import list_examples

SEVERITIES = ("error", "warning", "note")


class IssueType(NamedTuple):
    severity: str
    noun: str
    what: str
    next_step: str


# fmt: off
ISSUE_TYPES = {
    "split": IssueType("error", "", "", ""),
    "damaged": IssueType("error", "file", "unreadable", "copy it again, or remove the pair"),
    "no-label": IssueType("error", "image", "without a label", "add the label, or remove the image"),
    "no-image": IssueType("error", "label", "without an image", "add the image, or remove the label"),
    "name": IssueType("error", "image", "with a label of another name",
                 "name each label as its image, with .png behind it"),
    "double": IssueType("error", "file", "beside another of the same name", "keep one of each"),
    "image-mode": IssueType("error", "image", "in a mode that cannot be read", "save it as 8-bit RGB"),
    "label-mode": IssueType("error", "label", "not of 8-bit ids",
                       "save class ids, not colours, as 8-bit grey or palette PNG"),
    "size": IssueType("error", "label", "of another size than the image", "both must have one size"),
    "id": IssueType("error", "label", "with values that {scheme} does not have",
               "correct the file, or declare what it holds (--labels, or the class file)"),
    "encoding": IssueType("error", "label", "with {inside} inside, taken for {taken}",
                     "declare it with --labels, and give all files of the split one kind"),
    "leak": IssueType("warning", "image", "of what {other} shows too",
                 "a score on {split} flatters; hold out a whole recording instead (--val-names), "
                 "or say so beside the score"),
    "mixed-up": IssueType("warning", "pair", "in which most other labels would fit the image better",
                     "see on the contact sheet whether the labels belong to other images"),
    "copy": IssueType("warning", "image", "twice in the split", "keep one of each"),
    "turned": IssueType("warning", "image", "turned by EXIF",
                   "pixels are taken as they are stored; see whether the label lies that way too"),
    "blank": IssueType("warning", "image", "of one even colour", "look, and remove the pair"),
    "all-void": IssueType("warning", "label", "void everywhere",
                     "nothing is learned or scored there; annotate it, or remove the pair"),
    "void": IssueType("warning", "", "",
                 "nothing is learned or scored there; annotate more, or see what is ignored"),
    "absent": IssueType("warning", "class", "without a pixel",
                   "none can be learned; add images of them, or take them out of the classes"),
    "not-taken": IssueType("warning", "picture", "not taken, for name or format",
                      "images are png, jpg or webp, labels png; convert, rename or remove it"),
    "unscored": IssueType("note", "class", "without a pixel", "no IoU will be given for these"),
    "mode": IssueType("note", "{noun}", "of mode {mode}", "{reading}"),
    "sizes": IssueType("note", "", "", "each is brought to the working size, whatever its proportions"),
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
