"""The result of a prediction: `Segmentation`."""

import io

import numpy as np
import pytest
from PIL import Image

from lednet.data.labels import LabelScheme
from lednet.errors import UserError
from lednet.inference.result import Segmentation

SCHEME = LabelScheme(
    "toy", ("road", "car", "sky"), ((9, 9, 9), (0, 0, 200), (9, 99, 200)), {0: 0, 1: 1, 2: 2}
)
LABELS = np.array([[0, 0, 0, 0], [1, 1, 3, 0]], np.uint8)
IMAGE = np.full((2, 4, 3), 100, np.uint8)


@pytest.fixture
def result():
    return Segmentation(LABELS, IMAGE, SCHEME)


def test_segmentation_asarray_is_the_label_map(result):
    assert np.asarray(result) is LABELS
    assert np.array(result, dtype=np.int64).dtype == np.int64
    assert (result == LABELS).all() and (result != Segmentation(LABELS + 1, IMAGE, SCHEME)).all()
    assert result.shape == (2, 4) and result.dtype == np.uint8 and result[1, 2] == 3
    assert repr(result) == "Segmentation(4x2: road 62%, car 25%)"


def test_segmentation_shares_largest_first_without_void(result):
    assert result.shares == {"road": 5 / 8, "car": 2 / 8}
    assert list(result.shares) == ["road", "car"]


def test_segmentation_mask_of_a_class(result):
    np.testing.assert_array_equal(result.mask("car"), LABELS == 1)
    assert not result.mask("sky").any()
    with pytest.raises(UserError, match="no class 'cars': did you mean car"):
        result.mask("cars")


def test_segmentation_pictures_have_class_colors(result):
    assert np.asarray(result.color())[1, 0].tolist() == [0, 0, 200]
    assert np.asarray(result.overlay(alpha=0.5))[1].tolist() == [
        [50, 50, 150], [50, 50, 150], [100, 100, 100], [55, 55, 55],
    ]  # fmt: skip
    assert Image.open(io.BytesIO(result._repr_png_())).size == (4, 2)


def test_segmentation_save_each_kind(result, tmp_path):
    result.save(tmp_path / "labels.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "labels.png")), LABELS)
    result.save(tmp_path / "color.png", "color")
    assert np.asarray(Image.open(tmp_path / "color.png"))[0, 0].tolist() == [9, 9, 9]
    result.save(tmp_path / "overlay.jpg", "overlay")
    assert Image.open(tmp_path / "overlay.jpg").format == "JPEG"
    with pytest.raises(UserError, match=r"cannot write labels to .*x\.jpg: give a \.png file"):
        result.save(tmp_path / "x.jpg")
