"""The package as pip builds and installs it."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

PROGRAM = """
import lednet, torch
assert "site" in lednet.__file__, lednet.__file__
net, meta = lednet.load_model("camvid-d20")
print(net(torch.rand(1, 3, 32, 48)).shape[1], meta["dataset"])
import lednet.evaluation.report, lednet.exporting.exporter, lednet.training.loop
from lednet.data.folders import CLASS_FILES, read_class_file
assert read_class_file(CLASS_FILES / "ADE20K.yaml").num_classes == 150
from lednet.cli.common import recipe_folder
assert (recipe_folder("train") / "paper.yaml").is_file()
assert (recipe_folder("imagenet") / "modern.yaml").is_file()
"""


def python(*command: object, cwd: Path, **environ: str) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd, env={"PATH": "/usr/bin:/bin", **environ}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """A source archive of what git tracks, and the wheel that pip builds from it."""
    folder = tmp_path_factory.mktemp("built")
    tracked = folder / "tracked"
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (tracked / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tracked / name)
    python("-m", "build", "--no-isolation", "--sdist", "--outdir", folder, tracked, cwd=folder)
    (sdist,) = folder.glob("lednet-*.tar.gz")
    flags = ("--no-deps", "--disable-pip-version-check", "--wheel-dir", folder)
    python("-m", "pip", "wheel", "-q", *flags, sdist, cwd=folder)
    (wheel,) = folder.glob("lednet-*.whl")
    return {"sdist": sdist, "wheel": wheel}


def test_wheel_is_complete(built):
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = set(archive.namelist())
    assert {
        "lednet/py.typed",
        "lednet/data/classes/ADE20K.yaml",
        "lednet/templates/evaluation.html",
        "lednet/templates/dataset.html",
        "lednet/templates/model_card.md",
        "lednet/released/camvid-d20/model.safetensors",
    } <= names
    code = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("lednet/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == code
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    with zipfile.ZipFile(built["wheel"]) as archive:
        text = archive.read(metadata).decode()
    assert "Requires-Dist: torch>=2.6" in text and "visdom" not in text.partition("\n\n")[0]
    with tarfile.open(built["sdist"]) as archive:
        assert any(name.endswith("/save/released/camvid-d20/config.json")
                   for name in archive.getnames())  # fmt: skip


def test_wheel_installed_without_the_clone_runs(built, tmp_path):
    site = tmp_path / "site"
    python("-m", "pip", "install", "-q", "--no-deps", "--target", site, built["wheel"],
           cwd=tmp_path)  # fmt: skip
    output = python("-c", PROGRAM, cwd=tmp_path, PYTHONPATH=str(site))
    assert output == "12 CamVid\n"
    street = ROOT / "docs/toy_street.png"
    python("-m", "lednet", "predict", street, "--backend", "eager", "--device", "cpu",
           cwd=tmp_path, PYTHONPATH=str(site))  # fmt: skip
    assert (tmp_path / "save/predictions/toy_street_labels.png").is_file()
