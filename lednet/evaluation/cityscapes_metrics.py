"""Metrics of the Cityscapes benchmark for pixel-level labels.

The reference is `evalPixelLevelSemanticLabeling` of the official package `cityscapesscripts`, with
the same definitions and the same result file. Predictions and labels are label ids (0 to 33), as in
submissions, not training targets.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lednet.data.labels import CITYSCAPES_LABELS, Label
from lednet.metrics import count_pairs, none_if_nan

LABELS: tuple[Label, ...] = tuple(label for label in CITYSCAPES_LABELS if label.id >= 0)
"""Labels with an id of their own, in the order of their ids."""

NUM_IDS = len(LABELS)
CATEGORIES: tuple[str, ...] = tuple(dict.fromkeys(label.category for label in LABELS))

AVERAGE_INSTANCE_SIZE = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}
"""Mean pixels of a class's instances, by which iIoU weighs each one (cityscapesscripts)."""

_EVALUATED = [label.id for label in LABELS if not label.ignore_in_eval]
EVALUATED_CLASSES: tuple[str, ...] = tuple(LABELS[i].name for i in _EVALUATED)
"""Names of the 19 classes that count, in the order of training targets."""

EVALUATED_CATEGORIES: tuple[str, ...] = tuple(dict.fromkeys(LABELS[i].category for i in _EVALUATED))
_THINGS = [label for label in LABELS if label.name in AVERAGE_INSTANCE_SIZE]
_CATEGORY_OF_ID = np.array([CATEGORIES.index(label.category) for label in LABELS], np.uint8)
_FIRST_INSTANCE = 1000
"""In instance images 1000 x label id + n is the n-th instance; smaller values are label ids."""


@dataclass
class ImageCounts:
    """Counts of one image.

    Attributes:
        matrix: (34, 34) int64, pixels of (true id, predicted id).
        instances: (8, 4) float64, or None where no instance image was given; a row for each
            class of `AVERAGE_INSTANCE_SIZE`; pixels weighted by average over own size:
            right, missed, right by category, missed by category.
    """

    matrix: np.ndarray
    instances: np.ndarray | None = None


def count_image(
    prediction: np.ndarray, truth: np.ndarray, instances: np.ndarray | None = None
) -> ImageCounts:
    """Compare one prediction with the truth.

    Args:
        prediction: (H, W) uint8 label ids, 0 to 33.
        truth: (H, W) uint8 label ids.
        instances: (H, W) integers of the `instanceIds` image, for iIoU.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape}, truth {truth.shape}")
    matrix = count_pairs(torch.from_numpy(truth), torch.from_numpy(prediction), NUM_IDS, NUM_IDS)
    stats = None if instances is None else _count_instances(prediction, instances)
    return ImageCounts(matrix.numpy(), stats)


def _count_instances(prediction: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Weighted pixels of the instances; see `ImageCounts.instances`."""
    of_instance = instances > _FIRST_INSTANCE
    instance, predicted = instances[of_instance], prediction[of_instance]
    label = (instance // _FIRST_INSTANCE).astype(np.uint8)
    length = NUM_IDS * _FIRST_INSTANCE
    right = predicted == label
    right_category = _CATEGORY_OF_ID[predicted] == _CATEGORY_OF_ID[label]
    size = np.bincount(instance, minlength=length)
    hits = np.bincount(instance[right], minlength=length)
    category_hits = np.bincount(instance[right_category], minlength=length)

    stats = np.zeros((len(_THINGS), 4))
    for row, thing in enumerate(_THINGS):
        ids = slice(thing.id * _FIRST_INSTANCE, (thing.id + 1) * _FIRST_INSTANCE)
        present = size[ids] > 0
        pixels, hit = size[ids][present], hits[ids][present]
        category_hit = category_hits[ids][present]
        weight = AVERAGE_INSTANCE_SIZE[thing.name] / pixels
        columns = hit, pixels - hit, category_hit, pixels - category_hit
        stats[row] = [(column * weight).sum() for column in columns]
    return stats


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def _mean(scores: Iterable[float]) -> float:
    """Mean of the scores that are not NaN; NaN if there are none."""
    present = [score for score in scores if score == score]
    return sum(present) / len(present) if present else float("nan")


@dataclass
class BenchmarkScores:
    """Scores over any number of images, from one integer matrix and the instances' sums.

    A score is NaN where neither truth nor prediction has the class, and for labels that
    the benchmark ignores. Pixels whose truth is ignored never count; a prediction of an
    ignored label on any other pixel is a miss.

    Attributes:
        matrix: (34, 34) int64, pixels of (true id, predicted id).
        instances: (8, 4) float64, as `ImageCounts.instances`; None until an image had one.
        images: how many were added.
    """

    matrix: np.ndarray = field(default_factory=lambda: np.zeros((NUM_IDS, NUM_IDS), np.int64))
    instances: np.ndarray | None = None
    images: int = 0

    def add(self, counts: ImageCounts) -> None:
        """Add one image's counts; memory does not grow."""
        self.matrix += counts.matrix
        if counts.instances is not None:
            before = 0 if self.instances is None else self.instances
            self.instances = before + counts.instances
        self.images += 1

    def _false_positives(self, ids: list[int]) -> int:
        """Pixels of other evaluated labels that were given one of `ids`."""
        others = [i for i in _EVALUATED if i not in ids]
        return int(self.matrix[np.ix_(others, ids)].sum())

    def _iou(self, ids: list[int]) -> float:
        """IoU of `ids` taken as one class."""
        hits = self.matrix[np.ix_(ids, ids)].sum()
        return _ratio(hits, self.matrix[ids].sum() + self._false_positives(ids))

    def class_iou(self) -> dict[str, float]:
        """IoU of each label, ignored ones (NaN) included, in the order of ids."""
        return {
            label.name: float("nan") if label.ignore_in_eval else self._iou([label.id])
            for label in LABELS
        }

    def category_iou(self) -> dict[str, float]:
        """IoU of each category: its evaluated labels taken as one class."""
        return {
            category: self._iou(ids) if (ids := _evaluated_ids(category)) else float("nan")
            for category in CATEGORIES
        }

    def class_iiou(self) -> dict[str, float]:
        """Instance-weighted IoU of each label; NaN for those without instances."""
        scores = dict.fromkeys((label.name for label in LABELS), float("nan"))
        if self.instances is not None:
            for thing, (hit, missed, _, _) in zip(_THINGS, self.instances, strict=True):
                false = self._false_positives([thing.id])
                scores[thing.name] = _ratio(hit, hit + missed + false)
        return scores

    def category_iiou(self) -> dict[str, float]:
        """Instance-weighted IoU of each category; NaN for those without instances.

        False positives are counted over all labels of the category, ignored ones too, as
        the official tool does: a building called "caravan" counts against vehicles.
        """
        scores = dict.fromkeys(CATEGORIES, float("nan"))
        if self.instances is None:
            return scores
        for category in dict.fromkeys(thing.category for thing in _THINGS):
            rows = [i for i, thing in enumerate(_THINGS) if thing.category == category]
            hit, missed = self.instances[rows][:, 2:].sum(axis=0)
            ids = [label.id for label in LABELS if label.category == category]
            others = [i for i in _EVALUATED if LABELS[i].category != category]
            false = self.matrix[np.ix_(others, ids)].sum()
            scores[category] = _ratio(hit, hit + missed + false)
        return scores

    def mean_iou(self) -> float:
        """Mean of `class_iou` over the classes present."""
        return _mean(self.class_iou().values())

    def pixel_accuracy(self) -> float:
        """Share of the pixels of evaluated labels that are predicted rightly."""
        rows = self.matrix[_EVALUATED]
        return _ratio(self.matrix[_EVALUATED, _EVALUATED].sum(), rows.sum())

    def frequency_weighted_iou(self) -> float:
        """Mean of `class_iou`, weighted with each class's share of the evaluated true pixels."""
        iou, pixels = self.class_iou(), self.matrix.sum(axis=1)
        total = sum(pixels[i] for i in _EVALUATED)
        return _ratio(sum(pixels[i] * iou[LABELS[i].name] for i in _EVALUATED if pixels[i]), total)

    def class_matrix(self) -> np.ndarray:
        """(19, 20) int64 over the evaluated classes, in the order of training targets;
        the last column is a prediction of any other label."""
        hits = self.matrix[np.ix_(_EVALUATED, _EVALUATED)]
        other = self.matrix[_EVALUATED].sum(axis=1) - hits.sum(axis=1)
        return np.column_stack((hits, other))

    def summary(self) -> dict[str, float | None]:
        """The headline figures in [0, 1], None without pixels to score."""
        figures = {
            "class_iou": self.mean_iou(),
            "category_iou": _mean(self.category_iou().values()),
            "class_iiou": _mean(self.class_iiou().values()),
            "category_iiou": _mean(self.category_iiou().values()),
            "pixel_accuracy": self.pixel_accuracy(),
            "frequency_weighted_iou": self.frequency_weighted_iou(),
        }
        return {name: none_if_nan(value) for name, value in figures.items()}

    def official_result(self) -> dict[str, Any]:
        """The official result file's content; None stands where that tool writes NaN,
        which is not JSON."""
        total = self.matrix.sum()
        scores = {
            "classScores": self.class_iou(),
            "classInstScores": self.class_iiou(),
            "categoryScores": self.category_iou(),
            "categoryInstScores": self.category_iiou(),
        }
        means = {
            "averageScoreClasses": "classScores",
            "averageScoreInstClasses": "classInstScores",
            "averageScoreCategories": "categoryScores",
            "averageScoreInstCategories": "categoryInstScores",
        }
        return {
            "confMatrix": self.matrix.tolist(),
            "labels": {label.name: label.id for label in LABELS},
            "priors": {
                label.name: none_if_nan(_ratio(self.matrix[label.id].sum(), total))
                for label in LABELS
            },
            **{key: _without_nan(values) for key, values in scores.items()},
            **{key: none_if_nan(_mean(scores[of].values())) for key, of in means.items()},
        }


def _evaluated_ids(category: str) -> list[int]:
    return [i for i in _EVALUATED if LABELS[i].category == category]


def _without_nan(scores: dict[str, float]) -> dict[str, float | None]:
    return {name: none_if_nan(score) for name, score in scores.items()}
