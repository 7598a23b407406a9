"""The evaluation's page: what is in the file, and how it behaves in a real browser."""

import base64
import contextlib
import io
import re
import shutil
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lednet.data.labels import IGNORE_INDEX, LabelScheme
from lednet.evaluation.page import ERROR_COLOR, ImageRow, Report, encode_panes, write_report
from lednet.html import Figure

HOSTILE = "<script>alert(1)</script>.png"
SCHEME = LabelScheme(
    name="Toy",
    classes=("road", "car", "<b>tram</b>"),
    colors=((128, 64, 128), (0, 0, 142), (0, 80, 100)),
    file_ids={0: 0, 1: 1, 2: 2},
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def toy_panes() -> dict[str, str]:
    label = np.arange(32, dtype=np.uint8).reshape(4, 8) % 3
    return encode_panes(np.full((4, 8, 3), 90, np.uint8), label, label[::-1], SCHEME)


def toy_rows() -> Iterator[ImageRow]:
    # The order by car differs from the order by mIoU, and not every image has a car.
    panes = toy_panes()
    yield ImageRow("b", 0.5, (0.9, 0.1, None), panes)
    yield ImageRow("all_void", None, (None, None, None), panes)
    yield ImageRow("a", 0.2, (0.2, None, None), panes)
    yield ImageRow("c", 0.8, (0.7, 0.9, None), panes)
    yield ImageRow(HOSTILE, 0.4, (None, 0.4, None), panes)


def toy_report(**changes) -> Report:
    arguments = {
        "title": "Toy & co",
        "headline": (Figure("class mIoU", "0.692", "3 classes"), Figure("speed", "71 fps")),
        "scheme": SCHEME,
        "class_iou": (0.75, 0.25, None),
        "matrix": np.array([[12_345, 0, 0, 0], [10, 30, 0, 0], [0, 0, 0, 0]]),
        "tables": {"Options <i>": [("--state", "a&b.pth")]},
        "class_extra": {"iIoU": (None, 0.125, None)},
    }
    return Report(**{**arguments, **changes})


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, toy_report(), toy_rows())
    return path


@pytest.fixture(scope="module")
def html(page_file) -> str:
    return page_file.read_text(encoding="utf-8")


def decode(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_panes_have_the_right_colour_at_each_pixel():
    image = np.full((2, 3, 3), 100, np.uint8)
    truth = np.array([[0, 0, IGNORE_INDEX], [1, 1, IGNORE_INDEX]], np.uint8)
    prediction = np.array([[0, 1, 0], [1, IGNORE_INDEX, 1]], np.uint8)
    panes = {
        key: decode(uri) for key, uri in encode_panes(image, truth, prediction, SCHEME).items()
    }
    road, car, void = (128, 64, 128), (0, 0, 142), (0, 0, 0)
    dim = (48, 48, 48)
    assert list(panes) == ["input", "truth", "prediction", "error"]
    assert np.abs(panes["input"].astype(int) - 100).max() <= 3  # lossy
    assert np.array_equal(panes["truth"], [[road, road, void], [car, car, void]])
    assert np.array_equal(panes["prediction"], [[road, car, road], [car, void, car]])
    wrong = ERROR_COLOR
    assert np.array_equal(panes["error"], [[dim, wrong, void], [dim, wrong, void]])


def test_panes_shrink_and_never_grow():
    image, label = np.zeros((10, 40, 3), np.uint8), np.zeros((10, 40), np.uint8)
    for width, shape in ((20, (5, 20, 3)), (1, (1, 1, 3)), (512, (10, 40, 3))):
        panes = encode_panes(image, label, label, SCHEME, width=width)
        assert {decode(uri).shape for uri in panes.values()} == {shape}


def test_panes_of_different_sizes_are_refused():
    label = np.zeros((4, 8), np.uint8)
    with pytest.raises(ValueError, match="differ in size"):
        encode_panes(np.zeros((4, 8, 3), np.uint8), label, label[:2], SCHEME)


def test_untrusted_text_is_escaped(html):
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.png" in html
    assert "<b>tram" not in html and "<i>" not in html
    assert "a&amp;b.pth" in html


def test_odd_names_are_written(tmp_path):
    names = ("two\nlines", "$\\frac{1}{2}$", "")
    scheme = LabelScheme("odd", names, SCHEME.colors, SCHEME.file_ids)
    rows = [ImageRow("not_utf8_\udce9", 0.5, (0.5, None, None), toy_panes())]
    write_report(tmp_path / "report.html", toy_report(scheme=scheme), rows)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'data-name="not_utf8_\\udce9"' in html
    texts = re.findall(r'<text class="row"[^>]*>([^<]*)<', html)
    assert [text for text in texts if text] == ["two lines", names[1]]


def test_the_file_refers_to_nothing_outside(html):
    # Base64 has no colon, so this finds every absolute address.
    assert "://" not in html
    references = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import (.*)', html)
    found = {part for match in references for part in match if part}
    assert found and all(reference.startswith(("#", "data:")) for reference in found)


def test_an_absent_class_is_said_to_be_absent(html):
    rows = re.findall(r"<tr>\n<th scope=\"row\" data-value.*?</tr>", html, re.DOTALL)
    assert ["absent" in row for row in rows] == [False, False, True]
    assert ">0.750<" in rows[0] and "0.000" not in rows[2] and 'bar"' not in rows[2]


def test_a_matrix_cell_says_its_value_in_words(html):
    titles = re.findall(r"<title>(truth .*?)</title>", html)
    assert len(titles) == 3 * 4
    assert titles[0] == "truth road, predicted road: 100.0 % (12,345 pixels)"
    assert titles[4] == "truth car, predicted road: 25.0 % (10 pixels)"
    assert titles[11] == ("truth &lt;b&gt;tram&lt;/b&gt;, predicted void: truth absent (0 pixels)")
    assert re.findall(r'<text class="(?:weak|strong)"[^>]*>(\d+)<', html) == ["100", "25", "75"]


def test_ids_are_unique(html):
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_the_same_report_gives_the_same_file(tmp_path, html):
    write_report(tmp_path / "again.html", toy_report(), toy_rows())
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_images_are_streamed(tmp_path):
    class Panes(dict):  # a dict proper cannot be watched
        pass

    made = weakref.WeakSet()
    Panes.__hash__ = object.__hash__

    def rows():
        for index in range(50):
            assert len(made) <= 2
            panes = Panes(toy_panes())
            made.add(panes)
            yield ImageRow(f"{index}", 0.5, (0.5, None, None), panes)

    write_report(tmp_path / "report.html", toy_report(), rows())
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data-name=") == 50


def test_a_failing_generator_leaves_no_file(tmp_path):
    def rows():
        yield from toy_rows()
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_report(tmp_path / "report.html", toy_report(), rows())
    assert list(tmp_path.iterdir()) == []


def test_wrong_numbers_of_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="matrix"):
        toy_report(matrix=np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="class_iou"):
        toy_report(class_iou=(0.5,))
    with pytest.raises(ValueError, match="iIoU"):
        toy_report(class_extra={"iIoU": (0.5,)})
    with pytest.raises(ValueError, match="class_iou of short"):
        write_report(tmp_path / "r.html", toy_report(), [ImageRow("short", 0.5, (0.5,), {})])


@contextlib.contextmanager
def chromium(*flags: str) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *flags])
        yield running
        running.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def open_page(browser, page_file):
    """Open the toy report; fails a test in which the page complained or asked the network."""
    pages, complaints = [], []

    def watch_request(request):
        if not request.url.startswith(("file:", "data:")):
            complaints.append(request.url)

    def open_one(width: int = 1280, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        pages.append(page)
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", watch_request)
        page.goto(page_file.as_uri())
        return page

    yield open_one
    for page in pages:
        page.close()
    assert complaints == []


def names(page) -> list[str]:
    # Not inner text: rows out of sight are not laid out and have none.
    return page.locator("#rows > li:not([hidden]) h3").all_text_contents()


def focused(page) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.className")


def test_every_image_is_shown_worst_first(open_page):
    page = open_page()
    assert names(page) == ["a", HOSTILE, "b", "c", "all_void"]
    assert page.locator("#count").inner_text() == "5 of 5 images"
    page.locator("#rows img").last.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every((i) => i.complete && i.naturalWidth === 8)")


@pytest.mark.parametrize(
    ("order", "chosen", "text", "expected"),
    [
        ("best", "", "", ["c", "b", HOSTILE, "a", "all_void"]),
        ("name", "", "", [HOSTILE, "a", "all_void", "b", "c"]),
        ("worst", "1", "", ["b", HOSTILE, "c"]),
        ("best", "1", "", ["c", HOSTILE, "b"]),
        ("worst", "0", "", ["a", "c", "b"]),
        ("worst", "2", "", []),
        ("worst", "", "A", ["a", HOSTILE, "all_void"]),
        ("name", "1", "SCRIPT", [HOSTILE]),
    ],
)
def test_order_and_filters(open_page, order, chosen, text, expected):
    page = open_page()
    page.get_by_label("Order").select_option(order)
    page.get_by_label("Class", exact=True).select_option(chosen)
    page.get_by_label("Name contains").fill(text)
    assert names(page) == expected
    assert page.locator("#count").inner_text() == f"{len(expected)} of 5 images"
    assert page.locator("#nothing").is_visible() == (not expected)
    # And back: what a filter hid is there again.
    page.get_by_label("Order").select_option("worst")
    page.get_by_label("Class", exact=True).select_option("")
    page.get_by_label("Name contains").fill("")
    assert names(page) == ["a", HOSTILE, "b", "c", "all_void"]


def test_the_chosen_class_has_its_iou_beside_the_mean(open_page):
    page = open_page()
    page.get_by_label("Class", exact=True).select_option("car")
    scores = page.locator("#rows > li:not([hidden]) .scores span").all_text_contents()
    assert scores[:2] == ["mIoU 0.500", "car 0.100"]


def test_the_class_table_sorts_with_the_absent_last(open_page):
    page = open_page()

    def column() -> list[str]:
        return page.locator("#class-table tbody th").all_inner_texts()

    button = page.locator("#class-table").get_by_role("button", name="IoU", exact=True)
    assert column() == ["road", "car", "<b>tram</b>"]
    button.click()
    assert column() == ["road", "car", "<b>tram</b>"]  # best first
    assert page.locator("th[aria-sort=descending]").inner_text() == "IoU"
    button.click()
    assert column() == ["car", "road", "<b>tram</b>"]
    page.locator("#class-table").get_by_role("button", name="Class").click()
    assert column() == ["road", "car", "<b>tram</b>"]


def test_the_theme_follows_the_system_and_the_button(open_page):
    def background(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = open_page(scheme="light"), open_page(scheme="dark")
    day, night = background(light), background(dark)
    assert day != night
    for page, after in ((light, night), (dark, day)):
        before = background(page)
        page.get_by_role("button", name="Light / dark").click()
        assert background(page) == after
        page.get_by_role("button", name="Light / dark").click()
        assert background(page) == before


def test_a_phone_does_not_scroll_sideways(open_page):
    page = open_page(width=360)
    page.get_by_text("The matrix as a table").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator(".panes").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # Panes two by two: the first and the third are one above the other.
    left = page.locator("#rows > li:first-child .pane").evaluate_all(
        "panes => panes.map((pane) => Math.round(pane.getBoundingClientRect().left))"
    )
    assert left[0] == left[2] < left[1] == left[3]


def test_the_keyboard_reaches_everything(open_page):
    page = open_page()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(focused(page))
        if reached[-1] == "panes":
            break
    assert reached[0] == "skip"
    controls = [name for name in reached if name in ("theme", "matrix", "order", "class", "text")]
    assert controls == ["theme", "matrix", "order", "class", "text"]
    assert reached[-1] == "panes"

    page.keyboard.press("Enter")
    large, name = page.get_by_role("dialog"), page.locator("#large-name")
    assert large.is_visible() and name.inner_text() == "a"
    page.keyboard.press("ArrowRight")
    assert name.inner_text() == HOSTILE
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert name.inner_text() == "all_void"  # round the end
    page.keyboard.press("ArrowLeft")
    assert name.inner_text() == "c"
    assert page.locator("#large-panes img").count() == 4
    assert page.locator("#large-classes li").all_inner_texts() == ["road 0.700", "car 0.900"]
    page.keyboard.press("Escape")
    assert not large.is_visible()
    # The dialog's own "close" event, which moves the focus, comes a moment later.
    page.wait_for_function("document.activeElement.getAttribute('aria-label') == 'Enlarge c'")


def test_arrow_keys_read_the_matrix(open_page):
    page = open_page()
    page.locator("#matrix").focus()
    for key, expected in (
        ("ArrowUp", "truth road, predicted road: 100.0 % (12,345 pixels)"),
        ("ArrowDown", "truth car, predicted road: 25.0 % (10 pixels)"),
        ("ArrowLeft", "truth car, predicted road: 25.0 % (10 pixels)"),
        ("ArrowRight", "truth car, predicted car: 75.0 % (30 pixels)"),
    ):
        page.keyboard.press(key)
        assert page.locator("#readout").inner_text() == expected
    page.locator("#matrix .cell").nth(3).hover()
    assert page.locator("#readout").inner_text() == "truth road, predicted void: 0.0 % (0 pixels)"
