"""Data-set validation: each type of issue is provoked and must be reported with its file."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from fakes import truncate
from PIL import Image, ImageFilter
from test_page import opened

from lednet import UserError
from lednet.data.labels import cityscapes_scheme
from lednet.data.pairs import Sample
from lednet.training.losses import class_weights
from lednet.validation.alignment import edge_alignment
from lednet.validation.checks import ValidationReport, validate_dataset
from lednet.validation.duplicates import (
    COPY_SIMILARITY,
    MIN_SIMILARITY,
    THUMBNAIL,
    find_copies,
    find_near_duplicates,
    similarities,
)
from lednet.validation.inspection import inspect_pair
from lednet.validation.issues import ISSUE_TYPES, SEVERITIES
from lednet.validation.report import worst_aligned, write_dataset_page
from lednet.validation.splits import open_splits

SIZE = (96, 128)  # (height, width)
COLORS = np.random.default_rng(7).integers(30, 225, (12, 3)).astype(np.uint8)
HOSTILE = "<script>alert(1)<script>.png"


def make_label(seed: int) -> np.ndarray:
    """(H, W) uint8: rectangles, every value from 0 to 11 somewhere."""
    rng = np.random.default_rng(seed)
    label = np.full(SIZE, seed % 12, np.uint8)
    for value in rng.permutation(np.repeat(np.arange(12), 3)):
        top, left = rng.integers(0, (SIZE[0] - 16, SIZE[1] - 24))
        label[top : top + rng.integers(8, 40), left : left + rng.integers(8, 50)] = value
    label.ravel()[:12] = range(12)
    return label


def make_image(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 6, (*SIZE, 3))
    return Image.fromarray((COLORS[make_label(seed)] + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory) -> Path:
    """CamVid's layout, 24 and 5 pairs, without a fault."""
    root = tmp_path_factory.mktemp("clean") / "camvid"
    for split, count in (("train", 24), ("val", 5)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for i in range(count):
            seed = 1000 * len(split) + i
            make_image(seed).save(root / split / f"{split}_{i:02d}.png")
            label = Image.fromarray(make_label(seed))
            label.save(root / f"{split}annot" / f"{split}_{i:02d}.png")
    return root


@pytest.fixture
def tree(clean_tree, tmp_path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(clean_tree, tmp_path / "camvid"))


def examine(root: Path, name: str = "camvid", **options) -> ValidationReport:
    return validate_dataset(root, *open_splits(name, root, **options))


def found(report: ValidationReport) -> dict[str, str]:
    """Kind of each issue -> its files, joined."""
    return {issue.kind: " ".join(issue.files) for issue in report.issues}


@pytest.fixture
def check(run_inside, tmp_path):
    """Run the script on a tree; reports go to `out`."""

    def run(root: Path, *flags: object):
        return run_inside(
            "utils/check_dataset.py", "--dataset", "camvid", "--datadir", root, "--out",
            tmp_path / "out", "--workers", 0, "--images", 2, *flags,
        )  # fmt: skip

    return run


def edit(path: Path, change) -> None:
    """Replace an image by the array that `change` returns."""
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


def edit_all(folder: Path, change) -> None:
    for path in folder.iterdir():
        edit(path, change)


def add_palette(path: Path) -> None:
    label = Image.open(path)
    label.putpalette(list(range(255, -1, -1)) * 3)
    label.save(path)


def rotate(image: Path, label: Path, orientation: int = 3) -> None:
    """Mark an image as turned by 180 degrees, which leaves the size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(image).save(image.with_suffix(".jpg"), exif=exif)
    image.unlink()


def resize_pair(image: Path, label: Path) -> None:
    for path in (image, label):
        Image.open(path).resize((64, 48), Image.Resampling.NEAREST).save(path)


def add_copy(image: Path, label: Path) -> None:
    """The image again, lighter and as a JPEG of low quality, with the same label."""
    lighter = Image.open(image).point(lambda v: min(255, 30 + v))
    lighter.save(image.with_name("train_99.jpg"), quality=40)
    shutil.copy(label, label.with_name("train_99.png"))


def mix_up(image: Path, label: Path) -> None:
    labels = sorted(label.parent.iterdir())
    content = [path.read_bytes() for path in labels]
    for path, other in zip(labels, content[7:] + content[:7], strict=True):
        path.write_bytes(other)


FLOATS = Image.fromarray(np.ones(SIZE, np.float32))
FAULTS = {
    "no-label": lambda image, label: label.unlink(),
    "no-image": lambda image, label: image.unlink(),
    "name": lambda image, label: label.rename(label.with_name("Train_3_mask.png")),
    "double": lambda image, label: shutil.copy(image, image.with_suffix(".jpeg")),
    "not-taken": lambda image, label: Image.open(image).save(image.with_suffix(".gif")),
    "damaged": lambda image, label: truncate(image),
    "image-mode": lambda image, label: FLOATS.save(image, format="TIFF"),
    "label-mode": lambda image, label: edit(label, lambda a: COLORS[a]),
    "size": lambda image, label: edit(label, lambda a: a[::2, ::2]),
    "id": lambda image, label: edit(label, lambda a: np.where(a == 5, 77, a)),
    "turned": rotate,
    "blank": lambda image, label: edit(image, lambda a: a * 0 + 9),
    "all-void": lambda image, label: edit(label, lambda a: a * 0 + 11),
    "copy": add_copy,
    "mode": lambda image, label: edit(image, lambda a: a[..., 0].astype(np.uint16)),
    "sizes": resize_pair,
    "mixed-up": mix_up,
    "void": lambda image, label: edit_all(
        label.parent, lambda a: np.where(np.arange(len(a))[:, None] > 30, 11, a)
    ),
    "split": lambda image, label: shutil.rmtree(label.parent),
}


def damage(tree: Path, kind: str) -> None:
    FAULTS[kind](tree / "train/train_03.png", tree / "trainannot/train_03.png")


@pytest.mark.parametrize("kind", FAULTS)
def test_validate_dataset_reports_each_type_of_issue_with_its_file(tree, kind):
    damage(tree, kind)
    report = examine(tree)
    kinds = found(report)
    # No other issue; the 16-bit image uses the lowest 8 bits only.
    assert set(kinds) == ({kind, "blank"} if kind == "mode" else {kind})
    (issue,) = (one for one in report.issues if one.kind == kind)
    assert issue.split == "train" and issue.severity == ISSUE_TYPES[kind].severity
    if kind == "split":
        assert [split.name for split in report.splits] == ["val"] and "annot" in issue.sentence
    elif kind not in ("sizes", "mixed-up", "void"):  # which have no single file
        assert "train_03" in kinds[kind] and "train_03" in issue.sentence
    assert "{" not in str(issue)


DEEP = ": has 16-bit values (311), and ids are 0 to 255: convert it to 8-bit ids"


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda path: edit(path, lambda a: a.astype(np.uint16) + 300), "label-mode", DEEP),
        (lambda path: edit(path, lambda a: a > 5), "mode", ""),
        (lambda path: edit(path, lambda a: np.where(a < 2, a + 200, a)), "id", ": 200 201"),
        (add_palette, "mode", ""),  # read by index, whatever the colours
    ],
)
def test_validate_dataset_names_mode_or_values_of_a_label(tree, change, kind, text):
    change(tree / "valannot/val_01.png")
    assert found(examine(tree)) == {kind: f"valannot/val_01.png{text}"}


@pytest.mark.parametrize(
    ("orientation", "label_size", "kinds", "image_size"),
    [
        (6, (64, 96), [], (64, 96)),  # (width, height): fits when turned
        (6, (96, 64), [], (96, 64)),  # fits as stored
        (2, (96, 64), ["turned"], (96, 64)),  # fits both
        (6, (32, 32), ["size"], (96, 64)),
    ],
)
def test_inspect_pair_turns_image_to_fit_its_label(
    tmp_path, orientation, label_size, kinds, image_size
):
    make_image(1).resize((96, 64)).save(tmp_path / "a.png")
    Image.new("L", label_size).save(tmp_path / "b.png")
    rotate(tmp_path / "a.png", tmp_path / "b.png", orientation)
    item = inspect_pair(Sample(tmp_path / "a.jpg", tmp_path / "b.png"))
    assert [kind for kind, *_ in item.problems] == kinds and item.image_size == image_size


@pytest.mark.parametrize(("split", "kind"), [("train", "absent"), ("val", "unscored")])
def test_validate_dataset_names_absent_classes(tree, split, kind):
    edit_all(tree / f"{split}annot", lambda a: np.where(a == 9, 11, a))
    assert found(examine(tree)) == {kind: "pedestrian"}


def test_validate_dataset_reports_the_other_cityscapes_encoding(toy_cityscapes, tmp_path):
    root = Path(shutil.copytree(toy_cityscapes, tmp_path / "cityscapes"))
    labels = sorted((root / "gtFine/train").rglob("*_labelIds.png"))
    lut = cityscapes_scheme().lut.astype(np.uint8)

    def encoding() -> list:
        issues = examine(root, "cityscapes").issues
        assert "id" not in {issue.kind for issue in issues}
        return [issue for issue in issues if issue.kind == "encoding"]

    assert not encoding()
    edit(labels[0], lambda a: lut[a])
    (issue,) = encoding()
    assert [Path(file).name for file in issue.files] == [labels[0].name]
    assert "values of labelTrainIds, read as labelIds" in issue.sentence
    for path in labels[1:]:
        edit(path, lambda a: lut[a])
    assert len(encoding()[0].files) == 6
    for path in labels:  # the same in the other direction
        path.rename(str(path).replace("labelIds", "labelTrainIds"))
    assert not encoding()
    edit(next((root / "gtFine/train").rglob("*_labelTrainIds.png")), lambda a: a * 0 + 26)
    assert len(encoding()) == 1


def test_validate_dataset_reports_all_issues_sorted_for_any_number_of_workers(tree):
    kinds = ("blank", "not-taken", "double", "no-label")
    for kind in kinds[:3]:
        damage(tree, kind)
    (tree / "trainannot/train_05.png").unlink()
    (tree / "val/val_01.png").write_text("no image")
    (tree / "valannot/val_00.png").write_bytes(b"")
    report = examine(tree)
    assert found(report).keys() == {*kinds, "damaged"}
    files = found(report)["damaged"]
    assert "valannot/val_00.png: " in files and "val/val_01.png: " in files
    severities = [SEVERITIES.index(issue.severity) for issue in report.issues]
    assert severities == sorted(severities)
    parallel = validate_dataset(tree, *open_splits("camvid", tree), workers=2)
    assert parallel.issues == report.issues
    for one, other in zip(report.splits, parallel.splits, strict=True):
        assert np.array_equal(one.alignment, other.alignment, equal_nan=True)


def test_inspect_pair_reports_the_full_size_of_a_large_jpeg(tmp_path):
    image = make_image(4).resize((1200, 900), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=95)
    inspection = inspect_pair(Sample(tmp_path / "a.jpg", None))
    assert inspection.image_size == (1200, 900) and not inspection.problems
    exact = thumbnails([image])[0].astype(int)
    assert np.abs(inspection.thumbnail - exact).mean() < 2


def street(seed: int) -> Image.Image:
    """A detailed image, 256x192."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.array(coarse.resize((256, 192), Image.Resampling.BICUBIC))
    return Image.fromarray((smooth * 0.8 + rng.integers(0, 50, smooth.shape)).astype(np.uint8))


def streets(*numbers: int) -> list[Image.Image]:
    return [street(seed) for seed in range(*numbers)]


def drive(seed: int, steps: int) -> list[Image.Image]:
    """Frames of a forward-moving camera, each showing an enlarged part of the previous one."""
    scene = street(seed).resize((1024, 768), Image.Resampling.BICUBIC)
    margins = [(1 - 1.15**-step) / 2 for step in range(steps)]
    boxes = [(1024 * m, 768 * m, 1024 * (1 - m), 768 * (1 - m)) for m in margins]
    return [scene.resize((256, 192), Image.Resampling.BICUBIC, box=box) for box in boxes]


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    small = (i.resize(THUMBNAIL[::-1], Image.Resampling.BOX).convert("L") for i in images)
    return np.stack([np.array(image) for image in small])


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


CHANGES = {
    "codec": (lambda image: as_jpeg(image, 30), COPY_SIMILARITY),
    "size": (lambda image: image.resize((90, 70)), COPY_SIMILARITY),
    "light": (lambda image: image.point(lambda v: v * 0.6 + 20), COPY_SIMILARITY),
    "blur": (lambda image: image.filter(ImageFilter.GaussianBlur(1)), COPY_SIMILARITY),
    "corner": (lambda image: image.crop((0, 0, 216, 162)), MIN_SIMILARITY),
    "enlarged middle": (lambda image: image.crop((43, 32, 213, 160)), MIN_SIMILARITY),
}


@pytest.mark.parametrize("change", CHANGES)
def test_similarity_is_high_for_changed_copies_only(change):
    alter, least = CHANGES[change]
    images = streets(6)
    similarity = similarities(thumbnails([alter(image) for image in images]), thumbnails(images))
    assert similarity.diagonal().min() >= least
    assert similarity[~np.eye(6, dtype=bool)].max() < MIN_SIMILARITY


def test_duplicates_are_not_found_among_distinct_or_blank_images():
    images, others = thumbnails(streets(40)), thumbnails(streets(40, 60))
    assert find_near_duplicates(images, others) == []
    assert find_copies(np.concatenate((images, others))) == []
    blank = np.full((3, *THUMBNAIL), 7, np.uint8)
    assert find_copies(blank) == [] and find_near_duplicates(blank, blank) == []
    assert find_near_duplicates(blank[:0], blank) == find_copies(blank[:0]) == []


def test_near_duplicates_of_a_fixed_camera_are_copies_only():
    seen = thumbnails([Image.blend(street(0), other, 0.3) for other in streets(100, 130)])
    assert find_near_duplicates(seen[:10], seen[10:]) == []
    assert find_copies(np.concatenate((seen[:2], seen[:1], seen[:1]))) == [(0, 2), (2, 3)]
    copied = np.concatenate((seen[:10], seen[20:21]))
    assert [(one.image, one.other) for one in find_near_duplicates(copied, seen[10:])] == [(10, 10)]


def test_near_duplicates_follow_a_recording_frame_by_frame():
    frames = drive(5, 12)
    train = thumbnails([*streets(30), *frames[:4]])
    val = thumbnails([*streets(50, 60), *frames[4:]])
    alike = find_near_duplicates(val, train)
    assert [one.image for one in alike] == list(range(10, 18))
    assert alike[0].other >= 30 and alike[0].direct  # one of the recording's frames in train
    assert not alike[-1].direct


def test_validate_dataset_names_a_val_image_and_its_near_duplicate(tree):
    image = Image.open(tree / "train/train_11.png")
    image.crop((6, 4, 122, 92)).resize(SIZE[::-1]).save(tree / "val/val_03.png")
    (issue,) = examine(tree).issues
    assert issue.kind == "leak" and issue.split == "val"
    assert "1 of 5 images show places that train shows too" in issue.sentence
    assert "val/val_03.png ~ train/train_11.png" in issue.sentence


def test_edge_alignment_separates_matching_and_other_labels():
    images = thumbnails([make_image(s) for s in range(20)])
    labels = np.stack([make_label(s)[::2, ::2] for s in range(20)])
    matching, better = edge_alignment(images, labels)
    assert matching.min() > 0.2 and better.max() < 0.2
    wrong, better = edge_alignment(images, np.roll(labels, 3, axis=0))
    assert wrong.max() < matching.min() and 0.25 < better.mean() < 0.75
    assert not edge_alignment(images, labels * 0)[0].any()


def test_script_exit_status_follows_severity_and_fail_on(check, clean_tree, tree, tmp_path):
    result = check(clean_tree).check()
    assert "24 train, 5 val pairs; 0 errors, 0 warnings, 0 notes" in result.stdout
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"report.html", "report.json", "sheet.png"}
    shutil.copy(tree / "train/train_11.png", tree / "val/val_03.png")
    result = check(tree, "--fail-on", "error")
    assert result.returncode == 0 and "warning  val: 1 of 5 images" in result.stdout
    assert check(tree).returncode == 1
    (tree / "trainannot/train_03.png").unlink()
    result = check(tree, "--fail-on", "error")
    assert result.returncode == 1
    assert result.stdout.startswith("error    train: 1 image without a label")
    assert check(tree, "--fail-on", "never").returncode == 0
    shutil.rmtree(tmp_path / "out")
    for flags in (("--datadir", tmp_path / "nowhere"), ("--workers", -1), ("--images", -1)):
        check(tree, *flags).assert_error()
    assert not (tmp_path / "out").exists()


def test_script_reports_a_tree_without_readable_files(check, tree, tmp_path):
    for path in tree.rglob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    result = check(tree)
    assert result.returncode == 1 and "48 files unreadable" in result.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["counts"] == {"error": 2, "warning": 0, "note": 0}
    assert report["class_weights"] == {} and report["splits"]["train"]["void_share"] is None


def test_json_report_holds_values_counted_by_hand(run_inside, own_data, tmp_path):
    for path in own_data.rglob("*.*g"):
        path.unlink()
    for i, rows in enumerate(([[7, 7, 7], [7, 3, 9]], [[3, 3, 3], [3, 3, 3]])):
        Image.fromarray(np.array(rows, np.uint8)).save(own_data / f"labels/{i}.png")
        make_image(i).resize((3, 2)).save(own_data / f"images/{i}.png")
    common = ("--dataset", "folders", "--datadir", own_data)
    run_inside("utils/check_dataset.py", *common, "--out", tmp_path / "out", "--workers", 0)
    report = json.loads((tmp_path / "out/report.json").read_text())
    split = report["splits"]["all"]
    assert split["pairs"] == 2 and split["image_sizes"] == {"3x2": 2}
    assert split["label_values"] == {
        "3": {"pixels": 7, "labels": 2, "meaning": "path"},
        "7": {"pixels": 4, "labels": 1, "meaning": "field"},
        "9": {"pixels": 1, "labels": 1, "meaning": "void"},
    }
    assert split["void_share"] == pytest.approx(1 / 12)
    path = split["classes"]["path"]
    assert path == {"pixels": 7, "share": pytest.approx(7 / 12), "labels": 2}
    expected = dict(zip(("field", "path"), class_weights([4 / 12, 7 / 12], 1.1), strict=True))
    assert report["class_weights"]["c = 1.10"] == pytest.approx(expected)


def test_open_splits_with_holdout_checks_the_splits_of_training(own_data):
    shutil.copy(own_data / "images/1.jpg", own_data / "images/2.jpg")
    assert [split.name for split in examine(own_data, "folders").splits] == ["all"]
    (own_data / "labels/5.png").unlink()
    report = examine(own_data, "folders", val_stride=3)
    assert {split.name: len(split.pairs) for split in report.splits} == {"train": 4, "val": 1}
    assert "images/2.jpg ~ images/1.jpg" in found(report)["leak"]
    assert sum(issue.kind == "no-label" for issue in report.issues) == 1
    with pytest.raises(UserError, match="give one of them"):
        examine(own_data, "folders", val_stride=3, val_prefix="1")


def test_script_escapes_names_that_are_not_unicode(check, tree, tmp_path):
    for folder in ("val", "valannot"):
        (tree / folder / "val_00.png").rename(tree / folder / "val\n\udce9.png")
    shutil.copy(tree / "train/train_11.png", tree / "val/val\n\udce9.png")
    result = check(tree, "--images", 29)  # on the sheet and among similar images
    assert result.returncode == 1 and "val\\n\\udce9.png" in result.stdout
    assert "val\\n\\udce9.png" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(clean_tree, tmp_path_factory) -> Path:
    """The page of a tree with faults, one of them in a file with a hostile name."""
    root = Path(shutil.copytree(clean_tree, tmp_path_factory.mktemp("page") / "camvid"))
    shutil.copy(root / "train/train_11.png", root / "val/val_03.png")
    make_image(1).save(root / "train" / HOSTILE)
    for i in range(5):
        (root / f"trainannot/train_{i:02d}.png").unlink()
    report = examine(root)
    weights = {"c = 1.10": [0.5 + i for i in range(11)]}
    path = root / "report.html"
    write_dataset_page(path, "Toy & co", report, worst_aligned(report, 3), weights)
    return path


def test_page_shows_all_parts_escapes_text_and_refers_to_no_other_file(page):
    html = page.read_text(encoding="utf-8")
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "://" not in html and "Toy &amp; co" in html
    assert html.count("label on the image</span>") == 3
    assert re.findall(r'class="badge">(\w+)', html) == ["error", "warning"]
    assert 'data-value="10.5">10.50</td>' in html  # the weight of the last class
    assert html.count("val: val_03.png</span>") == html.count("train: train_11.png</span>") == 1


def test_page_in_a_browser_fits_a_phone_and_loads_all_images(browser, page):
    with opened(browser, page, 360, "dark") as view:
        assert view.evaluate("document.documentElement.scrollWidth") <= 360
        view.locator("#findings summary").first.click()
        assert view.locator("#findings .files li").first.is_visible()
        for image in view.locator("img").all():
            image.scroll_into_view_if_needed()
        view.wait_for_function(
            "[...document.images].every((i) => i.complete && i.naturalWidth > 0)"
        )


def test_class_weights_script_prints_the_weights_of_training(run_inside, clean_tree):
    def run(*flags: object):
        return run_inside("utils/class_weights.py", "--dataset", "camvid", "--datadir", clean_tree,
                          "--workers", 1, *flags)  # fmt: skip

    read = json.loads(run("--format", "json", "--offsets", 1.02, 1.2).stdout)
    counts = examine(clean_tree).splits[0].class_counts.sum(axis=0)
    assert list(read["shares"].values()) == pytest.approx((counts / counts.sum()).tolist())
    assert list(read["shares"])[-1] == "void" and list(read["weights"]) == ["1.02", "1.2"]
    expected = class_weights(counts[:-1] / counts.sum(), 1.02)
    assert list(read["weights"]["1.02"].values()) == pytest.approx(expected.tolist())
    same = yaml.safe_load(run("--format", "yaml", "--offsets", 1.02, 1.2).stdout)
    assert same["weights"][1.2] == read["weights"]["1.2"]
    table = run().stdout
    assert "c=1.1 " in table and "c=1.2 " in table and "24 labels" in table
    run("--offsets", 1).assert_error("more than 1")


def test_camvid_val_is_reported_as_a_leak_but_a_held_out_recording_is_not(real_data):
    (issue,) = examine(real_data / "data/camvid").issues
    assert issue.kind == "leak" and issue.severity == "warning"
    assert "101 of 101 images show places that train shows too" in issue.sentence
    # The frames next to the gap in train that val fills, at both of its ends.
    assert "val/0016E5_07959.jpg ~ train/0016E5_07920.jpg" in issue.sentence
    assert "val/0016E5_08159.jpg ~ train/0016E5_08190.jpg" in issue.sentence
    assert "leak" not in found(examine(real_data / "data/camvid", val_prefix="0006R0"))


def test_cityscapes_has_no_issues(real_data):
    report = examine(real_data / "data/cityscapes_sample", "cityscapes")
    assert [issue.kind for issue in report.issues] == ["unscored"]
    for options in ({}, {"val_stride": 6}):
        assert not examine(real_data / "data/cityscapes_512x256", "cityscapes", **options).issues
