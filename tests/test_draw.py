"""Colour maps, overlays, legends, and the script that draws them for any images."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, COLORS
from fakes import content, read
from PIL import Image

from lednet import LEDNet, UserError, fonts
from lednet.checkpoint import save_checkpoint
from lednet.data.labels import IGNORE_INDEX, LabelScheme, camvid_scheme, cityscapes_scheme
from lednet.inference.predictor import Predictor
from lednet.model import load_model
from lednet.plots import contact_sheet, plot_class_iou, tile_sheet
from lednet.visualization import (
    ImageTooLarge,
    Visualizer,
    colorize,
    draw_legend,
    output_scheme,
    overlay,
    write_picture,
)

SCHEME = camvid_scheme()
VOID = SCHEME.num_classes


def test_colorize_void_is_black():
    label = np.array([[0, 1, VOID, IGNORE_INDEX]], np.uint8)
    black = [0, 0, 0]
    assert colorize(label, SCHEME).tolist() == [[[128, 128, 128], [128, 0, 0], black, black]]


@pytest.mark.parametrize(
    ("alpha", "pixel"),
    [(0, [200, 101, 3]), (0.25, [182, 76, 2]), (0.5, [164, 51, 2]), (1, [128, 0, 0])],
)
def test_overlay_mixes_class_colors_and_leaves_void(alpha, pixel):
    image = np.full((40, 3, 3), [200, 101, 3], np.uint8)
    label = np.array([[1, VOID, IGNORE_INDEX]] * 40, np.uint8)
    before = [200, 101, 3]
    assert overlay(image, label, SCHEME, alpha).tolist() == [[pixel, before, before]] * 40
    assert image.tolist() == [[before] * 3] * 40  # the caller's image is not drawn on
    with pytest.raises(ValueError, match="alpha"):
        overlay(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8), SCHEME, 1.5)


def colored(label: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """Class colours with the legend below."""
    return Visualizer(scheme).draw("color", np.zeros((*label.shape, 3), np.uint8), label)


@pytest.mark.parametrize("width", [200, 1024])
def test_visualizer_draws_the_legend_below_the_image(width):
    label = np.random.default_rng(0).integers(0, 20, (20, width)).astype(np.uint8)
    picture = colored(label, cityscapes_scheme())
    assert picture.shape[0] > 20 and picture.shape[1:] == (width, 3)
    np.testing.assert_array_equal(picture[:20], colorize(label, cityscapes_scheme()))
    shown = {tuple(color) for color in picture[20:].reshape(-1, 3).tolist()}
    assert shown >= {*cityscapes_scheme().colors, (0, 0, 0), (255, 255, 255)}


def test_visualizer_narrow_image_is_padded_to_the_legend():
    label = np.full((5, 10), 9, np.uint8)
    picture = colored(label, SCHEME)
    np.testing.assert_array_equal(picture[:5, :10], colorize(label, SCHEME))
    assert (picture[:5, 10:] == 255).all()
    assert (picture[:, -1] == 255).all()  # no letter is cut off
    assert not (picture[5:, 40:] == 255).all()


def test_draw_legend_wraps_and_grows_with_its_letters():
    narrow, wide = draw_legend(SCHEME, 250), draw_legend(SCHEME, 1500)
    assert (narrow.width, wide.width) == (250, 1500)
    assert narrow.height > 2 * wide.height
    assert draw_legend(SCHEME, 1500, font_size=30).height > wide.height
    scheme = LabelScheme("two", ("grass", "snow"), ((0, 200, 0), (250, 250, 250)), {0: 0, 1: 1})
    small, large = (len(colored(np.zeros((1, width), np.uint8), scheme)) for width in (512, 2048))
    assert large > 1.8 * small


@pytest.mark.parametrize("void", [True, False])
def test_draw_legend_void_is_optional(void):
    pixels = np.asarray(draw_legend(SCHEME, 500, void=void))
    black = torch.from_numpy((pixels == 0).all(axis=2)).float()[None, None]
    # A black square of 8 pixels is more than a letter's stroke.
    assert bool((torch.nn.functional.avg_pool2d(black, 8, 1) == 1).any()) == void


def named_scheme(*names: str) -> LabelScheme:
    colors = tuple((9, 9, 9) for _ in names)
    return LabelScheme("x", names, colors, {i: i for i in range(len(names))})


@pytest.mark.parametrize(
    ("one", "other"), [("\u0434\u043e\u043c", "\u043b\u0435\u0441"), ("\u8def", "\u6811")]
)
def test_draw_legend_tells_names_of_other_scripts_apart(one, other):
    legends = [np.asarray(draw_legend(named_scheme(name), 200)) for name in (one, other)]
    assert not np.array_equal(*legends)


def test_drawable_letters_of_no_font_are_codes_and_logged(monkeypatch, caplog):
    monkeypatch.setattr(fonts, "find_font", lambda text: None)
    fonts._warn_missing.cache_clear()
    assert [fonts.drawable(name) for name in ("\u9053 a", "\u8def", "a")] == [
        "\\u9053 a", "\\u8def", "a",
    ]  # fmt: skip
    assert [record.getMessage().split(" letters")[0] for record in caplog.records] == [
        "no installed font has the CJK"
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("title", ["\u9053", "$\\x$"])
def test_plot_class_iou_names_of_any_script_or_with_dollar_signs_are_drawn(tmp_path, title):
    names = ("\u9053\u8def", "\u0434\u043e\u043c", "\ub3c4\ub85c", "road", "5$ to 10$", "a$^$b")
    iou = dict.fromkeys(names, 0.5)
    plot_class_iou(iou, named_scheme(*names), tmp_path / "a.png", title)
    assert (tmp_path / "a.png").stat().st_size


def test_jpeg_of_too_many_pixels_a_side_is_refused_by_name(tmp_path):
    long = np.zeros((1, 65_501, 3), np.uint8)
    with pytest.raises(ImageTooLarge, match=r"a\.jpg: it would be 65501x1, .* write PNG"):
        write_picture(tmp_path / "a.jpg", long)
    write_picture(tmp_path / "a.jpg", long[:, 1:])
    write_picture(tmp_path / "a.png", long)
    tall = np.zeros((66_000, 10, 3), np.uint8)
    with pytest.raises(ImageTooLarge, match=r"b\.JPEG: it would be"):
        tile_sheet([(tall,)], "a", SCHEME, tmp_path / "b.JPEG", tile_width=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.png"]


def test_contact_sheet_has_columns_and_legend(tmp_path):
    image = np.full((40, 80, 3), 17, np.uint8)
    label = np.zeros((40, 80), np.uint8)
    contact_sheet([(image, label, label)], SCHEME, tmp_path / "sheet.png", tile_width=200)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    legend = np.asarray(draw_legend(SCHEME, sheet.shape[1]))
    np.testing.assert_array_equal(sheet[-len(legend) :], legend)
    assert sheet[60, 100].tolist() == [17] * 3
    assert sheet[60, 300].tolist() == sheet[60, 520].tolist() == [128] * 3


def test_output_scheme_from_metadata_or_number_of_outputs():
    named = output_scheme({"classes": CLASSES, "colors": COLORS, "dataset": "mine"}, 12, "w.pth")
    assert (named.name, named.classes) == ("mine", tuple(CLASSES))
    assert colorize(np.array([[3]]), named).tolist() == [[COLORS[3]]]
    assert output_scheme({}, 20, "w.pth").classes == cityscapes_scheme().classes
    assert output_scheme({}, 12, "w.pth").colors == camvid_scheme().colors
    unnamed = output_scheme({}, 4, "w.pth")
    assert unnamed.classes == ("class 0", "class 1", "class 2") and len(set(unnamed.colors)) == 3


@pytest.mark.parametrize(
    ("meta", "outputs"),
    [({"classes": CLASSES, "colors": COLORS}, 20), ({"classes": CLASSES}, 12)],
)
def test_output_scheme_unknown_classes_are_rejected(meta, outputs):
    with pytest.raises(UserError, match=r"w\.pth .*give weights"):
        output_scheme(meta, outputs, "w.pth")


# The script


@pytest.fixture
def draw(run_inside, weights, photos, tmp_path):
    """Run the script on the photos. Later flags override."""

    def run(*more: object):
        return run_inside(
            "test/eval_cityscapes_color.py", "--weights", weights, "--input", photos, "--out",
            tmp_path / "out", "--device", "cpu", *more,
        )  # fmt: skip

    return run


def test_color_script_folder_draws_colors_and_overlays(draw, weights, photos, tmp_path):
    result = draw("--no-legend", "--alpha", 0.25).check()
    assert "2 of 2 images" in result.stdout
    names = [f"{folder}a_{kind}.png" for folder in ("", "sub/") for kind in ("color", "overlay")]
    assert sorted(content(tmp_path / "out")) == names
    scheme = output_scheme({"classes": CLASSES, "colors": COLORS}, 12, weights)
    predictor = Predictor(load_model(weights)[0], (48, 64), backend="eager")
    for folder in ("", "sub/"):
        image = read(photos / f"{folder}a.png")
        label = predictor(image).labels
        color = read(tmp_path / f"out/{folder}a_color.png")
        np.testing.assert_array_equal(color, colorize(label, scheme))
        mixed = read(tmp_path / f"out/{folder}a_overlay.png")
        np.testing.assert_array_equal(mixed, overlay(image, label, scheme, 0.25))


def test_color_script_resumes_and_overwrites(draw, tmp_path):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    earlier = ("a_color.png", "a_overlay.png", "sub/a_overlay.png")
    for name in earlier:
        (out / name).write_text("earlier")
    result = draw()
    assert "1 of 2 images" in result.stdout and "1 were there already" in result.stdout
    assert all((out / name).read_text() == "earlier" for name in earlier)
    assert read(out / "sub/a_color.png").size
    assert "2 of 2 images" in draw("--overwrite").stdout
    assert all(read(out / name).size for name in earlier)


def test_color_script_truncated_image_is_named(draw, photos, tmp_path):
    path = photos / "sub/a.png"
    path.write_bytes(path.read_bytes()[:-200])
    draw().assert_error(str(path), "is damaged")
    assert sorted(content(tmp_path / "out")) == ["a_color.png", "a_overlay.png"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--out", "{tmp}/photos"), ("photos", "choose another")),
        (("--weights", "{tmp}/other.pth"), ("other.pth", "5 outputs")),
    ],
)
def test_color_script_wrong_options_are_refused(draw, flags, words, tmp_path):
    save_checkpoint(tmp_path / "other.pth", LEDNet(5), {"size": [48, 64], "classes": ["a"]})
    draw(*(str(flag).format(tmp=tmp_path) for flag in flags)).assert_error(*words)
