"""Metrics of the Cityscapes benchmark for pixel-level labels.

Definitions and result file are those of `evalPixelLevelSemanticLabeling` in the official package
`cityscapesscripts`. Predictions and labels are label ids (0 to 33), not training targets.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lednet.data.labels import CITYSCAPES_LABELS, Label
from lednet.evaluation.evaluator import class_presence
from lednet.metrics import count_pairs, none_if_nan

LABELS: tuple[Label, ...] = tuple(label for label in CITYSCAPES_LABELS if label.id >= 0)
"""Labels with an id of their own, in the order of their ids."""

NUM_IDS = len(LABELS)

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
"""The 19 evaluated classes, in the order of training targets."""

EVALUATED_CATEGORIES: tuple[str, ...] = tuple(dict.fromkeys(LABELS[i].category for i in _EVALUATED))

_CATEGORIES = list(dict.fromkeys(label.category for label in LABELS))
_CATEGORY_OF_ID = np.array([_CATEGORIES.index(label.category) for label in LABELS], np.uint8)
_IDS_OF_CLASS = {label.name: [label.id] for label in LABELS}
_IDS_OF_CATEGORY = {
    category: [label.id for label in LABELS if label.category == category]
    for category in _CATEGORIES
}
_THING_IDS = [label.id for label in LABELS if label.name in AVERAGE_INSTANCE_SIZE]
_FIRST_INSTANCE = 1000
"""In instance images 1000 x label id + n is the n-th instance; smaller values are label ids."""

_OFFICIAL_KEYS = {
    "class_iou": ("classScores", "averageScoreClasses"),
    "category_iou": ("categoryScores", "averageScoreCategories"),
    "class_iiou": ("classInstScores", "averageScoreInstClasses"),
    "category_iiou": ("categoryInstScores", "averageScoreInstCategories"),
}
"""Method of `BenchmarkScores` -> keys of its scores and their mean in the official result file."""


def count_image(
    prediction: np.ndarray, truth: np.ndarray, instances: np.ndarray | None = None
) -> "BenchmarkScores":
    """Compare one prediction with the ground truth.

    Args:
        prediction: (H, W) uint8 label ids, 0 to 33.
        truth: (H, W) uint8 label ids.
        instances: (H, W) integers of the `instanceIds` image, for iIoU.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape}, truth {truth.shape}")
    matrix = count_pairs(torch.from_numpy(truth), torch.from_numpy(prediction), NUM_IDS, NUM_IDS)
    stats = None if instances is None else _count_instances(prediction, instances)
    return BenchmarkScores(matrix.numpy(), stats, images=1)


def _count_instances(prediction: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Weighted pixels of the instances; see `BenchmarkScores.instances`."""
    is_instance = instances > _FIRST_INSTANCE
    instance, predicted = instances[is_instance], prediction[is_instance]
    label = (instance // _FIRST_INSTANCE).astype(np.uint8)
    counts = []
    for counted in (
        slice(None),
        predicted == label,
        _CATEGORY_OF_ID[predicted] == _CATEGORY_OF_ID[label],
    ):
        pixels = np.bincount(instance[counted], minlength=NUM_IDS * _FIRST_INSTANCE)
        counts.append(pixels.reshape(NUM_IDS, _FIRST_INSTANCE)[_THING_IDS])
    size, hit, category_hit = counts  # (8, 1000) each
    average = np.array([AVERAGE_INSTANCE_SIZE[LABELS[i].name] for i in _THING_IDS])
    weight = average[:, None] / np.maximum(size, 1)
    columns = hit, size - hit, category_hit, size - category_hit
    return np.stack([(pixels * weight).sum(axis=1) for pixels in columns], axis=1)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def _mean(scores: Iterable[float]) -> float:
    """Mean of the scores that are not NaN; NaN if there are none."""
    present = [score for score in scores if score == score]
    return _ratio(sum(present), len(present))


@dataclass
class BenchmarkScores:
    """Counts of any number of images, and the scores computed from them.

    A score is NaN where neither truth nor prediction has the class, and for labels that the
    benchmark ignores. Pixels whose truth is ignored never count; a prediction of an ignored label
    on any other pixel is a miss.

    Attributes:
        matrix: (34, 34) int64, pixels of (true id, predicted id).
        instances: (8, 4) float64, or None without instance images. A row for each class of
            `AVERAGE_INSTANCE_SIZE`; pixels weighted by average over own instance size: hit,
            missed, hit by category, missed by category.
        images: number of images.
    """

    matrix: np.ndarray = field(default_factory=lambda: np.zeros((NUM_IDS, NUM_IDS), np.int64))
    instances: np.ndarray | None = None
    images: int = 0

    def add(self, other: "BenchmarkScores") -> None:
        """Add the counts of other images."""
        self.matrix += other.matrix
        if other.instances is not None:
            self.instances = other.instances + (0 if self.instances is None else self.instances)
        self.images += other.images

    def _false_positives(self, ids: list[int]) -> int:
        """Pixels of other evaluated labels that were predicted as one of `ids`."""
        others = [i for i in _EVALUATED if i not in ids]
        return int(self.matrix[np.ix_(others, ids)].sum())

    def _iou(self, groups: Mapping[str, list[int]]) -> dict[str, float]:
        """IoU of each group's evaluated labels taken as one class."""
        scores = {}
        for name, group in groups.items():
            ids = [i for i in group if i in _EVALUATED]
            hit, pixels = self.matrix[np.ix_(ids, ids)].sum(), self.matrix[ids].sum()
            scores[name] = _ratio(hit, pixels + self._false_positives(ids))
        return scores

    def _iiou(self, groups: Mapping[str, list[int]], columns: slice) -> dict[str, float]:
        """Instance-weighted IoU of each group from two columns of `instances`."""
        scores = dict.fromkeys(groups, float("nan"))
        if self.instances is None:
            return scores
        for name, ids in groups.items():
            rows = [row for row, i in enumerate(_THING_IDS) if i in ids]
            if rows:
                hit, missed = self.instances[rows, columns].sum(axis=0)
                scores[name] = _ratio(hit, hit + missed + self._false_positives(ids))
        return scores

    def class_iou(self) -> dict[str, float]:
        """IoU of each label, in the order of ids."""
        return self._iou(_IDS_OF_CLASS)

    def category_iou(self) -> dict[str, float]:
        """IoU of each category: its evaluated labels taken as one class."""
        return self._iou(_IDS_OF_CATEGORY)

    def class_iiou(self) -> dict[str, float]:
        """Instance-weighted IoU of each label; NaN for those without instances."""
        return self._iiou(_IDS_OF_CLASS, slice(0, 2))

    def category_iiou(self) -> dict[str, float]:
        """Instance-weighted IoU of each category; NaN for those without instances.

        As in the official tool, false positives include ignored labels of the category: a building
        predicted as "caravan" counts against vehicles.
        """
        return self._iiou(_IDS_OF_CATEGORY, slice(2, 4))

    def mean_iou(self) -> float:
        """Mean of `class_iou` over the classes present."""
        return _mean(self.class_iou().values())

    def pixel_accuracy(self) -> float:
        """Share of the pixels of evaluated labels that are predicted correctly."""
        return _ratio(self.matrix[_EVALUATED, _EVALUATED].sum(), self.matrix[_EVALUATED].sum())

    def frequency_weighted_iou(self) -> float:
        """Mean of `class_iou`, weighted by each class's share of the evaluated true pixels."""
        scores, pixels = self.class_iou(), self.matrix[_EVALUATED].sum(axis=1)
        iou = np.nan_to_num([scores[name] for name in EVALUATED_CLASSES])
        return _ratio(pixels @ iou, pixels.sum())

    def class_matrix(self) -> np.ndarray:
        """(19, 20) int64 over the evaluated classes, in the order of training targets;
        the last column is a prediction of any other label."""
        hits = self.matrix[np.ix_(_EVALUATED, _EVALUATED)]
        other = self.matrix[_EVALUATED].sum(axis=1) - hits.sum(axis=1)
        return np.column_stack((hits, other))

    def presence(self, kind: str = "class") -> dict[str, str]:
        """Where each evaluated class or category occurs; see `class_presence`."""
        pixels = self.matrix.sum(axis=1)
        if kind == "class":
            scores, names, groups = self.class_iou(), EVALUATED_CLASSES, _IDS_OF_CLASS
        else:
            scores, names, groups = self.category_iou(), EVALUATED_CATEGORIES, _IDS_OF_CATEGORY
        true = [int(sum(pixels[i] for i in groups[n] if i in _EVALUATED)) for n in names]
        return class_presence({name: scores[name] for name in names}, true)

    def summary(self) -> dict[str, float | None]:
        """The headline figures in [0, 1], None without pixels to score."""
        figures = {name: _mean(getattr(self, name)().values()) for name in _OFFICIAL_KEYS}
        figures["pixel_accuracy"] = self.pixel_accuracy()
        figures["frequency_weighted_iou"] = self.frequency_weighted_iou()
        return {name: none_if_nan(value) for name, value in figures.items()}

    def official_result(self) -> dict[str, Any]:
        """Content of the official result file, with None instead of NaN, which is not JSON."""
        total = self.matrix.sum()
        result: dict[str, Any] = {
            "confMatrix": self.matrix.tolist(),
            "labels": {label.name: label.id for label in LABELS},
            "priors": {
                label.name: none_if_nan(_ratio(self.matrix[label.id].sum(), total))
                for label in LABELS
            },
        }
        for method, (key, mean_key) in _OFFICIAL_KEYS.items():
            scores = getattr(self, method)()
            result[key] = {name: none_if_nan(score) for name, score in scores.items()}
            result[mean_key] = none_if_nan(_mean(scores.values()))
        return result
