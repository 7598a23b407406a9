import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from lednet import UserError
from lednet.data import transforms
from lednet.data.datasets import open_dataset, pixel_shares, read_class_file, read_label
from lednet.data.labels import (
    CITYSCAPES_LABELS,
    IGNORE_INDEX,
    camvid_scheme,
    cityscapes_scheme,
)
from lednet.data.pairs import cityscapes_pairs, folder_pairs
from lednet.data.transforms import (
    PRESETS,
    SHIFT,
    Augmentation,
    jitter_colors,
    resize_transform,
)

# labels


def test_label_table_is_the_official_one():
    official = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    assert len(official) == len(CITYSCAPES_LABELS)
    for ours, theirs in zip(CITYSCAPES_LABELS, official, strict=True):
        assert (ours.name, ours.id, ours.train_id) == (theirs.name, theirs.id, theirs.trainId)
        assert (ours.category, ours.color) == (theirs.category, theirs.color)
        assert ours.has_instances == theirs.hasInstances
        assert ours.ignore_in_eval == theirs.ignoreInEval


def test_both_cityscapes_encodings_mean_the_same_classes():
    ids, train_ids = cityscapes_scheme("labelIds"), cityscapes_scheme("labelTrainIds")
    assert ids.classes == train_ids.classes and ids.num_classes == 19 and ids.num_outputs == 20
    assert ids.classes[0] == "road" and ids.classes[18] == "bicycle"
    for label in CITYSCAPES_LABELS:
        if not label.ignore_in_eval:
            assert ids.lut[label.id] == train_ids.lut[label.train_id] == label.train_id
    assert ids.lut[0] == train_ids.lut[255] == IGNORE_INDEX
    assert ids.lut[34] == ids.lut[255] == train_ids.lut[19] == -1
    assert ids.palette[11].tolist() == [220, 20, 60]


# pairs


def test_pairs_are_made_by_name(toy_cityscapes):
    for split, count in (("train", 6), ("val", 3)):
        pairs = cityscapes_pairs(toy_cityscapes, split)
        assert len(pairs) == count
        for image, label in pairs:
            assert image.name.split("_leftImg8bit")[0] == label.name.split("_gtFine")[0]
    assert len(cityscapes_pairs(toy_cityscapes, "train_extra", "coarse")) == 2
    assert [pair.label for pair in cityscapes_pairs(toy_cityscapes, "test")] == [None, None]


def test_missing_label_is_named_and_counted(own_camvid):
    for i in (1, 3):
        (own_camvid / f"trainannot/train_{i:03d}.png").unlink()
    with pytest.raises(UserError, match=r"2 of 5 images have no label \(train_001, train_003\)"):
        open_dataset("camvid", own_camvid, "train")


def test_missing_image_is_named_and_counted(own_camvid):
    (own_camvid / "train/train_002.png").unlink()
    with pytest.raises(UserError, match=r"1 of 5 labels have no image \(train_002\)"):
        open_dataset("camvid", own_camvid, "train")


def test_doubled_partner_is_named(own_camvid):
    picture = Image.open(own_camvid / "val/val_001.png")
    picture.save(own_camvid / "val/val_001.jpg")
    with pytest.raises(UserError, match=r"1 images stand twice .*val_001"):
        open_dataset("camvid", own_camvid, "val")


def test_jpeg_images_are_found(own_camvid):
    for path in (own_camvid / "val").iterdir():
        Image.open(path).save(path.with_suffix(".JPG"), "JPEG")
        path.unlink()
    assert len(open_dataset("camvid", own_camvid, "val")) == 3


def test_empty_split_and_missing_folder_are_named(own_camvid, tmp_path):
    (own_camvid / "test").mkdir()
    (own_camvid / "testannot").mkdir()
    with pytest.raises(UserError, match="test holds no images"):
        open_dataset("camvid", own_camvid, "test")
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        open_dataset("camvid", tmp_path / "nowhere", "train")


def test_train_ids_are_told_by_their_names(toy_cityscapes, tmp_path):
    scheme = cityscapes_scheme()
    for image, label in cityscapes_pairs(toy_cityscapes, "val"):
        for path, folder in ((image, "leftImg8bit"), (label, "gtFine")):
            target = tmp_path / folder / "val" / path.parent.name
            target.mkdir(parents=True, exist_ok=True)
            if folder == "leftImg8bit":
                (target / path.name).write_bytes(path.read_bytes())
            else:
                name = path.name.replace("labelIds", "labelTrainIds")
                Image.fromarray(read_label(path, scheme)).save(target / name)
    by_train_ids = open_dataset("cityscapes", tmp_path, "val")
    by_ids = open_dataset("cityscapes", toy_cityscapes, "val")
    assert by_train_ids.pairs[0].label.name.endswith("labelTrainIds.png")
    for i in range(3):
        assert np.array_equal(by_train_ids.read(i)[1], by_ids.read(i)[1])
    with pytest.raises(UserError, match="have no label"):
        open_dataset("cityscapes", tmp_path, "val", labels="labelIds")


def test_hold_out_parts_the_images(own_camvid):
    train = open_dataset("camvid", own_camvid, "train", val_every=2)
    val = open_dataset("camvid", own_camvid, "val", val_every=2)
    names = [[pair.image.stem[-1] for pair in data.pairs] for data in (train, val)]
    assert names == [["0", "2", "4"], ["1", "3"]]


# files


def test_void_and_classes_are_read_from_palette_and_grey_files(tmp_path):
    values = np.array([[0, 10], [11, 4]], dtype=np.uint8)
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.putpalette([0, 90, 0] * 256)
    palette.save(tmp_path / "p.png")
    Image.fromarray(values).save(tmp_path / "l.png")
    for name in ("p.png", "l.png"):
        assert read_label(tmp_path / name, camvid_scheme()).tolist() == [[0, 10], [255, 4]]


def test_id_outside_the_table_is_named(own_camvid):
    Image.fromarray(np.full((48, 64), 12, np.uint8)).save(own_camvid / "trainannot/train_004.png")
    with pytest.raises(UserError, match=r"train_004\.png holds the id 12, which CamVid"):
        open_dataset("camvid", own_camvid, "train")[4]


def test_colour_label_is_refused(own_camvid):
    Image.new("RGB", (64, 48)).save(own_camvid / "trainannot/train_000.png")
    with pytest.raises(UserError, match=r"train_000\.png has mode RGB"):
        open_dataset("camvid", own_camvid, "train")[0]


def test_label_of_another_size_is_refused(own_camvid):
    Image.new("L", (64, 50)).save(own_camvid / "trainannot/train_000.png")
    with pytest.raises(UserError, match=r"train_000\.png is 64x50, its image train_000\.png 64x48"):
        open_dataset("camvid", own_camvid, "train")[0]


@pytest.mark.parametrize("folder", ["train", "trainannot"])
def test_truncated_file_is_named(own_camvid, folder):
    path = own_camvid / folder / "train_003.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"train_003\.png is damaged"):
        open_dataset("camvid", own_camvid, "train")[3]


def test_pixel_shares_count_void_in_the_total(camvid):
    data = open_dataset("camvid", camvid, "train")
    shares = pixel_shares(data, workers=2)
    assert shares.shape == (12,)
    np.testing.assert_allclose(shares, np.full(12, 1 / 12))


# own data


def test_own_data_needs_two_folders_and_a_class_file(own_data):
    train = open_dataset("folders", own_data, "train", val_every=3)
    val = open_dataset("folders", own_data, "val", val_every=3)
    assert (len(train), len(val)) == (4, 2)
    assert train.scheme.classes == ("field", "path") and train.scheme.colors[0] == (0, 200, 0)
    assert train.scheme.num_outputs == 3
    assert np.unique(train.read(0)[1]).tolist() == [0, 1, IGNORE_INDEX]


def test_class_file_may_be_json(tmp_path):
    content = {"classes": [{"name": "a"}, {"name": "b"}], "ignore": [255]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    scheme = read_class_file(tmp_path / "c.json")
    assert scheme.file_ids == {0: 0, 1: 1, 255: IGNORE_INDEX}
    assert len(set(scheme.colors)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "classes: []",
        "classes: 3",
        "[1, 2]",
        "classes: [{id: 1}]",
        "classes: [{name: a, id: 256}]",
        "classes: [{name: a, id: 1}, {name: b, id: 1}]",
        "classes: [{name: a, id: 1}]\nignore: [1]",
        "classes: [{name: a, color: [1, 2]}]",
        "classes: [{name: a, color: [1, 2, 300]}]",
        "classes: [}",
    ],
)
def test_class_files_that_make_no_sense_are_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        read_class_file(tmp_path / "c.yaml")


def test_subfolders_are_searched(own_camvid):
    (own_camvid / "train/a").mkdir()
    (own_camvid / "train/train_000.png").rename(own_camvid / "train/a/train_000.png")
    assert len(folder_pairs(own_camvid / "train", own_camvid / "trainannot")) == 5


# transforms


def quartered(height: int = 60, width: int = 80) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """A picture whose pixel value is a function of its label: 10 times it, in four fields."""
    label = torch.zeros(height, width, dtype=torch.uint8)
    label[:, width // 2 :] = 5
    label[height // 2 :, : width // 2] = 11
    label[height // 2 :, width // 2 :] = 18
    image = (label * 10 + 30).expand(3, -1, -1).contiguous()
    return tv_tensors.Image(image), tv_tensors.Mask(label)


def located(n: int, height: int = 40, width: int = 56) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch whose pixels say where they are: row, column and label of each, never 0."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(-1, width) * 4 + 4
    columns = torch.arange(width, dtype=torch.uint8).expand(height, -1) * 4 + 4
    label = (rows // 4 * 5 + columns // 4 * 3) % 19
    batch = torch.stack((rows, columns, label + 1)).repeat(n, 1, 1, 1)
    return batch, label.repeat(n, 1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_resizing_keeps_bytes_and_labels():
    image, label = quartered(61, 83)
    x, y = resize_transform((31, 40))(image, label)
    assert x.shape == (3, 31, 40) and y.shape == (31, 40)
    assert type(x) is type(y) is torch.Tensor and x.dtype == y.dtype == torch.uint8
    assert set(y.unique().tolist()) == {0, 5, 11, 18}
    same = resize_transform((61, 83))(image, label)
    assert torch.equal(same[0], image) and torch.equal(same[1], label)


def shifted(picture: torch.Tensor, flip: bool, down: int, right: int, fill: int) -> torch.Tensor:
    """(..., H, W): mirrored, then moved pixel by pixel."""
    picture = picture.flip(-1) if flip else picture
    height, width = picture.shape[-2:]
    moved = torch.full_like(picture, fill)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                moved[..., y, x] = picture[..., y - down, x - right]
    return moved


def test_paper_preset_moves_whole_pixels_and_fills_with_void():
    images, labels = located(200, 7, 9)
    x, y = Augmentation("paper")(images, labels, seeded())
    steps = range(-SHIFT, SHIFT + 1)
    expected = {
        move: (shifted(images[0], *move, 0) * (1 / 255), shifted(labels[0], *move, IGNORE_INDEX))
        for move in itertools.product((False, True), steps, steps)
    }
    moves = Counter()
    for image, target in zip(x, y, strict=True):
        (move,) = [m for m, (_, label) in expected.items() if torch.equal(target, label.long())]
        assert torch.equal(image, expected[move][0])
        moves[move] += 1
    assert 70 < sum(count for (flip, _, _), count in moves.items() if flip) < 130
    for axis in (1, 2):  # every shift equally often: 40 times
        shifts = Counter()
        for move, count in moves.items():
            shifts[move[axis]] += count
        assert set(shifts) == set(steps) and all(20 < count < 60 for count in shifts.values())
    assert len(moves) > 40  # flip and both shifts are drawn apart


def test_modern_preset_keeps_image_and_label_aligned(monkeypatch):
    monkeypatch.setattr(transforms, "JITTER", 0)
    images, labels = located(100)
    height, width = labels.shape[1:]
    x, y = Augmentation("modern")(images, labels, seeded())
    scales, mirrored = [], 0
    for image, target in zip(x * 255, y, strict=True):
        inside = target != IGNORE_INDEX
        assert (image[:, ~inside] == 0).all() and (image[:2, inside] > 3.9).all()
        # Bilinear interpolation of a ramp gives back where in the source a pixel was taken.
        rows, columns = image[0] / 4 - 1, image[1] / 4 - 1
        clear = inside.clone()  # of the border between two source pixels
        for place in (rows, columns):
            clear &= (place % 1 - 0.5).abs() > 0.02
        nearest = labels[0][rows.round().long().clamp(0), columns.round().long().clamp(0)]
        assert torch.equal(target[clear], nearest[clear].long())
        # What is inside is a rectangle; its rows are evenly spaced.
        ys, xs = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        assert inside.sum() == len(ys) * len(xs)
        middle_row, middle_column = ys[len(ys) // 2], xs[len(xs) // 2]
        down = rows[middle_row + 1, middle_column] - rows[middle_row, middle_column]
        across = columns[middle_row, middle_column + 1] - columns[middle_row, middle_column]
        scale = 1 / float(down)
        assert float(across.abs()) == pytest.approx(1 / scale, abs=0.01)
        mirrored += int(across < 0)
        for length, of in ((len(ys), height), (len(xs), width)):
            assert length == pytest.approx(min(1, scale) * of, abs=1)
        scales.append(scale)
    assert 30 < mirrored < 70
    assert 0.5 < min(scales) < 0.6 and 1.9 < max(scales) < 2.01
    assert np.mean(scales) == pytest.approx(1.25, abs=0.15)
    tops = {int((target != IGNORE_INDEX).any(1).nonzero()[0]) for target in y}
    assert len(tops) > 10 and {0} < tops  # small pictures lie anywhere


def test_colours_of_the_modern_preset():
    images = torch.rand(2, 3, 6, 8, generator=seeded()) * 0.4 + 0.3
    same = torch.ones(2, 3)
    torch.testing.assert_close(jitter_colors(images, same), images)

    def changed(column: int, factor: float) -> torch.Tensor:
        factors = same.clone()
        factors[1, column] = factor
        result = jitter_colors(images, factors)
        torch.testing.assert_close(result[0], images[0])  # each sample has its own
        return result[1]

    torch.testing.assert_close(changed(0, 1.2), images[1] * 1.2)
    assert changed(0, 9).max() == 1
    luma = (images[1] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    mean = luma.mean()
    torch.testing.assert_close(changed(1, 0.5), (images[1] + mean) / 2)
    torch.testing.assert_close(changed(2, 0.5), (images[1] + luma) / 2)

    flat = torch.full((200, 3, 4, 4), 100, dtype=torch.uint8)
    x, _ = Augmentation("modern")(flat, torch.zeros(200, 4, 4, dtype=torch.uint8), seeded())
    factors = x.amax((1, 2, 3)) * 255 / 100
    assert 0.699 < factors.min() < 0.75 and 1.25 < factors.max() < 1.301


@pytest.mark.parametrize("preset", PRESETS)
def test_what_comes_from_outside_is_void_and_never_a_class(preset):
    images = torch.full((30, 3, 24, 32), 200, dtype=torch.uint8)
    labels = torch.zeros(30, 24, 32, dtype=torch.uint8)
    x, y = Augmentation(preset)(images, labels, seeded())
    assert set(y.unique().tolist()) == {0, IGNORE_INDEX}
    assert torch.equal(y == IGNORE_INDEX, (x == 0).all(1))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(1, 33, 47), (3, 24, 32), (2, 1, 5)])
def test_augmentation_gives_floats_and_targets_of_any_size(preset, shape):
    n, height, width = shape
    images, labels = located(n, height, width)
    before = images.clone(), labels.clone()
    x, y = Augmentation(preset)(images, labels, seeded())
    assert x.shape == (n, 3, height, width) and y.shape == shape
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.min() >= 0 and x.max() <= 1
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])


@pytest.mark.parametrize("preset", PRESETS)
def test_augmentation_depends_on_its_generator_alone(preset):
    images, labels = located(20)
    augmentation = Augmentation(preset)
    first, again, other = (augmentation(images, labels, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert len({tuple(target.flatten().tolist()) for target in first[1]}) > 10
    strided = images.contiguous(memory_format=torch.channels_last)
    x, y = augmentation(strided, labels, seeded(5))
    assert torch.equal(x, first[0]) and torch.equal(y, first[1])
    assert x.is_contiguous() and augmentation.normalize(strided, labels)[0].is_contiguous()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", PRESETS)
def test_augmentation_is_the_same_on_a_gpu(preset):
    images, labels = located(8)
    augmentation = Augmentation(preset, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    x, y = augmentation(images, labels, seeded())
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        x2, y2 = augmentation.cuda()(images.cuda(), labels.cuda(), seeded())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    assert (y2.cpu() != y).float().mean() < 1e-3
    assert (x2.cpu() - x).abs().gt(1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_augmented_batches_are_normalized(preset):
    images, labels = located(3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    raw, _ = Augmentation(preset)(images, labels, seeded())
    x, _ = Augmentation(preset, mean, std)(images, labels, seeded())
    torch.testing.assert_close(x, v2.functional.normalize(raw, mean, std))


@pytest.mark.parametrize("normalization", [((0, 0, 0), (1, 1, 1)), ((0.1, 0.2, 0.3), (0.5, 1, 2))])
def test_validation_batches_are_what_torchvision_makes(normalization):
    image, label = quartered()
    pixels = v2.functional.resize(image, [30, 40], antialias=True)
    expected = v2.functional.normalize(v2.functional.to_dtype(pixels, scale=True), *normalization)
    small, small_label = resize_transform((30, 40))(image, label)
    batch = Augmentation("paper", *normalization).normalize(small[None], small_label[None])
    torch.testing.assert_close(batch[0][0], expected, rtol=0, atol=1e-6)
    assert batch[1].dtype == torch.int64
    expected = v2.functional.resize(label, [30, 40], v2.InterpolationMode.NEAREST)
    assert torch.equal(batch[1][0], expected.long())
