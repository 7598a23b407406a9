"""Finding files: which are taken, which are skipped, and how names are compared."""

import unicodedata

import pytest

from lednet.files import (
    IMAGE_SUFFIXES,
    find_files,
    key_files,
    match_files,
    split_pattern,
    unused_images,
)


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


def test_find_files_root_may_be_hidden(tmp_path):
    touch(tmp_path / ".cache" / "__MACOSX", "a.png")
    assert len(find_files(tmp_path / ".cache" / "__MACOSX", IMAGE_SUFFIXES)) == 1


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
    assert names(match_files(tmp_path, "**/*", IMAGE_SUFFIXES), tmp_path) == ["a/1.png", "b/2.PNG"]


def test_key_files_composed_and_decomposed_names_are_equal(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Köln_1") for form in ("NFC", "NFD"))
    touch(tmp_path, f"a/{composed}_image.png", f"b/{decomposed}_label.png")
    images = key_files(find_files(tmp_path / "a"), tmp_path / "a", "_image")
    labels = key_files(find_files(tmp_path / "b"), tmp_path / "b", "_label")
    assert images.keys() == labels.keys() == {composed}


def test_key_files_equal_stems_in_two_folders_are_two_keys(tmp_path):
    touch(tmp_path, "rec1/0.png", "rec2/0.png", "rec1/0.jpg")
    keys = key_files(find_files(tmp_path), tmp_path)
    assert {key: len(paths) for key, paths in keys.items()} == {"rec1/0": 2, "rec2/0": 1}


def test_unused_images_other_formats_are_named(tmp_path):
    touch(tmp_path, "a.png", "b.gif", "c.txt")
    used = {tmp_path / "a.png"}
    assert names(unused_images([tmp_path], used), tmp_path) == ["b.gif"]
