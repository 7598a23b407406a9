import math

import numpy as np
import pytest
import torch

from lednet.metrics import ConfusionMatrix
from lednet.model import argmax_at


def matrix(truth, prediction, num_classes=3) -> ConfusionMatrix:
    confusion = ConfusionMatrix(num_classes)
    confusion.update(torch.tensor(prediction), torch.tensor(truth))
    return confusion


def test_iou_equals_the_one_computed_by_hand():
    truth = [[0, 0, 1], [1, 1, 2], [255, 255, 2]]
    predicted = [[0, 1, 1], [1, 0, 2], [0, 2, 3]]  # 3 is the void output
    confusion = matrix(truth, predicted)
    # class 0: 1 hit, 1 missed, 1 false (the one on void does not count)
    # class 1: 2 hits, 1 missed, 1 false; class 2: 1 hit, 1 missed as void
    assert confusion.counts.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 1]]
    assert confusion.class_iou().tolist() == pytest.approx([1 / 3, 2 / 4, 1 / 2])
    assert confusion.mean_iou() == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert confusion.pixel_accuracy() == pytest.approx(4 / 7)


def test_iou_of_an_absent_class_is_nan():
    confusion = matrix([[0, 0, 1]], [[0, 0, 0]])
    iou = confusion.class_iou().tolist()
    assert iou[:2] == pytest.approx([2 / 3, 0]) and math.isnan(iou[2])
    assert confusion.mean_iou() == pytest.approx(1 / 3)
    assert confusion.summary("abc")["class_iou"]["c"] is None
    nothing = matrix([[255, 255]], [[0, 1]])
    assert math.isnan(nothing.mean_iou()) and nothing.summary("abc")["miou"] is None


def test_counts_add_up_over_batches():
    truth, predicted = np.random.default_rng(0).integers(0, 6, (2, 4, 50, 60))
    truth[truth == 5] = 255
    whole, parts = ConfusionMatrix(5), ConfusionMatrix(5)
    whole.update(torch.from_numpy(predicted), torch.from_numpy(truth))
    for p, t in zip(predicted, truth, strict=True):
        parts.update(torch.from_numpy(p), torch.from_numpy(t))
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.sum() == (truth != 255).sum()


def test_update_refuses_other_shapes():
    with pytest.raises(ValueError, match="prediction is"):
        ConfusionMatrix(3).update(torch.zeros(2, 3), torch.zeros(3, 2))


def test_argmax_at_interpolates_logits_before_the_argmax():
    """Between two corners a third class has the highest interpolated logit."""
    logits = torch.tensor([[[[9.0, 0.0]], [[0.0, 9.0]], [[6.0, 6.0]]]])
    assert set(argmax_at(logits, (1, 8)).unique().tolist()) == {0, 1, 2}
    assert argmax_at(logits, (1, 2)).tolist() == [[[0, 1]]]
