"""Recipes: their format, and the precedence of options."""

import argparse
import json
from pathlib import Path

import pytest
from conftest import ROOT

from lednet import UserError
from lednet.cli.common import POSITIVE
from lednet.cli.train_args import add_recipe_flags, parse_flags
from lednet.training.config import recipe_path, set_recipe

SHIPPED = sorted(ROOT.glob("*/recipes/*.yaml"))
ABOUT = "about: {data: d, command: c, hours: h, score: s}\n"


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--num-epochs", type=POSITIVE)
    parser.add_argument("--augment", choices=("paper", "modern"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser


def write(path: Path, options: str, about: str = ABOUT) -> Path:
    path.write_text(f"{about}options: {options}\n")
    return path


def test_set_recipe_sets_defaults_that_flags_override(parser, tmp_path):
    options = "{lr: 5e-4, num_epochs: 010, augment: modern, compile: true, out: here}"
    set_recipe(parser, write(tmp_path / "r.yaml", options))
    expected = {
        "lr": 5e-4, "num_epochs": 10, "augment": "modern", "compile": True, "out": Path("here"),
    }  # fmt: skip
    assert vars(parser.parse_args([])) == expected
    assert vars(parser.parse_args(["--num-epochs", "9"])) == expected | {"num_epochs": 9}


def test_set_recipe_expands_the_home_folder(parser, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    set_recipe(parser, write(tmp_path / "r.yaml", "{out: ~/runs}"))
    assert parser.parse_args([]).out == Path("/home/me/runs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{speed: 3}", "no option 'speed'"),
        ("{lr: fast}", "lr cannot be 'fast'"),
        ("{num_epochs: [1]}", "num_epochs cannot be"),
        ("{num_epochs: 0}", "num_epochs cannot be '0'"),
        ("{augment: wild}", "augment cannot be 'wild'"),
        ("{num_epochs: 3.7}", "num_epochs cannot be '3.7'"),
        ("{compile: 1}", "compile cannot be '1'"),
        ("{out: [a]}", "out cannot be"),
        ("7", "must hold `about` and `options`"),
        ("{lr: [}", "is neither YAML nor JSON"),
        ("{lr: 1}\nabout: {data: d, command: c, score: s}", "does not say its hours"),
    ],
)
def test_set_recipe_with_invalid_recipe_is_refused(parser, tmp_path, options, message):
    path = write(tmp_path / "r.yaml", options, "" if "about" in options else ABOUT)
    with pytest.raises(UserError, match=message) as caught:
        set_recipe(parser, path)
    assert "r.yaml" in str(caught.value)


def test_recipe_path_of_an_unknown_name_lists_the_known_ones(tmp_path):
    write(tmp_path / "calm.yaml", "{}")
    assert recipe_path("calm", tmp_path) == tmp_path / "calm.yaml"
    with pytest.raises(UserError, match="no recipe 'wild': there are calm"):
        recipe_path("wild", tmp_path)
    with pytest.raises(UserError, match=r"no recipe \S*gone.yaml"):
        recipe_path(str(tmp_path / "gone.yaml"), tmp_path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_shipped_recipe_is_read_by_its_script(run_inside, path, tmp_path):
    script = {"train": "train/main.py", "imagenet": "imagenet/lednet_imagenet.py"}[path.parts[-3]]
    run_inside(script, "--recipe", path.stem, "--datadir", tmp_path / "nowhere").assert_error(
        "nowhere"
    )


def test_own_recipe_overrides_the_papers(train, run_inside, tmp_path):
    recipe = write(tmp_path / "mine.yaml", "{num_epochs: 3, lr: 0.002, clip_norm: 5}")
    train("--decoder", "--recipe", recipe).check()
    options = json.loads((tmp_path / "run" / "options.json").read_text())["options"]
    expected = {"lr": 0.002, "clip_norm": 5, "num_epochs": 1, "batch_size": 2,
                "weight_decay": 1e-4, "augment": "paper", "recipe": str(recipe)}  # fmt: skip
    assert {key: options[key] for key in expected} == expected
    resume = ("train/main.py", "--savedir", tmp_path / "run", "--resume")
    run_inside(*resume, "--recipe", "paper").assert_error("resume it without --recipe")
    recipe.unlink()  # options.json has its options
    assert run_inside(*resume).returncode == 0


def test_parse_flags_asks_for_the_run_folder_with_the_options_of_the_recipe(monkeypatch, tmp_path):
    """--resume looks for the run of the recipe's data set, not of the paper's."""
    write(tmp_path / "paper.yaml", "{dataset: cityscapes}")
    write(tmp_path / "camvid.yaml", "{dataset: camvid}")
    parser = argparse.ArgumentParser()
    for flag in ("--dataset", "--resume"):
        parser.add_argument(flag)
    add_recipe_flags(parser.add_argument_group(), "Adam")
    monkeypatch.setattr("sys.argv", ["main.py", "--recipe", "camvid", "--resume", "auto"])
    asked = []
    args = parse_flags(
        parser, lambda args: asked.append(args.dataset) or tmp_path / "none", tmp_path
    )
    assert asked == ["camvid"] and args.resume is None
