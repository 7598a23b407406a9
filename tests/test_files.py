"""Finding files: which are taken, which are skipped, and how names are compared."""

import unicodedata

import pytest

from lednet.checkpoint import load_checkpoint
from lednet.data.image_io import open_image
from lednet.data.pairs import name_files
from lednet.errors import UserError
from lednet.exporting.formats import load as load_exported
from lednet.files import IMAGE_SUFFIXES, find_files, match_files, read_text, split_pattern
from lednet.inference.video import VideoReader
from lednet.io import require_writable


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(paths, folder):
    return [path.relative_to(folder).as_posix() for path in paths]


def test_find_files_junk_and_hidden_are_skipped(tmp_path):
    touch(
        tmp_path, "b.png", "a/c.JPG", "a/d.txt", "._b.png", ".hidden.png", "__MACOSX/b.png",
        ".ipynb_checkpoints/b-checkpoint.png", "@eaDir/b.png", ".Trash-0/files/b.png",
        "a/$RECYCLE.BIN/e.png", "a/lost+found/e.png",
    )  # fmt: skip
    (tmp_path / "folder.png").mkdir()
    assert names(find_files(tmp_path, IMAGE_SUFFIXES), tmp_path) == ["a/c.JPG", "b.png"]
    assert "a/d.txt" in names(find_files(tmp_path), tmp_path)
    touch(tmp_path / ".cache/__MACOSX", "a.png")
    assert len(find_files(tmp_path / ".cache/__MACOSX", IMAGE_SUFFIXES)) == 1  # the root may be


def test_find_files_links_are_followed_but_loops_are_not(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    touch(elsewhere, "a.png", "deep/b.png")
    data.mkdir()
    (data / "link").symlink_to(elsewhere)
    (elsewhere / "deep" / "loop").symlink_to(data)
    (data / "missing.png").symlink_to(tmp_path / "nowhere.png")
    found = names(find_files(data, IMAGE_SUFFIXES), data)
    assert found == ["link/a.png", "link/deep/b.png", "missing.png"]


@pytest.mark.parametrize(
    ("source", "folder", "pattern"),
    [
        ("city [1]/*.png", "city [1]", "*.png"),
        ("city [1]/**/x?.png", "city [1]", "**/x?.png"),
        ("*/a.png", ".", "*/a.png"),
        ("[ab].png", ".", "[ab].png"),
    ],
)
def test_split_pattern_existing_folders_are_literal(tmp_path, monkeypatch, source, folder, pattern):
    touch(tmp_path, "city [1]/x1.png")
    monkeypatch.chdir(tmp_path)
    found, rest = split_pattern(source)
    assert (found.as_posix(), rest) == (folder, pattern)
    found, rest = split_pattern(str(tmp_path / source))
    assert (found, rest) == (tmp_path / folder, pattern)


def test_split_pattern_without_wildcards_is_none(tmp_path):
    touch(tmp_path, "city [1]/x1.png")
    assert split_pattern(str(tmp_path / "city [1]" / "missing.png")) is None


def test_match_files_skips_like_find_files(tmp_path):
    touch(tmp_path, "a/1.png", "a/._1.png", "b/2.PNG", "@eaDir/3.png", "b/.x/4.png")
    (tmp_path / "a" / "5.png").mkdir()
    assert names(match_files(tmp_path, "**/*"), tmp_path) == ["a/1.png", "b/2.PNG"]


def test_name_files_composed_and_decomposed_names_are_equal(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Köln_1") for form in ("NFC", "NFD"))
    touch(tmp_path, f"a/{composed}_image.png", f"b/{decomposed}_label.png")
    images = name_files(tmp_path / "a", "", "_image").names
    labels = name_files(tmp_path / "b", "", "_label").names
    assert images.keys() == labels.keys() == {composed}


def test_name_files_unused_images_are_returned(tmp_path):
    touch(tmp_path, "a_x.PNG", "b_x.gif", "c.png", "d.txt")
    files = name_files(tmp_path, "", "_x")
    assert list(files.names) == ["a"]
    assert names(files.unused, tmp_path) == ["b_x.gif", "c.png"]


def test_name_files_no_image_names_what_is_there(tmp_path):
    touch(tmp_path, "b.gif")
    with pytest.raises(UserError, match=r"holds no images \(.png, .*\), but b.gif: check"):
        name_files(tmp_path, "")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_read_text_with_and_without_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "list.txt"
    path.write_bytes("Köln\r\nUlm\r\n".encode(encoding))
    assert read_text(path).splitlines() == ["Köln", "Ulm"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb".encode("utf-16"), "UTF-16 or UTF-32 text: save it as UTF-8"),
        ("a\nb".encode("utf-16-le"), "UTF-16 or UTF-32 text"),
        ("a\nKöln".encode("latin-1"), r"not UTF-8 text \(line 2\): save it as UTF-8"),
    ],
)
def test_read_text_other_encodings_are_named(tmp_path, content, message):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(path)


def test_require_writable_names_what_is_in_the_way(tmp_path):
    touch(tmp_path, "file")
    (tmp_path / "folder.png").mkdir()
    require_writable(None)
    require_writable(tmp_path / "new/er/a.PNG", (".png",))
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "new", folder=True)
    assert names(tmp_path.iterdir(), tmp_path).count("new") == 0
    for path, options, message in (
        ("folder.png", {}, "it is a folder; give the name of a file"),
        ("bars.xyz", {"suffixes": (".png",)}, r"suffix, which is none of \.png"),
        ("bars", {"suffixes": (".png",)}, "suffix"),
        ("file/a.png", {}, "file is a file; choose another folder"),
        ("file", {"folder": True}, "file is a file; choose another folder"),
        ("x" * 300 + "/a.png", {}, "File name too long"),
    ):
        with pytest.raises(UserError, match=f"cannot write .*{message}"):
            require_writable(tmp_path / path, **options)


def test_require_writable_read_only_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write to any folder
    with pytest.raises(UserError, match="is read-only; choose another folder"):
        require_writable(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page"),
    ],
)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.pth", load_checkpoint),
        ("model.safetensors", load_checkpoint),
        ("a.png", open_image),
        ("a.mp4", VideoReader),
        ("a.onnx", load_exported),
    ],
)
def test_files_that_were_not_downloaded_are_named(tmp_path, name, read, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} .*{message}"):
        read(tmp_path / name)
